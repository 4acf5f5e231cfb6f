"""Folders in PASCAL VOC's layout: JPEGImages, Annotations (XML) and ImageSets/Main (lists of image names)."""

import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from torchvision.datasets import VOCDetection

from tar import UserError, one_line
from tar.data.file_names import Files, stem_parts
from tar.data.image_files import suffixes
from tar.data.source import Source, counted, is_true, listed, number, with_others

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LIST = "ImageSets/Main/{}.txt"  # of the names of a split's images
SPLITS = {"test": ("trainval", "test"), "val": ("train", "val")}  # the lists to train and to test on


def voc_source(images, list_file, classes, limit=0, exif="auto"):
    """The Source of images as read_voc gives them; UserError for an object of another class.

    VOC counts pixels from 1, both ends included; the Source's corners are continuous: (xmin - 1, ymin - 1, xmax, ymax).
    """
    images, labels, rows = images[: limit or None], {name: i for i, name in enumerate(classes, 1)}, []
    for i, (_, annotation, _, objects) in enumerate(images):
        for name, corners, difficult in objects:
            if name not in labels:
                raise UserError(f"{annotation}: class {name!r} is none of {listed(classes, 10)}")
            rows.append((i, *corners, labels[name], difficult))
    boxes = np.array(rows, dtype=np.float64).reshape(-1, 7)
    low, high = boxes[:, 1:3].copy(), boxes[:, 3:5].copy()
    boxes[:, 1:3], boxes[:, 3:5] = np.minimum(low, high) - 1, np.maximum(low, high)
    exchanged = [images[i][0] for i in boxes[(low > high).any(1), 0].astype(int)]
    notes = [
        *counted("images without an XML file, used as images without boxes", [f for f, xml, *_ in images if not xml]),
        *counted("XML files without an object", [xml for _, xml, _, objects in images if xml and not objects]),
        *counted("boxes whose corners are exchanged, which is mended", exchanged),
    ]
    files, _, sizes, _ = zip(*images, strict=True)
    return Source(classes, files, sizes, boxes, list_file, exif=exif, notes=notes, trust=False)


def voc_classes(images):
    """The classes of images as read_voc gives them; VOC's 20 if there are no others."""
    names = {name for *_, objects in images for name, *_ in objects}
    return VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))


def read_voc(data_path, years, split):
    """The images of a split, (file, XML file or None, size, objects) each, and the first file that lists them.

    All years must have a list to train on, and one of them a list to test on. A year's folder is data_path itself where
    it holds JPEGImages.
    """
    lists = []
    for year in years:
        folders = [Path(data_path, place) for place in (".", f"VOCdevkit/VOC{year}", f"VOC{year}")]
        folders = [folder for folder in folders if os.path.isdir(folder / "JPEGImages")]
        if not folders:
            wanted = f"JPEGImages or VOCdevkit/VOC{year}/JPEGImages"
            raise UserError(
                f"{data_path}: cannot find {wanted} here; give --data-path DIR (train.py --download fetches VOC)"
            )
        lists.append(folders[0] / LIST.format(split))
    if split in ("test", "val"):
        lists = [file for file in lists if os.path.isfile(file)] or lists[:1]
    lists = list(dict.fromkeys(lists))
    return [image for file in lists for image in _listed_images(file)], lists[0]


def _listed_images(list_file):
    """The images of a list of names, with or without suffix and folders, perhaps with VOC's flag after them."""
    folder = list_file.parents[2]
    images = Files(folder / "JPEGImages", stem_parts, suffixes())
    annotations, missing = Files(folder / "Annotations", stem_parts, (".xml",)), []
    for entry in read_list(list_file):
        names = entry, re.sub(r"\s+-?[01]$", "", entry), entry.split()[0]
        name = next((name for name in names if images.fitting(name) or annotations.fitting(name)), entry)
        annotation = annotations.find(name, list_file)
        size, other, objects = read_annotation(annotation) if annotation else ((None, None), name, [])
        file = images.find(name, list_file, other) or images.find(other, list_file)
        if file:
            yield file, annotation, size, objects
        else:
            missing.append(repr(entry))
    if missing:
        raise UserError(f"{images.folder}: no image {with_others(missing)}, but {list_file} lists it")


def read_list(file):
    """The entries of a list of image names, one a line. UserError if there is none."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        there = sorted((path.name for path in file.parent.glob("*.txt")), key=len)
        remedy = "write it, one image name a line"
        if {"train.txt", "val.txt"} <= {*there}:
            remedy += ", or give --split val, which trains on train.txt and tests on val.txt"
        lists = f"{file.parent} holds {listed(there, 10) or 'no list'}"
        raise UserError(f"{file}: no such list of image names; {lists}: {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of image names ({one_line(error)})") from None
    if not names:
        raise UserError(f"{file}: lists no image")
    return names


def read_annotation(file):
    """An image's [width, height], None if not said, its file's name, and its objects: [(class, corners, difficult)].

    Corners are xmin, ymin, xmax, ymax, as given. UserError, which names the file, if it cannot be understood.
    """
    try:
        data, objects = Path(file).read_bytes(), []
        declared = re.match(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([\w.:-]+)""", data)  # any that Python knows
        root = ElementTree.fromstring(data.decode(declared[1].decode()) if declared else data)
        for i, element in enumerate(root.findall("object"), 1):
            name = element.findtext("name", "").strip()
            corners = [number(element.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax")]
            if not name or None in corners:
                given = ElementTree.tostring(element, "unicode")
                raise ValueError(f"object {i}, {name!r}, must have a name and four numbers in its bndbox: {given}")
            objects.append((name, corners, is_true(element.findtext("difficult"))))
    except (LookupError, OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file}: not a VOC annotation ({one_line(error)})") from None
    size = [number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    return size, root.findtext("filename", "").strip(), objects


def download_voc(data_path, years):
    """Downloads and unpacks VOC with torchvision's downloader. A split whose list is there already is kept."""
    for year in years:
        for split in ("trainval", "test") if year == "2007" else ("trainval",):
            if os.path.isfile(Path(data_path, f"VOCdevkit/VOC{year}", LIST.format(split))):
                continue
            try:
                VOCDetection(data_path, year=year, image_set=split, download=True)
            except (OSError, RuntimeError, ValueError) as error:
                remedy = f"unpack the archives of host.robots.ox.ac.uk/pascal/VOC in {data_path}"
                raise UserError(f"VOC {year} {split} cannot be downloaded ({one_line(error)}); {remedy}") from error
