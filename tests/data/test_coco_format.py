"""COCO's format: what is read from a file, what is refused, and the two files of a data set."""

import json
import re

import pytest
import torch
from coco_sets import SPARSE, annotation, entry, write_coco

from tar import UserError
from tar.data.coco import Coco, inside_image
from tar.data.datasets import load_dataset, load_test_set
from tar.data.loader import Samples

NAN, INF = float("nan"), float("inf")


def ids_of(source):
    return [sample[0] for sample in source.samples]


class TestCoco:
    def test_an_image_has_its_own_boxes_as_corners_and_labels_in_the_order_of_the_ids(self, tmp_path):
        rows = (5, 1, [2.5, 3, 10, 5.25]), (700, 13, [1, 1, 4, 4]), (5, 90, [0, 0, 1, 2]), (5, 13, [0, 0, 1, 1])
        boxes = [annotation(*row) for row in rows]
        source = Coco(write_coco(tmp_path, [entry(700, 20, 10), entry(5)], boxes), tmp_path)
        assert source.classes == ("person", "sign", "brush") and source.category_ids == [1, 13, 90]
        image, corners, labels, _ = source.load(0, 1)
        assert len(source) == 2 and image.shape == (3, 30, 40) and image.unique().tolist() == [5]
        assert corners.tolist() == [[2.5, 3, 12.5, 8.25], [0, 0, 1, 2], [0, 0, 1, 1]] and labels.tolist() == [1, 3, 2]
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
        assert [len(sample[2]) for sample in source.samples] == [0, 1, 0, 2][-len(names) :]

    def test_boxes_that_cannot_be_used_are_dropped_and_their_images_named(self, tmp_path):
        """Outside, of no area, not a number, too few: 002 to 005; 003 has another box too, 006 is beyond the limit."""
        bad = [[50, 5, 9, 9], [5, 5, 9, 0], [NAN, 5, 9, 9], [5, 5, 9], [5, 5, 0, 0]]
        boxes = [annotation(1, 1, [5, 5, 9, 9])] + [annotation(i, 1, bbox) for i, bbox in enumerate(bad, 2)]
        boxes.append(annotation(3, 13, [1, 2, 3, 4]))
        source = Coco(write_coco(tmp_path, [entry(i) for i in range(1, 7)], boxes), tmp_path, limit=5)
        assert source.dropped == ["002.png", "003.png", "004.png", "005.png"]
        assert [len(source.load(0, i)[1]) for i in range(5)] == [1, 0, 1, 0, 0]
        assert source.load(0, 2)[1].tolist() == [[1, 2, 4, 6]]

    def test_classes_without_a_box_are_named(self, tmp_path):
        boxes = [annotation(7, 13, [2, 3, 10, 5]), annotation(7, 90, [2, 3, 0, 0]), annotation(8, 1, [2, 3, 10, 5])]
        file = write_coco(tmp_path, [entry(7), entry(8)], boxes)
        assert Coco(file, tmp_path).unused == ["brush"]
        assert Coco(file, tmp_path, limit=1).unused == ["person", "brush"]

    def test_an_image_wider_than_high_is_wide(self, tmp_path):
        sizes = [(40, 30), (30, 40), (30, 30), (31, 30)]
        images = [entry(i, *size) for i, size in enumerate(sizes)]
        boxes = [annotation(i, 1, [2, 3, 10, 5]) for i in (1, 2, 3)]
        file = write_coco(tmp_path, images, boxes)
        assert Coco(file, tmp_path).wide == [True, False, False, True]
        assert Coco(file, tmp_path, keep_empty=False).wide == [False, False, True]


@pytest.mark.parametrize(
    ("bbox", "corners"),
    [
        ([2, 3, 10, 5], [2, 3, 12, 8]),
        ([0, 0, 40, 30], [0, 0, 40, 30]),
        ([-5, -5, 90, 90], [0, 0, 40, 30]),
        ([39.5, 29.25, 0.5, 0.75], [39.5, 29.25, 40, 30]),
    ],
)
def test_a_box_ends_at_the_border_of_an_image_of_40_x_30(bbox, corners):
    assert inside_image(bbox, 40, 30) == corners


OUTSIDE = [40, 3, 10, 5], [3, 30, 10, 5], [-10, 3, 10, 5], [3, -5, 10, 5]
WITHOUT_AREA = [2, 3, 0, 5], [2, 3, 10, 0], [12, 8, -10, -5], [20, 3, 1e-7, 5], [39.9999999, 3, 10, 5]
NO_NUMBERS = [NAN, 3, 10, 5], [2, 3, NAN, 5], [-INF, 3, INF, 5], [3, 3, INF, 5], [10**400, 3, 10, 5], [2, 3, None, 5]
NO_BOX = [], [2, 3, 10], [2, 3, 10, 5, 1], [2, 3, "ten", 5], [2, 3, [10], 5]


@pytest.mark.parametrize("bbox", [*OUTSIDE, *WITHOUT_AREA, *NO_NUMBERS, *NO_BOX], ids=str)
def test_nothing_is_left_of_a_box_that_cannot_be_used(bbox):
    assert inside_image(bbox, 40, 30) is None


def refused(folder, change, says):
    """Checks that a sound file is refused after a change of its data; the message names the file and what is wrong."""
    file = write_coco(folder, [entry(1)], [annotation(1, 1, [2, 3, 10, 5])])
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*{says}"):
        Coco(file, folder)


FIELDS = ("images id", "images file_name", "images width", "images height", "categories id", "categories name")
FIELDS += ("annotations image_id", "annotations category_id", "annotations bbox")


@pytest.mark.parametrize("field", FIELDS)
def test_an_entry_without_a_field_or_of_another_type_is_refused_by_name(tmp_path, field):
    key, name = field.split()
    refused(tmp_path, lambda data: data[key][0].pop(name), rf"entry 0 of {key} .*\b{name}\b")
    refused(tmp_path, lambda data: data[key][0].update({name: {}}), rf"entry 0 of {key} .*\b{name}\b")


@pytest.mark.parametrize(("name", "value"), [("id", 1), ("name", "person")])
def test_two_categories_of_one_id_or_name_are_refused(tmp_path, name, value):
    refused(tmp_path, lambda data: data["categories"][0].update({name: value}), f"categories .*{name}")


def test_a_missing_file_is_refused_with_the_layout_and_the_flags_wanted(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such file.*instances_train2017.json.*--train-json"):
        Coco(tmp_path / "none.json", tmp_path)


def write_layout(root, train_ids, val_ids, train_classes=SPARSE, val_classes=SPARSE):
    """COCO's own folders; an image of an even number has a box."""
    (root / "annotations").mkdir()
    for split, ids, classes in (("train", train_ids, train_classes), ("val", val_ids, val_classes)):
        (root / f"{split}2017").mkdir()
        boxes = [annotation(i, classes[0][0], [2, 3, 10, 5]) for i in ids if i % 2 == 0]
        file = write_coco(root / f"{split}2017", [entry(i) for i in ids], boxes, classes)
        file.rename(root / f"annotations/instances_{split}2017.json")
    return root


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
