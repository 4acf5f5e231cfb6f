"""The learning rate at steps where it was worked out by hand."""

import math

import pytest

from tar.training.optimizer import learning_rate


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        *[(0, 0.001), (50, 0.001 + 0.999 * 0.1), (250, 0.5005), (500, 1)],  # the warm-up
        *[(501, 1), (7_999, 1), (8_000, 0.1), (10_999, 0.1), (11_000, 0.01), (11_999, 0.01)],  # epochs 8 and 11
    ],
)
def test_step_schedule_of_twelve_epochs_of_a_thousand_steps(step, factor):
    assert learning_rate(step, 12_000, 0.02) == pytest.approx(0.02 * factor)


@pytest.mark.parametrize(("step", "warmup", "factor"), [(5, 500, 0.5005), (10, 500, 1), (0, 0, 1)])
def test_warmup_is_cut_to_a_tenth_of_the_run_or_left_out(step, warmup, factor):
    assert learning_rate(step, 100, 0.02, warmup=warmup) == pytest.approx(0.02 * factor)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.001), (250, (1 + math.sqrt(0.5)) / 2), (500, 0.5), (750, (1 - math.sqrt(0.5)) / 2), (1000, 0), (1500, 0)],
)
def test_cosine_schedule(step, factor):
    assert learning_rate(step, 1000, 0.04, warmup=100, kind="cosine") == pytest.approx(0.04 * factor, abs=1e-12)


@pytest.mark.parametrize("kind", ["step", "cosine"])
@pytest.mark.parametrize("total", [0, 1, 5])
def test_the_shortest_runs_have_a_learning_rate(total, kind):
    assert learning_rate(0, total, 0.02, kind=kind) == pytest.approx(0.02 * 0.001)
