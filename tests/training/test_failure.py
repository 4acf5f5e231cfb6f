"""A run of two processes of which the second fails: one line says why, once, and no process is left waiting."""

import contextlib
import time
from pathlib import Path

import pytest
import torch
from beside import beside
from tiny_runs import SMALL, TWO, command

from tar import UserError
from tar.data.image_files import read_image
from tar.training.failure import in_one_line
from tar.training.stop_signals import Stopped

SCRIPT = Path(__file__).with_name("failing_process.py")
SAYS = ["ZeroDivisionError: a fault of ours", "train.py: error: a loader process has ended"]  # by loader processes


def is_there(output):
    """Whether there is a process whose command names a folder."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if str(output).encode() in file.read_bytes():
                return True
    return False


@beside
def failed(folder):
    """The run without, and the one with a loader process."""
    flags = [*SMALL, "--student", "r10", "--output"]
    return [command(SCRIPT, *flags, folder / f"run{n}", "--workers", n, launcher=TWO) for n in (0, 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_one_process_is_said_once_and_ends_all(workers, failed):
    done = failed[workers]
    assert done.returncode and done.stderr.count(SAYS[workers]) == 1, done.stderr
    assert ("in fail" in done.stderr) == (workers == 0), done.stderr  # a traceback of a fault of ours only
    end = time.monotonic() + 10
    while is_there(done.args[-3]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_there(done.args[-3])


def test_groups_wait_for_two_hours_and_frozen_buffers_are_not_sent(failed):
    said = [line for line in failed[0].stdout.splitlines() if line.startswith(("wait", "send"))]
    assert said == ["wait 2:00:00", "wait 2:00:00", "send False True", "send True True"]


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (UserError("a.jpg: broken"), "a.jpg: broken", 2),
        (Stopped("stopped", 15), "stopped", 143),
        (torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB."), "out of memory. Give a smaller --batch", 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--batch-size", 2),
        (PermissionError(13, "Permission denied", "a.jpg"), "a.jpg: Permission denied", 2),
        (RuntimeError("a fault of ours"), None, 1),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\na fault"), None, 1),
        (FileNotFoundError(2, "No such file or directory", "a"), None, 1),
    ],
)
def test_what_is_said_of_an_error(error, says, code):
    line, given = in_one_line(error)
    assert given == code and (says in line if says else line is None)


def test_being_told_to_stop_is_not_taken_for_a_broken_image(monkeypatch, tmp_path):
    def stop(*_):
        raise Stopped("stopped", 15)

    monkeypatch.setattr("PIL.Image.open", stop)
    with pytest.raises(Stopped):
        read_image(tmp_path / "a.jpg")
