"""The weight of the distillation, lambda(t): it falls while the training goes on."""

import math

DECAYS = ("linear", "cosine", "step", "none")
DROPS = (8 / 12, 11 / 12)  # of the run: where `step` halves the weight, and the step schedule the learning rate


def decay(step, end_step, kind="linear"):
    """The distillation weight of an optimisation step. The paper lets it decay; the linear form per step is our choice.

        linear: 1 - t / t_end.  cosine: (1 + cos(pi t / t_end)) / 2.  step: halves at each of DROPS.  none: 1.

    Args:
        step: optimisation steps done, t.
        end_step: t_end, where linear and cosine reach 0: the end of the run, or of --decay-end's part of it.
        kind: one of DECAYS.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: no such kind.
    """
    done = min(max(step / max(end_step, 1), 0.0), 1.0)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return (1.0 + math.cos(math.pi * done)) / 2
    if kind == "step":
        return 0.5 ** sum(done >= drop for drop in DROPS)
    if kind == "none":
        return 1.0
    raise ValueError(f"no decay is called {kind!r}; there are {', '.join(DECAYS)}")
