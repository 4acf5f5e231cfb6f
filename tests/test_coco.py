"""COCO's format: what is read from a file and refused, batches of one orientation, figures against pycocotools."""

import contextlib
import io
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import SMALL, call, read_result

import eval as evaluation
import train
from tar import UserError, checkpoint
from tar.coco import Coco, coco_files, inside_image, read_json_boxes
from tar.data import Samples, load_dataset, load_test_set, train_batches
from tar.evaluation import coco_metrics, detect, evaluate

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
SPARSE = ((90, "brush"), (1, "person"), (13, "sign"))  # not in the order of their ids: labels 3, 1, 2
LABELS = {1: 1, 13: 2, 90: 3}
NAN, INF = float("nan"), float("inf")
DATA = Path(__file__).resolve().parents[2] / "shared/data"


def entry(number, width=40, height=30):
    return {"id": number, "file_name": f"{number:03d}.png", "width": width, "height": height}


def annotation(image_id, category_id, bbox, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def content(images, annotations, categories=SPARSE):
    categories = [{"id": number, "name": name} for number, name in categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(folder, images, annotations=(), categories=SPARSE, name="set.json"):
    """A file in COCO's format, and beside it its images, each of the grey level of its id."""
    for image in images:
        level = (image["id"] % 256,) * 3
        Image.new("RGB", (image["width"], image["height"]), level).save(folder / image["file_name"])
    (folder / name).write_text(json.dumps(content(images, list(annotations), categories)))
    return folder / name


# Reading


class TestCoco:
    def test_sparse_ids_become_labels_in_the_order_of_the_ids(self, tmp_path):
        boxes = [annotation(7, category, [2, 3, 10, 5]) for category in (90, 13, 1, 90)]
        source = Coco(write_coco(tmp_path, [entry(7)], boxes), tmp_path)
        assert source.classes == ("person", "sign", "brush") and source.category_ids == [1, 13, 90]
        assert source.load(0, 0)[2].tolist() == [3, 2, 1, 3]

    def test_an_image_is_loaded_with_its_own_boxes_as_corners(self, tmp_path):
        rows = (5, 1, [2.5, 3, 10, 5.25]), (700, 13, [1, 1, 4, 4]), (5, 90, [0, 0, 1, 2])
        boxes = [annotation(*row) for row in rows]
        source = Coco(write_coco(tmp_path, [entry(700, 20, 10), entry(5)], boxes), tmp_path)
        image, corners, labels, _ = source.load(0, 1)
        assert len(source) == 2 and image.shape == (3, 30, 40) and image.unique().tolist() == [5]
        assert corners.tolist() == [[2.5, 3, 12.5, 8.25], [0, 0, 1, 2]] and labels.tolist() == [1, 3]
        assert (image.dtype, corners.dtype, labels.dtype) == (torch.uint8, torch.float32, torch.int64)
        assert source.load(0, 0)[1].tolist() == [[1, 1, 5, 5]]

    def test_crowds_are_ignored(self, tmp_path):
        boxes = [annotation(7, 1, [2, 3, 10, 5], **more) for more in ({}, {"iscrowd": 1}, {"iscrowd": 0})]
        source = Coco(write_coco(tmp_path, [entry(7)], boxes), tmp_path)
        assert source.load(0, 0)[3].tolist() == [False, True, False]
        assert len(Samples(source, train=True)[0, 0][1]["boxes"]) == 2

    @pytest.mark.parametrize(("keep_empty", "names"), [(False, ["004"]), (True, ["001", "002", "003", "004"])])
    def test_images_without_a_box_that_counts(self, tmp_path, keep_empty, names):
        """001 has none, 002 a crowd, 003 one of no area."""
        rows = (2, [5, 5, 9, 9], 1), (3, [5, 5, 0, 9], 0), (4, [5, 5, 9, 9], 0), (4, [1, 1, 3, 3], 1)
        boxes = [annotation(number, 1, bbox, iscrowd=crowd) for number, bbox, crowd in rows]
        source = Coco(write_coco(tmp_path, [entry(i) for i in (1, 2, 3, 4)], boxes), tmp_path, keep_empty)
        assert [sample[1] for sample in source.samples] == [f"{name}.png" for name in names]

    def test_an_image_without_boxes_has_arrays_of_length_0(self, tmp_path):
        _, boxes, labels, ignored = Coco(write_coco(tmp_path, [entry(1)]), tmp_path).load(0, 0)
        assert (boxes.shape, labels.shape, ignored.shape) == ((0, 4), (0,), (0,))

    def test_boxes_that_cannot_be_used_are_dropped_and_their_images_named(self, tmp_path):
        """Outside, of no area, not a number, too few: 002 to 005; 003 has another box too, 006 is beyond the limit."""
        bad = [[50, 5, 9, 9], [5, 5, 9, 0], [NAN, 5, 9, 9], [5, 5, 9], [5, 5, 0, 0]]
        boxes = [annotation(1, 1, [5, 5, 9, 9])] + [annotation(i, 1, bbox) for i, bbox in enumerate(bad, 2)]
        boxes.append(annotation(3, 13, [1, 2, 3, 4]))
        source = Coco(write_coco(tmp_path, [entry(i) for i in range(1, 7)], boxes), tmp_path, limit=5)
        assert source.dropped == ["002.png", "003.png", "004.png", "005.png"]
        assert [len(source.load(0, i)[1]) for i in range(5)] == [1, 0, 1, 0, 0]
        assert source.load(0, 2)[1].tolist() == [[1, 2, 4, 6]]

    def test_boxes_over_the_border_end_there(self, tmp_path):
        boxes = [annotation(7, 1, bbox) for bbox in ([-3, 20, 10, 15], [35, -1, 5.5, 31.5])]
        source = Coco(write_coco(tmp_path, [entry(7)], boxes), tmp_path)
        assert source.load(0, 0)[1].tolist() == [[0, 20, 7, 30], [35, 0, 40, 30]] and source.dropped == []

    def test_classes_without_a_box_are_named(self, tmp_path):
        boxes = [annotation(7, 13, [2, 3, 10, 5]), annotation(7, 90, [2, 3, 0, 0]), annotation(8, 1, [2, 3, 10, 5])]
        file = write_coco(tmp_path, [entry(7), entry(8)], boxes)
        assert Coco(file, tmp_path).unused == ["brush"]
        assert Coco(file, tmp_path, limit=1).unused == ["person", "brush"]

    @pytest.mark.parametrize(("keep_empty", "names"), [(False, ["002", "004"]), (True, ["001", "002"])])
    def test_the_limit_counts_images_that_are_kept(self, tmp_path, keep_empty, names):
        boxes = [annotation(i, 1, [2, 3, 10, 5]) for i in (2, 4, 6)]
        file = write_coco(tmp_path, [entry(i) for i in (1, 2, 3, 4, 5, 6)], boxes)
        source = Coco(file, tmp_path, keep_empty, limit=2)
        assert [sample[1] for sample in source.samples] == [f"{name}.png" for name in names]

    def test_an_image_wider_than_high_is_wide(self, tmp_path):
        sizes = [(40, 30), (30, 40), (30, 30), (31, 30)]
        images = [entry(i, *size) for i, size in enumerate(sizes)]
        boxes = [annotation(i, 1, [2, 3, 10, 5]) for i in (1, 2, 3)]
        file = write_coco(tmp_path, images, boxes)
        assert Coco(file, tmp_path).wide == [True, False, False, True]
        assert Coco(file, tmp_path, keep_empty=False).wide == [False, False, True]

    def test_a_missing_image_is_named_at_once(self, tmp_path):
        file = write_coco(tmp_path, [entry(1), entry(2), entry(3)])
        (tmp_path / "002.png").unlink()
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / '002.png'))}.*{re.escape(str(file))}"):
            Coco(file, tmp_path)
        assert len(Coco(file, tmp_path, limit=1)) == 1

    def test_a_file_without_an_image_to_train_on_is_refused_with_the_flag_that_helps(self, tmp_path):
        file = write_coco(tmp_path, [entry(1)])
        with pytest.raises(UserError, match=f"{re.escape(str(file))}.*--keep-empty"):
            Coco(file, tmp_path, keep_empty=False)

    def test_a_byte_order_mark_is_no_mistake(self, tmp_path):
        file = write_coco(tmp_path, [entry(1)])
        file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
        assert len(Coco(file, tmp_path)) == 1


@pytest.mark.parametrize(
    ("bbox", "corners"),
    [
        ([2, 3, 10, 5], [2, 3, 12, 8]),
        ([0, 0, 40, 30], [0, 0, 40, 30]),
        ([-5, -5, 90, 90], [0, 0, 40, 30]),
        ([39.5, 29.25, 0.5, 0.75], [39.5, 29.25, 40, 30]),
        ([40, 3, 10, 5], None),  # begins where the image ends
        ([3, 30, 10, 5], None),
        ([-10, 3, 10, 5], None),
        ([3, -5, 10, 5], None),
        ([2, 3, 0, 5], None),
        ([2, 3, 10, 0], None),
        ([12, 8, -10, -5], None),
        ([NAN, 3, 10, 5], None),
        ([2, NAN, 10, 5], None),
        ([2, 3, NAN, 5], None),
        ([2, 3, 10, NAN], None),
        ([-INF, 3, INF, 5], None),
        ([3, 3, INF, 5], None),
        ([10**400, 3, 10, 5], None),
        ([39.9999999, 3, 10, 5], None),  # of no area as float32
        ([20, 3, 1e-7, 5], None),
        ([-10, 3, 10.0000001, 5], None),
        ([20, 3, 0.25, 5], [20, 3, 20.25, 8]),
        ([], None),
        ([2, 3, 10], None),
        ([2, 3, 10, 5, 1], None),
        ([2, 3, None, 5], None),
        ([2, 3, "ten", 5], None),
        ([2, 3, [10], 5], None),
    ],
    ids=str,
)
def test_inside_an_image_of_40_x_30(bbox, corners):
    assert inside_image(bbox, 40, 30) == corners


# What is refused


def lose(key, number=None, field=None):
    """Takes a list out of a content, or a field out of an entry."""
    return lambda data: data.pop(key) if number is None else data[key][number].pop(field)


def put(value, key, number, field):
    return lambda data: data[key][number].update({field: value})


FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
# How to spoil a sound content, and what the message must say besides the file's name.
SPOILED = {f"no {key}": (lose(key), rf"\b{key}\b") for key in FIELDS}
SPOILED |= {
    f"no {f} in {k}": (lose(k, 1, f), rf"entry 1 of {k} .*\b{f}\b") for k, fields in FIELDS.items() for f in fields
}
SPOILED |= {
    "images no list": (lambda data: data.update(images={"id": 1}), "images"),
    "an entry no object": (lambda data: data["annotations"].append([1, 2]), "entry 2 of annotations"),
    "a number for a name": (put(12, "images", 1, "file_name"), "entry 1 of images .*file_name"),
    "text for a width": (put("40", "images", 1, "width"), "entry 1 of images .*width"),
    "text for a box": (put("1 2 3 4", "annotations", 1, "bbox"), "entry 1 of annotations .*bbox"),
    "two images of one id": (put(1, "images", 1, "id"), "images .*id"),
    "two categories of one id": (put(90, "categories", 1, "id"), "categories .*id"),
    "two categories of one name": (put("sign", "categories", 1, "name"), "categories .*name"),
    "no category at all": (lambda data: data.update(categories=[]), "categories is empty"),
    "a box of no image": (put(99, "annotations", 1, "image_id"), "annotation 12 .*image_id 99"),
    "a box of no category": (put(2, "annotations", 1, "category_id"), "annotation 12 .*category_id 2"),
}


def refusal(file):
    """The one line that says what is wrong with a file, and names it."""
    with pytest.raises(UserError) as error:
        Coco(file, file.parent)
    line = str(error.value)
    assert line.startswith(f"{file}: ") and "\n" not in line
    return line


@pytest.fixture
def sound(tmp_path):
    boxes = [annotation(i, 1, [2, 3, 10, 5], id=10 + i) for i in (1, 2)]
    file = write_coco(tmp_path, [entry(1), entry(2)], boxes)
    assert len(Coco(file, tmp_path)) == 2
    return file


@pytest.mark.parametrize(("spoil", "says"), SPOILED.values(), ids=SPOILED)
def test_what_is_not_cocos_format_is_refused_by_name(sound, spoil, says):
    data = json.loads(sound.read_text())
    spoil(data)
    sound.write_text(json.dumps(data))
    assert re.search(says, refusal(sound))


@pytest.mark.parametrize("text", ["[]", "null", "3", '["images", "annotations", "categories"]'])
def test_json_that_is_no_object_is_refused(sound, text):
    sound.write_text(text)
    assert "COCO's format" in refusal(sound)


@pytest.mark.parametrize("cut", [0, 1, 100, -1], ids=["empty", "one byte", "half", "last byte"])
def test_json_that_is_cut_short_is_refused(sound, cut):
    sound.write_bytes(sound.read_bytes()[:cut])
    assert "cut short" in refusal(sound)


def test_what_is_no_text_is_refused(sound):
    sound.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert "not a JSON file" in refusal(sound)


def test_a_missing_file_is_refused_with_the_layout_and_the_flags_wanted(tmp_path):
    line = refusal(tmp_path / "none.json")
    for word in ("no such file", "instances_train2017.json", "--data-path", "--train-json", "--val-json"):
        assert word in line


def test_a_missing_file_as_a_user_sees_it(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        call(train.main, *SMALL, "--dataset", "coco", "--student", "r10", "--data-path", tmp_path)
    file = tmp_path / "annotations/instances_train2017.json"
    assert stopped.value.code == 2
    assert re.fullmatch(f"train.py: error: {re.escape(str(file))}.*\n", capsys.readouterr().err)


def test_the_lists_come_back_as_they_stand_in_the_file(sound):
    data = json.loads(sound.read_text())
    assert list(read_json_boxes(sound)) == [data["images"], data["annotations"], data["categories"]]


# Two files make a data set


@pytest.mark.parametrize("given", range(16))
def test_each_path_is_cocos_own_or_the_one_given(given):
    usual = ["annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017"]
    chosen = [f"other/{k}" if given >> k & 1 else None for k in range(4)]
    wanted = [Path(mine or f"coco/{path}") for mine, path in zip(chosen, usual, strict=True)]
    assert [list(map(Path, pair)) for pair in coco_files("coco", chosen)] == [wanted[:2], wanted[2:]]


def write_layout(root, train_ids, val_ids, train_classes=SPARSE, val_classes=SPARSE):
    """COCO's own folders; an image of an even number has a box."""
    (root / "annotations").mkdir()
    for split, ids, classes in (("train", train_ids, train_classes), ("val", val_ids, val_classes)):
        (root / f"{split}2017").mkdir()
        boxes = [annotation(i, classes[0][0], [2, 3, 10, 5]) for i in ids if i % 2 == 0]
        file = write_coco(root / f"{split}2017", [entry(i) for i in ids], boxes, classes)
        file.rename(root / f"annotations/instances_{split}2017.json")
    return root


def ids_of(source):
    return [sample[0] for sample in source.samples]


class TestLoadDataset:
    def test_empty_images_are_left_out_of_training_only(self, tmp_path):
        root = write_layout(tmp_path, range(1, 7), range(11, 16))
        (train_set, test_set), all_images = load_dataset("coco", root), load_dataset("coco", root, keep_empty=True)
        assert ids_of(train_set) == [2, 4, 6] and ids_of(all_images[0]) == [1, 2, 3, 4, 5, 6]
        assert ids_of(test_set) == ids_of(all_images[1]) == [11, 12, 13, 14, 15]
        assert test_set.load(0, 1)[0].unique().tolist() == [12]  # of its own folder
        assert train_set.classes == test_set.classes == ("person", "sign", "brush")

    def test_limits(self, tmp_path):
        root = write_layout(tmp_path, range(1, 9), range(11, 16))
        train_set, test_set = load_dataset("coco", root, limit_train=3, limit_test=2)
        assert ids_of(train_set) == [2, 4, 6] and ids_of(test_set) == [11, 12]
        assert ids_of(load_test_set("coco", test_set.classes, root, limit=4)) == [11, 12, 13, 14]

    def test_given_files_stand_in_for_the_layouts(self, tmp_path):
        root = write_layout(tmp_path, (2, 4), (11,))
        (tmp_path / "more").mkdir()
        more = write_coco(tmp_path / "more", [entry(i) for i in (21, 22)], [annotation(22, 1, [2, 3, 10, 5])])
        files = (more, more.parent, None, None)
        assert [ids_of(s) for s in load_dataset("coco", root, files=files)] == [[22], [11]]
        files = (None, None, more, more.parent)
        assert [ids_of(s) for s in load_dataset("coco", root, files=files)] == [[2, 4], [21, 22]]
        assert ids_of(load_test_set("coco", ("person", "sign", "brush"), root, files=files)) == [21, 22]

    def test_other_ids_of_the_same_classes_are_no_difference(self, tmp_path):
        root = write_layout(tmp_path, (2,), (12,), SPARSE, ((3, "brush"), (1, "person"), (2, "sign")))
        train_set, test_set = load_dataset("coco", root)
        assert train_set.load(0, 0)[2].tolist() == test_set.load(0, 0)[2].tolist() == [3]

    @pytest.mark.parametrize(
        ("classes", "says"),
        [
            (((90, "brush"), (1, "person"), (13, "cup"), (14, "jar")), "without sign; besides cup, jar"),
            (((90, "brush"), (1, "person")), "without sign"),
            ((*SPARSE, (2, "cup")), "besides cup"),
            (((1, "brush"), (90, "person"), (13, "sign")), "the same names in another order"),
        ],
        ids=["both", "fewer", "more", "order"],
    )
    def test_other_categories_to_test_on_are_refused_with_the_differences(self, tmp_path, classes, says):
        root = write_layout(tmp_path, (2,), (12,), SPARSE, classes)
        file = root / "annotations/instances_val2017.json"
        for load, known in ((load_dataset, {}), (load_test_set, {"classes": ["person", "sign", "brush"]})):
            with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*trained on: {says}$"):
                load("coco", data_path=root, **known)


# Batches of one orientation


WIDE = [i % 5 in (0, 2, 3) for i in range(28)]  # 17: by four 4 whole batches, and 2 of the 11 others


def global_batches(total, world, epoch=0, wide=WIDE, seed=3):
    """The indices of batch k of all processes together."""
    shares = [train_batches(len(wide), total // world, seed, epoch, rank, world, wide) for rank in range(world)]
    assert {e for share in shares for batch in share for e, _ in batch} == {epoch}
    return [[i for batch in batches for _, i in batch] for batches in zip(*shares, strict=True)]


class TestGrouping:
    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("epoch", range(3))
    def test_an_epoch_has_every_image_once(self, world, epoch):
        assert sorted(i for batch in global_batches(4, world, epoch) for i in batch) == list(range(28))

    @pytest.mark.parametrize("world", [1, 2, 4])
    @pytest.mark.parametrize("length", [1, 5, 27])
    def test_what_does_not_divide_is_filled_up_as_little_as_can_be(self, world, length):
        seen = [i for batch in global_batches(4, world, wide=WIDE[:length]) for i in batch]
        assert set(seen) == set(range(length)) and len(seen) == -(-length // world) * world

    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_whole_batches_have_one_orientation(self, world):
        batches = global_batches(4, world)
        kinds = [sum(WIDE[i] for i in batch) for batch in batches]
        assert [len(batch) for batch in batches] == [4] * 7
        assert sorted(kinds[:6]) == [0, 0, 4, 4, 4, 4] and kinds[6] == 1  # 17 - 16 wide ones are left over

    @pytest.mark.parametrize("epoch", range(3))
    def test_the_number_of_processes_changes_no_batch(self, epoch):
        one, two, four = (list(map(sorted, global_batches(4, world, epoch))) for world in (1, 2, 4))
        assert one == two == four

    def test_batches_change_with_the_epoch_and_the_seed_in_content_and_in_order(self):
        runs = [global_batches(4, 1, epoch, seed=seed) for seed in range(3) for epoch in range(4)]
        assert len({tuple(map(tuple, batches)) for batches in runs}) == 12
        assert len({frozenset(batches[0]) for batches in runs}) > 6
        assert len({tuple(WIDE[batch[0]] for batch in batches[:6]) for batches in runs}) > 3  # wide ones not first
        assert global_batches(4, 1, 2) == global_batches(4, 1, 2)

    @pytest.mark.parametrize("length", [8, 27])
    def test_without_orientations_the_order_is_a_plain_permutation(self, length):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + 2)
        order = torch.randperm(length, generator=generator).tolist()
        batches = train_batches(length, 4, seed=5, epoch=2)
        assert batches == [[(2, i) for i in order[k : k + 4]] for k in range(0, length, 4)]
        assert batches != train_batches(length, 4, seed=5, epoch=2, wide=WIDE[:length])


# Figures


def found_of(source, found):
    """Results as detect() returns them, of detections in COCO's format; the boxes of the file are left out."""
    results = []
    for index, (image_id, *_) in enumerate(source.samples):
        mine = [row for row in found if row["image_id"] == image_id]
        boxes = np.array([row["bbox"] for row in mine], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth = {"gt_boxes": np.zeros((0, 4)), "gt_labels": np.zeros(0, int), "gt_ignored": np.zeros(0, bool)}
        labels = np.array([LABELS[row["category_id"]] for row in mine], dtype=np.int64)
        scores = np.array([row["score"] for row in mine], dtype=np.float32)
        results.append({"image_id": index, **truth, "boxes": boxes, "labels": labels, "scores": scores})
    return results


def pycocotools_stats(file, found, only=None):
    """COCOeval's first six statistics, in percent, of the annotation file itself and a file of detections."""
    (file.parent / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        run = COCOeval(truth, truth.loadRes(str(file.parent / "found.json")), "bbox")
        run.params.catIds = [only] if only else run.params.catIds
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if value < 0 else 100 * value for value in run.stats[:6]]


def random_set(folder, seed, images=24):
    """Boxes of all sizes in quarters of a pixel, some over the border, some crowds, with areas of their own;
    detections near them, elsewhere, inside crowds and of the wrong category."""
    rng, boxes, found = np.random.default_rng(seed), [], []
    entries = [entry(int(i), 320, 240) for i in rng.permutation(900)[:images]]

    def quarters(values):
        return (np.round(np.asarray(values) * 4) / 4).tolist()

    for image in entries:
        for _ in range(rng.integers(0, 7)):
            side = np.exp(rng.random(2) * 3.4 + 2)
            corner, category = rng.random(2) * (300, 220) - 5, int(rng.choice([1, 13, 90]))
            bbox, crowd = quarters([*corner, *side]), int(rng.random() < 0.15)
            area = bbox[2] * bbox[3] * rng.uniform(0.3, 0.9)
            boxes.append(annotation(image["id"], category, bbox, area=area, iscrowd=crowd, id=3 * len(boxes) + 1))
            for _ in range(rng.integers(0, 3) + crowd):
                near = bbox + rng.normal(size=4) * np.tile(side, 2) * 0.08
                near = [*(corner + side / 4), *side / 2] if crowd else near
                kind = category if rng.random() < 0.8 else int(rng.choice([1, 13, 90]))
                found.append(annotation(image["id"], kind, quarters(near), score=int(rng.integers(1, 1024)) / 1024))
        found.append(annotation(image["id"], 13, quarters([*rng.random(2) * 200, 20, 20]), score=0.5))
    return write_coco(folder, entries, boxes), found, boxes


@pytest.mark.parametrize("seed", range(3))
def test_coco_metrics_are_pycocotools_own_of_the_original_file(seed, tmp_path):
    file, found, boxes = random_set(tmp_path, seed)
    source = Coco(file, tmp_path)
    metrics = coco_metrics(found_of(source, found), source.classes, source)
    expected = pycocotools_stats(file, found)
    assert sum(a["iscrowd"] for a in boxes) > 2 and source.dropped == []
    assert None not in expected and 5 < expected[0] < 95
    assert [metrics[name] for name in FIGURES] == pytest.approx(expected)
    for category, name in SPARSE:
        stats = pycocotools_stats(file, found, only=category)
        assert metrics["per_class"][name] == pytest.approx({"AP": stats[0], "AP50": stats[1]})
    assert list(metrics["per_class"]) == ["person", "sign", "brush"]


@pytest.mark.parametrize(
    ("area", "size"),
    [
        ({}, "medium"),
        ({"area": 900.0}, "small"),
        ({"area": 1600}, "medium"),
        ({"area": 10000}, "large"),
        ({"area": None}, "medium"),
        ({"area": "900"}, "medium"),
    ],
    ids=str,
)
def test_the_size_of_an_object_is_the_files_area(tmp_path, area, size):
    bbox = [2, 2, 40, 40]  # 1600 pixels: medium is from 32 x 32 to 96 x 96
    source = Coco(write_coco(tmp_path, [entry(7, 64, 64)], [annotation(7, 90, bbox, **area)]), tmp_path)
    metrics = coco_metrics(found_of(source, [annotation(7, 90, bbox, score=0.5)]), source.classes, source)
    sizes = {f"AP_{name}": pytest.approx(100) if name == size else None for name in ("small", "medium", "large")}
    assert {name: metrics[name] for name in sizes} == sizes


# Without the flag precision is 1/4 up to recall 1/2, which is 51 of pycocotools' 101 points.
@pytest.mark.parametrize(("crowd", "ap"), [(1, 100), (0, 25 * 51 / 101)])
def test_detections_inside_a_crowd_are_not_punished(tmp_path, crowd, ap):
    """Three of four are in the crowd, with higher scores."""
    boxes = [annotation(7, 13, [0, 0, 10, 10]), annotation(7, 13, [20, 0, 60, 60], iscrowd=crowd)]
    found = [annotation(7, 13, [25 + 15 * i, 10, 10, 10], score=0.9) for i in range(3)]
    source = Coco(write_coco(tmp_path, [entry(7, 96, 64)], boxes), tmp_path)
    results = found_of(source, [*found, annotation(7, 13, [0, 0, 10, 10], score=0.5)])
    assert coco_metrics(results, source.classes, source)["AP"] == pytest.approx(ap)


@pytest.mark.parametrize("ids", [(0, 0), (5, 5), None], ids=["0", "twice", "none"])
def test_the_ids_of_annotations_do_not_matter(tmp_path, ids):
    """pycocotools takes a match with annotation 0 for none, and of two with one id keeps one."""
    boxes = [annotation(0, 1, [5, 5, 9, 9]), annotation(8, 1, [5, 5, 9, 9])]
    boxes = [{**a, "id": ids[k]} if ids else a for k, a in enumerate(boxes)]
    source = Coco(write_coco(tmp_path, [entry(0), entry(8)], boxes), tmp_path)
    found = [{**a, "score": 0.5} for a in boxes]
    assert coco_metrics(found_of(source, found), source.classes, source)["AP"] == pytest.approx(100)


class Oracle(torch.nn.Module):
    """Knows an image by its grey level and answers with (box, label) of that image."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        mine = [self.answers.get(round(image.mean().item() * 255), []) for image in images]
        return [
            {
                "boxes": torch.tensor([box for box, _ in rows]).reshape(-1, 4),
                "labels": torch.tensor([label for _, label in rows]),
                "scores": torch.full((len(rows),), 0.5),
            }
            for rows in mine
        ]


@pytest.mark.parametrize(("labels", "ap"), [((3, 1, 2), 100), ((2, 1, 3), 100 / 3), ((1, 2, 3), 0)], ids=str)
def test_evaluate_measures_labels_against_the_files_categories(tmp_path, labels, ap):
    """Brush, person and sign are labels 3, 1 and 2; an image in between has no box. By the file all are large."""
    kinds = {31: 90, 200: 1, 7: 13}
    boxes = [annotation(number, category, [2, 3, 10, 15], area=10000) for number, category in kinds.items()]
    file = write_coco(tmp_path, [entry(i) for i in (31, 8, 200, 7)], boxes)
    oracle = Oracle({number: [([2.0, 3, 12, 18], label)] for number, label in zip(kinds, labels, strict=True)})
    metrics = evaluate(oracle, Coco(file, tmp_path), torch.device("cpu"), batch_size=3)
    assert metrics["AP"] == metrics["AP_large"] == pytest.approx(ap) and metrics["AP_small"] is None


# A run


def write_discs(folder, counts):
    """Images with a disc (category 17) and a square (category 3) each, every third one upright; the first has no box
    and the second only a crowd. Returns the files by split."""
    files, number = {}, 40
    for split, count in counts.items():
        images, boxes = [], []
        for k in range(count):
            number += 3
            rng = np.random.default_rng(number)
            size = (72, 96) if k % 3 == 2 else (96, 72)
            picture = Image.new("RGB", size, (70, 70, 70))
            images.append(entry(number, *size))
            for part, category in enumerate((17, 3) if k > 1 else ()):
                x, y = map(int, rng.integers(2, (14, 40)))
                x, y = (x + 46 * part, y) if k % 3 != 2 else (y, x + 46 * part)
                shape = (ImageDraw.Draw(picture).ellipse, ImageDraw.Draw(picture).rectangle)[part]
                shape((x, y, x + 27, y + 27), fill=((220, 30, 30), (30, 30, 220))[part])
                area = 1100 if category == 17 else 784  # discs are medium, from 1024 on, by the file alone
                boxes.append(annotation(number, category, [x, y, 28, 28], area=area, iscrowd=0, id=len(boxes) + 1))
            if k == 1:
                boxes.append(annotation(number, 3, [8, 8, 60, 50], area=3000, iscrowd=1, id=len(boxes) + 1))
            picture.save(folder / images[-1]["file_name"])
        files[split] = folder / f"{split}.json"
        files[split].write_text(json.dumps(content(images, boxes, ((17, "disc"), (3, "square")))))
    return files


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """A run on 14 images, 12 of them with boxes, and the sizes of the images of its batches."""
    folder, sizes, to_device = tmp_path_factory.mktemp("discs"), [], train.to_device
    files = write_discs(folder, {"train": 14, "val": 8})

    def spy(images, *rest):
        sizes.append([tuple(image.shape[1:]) for image in images])
        return to_device(images, *rest)

    flags = [*SMALL, "--dataset", "coco", "--student", "r10", "--limit-train", 0, "--limit-test", 0]
    for split in files:
        flags += [f"--{split}-json", files[split], f"--{split}-images", folder]
    flags += ["--epochs", 6, "--rpn-top-n", 200, 50, "--output", folder / "run"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, "to_device", spy)
        call(train.main, *flags)
    return Namespace(folder=folder, run=folder / "run", files=files, sizes=sizes, out=printed.getvalue())


def test_a_run_trains_on_images_with_boxes_and_tests_on_all(discs):
    result = read_result(discs.run)
    assert (result["train_images"], result["test_images"], result["dataset"]) == (12, 8, "coco")
    assert list(result["per_class"]) == ["square", "disc"]
    assert "12 training and 8 test images, 2 classes" in discs.out


def test_a_run_has_batches_of_one_orientation(discs):
    """Of 12 images 8 are wide: two batches of four and one of upright ones, an epoch."""
    assert len(discs.sizes) == 6 * 3
    for k in range(0, 18, 3):
        assert sorted(discs.sizes[k : k + 3]) == [[(72, 96)] * 4] * 2 + [[(96, 72)] * 4]


def test_a_runs_figures_are_pycocotools_own_of_the_original_file(discs):
    model, saved = checkpoint.load_detector(discs.run / "last.pth")
    assert saved["classes"] == ["square", "disc"]
    source = Coco(discs.files["val"], discs.folder)
    numbers = [image["id"] for image in json.loads(discs.files["val"].read_text())["images"]]
    found = []
    for r in detect(model.to(memory_format=torch.channels_last), source, torch.device("cpu"), batch_size=4):
        for box, label, score in zip(r["boxes"].tolist(), r["labels"], r["scores"].tolist(), strict=True):
            bbox, category = [*box[:2], box[2] - box[0], box[3] - box[1]], {1: 3, 2: 17}[int(label)]
            found.append(annotation(numbers[r["image_id"]], category, bbox, score=score))
    result, expected = read_result(discs.run), pycocotools_stats(discs.files["val"], found)
    assert expected[1] > 5  # it has learnt something: the figures are not those of nothing found
    assert [result[name] for name in FIGURES] == pytest.approx(expected)


def test_eval_measures_what_training_measured(discs, capsys):
    file = discs.folder / "figures.json"
    call(evaluation.main, "--weights", discs.run / "last.pth", "--json", file, "--threads", 1, "--workers", 0)
    figures, result = json.loads(file.read_text()), read_result(discs.run)
    names = {*FIGURES, "per_class", "dataset", "split", "test_images"}
    assert {k: figures[k] for k in names} == {k: result[k] for k in names}
    assert "8 test images of coco" in capsys.readouterr().out


def test_eval_knows_one_split_of_coco(discs, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(evaluation.main, "--weights", discs.run / "last.pth", "--split", "val")
    assert stopped.value.code == 2 and "--val-json" in capsys.readouterr().err


def test_eval_on_other_categories_is_refused_in_one_line(discs, capsys, tmp_path):
    file = write_coco(tmp_path, [entry(1)], categories=((3, "square"), (17, "ball")))
    with pytest.raises(SystemExit) as stopped:
        flags = ["--weights", discs.run / "last.pth", "--val-json", file, "--val-images", tmp_path]
        call(evaluation.main, *flags, "--threads", 1)
    assert stopped.value.code == 2
    line = f"eval.py: error: {re.escape(str(file))}: .*without disc; besides ball\n"
    assert re.fullmatch(line, capsys.readouterr().err)


# Real data, where it is at hand


@pytest.fixture(scope="module", params=["pcb", "minivoc"])
def real(request):
    """A data set read whole, and what its two JSON files hold."""
    files, folder = {
        "pcb": (("instances_train.json", "instances_test.json"), "images"),
        "minivoc": (("instances_train.json", "instances_val.json"), "VOCdevkit/VOC2007/JPEGImages"),
    }[request.param]
    files, folder = [DATA / request.param / file for file in files], DATA / request.param / folder
    if not files[0].is_file():
        pytest.skip(f"{files[0]} is not there: real data is no part of the project")
    pair = load_dataset("coco", files=(files[0], folder, files[1], folder))
    return Namespace(name=request.param, pair=pair, data=[json.loads(file.read_text()) for file in files])


def test_real_sets_have_all_images_and_boxes(real):
    images, boxes, crowds, classes, unused = {
        "pcb": ([1000, 500], [6873, 3140], [0, 0], 6, [[], []]),
        "minivoc": ([2000, 776], [18770, 7674], [17, 2], 80, [["zebra"], ["toaster"]]),
    }[real.name]
    assert [len(source) for source in real.pair] == images
    assert [sum(len(s[2]) for s in source.samples) for source in real.pair] == boxes
    assert [sum(s[4].sum() for s in source.samples) for source in real.pair] == crowds
    assert {len(source.classes) for source in real.pair} == {classes}
    assert [source.unused for source in real.pair] == unused
    assert [source.dropped for source in real.pair] == [[], []]


def test_real_boxes_are_the_files_in_their_image(real):
    for source, data in zip(real.pair, real.data, strict=True):
        names = {c["id"]: c["name"] for c in data["categories"]}
        sizes = {i["id"]: (i["width"], i["height"]) for i in data["images"]}
        rows = {image_id: [] for image_id in sizes}
        for a in data["annotations"]:
            rows[a["image_id"]].append((a["bbox"], names[a["category_id"]]))
        for image_id, _, boxes, labels, _ in source.samples:
            assert [source.classes[label - 1] for label in labels] == [name for _, name in rows[image_id]]
            corners = np.array([bbox for bbox, _ in rows[image_id]], dtype=float)
            corners[:, 2:] += corners[:, :2]
            np.testing.assert_allclose(boxes, corners.clip(0, sizes[image_id] * 2), rtol=1e-6)
            assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_real_images_have_the_sizes_of_the_file(real):
    for source, data in zip(real.pair, real.data, strict=True):
        for index in (0, 7, len(source) - 1):
            image, *_ = source.load(0, index)
            height, width = image.shape[1:]
            assert (data["images"][index]["width"], data["images"][index]["height"]) == (width, height)
            assert image.dtype == torch.uint8 and image.float().std() > 5 and source.wide[index] == (width > height)
