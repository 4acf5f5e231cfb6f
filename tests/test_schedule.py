"""The distillation weight and the learning rate at steps where they were worked out by hand."""

import math

import pytest

from tar.schedule import DECAYS, decay, learning_rate


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", {0: 1, 3: 0.75, 6: 0.5, 11: 1 / 12, 12: 0, 20: 0}),
        ("cosine", {0: 1, 3: (1 + math.sqrt(0.5)) / 2, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0, 20: 0}),
        ("step", {0: 1, 7: 1, 8: 0.5, 10: 0.5, 11: 0.25, 12: 0.25, 20: 0.25}),
        ("none", {0: 1, 6: 1, 12: 1, 20: 1}),
    ],
)
def test_decay_over_twelve_steps(kind, values):
    assert {step: decay(step, 12, kind) for step in values} == pytest.approx(values, abs=1e-12)


def test_decay_is_linear_unless_told_otherwise():
    assert decay(25, 100) == 0.75


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_ends_at_exactly_zero(kind):
    """Exactly, because at 0 the teacher is not computed."""
    assert decay(997, 997, kind) == 0


@pytest.mark.parametrize("kind", DECAYS)
def test_decay_never_rises_and_stays_in_its_range(kind):
    values = [decay(step, 240, kind) for step in range(300)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1 and values[-1] >= 0
    assert (values[-1] == 1) == (kind == "none")


@pytest.mark.parametrize("kind", DECAYS)
def test_decay_of_a_run_without_steps_starts_at_one(kind):
    assert decay(0, 0, kind) == 1


def test_step_decay_falls_where_the_learning_rate_falls():
    falls = [s for s in range(1, 1200) if decay(s, 1200, "step") < decay(s - 1, 1200, "step")]
    assert falls == [800, 1100]


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        *[(0, 0.001), (50, 0.001 + 0.999 * 0.1), (250, 0.5005), (500, 1)],  # the warm-up
        *[(501, 1), (7_999, 1), (8_000, 0.1), (10_999, 0.1), (11_000, 0.01), (11_999, 0.01)],  # epochs 8 and 11
    ],
)
def test_step_schedule_of_twelve_epochs_of_a_thousand_steps(step, factor):
    assert learning_rate(step, 12_000, 0.02) == pytest.approx(0.02 * factor)


def test_warmup_is_cut_to_a_tenth_of_the_run():
    assert learning_rate(5, 100, 0.02, warmup=500) == pytest.approx(0.02 * 0.5005)
    assert learning_rate(10, 100, 0.02, warmup=500) == pytest.approx(0.02)


def test_no_warmup_starts_at_the_base_rate():
    assert learning_rate(0, 100, 0.02, warmup=0) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.001), (250, (1 + math.sqrt(0.5)) / 2), (500, 0.5), (750, (1 - math.sqrt(0.5)) / 2)]
)
def test_cosine_schedule(step, factor):
    assert learning_rate(step, 1000, 0.04, warmup=100, kind="cosine") == pytest.approx(0.04 * factor)


@pytest.mark.parametrize("step", [1000, 1500])
def test_cosine_schedule_ends_at_zero(step):
    assert learning_rate(step, 1000, 0.04, kind="cosine") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["step", "cosine"])
@pytest.mark.parametrize("total", [0, 1, 5])
def test_the_shortest_runs_have_a_learning_rate(total, kind):
    assert learning_rate(0, total, 0.02, kind=kind) == pytest.approx(0.02 * 0.001)


def test_unknown_kinds_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'sqrt'.*linear"):
        decay(1, 10, "sqrt")
    with pytest.raises(ValueError, match=r"'poly'.*step"):
        learning_rate(1, 10, 0.1, kind="poly")
