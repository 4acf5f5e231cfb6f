"""The drawn data set: the same pixels each time, boxes that fit, no state outside."""

import hashlib
import random

import numpy as np
import pytest
import torch

from tar.data import shapes
from tar.data.datasets import SHAPES_IMAGES, load_dataset, load_test_set
from tar.data.shapes import CLASSES, SIDE, Shapes, draw, inside


def pixels(split, seed, epoch, index):
    return Shapes(split, 10, seed).load(epoch, index)[0]


def test_the_pixels_are_the_same_on_every_machine():
    """Figures in the README are of these images; whoever changes how they are drawn has to measure again."""
    digest = hashlib.sha256()
    for index in range(50):
        for part in Shapes("test", 50).load(0, index)[:3]:
            digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "c473f12d47470837d00d46edaddc37806ffed943572f3a754e2dcd274e0fee4d"


def test_an_image_has_the_form_of_a_source():
    image, boxes, labels, ignored = Shapes("train", 10).load(0, 3)
    assert image.shape == (3, SIDE, SIDE) and image.dtype == torch.uint8
    assert boxes.shape == (len(labels), 4) and boxes.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert ignored.tolist() == [False] * len(labels) and ignored.dtype == torch.bool


def test_load_dataset_gives_the_lengths_seeds_and_splits_asked_for():
    train, test = load_dataset("shapes", limit_train=7, limit_test=5, seed=3)
    assert (train.split, len(train), train.seed) == ("train", 7, 3)
    assert (test.split, len(test)) == ("test", 5)
    assert load_dataset("shapes", split="val")[1].split == load_test_set("shapes", (), split="val").split == "val"
    assert [len(s) for s in load_dataset("shapes")] == [SHAPES_IMAGES["train"], SHAPES_IMAGES["test"]]


def test_which_images_differ():
    train = [("train", *key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    images = [
        pixels(*key) for key in (*train, ("test", 0, 0, 0), ("test", 0, 0, 1), ("val", 0, 0, 0), ("val", 0, 0, 1))
    ]
    assert not any(torch.equal(images[i], images[j]) for i in range(8) for j in range(i))
    for number, split in ((4, "test"), (6, "val")):  # by index only
        assert torch.equal(pixels(split, 1, 0, 0), images[number]) and torch.equal(
            pixels(split, 0, 3, 0), images[number]
        )


def test_drawing_neither_uses_nor_changes_the_global_generators():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, first = states(), draw(np.random.default_rng(4))
    assert states() == before
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    assert all(map(np.array_equal, draw(np.random.default_rng(4)), first))


def test_boxes_are_tight(monkeypatch):
    """Each box has the extent of its shape's mask, and holds all the pixels that change where the shape is left out."""
    monkeypatch.setattr(shapes, "MIN_VISIBLE", 0)  # a box for every shape, in the order of drawing
    monkeypatch.setattr(shapes, "CONTRAST", 0)  # no colour is drawn again: what is left out does not shift the rest
    calls, left_out = [], None

    def recorded(name, u, v):
        mask = inside(name, u, v)
        calls.append((name, mask))
        return np.zeros_like(mask) if len(calls) - 1 == left_out else mask

    monkeypatch.setattr(shapes, "inside", recorded)
    seen, touched = set(), np.zeros(4, dtype=int)
    for seed in range(12):
        left_out = None
        calls.clear()
        image, boxes, labels = draw(np.random.default_rng(seed))
        drawn = list(calls)
        assert (boxes >= 0).all() and (boxes <= SIDE).all() and 0 < len(boxes) <= shapes.MAX_OBJECTS
        assert [CLASSES[label - 1] for label in labels] == [name for name, _ in drawn]
        for number, ((x0, y0, x1, y1), (name, mask)) in enumerate(zip(boxes.astype(int), drawn, strict=True)):
            rows = [i for i, row in enumerate(mask.tolist()) if any(row)]
            columns = [j for j, column in enumerate(mask.T.tolist()) if any(column)]
            assert (x1 - x0, y1 - y0) == (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
            left_out = number
            calls.clear()
            without, _, _ = draw(np.random.default_rng(seed))
            y, x = np.nonzero((image != without).any(2))
            if len(x):
                assert x.min() >= x0 and x.max() < x1 and y.min() >= y0 and y.max() < y1
                touched += [x.min() == x0, y.min() == y0, x.max() == x1 - 1, y.max() == y1 - 1]
            seen.add(name)
    assert seen == set(CLASSES)
    assert (touched > 10).all()  # so a box beside its shape would not have held it


@pytest.mark.parametrize("name", CLASSES)
def test_a_shape_fits_the_disc_that_it_is_drawn_in(name):
    """A 50th, half a pixel at the largest radius, may stick out; more than that is cut off by the window."""
    u, v = np.meshgrid(*[np.arange(-300, 301) / 200] * 2)  # to 1.5 radii
    radius = np.sqrt(u * u + v * v)[inside(name, u, v)]
    assert len(radius) > 0 and radius.max() <= 1.02
