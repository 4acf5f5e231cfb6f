"""A run of two processes of which the second fails: one line says why, once, and no process is left waiting."""

import time
from pathlib import Path

import pytest
from beside import beside
from tiny_runs import SMALL, TWO, command

from tar import UserError
from tar.training.failure import in_one_line
from tar.training.stop_signals import Stopped

SCRIPT = Path(__file__).with_name("failing_process.py")
KINDS = {  # what is said once, of what the second process meets in its second step
    "mistake": r"train.py: error: 000007.jpg: cannot be read",
    "memory": r"train.py: error: CUDA out of memory. Give a smaller --batch-size",
    "fault": r"ZeroDivisionError: a fault of ours",
    "loader": r"train.py: error: a loader process has ended",
}


def of_run(output):
    """The processes whose command names a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [file.parent.name] if str(output).encode() in file.read_bytes() else []
        except OSError:  # it has ended meanwhile
            continue
    return found


@beside
def failed(folder):
    """The four runs."""
    runs = {}
    for kind in KINDS:
        flags = [*SMALL, "--workers", int(kind == "loader"), "--student", "r10", "--output", folder / kind]
        runs[kind] = command(SCRIPT, kind, *flags, launcher=TWO), folder / kind
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_one_process_is_said_once_and_ends_all(kind, failed):
    done, output = failed[kind]
    assert done.returncode and done.stderr.count(KINDS[kind]) == 1, done.stderr
    assert ("in fail" in done.stderr) == (kind == "fault"), done.stderr  # a traceback of a fault of ours only
    end = time.monotonic() + 10  # a loader process looks for its parent every 5 seconds
    while of_run(output) and time.monotonic() < end:
        time.sleep(0.1)
    assert not of_run(output)


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (UserError("a.jpg: broken"), "a.jpg: broken", 2),
        (Stopped("stopped", 15), "stopped", 143),
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
