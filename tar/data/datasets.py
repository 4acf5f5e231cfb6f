"""The data sets by name: the training and the test source of each."""

import re
import unicodedata
from collections import defaultdict

from tar import UserError
from tar.data.coco import Coco, coco_files
from tar.data.shapes import Shapes
from tar.data.source import listed
from tar.data.voc import SPLITS, download_voc, read_voc, voc_classes, voc_source

DATASETS = ("shapes", "voc", "coco")
SHAPES_IMAGES = {"train": 700, "test": 400}  # an epoch of fresh images; the fixed test images


def load_dataset(
    name,
    data_path="data",
    years=("2007",),
    files=(None,) * 4,
    limit_train=0,
    limit_test=0,
    seed=0,
    download=False,
    split="test",
    keep_empty=False,
    exif="auto",
):
    """The training and the test source of one of DATASETS, with the same classes.

    UserError if a file is missing or cannot be understood, if the classes differ or if there is no box to train on.

    Args:
        years: VOC's. All are trained on; those that have a test list are tested on.
        files: COCO's training JSON and images, test JSON and images; None for the usual path under data_path.
        limit_train, limit_test: number of images to use, the first ones; 0 for all.
        seed: of the shapes that are drawn for training.
        split: "test"; or "val" to tune on: voc's train and val list instead of trainval and test, other shapes.
        keep_empty: train on COCO's images without boxes too. exif: see read_image.
    """
    if name == "shapes":
        train = Shapes("train", limit_train or SHAPES_IMAGES["train"], seed)
        return train, load_test_set(name, train.classes, limit=limit_test, split=split)
    if name == "coco":
        train = Coco(*coco_files(data_path, files)[:2], keep_empty, limit_train, train=True, exif=exif)
        test = load_test_set(name, train.classes, data_path, years, files, limit_test, split, exif)
    else:
        if download:
            download_voc(data_path, years)
        train_list, test_list = (read_voc(data_path, years, part) for part in SPLITS[split])
        classes = voc_classes(train_list[0] + test_list[0])
        train = voc_source(*train_list, classes, limit_train, exif)
        test = voc_source(*test_list, classes, limit_test, exif)
    if train.ignored.all():  # there may be no box at all
        why = "all boxes are crowds or difficult" if len(train.boxes) else "none can be used"
        raise UserError("; ".join([f"{train.list_file}: no box to train on: {why}", *train.notes]))
    look_at_classes(train, test)
    return train, test


def load_test_set(
    name, classes, data_path="data", years=("2007",), files=(None,) * 4, limit=0, split="test", exif="auto"
):
    """The test source alone, for a detector of the given classes; the other arguments as in load_dataset."""
    if name == "shapes":
        return Shapes(split, limit or SHAPES_IMAGES["test"])
    if name == "voc":
        return voc_source(*read_voc(data_path, years, split), classes, limit, exif)
    if split == "val":
        raise UserError("--split val: COCO has one split to test on; give --val-json and --val-images")
    return Coco(*coco_files(data_path, files)[2:], limit=limit, classes=classes, exif=exif)


def look_at_classes(train, test):
    """Notes classes that are tested but not trained, and those that differ in case, spaces or Unicode form only."""
    trained, tested = (set(source.labels[~source.ignored].tolist()) for source in (train, test))
    missing = [train.classes[label - 1] for label in sorted(tested - trained)]
    if missing:
        test.notes.append(f"classes that have no box among the training images: {listed(missing, 10)}")
    alike = defaultdict(list)
    for name in train.classes:
        alike[re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()].append(ascii(name))
    pairs = [" and ".join(names) for names in alike.values() if len(names) > 1]
    if pairs:
        train.notes.append(f"classes that may be one, spelt in two ways: {listed(pairs)}")


def difference(one, other):
    """How two lists of classes differ, in words."""
    lacks, more = [c for c in one if c not in other], [c for c in other if c not in one]
    parts = [f"{what} {listed(names, 10)}" for what, names in (("without", lacks), ("besides", more)) if names]
    return "; ".join(parts) or "the same names in another order"
