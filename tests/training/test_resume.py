"""Runs that are killed, told to stop, or find a damaged checkpoint or a full disk: the same command ends them equal."""

import errno
import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from beside import beside
from fault_injection import COMMON, ROOT, inject, same, start, weights
from tiny_runs import call, command, read_log, read_result

import train
from tar.training import checkpoint

MEASURED = {"seconds", "cost", "ms_per_image"}  # by a clock
STEPS = 8  # 2 epochs of 4 batches, with checkpoints after three and four of them; distilled up to step 6
FLAGS = "--epochs 2 --student r10 --teacher r10 --optimizer sgd --lr 0.01 --clip-grad 5 --decay-end 0.75 --log-every 1"
WHEN_THERE = 'until [ -e "$0" ]; do sleep 0.01; done; kill -s TERM -- "-$1"'


def figures(run):
    return {name: value for name, value in read_result(run).items() if name not in MEASURED}


def steps(run):
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_log(run)[0]]


@pytest.fixture(autouse=True)
def cost_of_one_batch(monkeypatch):
    monkeypatch.setattr(train, "TIMED", 1)


@beside
def taught(folder):
    """A distilled student's flags, and its run without interruption."""
    flags, unbroken = [*COMMON, *FLAGS.split()], folder / "unbroken"
    done = command("train.py", *flags, "--output", unbroken)
    assert done.returncode == 0, done.stderr
    [teacher] = set(folder.iterdir()) - {unbroken}
    return Namespace(flags=[*flags, "--teacher-weights", str(teacher / "last.pth")], unbroken=unbroken)


@beside
def killed(folder, taught):
    """The folder and the exit code of a run that was killed inside its second checkpoint."""
    (folder / "point").write_text("write 2 0.6")
    return folder / "run", start(folder / "run", taught.flags, folder / "point", 1).returncode


def test_a_run_killed_inside_a_write_and_between_two_names_ends_equal(taught, killed, monkeypatch, capsys):
    run, code = killed
    assert code == -signal.SIGKILL
    replace = os.replace

    def break_off_before_the_last_name(old, new):
        if new.name == "last.pth":
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", break_off_before_the_last_name)
        call(train.main, *taught.flags, "--output", run)
    assert not (run / "last.pth").exists()
    call(train.main, *taught.flags, "--output", run)
    assert capsys.readouterr().out.count("after step 3 of 8") == 2
    assert same(weights(run), weights(taught.unbroken))


@beside
def restarted(folder, two_processes):
    """Runs of two processes of which one is killed after its second step, where the decay ends."""
    flags = [*two_processes.flags, "--teacher-weights", two_processes.teacher / "last.pth", "--save-every", 1]
    return inject(folder, flags, ["step 2 0"], 2, say=lambda _: None, unbroken=two_processes.run)


def test_a_process_that_is_killed_under_torchrun_is_started_again_and_ends_equal(restarted):
    assert restarted == [("step 2 0", 1, True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_deterministic_run_on_a_gpu_that_is_killed_ends_equal(taught, tmp_path):
    flags = [*taught.flags, "--device", "cuda", "--deterministic"]
    assert inject(tmp_path, flags, ["step 5 0"], say=lambda _: None) == [("step 5 0", 2, True)]


@beside
def terminated(folder, taught):
    """The folder, exit code and errors of a run with loader processes that all got SIGTERM after the first step."""
    run = folder / "run"
    words = [sys.executable, "train.py", *taught.flags, "--workers", "2", "--output", str(run)]
    running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:  # bash sees the first step at once
        subprocess.run(["bash", "-c", WHEN_THERE, run / "log.jsonl", str(running.pid)], timeout=100, check=True)
        _, error = running.communicate(timeout=100)
    finally:
        running.kill()
    return run, running.returncode, error


def test_a_termination_ends_the_step_saves_and_goes_on_to_the_same_end(taught, terminated, capsys):
    run, code, error = terminated
    assert code == 143 and "Traceback" not in error
    saved = checkpoint.load(run / "last.pth")
    done = saved["epoch"] * 4 + saved["batch"]
    assert len(steps(run)) == done < STEPS
    call(train.main, *taught.flags, "--output", run)
    assert f"after step {done} of {STEPS}" in capsys.readouterr().out
    assert same(weights(run), weights(taught.unbroken)) and figures(run) == figures(taught.unbroken)
    assert steps(run) == steps(taught.unbroken)
    assert [line["decay"] for line in steps(run)] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])


def test_an_interrupt_a_full_disk_and_a_damaged_checkpoint_lose_nothing(taught, tmp_path, monkeypatch, capsys):
    run, seen, original = tmp_path / "run", [], train.learning_rate

    def learning_rate(*args):
        seen.append(1)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    def ends_with(code):
        with pytest.raises(SystemExit) as ended:
            call(train.main, *taught.flags, "--output", run)
        [line] = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == code
        return line

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    assert "stopped after step 6 of 8" in ends_with(130)
    before = {name: (run / name).read_bytes() for name in ("last.pth", "previous.pth")}  # after steps 6 and 4
    (run / "last.pth.tmp").symlink_to("/dev/full")
    assert os.strerror(errno.ENOSPC) in ends_with(2)
    assert {name: (run / name).read_bytes() for name in before} == before
    (run / "last.pth").write_bytes(before["last.pth"][:-1000])
    call(train.main, *taught.flags, "--output", run)
    out = capsys.readouterr().out
    assert f"{run / 'previous.pth'}" in out and "after step 4 of 8" in out
    assert same(weights(run), weights(taught.unbroken))


def test_flags_that_say_how_to_compute_change_no_figure_nor_does_an_end_within_an_epoch(plain, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save

    def note_save(path, state):
        saved.append((state["epoch"], state["batch"]))
        save(path, state)
        if saved[-1] == (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", note_save)
    flags = ["--save-every", 2, "--workers", 2, "--log-every", 3, "--deterministic", "--output", tmp_path / "run"]
    try:
        with pytest.raises(KeyboardInterrupt):
            call(train.main, *plain.flags, *flags)
        call(train.main, *plain.flags, *flags)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert saved == [(0, 2), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0)]  # (epoch, batch); 0: with the figures
    assert same(weights(tmp_path / "run"), weights(plain.run)) and figures(tmp_path / "run") == figures(plain.run)
