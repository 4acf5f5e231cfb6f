"""The data set of drawn shapes: drawn from a seed, the same pixels on every machine, no files.

Eight classes in any rotation and colour, on textured backgrounds, at sizes from a sixth to over half of the image, with
overlap, clutter, transparency and noise. Training images are new in every epoch. So a large detector does not over-fit,
and the teacher is better than the student, as in the paper.

Drawing uses integers and the four operations of IEEE floats only (no libm, no normal deviates), hence bit-equal pixels.
"""

from functools import lru_cache

import numpy as np
import torch

CLASSES = ("circle", "ring", "semicircle", "triangle", "square", "rectangle", "pentagram", "cross")
SIDE = 96  # pixels
RADII = (8.0, 28.0)  # pixels: half the largest extent of a shape
MAX_OBJECTS = 8
MIN_VISIBLE = 0.4  # share of a shape's pixels; one hidden further than that is not annotated
CONTRAST = 90  # least difference of a shape's colour from its background, in grey levels, in one channel

# Outward normals of regular polygons, rounded so that no machine's cosine matters.
_NORMALS = {
    n: np.stack([np.cos(2 * np.pi * np.arange(n) / n), np.sin(2 * np.pi * np.arange(n) / n)]).round(9) for n in (3, 5)
}


def _half_planes(u, v, sides):
    """Distances of the points (u, v) from the centre along the normals of a regular polygon: [sides, H, W]."""
    normals = _NORMALS[sides]
    return normals[0][:, None, None] * u + normals[1][:, None, None] * v


def inside(name, u, v):
    """Which points belong to a shape.

    Args:
        name: one of CLASSES.
        u, v: float arrays of one shape; coordinates in which the shape fits the unit disc.

    Returns:
        bool array of the same shape.
    """
    square_radius = u * u + v * v
    disc = square_radius <= 1
    if name == "circle":
        return disc
    if name == "ring":
        return disc & (square_radius >= 0.25)
    if name == "semicircle":
        return (u * u + (v + 0.4) * (v + 0.4) <= 0.81) & (v >= -0.4)
    if name == "triangle":
        return _half_planes(u, v, 3).max(0) <= 0.5
    if name == "square":
        return np.maximum(abs(u), abs(v)) <= 0.72
    if name == "rectangle":
        return (abs(u) <= 0.88) & (abs(v) <= 0.5)
    if name == "pentagram":  # outside at most one of the five lines through its points
        return ((_half_planes(u, v, 5) > 0.33).sum(0) <= 1) & disc
    if name == "cross":
        return (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 0.92)
    raise ValueError(f"no shape is called {name!r}")


def _upsample(grid, side):
    """Bilinear enlargement of an int array [g, g, 3] to [side, side, 3] in integers (weights of 1/256)."""
    cells = grid.shape[0] - 1
    position = np.arange(side) * cells * 256 // side
    low, weight = position // 256, position % 256
    rows = grid[low] * (256 - weight)[:, None, None] + grid[low + 1] * weight[:, None, None]
    columns = rows[:, low] * (256 - weight)[None, :, None] + rows[:, low + 1] * weight[None, :, None]
    return columns // 65536


def draw(rng, side=SIDE):
    """One image and its boxes.

    Args:
        rng: numpy Generator; decides everything.
        side: pixels of the square image.

    Returns:
        image uint8 [side, side, 3]; boxes float32 [N, 4] xyxy in pixels, the whole shape's extent inside the
        image, 0 <= N <= MAX_OBJECTS; labels int64 [N], 1 .. len(CLASSES).
    """
    base = rng.integers(40, 216, 3)
    image = base + _upsample(rng.integers(-40, 41, (5, 5, 3)), side)
    image += _upsample(rng.integers(-30, 31, (33, 33, 1)).repeat(3, 2), side)
    owner = np.full((side, side), -1)
    scale = side / SIDE
    shapes = []
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    for number in range(count + int(rng.integers(0, 4))):  # the shapes, then clutter over them
        clutter = number >= count
        ratio = rng.random()
        radius = scale * (RADII[0] * (1 - ratio * ratio) + RADII[1] * ratio * ratio)
        if clutter:
            radius *= 0.6
        centre_x, centre_y = rng.random(2) * (side - radius) + radius / 2
        x0, x1 = max(int(centre_x - radius), 0), min(int(centre_x + radius) + 2, side)
        y0, y1 = max(int(centre_y - radius), 0), min(int(centre_y + radius) + 2, side)
        x = (np.arange(x0, x1) + 0.5 - centre_x)[None, :] / radius
        y = (np.arange(y0, y1) + 0.5 - centre_y)[:, None] / radius
        t = rng.random() * 2 - 1  # a rotation from the rational points of the circle, then a random quadrant
        cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        for _ in range(int(rng.integers(0, 4))):
            cosine, sine = -sine, cosine
        u, v = cosine * x + sine * y, cosine * y - sine * x
        label = int(rng.integers(len(CLASSES)))
        stroke = (abs(v) <= 0.12) & (abs(u) <= 1)  # clutter: an edge like a shape's, but no shape
        mask = stroke if clutter else inside(CLASSES[label], u, v)
        window = image[y0:y1, x0:x1]
        near = window.reshape(-1, 3).mean(0).astype(np.int64)
        colour = rng.integers(0, 256, 3)
        while abs(colour - near).max() < CONTRAST:
            colour = rng.integers(0, 256, 3)
        fill = np.broadcast_to(colour, window.shape).copy()
        texture = int(rng.integers(0, 4))
        if texture == 1:  # stripes
            fill[((u * 4 + 100) % 1 < 0.5)] += int(rng.integers(-60, 61))
        elif texture == 2:  # grain
            fill += rng.integers(-50, 51, (*mask.shape, 1))
        elif texture == 3:  # see-through
            fill = (fill + window) // 2
        window[mask] = fill[mask]
        owner[y0:y1, x0:x1][mask] = number
        if not clutter and mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (x0 + columns[0], y0 + rows[0], x0 + columns[-1] + 1, y0 + rows[-1] + 1)
            shapes.append((number, int(mask.sum()), box, label + 1))
    image += rng.integers(-10, 11, image.shape)
    kept = [s for s in shapes if (owner == s[0]).sum() >= MIN_VISIBLE * s[1]]
    boxes = np.array([s[2] for s in kept], dtype=np.float32).reshape(-1, 4)
    labels = np.array([s[3] for s in kept], dtype=np.int64)
    return image.clip(0, 255).astype(np.uint8), boxes, labels


@lru_cache(maxsize=10_000)  # 300 MB; the runs of a table see the same images
def _drawn(key):
    return draw(np.random.default_rng(key))


class Shapes:
    """The data set of drawn shapes.

    Args:
        split: "train" images are drawn anew for every (seed, epoch, index); image i of "test" is always the same, and
            so is image i of "val", which is there to tune on.
        length: images an epoch.
        seed: of the training images.
    """

    classes = CLASSES

    def __init__(self, split, length, seed=0):
        self.split, self.length, self.seed = split, length, seed

    def __len__(self):
        return self.length

    def name(self, epoch, index):
        """An image in words."""
        return f"shapes image {index} of epoch {epoch}, seed {self.seed}"

    def load(self, epoch, index):
        """Image uint8 [3, SIDE, SIDE], boxes float [N, 4] in pixels, labels int64 [N], ignored bool [N]."""
        key = (1, self.seed, epoch, index) if self.split == "train" else ({"test": 2, "val": 3}[self.split], index)
        image, boxes, labels = map(torch.from_numpy, _drawn(key))
        return image.permute(2, 0, 1), boxes, labels, torch.zeros_like(labels, dtype=torch.bool)
