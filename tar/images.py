"""Image files to pixels."""

from PIL import Image
from torchvision.transforms.v2 import functional as v2

from tar import UserError


def read_image(file):
    """An image file as uint8 [3, H, W], whatever its own mode; UserError names the file if it cannot be read."""
    try:
        with Image.open(file) as image:
            return v2.pil_to_tensor(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read as an image ({error}); replace it or take it off the list") from None
