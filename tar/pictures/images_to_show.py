"""Which images are shown: the test images of a run, the first ones or those of some files."""

import os
from argparse import Namespace
from pathlib import Path

from tar import UserError
from tar.data.datasets import load_test_set
from tar.data.image_files import read_header, turn
from tar.data.source import Source
from tar.training.flags import COCO_FILES, parse


def flags_of(settings, **given):
    """A run's settings as flags of train.py; the given flags, if not None, replace them."""
    if given.get("data_path"):  # another folder has its own files
        settings = {**settings, **dict.fromkeys(COCO_FILES)}
    return Namespace(**{**vars(parse([])), **settings, **{k: v for k, v in given.items() if v is not None}})


def open_test_set(args, classes):
    """The test source of train.py's flags."""
    files = [getattr(args, name) for name in COCO_FILES]
    given = args.data_path, args.voc_years, files, args.limit_test, args.split, args.exif
    return load_test_set(args.dataset, classes, *given)


def images_to_show(wanted, source):
    """The images of a test source that --show names (a number of images, or files): (name, image, target) of each.

    A target has boxes float [N, 4] and labels int64 [N]; ignored boxes are left out, as in training. What was read as
    it is stored is turned upright. Where two files have the same name, all names begin with the image's number.
    """
    files = [source.name(0, index) for index in range(len(source))]
    if len(wanted) == 1 and wanted[0].isdecimal():
        chosen = range(len(files))[: int(wanted[0])]
    else:
        index_of = {os.path.realpath(file): index for index, file in enumerate(files)}
        chosen = [index_of.get(os.path.realpath(path)) for path in wanted]
        if None in chosen:
            path = wanted[chosen.index(None)]
            raise UserError(f"{path}: not in the test set; --predict detects on images without ground truth")
    several = len({Path(file).stem[:60].casefold() for file in files}) < len(files)
    for index in chosen:
        image, boxes, labels, ignored = source.load(0, index)
        name = f"image-{index}"
        if isinstance(source, Source):  # of files; shapes are drawn
            name = f"{index:06d}-" * several + Path(files[index]).stem[:60]
            _, orientation, used, _ = read_header(files[index], source.sizes[index].tolist(), source.exif)
            image, boxes = turn(image, boxes, 1 if used == orientation else orientation)
        yield name, image, {"boxes": boxes[~ignored], "labels": labels[~ignored]}
