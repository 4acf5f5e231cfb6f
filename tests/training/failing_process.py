"""train.py, whose second process meets an error in its second step: KIND, then train.py's flags."""

import os
import signal
import sys

import torch

import train
from tar import UserError
from tar.data.shapes import Shapes

ERRORS = {
    "mistake": UserError("000007.jpg: cannot be read"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "fault": ZeroDivisionError("a fault of ours"),
}
kind, calls = sys.argv[1], []
load, to_device = Shapes.load, train.to_device


def dying_load(*args):
    calls.append(1)
    if len(calls) >= 5 and torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return load(*args)


def failing_step(*args):
    calls.append(1)
    if len(calls) >= 2:
        raise ERRORS[kind]
    return to_device(*args)


if os.environ["RANK"] == "1":
    if kind == "loader":
        Shapes.load = dying_load
    else:
        train.to_device = failing_step
train.main(sys.argv[2:])
