"""The drawn data set: the same pixels each time, boxes that fit, no state outside."""

import hashlib
import random
from functools import partial

import numpy as np
import torch

from tar.data import shapes
from tar.data.datasets import SHAPES_IMAGES, load_dataset, load_test_set
from tar.data.shapes import CLASSES, INSIDE, SIDE, Shapes, draw

DTYPES = [torch.uint8, torch.float32, torch.int64, torch.bool]


def test_the_pixels_are_the_same_on_every_machine():
    """Figures in the README are of these images; whoever changes how they are drawn has to measure again."""
    digest = hashlib.sha256()
    for index in range(50):
        for part in Shapes("test", 50).load(0, index)[:3]:
            digest.update(part.contiguous().numpy().tobytes())
        image, boxes, labels, ignored = Shapes("train", 10).load(0, index)
        assert image.shape == (3, SIDE, SIDE) and boxes.shape == (len(labels), 4) and not ignored.any()
        assert [part.dtype for part in (image, boxes, labels, ignored)] == DTYPES
    assert digest.hexdigest() == "c473f12d47470837d00d46edaddc37806ffed943572f3a754e2dcd274e0fee4d"


def test_load_dataset_gives_the_lengths_seeds_and_splits_asked_for():
    train, test = load_dataset("shapes", limit_train=7, limit_test=5, seed=3)
    assert (train.split, len(train), train.seed, test.split, len(test)) == ("train", 7, 3, "test", 5)
    assert load_dataset("shapes", split="val")[1].split == load_test_set("shapes", (), split="val").split == "val"
    assert [len(s) for s in load_dataset("shapes")] == [SHAPES_IMAGES["train"], SHAPES_IMAGES["test"]]


def test_which_images_differ():
    train, fixed = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)), ((0, 0, 0), (0, 0, 1))
    keys = [*(("train", *key) for key in train), *((split, *key) for split in ("test", "val") for key in fixed)]
    images = [Shapes(split, 10, seed).load(epoch, index)[0] for split, seed, epoch, index in keys]
    assert not any(torch.equal(images[i], images[j]) for i in range(8) for j in range(i))
    for number, split in ((4, "test"), (6, "val")):  # by index only
        assert torch.equal(Shapes(split, 10, seed=1).load(3, 0)[0], images[number])


def test_drawing_neither_uses_nor_changes_the_global_generators():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    draw.__wrapped__(4)  # not kept from another test
    assert states() == before


def test_boxes_are_tight(monkeypatch):
    """Each box has the extent of its shape's mask, and holds all the pixels that change where the shape is left out."""
    monkeypatch.setattr(shapes, "MIN_VISIBLE", 0)  # a box for every shape, in the order of drawing
    monkeypatch.setattr(shapes, "CONTRAST", 0)  # no colour is drawn again: what is left out does not shift the rest
    calls, left_out = [], None

    def recorded(name, inside, u, v):
        calls.append((name, inside(u, v)))
        return calls[-1][1] & (len(calls) - 1 != left_out)

    monkeypatch.setattr(shapes, "INSIDE", {name: partial(recorded, name, inside) for name, inside in INSIDE.items()})
    seen, touched = set(), np.zeros(4, dtype=int)
    for seed in range(12):
        left_out = None
        calls.clear()
        image, boxes, labels = draw.__wrapped__(seed)
        drawn = list(calls)
        assert (boxes >= 0).all() and (boxes <= SIDE).all() and 0 < len(boxes) <= shapes.MAX_OBJECTS
        assert [CLASSES[label - 1] for label in labels] == [name for name, _ in drawn]
        for number, ((x0, y0, x1, y1), (name, mask)) in enumerate(zip(boxes.astype(int), drawn, strict=True)):
            y, x = np.nonzero(mask)
            assert (x1 - x0, y1 - y0) == (np.ptp(x) + 1, np.ptp(y) + 1)
            left_out = number
            calls.clear()
            y, x = np.nonzero((image != draw.__wrapped__(seed)[0]).any(2))
            if len(x):
                assert x.min() >= x0 and x.max() < x1 and y.min() >= y0 and y.max() < y1
                touched += [x.min() == x0, y.min() == y0, x.max() == x1 - 1, y.max() == y1 - 1]
            seen.add(name)
    assert seen == set(CLASSES)
    assert (touched > 10).all()  # so a box beside its shape would not have held it
