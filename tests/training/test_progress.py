"""What a run says of its progress."""

from argparse import Namespace

import pytest
import torch

from tar.training import progress
from tar.training.process import Process
from tar.training.progress import Progress, duration


def test_durations():
    words = {0: "0 s", 89: "89 s", 90: "2 min", 5340: "89 min", 5400: "1 h 30 min"}
    assert {seconds: duration(seconds) for seconds in words} == words


def test_without_a_terminal_a_line_comes_once_an_interval_with_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", Namespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    shown = Progress(Process(0, 1, torch.device("cpu"), "none", runs_ahead=3.0), "plain r10", 2, 100, 8)
    assert list(shown.epoch([1, 2], 1, 0)) == [1, 2]
    for batch, now[0] in ((10, 20.0), (30, 60.0), (35, 70.0), (65, 130.0)):
        shown.announce(batch)
        rate = shown.rate_until(batch)
        assert rate == pytest.approx(4.0)  # 8 images in 2 seconds
        shown.show(1, 40, {"loss": 1.5, "loss_box_reg": 0.25, "distill_cls": 0.5}, rate)
    demonstration, *lines = capsys.readouterr().out.splitlines()
    assert "10 min" in demonstration  # 3 runs of 100 steps of 2 seconds
    line = "plain r10 1/2  step 40 of 100  loss 1.500 (box_reg 0.250 distill_cls 0.500)  4 images/s  2 min left"
    assert lines == [line] * 2  # 60 steps of 8 images at 4 images/s
