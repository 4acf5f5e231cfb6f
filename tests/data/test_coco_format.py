"""COCO's format: what is read from a file, what is refused, and the two files of a data set."""

import json
import pickle
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from coco_sets import SPARSE, annotation, entry, results_of, write_coco

from tar import UserError
from tar.data.coco import FIELDS, Coco
from tar.data.datasets import load_dataset, load_test_set
from tar.data.file_names import find_images
from tar.data.loader import Samples
from tar.evaluation.average_precision import coco_metrics

NAN, INF = float("nan"), float("inf")
BOX = [2, 3, 10, 5]


def load(folder, boxes=((7, 1, BOX),), images=(7,), change=None, categories=SPARSE, **options):
    """The source of a file and its images.

    Args:
        boxes: annotations, or (image id, category id, box).
        images: ids.
        change: function that changes the file's data.
    """
    boxes = [box if isinstance(box, dict) else annotation(*box) for box in boxes]
    file = write_coco(folder, [entry(number) for number in images], boxes, categories)
    if change:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
    return Coco(file, folder, **options)


def refused(folder, says, **given):
    """Checks that a file is refused; the message names it and what is wrong."""
    with pytest.raises(UserError, match=f"^{re.escape(str(folder / 'set.json'))}: .*{says}"):
        load(folder, **given)


def test_an_image_has_its_own_boxes_as_corners_and_labels_in_the_order_of_the_ids(tmp_path):
    boxes = (5, 1, [2.5, 3, 10, 5.25]), (700, 13, [1, 1, 4, 4]), (5, 90, [0, 0, 1, 2]), (5, 13, [0, 0, 1, 1])
    source = load(tmp_path, boxes, (700, 5))
    image, corners, labels, _ = source.load(0, 1)
    assert source.classes == ("person", "sign", "brush") and source.image_ids.tolist() == [700, 5]
    assert image.shape == (3, 30, 40) and image.unique().tolist() == [5]
    assert corners.tolist() == [[2.5, 3, 12.5, 8.25], [0, 0, 1, 2], [0, 0, 1, 1]] and labels.tolist() == [1, 3, 2]
    assert (image.dtype, corners.dtype, labels.dtype) == (torch.uint8, torch.float32, torch.int64)
    assert source.load(0, 0)[1].tolist() == [[1, 1, 5, 5]]
    assert [(a["image_id"], a["category_id"]) for a in source.annotations()] == [(700, 2), (5, 1), (5, 3), (5, 2)]
    assert source.annotations()[1]["bbox"] == [2.5, 3, 10, 5.25]


def test_crowds_are_ignored(tmp_path):
    no, yes = [0, "0", False, None, "", "false", 0.0], [1, "1", True, "true", 2]
    boxes = [annotation(7, 1, [k, 3, 10, 5], iscrowd=value) for k, value in enumerate(no + yes)]
    source = load(tmp_path, [*boxes, (7, 1, [20, 3, 10, 5])])
    assert source.load(0, 0)[3].tolist() == [False] * 7 + [True] * 5 + [False]
    assert len(Samples(source, train=True)[0, 0][1]["boxes"]) == 8
    refused(tmp_path, "all 5 boxes are crowds", boxes=boxes[7:])


@pytest.mark.parametrize(("keep_empty", "ids"), [(False, [4]), (True, [1, 2, 3, 4])])
def test_images_without_a_box_that_counts(tmp_path, keep_empty, ids):
    """001 has none, 002 a crowd, 003 one of no area."""
    boxes = (3, 1, [5, 5, 0, 9]), (4, 1, [5, 5, 9, 9]), *(annotation(i, 1, [1, 1, 3, 3], iscrowd=1) for i in (2, 4))
    source = load(tmp_path, boxes, range(1, 5), keep_empty=keep_empty)
    assert source.image_ids.tolist() == ids and [*source.files] == [str(tmp_path / f"00{i}.png") for i in ids]
    assert [len(source.boxes_of(i)[0]) for i in range(len(source))] == [0, 1, 0, 2][-len(ids) :]


# Boxes [x, y, w, h] of an image of 40 x 30 pixels, the first four with their corners.
INSIDE = [([2, 3, 10, 5], [2, 3, 12, 8]), ([0, 0, 40, 30], [0, 0, 40, 30]), ([-5, -5, 90, 90], [0, 0, 40, 30])]
INSIDE.append(([39.5, 29.25, 0.5, 0.75], [39.5, 29.25, 40, 30]))
OUTSIDE = [40, 3, 10, 5], [3, 30, 10, 5], [-10, 3, 10, 5], [3, -5, 10, 5]
WITHOUT_AREA = [2, 3, 0, 5], [2, 3, 10, 0], [12, 8, -10, -5], [20, 3, 1e-7, 5], [39.9999999, 3, 10, 5]
NO_NUMBERS = [NAN, 3, 10, 5], [2, 3, NAN, 5], [3, 3, INF, 5], [10**400, 3, 10, 5], [2, 3, None, 5]
NO_BOX = [2, 3, 10], [[2, 3], [10, 5]], [2, 3, 10, 5, 1], [2, 3, "ten", 5], [2, 3, [10], 5]


def test_a_box_ends_at_the_border_and_one_that_cannot_be_used_is_dropped_and_counted(tmp_path):
    given, corners = zip(*INSIDE, strict=True)
    boxes = [(i, 1, box) for i, box in enumerate([*given, *OUTSIDE, *WITHOUT_AREA, *NO_NUMBERS, *NO_BOX])]
    source = load(tmp_path, boxes, range(len(boxes)))
    assert source.boxes.tolist() == list(corners) and len(source) == len(boxes)
    [note] = [note for note in source.notes if "no area or outside" in note]
    assert f": {len(boxes) - len(given)} ({source.name(0, len(given))}" in note
    assert any("classes without a box: sign, brush" in note for note in source.notes)


def test_an_entry_without_a_field_or_of_another_type_is_refused_by_name_and_value(tmp_path):
    for key, fields in FIELDS.items():
        for name in [name for name, kind in fields.items() if kind is not object]:
            for value, text in (None, "None"), ({1: 2}, "{.1.: 2}"):
                where = rf"entry 0 of {key}: {name} is {text}, not "
                refused(tmp_path, where, change=lambda data, new={name: value}, key=key: data[key][0].update(new))


def test_two_images_or_categories_of_one_id_and_a_missing_file_are_refused(tmp_path):
    refused(tmp_path, "two categories have the same id", change=lambda data: data["categories"][0].update(id=1))
    refused(tmp_path, "two images have the same id", images=(7, 7))
    with pytest.raises(UserError, match=r"none.json: .*No such file.*--data-path.*--train-json"):
        Coco(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize("width", [None, 0, -40, "forty", 10**400, [40], NAN, "40", 40.0], ids=str)
def test_a_size_that_is_none_is_the_image_files(tmp_path, width):
    source = load(tmp_path, change=lambda data: data["images"][0].update(width=width))
    assert source.sizes.tolist() == [[40, 30]] and source.load(0, 0)[1].tolist() == [[2, 3, 12, 8]]


@pytest.mark.parametrize(("form", "ids"), [("id-{}", [0, 1]), (" {}", [6, 5])])
def test_ids_that_are_words_are_evaluated_by_number_and_numbers_written_as_text_are_numbers(tmp_path, form, ids):
    def change(data):
        data["categories"][0]["id"] = float(data["categories"][0]["id"])
        for row in data["annotations"] + data["images"]:
            row.update({key: form.format(row[key]) for key in ("image_id", "id") if key in row})

    source = load(tmp_path, [(i, 1, [i, 3, 10, 5]) for i in (5, 6)], (6, 5), change)
    assert [(a["image_id"], a["bbox"][0]) for a in source.annotations()] == [(ids[0], 6), (ids[1], 5)]


POLYGON, POINTS = [2, 3, 12, 3, 12, 8.5], [[2, 3], [12, 3], [12, 8.5]]
POLYGONS = [POLYGON], [POLYGON[:2] * 3, POLYGON[4:] * 3], POLYGON, POINTS, [POINTS], [["2", "3", "12", "8.5"]]
NO_POLYGONS = [], None, {"counts": [0, 9], "size": [30, 40]}, [[1, 2, 3]], [[]], ["left"], 7


def test_a_missing_box_is_its_outlines_and_without_outline_it_is_refused(tmp_path):
    for outline, none in product(POLYGONS, (None, [])):
        assert load(tmp_path, [annotation(7, 1, none, segmentation=outline)]).boxes.tolist() == [[2, 3, 12, 8.5]]
    for outline in NO_POLYGONS:
        boxes = [annotation(7, 1, None, segmentation=outline)]
        refused(tmp_path, "entry 0 of annotations: bbox is None", boxes=boxes)


OUTLINES = [[1, 2.5, -3e-1]], [[1], [2, 3], []], [], {"counts": [1, 2], "size": [3, 4]}, [{"counts": "a]b"}]


@pytest.mark.parametrize("outline", [*OUTLINES, ["a]", "b"], 5, None, "[]"], ids=str)
def test_outlines_are_left_out_and_the_rest_stays(tmp_path, outline):
    """However the file is written: before other fields, after them, in one line or in many."""
    box, more = annotation(7, 1, BOX), {"segmentation": outline}
    boxes = [{**box, **more}, {**more, **box, "category_id": 13}, {**box, "category_id": 90}]
    file = write_coco(tmp_path, [entry(7)], boxes)
    data = json.loads(file.read_text())
    for style in {}, {"indent": 1}, {"separators": (",", ":")}:
        for annotations in boxes, boxes[1:] + boxes[:1]:
            file.write_text(json.dumps({**data, "annotations": annotations}, **style))
            assert sorted(Coco(file, tmp_path).labels) == [1, 2, 3]


def test_annotations_that_are_there_twice_are_used_once_and_others_as_they_are(tmp_path):
    """Two boxes alike but of other areas are two objects in a crowd; so are those of two classes."""
    one = annotation(7, 1, BOX, area=40, id=1)
    others = {**one, "area": 41, "id": 2}, {**one, "category_id": 13, "id": 3}, annotation(7, 1, [NAN, 3, 10, 5])
    source = load(tmp_path, [one, *others, {**one, "id": 5}, others[1], one])
    assert source.labels.tolist() == [1, 1, 2] and source.areas[:2].tolist() == [40, 41]
    assert source.notes[0].startswith(f"3 annotations of {tmp_path}/set.json are there twice")
    assert not any("twice" in note for note in load(tmp_path, [one, *others]).notes)


def test_of_two_categories_of_one_name_the_one_without_boxes_is_dropped(tmp_path):
    names = ((0, "sign"), (1, "person"), (13, " sign"))
    source = load(tmp_path, [(7, 13, BOX), (7, 1, [4, 3, 10, 5])], categories=names)
    assert source.classes == ("person", "sign") and source.labels.tolist() == [2, 1]
    assert any("category 0 is called sign" in note for note in source.notes)
    says = "categories 0 and 13 are both called sign, and both have"
    refused(tmp_path, says, boxes=[(7, 0, BOX), (7, 13, BOX)], categories=names)


def named(folder, *names, files):
    """The source of a file whose images have these names, of images that lie in a folder beside it."""
    file = write_coco(folder, [entry(i) for i in range(len(names))], [annotation(0, 1, BOX)])
    for place in files:
        (folder / "images" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "000.png", folder / "images" / place)
    data = json.loads(file.read_text())
    for row, name in zip(data["images"], names, strict=True):
        row["file_name"] = name
    file.write_text(json.dumps(data))
    return Coco(file, folder / "images")


FOUND = {  # file_name: where the image lies below the folder of images
    "x.png": "x.png",
    "./a/x.png": "a/x.png",
    "images/x.png": "x.png",
    "images\\x.png": "x.png",
    "C:\\data\\images\\a\\x.png": "a/x.png",
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
    source = named(tmp_path, name, files=[place])
    assert Path(source.name(0, 0)) == tmp_path / "images" / place and source.load(0, 0)[0].shape == (3, 30, 40)
    assert any("other names" in note for note in source.notes) == (Path(name) != Path(place))


def test_the_longest_end_of_a_name_decides_and_each_image_has_its_own_file(tmp_path):
    assert len(named(tmp_path, "y.png", "Y.PNG", files=["y.png", "sub/Y.PNG"])) == 2
    source = named(tmp_path, "old/cam1/x.png", "old\\cam0\\x.png", files=["cam0/x.png", "cam1/x.png", "x.png"])
    assert [*source.files] == [str(tmp_path / f"images/cam{i}/x.png") for i in (1, 0)]
    assert f"other names than {tmp_path}/set.json gives: 2 (old/cam1/x.png is {tmp_path}" in source.notes[0]


@pytest.mark.parametrize(
    ("names", "files", "says"),
    [
        (["x.png"], ["a/x.png", "b/x.png"], "'x.png' may be .*images/[ab]/x.png or .*images/[ab]/x.png"),
        (["old/x.png"], ["a/x.png", "b/x.png"], "old/x.png: no such image"),
        (["x.png"], ["images/x.png", "b/x.png"], "'x.png' may be"),
        (["a/x.png", "b/x.png"], ["x.png"], "a/x.png and b/x.png would both be .*images/x.png"),
        (["x.png", "b/x.png"], ["x.png"], "images/b/x.png: no such image"),
        (["y.png"], ["x.png"], "images/y.png: no such image"),
        (["\0.png"], ["x.png"], "no such image"),
        (["data:image/png;base64,AAAA"], ["x.png"], "file_name data:image/png;base64,AAAA... is an image as text"),
        (["A" * 5000], ["x.png"], "file_name A{40}... is an image as text"),
    ],
)
def test_a_file_name_that_fits_no_file_or_two_is_refused(tmp_path, names, files, says):
    with pytest.raises(UserError, match=says) as error:
        named(tmp_path, *names, files=files)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_file_of_another_folder_does_not_take_the_place_of_one_that_is_missing(tmp_path):
    """train/1.png is not there: val/1.png is another picture."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val/1.png").touch()
    for name, found in (("train/1.png", "train/1.png"), ("old/val/1.png", "val/1.png")):
        assert find_images([name], tmp_path, "x.json")[0] == [str(tmp_path / found)]


def test_a_set_to_train_on_is_a_few_arrays(tmp_path):
    """Loader processes copy lists. The arrays are 33 bytes a box, and 49 and 4 a character of its path an image."""
    source = load(tmp_path, [(k % 100, 1, [k / 100, 3, 10, 5]) for k in range(2000)], range(100), train=True)
    assert len(source.boxes) == 2000 and len(source) == 100
    assert len(pickle.dumps(source)) < 2000 * 33 + 100 * (49 + 4 * len(source.name(0, 0))) + 4000


@pytest.fixture
def root(tmp_path):
    """COCO's own folders; an image of an even number has a box. And a file of another folder: more/set.json."""
    sets = {"train2017": range(1, 9), "val2017": range(11, 16), "more": (21, 22)}
    for name, ids in sets.items():
        (tmp_path / name).mkdir()
        file = write_coco(tmp_path / name, [*map(entry, ids)], [annotation(i, 90, BOX) for i in ids if i % 2 == 0])
        if name != "more":
            (tmp_path / "annotations").mkdir(exist_ok=True)
            file.rename(tmp_path / f"annotations/instances_{name}.json")
    return tmp_path


def ids_of(*args, **given):
    return [source.image_ids.tolist() for source in load_dataset("coco", *args, **given)]


def test_empty_images_are_left_out_of_training_only_and_limits_count_the_rest(root):
    assert ids_of(root) == [[2, 4, 6, 8], [11, 12, 13, 14, 15]]
    assert ids_of(root, keep_empty=True) == [[*range(1, 9)], [11, 12, 13, 14, 15]]
    assert ids_of(root, limit_train=3, limit_test=2) == [[2, 4, 6], [11, 12]]
    assert load_test_set("coco", ("person", "sign", "brush"), root, limit=4).image_ids.tolist() == [11, 12, 13, 14]


def test_given_files_stand_in_for_the_layouts_and_their_images_lie_in_their_folder(root):
    more = root / "more/set.json"
    for folder in more.parent, None:
        assert ids_of(root, files=(more, folder, None, None)) == [[22], [11, 12, 13, 14, 15]]
        assert ids_of(root, files=(None, None, str(more), folder)) == [[2, 4, 6, 8], [21, 22]]
    test = load_test_set("coco", ("person", "sign", "brush"), root, files=(None, None, more, None))
    assert test.load(0, 1)[0].unique().tolist() == [22] and Path(test.name(0, 1)).parent == more.parent


def test_a_test_file_of_other_classes_is_refused_by_name(root):
    file = root / "annotations/instances_val2017.json"
    file.write_text(file.read_text().replace("brush", "cup"))
    for load_sources, known in ((load_dataset, {}), (load_test_set, {"classes": ["person", "sign", "brush"]})):
        with pytest.raises(UserError, match=f"^{re.escape(str(file))}: .*trained on: .* cup, and does not list brush$"):
            load_sources("coco", data_path=root, **known)


def classes_of(folder, names, boxed, **given):
    """A test source of categories 1, 2, ... with these names, the first ones with a box each."""
    boxes = [(7, i, [2 + i, 3, 10, 5]) for i in range(1, boxed + 1)]
    return load(folder, boxes, categories=[*enumerate(names, 1)], **given)


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
    given = {"names": ("sign", "cup", "jar"), "classes": ("person", "sign")}
    source = classes_of(tmp_path, boxed=1, **given)
    assert source.labels.tolist() == [2]
    for what in "does not list person", "lists cup, jar without a box":
        assert any(what in note for note in source.notes)
    with pytest.raises(UserError, match=r"set.json: its categories.* it has boxes of cup, and does not list person$"):
        classes_of(tmp_path, boxed=2, **given)
