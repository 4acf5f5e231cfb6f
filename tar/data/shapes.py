"""The data set of drawn shapes: drawn from a seed, the same pixels on every machine, no files.

Eight classes in any rotation and colour, on textured backgrounds, with overlap, clutter, transparency and noise.
Training images are new in every epoch, so that a large detector does not over-fit.
Drawing uses integers and the four operations of IEEE floats only (no libm, no normal deviates), hence bit-equal pixels.
"""

from functools import lru_cache

import numpy as np
import torch

SIDE = 96  # pixels
RADII = (8.0, 28.0)  # pixels: half the largest extent of a shape
MAX_OBJECTS = 8
MIN_VISIBLE = 0.4  # share of a shape's pixels; one hidden further than that is not annotated
CONTRAST = 90  # least difference of a shape's colour from its background, in grey levels, in one channel


def _half_planes(u, v, sides):
    """Distances of the points (u, v) from the centre along the normals of a regular polygon: [sides, H, W]."""
    angles = 2 * np.pi * np.arange(sides)[:, None, None] / sides
    return np.cos(angles).round(9) * u + np.sin(angles).round(9) * v  # rounded: no machine's cosine matters


INSIDE = {  # which of the points (u, v), float arrays, belong to a shape; all shapes fit the unit disc
    "circle": lambda u, v: u * u + v * v <= 1,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.25),
    "semicircle": lambda u, v: (u * u + (v + 0.4) * (v + 0.4) <= 0.81) & (v >= -0.4),
    "triangle": lambda u, v: _half_planes(u, v, 3).max(0) <= 0.5,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.72,
    "rectangle": lambda u, v: (abs(u) <= 0.88) & (abs(v) <= 0.5),
    # outside at most one of the five lines through its points
    "pentagram": lambda u, v: ((_half_planes(u, v, 5) > 0.33).sum(0) <= 1) & (u * u + v * v <= 1),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 0.92),
}
CLASSES = tuple(INSIDE)


def _upsample(grid):
    """Bilinear enlargement of an int array [g, g, 3] to [SIDE, SIDE, 3] in integers (weights of 1/256)."""
    low, weight = np.divmod(np.arange(SIDE) * (len(grid) - 1) * 256 // SIDE, 256)
    rows = grid[low] * (256 - weight)[:, None, None] + grid[low + 1] * weight[:, None, None]
    columns = rows[:, low] * (256 - weight)[None, :, None] + rows[:, low + 1] * weight[None, :, None]
    return columns // 65536


@lru_cache(maxsize=10_000)  # 300 MB; the runs of a table see the same images
def draw(key):
    """An image, uint8 [SIDE, SIDE, 3], its boxes, float32 [N, 4] xyxy in pixels, and labels, int64 [N], from seeds.

    A box is the whole shape's extent inside the image; 0 <= N <= MAX_OBJECTS.
    """
    rng = np.random.default_rng(key)
    image = rng.integers(40, 216, 3) + _upsample(rng.integers(-40, 41, (5, 5, 3)))
    image += _upsample(rng.integers(-30, 31, (33, 33, 1)).repeat(3, 2))
    owner, shapes = np.full((SIDE, SIDE), -1), []
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    for number in range(count + int(rng.integers(0, 4))):  # the shapes, then clutter over them
        clutter = number >= count
        ratio = rng.random()
        radius = (RADII[0] * (1 - ratio * ratio) + RADII[1] * ratio * ratio) * (0.6 if clutter else 1)
        centre_x, centre_y = rng.random(2) * (SIDE - radius) + radius / 2
        x0, x1 = max(int(centre_x - radius), 0), min(int(centre_x + radius) + 2, SIDE)
        y0, y1 = max(int(centre_y - radius), 0), min(int(centre_y + radius) + 2, SIDE)
        x = (np.arange(x0, x1) + 0.5 - centre_x)[None, :] / radius
        y = (np.arange(y0, y1) + 0.5 - centre_y)[:, None] / radius
        t = rng.random() * 2 - 1  # a rotation from the rational points of the circle, then a random quadrant
        cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        for _ in range(int(rng.integers(0, 4))):
            cosine, sine = -sine, cosine
        u, v = cosine * x + sine * y, cosine * y - sine * x
        label = int(rng.integers(len(CLASSES)))
        stroke = (abs(v) <= 0.12) & (abs(u) <= 1)  # an edge like a shape's, but no shape
        mask = stroke if clutter else INSIDE[CLASSES[label]](u, v)
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


class Shapes:
    """The source of drawn shapes, `length` images an epoch.

    Those of "train" are drawn anew for every (seed, epoch, index); those of "test" and "val" depend on the index only.
    """

    classes, wide, notes = CLASSES, None, ()

    def __init__(self, split, length, seed=0):
        self.split, self.length, self.seed = split, length, seed

    def __len__(self):
        return self.length

    def name(self, epoch, index):
        return f"shapes image {index} of epoch {epoch}, seed {self.seed}"

    def load(self, epoch, index):
        key = (1, self.seed, epoch, index) if self.split == "train" else ({"test": 2, "val": 3}[self.split], index)
        image, boxes, labels = map(torch.from_numpy, draw(key))
        return image.permute(2, 0, 1), boxes, labels, torch.zeros_like(labels, dtype=torch.bool)
