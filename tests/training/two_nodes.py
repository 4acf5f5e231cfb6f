"""Trains once on two "nodes", two addresses of this machine that meet over torchrun's c10d rendezvous, and once on one.

    python tests/training/two_nodes.py

Both runs have two processes; their weights must be equal bit for bit.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from fault_injection import COMMON, ROOT, same, weights

ADDRESSES = ("127.0.0.1", "127.0.0.2")


def launch(output, *where):
    """One torchrun, as it is started on one node."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", *where, str(ROOT / "train.py")]
    words += [*COMMON, "--student", "r10", "--teacher", "r18", "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def finish(running):
    text, _ = running.communicate(timeout=300)
    if running.returncode:
        sys.exit(f"exit {running.returncode}:\n{text}")
    return text


def main():
    with tempfile.TemporaryDirectory() as place:
        with socket.socket() as free:
            free.bind((ADDRESSES[0], 0))
            meet = f"{ADDRESSES[0]}:{free.getsockname()[1]}"
        one, two = Path(place) / "one/run", Path(place) / "two/run"
        finish(launch(one, "2", "--standalone"))
        rendezvous = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_id", "tar", "--rdzv_endpoint", meet]
        for running in [launch(two, "1", *rendezvous, "--local_addr", address) for address in ADDRESSES]:
            print(finish(running).strip().splitlines()[:1])
        equal = same(weights(one), weights(two))
        print(f"two nodes at {' and '.join(ADDRESSES)}: weights {'equal' if equal else 'DIFFERENT'}")
        sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
