"""What a run says of itself while it goes on."""

from argparse import Namespace

import pytest
import torch
from tiny_runs import SMALL, call

import eval as eval_script
import train
from tar import options, progress
from tar.arguments import Parser
from tar.faults import out_of_memory
from tar.machine import Machine
from tar.progress import Progress, duration


class Told(Machine):
    """A machine that keeps what it says."""

    def say(self, text):
        self.lines = [*getattr(self, "lines", []), text]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (5400, "1 h 30 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_plain_line_comes_once_an_interval_with_the_time_left(monkeypatch):
    machine, clock = Told(0, 1, torch.device("cpu"), "none"), [0.0]
    monkeypatch.setattr(progress, "time", Namespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    shown = Progress(machine, "plain r10", 2, 100, 8)
    assert list(shown.epoch([1, 2], 1)) == [1, 2]
    for now in (10.0, 61.0, 70.0, 130.0):
        clock[0] = now
        shown.show(1, 40, {"loss": 1.5, "loss_box_reg": 0.25, "distill_cls": 0.5}, 4.0)
    [first, second] = machine.lines
    assert first == second and first.startswith(
        "plain r10 1/2  step 40 of 100  loss 1.500 (box_reg 0.250 distill_cls 0.500)"
    )
    assert first.endswith("4 images/s  2 min left")  # 60 steps of 8 images at 4 images/s


def test_a_terminal_has_a_bar_and_no_plain_lines(monkeypatch):
    machine = Told(0, 1, torch.device("cpu"), "none")
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress(machine, "plain r10", 2, 100, 8)
    for _ in shown.epoch([1], 1):
        shown.show(1, 40, {"loss": 1.5}, 4.0)
        assert "loss 1.500" in shown.bar.postfix and "2 min left" in shown.bar.postfix
    assert not hasattr(machine, "lines")


def test_other_ranks_are_quiet(capsys):
    machine = Machine(1, 2, torch.device("cpu"), "none")
    machine.say("a word")
    assert list(machine.progress("bar")([1, 2])) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("parser", "word", "meant"),
    [
        (options.parser(), "--bacth-size", "--batch-size"),
        (options.parser(), "--weight-back", None),  # short for --weight-backbone
        (options.parser(), "--learning-rate=3", None),
        (eval_script.parser(), "--weigths", "--weights"),
    ],
)
def test_the_nearest_name_of_a_flag(parser, word, meant, capsys):
    if word == "--weight-back":
        assert parser.parse_args([word, "2"]).weight_backbone == 2
        return
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([word, "3"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and f"there is no {word.split('=')[0]}" in error
    assert meant is None or f"did you mean {meant}?" in error


def test_values_are_no_flags():
    p = Parser(prog="p")
    p.add_argument("--shift", type=float)
    p.add_argument("words", nargs="*")
    assert p.parse_args(["--shift=-3", "a"]).shift == -3


def test_a_gpu_that_is_too_small_is_said_in_a_line(monkeypatch, tmp_path, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 GiB.\nSee manual.")

    monkeypatch.setattr(train.Step, "forward", full)
    with pytest.raises(SystemExit) as stopped:
        call(train.main, *SMALL, "--student", "r10", "--output", tmp_path / "run")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "CUDA out of memory. Give a smaller --batch-size or --size" in error
    assert "what was saved is kept" in str(out_of_memory(RuntimeError("x")))
