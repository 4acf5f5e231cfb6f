"""train.py under torchrun, told how its processes are joined, whose second process fails at its fifth image.

If a loader process reads the image, it is killed; else a fault of ours is raised.
"""

import os
import signal
import sys

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import train
from tar.data.shapes import Shapes

loads, load, set_up = [], Shapes.load, train.set_up


def failing_load(*args):
    loads.append(1)
    if len(loads) < 5:
        return load(*args)
    if torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("a fault of ours")


def joined(*args):
    """The process; says how long its groups wait, and whether buffers of a net with each kind of norm are sent."""
    process = set_up(*args)
    for group in (process.control, torch.distributed.group.WORLD):
        process.say(f"wait {group._get_backend(torch.device('cpu')).options._timeout}")
    for norm in (FrozenBatchNorm2d, nn.BatchNorm2d):
        wrapped = process.parallel(nn.Sequential(nn.Conv2d(1, 2, 1), norm(2)))
        sent = getattr(wrapped, "forward_sync_buffers", None)
        process.say(f"send {wrapped.broadcast_buffers if sent is None else sent} {wrapped.gradient_as_bucket_view}")
    return process


train.set_up = joined
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.1  # seconds between a loader process's looks for its parent
if os.environ["RANK"] == "1":
    Shapes.load = failing_load
train.main(sys.argv[1:])
