"""Runs of train.py on a handful of small images, made once and looked at by several tests."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from beside import beside
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
FLAGS = """
    --size 64 64 --fpn-channels 16 --head-channels 32 --rois 16 --rpn-top-n 50 20 --anchor-scale 4 --roi-samples 1
    --epochs 2 --batch-size 4 --limit-train 12 --limit-test 6 --optimizer adamw --lr 0.004 --weight-decay 0.05
    --schedule cosine --warmup 1 --clip-grad 0 --backbone-weights none --workers 0 --threads 1 --amp none
    --device cpu --log-every 1 --eval-every 1
    """
SMALL = FLAGS.split()
WEIGHTS = ["--weight-backbone", 0.05, "--weight-cls", 0.5, "--weight-reg", 0.25]
DETECTION = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
STEPS = 6  # 2 epochs of 3 batches
SIZE = "<size><width>96</width><height>72</height><depth>3</depth></size>"


def command(script, *flags, launcher=()):
    """Runs a script of the repository as a user does; launcher: what stands between python and the script."""
    words = [sys.executable, *launcher, ROOT / script, *map(str, flags)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=150, env=environment)


def call(main, *flags):
    main([str(flag) for flag in flags])


def read_log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line], [line for line in lines if "metrics" in line]


def read_result(run):
    return json.loads((run / "result.json").read_text())


def weights_of(run):
    return torch.load(run / "last.pth", weights_only=True)["model"]


def write_voc(folder, classes, lists):
    """Images with a disc and a square each, in VOC's layout; the last object of every other image is difficult."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    numbers = iter(range(1000))
    for split, count in lists.items():
        names = ""
        for number in islice(numbers, count):
            rng, image, xml = np.random.default_rng(number), Image.new("RGB", (96, 72), (70, 70, 70)), SIZE
            for k, kind in enumerate(classes):
                x, y = int(rng.integers(2, 14)) + 46 * k, int(rng.integers(2, 40))
                draw = (ImageDraw.Draw(image).ellipse, ImageDraw.Draw(image).rectangle)[k]
                draw((x, y, x + 27, y + 27), fill=((220, 30, 30), (30, 30, 220))[k])
                ends = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 28}</xmax><ymax>{y + 28}</ymax>"
                xml += f"<object><name>{kind}</name><difficult>{int(k == 1 and number % 2)}</difficult>"
                xml += f"<bndbox>{ends}</bndbox></object>"
            image.save(folder / f"JPEGImages/{number:06d}.jpg")
            (folder / f"Annotations/{number:06d}.xml").write_text(f"<annotation>{xml}</annotation>")
            names += f"{number:06d}\n"
        (folder / f"ImageSets/Main/{split}.txt").write_text(names)
    return folder


@beside
def plain(folder):
    """A plain student on drawn shapes: its flags, its folder and what was printed."""
    flags = [*SMALL, "--student", "r10", "--output", folder / "plain"]
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    return Namespace(flags=flags, run=folder / "plain", out=done.stdout)


@beside
def voc(folder):
    """A student and its teacher on a folder in VOC's layout."""
    data = write_voc(folder / "discs", ("disc", "square"), {"trainval": 12, "test": 6})
    common = [*SMALL, "--dataset", "voc", "--data-path", data]
    flags = [*common, *WEIGHTS, "--student", "r10", "--teacher", "r18", "--output", folder / "voc/student"]
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    run = folder / "voc/student"
    teacher = next(p for p in run.parent.iterdir() if p != run)
    return Namespace(flags=flags, common=common, data=data, run=run, teacher=teacher, out=done.stdout)


@beside
def two_processes(folder):
    """A plain teacher, and a student distilled for half of its 4 steps, trained by two processes with one command."""
    flags = [*SMALL, "--batch-size", 3, "--limit-test", 7, "--decay-end", 0.5, "--student", "r10", "--teacher", "r18"]
    done = command("train.py", *flags, "--output", folder / "student", launcher=TWO)
    assert done.returncode == 0, done.stderr
    [teacher] = set(folder.iterdir()) - {folder / "student"}
    return Namespace(flags=flags, run=folder / "student", teacher=teacher, out=done.stdout)
