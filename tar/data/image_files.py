"""Image files: finding them, what their headers say, and their pixels as the detectors take them."""

import os
import warnings
from functools import cache

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from tar import UserError, one_line

EXIF = ("auto", "upright", "stored")
MAX_ASPECT = 50  # longer side over shorter; the detector's resize would leave nothing of a longer strip
ORIENTATION = 0x0112  # EXIF's tag; from 5 on it changes width for height

warnings.filterwarnings("ignore", "Corrupt EXIF data")  # which is no orientation then


def read_image(file, size=None, exif="auto"):
    """An image file of any mode as uint8 [3, H, W]: grey in three equal channels, no alpha, 16 bits become 8.

    exif: "upright" turns it as EXIF's orientation says, "stored" does not. "auto" turns it unless the (width, height)
    of its annotation fits the stored pixels only. UserError if it cannot be read as an image or is a strip.
    """
    try:
        with Image.open(file) as image:
            orientation = orientations(image, size, exif)[1]
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"a strip of {image.width} x {image.height} pixels")
            pixels = v2.pil_to_tensor(_in_eight_bits(image).convert("RGB"))
    except Exception as error:  # decoders raise many kinds for a broken file, a bomb has one of its own
        reason = f"cannot be read as an image ({one_line(error)}); replace it or take it off the list"
        raise UserError(f"{file}: {reason}") from None
    return turn(pixels, torch.zeros(0, 4), orientation)[0]


def read_header(file, size=None, exif="auto"):
    """(width, height) of what read_image gives, `orientations`, PIL's mode; None for a file that it cannot read."""
    try:
        with Image.open(file) as image:
            given, used = orientations(image, size, exif)
            return image.size[:: -1 if used >= 5 else 1], given, used, image.mode
    except Exception:
        return None


def orientations(image, size, exif):
    """EXIF's orientation of an image of PIL, 1 to 8, and the one by which read_image turns it; 1: as it is stored."""
    try:
        given = image.getexif().get(ORIENTATION)
    except Exception:  # rubbish
        given = 1
    if image.format == "TIFF" or given not in range(1, 9):  # PIL itself turns a TIFF
        given = 1
    as_stored = size and image.size == tuple(size) and image.width != image.height and given >= 5
    return given, 1 if exif == "stored" or (exif == "auto" and as_stored) else given


def turn(image, boxes, orientation):
    """A stored image [3, H, W] as EXIF's orientation shows it, and its boxes float [N, 4] xyxy in pixels."""
    if orientation >= 5:
        image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
    x0, y0, x1, y1 = boxes.unbind(1)
    if orientation in (2, 3, 6, 7):
        image, x0, x1 = image.flip(2), image.shape[2] - x1, image.shape[2] - x0
    if orientation in (3, 4, 7, 8):
        image, y0, y1 = image.flip(1), image.shape[1] - y1, image.shape[1] - y0
    return image, torch.stack([x0, y0, x1, y1], 1)


def _in_eight_bits(image):
    """An image of PIL with values in 0..255: those of 16 bits are divided, others left as they are."""
    if image.mode[0] not in "IF":  # more than 8 bits
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values of {values.min()} to {values.max()}, whose range is unknown")
    if image.mode != "I" or values.max() > 255:
        values = values // 257
    return Image.fromarray(values.astype(np.uint8))


@cache
def suffixes():
    """The suffixes of the image files that can be decoded, in small letters."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def files_in(folder):
    """The paths of all files in a folder and its subfolders, linked ones too. UserError if a folder cannot be read."""

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    seen = set()  # a link may lead back
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders.sort()
        yield from (os.path.join(place, name) for name in names)
