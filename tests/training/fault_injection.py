"""Kills trainings at random points, lets the same command finish them, and compares the weights with an unbroken run.

    python tests/training/fault_injection.py [--kills 20] [--seed 0] [--processes 1]

A point is a step, a byte of a checkpoint that is being written, or the moment between the renaming of the old and of
the new checkpoint. Two and more processes run under torchrun --max-restarts, which starts them again itself.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVES = 12, 7  # 3 epochs of 4 batches; a checkpoint after three and four of them, and with the figures
FLAGS = """
    --dataset shapes --size 64 64 --fpn-channels 16 --head-channels 32 --rois 16 --rpn-top-n 50 20 --epochs 3
    --batch-size 2 --limit-train 8 --limit-test 2 --eval-every 3 --save-every 3 --log-every 2 --warmup 1 --amp none
    --device cpu --threads 1 --workers 0
    """
COMMON = FLAGS.split()
# Runs train.py and dies of SIGKILL at a point: "step 7 0", "write 3 0.4" (of the third checkpoint only 40% of its bytes
# are there) or "rename 2 0" (before the second new checkpoint gets its name). The point's file is there until the kill.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import train
from tar.training.guard import Guard

point = Path(sys.argv[1])
kind, number, share = point.read_text().split() if point.exists() else ("none", "0", "0")
seen, step, fsync, replace = 0, Guard.step, os.fsync, os.replace

def pass_by(what, before=lambda: None):
    global seen
    seen += what == kind and os.environ.get("RANK", "0") == "0"
    if what == kind and seen == int(number):
        before()
        point.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

def dying_step(*args):
    done = step(*args)
    pass_by("step")
    return done

def dying_fsync(file):
    if os.readlink(f"/proc/self/fd/{file}").endswith("last.pth.tmp"):
        pass_by("write", lambda: os.truncate(file, int(os.fstat(file).st_size * float(share))))
    fsync(file)

def dying_replace(old, new):
    if str(new).endswith("last.pth"):
        pass_by("rename")
    replace(old, new)

Guard.step, os.fsync, os.replace = dying_step, dying_fsync, dying_replace
train.main(sys.argv[2:])
"""


def start(folder, flags, point, processes):
    """One start of the command; the finished process."""
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--max-restarts=2", "--standalone"]
    words = [*python, program, point, *flags, "--output", folder]
    return subprocess.run(map(str, words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def weights(folder):
    """Everything that was trained, and the optimizer's state."""
    saved = torch.load(folder / "last.pth", weights_only=True)
    optimizer = {f"{k} {n}": v for k, row in saved["optimizer"]["state"].items() for n, v in row.items()}
    return {**saved["model"], **{f"adapter {k}": v for k, v in saved["adapters"].items()}, **optimizer}


def same(one, other):
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def inject(parent, flags, chosen, processes=1, say=print, unbroken=None):
    """Kills a run at each of the chosen points (see PROGRAM), in an empty folder, and lets it end.

    unbroken: folder of a run that was not killed; None: trained here. Returns a row for each point: the point, the
    starts of the command that it took, and whether the run ended equal to the unbroken one.
    """
    rows = []
    if unbroken is None:
        unbroken = parent / "unbroken"
        assert start(unbroken, flags, parent / "never", processes).returncode == 0
    for number, what in enumerate(chosen):
        folder, point = parent / f"run{number}", parent / f"point{number}"
        point.write_text(what)
        starts, code = 0, None
        while code != 0 and starts < 4:
            ended = start(folder, flags, point, processes)
            starts, code = starts + 1, ended.returncode
            assert code in (0, -9), ended.stderr
        assert not point.exists(), f"{what}: never reached"
        equal = code == 0 and same(weights(unbroken), weights(folder))
        rows.append((what, starts, equal))
        say(f"{what:16} {starts} starts  {'equal' if equal else 'DIFFERENT'}")
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--processes", type=int, default=1)
    args = p.parse_args()
    draw, kinds = random.Random(args.seed), [("step", "write", "step", "rename")[i % 4] for i in range(args.kills)]
    points = [f"{k} {draw.randint(1, STEPS if k == 'step' else SAVES)} {draw.uniform(0.01, 0.99):.2f}" for k in kinds]
    with tempfile.TemporaryDirectory() as place:
        teacher = Path(place) / "teacher"
        words = [sys.executable, "train.py", *COMMON, "--student", "r18", "--output", teacher]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        flags = [*COMMON, "--limit-train", 8 * args.processes]  # as many steps as one process does
        flags += ["--student", "r10", "--teacher", "r18", "--teacher-weights", teacher / "last.pth"]
        rows = inject(Path(place), flags, points, args.processes)
    equal = sum(row[2] for row in rows)
    print(f"{equal} of {len(rows)} runs ended with the weights of the unbroken run")
    sys.exit(0 if equal == len(rows) else 1)


if __name__ == "__main__":
    main()
