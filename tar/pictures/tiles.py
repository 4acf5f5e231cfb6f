"""Tiles, and sheets of tiles. A tile is an image with boxes or a heat map on it, lines of text, or bars."""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as v2

SMALL, WIDE, GAP, LINE = 232, 480, 8, 18  # pixels: longer side of a tile, space between tiles, height of a line


def class_colour(label):
    """The colour of a class, the same in every picture: red, green, blue in 0..255; label from 1."""
    hue = (0.61 + 0.381966 * (int(label) - 1)) % 1  # the golden ratio: neighbours differ
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.38, 0.9))


def write(draw, place, text, colour="black", size=13):
    draw.text(place, text, fill=colour, font=ImageFont.load_default(size))


class Tile:
    """An image with a title above it. Boxes are xyxy in pixels of the image.

    Args:
        image: uint8 [3, H, W].
        side: pixels of the tile's longer side.
    """

    def __init__(self, image, title, side=SMALL):
        self.scale = side / max(image.shape[1:])
        size = [max(round(self.scale * n), 1) for n in (image.shape[2], image.shape[1])]
        self.picture = v2.to_pil_image(image).resize(size, Image.Resampling.BICUBIC)
        self.title, self.side = title, side

    def box(self, box, colour, text="", width=2):
        """Draws a box, with a text in its upper left corner. Returns the tile."""
        draw = ImageDraw.Draw(self.picture)
        x0, y0, x1, y1 = (float(v) * self.scale for v in box)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=width)
        if text:
            wide = draw.textlength(text, font=ImageFont.load_default(12)) + 4
            x, y = max(min(x0, self.picture.width - wide), 0), max(y0 - LINE, 0)
            draw.rectangle((x, y, x + wide, y + LINE), fill=colour)
            write(draw, (x + 2, y + 1), text, "white", 12)
        return self

    def objects(self, boxes, labels, classes, scores=None):
        """Draws boxes with their class names and scores, the best on top. Returns the tile."""
        for i in range(len(boxes)) if scores is None else scores.argsort().tolist():
            name = classes[int(labels[i]) - 1] + (f" {float(scores[i]):.2f}" if scores is not None else "")
            self.box(boxes[i], class_colour(labels[i]), name)
        return self

    def heat(self, values, cell, highest=None):
        """Lays a map over the image, from dark (0) to bright yellow (`highest`). Returns the tile.

        Args:
            values: float [h, w].
            cell: width and height of a cell in pixels of the image; the last cells may reach over its border.
            highest: default: the largest value.
        """
        share = (values / (highest or float(values.max()) or 1.0)).clamp(0, 1).numpy()
        columns, rows = (
            ((np.arange(n) + 0.5) / self.scale // side).astype(int).clip(max=count - 1)
            for n, side, count in zip(self.picture.size, cell, share.shape[::-1], strict=True)
        )
        share = share[rows][:, columns][..., None]
        hot = np.array([255, 225, 60]) * share + np.array([40, 0, 90]) * (1 - share)
        mixed = 0.35 * np.asarray(self.picture.convert("L").convert("RGB")) + 0.65 * hot
        self.picture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
        return self


class Table:
    """A tile with lines of text in columns. lines: list of (cells, colour)."""

    def __init__(self, lines, title, side=WIDE, column=92):
        self.title, self.side = title, side
        self.picture = Image.new("RGB", (side, LINE * len(lines)), "white")
        draw = ImageDraw.Draw(self.picture)
        for row, (cells, colour) in enumerate(lines):
            for i, text in enumerate(cells):
                write(draw, (2 + column * i, LINE * row), text, colour)


class Bars:
    """A tile with groups of bars. groups: list of (name, lengths in 0..1); key: {name of each length: colour}."""

    def __init__(self, groups, key, title, side=SMALL):
        self.title, self.side = title, side
        high, left = 2 * LINE, 84
        self.picture = Image.new("RGB", (side, high * len(groups) + LINE), "white")
        draw, wide = ImageDraw.Draw(self.picture), side - left - 44
        for row, (name, lengths) in enumerate(groups):
            write(draw, (2, high * row + 6), name, size=12)
            for i, (length, colour) in enumerate(zip(lengths, key.values(), strict=True)):
                y = high * row + i * (LINE - 3)
                draw.rectangle((left, y + 3, left + wide * length, y + LINE - 3), fill=colour)
                write(draw, (left + wide * length + 4, y + 1), f"{length:.2f}", size=11)
        for i, (name, colour) in enumerate(key.items()):
            write(draw, (left + 70 * i, high * len(groups)), name, colour, size=12)


def sheet(rows, title):
    """Rows of tiles as one picture of PIL in 256 colours, with a title above them."""
    heights = [LINE + max(tile.picture.height for tile in row) + 2 * GAP for row in rows]
    width = max(sum(tile.side + GAP for tile in row) for row in rows) + GAP
    page = Image.new("RGB", (width, LINE + 2 * GAP + sum(heights)), "white")
    draw, y = ImageDraw.Draw(page), LINE + 2 * GAP
    write(draw, (GAP, GAP), title, size=15)
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for tile in row:
            write(draw, (x, y), tile.title)
            page.paste(tile.picture, (x, y + LINE))
            x += tile.side + GAP
        y += height
    # an octree keeps small bright lines as they are
    return page.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
