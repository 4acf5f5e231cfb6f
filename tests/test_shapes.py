"""The drawn data set: same pixels each time, boxes that fit, no state outside."""

import hashlib
import random

import numpy as np
import pytest
import torch

from tar import shapes
from tar.shapes import CLASSES, SIDE, Shapes, draw, inside


def load(source, epoch=0, index=0):
    image, boxes, labels, _ = source.load(epoch, index)
    return image.tolist(), boxes.tolist(), labels.tolist()


def test_an_image_has_the_form_of_a_source():
    image, boxes, labels, ignored = Shapes("train", 10).load(0, 3)
    assert image.shape == (3, SIDE, SIDE) and image.dtype == torch.uint8
    assert boxes.shape == (len(labels), 4) and boxes.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert ignored.tolist() == [False] * len(labels)
    assert len(Shapes("train", 10)) == 10


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_two_sources_draw_the_same(split):
    one, two = Shapes(split, 10, seed=5), Shapes(split, 10, seed=5)
    for index in range(3):
        assert load(one, 2, index) == load(two, 2, index)


def test_training_images_differ_by_epoch_index_and_seed():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    images = [load(Shapes("train", 10, seed), epoch, index)[0] for seed, epoch, index in keys]
    assert all(images[i] != images[j] for i in range(4) for j in range(i))


def test_test_images_differ_by_index_only():
    first = load(Shapes("test", 10, seed=0), 0, 0)
    assert load(Shapes("test", 10, seed=1), 3, 0) == first
    assert load(Shapes("test", 10, seed=0), 0, 1)[0] != first[0]


def test_no_image_is_in_two_splits():
    fixed = [load(Shapes(split, 5), 0, index)[0] for split in ("test", "val") for index in range(5)]
    trained = [load(Shapes("train", 5, seed), 0, index)[0] for seed in range(3) for index in range(5)]
    assert not any(fixed[i] in fixed[:i] for i in range(10)) and not any(image in fixed for image in trained)


def test_drawing_leaves_the_global_generators_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = load(Shapes("train", 10))
    assert states() == before
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert load(Shapes("train", 10)) == first


def test_labels_and_boxes_are_in_range_and_every_class_appears():
    source, seen, counts = Shapes("test", 150), set(), set()
    for index in range(len(source)):
        _, boxes, labels, _ = source.load(0, index)
        assert (boxes >= 0).all() and (boxes <= SIDE).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert len(labels) <= shapes.MAX_OBJECTS
        seen.update(labels.tolist())
        counts.add(len(labels))
    assert seen == set(range(1, len(CLASSES) + 1))
    assert len(counts) > 4


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
    ticks = np.arange(-300, 301) / 200  # to 1.5 radii
    u, v = np.meshgrid(ticks, ticks)
    radius = np.sqrt(u * u + v * v)[inside(name, u, v)]
    assert len(radius) > 0
    assert radius.max() <= 1.02


def test_shapes_differ_from_each_other():
    ticks = np.arange(-20, 21) / 20
    u, v = np.meshgrid(ticks, ticks)
    assert len({inside(name, u, v).tobytes() for name in CLASSES}) == len(CLASSES)


def test_unknown_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="'heptagon'"):
        inside("heptagon", np.zeros(1), np.zeros(1))


def test_the_pixels_are_the_same_on_every_machine():
    """Figures in the README are of these images; whoever changes how they are drawn has to measure again."""
    digest = hashlib.sha256()
    for index in range(50):
        for part in Shapes("test", 50).load(0, index)[:3]:
            digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "c473f12d47470837d00d46edaddc37806ffed943572f3a754e2dcd274e0fee4d"
