"""COCO's format: what is read from a file, what is refused, and the two files of a data set."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from coco_sets import SPARSE, annotation, edit_json, entry, results_of, write_coco
from large_coco import CROWDS, write_large

from tar import UserError
from tar.data.coco import Coco
from tar.data.datasets import load_dataset, load_test_set
from tar.data.file_names import FileNames, find_images
from tar.data.loader import Samples
from tar.evaluation.average_precision import coco_metrics

NAN, INF = float("nan"), float("inf")


def test_an_image_has_its_own_boxes_as_corners_and_labels_in_the_order_of_the_ids(tmp_path):
    rows = (5, 1, [2.5, 3, 10, 5.25]), (700, 13, [1, 1, 4, 4]), (5, 90, [0, 0, 1, 2]), (5, 13, [0, 0, 1, 1])
    boxes = [annotation(*row) for row in rows]
    source = Coco(write_coco(tmp_path, [entry(700, 20, 10), entry(5)], boxes), tmp_path)
    assert source.classes == ("person", "sign", "brush")
    image, corners, labels, _ = source.load(0, 1)
    assert len(source) == 2 and image.shape == (3, 30, 40) and image.unique().tolist() == [5]
    assert corners.tolist() == [[2.5, 3, 12.5, 8.25], [0, 0, 1, 2], [0, 0, 1, 1]] and labels.tolist() == [1, 3, 2]
    assert (image.dtype, corners.dtype, labels.dtype) == (torch.uint8, torch.float32, torch.int64)
    assert source.load(0, 0)[1].tolist() == [[1, 1, 5, 5]]
    assert [(a["image_id"], a["category_id"]) for a in source.annotations()] == [(700, 2), (5, 1), (5, 3), (5, 2)]
    assert source.annotations()[1]["bbox"] == [2.5, 3, 10, 5.25]


def test_crowds_are_ignored(tmp_path):
    values = {False: [0, "0", False, None, "", "false", 0.0], True: [1, "1", True, "true", 1.0]}
    given = [(value, crowd) for crowd, words in values.items() for value in words]
    boxes = [annotation(7, 1, [k, 3, 10, 5], iscrowd=value) for k, (value, _) in enumerate(given)]
    source = Coco(write_coco(tmp_path, [entry(7)], [*boxes, annotation(7, 1, [20, 3, 10, 5])]), tmp_path)
    assert source.load(0, 0)[3].tolist() == [crowd for _, crowd in given] + [False]
    assert len(Samples(source, train=True)[0, 0][1]["boxes"]) == 8
    file = write_coco(tmp_path, [entry(7)], [annotation(7, 1, [k, 3, 10, 5], iscrowd="1") for k in range(3)])
    with pytest.raises(UserError, match=r"set.json: all 3 boxes are crowds"):
        Coco(file, tmp_path)


@pytest.mark.parametrize(("keep_empty", "ids"), [(False, [4]), (True, [1, 2, 3, 4])])
def test_images_without_a_box_that_counts(tmp_path, keep_empty, ids):
    """001 has none, 002 a crowd, 003 one of no area; 001 and 004 are wide."""
    rows = (2, [5, 5, 9, 9], 1), (3, [5, 5, 0, 9], 0), (4, [5, 5, 9, 9], 0), (4, [1, 1, 3, 3], 1)
    boxes = [annotation(number, 1, bbox, iscrowd=crowd) for number, bbox, crowd in rows]
    images = [entry(i, *size) for i, size in enumerate([(40, 30), (30, 40), (30, 30), (31, 30)], 1)]
    source = Coco(write_coco(tmp_path, images, boxes), tmp_path, keep_empty)
    assert source.image_ids.tolist() == ids and [*source.files] == [str(tmp_path / f"00{i}.png") for i in ids]
    assert [len(source.boxes_of(i)[0]) for i in range(len(source))] == [0, 1, 0, 2][-len(ids) :]
    assert source.wide == [True, False, False, True][-len(ids) :]


def test_boxes_that_cannot_be_used_are_dropped_and_their_images_named(tmp_path):
    """Those of 002 to 005; 003 has another box too, 006 is beyond the limit."""
    bad = [[50, 5, 9, 9], [5, 5, 9, 0], [NAN, 5, 9, 9], [5, 5, 9], [5, 5, 0, 0]]
    boxes = [annotation(1, 1, [5, 5, 9, 9])] + [annotation(i, 1, bbox) for i, bbox in enumerate(bad, 2)]
    boxes += [annotation(3, 13, [1, 2, 3, 4]), annotation(6, 90, [1, 2, 3, 4])]
    file = write_coco(tmp_path, [entry(i) for i in range(1, 7)], boxes)
    source = Coco(file, tmp_path, limit=5)
    assert source.dropped == [str(tmp_path / f"00{i}.png") for i in (2, 3, 4, 5)]
    assert [len(source.load(0, i)[1]) for i in range(5)] == [1, 0, 1, 0, 0]
    assert source.load(0, 2)[1].tolist() == [[1, 2, 4, 6]]
    assert source.unused == ["brush"] and Coco(file, tmp_path).unused == []


# Boxes [x, y, w, h] of an image of 40 x 30 pixels, the first four with their corners.
INSIDE = [([2, 3, 10, 5], [2, 3, 12, 8]), ([0, 0, 40, 30], [0, 0, 40, 30]), ([-5, -5, 90, 90], [0, 0, 40, 30])]
INSIDE.append(([39.5, 29.25, 0.5, 0.75], [39.5, 29.25, 40, 30]))
OUTSIDE = [40, 3, 10, 5], [3, 30, 10, 5], [-10, 3, 10, 5], [3, -5, 10, 5]
WITHOUT_AREA = [2, 3, 0, 5], [2, 3, 10, 0], [12, 8, -10, -5], [20, 3, 1e-7, 5], [39.9999999, 3, 10, 5]
NO_NUMBERS = [NAN, 3, 10, 5], [2, 3, NAN, 5], [-INF, 3, INF, 5], [3, 3, INF, 5], [10**400, 3, 10, 5], [2, 3, None, 5]
NO_BOX = [2, 3, 10], [2, 3, 10, 5, 1], [2, 3, "ten", 5], [2, 3, [10], 5]


def test_a_box_ends_at_the_border_and_nothing_is_left_of_one_that_cannot_be_used(tmp_path):
    given, corners = zip(*INSIDE, strict=True)
    boxes = [*given, *OUTSIDE, *WITHOUT_AREA, *NO_NUMBERS, *NO_BOX]
    boxes = [annotation(i, 1, bbox) for i, bbox in enumerate(boxes)]
    source = Coco(write_coco(tmp_path, [entry(a["image_id"]) for a in boxes], boxes), tmp_path)
    assert source.boxes.tolist() == list(corners) and source.dropped == [*source.files][len(given) :]


def spoilt(folder, change):
    """A sound file of one image and one box after a change of its data."""
    return edit_json(write_coco(folder, [entry(1)], [annotation(1, 1, [2, 3, 10, 5])]), change)


def refused(file, says):
    """Checks that a file is refused; the message names it and what is wrong."""
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*{says}"):
        Coco(file, file.parent)


FIELDS = "images id, images file_name, annotations image_id, annotations category_id, annotations bbox"


@pytest.mark.parametrize("field", f"{FIELDS}, categories id, categories name".split(", "))
def test_an_entry_without_a_field_or_of_another_type_is_refused_by_name_and_value(tmp_path, field):
    key, name = field.split()
    refused(spoilt(tmp_path, lambda data: data[key][0].pop(name)), rf"entry 0 of {key}: {name} is None, not ")
    refused(spoilt(tmp_path, lambda data: data[key][0].update({name: {}})), rf"entry 0 of {key}: {name} is {{}}, not ")


def test_two_images_or_categories_of_one_id_and_a_missing_file_are_refused(tmp_path):
    refused(spoilt(tmp_path, lambda data: data["categories"][0].update(id="1")), "two categories have the same id")
    refused(spoilt(tmp_path, lambda data: data["images"].append(data["images"][0])), "two images have the same id")
    with pytest.raises(UserError, match=r"none.json: .*No such file.*--data-path.*--train-json"):
        Coco(tmp_path / "none.json", tmp_path)


NO_SIZES = {}, {"width": None}, {"height": 0}, {"width": -40}, {"width": "forty"}, {"width": 10**400}, {"height": [30]}


@pytest.mark.parametrize(
    "size", [*NO_SIZES, {"width": "40", "height": "30"}, {"width": 40.0}, {"height": NAN}], ids=str
)
def test_a_size_that_is_none_is_the_image_files(tmp_path, size):
    def change(data):
        del data["images"][0]["width"]
        data["images"][0].update(size)

    source = Coco(spoilt(tmp_path, change), tmp_path)
    assert source.sizes.tolist() == [[40, 30]] and source.load(0, 0)[1].tolist() == [[2, 3, 12, 8]]


@pytest.mark.parametrize(
    "other", [str, float, lambda i: f" {i}", lambda i: f"{i:05d}"], ids=["1", "1.0", " 1", "00001"]
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_id_is_the_same_number_as_a_text_or_float(tmp_path, other, everywhere):
    boxes = [annotation(5, 13, [2, 3, 10, 5]), annotation(6, 1, [4, 3, 10, 5])]
    file = write_coco(tmp_path, [entry(6), entry(5)], boxes)

    def change(data):
        keys = ["image_id", "category_id"] + ["id"] * everywhere
        for row in data["annotations"] + data["images"] + data["categories"]:
            row.update({key: other(row[key]) for key in keys if key in row})

    source = Coco(edit_json(file, change), tmp_path)
    assert source.image_ids.tolist() == [6, 5] and source.classes == ("person", "sign", "brush")
    assert source.boxes[:, 0].tolist() == [4, 2] and source.labels.tolist() == [1, 2]


def test_ids_that_are_words_are_used_and_evaluated_by_number(tmp_path):
    boxes = [annotation(i, 1, [i, 3, 10, 5]) for i in (5, 6)]
    file = write_coco(tmp_path, [entry(6), entry(5)], boxes)

    def change(data):
        for key, rows in (("id", data["images"]), ("image_id", data["annotations"])):
            for row in rows:
                row[key] = f"image-{row[key]}"

    source = Coco(edit_json(file, change), tmp_path)
    assert [(a["image_id"], a["bbox"][0]) for a in source.annotations()] == [(0, 6), (1, 5)]


@pytest.mark.parametrize("none", [{}, {"bbox": None}, {"bbox": []}], ids=["missing", "null", "empty"])
@pytest.mark.parametrize(
    "outline",
    [
        [[2, 3, 12, 3, 12, 8.5, 2, 8.5]],
        [[2, 3, 5, 5, 4, 4], [12, 8.5, 7, 7, 6, 6]],
        [2, 3, 12, 3, 12, 8.5],
        [[2, 3], [12, 3], [12, 8.5]],
        [[[2, 3], [12, 3], [12, 8.5]]],
        [["2", "3", "12", "8.5", "4", "4"]],
    ],
    ids=str,
)
def test_a_missing_box_is_its_outlines(tmp_path, none, outline):
    def change(data):
        del data["annotations"][0]["bbox"]
        data["annotations"][0].update({**none, "segmentation": outline})

    assert Coco(spoilt(tmp_path, change), tmp_path).boxes.tolist() == [[2, 3, 12, 8.5]]


@pytest.mark.parametrize("outline", [[], None, {"counts": [0, 9], "size": [30, 40]}, [[1, 2, 3]], ["left"], 7], ids=str)
def test_neither_box_nor_outline_is_refused(tmp_path, outline):
    def change(data):
        data["annotations"][0].update(bbox=None, segmentation=outline)

    refused(spoilt(tmp_path, change), "entry 0 of annotations: bbox is None")


def test_annotations_that_are_there_twice_are_used_once_and_others_as_they_are(tmp_path):
    """Two boxes alike but of other areas are two objects in a crowd; so are those of two classes."""
    one = annotation(7, 1, [2, 3, 10, 5], area=40, id=1)
    others = [
        {**one, "area": 41, "id": 2},
        {**one, "category_id": 13, "id": 3},
        annotation(7, 1, [NAN, 3, 10, 5], id=4),
    ]
    source = Coco(write_coco(tmp_path, [entry(7)], [one, *others, {**one, "id": 5}, others[1], one]), tmp_path)
    assert source.labels.tolist() == [1, 1, 2] and source.areas[:2].tolist() == [40, 41]
    assert source.notes[0].startswith(f"3 annotations of {tmp_path}/set.json are there twice")
    assert not any("twice" in note for note in Coco(write_coco(tmp_path, [entry(7)], [one, *others]), tmp_path).notes)


def test_of_two_categories_of_one_name_the_one_without_boxes_is_dropped(tmp_path):
    names = ((0, "sign"), (1, "person"), (13, " sign"))
    file = write_coco(tmp_path, [entry(7)], [annotation(7, 13, [2, 3, 10, 5]), annotation(7, 1, [4, 3, 10, 5])], names)
    source = Coco(file, tmp_path)
    assert source.classes == ("person", "sign") and source.labels.tolist() == [2, 1]
    assert [note for note in source.notes if "category 0 is called sign" in note]
    boxes = [annotation(7, i, [2, 3, 10, 5]) for i in (0, 13)]
    refused(write_coco(tmp_path, [entry(7)], boxes, names), "categories 0 and 13 are both called sign, and both have")


def named(folder, *names, files):
    """A file whose images have these names, and images in a folder beside it."""
    file = write_coco(
        folder, [entry(i) for i in range(len(names))], [annotation(i, 1, [2, 3, 10, 5]) for i in (0, 1)][: len(names)]
    )
    for place in files:
        (folder / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "000.png", folder / "images" / place)
    return edit_json(file, lambda data: [row.update(file_name=n) for row, n in zip(data["images"], names, strict=True)])


FOUND = {  # file_name: where the image lies below the folder of images
    "x.png": "x.png",
    "a/x.png": "a/x.png",
    "./a/x.png": "a/x.png",
    "images/x.png": "x.png",
    "images\\x.png": "x.png",
    "C:\\data\\images\\a\\x.png": "a/x.png",
    "a\\x.png": "a/x.png",
    "/data/upload/1/x.png": "x.png",
    "/data/local-files/?d=images/1/x.png": "1/x.png",
    "https://example.org/images/x.png": "x.png",
    "images/a%20b.png": "a b.png",
    "a b%2Bc.png": "a b+c.png",
    "a%20b.png": "a%20b.png",
    "X.PNG": "x.png",
    "caf\u00e9.png": "cafe\u0301.png",
    "x.png ": "deep/er/x.png ",
}


@pytest.mark.parametrize(("name", "place"), FOUND.items())
def test_a_file_name_finds_the_one_file_that_fits(tmp_path, name, place):
    source = Coco(named(tmp_path, name, files=[place]), tmp_path / "images")
    assert source.load(0, 0)[0].shape == (3, 30, 40)
    assert Path(source.name(0, 0)) == tmp_path / "images" / place
    assert len(source.notes) - sum("without a box" in note for note in source.notes) == (Path(name) != Path(place))


def test_the_longest_end_of_a_name_decides_and_each_image_has_its_own_file(tmp_path):
    places = ["cam0/x.png", "cam1/x.png"]
    source = Coco(named(tmp_path, "old/cam1/x.png", "old\\cam0\\x.png", files=places), tmp_path / "images")
    assert [str(Path(file).relative_to(tmp_path / "images")) for file in source.files] == places[::-1]
    assert (
        f"2 images lie under other names than {tmp_path}/set.json gives: old/cam1/x.png is {tmp_path}"
        in source.notes[0]
    )


@pytest.mark.parametrize(
    ("names", "files", "says"),
    [
        (["old/x.png"], ["a/x.png", "b/x.png"], "old/x.png may be .*images/a/x.png or .*images/b/x.png"),
        (["old/x.png"], ["x.png", "a/x.png"], "old/x.png may be .*images/x.png or .*images/a/x.png"),
        (["a/x.png", "b/x.png"], ["x.png"], "a/x.png and b/x.png would both be .*images/x.png"),
        (["x.png", "b/x.png"], ["x.png"], "b/x.png: no such image"),
        (["y.png"], ["x.png"], "images/y.png: no such image"),
        (["\0.png"], ["x.png"], "no such image"),
        (["data:image/png;base64,AAAA"], ["x.png"], "file_name data:image/png;base64,AAAA... is an image as text"),
        (["A" * 5000], ["x.png"], "file_name A{40}... is an image as text"),
    ],
)
def test_a_file_name_that_fits_no_file_or_two_is_refused(tmp_path, names, files, says):
    with pytest.raises(UserError, match=says) as error:
        Coco(named(tmp_path, *names, files=files), tmp_path / "images")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_file_names_are_kept_as_bytes(tmp_path):
    names = ["/a/b.png", "", "caf\u00e9.png", "\udcff.png"]
    kept = FileNames(names)
    assert [*kept] == names and len(kept) == 4 and kept[-1] == names[-1]
    with pytest.raises(IndexError):
        kept[4]


def test_a_set_to_train_on_is_a_few_arrays(tmp_path):
    """Loader processes copy lists. The arrays are 33 bytes a box, and 49 and its path an image."""
    file, folder = write_large(tmp_path, "train", 300, 2000)
    source = Coco(file, folder, train=True)
    assert (len(source), len(source.boxes), source.ignored.sum()) == (300, 2000, -(-2000 // CROWDS))
    assert len(pickle.dumps(source)) < 2000 * 33 + 300 * (49 + len(str(folder)) + 17) + 4000
    assert Coco(file, folder).areas.shape == (2000,)


OUTLINES = (
    [[1, 2.5, -3e-1]],
    [[1], [2, 3], []],
    [],
    {"counts": [1, 2], "size": [3, 4]},
    [{"counts": "a]b", "size": [3]}],
)


@pytest.mark.parametrize("outline", [*OUTLINES, ["a]", "b"], 5, None, "[]"], ids=str)
def test_outlines_are_left_out_and_the_rest_stays(tmp_path, outline):
    """However the file is written: before other fields, after them, in one line or in many."""
    box, more = annotation(7, 1, [2, 3, 10, 5]), {"segmentation": outline}
    boxes = [{**box, **more}, {**more, **box, "category_id": 13}, {**box, "category_id": 90}]
    file = write_coco(tmp_path, [entry(7)], boxes)
    data = json.loads(file.read_text())
    for style in {}, {"indent": 1}, {"separators": (",", ":")}:
        for annotations in boxes, boxes[1:] + boxes[:1]:
            file.write_text(json.dumps({**data, "annotations": annotations}, **style))
            assert sorted(Coco(file, tmp_path).labels) == [1, 2, 3]


def write_layout(root, train_ids, val_ids, train_classes=SPARSE, val_classes=SPARSE):
    """COCO's own folders; an image of an even number has a box."""
    (root / "annotations").mkdir()
    for split, ids, classes in (("train", train_ids, train_classes), ("val", val_ids, val_classes)):
        (root / f"{split}2017").mkdir()
        boxes = [annotation(i, classes[0][0], [2, 3, 10, 5]) for i in ids if i % 2 == 0]
        file = write_coco(root / f"{split}2017", [entry(i) for i in ids], boxes, classes)
        file.rename(root / f"annotations/instances_{split}2017.json")
    return root


def ids_of(name, *args, **given):
    return [source.image_ids.tolist() for source in load_dataset(name, *args, **given)]


def test_empty_images_are_left_out_of_training_only_and_limits_count_the_rest(tmp_path):
    root = write_layout(tmp_path, range(1, 9), range(11, 16))
    assert ids_of("coco", root) == [[2, 4, 6, 8], [11, 12, 13, 14, 15]]
    assert ids_of("coco", root, keep_empty=True) == [[*range(1, 9)], [11, 12, 13, 14, 15]]
    assert ids_of("coco", root, limit_train=3, limit_test=2) == [[2, 4, 6], [11, 12]]
    assert load_test_set("coco", ("person", "sign", "brush"), root, limit=4).image_ids.tolist() == [11, 12, 13, 14]


def test_given_files_stand_in_for_the_layouts(tmp_path):
    root = write_layout(tmp_path, (2, 4), (11,))
    (tmp_path / "more").mkdir()
    more = write_coco(tmp_path / "more", [entry(i) for i in (21, 22)], [annotation(22, 1, [2, 3, 10, 5])])
    assert ids_of("coco", root, files=(more, more.parent, None, None)) == [[22], [11]]
    files = (None, None, more, more.parent)
    assert ids_of("coco", root, files=files) == [[2, 4], [21, 22]]
    test = load_test_set("coco", ("person", "sign", "brush"), root, files=files)
    assert test.load(0, 1)[0].unique().tolist() == [22] and Path(test.name(0, 1)).parent == more.parent


def test_the_images_of_a_given_file_lie_in_its_folder(tmp_path, monkeypatch):
    root = write_layout(tmp_path, (2, 4), (11,))
    (tmp_path / "more").mkdir()
    more = write_coco(tmp_path / "more", [entry(i) for i in (21, 22)], [annotation(22, 1, [2, 3, 10, 5])])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ids_of("coco", root, files=(more, None, "~/more/set.json", None)) == [[22], [21, 22]]
    assert ids_of("coco", "~") == [[2, 4], [11]]


def classes_of(folder, names, boxes_of, **given):
    """A test source of categories 1, 2, ... with these names, the first ones with a box each."""
    boxes = [annotation(7, i, [2 + i, 3, 10, 5]) for i in range(1, boxes_of + 1)]
    return Coco(write_coco(folder, [entry(7)], boxes, [*enumerate(names, 1)]), folder, **given)


def test_classes_are_matched_by_name_and_each_has_its_own_figures(tmp_path):
    """The test file numbers them otherwise, and spells them with spaces and in another Unicode form."""
    trained = ("caf\u00e9", "disc", "traffic light")
    source = classes_of(tmp_path, ("disc ", "cafe\u0301", " traffic  light"), 2, classes=trained)
    assert source.classes == trained and source.labels.tolist() == [2, 1]
    found = results_of(source, [])
    found[0] |= {"boxes": source.boxes[:1], "labels": source.labels[:1], "scores": source.boxes[:1, 0]}
    figures = coco_metrics(found, trained, source)["per_class"]
    assert [figures[name]["AP"] for name in trained] == pytest.approx([0, 100, None])


def test_a_class_that_one_file_has_is_said_and_refused_with_boxes(tmp_path):
    source = classes_of(tmp_path, ("sign", "cup", "jar"), 1, classes=("person", "sign"))
    assert source.labels.tolist() == [2]
    assert any("does not list person" in note for note in source.notes)
    assert any("lists cup, jar without a box" in note for note in source.notes)
    says = "set.json: its categories are not those trained on: it has boxes of cup, and does not list person$"
    with pytest.raises(UserError, match=says):
        classes_of(tmp_path, ("sign", "cup", "jar"), 2, classes=("person", "sign"))


def test_a_line_holds_ten_names_at_most(tmp_path):
    names = [f"class {i}" for i in range(1203)]
    for classes, boxes in ((names, 0), (["class 1"], 0), (["class 1"], 1)):
        try:
            lines = classes_of(tmp_path, names if len(classes) == 1 else ["class 1"], boxes, classes=classes).notes
        except UserError as error:
            lines = [str(error)]
        assert max(len(re.findall(r"class \d+", line)) for line in lines) == (10 if boxes == 0 else 1)


def test_a_test_file_of_other_classes_is_refused_by_name(tmp_path):
    root = write_layout(tmp_path, (2,), (12,), SPARSE, ((90, "cup"), (1, "person"), (13, "sign")))
    file = root / "annotations/instances_val2017.json"
    for load, known in ((load_dataset, {}), (load_test_set, {"classes": ["person", "sign", "brush"]})):
        with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*trained on: .* cup, and does not list brush$"):
            load("coco", data_path=root, **known)


def test_a_file_of_another_folder_does_not_take_the_place_of_one_that_is_missing(tmp_path):
    """train/1.png is not there: val/1.png is another picture."""
    assert find_images(["train/1.png"], tmp_path, "x.json") == ([str(tmp_path / "train/1.png")], [])
    (tmp_path / "val").mkdir()
    (tmp_path / "val/1.png").touch()
    assert find_images(["train/1.png"], tmp_path, "x.json")[0] == [str(tmp_path / "train/1.png")]
    assert find_images(["old/val/1.png"], tmp_path, "x.json")[0] == [str(tmp_path / "val/1.png")]
