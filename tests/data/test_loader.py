"""Batches: their order on one and several processes, flips, loader processes."""

import multiprocessing
import subprocess
import sys
from itertools import product

import pytest
import torch
from beside import beside
from tiny_runs import ROOT, write_voc

from tar import UserError
from tar.data.check_data import check_data
from tar.data.datasets import load_dataset
from tar.data.loader import Samples, make_loader, test_batches, to_device, train_batches
from tar.data.shapes import Shapes
from tar.training.failure import in_one_line
from tar.training.process import Process

test_batches.__test__ = False  # a function of the loader, not a test


class Bright:
    """A black image with a bright rectangle off the centre, which is its box, and an ignored box."""

    classes = ("bright", "ignored")

    def __len__(self):
        return 4

    def load(self, epoch, index):
        image = torch.zeros(3, 20, 30, dtype=torch.uint8)
        image[:, 5:11, 3 + index : 14] = 200
        boxes = torch.tensor([[1.0, 1.0, 2.0, 2.0], [3.0 + index, 5.0, 14.0, 11.0]])
        return image, boxes, torch.tensor([2, 1]), torch.tensor([True, False])


def bright_box(image):
    rows, columns = image[0].any(1).nonzero(), image[0].any(0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_training_leaves_ignored_boxes_out_and_flips_half_of_the_images_with_their_boxes():
    samples, flipped = Samples(Bright(), train=True, seed=1), []
    for epoch, index in product(range(50), range(4)):
        image, target = samples[epoch, index]
        assert target["boxes"].tolist() == [bright_box(image)] and target["labels"].tolist() == [1]
        flipped.append(target["boxes"].tolist() == [[30 - 14, 5, 30 - 3 - index, 11]])
    assert 70 < sum(flipped) < 130 and flipped[:100] != flipped[100:]
    for index in range(4):  # a test image stays as it is
        image, target = Samples(Bright(), train=False)[0, index]
        assert target["boxes"].tolist() == [[1, 1, 2, 2], [3 + index, 5, 14, 11]]
        assert bright_box(image) == target["boxes"][1].tolist() and target["image_id"] == index
        assert target["labels"].tolist() == [2, 1] and target["ignored"].tolist() == [True, False]


WIDE = [i % 5 in (0, 2, 3) for i in range(28)]  # 17: four whole batches of four, and 2 of the 11 others


def global_batches(total, world, epoch=0, wide=WIDE, seed=3):
    """The indices of batch k of all processes together."""
    parts = [train_batches(len(wide), total // world, seed, epoch, rank, world, wide) for rank in range(world)]
    assert {e for part in parts for batch in part for e, _ in batch} == {epoch}
    return [[i for batch in batches for _, i in batch] for batches in zip(*parts, strict=True)]


def test_the_order_is_torchs_permutation_of_seed_and_epoch():
    batches = train_batches(27, 4, seed=5, epoch=2)
    order = torch.randperm(27, generator=torch.Generator().manual_seed(5 * 1_000_003 + 2)).tolist()
    assert batches == [[(2, i) for i in order[k : k + 4]] for k in range(0, 27, 4)]


@pytest.mark.parametrize("wide", [None, WIDE])
@pytest.mark.parametrize(("length", "world"), [(8, 2), (11, 2), (11, 3), (27, 4), (2, 4), (1, 4)])
def test_processes_have_as_many_batches_and_together_all_images(length, world, wide):
    parts = [train_batches(length, 2, 0, 0, rank, world, wide and wide[:length]) for rank in range(world)]
    sizes = [[len(batch) for batch in part] for part in parts]
    assert all(size == sizes[0] for size in sizes)
    keys = [key for part in parts for batch in part for key in batch]
    assert set(keys) == {(0, i) for i in range(length)}
    assert len(keys) == -(-length // world) * world  # no more is filled up than must be


@pytest.mark.parametrize(("wide", "counts"), [(WIDE, [0, 0, 4, 4, 4, 4, 1]), ([True] * 28, [4] * 7)])
def test_whole_batches_have_one_orientation_and_the_number_of_processes_changes_none(wide, counts):
    one, two, four = ([sorted(batch) for batch in global_batches(4, world, 1, wide)] for world in (1, 2, 4))
    assert one == two == four and sorted(i for batch in one for i in batch) == list(range(28))
    assert [len(batch) for batch in one] == [4] * 7
    wide_ones = [sum(wide[i] for i in batch) for batch in one]
    assert [*sorted(wide_ones[:6]), wide_ones[6]] == counts


def test_batches_change_with_epoch_and_seed_in_content_and_in_order():
    runs = [global_batches(4, 1, epoch, seed=seed) for seed in range(3) for epoch in range(4)]
    assert len({tuple(map(tuple, batches)) for batches in runs}) == 12
    assert len({frozenset(batches[0]) for batches in runs}) > 6
    assert len({tuple(WIDE[batch[0]] for batch in batches[:6]) for batches in runs}) > 3  # wide ones not first


@pytest.mark.parametrize(("length", "world"), [(1, 2), (6, 1), (6, 3), (7, 2)])
def test_each_test_image_is_in_one_batch_of_one_process(length, world):
    batches = [batch for rank in range(world) for batch in test_batches(length, 2, rank, world)]
    assert sorted(key for batch in batches for key in batch) == [(0, i) for i in range(length)]
    assert all(len(batch) <= 2 for batch in batches)


def test_batches_are_the_same_with_and_without_workers():
    source, keys = Shapes("train", 6, seed=2), [[(1, 4), (1, 0)], [(1, 3), (2, 3)], [(1, 5)]]
    here, there = (list(make_loader(source, True, keys, seed=2, workers=workers)) for workers in (0, 2))
    assert [[t["image_id"] for t in targets] for _, targets in here] == [[4, 0], [3, 3], [5]]
    torch.testing.assert_close(here, there, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_loader_processes_are_forked_whatever_pythons_default_is(tmp_path, capsys):
    source = load_dataset("voc", write_voc(tmp_path / "discs", ("disc", "square"), {"trainval": 2, "test": 1}))[0]
    source.handle = lambda: None  # a new process, unlike a forked one, could not be handed this
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        [[images, _]] = make_loader(source, False, [[(0, 0), (0, 1)]], workers=1)
        broken = check_data(source, "training set", Process(0, 1, torch.device("cpu"), "none"), workers=1)
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert len(images) == 2 and broken == 0 and "2 images, 4 boxes" in capsys.readouterr().out


class Broken(Bright):
    def load(self, epoch, index):
        raise UserError("image 7: cannot be read")


def test_a_workers_error_is_one_line_too():
    with pytest.raises(UserError) as error:
        list(make_loader(Broken(), True, [[(0, 0)]], workers=1))
    assert in_one_line(error.value) == ("image 7: cannot be read", 2)  # torch puts a worker's error inside a traceback


LEFT_BEHIND = """
from tar.data.loader import make_loader
from tar.data.shapes import Shapes
left = iter(make_loader(Shapes("train", 8), True, [[(0, i)] for i in range(8)], workers=1))
next(left)
"""


@beside
def left_behind(_):
    """A program whose error in the middle of an epoch leaves its loader process behind."""
    return subprocess.run([sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_a_worker_left_behind_does_not_keep_the_program(left_behind):
    assert left_behind.returncode == 0, left_behind.stderr


def test_to_device_scales_pixels_to_one_and_keeps_what_training_needs():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    target = {"boxes": torch.ones(1, 4), "labels": torch.ones(1).long(), "ignored": torch.zeros(1), "image_id": 3}
    [image], [target] = to_device([image], [target], torch.device("cpu"))
    assert image.dtype == torch.float32 and image.flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert target.keys() == {"boxes", "labels"}
