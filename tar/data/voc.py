"""Folders in PASCAL VOC's layout: JPEGImages, Annotations (XML) and ImageSets/Main (lists of image names)."""

import codecs
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import numpy as np
from torchvision.datasets import VOCDetection

from tar import UserError, one_line
from tar.data.image_files import files_in, suffixes
from tar.data.source import Source, counted, listed

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SPLITS = {"test": ("trainval", "test"), "val": ("train", "val")}  # the lists to train and to test on
YES = ("1", "true", "yes", "y", "t")  # what tools write for difficult


def voc_source(images, classes, list_file, limit=0, exif="auto"):
    """The Source of images as read_voc gives them; UserError for an object of another class.

    VOC counts pixels from 1, both ends included; the Source's corners are continuous: (xmin - 1, ymin - 1, xmax, ymax).
    """
    images, label, rows = images[: limit or None], {name: i for i, name in enumerate(classes, 1)}, []
    for number, (_, annotation, _, objects) in enumerate(images):
        for name, corners, difficult in objects:
            if name not in label:
                raise UserError(f"{annotation}: class {name!r} is none of {listed(classes, 10)}")
            rows.append((number, *corners, label[name], difficult))
    boxes = np.array(rows, dtype=np.float64).reshape(-1, 7)
    low, high = boxes[:, 1:3].copy(), boxes[:, 3:5].copy()
    boxes[:, 1:3], boxes[:, 3:5] = np.minimum(low, high) - 1, np.maximum(low, high)
    exchanged = [images[i][0] for i in boxes[(low > high).any(1), 0].astype(int)]
    notes = [
        *counted("images without an XML file, used as images without boxes", [f for f, xml, *_ in images if not xml]),
        *counted("XML files without an object", [xml for _, xml, _, objects in images if xml and not objects]),
        *counted("boxes whose corners are exchanged, which is mended", exchanged),
    ]
    files = [(file, *size) for file, _, size, _ in images]
    return Source(classes, files, boxes, list_file, limit=limit, exif=exif, notes=notes, trust=False)


def voc_classes(images):
    """The classes of images as read_voc gives them; VOC's 20 if there are no others."""
    names = {name for *_, objects in images for name, *_ in objects}
    return VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))


def read_voc(data_path, years, split):
    """The images of a split, "train", "val", "trainval" or "test", and the file that lists them, the first of several.

    An image is (file, XML file or None, *read_annotation's size and objects). All years must have a list to train on,
    and one of them a list to test on. UserError if an entry of a list names no image, or several.
    """
    folders = voc_folders(data_path, years)
    if split in ("test", "val"):
        folders = [folder for folder in folders if os.path.isfile(list_of(folder, split))] or folders[:1]
    images = [image for folder in folders for image in _listed_images(folder, list_of(folder, split))]
    return images, list_of(folders[0], split)


def _listed_images(folder, list_file):
    images, annotations = _by_stem(folder / "JPEGImages", suffixes()), _by_stem(folder / "Annotations", {".xml"})
    for entry in read_list(list_file):
        annotation = _the_file(entry, annotations, list_file)
        size, name, objects = read_annotation(annotation) if annotation else ((None, None), "", [])
        file = _the_file(entry, images, list_file, name)
        if not file:
            raise UserError(f"{folder / 'JPEGImages'}: no image {entry!r}, but {list_file} lists it")
        yield file, annotation, size, objects


def _by_stem(folder, kinds):
    """{name without suffix: [(file, its path in the folder)]} of a folder's files whose suffixes are among kinds."""
    found = defaultdict(list)
    for file in files_in(folder) if os.path.isdir(folder) else ():
        stem, suffix = os.path.splitext(os.path.basename(file))
        if suffix.lower() in kinds:
            found[stem].append((file, file[len(f"{folder}/") :]))
    return found


def _the_file(entry, by_stem, list_file, name=""):
    """The one file that an entry of a list means, or else the image's name in its XML file; None if there is none.

    An entry is a name, with or without suffix and folders, perhaps with VOC's flag (1, 0 or -1) after it.
    """
    for words in dict.fromkeys((entry, re.sub(r"\s+-?[01]$", "", entry), *entry.split()[:1], name)):
        path = words.replace("\\", "/").removeprefix("./")
        bare = os.path.splitext(path)[0] if path.lower().endswith(tuple(suffixes())) else path
        fits = {}  # how well: [files]
        for file, inside in (f for stem in {os.path.basename(path), os.path.basename(bare)} for f in by_stem[stem]):
            stem = os.path.splitext(inside)[0]
            if not (
                f"/{bare}".endswith(f"/{stem}") or f"/{stem}".endswith(f"/{bare}") or f"/{stem}".endswith(f"/{path}")
            ):
                continue  # of another folder
            fit = (f"/{file}".endswith(f"/{path}"), stem == bare, inside == name)
            fits.setdefault(fit, []).append(file)
        best = fits[max(fits)] if fits else []
        if len(best) > 1:
            raise UserError(f"{list_file}: {entry!r} may be {best[0]} or {best[1]}; list its folder and suffix")
        if best:
            return best[0]
    return None


def list_of(folder, split):
    """The file that lists the images of a split."""
    return folder / f"ImageSets/Main/{split}.txt"


def read_list(file):
    """The entries of a list of image names, one a line. UserError, which names the file, if there is none."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{file}: no such list of image names; {_lists_instead(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of image names ({one_line(error)})") from None
    if not names:
        raise UserError(f"{file}: lists no image")
    return names


def _lists_instead(file):
    """Which lists lie where one is missing, and what makes them work."""
    folder = file.parent
    there = (
        [os.path.basename(path) for path in files_in(folder) if path.endswith(".txt")] if os.path.isdir(folder) else []
    )
    remedy = "write it, one image name a line; trainval.txt and test.txt are needed"
    for split, (train, test) in SPLITS.items():
        if {f"{train}.txt", f"{test}.txt"} <= {*there}:
            remedy = f"give --split {split}, which trains on {train}.txt and tests on {test}.txt"
    return f"{folder} holds {listed(sorted(there, key=len), 10) or 'no list'}: {remedy}"


def read_annotation(file):
    """An image's [width, height], None if not said, its file's name, and its objects: [(class, corners, difficult)].

    Corners are xmin, ymin, xmax, ymax, as given. UserError, which names the file, if it cannot be understood.
    """
    try:
        root, objects = _parse(Path(file).read_bytes()), []
        for number, element in enumerate(root.findall("object"), 1):
            name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
            if not name or box is None:
                tags = listed([child.tag for child in element], 10)
                raise ValueError(f"object {number}, {name!r}, must have a name and a bndbox; it has {tags}")
            texts = [box.findtext(end) for end in ("xmin", "ymin", "xmax", "ymax")]
            corners = [_number(text) for text in texts]
            if None in corners:
                raise ValueError(f"object {number}, {name!r}, has a bndbox of {texts}")
            objects.append((name, corners, (element.findtext("difficult") or "").strip().lower() in YES))
        size = [_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    except (LookupError, OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file}: not a VOC annotation ({one_line(error)})") from None
    return size, (root.findtext("filename") or "").strip(), objects


def _parse(data):
    """The root of an XML file's bytes, in any encoding that Python knows."""
    declared = re.match(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([\w.:-]+)""", data)
    encoding = "utf-8-sig" if data.startswith(codecs.BOM_UTF8) else declared and declared[1].decode("ascii")
    return ElementTree.fromstring(data.decode(encoding) if encoding else data)


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def voc_folders(data_path, years):
    """The folders of the given years under data_path, or data_path itself where it holds JPEGImages."""
    root, folders = Path(data_path), []
    try:
        os.listdir(root)
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}; give --data-path DIR, or --download to fetch VOC") from None
    if os.path.isdir(root / "JPEGImages"):
        return [root]
    for year in years:
        places = (root / f"VOCdevkit/VOC{year}", root / f"VOC{year}")
        found = [place for place in places if os.path.isdir(place / "JPEGImages")]
        if not found:
            wanted = f"neither JPEGImages nor VOCdevkit/VOC{year}/JPEGImages"
            raise UserError(f"{root}: holds {wanted}; give --data-path DIR, or --download to fetch VOC")
        folders.append(found[0])
    return folders


def download_voc(data_path, years):
    """Downloads and unpacks VOC with torchvision's downloader. A split whose list is there already is kept."""
    for year in years:
        for split in ("trainval", "test") if year == "2007" else ("trainval",):
            if os.path.isfile(list_of(Path(data_path, "VOCdevkit", f"VOC{year}"), split)):
                continue
            try:
                VOCDetection(data_path, year=year, image_set=split, download=True)
            except (OSError, RuntimeError, ValueError) as error:
                remedy = f"unpack the archives of host.robots.ox.ac.uk/pascal/VOC in {data_path}"
                raise UserError(f"VOC {year} {split} cannot be downloaded ({one_line(error)}); {remedy}") from error
