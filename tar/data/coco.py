"""Annotation files in COCO's JSON format, COCO's own or any other: boxes are [x, y, w, h] there."""

import ctypes
import gc
import json
import math
import re
import reprlib
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tar import UserError, one_line
from tar.data.file_names import FileNames, find_images
from tar.data.source import Source, listed

FIELDS = {  # what is read, and its type; None where anything may stand
    "images": {"id": int, "file_name": str, "width": None, "height": None},
    "annotations": {"image_id": int, "category_id": int, "bbox": list, "iscrowd": None, "area": None},
    "categories": {"id": int, "name": str},
}
IDS = (int, float, str)  # an id may be a number as a text, or any text
WANTED = {int: "a whole number or a text", str: "a text", list: "[x, y, width, height], nor has it a polygon"}
LARGEST_SIDE = 10**6  # pixels
# From one bracket to the last of those that follow; after a value comes neither a bracket nor a comma and a bracket.
OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[^]]*[]\s]+(?:,\s*\[[^]]*[]\s]+)*')
WEIGHTS = np.random.default_rng(0).integers(2**64 - 1, size=8, dtype=np.uint64) | np.uint64(1)  # of a hash
NO_CROWD = ("0", "0.0", "false", "no", "none", "")  # iscrowd as a text


@contextmanager
def _memory_given_back():
    """Meanwhile no garbage collection, which walks through millions of new objects; what is freed is given back."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Coco(Source):
    """The source of a JSON file and the folder of its images; keep_empty and limit as in Source.

    Crowds are ignored boxes: no training on them, pycocotools' own rule in evaluation. Labels are 1, 2, ... in the
    order of `classes`, those trained on, or where they are None of the file's category ids, which may have gaps.
    `image_ids` are the file's, int64, or 0, 1, ... where one is a text. A source to train on has no annotations().
    """

    @_memory_given_back()
    def __init__(self, file, folder, keep_empty=True, limit=0, classes=None, train=False, exif="auto"):
        images, annotations, categories = read_coco_file(file)
        classes, label, notes = match_classes(file, categories, Counter(annotations["category_id"]), classes)
        boxes, ids = _table(file, annotations, images["id"], label), images["id"]
        if len(boxes) < len(annotations["bbox"]):
            repeated = len(annotations["bbox"]) - len(boxes)
            notes.append(f"{repeated} annotations of {file} are there twice; each is used once")
        if len(boxes) and boxes[:, 6].all():
            raise UserError(f"{file}: all {len(boxes)} boxes are crowds, which do not count; set iscrowd to 0")
        paths, found = find_images(images["file_name"], folder, file)
        sizes = map(_size, images["width"], images["height"])
        images = [(path, *size) for path, size in zip(paths, sizes, strict=True)]
        xywh, areas = boxes[:, 1:5].copy(), boxes[:, 7]
        with np.errstate(invalid="ignore"):
            boxes[:, 3:5] += boxes[:, 1:3]
        super().__init__(classes, images, boxes[:, :7], file, keep_empty, limit, exif, notes + found)
        self.files = FileNames(self.files)
        whole = all(type(number) is int and abs(number) < 2**63 for number in ids)
        self.image_ids = np.array(ids if whole else range(len(ids)))[self.kept]
        if not train:
            self.xywh, areas = xywh[self.rows], areas[self.rows]
            self.areas = np.where(np.isfinite(areas), areas, (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1))

    def annotations(self):
        """The boxes as pycocotools reads them, not clipped, with the file's areas (often masks') if any.

        image_id is of image_ids, category_id is the label.
        """
        image = np.repeat(self.image_ids, np.diff(self.offsets))
        columns = (column.tolist() for column in (image, self.labels, self.xywh, self.areas, self.ignored))
        names = ("image_id", "category_id", "bbox", "area", "iscrowd")
        return [dict(zip(names, (*row, int(crowd)), strict=True)) for *row, crowd in zip(*columns, strict=True)]


def coco_files(data_path, files):
    """Train JSON, train images, val JSON, val images: those given, or where they are None COCO's own in data_path.

    The images of a given JSON file are below its folder, unless theirs is given.
    """
    usual = ("annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017")
    images = [given or (file and Path(file).parent) for file, given in zip(files[::2], files[1::2], strict=True)]
    files = [files[0], images[0], files[2], images[1]]
    return [given or Path(data_path, path) for given, path in zip(files, usual, strict=True)]


def read_coco_file(file):
    """The images, annotations and categories of a COCO file as columns, {field: list}, with ids as _as_id has them.

    UserError if it is not in COCO's format.
    """
    try:
        try:  # outlines are two thirds of COCO's files and not needed, unless a box is missing
            return _checked(json.loads(OUTLINE.sub(b'"segmentation":0', Path(file).read_bytes())), file)
        except (UserError, ValueError):
            return _checked(json.loads(Path(file).read_bytes()), file)
    except (OSError, ValueError, RecursionError) as error:
        remedy = "fetch it again, or give --data-path DIR, or --train-json, --train-images, --val-json and --val-images"
        raise UserError(f"{file}: cannot be read as a JSON file ({one_line(error)}); {remedy}") from None


def _checked(data, file):
    """The columns that read_coco_file returns, of a JSON file's data."""
    found = []
    for key, fields in FIELDS.items():
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or (not entries and key != "annotations"):
            raise UserError(f"{file}: not COCO's format: it lists no {key}")
        entries = [entry if isinstance(entry, dict) else {} for entry in entries]
        columns = {field: [entry.get(field) for entry in entries] for field in fields}
        for number, box in enumerate(columns.get("bbox", ())):
            if box in (None, []):
                columns["bbox"][number] = _box_around(entries[number].get("segmentation"))
        for field, kind in fields.items():
            values = columns[field]
            if kind is None or {*map(type, values)} <= {kind}:
                continue
            for number, value in enumerate(values):
                if not isinstance(value, IDS if kind is int else kind):
                    where = f"entry {number} of {key}: {field} is {reprlib.repr(value)}"
                    raise UserError(f"{file}: not COCO's format: {where}, not {WANTED[kind]}")
                values[number] = _as_id(value)
        ids = columns.get("id", ())
        if len({*ids}) < len(ids):
            raise UserError(f"{file}: two {key} have the same id")
        found.append(columns)
    return found


def match_classes(file, categories, used, classes=None):
    """The classes, the label of each category id, and what is to be said; names are compared as _plain has them.

    Of categories that share a name, one may have boxes; the others are dropped. UserError if more have, or if one that
    is not among the classes to test on has.

    Args:
        used: {category id: number of boxes}.
        classes: those trained on, label 1 first; None for the file's own.
    """
    same, notes, ids = defaultdict(list), [], {}
    for number, name in zip(categories["id"], categories["name"], strict=True):
        same[_plain(name)].append(number)
    for name, numbers in same.items():
        kept, *others = sorted(numbers, key=lambda number: not used[number])
        ids[name] = kept
        if others and used[others[0]]:
            raise UserError(f"{file}: categories {kept} and {others[0]} are both called {name}, and both have boxes")
        if others:
            notes.append(f"{file}: category {others[0]} is called {name} as category {kept} is, has no box, is dropped")
    if classes is None:
        classes = sorted(ids, key=lambda name: (isinstance(ids[name], str), ids[name]))
    known = {_plain(name): label for label, name in enumerate(classes, 1)}
    lacking, more = [name for name in known if name not in ids], [name for name in ids if name not in known]
    boxed = [name for name in more if used[ids[name]]]
    if boxed:
        lists = f", and does not list {listed(lacking, 10)}" if lacking else ""
        raise UserError(f"{file}: its categories are not those trained on: it has boxes of {listed(boxed, 10)}{lists}")
    notes += [f"{file} does not list {listed(lacking, 10)}, trained on"] if lacking else []
    notes += [f"{file} lists {listed(more, 10)} without a box, not trained on"] if more else []
    return tuple(classes), {ids[name]: label for name, label in known.items() if name in ids}, notes


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
        return [*points.min(0).tolist(), *(points.max(0) - points.min(0)).tolist()]
    except (TypeError, ValueError):  # run lengths, for example
        return None


def _size(*size):
    """Width and height of an image; 0 and 0, unknown, unless both are whole numbers that can be true."""
    return size if all(type(side) is int and 0 < side <= LARGEST_SIDE for side in size) else (0, 0)


def _table(file, annotations, image_ids, labels):
    """Annotations as float [N, 8]: number of the image, x, y, w, h, label, crowd, area; those twice the same once.

    labels: {id of the category: label}.
    """
    numbers = {id_: number for number, id_ in enumerate(image_ids)}
    try:
        image = [numbers[id_] for id_ in annotations["image_id"]]
        label = [labels[id_] for id_ in annotations["category_id"]]
    except KeyError as error:
        what = f"an annotation has image_id or category_id {reprlib.repr(error.args[0])}"
        raise UserError(f"{file}: {what}, which is not listed") from None
    crowd = [_is_crowd(value) for value in annotations["iscrowd"]]
    area = [value if type(value) in (int, float) else math.nan for value in annotations["area"]]
    table = np.column_stack([image, _numbers(annotations["bbox"], 4), label, crowd, _numbers(area)])
    sums = np.sort((table.view(np.uint64) * WEIGHTS).sum(1))
    if (sums[1:] != sums[:-1]).all():  # the usual case: no two rows are the same
        return table
    rows = dict.fromkeys(table.view("V64").ravel().tolist())
    return np.frombuffer(bytearray(b"".join(rows)), dtype=np.float64).reshape(-1, 8)


def _is_crowd(value):
    return value not in (0, None) and str(value).strip().lower() not in NO_CROWD


def _numbers(rows, *shape):
    """So many numbers of a shape as float [N, *shape]; NaN for a row that is none."""
    try:
        numbers = np.array(rows, dtype=np.float64)
        if numbers.shape == (len(rows), *shape):
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    half = len(rows) // 2
    halves = [_numbers(part, *shape) for part in (rows[:half], rows[half:]) if half]
    return np.concatenate(halves) if halves else np.full((len(rows), *shape), math.nan)
