"""What a run says of its progress."""

from argparse import Namespace

import pytest
import torch

from tar.training import progress
from tar.training.process import Process
from tar.training.progress import Progress, duration

CPU = torch.device("cpu")


class Told(Process):
    """A process that keeps what it says."""

    def say(self, text):
        self.lines = [*getattr(self, "lines", []), text]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (5400, "1 h 30 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.fixture
def clock(monkeypatch):
    """[seconds] that the progress reads, and a standard error that is no terminal."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", Namespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_a_plain_line_comes_once_an_interval_with_the_time_left(clock):
    process = Told(0, 1, CPU, "none")
    shown = Progress(process, "plain r10", 2, 100, 8)
    assert list(shown.epoch([1, 2], 1, 0)) == [1, 2]
    for batch, clock[0] in ((5, 10.0), (30, 60.0), (35, 70.0), (65, 130.0)):
        rate = shown.rate_until(batch)
        assert rate == pytest.approx(4.0)  # 8 images in 2 seconds
        shown.show(1, 40, {"loss": 1.5, "loss_box_reg": 0.25, "distill_cls": 0.5}, rate)
    assert len(process.lines) == 2
    for line in process.lines:
        assert line.startswith("plain r10 1/2  step 40 of 100  loss 1.500 (box_reg 0.250 distill_cls 0.500)")
        assert line.endswith("4 images/s  2 min left")  # 60 steps of 8 images at 4 images/s


def test_the_demonstration_says_once_how_long_its_runs_will_take(clock):
    process = Told(0, 1, CPU, "none", runs_ahead=3.0)
    shown = Progress(process, "plain r10", 2, 100, 8)
    shown.epoch([], 1, 0)
    for step in range(1, 21):
        clock[0] = 2.0 * step
        shown.announce(step)
    [line] = process.lines
    assert "10 min" in line  # 3 runs of 100 steps of 2 seconds


def test_a_terminal_has_a_bar_and_no_plain_lines(monkeypatch):
    process = Told(0, 1, CPU, "none")
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress(process, "plain r10", 2, 100, 8)
    for _ in shown.epoch([1], 1, 0):
        shown.show(1, 40, {"loss": 1.5}, 4.0)
        assert "loss 1.500" in shown.bar.postfix and "2 min left" in shown.bar.postfix
    assert not hasattr(process, "lines")


def test_other_ranks_are_quiet(capsys):
    process = Process(1, 2, CPU, "none")
    process.say("a word")
    assert list(process.progress("bar")([1, 2])) == [1, 2]
    assert capsys.readouterr() == ("", "")
