"""How often the host would wait for a GPU: the distillation adds few times to the detector's own."""

import pytest
import torch
from small_detectors import KINDS, batch, make_step, pair, run
from waits import waits_of


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_adds_one_wait(kind):
    """One for the positive regions of all images; the backbone level is dense, as on a GPU."""
    student, teacher = pair(kind)
    step = make_step(student, teacher, mask="full")
    plain, tar = (waits_of(lambda t=t: run(step, batch(), t)) for t in (None, teacher))
    assert plain > 0 and tar - plain == 1


def test_the_count_knows_each_kind_of_wait():
    x = torch.arange(6.0)
    assert waits_of(lambda: x[x > 2]) == 1
    assert waits_of(lambda: x.nonzero()) == 1
    assert waits_of(lambda: x.sum().item()) == 1
    assert waits_of(lambda: x.tolist()) == 1
    assert waits_of(lambda: x[torch.tensor([1, 2])]) == 0
