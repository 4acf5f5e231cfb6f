"""The distillation weight at steps where it was worked out by hand."""

import math

import pytest

from tar.method.decay import decay

BY_HAND = {
    "linear": {0: 1, 3: 0.75, 6: 0.5, 11: 1 / 12, 12: 0, 20: 0},
    "cosine": {0: 1, 3: (1 + math.sqrt(0.5)) / 2, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0, 20: 0},
    "step": {0: 1, 7: 1, 8: 0.5, 10: 0.5, 11: 0.25, 12: 0.25, 20: 0.25},
    "none": {0: 1, 6: 1, 12: 1, 20: 1},
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_decay_over_twelve_steps(kind):
    assert {step: decay(step, 12, kind) for step in BY_HAND[kind]} == pytest.approx(BY_HAND[kind], abs=1e-12)
    assert decay(0, 0, kind) == 1  # a run without steps
    if kind in ("linear", "cosine"):
        assert decay(997, 997, kind) == 0  # exactly: the teacher is not run where the weight is 0


def test_decay_is_linear_unless_told_otherwise_and_refuses_an_unknown_kind():
    assert decay(25, 100) == 0.75
    with pytest.raises(ValueError, match=r"'sqrt'.*linear"):
        decay(1, 10, "sqrt")
