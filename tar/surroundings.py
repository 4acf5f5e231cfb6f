"""What tar/bench.py measures around the step: images from disk to batch, and figures from detections."""

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.v2.functional import to_pil_image

from tar.contestants import CLASSES, TAR, draw_batch
from tar.data import make_loader, to_device
from tar.evaluation import coco_metrics, coco_pair, voc_metrics
from tar.images import read_image
from tar.tabulation import markdown


class Files:
    """JPEG files of drawn images, as a source of tar.data."""

    def __init__(self, folder, count, height, width):
        self.classes = tuple(map(str, range(CLASSES)))
        images, self.targets = draw_batch(count, height, width)
        self.files = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for file, image in zip(self.files, images, strict=True):
            to_pil_image(image).save(file, quality=90)

    def __len__(self):
        return len(self.files)

    def load(self, epoch, index):
        target = self.targets[index]
        return read_image(self.files[index]), target["boxes"], target["labels"], target["labels"] < 0


def from_disk(args, machine, contestants, images=64):
    """From disk to batch: images/s, and the share of TAR steps' time that is spent waiting for their data."""
    with tempfile.TemporaryDirectory() as folder:
        source = Files(folder, images, *args.image)
        cores = len(os.sched_getaffinity(0))
        needed = args.batch_size * max(args.rounds + 2, 4 * cores)
        keys = [(0, i % images) for i in range(max(4 * images, needed))]
        batches = [keys[i : i + args.batch_size] for i in range(0, len(keys), args.batch_size)]
        rates = {}
        for workers in sorted({1, cores}):
            loader = iter(make_loader(source, True, batches, workers=workers))
            for _ in range(max(2 * workers, 1)):  # those that were read while the processes started
                next(loader)
            started = time.perf_counter()
            count = sum(len(batch) for batch, _ in loader)
            rates[workers] = count / (time.perf_counter() - started)
        waited = 0.0
        loader = iter(make_loader(source, True, batches, workers=args.workers))
        for number in range(args.rounds + 1):
            if number == 1:  # the first waits for the processes to start
                waited, begun = 0.0, time.perf_counter()
            started = time.perf_counter()
            images, targets = next(loader)
            waited += time.perf_counter() - started
            contestants.images, contestants.targets = to_device(images, targets, machine.device)
            contestants.rows()[TAR][1]()
            machine.wait()
        share = waited / (time.perf_counter() - begun)
        del loader
    rate = ", ".join(f"{rate:.0f} images/s by {workers}" for workers, rate in rates.items())
    share_text = f"waiting for data takes {100 * share:.2f}% of the TAR steps (by {args.workers})"
    machine.say(f"\nInput: {rate} worker processes; {share_text}")
    return {"images_per_second": rates, "waiting": share}


def metrics_time(machine):
    """Seconds of the metrics for results as large as VOC 2007's and COCO's, pycocotools' own share apart."""
    figures = {}
    for title, images, classes, truths, found in (("VOC", 4952, 20, 3, 20), ("COCO", 5000, 80, 7, 100)):
        results, names = drawn_results(images, classes, truths, found), [str(k) for k in range(classes)]
        started = time.perf_counter()
        coco_metrics(results, names)
        seconds = {"AP": time.perf_counter() - started}
        run = COCOeval(*coco_pair(results, names), iouType="bbox")
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run.evaluate(), run.accumulate(), run.summarize()
        seconds["pycocotools"] = time.perf_counter() - started
        if title == "VOC":
            started = time.perf_counter()
            voc_metrics(results, names)
            seconds["VOC mAP"] = time.perf_counter() - started
        figures[title] = seconds
    lines = [[t, s["AP"], s["pycocotools"], s.get("VOC mAP")] for t, s in figures.items()]
    machine.say("\n" + markdown(["results", "AP, s", "of it pycocotools, s", "VOC mAP, s"], lines))
    return figures


def drawn_results(images, classes, truths, found, seed=0):
    """Results as detect() gives them: each image with some boxes and detections, half of them near a box."""
    rng, results = np.random.default_rng(seed), []
    for i in range(images):
        corner = rng.uniform(0, 400, (truths, 2))
        boxes = np.hstack([corner, corner + rng.uniform(20, 200, (truths, 2))]).astype(np.float32)
        labels = rng.integers(1, classes + 1, truths)
        which = rng.integers(0, truths, found)
        near = boxes[which] + rng.normal(0, 8, (found, 4)).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        said = np.where(rng.random(found) < 0.5, labels[which], rng.integers(1, classes + 1, found))
        truth = {"gt_boxes": boxes, "gt_labels": labels, "gt_ignored": np.zeros(truths, bool)}
        scores = rng.random(found).astype(np.float32)
        results.append({"image_id": i, **truth, "boxes": near, "labels": said, "scores": scores})
    return results
