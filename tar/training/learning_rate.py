"""The learning rate of each step."""

import math

from tar.method.decay import DROPS

SCHEDULES = ("step", "cosine")


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
