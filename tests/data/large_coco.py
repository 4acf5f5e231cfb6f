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
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tar.data import load_dataset, source
from tar.data.loader import make_loader, train_batches

SIZES = ((640, 480), (640, 427), (480, 640), (640, 640), (427, 640), (500, 375))
CATEGORIES = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO's ids of 80 classes
LINKS = 20_000  # to one picture; a file system has a limit
CROWDS = 86  # every 86th box


def image_entry(number, width, height):
    name, site = f"{number:012d}.jpg", "http://farm9.staticflickr.com/8186"
    more = {"license": 3, "coco_url": f"http://images.cocodataset.org/train2017/{name}", "file_name": name}
    more |= {"date_captured": "2013-11-14 11:18:45", "flickr_url": f"{site}/8119368305_{number:08x}_z.jpg"}
    return {**more, "height": height, "width": width, "id": number}


def box_entry(rng, number, image, width, height):
    """An annotation with a polygon; a crowd with run lengths."""
    x, y = rng.random(2) * (width, height) * 0.8
    x, y, w, h = box = np.round([x, y, *(4 + rng.random(2) * (width - x - 4, height - y - 4))], 2).tolist()
    points, crowd = rng.random((rng.geometric(1 / 22) + 3, 2)) * (w, h) + (x, y), int(number % CROWDS == 0)
    points = points.round(2).ravel().tolist()
    mask = {"counts": [int(v) for v in points], "size": [480, 640]} if crowd else [points]
    entry = {"segmentation": mask, "area": round(w * h * 0.61803, 4), "iscrowd": crowd, "image_id": image, "bbox": box}
    return {**entry, "category_id": int(rng.choice(CATEGORIES)), "id": number + 900_000}


def write_large(folder, split, images, boxes):
    """An annotation file and its images, unless they are there; the JSON file and the folder of the images."""
    file, place = folder / f"{split}-{images}-{boxes}.json", folder / f"{split}-{images}"
    if file.is_file():
        return file, place
    place.mkdir(parents=True, exist_ok=True)
    rng, entries = np.random.default_rng(0), []
    for i, number in enumerate((np.sort(rng.choice(581_921, images, replace=False)) + 1).tolist()):
        kind = int(rng.integers(len(SIZES)))
        picture = folder / f"picture-{kind}-{split}-{i // LINKS}.jpg"
        if not picture.is_file():
            Image.new("RGB", SIZES[kind], (90, 120, 150)).save(picture)
        if not (place / f"{number:012d}.jpg").is_file():
            os.link(picture, place / f"{number:012d}.jpg")
        entries.append(image_entry(number, *SIZES[kind]))
    categories = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in CATEGORIES]
    head = json.dumps({"info": {}, "categories": categories, "images": entries})
    with open(file.with_suffix(".part"), "w") as out:
        out.write(head[:-1] + ', "annotations": [')
        for i in range(boxes):
            image = entries[rng.integers(images - images // 116)]  # about one image of 116 has no box
            entry = box_entry(rng, i, image["id"], image["width"], image["height"])
            out.write(", " * (i > 0) + json.dumps(entry))
        out.write("]}")
    file.with_suffix(".part").rename(file)
    return file, place


def megabytes(file, *fields):
    """The sum of some fields of a process's memory, in MB, as the kernel tells them."""
    rows = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    return sum(int(rows[field].split()[0]) for field in fields) * 1024 / 1e6


def resident(trim=True):
    if trim:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    return megabytes("/proc/self/status", "VmRSS")


def loader_megabytes(data, workers=2):
    """What each loader process has for itself, and its share of what is shared, after an epoch: [(USS, PSS)], in MB."""
    source.read_image = lambda *_: torch.zeros(3, 2, 2, dtype=torch.uint8)  # what they hold besides pixels is measured
    batches = train_batches(len(data), 16, 0, 0, wide=data.wide)
    loader = iter(make_loader(data, True, batches, workers=workers))
    for _ in batches:
        next(loader)
    files = [f"/proc/{process.pid}/smaps_rollup" for process in loader._workers]
    return [(megabytes(f, "Private_Clean", "Private_Dirty"), megabytes(f, "Pss")) for f in files]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--boxes", type=int, default=860_001)
    args = parser.parse_args()
    files = [*write_large(args.folder, "train", args.images, args.boxes), *write_large(args.folder, "val", 5000, 36781)]
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    train_set, test_set = load_dataset("coco", files=files)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak, left = megabytes("/proc/self/status", "VmHWM") - before, resident(trim=False) - before
    figures = [seconds, cpu, peak, left, resident() - before, *map(max, zip(*loader_megabytes(train_set), strict=True))]
    print("| images | seconds to load | of CPU | peak MB | MB left | after malloc_trim | a loader's USS | its PSS |")
    print("|" + "---|" * 8)
    print(f"| {len(train_set)} + {len(test_set)} | " + " | ".join(f"{v:.1f}" for v in figures) + " |")


if __name__ == "__main__":
    main()
