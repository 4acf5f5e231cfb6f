"""Images and boxes of folders in PASCAL VOC's layout: the source, reading lists and annotations, and the download.

A folder holds JPEGImages, Annotations (XML) and ImageSets/Main (lists of image names).
"""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import VOCDetection

from tar import UserError, one_line
from tar.data.image_files import read_image

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Voc:
    """Images and boxes in the layout of PASCAL VOC.

    Args:
        folders: one or more folders that hold JPEGImages, Annotations and ImageSets/Main.
        split: name of a list in ImageSets/Main: "train", "val", "trainval" or "test".
        classes: names in the order of their labels.
        limit: first images of the list only; 0 for all.

    Raises:
        UserError: a list, an annotation or an image is missing or cannot be understood; names the file.
    """

    def __init__(self, folders, split, classes, limit=0):
        self.classes = tuple(classes)
        self.samples = []  # (image file, boxes, labels, ignored)
        self.wide, self.sizes = [], []  # wider than high; (width, height)
        self.dropped = []  # names of images with boxes of no area
        for folder in folders:
            for name in read_list(folder, split):
                if limit and len(self.samples) == limit:
                    return
                image = folder / "JPEGImages" / f"{name}.jpg"
                if not image.is_file():
                    raise UserError(f"{image}: no such image, but {folder.name}/ImageSets/Main/{split}.txt lists it")
                boxes, names, ignored, (width, height) = read_annotation(folder / "Annotations" / f"{name}.xml")
                has_area = (boxes[:, 2:] > boxes[:, :2] + 1).all(1)  # with xmin = xmax in the file a box is a point
                if not has_area.all():
                    self.dropped.append(name)
                labels = np.array([self._label(n, folder, name) for n in names], dtype=np.int64)
                self.wide.append(width > height)
                self.sizes.append((round(width), round(height)))
                self.samples.append((image, boxes[has_area], labels[has_area], ignored[has_area]))

    def _label(self, class_name, folder, name):
        if class_name not in self.classes:
            raise UserError(f"{folder / 'Annotations' / name}.xml: class {class_name!r} is none of {self.classes}")
        return self.classes.index(class_name) + 1

    def __len__(self):
        return len(self.samples)

    def name(self, epoch, index):
        """The path of an image's file."""
        return str(self.samples[index][0])

    def load(self, epoch, index):
        """Image, boxes, labels and ignored, see tar.data."""
        file, boxes, labels, ignored = self.samples[index]
        return read_image(file, self.sizes[index]), *map(torch.from_numpy, (boxes, labels, ignored))


def voc_folders(data_path, years):
    """The folders of the given years under data_path, or data_path itself where it holds JPEGImages."""
    root = Path(data_path)
    if (root / "JPEGImages").is_dir():
        return [root]
    folders = []
    for year in years:
        found = [f for f in (root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}") if (f / "JPEGImages").is_dir()]
        if not found:
            raise UserError(
                f"{root}: holds neither VOCdevkit/VOC{year}/JPEGImages nor JPEGImages; give --data-path DIR with "
                "PASCAL VOC's layout, or --download to fetch it"
            )
        folders.append(found[0])
    return folders


def read_list(folder, split):
    """The image names of folder/ImageSets/Main/split.txt."""
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        raise UserError(f"{file}: no such list of images")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        names = [line.split()[0] for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of image names ({one_line(error)})") from None
    if not names:
        raise UserError(f"{file}: lists no image")
    return names


def read_annotation(file):
    """The objects of one VOC annotation.

    VOC counts pixels from 1, both ends included. The boxes returned are continuous, [xmin - 1, ymin - 1, xmax, ymax],
    and clipped to the image.

    Returns:
        boxes float32 [N, 4] xyxy in pixels; list of N class names; difficult bool [N]; width and height of the image.
    """
    try:
        root = ElementTree.parse(file).getroot()
        size = [float(root.findtext(f"size/{side}")) for side in ("width", "height")]
        if not all(0 < side < math.inf for side in size):
            raise ValueError("an image of no size")
        objects = root.findall("object")
        names = [(o.findtext("name") or "").strip() for o in objects]
        if "" in names:
            raise ValueError("an object has no name")
        corners = [[float(o.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    except FileNotFoundError:
        raise UserError(f"{file}: no such annotation") from None
    except (LookupError, OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a VOC annotation ({error})") from None
    boxes = np.array(corners, dtype=np.float32).reshape(-1, 4) - np.array([1, 1, 0, 0], dtype=np.float32)
    boxes[~np.isfinite(boxes).all(1)] = 0  # no area: dropped
    boxes = boxes.clip(0, np.array(size * 2, dtype=np.float32))
    ignored = np.array([(o.findtext("difficult") or "0").strip() == "1" for o in objects], dtype=bool)
    return boxes, names, ignored, size


def voc_classes(lists):
    """The classes of the annotations that some (folder, split) lists name; VOC's 20 if there are no others."""
    names = set()
    for folder, split in lists:
        for name in read_list(folder, split):
            names.update(read_annotation(folder / "Annotations" / f"{name}.xml")[1])
    return VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))


def download_voc(data_path, years):
    """Downloads and unpacks VOC with torchvision's downloader. A split whose list is there already is kept."""
    for year in years:
        for split in ("trainval", "test") if year == "2007" else ("trainval",):
            if (Path(data_path) / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt").is_file():
                continue
            try:
                VOCDetection(data_path, year=year, image_set=split, download=True)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"VOC {year} {split} could not be fetched into {data_path} ({one_line(error)}); fetch the "
                    "archives from host.robots.ox.ac.uk/pascal/VOC by other means and unpack them there"
                ) from error


def folders_with_list(folders, split):
    """Those folders that have the list of a split to test on; UserError if none has."""
    found = [f for f in folders if (f / "ImageSets" / "Main" / f"{split}.txt").is_file()]
    if not found:
        raise UserError(f"{folders[0] / 'ImageSets' / 'Main' / split}.txt: no such list of images to test on")
    return found
