"""What COCO's training set costs: seconds to load, memory of the process, and of each loader process.

    PYTHONPATH=. python tests/data/large_coco.py FOLDER [--images 118287 --boxes 860001]

writes a file of train2017's size, one of val2017's and their images into FOLDER (once: 600 MB) and prints a table of
one line. The numbers of images and boxes are train2017's, and so are the fields and about the length of the polygons.
The images are links to one picture of each size; they are not decoded here. Linux only.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tar.data import load_dataset
from tar.data.loader import make_loader, train_batches

SIZES = ((640, 480), (640, 427), (480, 640), (640, 640), (427, 640), (500, 375))
CATEGORIES = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO's ids of 80 classes
LINKS = 20_000  # to one picture; a file system has a limit
CROWDS = 86  # every 86th box


def image_entry(number, size):
    name, (width, height) = f"{number:012d}.jpg", SIZES[size]
    urls = {"coco_url": f"http://images.cocodataset.org/train2017/{name}", "date_captured": "2013-11-14 11:18:45"}
    more = {"license": 3, **urls, "flickr_url": f"http://farm9.staticflickr.com/8186/8119368305_{number:08x}_z.jpg"}
    return {**more, "file_name": name, "height": height, "width": width, "id": number}


def box_entry(number, image, category, x, y, w, h, outline):
    """An annotation with a polygon of as many points as `outline` [2, N] in 0..1 has; a crowd with run lengths."""
    points = np.stack([x + w * outline[0], y + h * outline[1]], 1).round(2)
    crowd = number % CROWDS == 0
    mask = {"counts": [int(v) for v in points.ravel()], "size": [480, 640]} if crowd else [points.ravel().tolist()]
    box = {"bbox": [x, y, w, h], "category_id": category, "id": number + 900_000}
    return {"segmentation": mask, "area": round(w * h * 0.61803, 4), "iscrowd": int(crowd), "image_id": image, **box}


def write_large(folder, split, images, boxes, seed=0):
    """An annotation file and its images, unless they are there; the JSON file and the folder of the images."""
    file, place = folder / f"{split}-{images}-{boxes}.json", folder / f"{split}-{images}"
    if file.is_file():
        return file, place
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    numbers, sizes = np.sort(rng.choice(581_921, images, replace=False)) + 1, rng.integers(len(SIZES), size=images)
    for i, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
        picture = folder / f"picture-{size}-{split}-{i // LINKS}.jpg"
        if not picture.is_file():
            Image.new("RGB", SIZES[size], (90, 120, 150)).save(picture)
        link = place / f"{number:012d}.jpg"
        if not link.is_file():
            os.link(picture, link)
    where = rng.integers(images - images // 116, size=boxes)  # about one image of 116 has no box
    shares, categories = rng.random((boxes, 4)), rng.choice(CATEGORIES, size=boxes)
    points = rng.geometric(1 / 22, size=boxes) + 3
    with open(file.with_suffix(".part"), "w") as out:
        entries = [image_entry(int(n), int(size)) for n, size in zip(numbers, sizes, strict=True)]
        listed = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in CATEGORIES]
        out.write(
            f'{{"info": {{}}, "categories": {json.dumps(listed)}, "images": {json.dumps(entries)}, "annotations": ['
        )
        for i in range(boxes):
            width, height = SIZES[sizes[where[i]]]
            x, y = shares[i, 0] * width * 0.8, shares[i, 1] * height * 0.8
            w, h = 4 + shares[i, 2] * (width - x - 4), 4 + shares[i, 3] * (height - y - 4)
            values = [round(float(v), 2) for v in (x, y, w, h)]
            entry = box_entry(i, int(numbers[where[i]]), int(categories[i]), *values, rng.random((2, points[i])))
            out.write(", " * (i > 0) + json.dumps(entry))
        out.write("]}")
    file.with_suffix(".part").rename(file)
    return file, place


def megabytes(file, *fields):
    """The sum of some fields of a process's memory, in MB, as the kernel tells them."""
    rows = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    return sum(int(rows[field].split()[0]) for field in fields) * 1024 / 1e6


def resident():
    return megabytes("/proc/self/status", "VmRSS")


def trim():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def without_pixels(file, size=None, *_):
    """Instead of read_image: what the loader processes hold besides pixels is measured."""
    return torch.zeros(3, 2, 2, dtype=torch.uint8)


def loader_megabytes(source, workers):
    """What each loader process has for itself, and its share of what is shared, after an epoch: [(USS, PSS)], in MB."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tar.data.") and hasattr(module, "read_image"):
            module.read_image = without_pixels
    batches = train_batches(len(source), 16, 0, 0, wide=source.wide)
    loader = iter(make_loader(source, True, batches, workers=workers))
    for _ in batches:
        next(loader)
    files = [f"/proc/{process.pid}/smaps_rollup" for process in loader._workers]
    return [(megabytes(f, "Private_Clean", "Private_Dirty"), megabytes(f, "Pss")) for f in files]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    files = [*write_large(args.folder, "train", args.images, args.boxes), *write_large(args.folder, "val", 5000, 36781)]
    trim()
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    train_set, test_set = load_dataset("coco", files=files)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak, left = megabytes("/proc/self/status", "VmHWM") - before, resident() - before
    trim()
    trimmed = resident() - before
    rows = loader_megabytes(train_set, args.workers)
    uss, pss = (max(column) for column in zip(*rows, strict=True))
    print(
        "| images | seconds to load | of the CPU | peak MB | MB left | after malloc_trim | a loader's USS | its PSS |"
    )
    print("|" + "---|" * 8)
    figures = (seconds, cpu, peak, left, trimmed, uss, pss)
    print(f"| {len(train_set)} + {len(test_set)} | " + " | ".join(f"{v:.1f}" for v in figures) + " |")


if __name__ == "__main__":
    main()
