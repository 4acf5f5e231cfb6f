"""Images and boxes of an annotation file in COCO's JSON format: the source, and the checks of what the file holds.

The file may be COCO's own or any other of that format. Boxes are [x, y, w, h] there and [x0, y0, x1, y1] here.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from tar import UserError, one_line
from tar.data.image_files import read_image

MIN_SIDE = 0.01  # pixels: a thinner box has no area once it is rounded to float32 and flipped


class Coco:
    """Images and boxes of a COCO annotation file.

    Labels are 1, 2, ... in the order of the file's category ids, which may have gaps; `category_ids` leads back.
    Crowds are ignored boxes: no training on them, and pycocotools' own rule in evaluation.

    Args:
        file: the JSON file.
        folder: the folder of its images.
        keep_empty: keep images that have no box, or crowds only.
        limit: first images only; 0 for all.

    Raises:
        UserError: the file is missing or not in COCO's format, or an image is missing; names the file or the image.
    """

    def __init__(self, file, folder, keep_empty=True, limit=0):
        images, annotations, categories = read_coco_file(file)
        categories = sorted(categories, key=lambda c: c["id"])
        self.category_ids = [c["id"] for c in categories]
        self.classes = tuple(c["name"] for c in categories)
        label_of = {category: label for label, category in enumerate(self.category_ids, 1)}
        sizes = {image["id"]: (image["width"], image["height"]) for image in images}
        boxes_of, with_bad_box = {image["id"]: [] for image in images}, set()
        for a in annotations:
            if a["image_id"] not in sizes or a["category_id"] not in label_of:
                what = "image_id" if a["image_id"] not in sizes else "category_id"
                raise UserError(f"{file}: annotation {a.get('id')} has {what} {a[what]}, which the file does not list")
            box = inside_image(a["bbox"], *sizes[a["image_id"]])
            if box is None:
                with_bad_box.add(a["image_id"])
            else:
                boxes_of[a["image_id"]].append((box, label_of[a["category_id"]], bool(a.get("iscrowd")), a))
        self.folder, self.samples, self.wide, self.sizes, self.dropped = Path(folder), [], [], [], []
        self.dataset = {"images": [], "annotations": [], "categories": categories}  # for pycocotools
        for image in images:
            if limit and len(self.samples) == limit:
                break
            boxes = boxes_of[image["id"]]
            if image["id"] in with_bad_box:
                self.dropped.append(image["file_name"])
            if not keep_empty and all(crowd for _, _, crowd, _ in boxes):
                continue
            if not (self.folder / image["file_name"]).is_file():
                raise UserError(f"{self.folder / image['file_name']}: no such image, but {file} lists it")
            self.samples.append((image["id"], image["file_name"], *_arrays(boxes)))
            self.wide.append(image["width"] > image["height"])
            self.sizes.append((image["width"], image["height"]))
            self.dataset["images"].append({"id": image["id"]})
            self.dataset["annotations"] += [_for_pycocotools(a, box, crowd) for box, _, crowd, a in boxes]
        if not self.samples:
            raise UserError(f"{file}: holds no image" + ("" if keep_empty else " with a box; give --keep-empty"))
        used = {label for *_, labels, _ in self.samples for label in labels.tolist()}
        self.unused = [name for label, name in enumerate(self.classes, 1) if label not in used]

    def __len__(self):
        return len(self.samples)

    def name(self, epoch, index):
        """The path of an image's file."""
        return str(self.folder / self.samples[index][1])

    def load(self, epoch, index):
        """Image, boxes, labels and ignored, see tar.data."""
        _, name, boxes, labels, ignored = self.samples[index]
        return read_image(self.folder / name, self.sizes[index]), *map(torch.from_numpy, (boxes, labels, ignored))


def coco_files(data_path, files):
    """The paths of a COCO set: [train JSON, train images], [val JSON, val images].

    Args:
        data_path: folder with annotations/instances_{train,val}2017.json, train2017 and val2017.
        files: four paths that replace these; None keeps the usual path.
    """
    root = Path(data_path)
    usual = [root / "annotations/instances_train2017.json", root / "train2017"]
    usual += [root / "annotations/instances_val2017.json", root / "val2017"]
    paths = [Path(given or path) for given, path in zip(files, usual, strict=True)]
    return paths[:2], paths[2:]


def read_coco_file(file):
    """The lists of images, annotations and categories of a COCO file. UserError if it is not in COCO's format."""
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; give --data-path with COCO's layout (annotations/instances_train2017.json, "
            "train2017), or --train-json, --train-images, --val-json and --val-images"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file, or cut short ({one_line(error)}); fetch it again") from None
    needed = {
        "images": {"id": int, "file_name": str, "width": int, "height": int},
        "annotations": {"image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    for key, fields in needed.items():
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f"{file}: not COCO's format: it has no list of {key}")
        for number, entry in enumerate(data[key]):
            wrong = not isinstance(entry, dict) or [f for f, t in fields.items() if not isinstance(entry.get(f), t)]
            if wrong:
                what = "is no object" if wrong is True else f"lacks a proper {wrong[0]}"
                raise UserError(f"{file}: not COCO's format: entry {number} of {key} {what}")
        if not data[key] and key != "annotations":
            raise UserError(f"{file}: not COCO's format: its list of {key} is empty")
    for key, field in (("images", "id"), ("categories", "id"), ("categories", "name")):
        if len({entry[field] for entry in data[key]}) < len(data[key]):
            raise UserError(f"{file}: two {key} have the same {field}")
    return tuple(data[key] for key in needed)


def inside_image(bbox, width, height):
    """COCO's box [x, y, w, h] as [x0, y0, x1, y1] clipped to the image; None if nothing is left of it."""
    try:
        x, y, w, h = map(float, bbox)
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(map(math.isfinite, (x, y, w, h))):
        return None
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return [x0, y0, x1, y1] if min(x1 - x0, y1 - y0) >= MIN_SIDE else None


def _arrays(rows):
    boxes = np.array([box for box, *_ in rows], dtype=np.float32).reshape(-1, 4)
    labels = np.array([label for _, label, *_ in rows], dtype=np.int64)
    return boxes, labels, np.array([crowd for _, _, crowd, _ in rows], dtype=bool)


def _for_pycocotools(annotation, box, crowd):
    """An annotation as pycocotools reads it. Its area is the file's (often a mask's), or else the box's."""
    x0, y0, x1, y1 = box
    area = annotation.get("area")
    if isinstance(area, bool) or not isinstance(area, int | float) or not math.isfinite(area):
        area = (x1 - x0) * (y1 - y0)
    same = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
    return {**same, "area": area, "iscrowd": int(crowd)}
