"""Which images are shown: of a run's test set, or files of any kind."""

from argparse import Namespace
from pathlib import Path

from tar import UserError
from tar.data.datasets import load_test_set
from tar.data.image_files import read_image
from tar.training.flags import COCO_FILES, parse

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def flags_of(settings, **given):
    """A run's settings as flags of train.py; the given flags, if not None, replace them."""
    return Namespace(**{**vars(parse([])), **settings, **{k: v for k, v in given.items() if v is not None}})


def open_test_set(args, classes):
    """The test source of train.py's flags."""
    files = [getattr(args, name) for name in COCO_FILES]
    return load_test_set(args.dataset, classes, args.data_path, args.voc_years, files, args.limit_test, args.split)


def images_to_show(wanted, args, classes, say):
    """What --show names: (name, image, target or None), one after the other.

    Args:
        wanted: words: a number of test images, or paths; a file of the test set comes with its ground truth.
    """
    if len(wanted) == 1 and wanted[0].isdigit():
        source = open_test_set(args, classes)
        yield from (load_test_image(source, index) for index in range(min(int(wanted[0]), len(source))))
        return
    index_of = {}  # of a file in the test set
    try:
        source = open_test_set(args, classes)
        index_of = {Path(source.name(0, i)).resolve(): i for i in range(len(source))}
    except UserError as error:
        say(f"Note: no ground truth, and so detections only: {error}")
    for path in image_files(wanted):
        index = index_of.get(path.resolve())
        if index is None and index_of:
            say(f"{path}: not in the {args.split} set; without ground truth there are detections only")
        yield (path.stem, read_image(path), None) if index is None else load_test_image(source, index)


def load_test_image(source, index):
    """(name, image, target) of a test source; ignored boxes are left out, as in training."""
    image, boxes, labels, ignored = source.load(0, index)
    file = Path(source.name(0, index))
    name = file.stem if file.suffix.lower() in SUFFIXES else f"image-{index}"  # shapes have no files
    return name, image, {"boxes": boxes[~ignored], "labels": labels[~ignored]}


def image_files(paths):
    """The image files that paths name; a folder stands for all images in it."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such image")
        inside = (
            sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise UserError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
        files += inside
    return files


def make_folder(folder):
    """A folder, made if it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --output") from None
    return Path(folder)
