"""Sheets of tiles. A tile is a title and a picture of PIL: an image with boxes or a heat map on it, or a table."""

import colorsys

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import draw_bounding_boxes

SMALL, WIDE, GAP, LINE = 232, 480, 8, 18  # pixels: longer side of a tile, space between tiles, height of a line
FONT = ImageFont.load_default(13)
DARK, BRIGHT = (torch.tensor(colour).view(3, 1, 1) for colour in ((40, 0, 90), (255, 225, 60)))


def class_colour(label):
    """The colour of a class, the same in every picture: red, green, blue in 0..255; label from 1."""
    hue = (0.61 + 0.381966 * (int(label) - 1)) % 1  # the golden ratio: neighbours differ
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.38, 0.9))


def with_boxes(image, boxes=(), colours=(), names=None, side=SMALL):
    """An image uint8 [3, H, W] at `side` pixels of its longer side, with boxes [N, 4] xyxy in pixels of the image."""
    scale = side / max(image.shape[1:])
    image = v2.resize(image, [max(round(scale * n), 1) for n in image.shape[1:]])
    if len(boxes):
        text = {"fill_labels": True, "label_colors": "white"}
        image = draw_bounding_boxes(image, boxes * scale, names, colours, width=2, **text)
    return v2.to_pil_image(image)


def with_objects(image, found, classes, side=SMALL):
    """The same with the classes of boxes, and their scores if any; the first box lies on top. found: a dict of them."""
    found = {key: value.flip(0) for key, value in found.items()}
    names = [classes[label - 1] for label in found["labels"]]
    if "scores" in found:
        names = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"], strict=True)]
    return with_boxes(image, found["boxes"], [*map(class_colour, found["labels"])], names, side)


def with_heat(image, values, stride, highest):
    """The same with values [h, w] on it, dark where 0, bright where `highest`; stride: of their cells, in pixels."""
    cells = (values / highest).clamp(0, 1).repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    share = cells[: image.shape[1], : image.shape[2]]  # without the padding
    mixed = 0.35 * v2.rgb_to_grayscale(image, 3) + 0.65 * (BRIGHT * share + DARK * (1 - share))
    return with_boxes(mixed.to(torch.uint8))


def table(lines, column=92):
    """Lines of cells as a picture. A cell is (a text, or a number in 0..1 for a bar with the number; its colour)."""
    picture = Image.new("RGB", (column * len(lines[0]), LINE * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for row, cells in enumerate(lines):
        for i, (value, colour) in enumerate(cells):
            x, y = column * i, LINE * row
            if isinstance(value, float):
                draw.rectangle((x, y + 3, x + value * (column - 44), y + LINE - 4), fill=colour)
                x, value = x + value * (column - 44) + 4, f"{value:.2f}"
            draw.text((x, y), value, colour, FONT)
    return picture


def sheet(rows, title):
    """Rows of (title, picture) as one picture of PIL in 256 colours, with a title above them."""
    places, right, y = [], 0, LINE + 2 * GAP
    for row in rows:
        x = GAP
        for text, picture in row:
            places.append((x, y, text, picture))
            x += max(SMALL, picture.width, round(FONT.getlength(text))) + GAP
        right, y = max(right, x), y + LINE + max(picture.height for _, picture in row) + 2 * GAP
    page = Image.new("RGB", (right, y), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), title, "black", FONT)
    for x, y, text, picture in places:
        draw.text((x, y), text, "black", FONT)
        page.paste(picture, (x, y + LINE))
    return page.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
