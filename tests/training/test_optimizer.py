"""The learning rate at steps where it was worked out by hand."""

import math

import pytest

from tar.training.optimizer import learning_rate


def test_step_schedule_of_twelve_epochs_of_a_thousand_steps():
    by_hand = {0: 0.001, 50: 0.001 + 0.999 * 0.1, 250: 0.5005, 500: 1}  # the warm-up
    by_hand |= {501: 1, 7_999: 1, 8_000: 0.1, 10_999: 0.1, 11_000: 0.01, 11_999: 0.01}  # epochs 8 and 11
    assert {step: learning_rate(step, 12_000, 1.0) for step in by_hand} == pytest.approx(by_hand)


@pytest.mark.parametrize(("step", "warmup", "factor"), [(5, 500, 0.5005), (10, 500, 1), (0, 0, 1)])
def test_warmup_is_cut_to_a_tenth_of_the_run_or_left_out(step, warmup, factor):
    assert learning_rate(step, 100, 0.02, warmup=warmup) == pytest.approx(0.02 * factor)


def test_cosine_schedule():
    high, low = (1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2
    by_hand = {0: 0.001, 250: high, 500: 0.5, 750: low, 1000: 0, 1500: 0}
    got = {step: learning_rate(step, 1000, 1.0, warmup=100, kind="cosine") for step in by_hand}
    assert got == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_the_shortest_runs_have_a_learning_rate(kind):
    assert [learning_rate(0, total, 0.02, kind=kind) for total in (0, 1, 5)] == pytest.approx([0.02 * 0.001] * 3)
