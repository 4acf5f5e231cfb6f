"""How processes are joined: the limits of their groups, and what DDP sends in each step."""

import os
import subprocess
import sys

from tiny_runs import ROOT

JOINED = """
import torch
from small_detectors import detector
from tar.training.process import set_up
process = set_up("cpu")
for group in (process.control, torch.distributed.group.WORLD):
    print(group._get_backend(torch.device("cpu")).options._timeout)
process.world = 2
for norm in ("frozen", "batch"):
    wrapped = process.parallel(detector(norm=norm))
    sent = getattr(wrapped, "forward_sync_buffers", None)
    print(wrapped.broadcast_buffers if sent is None else sent, wrapped.gradient_as_bucket_view)
"""


def test_groups_wait_for_two_hours_and_frozen_buffers_are_not_sent():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", JOINED], capture_output=True, text=True, env=environment, timeout=150)
    assert done.stdout.splitlines() == ["2:00:00", "2:00:00", "False True", "True True"], done.stderr
