"""Annotation files in COCO's JSON format, COCO's own or any other: boxes are [x, y, w, h] there."""

import ctypes
import gc
import json
import re
import reprlib
import sys
import unicodedata
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from tar import UserError, one_line
from tar.data.file_names import find_images
from tar.data.source import Source, is_true, listed, number

ID = (int, float, str)
FIELDS = {  # what is read, and its type
    "images": {"id": ID, "file_name": str, "width": object, "height": object},
    "annotations": {"image_id": ID, "category_id": ID, "bbox": list, "iscrowd": object, "area": object},
    "categories": {"id": ID, "name": str},
}
WANTED = {ID: "a whole number or a text", str: "a text", list: "[x, y, width, height], nor has it a polygon"}
# From one bracket to the last of those that follow; after a value comes neither a bracket nor a comma and a bracket.
OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[^]]*[]\s]+(?:,\s*\[[^]]*[]\s]+)*')


@contextmanager
def _memory_given_back():
    """Meanwhile no garbage collection, which walks through millions of new objects; what is freed is given back."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Coco(Source):
    """The source of a JSON file and the folder of its images; crowds are ignored boxes.

    Labels are 1, 2, ... in the order of `classes`, those trained on, or of the file's category ids, which may have
    gaps. `image_ids` are the file's, int64, or 0, 1, ... where one is a text. A source to train on has no annotations.
    """

    @_memory_given_back()
    def __init__(self, file, folder, keep_empty=True, limit=0, classes=None, train=False, exif="auto"):
        images, annotations, categories = read_coco_file(file)
        classes, labels, notes = match_classes(file, categories, Counter(annotations["category_id"]), classes)
        boxes = _table(file, annotations, images["id"], labels)
        if repeated := len(annotations["bbox"]) - len(boxes):
            notes.append(f"{repeated} annotations of {file} are there twice; each is used once")
        if len(boxes) and boxes[:, 6].all():
            raise UserError(f"{file}: all {len(boxes)} boxes are crowds, which do not count; set iscrowd to 0")
        paths, moved = find_images(images["file_name"], folder, file)
        sizes = [*zip(map(number, images["width"]), map(number, images["height"]), strict=True)]
        xywh, areas = boxes[:, 1:5].copy(), boxes[:, 7]
        with np.errstate(invalid="ignore"):
            boxes[:, 3:5] += boxes[:, 1:3]
        super().__init__(classes, paths, sizes, boxes[:, :7], file, keep_empty, limit, exif, notes + moved)
        ids = np.array(images["id"])
        self.image_ids = (ids if ids.dtype == np.int64 else np.arange(len(ids)))[self.kept]
        if not train:
            self.xywh, areas = xywh[self.rows], areas[self.rows]
            self.areas = np.where(np.isfinite(areas), areas, (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1))

    def annotations(self):
        """The boxes as pycocotools reads them, not clipped, with the file's areas if any; category_id is the label."""
        image_ids = np.repeat(self.image_ids, np.diff(self.offsets))
        columns = (image_ids, self.labels, self.xywh, self.areas, self.ignored.astype(int))
        names = ("image_id", "category_id", "bbox", "area", "iscrowd")
        return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]


def coco_files(data_path, files):
    """Train JSON, train images, val JSON, val images: those given (images: else beside their JSON), or COCO's own."""
    usual = ("annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017")
    folders = [file and Path(file).parent for file in files]
    given = files[0], files[1] or folders[0], files[2], files[3] or folders[2]
    return [file or Path(data_path, path) for file, path in zip(given, usual, strict=True)]


def read_coco_file(file):
    """The images, annotations and categories of a COCO file as columns {field: list}; UserError if it is none."""
    try:
        try:  # outlines are two thirds of COCO's files and not needed, unless a box is missing
            return _checked(json.loads(OUTLINE.sub(b'"segmentation":0', Path(file).read_bytes())), file)
        except (UserError, ValueError):
            return _checked(json.loads(Path(file).read_bytes()), file)
    except (OSError, ValueError, RecursionError) as error:
        remedy = "fetch it again, or give --data-path DIR, or --val-json FILE (to train also --train-json FILE)"
        raise UserError(f"{file}: cannot be read as a JSON file ({one_line(error)}); {remedy}") from None


def _checked(data, file):
    """The columns that read_coco_file returns, of a JSON file's data."""
    found = []
    for key, fields in FIELDS.items():
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or (not entries and key != "annotations"):
            raise UserError(f"{file}: not COCO's format: it lists no {key}")
        entries, columns = [entry if isinstance(entry, dict) else {} for entry in entries], {}
        for field, kind in fields.items():
            column = [entry.get(field) for entry in entries]
            if kind is ID:
                column = [value if type(value) is int else _as_id(value) for value in column]
            if field == "bbox":
                column = [box or _box_around(entries[i].get("segmentation")) for i, box in enumerate(column)]
            for i, value in enumerate(column):
                if not isinstance(value, kind):
                    where = f"entry {i} of {key}: {field} is {reprlib.repr(value)}"
                    raise UserError(f"{file}: not COCO's format: {where}, not {WANTED[kind]}")
            columns[field] = column
        if len({*columns.get("id", ())}) < len(columns.get("id", ())):
            raise UserError(f"{file}: two {key} have the same id")
        found.append(columns)
    return found


def match_classes(file, categories, used, classes=None):
    """The classes, {category id: label}, and notes. classes: those trained on, or None for the file's own.

    used: {category id: number of boxes}. UserError for boxes of two categories of one name, or of another class.
    """
    notes, ids = [], {}
    names = map(_plain, categories["name"])
    for id_, name in sorted(zip(categories["id"], names, strict=True), key=lambda category: not used[category[0]]):
        kept = ids.setdefault(name, id_)
        if kept != id_ and used[id_]:
            raise UserError(f"{file}: categories {kept} and {id_} are both called {name}, and both have boxes")
        if kept != id_:
            notes.append(f"{file}: category {id_} is called {name} as category {kept} is, has no box, is dropped")
    if classes is None:
        classes = sorted(ids, key=lambda name: (isinstance(ids[name], str), ids[name]))
    labels = {_plain(name): label for label, name in enumerate(classes, 1)}
    lacking, more = [name for name in labels if name not in ids], [name for name in ids if name not in labels]
    boxed = [name for name in more if used[ids[name]]]
    if boxed:
        lists = f", and does not list {listed(lacking, 10)}" if lacking else ""
        raise UserError(f"{file}: its categories are not those trained on: it has boxes of {listed(boxed, 10)}{lists}")
    notes += [f"{file} does not list {listed(lacking, 10)}, trained on"] if lacking else []
    notes += [f"{file} lists {listed(more, 10)} without a box, not trained on"] if more else []
    return tuple(classes), {ids[name]: label for name, label in labels.items() if name in ids}, notes


def _plain(name):
    """A class name without spaces around it and in one Unicode form."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def _as_id(value):
    """An id that stands as 7.0 or "7" as int, any other as it is."""
    whole = value.is_integer() if isinstance(value, float) else str(value).strip().isdecimal()
    return int(value) if whole and len(str(value)) < 100 else value


def _box_around(outline):
    """The box [x, y, w, h] around polygons, lists of x, y, x, y, ... or of points; None if they are none."""
    try:
        points = np.concatenate([np.ravel(part) for part in outline]).astype(np.float64).reshape(-1, 2)
        return [*points.min(0), *np.ptp(points, 0)]
    except (TypeError, ValueError):  # run lengths, for example
        return None


def _table(file, annotations, image_ids, labels):
    """Annotations as float [N, 8]: number of the image, x, y, w, h, label, crowd, area; those twice the same once."""
    numbers = {id_: i for i, id_ in enumerate(image_ids)}
    try:
        image = [numbers[id_] for id_ in annotations["image_id"]]
        label = [labels[id_] for id_ in annotations["category_id"]]
    except KeyError as error:
        what = f"an annotation has image_id or category_id {reprlib.repr(error.args[0])}"
        raise UserError(f"{file}: {what}, which is not listed") from None
    sides = _numbers([*chain.from_iterable(box if len(box) == 4 else [None] * 4 for box in annotations["bbox"])])
    crowd = [is_true(value) for value in annotations["iscrowd"]]
    table = np.column_stack([image, sides.reshape(-1, 4), label, crowd, _numbers(annotations["area"])])
    rows = dict.fromkeys(table.view("V64").ravel().tolist())  # bytes, in which NaN equals NaN
    return np.frombuffer(bytearray().join(rows)).reshape(-1, 8)


def _numbers(values):
    """Values as float64, NaN for what is no number."""
    try:
        return np.array(values, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        return np.array([number(value) for value in values], dtype=np.float64)
