"""A program whose loader processes were left behind, as by an error in the middle of an epoch, still ends."""

import subprocess
import sys

from tiny_runs import ROOT

PROGRAM = """
from tar.data import make_loader
from tar.shapes import Shapes
left = iter(make_loader(Shapes("train", 8), True, [[(0, i)] for i in range(8)], workers=1))
next(left)
"""


def test_a_worker_left_behind_does_not_keep_the_program():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=25)
    assert done.returncode == 0, done.stderr
