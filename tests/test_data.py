"""Data sources and loaders, on small folders in VOC's layout and on images made here."""

import re
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import ROOT

from tar import UserError, data, fail
from tar.data import Samples, load_dataset, load_test_set, make_loader, to_device, train_batches
from tar.shapes import Shapes
from tar.voc import VOC_CLASSES, Voc, read_annotation

CAT = ("cat", (3, 5, 10, 20), 0)  # name; xmin, ymin, xmax, ymax as VOC counts; difficult


def write_image(folder, name, objects=(CAT,), size=(40, 30)):
    """One image of one grey level and its annotation."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (int(name) % 256,) * 3).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    rows = []
    for label, corners, difficult in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        rows.append(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox>"
            f"<part><name>head</name><bndbox>{box}</bndbox></part></object>"
        )
    text = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{''.join(rows)}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def write_list(folder, split, names):
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def voc(tmp_path):
    """A sound folder: image 000001 to train on, 000002 to test on."""
    for name, split in (("000001", "trainval"), ("000002", "test")):
        write_image(tmp_path, name)
        write_list(tmp_path, split, [name])
    return tmp_path


class TestVoc:
    def test_boxes_become_continuous_and_difficult_is_kept(self, tmp_path):
        write_image(tmp_path, "000007", [CAT, ("dog", (1, 1, 40, 30), 1), ("cat", (12, 3, 13, 4), 0)])
        write_list(tmp_path, "trainval", ["000007"])
        source = Voc([tmp_path], "trainval", ("cat", "dog"))
        image, boxes, labels, ignored = source.load(0, 0)
        assert len(source) == 1 and source.classes == ("cat", "dog") and source.dropped == []
        assert boxes.tolist() == [[2, 4, 10, 20], [0, 0, 40, 30], [11, 2, 13, 4]] and boxes.dtype == torch.float32
        assert labels.tolist() == [1, 2, 1] and labels.dtype == torch.int64
        assert ignored.tolist() == [False, True, False]
        assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
        assert abs(image.float() - 7).max() <= 2

    def test_boxes_end_at_the_border(self, tmp_path):
        write_image(tmp_path, "000001", [("cat", (0, -4, 45, 31), 0)])
        boxes, names, ignored, size = read_annotation(tmp_path / "Annotations/000001.xml")
        assert size == [40, 30]
        assert boxes.tolist() == [[0, 0, 40, 30]] and names == ["cat"] and ignored.tolist() == [False]

    def test_an_image_without_objects_has_no_boxes(self, tmp_path):
        write_image(tmp_path, "000001", [])
        write_list(tmp_path, "trainval", ["000001"])
        _, boxes, labels, ignored = Voc([tmp_path], "trainval", ("cat",)).load(0, 0)
        assert boxes.shape == (0, 4) and labels.shape == (0,) and ignored.shape == (0,)

    def test_boxes_without_area_are_dropped_and_their_images_named(self, tmp_path):
        write_image(tmp_path, "000001", [("dog", (9, 5, 8, 20), 1), CAT, ("dog", (5, 25, 9, 20), 0)])
        write_image(tmp_path, "000002")
        write_list(tmp_path, "trainval", ["000001", "000002"])
        source = Voc([tmp_path], "trainval", ("cat", "dog"))
        _, boxes, labels, ignored = source.load(0, 0)
        assert (boxes.tolist(), labels.tolist(), ignored.tolist()) == ([[2, 4, 10, 20]], [1], [False])
        assert source.dropped == ["000001"]

    def test_a_list_may_hold_flags_and_blank_lines(self, tmp_path):
        for name in ("000001", "000002"):
            write_image(tmp_path, name)
        write_list(tmp_path, "trainval", ["000002  1", "", "000001 -1"])
        source = Voc([tmp_path], "trainval", ("cat",))
        assert [sample[0].stem for sample in source.samples] == ["000002", "000001"]

    def test_a_grey_image_has_three_channels(self, voc):
        Image.new("L", (40, 30), 99).save(voc / "JPEGImages/000001.jpg")
        image, *_ = Voc([voc], "trainval", ("cat",)).load(0, 0)
        assert image.shape == (3, 30, 40) and abs(image.float() - 99).max() <= 2


class TestLoadDataset:
    def test_a_folder_that_holds_the_images_itself(self, voc):
        train, test = load_dataset("voc", voc)
        assert [s.samples[0][0] for s in (train, test)] == [voc / f"JPEGImages/00000{i}.jpg" for i in (1, 2)]

    @pytest.mark.parametrize("layout", ["VOCdevkit/VOC2007", "VOC2007"])
    def test_a_development_kit(self, tmp_path, layout):
        write_image(tmp_path / layout, "000001")
        for split in ("trainval", "test"):
            write_list(tmp_path / layout, split, ["000001"])
        train, test = load_dataset("voc", tmp_path)
        assert (len(train), len(test)) == (1, 1)
        assert train.samples[0][0] == tmp_path / layout / "JPEGImages/000001.jpg"

    def test_several_years_train_together_and_test_where_there_is_a_test_list(self, tmp_path):
        kit = tmp_path / "VOCdevkit"
        for year, names in (("2007", ("000001", "000002")), ("2012", ("000003",))):
            for name in names:
                write_image(kit / f"VOC{year}", name)
            write_list(kit / f"VOC{year}", "trainval", names)
        write_list(kit / "VOC2007", "test", ["000002"])
        train, test = load_dataset("voc", tmp_path, years=("2007", "2012"))
        assert [s[0].stem for s in train.samples] == ["000001", "000002", "000003"]
        assert [s[0].stem for s in test.samples] == ["000002"]
        train, _ = load_dataset("voc", tmp_path, years=("2012", "2007"), limit_train=2)
        assert [s[0].stem for s in train.samples] == ["000003", "000001"]
        assert len(load_dataset("voc", tmp_path)[0]) == 2

    def test_vocs_classes_are_taken_if_no_others_occur(self, voc):
        train, test = load_dataset("voc", voc)
        assert train.classes == test.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
        assert train.load(0, 0)[2].tolist() == [8]  # cat is the eighth by alphabet

    def test_other_classes_are_read_from_all_annotations(self, voc):
        write_image(voc, "000001", [("zebra", (1, 1, 5, 5), 0), CAT])
        write_image(voc, "000002", [("ant", (1, 1, 5, 5), 0)])
        train, test = load_dataset("voc", voc)
        assert train.classes == test.classes == ("ant", "cat", "zebra")
        assert train.load(0, 0)[2].tolist() == [3, 2] and test.load(0, 0)[2].tolist() == [1]

    def test_val_is_to_tune_on(self, tmp_path):
        for number, split in enumerate(("train", "val", "trainval", "test")):
            write_image(tmp_path, str(number))
            write_list(tmp_path, split, [str(number)])
        for split, names in (("val", ["0", "1"]), ("test", ["2", "3"])):
            sources = load_dataset("voc", tmp_path, split=split)
            assert [s[0].stem for source in sources for s in source.samples] == names
            assert load_test_set("voc", VOC_CLASSES, tmp_path, split=split).samples[0][0].stem == names[1]

    def test_limits(self, tmp_path):
        names = [f"00000{i}" for i in range(1, 6)]
        for name in names:
            write_image(tmp_path, name)
        for split in ("trainval", "test"):
            write_list(tmp_path, split, names)
        train, test = load_dataset("voc", tmp_path, limit_train=3, limit_test=2)
        assert (len(train), len(test)) == (3, 2)

    def test_shapes(self):
        train, test = load_dataset("shapes", limit_train=7, limit_test=5, seed=3)
        assert (train.split, len(train), train.seed) == ("train", 7, 3)
        assert (test.split, len(test)) == ("test", 5)
        assert load_dataset("shapes", split="val")[1].split == load_test_set("shapes", (), split="val").split == "val"
        assert [len(s) for s in load_dataset("shapes")] == [data.SHAPES_IMAGES["train"], data.SHAPES_IMAGES["test"]]


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))


# What is wrong: how to make it so in a sound folder, and the file that the message must name.
BROKEN = {
    "no image": (lambda f: (f / "JPEGImages/000001.jpg").unlink(), "JPEGImages/000001.jpg"),
    "no annotation": (lambda f: (f / "Annotations/000001.xml").unlink(), "Annotations/000001.xml"),
    "truncated annotation": (
        lambda f: replace(f / "Annotations/000001.xml", "</bndbox></part></object></annotation>", ""),
        "Annotations/000001.xml",
    ),
    "empty annotation": (lambda f: (f / "Annotations/000001.xml").write_text(""), "Annotations/000001.xml"),
    "no corner": (lambda f: replace(f / "Annotations/000001.xml", "<xmax>10</xmax>", ""), "Annotations/000001.xml"),
    "no number": (lambda f: replace(f / "Annotations/000001.xml", ">10<", ">ten<"), "Annotations/000001.xml"),
    "no size": (lambda f: replace(f / "Annotations/000001.xml", "width>", "breadth>"), "Annotations/000001.xml"),
    "no name": (
        lambda f: replace(f / "Annotations/000001.xml", "<object><name>cat</name>", "<object>"),
        "Annotations/000001.xml",
    ),
    "no training list": (lambda f: (f / "ImageSets/Main/trainval.txt").unlink(), "ImageSets/Main/trainval.txt"),
    "no test list": (lambda f: (f / "ImageSets/Main/test.txt").unlink(), "ImageSets/Main/test.txt"),
    "empty training list": (lambda f: write_list(f, "trainval", []), "ImageSets/Main/trainval.txt"),
    "empty test list": (lambda f: write_list(f, "test", ["", " "]), "ImageSets/Main/test.txt"),
}


@pytest.mark.parametrize(("spoil", "file"), BROKEN.values(), ids=BROKEN)
def test_broken_folders_are_refused_in_one_line_that_names_the_file(voc, spoil, file):
    spoil(voc)
    with pytest.raises(UserError, match=re.escape(str(voc / file))) as error:
        load_dataset("voc", voc)
    assert "\n" not in str(error.value)


def test_an_unknown_class_is_refused_by_name(voc):
    with pytest.raises(UserError, match=f"{re.escape(str(voc / 'Annotations/000001.xml'))}.*'cat'"):
        Voc([voc], "trainval", ("dog", "cow"))


def test_a_folder_without_data_is_refused_with_the_layout_wanted(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*VOCdevkit/VOC2007/JPEGImages.*--data-path"):
        load_dataset("voc", tmp_path)


def unreadable(path, kind):
    whole = path.read_bytes()
    path.write_bytes(
        {"text": b"<html>404 not found</html>", "truncated": whole[: len(whole) * 2 // 3], "empty": b""}[kind]
    )


@pytest.mark.parametrize("kind", ["text", "truncated", "empty"])
def test_an_unreadable_image_is_refused_by_name(voc, kind):
    file = voc / "JPEGImages/000001.jpg"
    unreadable(file, kind)
    source, _ = load_dataset("voc", voc)
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        source.load(0, 0)
    assert "\n" not in str(error.value)


def test_an_unreadable_image_is_refused_in_one_line_by_a_worker_too(voc, capsys):
    file = voc / "JPEGImages/000001.jpg"
    unreadable(file, "text")
    source, _ = load_dataset("voc", voc)
    with pytest.raises(UserError) as error:
        list(make_loader(source, True, [[(0, 0)]], workers=1))
    with pytest.raises(SystemExit):  # torch wraps a worker's error in a traceback: the programs take it off again
        fail("train.py", error.value)
    assert re.fullmatch(f"train.py: error: {re.escape(str(file))}.*\n", capsys.readouterr().err)


LEFT_BEHIND = """
from tar.data import make_loader
from tar.shapes import Shapes
left = iter(make_loader(Shapes("train", 8), True, [[(0, i)] for i in range(8)], workers=1))
next(left)
"""


def test_a_worker_left_behind_does_not_keep_the_program():
    """As one whose loader processes an error in the middle of an epoch leaves behind."""
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_download_without_a_network_is_refused_in_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("tar.voc.VOCDetection", fail)
    with pytest.raises(UserError, match=f"VOC 2007 trainval.*{re.escape(str(tmp_path))}") as refusal:
        load_dataset("voc", tmp_path, download=True)
    assert "\n" not in str(refusal.value)


def test_download_of_a_year_that_voc_has_not_is_refused(tmp_path):
    """torchvision refuses the year before it asks the network."""
    with pytest.raises(UserError, match="1999"):
        load_dataset("voc", tmp_path, years=("1999",), download=True)


def test_download_fetches_what_each_year_has_and_reads_it(tmp_path, monkeypatch):
    asked = []

    def fetch(root, year, image_set, download):
        assert root == tmp_path and download
        asked.append((year, image_set))
        folder = tmp_path / f"VOCdevkit/VOC{year}"
        write_image(folder, "000001")
        write_list(folder, image_set, ["000001"])

    monkeypatch.setattr("tar.voc.VOCDetection", fetch)
    train, test = load_dataset("voc", tmp_path, years=("2007", "2012"), download=True)
    assert sorted(asked) == [("2007", "test"), ("2007", "trainval"), ("2012", "trainval")]
    assert (len(train), len(test)) == (2, 1)


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


class TestSamples:
    def test_image_and_box_are_flipped_together_about_half_the_time(self):
        samples, flipped = Samples(Bright(), train=True, seed=1), 0
        for epoch in range(50):
            for index in range(4):
                image, target = samples[epoch, index]
                assert target["boxes"].tolist() == [bright_box(image)]
                assert type(target["boxes"]) is torch.Tensor
                flipped += target["boxes"].tolist() == [[30 - 14, 5, 30 - 3 - index, 11]]
        assert 70 < flipped < 130

    def test_flips_depend_on_seed_and_epoch(self):
        def flips(seed, epoch):
            return [Samples(Bright(), True, seed)[epoch, i % 4][1]["boxes"][0, 0].item() > 10 for i in range(4)]

        assert len({tuple(flips(seed, 0)) for seed in range(8)}) > 1
        assert len({tuple(flips(0, epoch)) for epoch in range(8)}) > 1

    def test_an_image_without_boxes_can_be_flipped(self, tmp_path):
        write_image(tmp_path, "000001", [])
        write_list(tmp_path, "trainval", ["000001"])
        samples = Samples(Voc([tmp_path], "trainval", ("cat",)), train=True)
        assert all(samples[epoch, 0][1]["boxes"].shape == (0, 4) for epoch in range(8))

    def test_ignored_boxes_are_left_out_of_training(self):
        _, target = Samples(Bright(), train=True)[0, 2]
        assert len(target["boxes"]) == 1 and target["labels"].tolist() == [1] and target["ignored"].tolist() == [False]

    def test_testing_keeps_everything_as_it_is(self):
        samples = Samples(Bright(), train=False)
        for index in range(4):
            image, target = samples[0, index]
            assert target["boxes"].tolist() == [[1, 1, 2, 2], [3 + index, 5, 14, 11]]
            assert bright_box(image) == target["boxes"][1].tolist()
            assert target["labels"].tolist() == [2, 1] and target["ignored"].tolist() == [True, False]
            assert target["image_id"] == index


class TestTrainBatches:
    @pytest.mark.parametrize("length", [1, 8, 11])
    def test_one_process_sees_every_image_once(self, length):
        batches = train_batches(length, 3, seed=0, epoch=4)
        assert sorted(key for batch in batches for key in batch) == [(4, i) for i in range(length)]
        assert all(len(batch) == 3 for batch in batches[:-1]) and 1 <= len(batches[-1]) <= 3

    @pytest.mark.parametrize(("length", "world"), [(8, 2), (11, 2), (11, 3), (2, 4), (1, 4)])
    def test_every_process_has_as_many_batches_and_together_they_see_all(self, length, world):
        shares = [train_batches(length, 2, 0, 0, rank, world) for rank in range(world)]
        sizes = [[len(batch) for batch in share] for share in shares]
        assert all(size == sizes[0] for size in sizes)
        keys = [key for share in shares for batch in share for key in batch]
        assert set(keys) == {(0, i) for i in range(length)}
        assert len(keys) < length + world  # no more is filled up than must be

    def test_two_processes_make_the_batches_of_one(self):
        one = train_batches(12, 4, seed=3, epoch=2)
        two = [train_batches(12, 2, seed=3, epoch=2, rank=rank, world=2) for rank in range(2)]
        assert len(one) == 3
        assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]

    def test_the_order_is_that_of_seed_and_epoch(self):
        def order(seed, epoch):
            return [index for batch in train_batches(50, 4, seed, epoch) for _, index in batch]

        assert order(1, 2) == order(1, 2)
        assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
        assert order(0, 0) != list(range(50))

    def test_the_global_generator_is_left_alone(self):
        torch.manual_seed(0)
        before = torch.get_rng_state().tolist()
        train_batches(50, 4, 1, 2)
        assert torch.get_rng_state().tolist() == before


def test_batches_are_the_same_with_and_without_workers():
    source, keys = Shapes("train", 6, seed=2), [[(1, 4), (1, 0)], [(1, 3), (2, 3)], [(1, 5)]]
    here, there = (list(make_loader(source, True, keys, seed=2, workers=workers)) for workers in (0, 2))
    assert [[t["image_id"] for t in targets] for _, targets in here] == [[4, 0], [3, 3], [5]]
    for (images, targets), (images_there, targets_there) in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, images_there, strict=True))
        for a, b in zip(targets, targets_there, strict=True):
            assert a.keys() == b.keys() and a["image_id"] == b["image_id"]
            assert all(torch.equal(a[name], b[name]) for name in ("boxes", "labels", "ignored"))


def test_to_device_scales_pixels_to_one_and_keeps_what_training_needs():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    target = {"boxes": torch.ones(1, 4), "labels": torch.ones(1).long(), "ignored": torch.zeros(1), "image_id": 3}
    images, targets = to_device([image], [target], torch.device("cpu"))
    assert images[0].dtype == torch.float32
    np.testing.assert_allclose(images[0].flatten(), [0, 0.2, 1], rtol=1e-6)
    assert targets[0].keys() == {"boxes", "labels"}
