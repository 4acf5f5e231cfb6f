"""Images and boxes of a data set in files, as a few flat arrays; voc.py and coco.py fill them in."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from statistics import median

import numpy as np
import torch

from tar import UserError
from tar.data.image_files import read_header, read_image

MIN_SIDE = 0.01  # pixels: a thinner box has no area once it is rounded to float32 and flipped
SAMPLE = 200  # images whose headers are read where the annotations give all sizes
DEEP_SAMPLE = 8  # images of more than 8 bits whose pixels are read
DARK = 64  # of 255: an image whose brightest pixel is below is nearly black
UNKNOWN = 1 << 24  # pixels: the side of an image that cannot be read; training and --check-data say why


def number(value):
    """A number, or a text that holds one, as float; None for anything else."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None


def is_true(value):
    """Whether VOC's difficult or COCO's iscrowd is set, in any of the ways that tools write it."""
    as_number = number(value)
    return str(value).strip().lower() in ("true", "yes", "y", "t") if as_number is None else as_number != 0


def listed(names, most=5):
    """The first of some names, each once."""
    names = list(dict.fromkeys(names))
    return ", ".join(map(str, names[:most])) + ", ..." * (len(names) > most)


def with_others(names):
    """The first of some names, and how many others there are."""
    return f"{names[0]} (and {len(names) - 1} more: {listed(names[1:])})" if len(names) > 1 else names[0]


def counted(what, names):
    """A note in a list: what there is, how often, and where first; no note for no name."""
    return [f"{what}: {len(names)} ({listed(names)})"] if names else []


class Source:
    """A source of tar.data. Loader processes share its arrays; lists would be copied in each.

    The rows from offsets[i] to offsets[i + 1] of `boxes` float32 [N, 4], `labels` int64 [N] and `ignored` bool [N] are
    image i's. `kept` and `rows` are the numbers of the given images and boxes that are in use.
    UserError if an image has no file, or if most boxes cannot be meant as pixels.

    Args:
        files, sizes: of the images, (width, height) each; None or 0 for a side that is not known.
        boxes: float [N, 7]: number of the image; x0, y0, x1, y1, NaN for what is no box; label; ignored.
        list_file: what lists the images, for messages. notes: sentences that stand before the source's own.
        keep_empty: keep images without a box that is not ignored. limit: first images only; 0 for all.
        trust: where all sizes are given, the headers of a sample of images are read, of all only if one disagrees.
    """

    def __init__(
        self, classes, files, sizes, boxes, list_file, keep_empty=True, limit=0, exif="auto", notes=(), trust=True
    ):
        self.classes, self.list_file, self.exif, self.notes = tuple(classes), list_file, exif, list(notes)
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 7)
        image, corners, ignored = boxes[:, 0].astype(np.int64), boxes[:, 1:5], boxes[:, 6] > 0
        finite = np.isfinite(boxes).all(1)

        def wanted(rows):
            return (np.bincount(image[rows & ~ignored], minlength=len(files)) > 0) | keep_empty

        used = np.flatnonzero(wanted(finite & _have_area(corners)))[: limit or None]
        given, sizes = [sizes[i] for i in used], np.full((len(files), 2), UNKNOWN)
        sizes[used] = self._sizes([files[i] for i in used], given, trust)
        ends, here = np.tile(sizes, 2)[image], np.isin(image, used)
        tiny = (abs(corners) <= 1).all(1) | (corners[:, 2:] - corners[:, :2] < 1).all(1)
        beyond = ((corners < -1) | (corners > ends + 1)).any(1)
        for rows, what in (
            (finite & _have_area(corners) & tiny, "smaller than a pixel (fractions of the image's size?)"),
            (finite & beyond, "beyond the image by over a pixel (corners as width and height? images resized later?)"),
        ):
            doubtful = [files[i] for i in image[rows & here]]
            if 2 * len(doubtful) > np.count_nonzero(here):
                raise UserError(f"{list_file}: most boxes are {what}, first in {doubtful[0]}")
            self.notes += counted(f"boxes {what}", doubtful)

        corners = corners.clip(0, ends)
        sound = finite & _have_area(corners)
        counts = here | (limit == 0)  # an image left out for its boxes of no area is named too
        dropped = [files[i] for i in np.unique(image[~sound & counts])]
        self.notes += counted("images with boxes of no area or outside, which are dropped", dropped)
        self.kept = used[wanted(sound)[used]]
        rows = np.flatnonzero(sound & np.isin(image, self.kept))
        self.rows = rows = rows[np.argsort(image[rows], kind="stable")]
        self.offsets = np.searchsorted(image[rows], [*self.kept, len(files)])
        self.boxes, self.ignored = corners[rows].astype(np.float32), ignored[rows]
        self.labels = boxes[rows, 5].astype(np.int64)
        self.sizes, self.files = sizes[self.kept], np.array([files[i] for i in self.kept], dtype=str)
        self.wide = (self.sizes[:, 0] > self.sizes[:, 1]).tolist()
        if missing := [file for file in self.files if not os.path.isfile(file)]:
            raise UserError(f"{with_others(missing)}: no such image, but {list_file} lists it")
        used = np.unique(self.labels[~self.ignored])
        unused = [name for label, name in enumerate(self.classes, 1) if label not in used]
        self.notes += [f"classes without a box: {listed(unused, 10)}"] if unused else []

    def _sizes(self, files, given, trust):
        """The sizes int64 [N, 2] of images as read_image gives them; notes what the headers say."""
        sizes = np.array(given, dtype=np.float64).reshape(-1, 2)
        sizes = np.nan_to_num(sizes, posinf=0).round().clip(0, UNKNOWN).astype(np.int64)
        sizes[(sizes == 0).any(1)] = 0
        sampled = trust and len(files) > SAMPLE and bool(sizes.all())
        looked = np.linspace(0, len(files) - 1, SAMPLE).astype(int) if sampled else np.arange(len(files))
        with ThreadPoolExecutor(8) as threads:
            headers = threads.map(read_header, [files[i] for i in looked], sizes[looked].tolist(), repeat(self.exif))
            headers = {i: header for i, header in zip(looked, headers, strict=True) if header}
        others = [files[i] for i, (size, *_) in headers.items() if sizes[i].all() and (sizes[i] != size).any()]
        if others and sampled:
            return self._sizes(files, given, trust=False)
        for i, (size, *_) in headers.items():
            sizes[i] = size
        self.notes += counted("images of another size than their annotations say; the images count", others)
        rotated = [files[i] for i, (_, orientation, *_) in headers.items() if orientation > 1]
        upright = sum(used > 1 for _, _, used, _ in headers.values())
        way = f"{upright} are turned upright, {len(rotated) - upright} stay as stored (--exif)"
        of = f" among {SAMPLE} looked at" * sampled
        self.notes += counted(f"images that EXIF rotates{of}, {way}", rotated)
        deep = [files[i] for i, (*_, mode) in headers.items() if mode[0] == "I"]
        brightest = []
        for file in deep[:: len(deep) // DEEP_SAMPLE + 1]:
            with suppress(UserError):  # which is said when the image is loaded
                brightest.append(int(read_image(file).max()))
        if brightest and median(brightest) < DARK:
            self.notes += counted("16-bit images are nearly black, their values end far below 65535", deep)
        sizes[sizes == 0] = UNKNOWN
        return sizes

    def __len__(self):
        return len(self.files)

    def name(self, epoch, index):
        """The path of an image's file."""
        return str(self.files[index])

    def boxes_of(self, index):
        """The boxes, labels and ignored flags of an image, numpy arrays."""
        rows = slice(*self.offsets[index : index + 2])
        return self.boxes[rows], self.labels[rows], self.ignored[rows]

    def load(self, epoch, index):
        """Image, boxes, labels and ignored, see tar.data."""
        image = read_image(self.files[index], self.sizes[index].tolist(), self.exif)
        boxes, labels, ignored = self.boxes_of(index)
        size = image.shape[:0:-1]
        if size != tuple(self.sizes[index]):
            boxes = boxes.clip(0, np.tile(size, 2)).astype(np.float32)
            inside = _have_area(boxes)
            boxes, labels, ignored = boxes[inside], labels[inside], ignored[inside]
        return image, *map(torch.from_numpy, (boxes, labels, ignored))


def _have_area(boxes):
    return (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1)
