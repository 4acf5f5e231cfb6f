"""What changes with the optimisation step: the learning rate and the weight of the distillation."""

import math

DECAYS = ("linear", "cosine", "step", "none")
SCHEDULES = ("step", "cosine")
DROPS = (8 / 12, 11 / 12)  # of the run: where the step schedule divides the learning rate by ten


def decay(step, total_steps, kind="linear"):
    """The distillation weight lambda(t) (README, Decay; the paper decays it, the linear form is a choice).

    linear: 1 - t / t_max.  cosine: (1 + cos(pi t / t_max)) / 2.  step: halves at each drop of the learning rate.
    none: 1.

    Args:
        step: optimisation steps done, t.
        total_steps: those until the decay's end, t_max: the whole run, or --decay-end's part of it.
        kind: one of DECAYS.

    Returns:
        float in [0, 1].
    """
    done = min(max(step / max(total_steps, 1), 0.0), 1.0)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return (1.0 + math.cos(math.pi * done)) / 2
    if kind == "step":
        return 0.5 ** sum(done >= drop for drop in DROPS)
    if kind == "none":
        return 1.0
    raise ValueError(f"no decay is called {kind!r}; there are {', '.join(DECAYS)}")


def learning_rate(step, total_steps, base, warmup=500, kind="step"):
    """The learning rate of a step: a linear warm-up from base / 1000, then the schedule.

    step: base, divided by ten after 8/12 and again after 11/12 of the run (epochs 8 and 11 of the paper's 12).
    cosine: half a cosine from base to 0.

    Args:
        step, total_steps: as in decay.
        base: the learning rate after the warm-up.
        warmup: steps of warm-up; cut to a tenth of the run if that is shorter.
        kind: one of SCHEDULES.
    """
    warmup = min(warmup, max(total_steps // 10, 1))
    ramp = min(1.0, 0.001 + 0.999 * step / warmup) if warmup else 1.0
    done = step / max(total_steps, 1)
    if kind == "step":
        return base * ramp * 0.1 ** sum(done >= drop for drop in DROPS)
    if kind == "cosine":
        return base * ramp * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    raise ValueError(f"no schedule is called {kind!r}; there are {', '.join(SCHEDULES)}")
