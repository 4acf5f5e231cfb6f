"""train.py, whose second process meets an error in its second step: KIND, then train.py's flags."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import train
from tar import UserError
from tar.data.shapes import Shapes

ERRORS = {
    "mistake": UserError("000007.jpg: cannot be read"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "fault": ZeroDivisionError("a fault of ours"),
}


def after(number, original, act):
    """A function that calls act() from its call of this number on."""
    calls = []

    def function(*args):
        calls.append(1)
        if len(calls) >= number:
            act()
        return original(*args)

    return function


def fail():
    raise ERRORS[kind]


def die():
    if torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)


kind = sys.argv[1]
if os.environ["RANK"] == "1":
    if kind == "loader":
        Shapes.load = after(5, Shapes.load, die)
    else:
        train.to_device = after(2, train.to_device, fail)
train.main(sys.argv[2:])
