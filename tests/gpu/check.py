"""The check of everything on one GPU, in about 13 minutes; PCB is a folder with instances_{train,test}.json and images.

    python tests/gpu/check.py --data PCB          a, b and c
    python tests/gpu/check.py a b                 under five minutes, without data
    python tests/gpu/check.py --dry               all of it on the CPU with tiny sizes: shows that it runs

a: what a GPU computes, against the CPU (test_on_gpu.py). b: speed of a step at 800 x 1333, r101 to r50, both detectors,
at the largest batch that fits; what falls short of an aim is followed by the ten longest kernels. c: the table `claim`,
r101 to r50 at 640 pixels; the same command goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BENCH = "--teacher r101 --student r50 --size 800 1333 --image 800 1200 --device cuda"
DRY_BENCH = "--teacher r18 --student r18 --size 64 96 --image 64 96 --rois 16 --rounds 1 --warmup 0 --device cpu"
CLAIM = "--student r50 --teacher r101 --size 640 640 --anchor-scale 8 --fpn-channels 256 --epochs 6 --device cuda "
CLAIM += "--batch-size 16 --eval-every 3 --workers 12"
DRY_CLAIM = "--student r10 --teacher r18 --size 64 64 --epochs 1 --batch-size 2 --rois 16 --device cpu"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("parts", nargs="*", metavar="PART", help="a, b, c (default: all)")
    p.add_argument("--data", type=Path, help="of part c: a folder with instances_{train,test}.json and images")
    p.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of figures and runs")
    p.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    args = p.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        sys.exit("there is no GPU; --dry runs everything on the CPU with tiny sizes")
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {"a": check_figures, "b": time_steps, "c": train_table}
    failed = [name for name in args.parts or parts if not parts[name](args)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(args, *words):
    """Runs a command in the repository and shows it; whether it succeeded."""
    words = [sys.executable, *map(str, words)]
    print("\n$", *words[1:], flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **({"TAR_GPU_DRY": "1"} if args.dry else {})}
    return subprocess.run(words, cwd=ROOT, env=environment).returncode == 0


def check_figures(args):
    return run(args, "-m", "pytest", "-q", "-s", "tests/gpu")


def time_steps(args):
    done = []
    for detector in ("faster-rcnn", "retinanet"):
        for batch in (2,) if args.dry else (16, 8, 4, 2):  # the first that fits
            words = [*(DRY_BENCH if args.dry else BENCH).split(), "--detector", detector, "--batch-size", str(batch)]
            file = (args.output / f"bench-{detector}-{batch}.json").resolve()
            if run(args, "-m", "tar.bench", *words, "--json", file):
                done.append(detector)
                look_at(json.loads(file.read_text()), words)
                break
    return len(done) == 2


def look_at(figures, words):
    """The figures that have an aim, and the ten longest kernels of a TAR step if one is missed."""
    stock, floor = (figures["ratios"][name]["median"] for name in ("tar_over_stock", "tar_over_floor"))
    print(f"\nstock / TAR {1 / stock:.2f} (aim: at least 3), TAR / floor {floor:.3f} (aim: at most 1.05)")
    if 1 / stock >= 3 and floor <= 1.05:
        return
    from tar.bench.__main__ import kinds_of_step, parser  # the same models and batch again, in this process
    from tar.training.process import set_up

    flags = parser().parse_args(words)
    step = kinds_of_step(flags, set_up(flags.device, flags.amp, flags.threads))["tar"]
    step()
    cuda = flags.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        step()
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60))


def train_table(args):
    if args.dry:
        from coco_sets import annotation, entry, write_coco

        boxes = [annotation(i, (1, 13, 90)[i % 3], [4, 4, 20, 16], id=i) for i in range(1, 5)]
        args.data = args.output / "tiny"
        (args.data / "images").mkdir(parents=True, exist_ok=True)
        file = write_coco(args.data / "images", [entry(i) for i in range(1, 5)], boxes)
        for split in ("train", "test"):
            (args.data / f"instances_{split}.json").write_text(file.read_text())
    if args.data is None:
        print("part c needs --data PCB")
        return False
    words = [*(DRY_CLAIM if args.dry else CLAIM).split(), "--dataset", "coco", "--recipe", "shapes"]
    for ours, split in (("train", "train"), ("val", "test")):
        words += [f"--{ours}-json", args.data / f"instances_{split}.json", f"--{ours}-images", args.data / "images"]
    return run(args, "train.py", "--table", "claim", "--output", args.output / "claim", *words)


if __name__ == "__main__":
    main()
