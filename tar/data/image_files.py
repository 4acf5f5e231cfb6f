"""Reading image files: pixels as the detectors take them, and what is unusual about a file."""

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as v2

from tar import UserError, one_line

MAX_ASPECT = 50  # longer side over shorter; the detector's resize would leave nothing of a longer strip
DEEP = ("I", "F")  # first letters of PIL's modes of more than 8 bits
ORIENTATION = 0x0112  # EXIF's tag
ROTATED = range(5, 9)  # its values that change width for height


def read_image(file, size=None):
    """An image file as uint8 [3, H, W], whatever its own mode.

    Grey images get three equal channels, an alpha channel is left out, 16 bits become 8. The pixels stay as they are
    stored, unless EXIF says the image is rotated and the annotations agree.

    Args:
        file: path.
        size: (width, height) that the annotations give.

    Raises:
        UserError: the file cannot be read as an image, or is a strip; names it.
    """
    try:
        with Image.open(file) as image:
            if size and image.size != tuple(size) == image.size[::-1] and image.getexif().get(ORIENTATION) in ROTATED:
                image = ImageOps.exif_transpose(image)
            width, height = image.size
            if max(width, height) <= MAX_ASPECT * min(width, height):
                return v2.pil_to_tensor(in_eight_bits(image).convert("RGB"))
    except Exception as error:  # decoders raise many kinds for a broken file, a bomb has one of its own
        raise UserError(
            f"{file}: cannot be read as an image ({one_line(error)}); replace it or take it off the list"
        ) from None
    raise UserError(f"{file}: a strip of {width} x {height} pixels; take it off the list")


def in_eight_bits(image):
    """An image of PIL whose values lie in 0..255: those of 16 bits are divided, others left as they are."""
    if image.mode[0] not in DEEP:
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values of {values.min()} to {values.max()}, whose range is unknown")
    if image.mode != "I" or values.max() > 255:
        values = values // 257
    return Image.fromarray(values.astype(np.uint8))


def oddities(file, size=None):
    """What is unusual about an image file, in words; [] for a plain one of three channels of 8 bits."""
    with Image.open(file) as image:
        words = {"L": "grey", "1": "one bit", "P": "palette", "CMYK": "CMYK", "RGBA": "alpha", "LA": "alpha"}
        found = [] if image.mode == "RGB" else [words.get(image.mode, f"mode {image.mode}")]
        if image.getexif().get(ORIENTATION, 1) != 1:
            found.append("EXIF orientation")
        if size and tuple(size) not in (image.size, image.size[::-1]):
            found.append("size other than its annotation says")
        elif size and image.size != tuple(size) and image.getexif().get(ORIENTATION) not in ROTATED:
            found.append("width and height exchanged in its annotation")
        if min(image.size) < 32:
            found.append("under 32 pixels")
        if image.size[0] * image.size[1] > 25e6:
            found.append("over 25 megapixels")
        return found
