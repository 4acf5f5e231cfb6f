"""Folders in PASCAL VOC's layout: what is read from them, what is refused, and the download."""

import re
import shutil
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from tar import UserError
from tar.data.datasets import load_dataset, load_test_set
from tar.data.voc import VOC_CLASSES

CAT = ("cat", (3, 5, 10, 20), 0)  # name; xmin, ymin, xmax, ymax as VOC counts; difficult


def write_image(folder, name, objects=(CAT,)):
    """One image of 40 x 30 pixels of one grey level, and its annotation."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (int(name[0]),) * 3).save(folder / f"JPEGImages/{name}.jpg", quality=95)
    text = "<annotation><size><width>40</width><height>30</height></size>"
    for label, corners, difficult in objects:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "<bndbox>" + "".join(f"<{side}>{value}</{side}>" for side, value in sides) + "</bndbox>"
        part = f"<part><name>head</name>{box}</part>"
        text += f"<object><name>{label}</name><difficult>{difficult}</difficult>{box}{part}</object>"
    (folder / f"Annotations/{name}.xml").write_text(text + "</annotation>")


def write_lists(folder, **lists):
    """Lists of image names by split, and the images that are not there yet."""
    for split, names in lists.items():
        for name in names:
            if not (folder / f"JPEGImages/{name}.jpg").exists():
                write_image(folder, name)
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))


def names_of(source):
    return [Path(file).stem for file in source.files]


@pytest.fixture
def folder(tmp_path):
    """Image 1 to train on, 2 to test on."""
    write_lists(tmp_path, trainval=["1"], test=["2"])
    return tmp_path


def test_boxes_become_continuous_and_end_at_the_border(folder):
    write_image(folder, "1", [CAT, ("dog", (1, 1, 40, 30), 1), ("cat", (0, -4, 45, 31), 0)])
    source, _ = load_dataset("voc", folder)
    image, boxes, labels, ignored = source.load(0, 0)
    assert len(source) == 1 and source.wide == [True] and source.sizes.tolist() == [[40, 30]]
    assert boxes.tolist() == [[2, 4, 10, 20], [0, 0, 40, 30], [0, 0, 40, 30]] and boxes.dtype == torch.float32
    assert [VOC_CLASSES[i - 1] for i in labels] == ["cat", "dog", "cat"] and labels.dtype == torch.int64
    assert ignored.tolist() == [False, True, False]
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8 and abs(image.float() - 1).max() <= 2


def test_corners_are_put_in_order_one_pixel_is_a_box_and_what_lies_outside_is_dropped_and_named(folder):
    objects = [("dog", (9, 25, 5, 20), 1), CAT, ("dog", (7, 7, 7, 7), 0), ("cow", (50, 5, 60, 20), 0)]
    write_image(folder, "1", [*objects, ("cow", ("nan", 1, 2, 3), 0)])
    source, _ = load_dataset("voc", folder)
    _, boxes, labels, ignored = source.load(0, 0)
    assert boxes.tolist() == [[4, 19, 9, 25], [2, 4, 10, 20], [6, 6, 7, 7]]
    assert [VOC_CLASSES[i - 1] for i in labels] == ["dog", "cat", "dog"] and ignored.tolist() == [True, False, False]
    dropped = f"no area or outside.*: 1 .{folder}/JPEGImages/1.jpg"
    for what in ("corners are exchanged.*: 1 ", "beyond the image.*: 1 ", dropped, "without a box: .* cow"):
        assert any(re.search(what, note) for note in source.notes), what


@pytest.mark.parametrize(
    ("entry", "files", "found"),
    [
        ("1", ["1.png"], "1.png"),
        ("1.jpg", ["1.JPG"], "1.JPG"),
        ("1.jpg", ["1.png"], "1.png"),
        ("1.png", ["1.png", "1.jpg"], "1.png"),
        ("my photo 1", ["my photo 1.jpg", "my photo.jpg"], "my photo 1.jpg"),
        ("my photo 1  -1", ["my photo 1.jpg"], "my photo 1.jpg"),
        ("a.b", ["a.b.jpg", "a.jpg"], "a.b.jpg"),
        ("1.png", ["1.png.jpg"], "1.png.jpg"),
        ("1", ["1.png", "1.jpg", "from the XML.jpg"], "'1' may be .*1.(jpg|png) or .*1.(jpg|png)"),
        ("./1", ["1.jpg", "1 1.jpg"], "1.jpg"),
        ("/old/VOC2007/JPEGImages/1.jpg", ["1.jpg"], "1.jpg"),
        (r"JPEGImages\1.jpg", ["1.jpg"], "1.jpg"),
        ("x/1", ["x/1.jpg", "y/1.jpg"], "x/1.jpg"),
        ("1", ["1.jpg", "y/1.jpg"], "1.jpg"),
        ("1", ["y/1.jpg"], "y/1.jpg"),
        ("1", ["1.txt", "1.webp"], "1.webp"),
        ("1", ["from the XML.jpg"], "from the XML.jpg"),
        ("1", ["2.png"], "no image '1'"),
        ("cam2/1", ["cam1/1.jpg"], "no image 'cam2/1'"),  # another picture
    ],
)
def test_which_file_an_entry_of_a_list_means(folder, entry, files, found):
    """found: the file, or what the refusal says."""
    shutil.rmtree(folder / "JPEGImages")
    for file in files:
        place = folder / "JPEGImages" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(place, "PNG")
    stem = re.sub(r"\.(jpg|png)$|  -1$|.*[\\/]", "", re.sub(r".*[\\/]", "", entry))
    xml = (folder / "Annotations/2.xml").read_text().replace("<size>", "<filename>from the XML.jpg</filename><size>")
    (folder / f"Annotations/{stem}.xml").write_text(xml)
    for split in ("trainval", "test"):
        (folder / f"ImageSets/Main/{split}.txt").write_text(entry + "\n")
    if found in files:
        source = load_dataset("voc", folder)[0]
        assert source.files.tolist() == [str(folder / "JPEGImages" / found)] and len(source.boxes) == 1
    else:
        with pytest.raises(UserError, match=found):
            load_dataset("voc", folder)


def test_all_images_that_are_missing_are_counted(folder):
    (folder / "ImageSets/Main/trainval.txt").write_text("a\n1\nb\nc\n")
    with pytest.raises(UserError, match=r"no image 'a' \(and 2 more: 'b', 'c'\), but .*trainval.txt lists it"):
        load_dataset("voc", folder)


def test_the_image_that_the_xml_names_and_an_xml_with_two_suffixes_are_used(folder):
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages/1.png")
    text = (folder / "Annotations/1.xml").read_text()
    (folder / "Annotations/1.xml").unlink()
    (folder / "Annotations/1.jpg.xml").write_text(text.replace("<size>", "<filename>1.png</filename><size>"))
    (folder / "ImageSets/Main/trainval.txt").write_text("1\n2 cat 3\n")
    source, _ = load_dataset("voc", folder)
    assert source.files.tolist() == [str(folder / f"JPEGImages/{name}") for name in ("1.png", "2.jpg")]
    assert len(source.boxes) == 2
    (folder / "JPEGImages/1.png").unlink()
    shutil.rmtree(folder / "Annotations")
    with pytest.raises(UserError, match="no box to train on"):  # the images are there
        load_dataset("voc", folder)


@pytest.mark.parametrize("encoding", ["gb2312", "shift_jis", "cp1252", "koi8-r", "utf-8-sig", "utf-16", "utf8"])
def test_xml_in_any_encoding(folder, encoding):
    name = {"gb2312": "\u732b", "shift_jis": "\u732b", "koi8-r": "\u043a\u043e\u0442"}.get(encoding, "\xe9t\xe9")
    file = folder / "Annotations/1.xml"
    text = f"<?xml version='1.0' encoding='{encoding.removesuffix('-sig')}'?>" + file.read_text().replace("cat", name)
    file.write_bytes(text.encode(encoding))
    assert name in load_dataset("voc", folder)[0].classes


def test_words_for_difficult(folder):
    words = ["1", "True", " yes ", "0", "false", "no", "", "Unspecified"]
    write_image(folder, "1", [("cat", (1, 1, 5, 5), word) for word in words])
    assert load_dataset("voc", folder)[0].ignored.tolist() == [True] * 3 + [False] * 5


def test_an_object_without_a_box_is_refused_by_file_and_object(folder):
    file = folder / "Annotations/1.xml"
    text, where = file.read_text(), rf"{re.escape(str(file))}.*object 1, .*bndbox: <object>.*"
    for old, new in (("bndbox", "polygon"), ("xmin", "x1"), (">3<", ">left<"), (">3<", "><"), (">cat<", "><")):
        file.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=where + new.strip("<>")):
            load_dataset("voc", folder)


def test_images_without_xml_or_objects_are_background_and_counted(folder):
    """The 1 of "1 1" is no list's flag, for an image is called so: the XML file of 1 is not its own."""
    write_lists(folder, trainval=["1", "1 1", "4"])
    (folder / "Annotations/1 1.xml").unlink()
    (folder / "Annotations/4.xml").write_text("<annotation/>")
    source, _ = load_dataset("voc", folder)
    assert [len(source.boxes_of(i)[0]) for i in range(3)] == [1, 0, 0]
    for what in ("without an XML file.*: 1 ", "XML files without an object: 1 "):
        assert any(re.search(what, note) for note in source.notes), what


def test_classes_that_are_tested_only_or_spelt_in_two_ways_are_said(folder):
    write_image(folder, "1", [("cafe\u0301", (1, 1, 5, 5), 0), ("traffic light", (1, 1, 5, 5), 0), CAT])
    write_image(folder, "2", [("caf\xe9", (1, 1, 5, 5), 0), ("Traffic_Light", (1, 1, 5, 5), 0), CAT])
    train, test = load_dataset("voc", folder)
    [pairs] = [note for note in train.notes if "two ways" in note]
    assert r"'cafe\u0301' and 'caf\xe9'" in pairs and "'Traffic_Light' and 'traffic light'" in pairs
    assert any("among the training images: Traffic_Light, caf\xe9" in note for note in test.notes)


def test_no_box_to_train_on_is_refused(folder):
    for objects, why in ([], "none can be used"), ([(*CAT[:2], 1)], "difficult"):
        write_image(folder, "1", objects)
        with pytest.raises(UserError, match=f"trainval.txt: no box to train on.*{why}"):
            load_dataset("voc", folder)


LISTS = (
    (["train", "val"], "no such list.*holds.*val.txt.*give --split val"),
    (["train", "test"], "no such list.*holds test.txt, train.txt: write it"),
    ([], "no such list.*holds no list: write it"),
    (["trainval"], "lists no image"),
)


@pytest.mark.parametrize(("there", "says"), LISTS)
def test_a_missing_list_is_refused_with_those_that_are_there_and_an_empty_one(folder, there, says):
    for file in (folder / "ImageSets/Main").iterdir():
        file.unlink()
    write_lists(folder, **{split: [] for split in there})
    with pytest.raises(UserError, match=f"Main/trainval.txt: {says}"):
        load_dataset("voc", folder)


def test_a_class_that_a_detector_does_not_know_is_refused_by_name(folder):
    with pytest.raises(UserError, match=f"{re.escape(str(folder / 'Annotations/2.xml'))}.*'cat'"):
        load_test_set("voc", ("dog", "cow"), folder)


@pytest.mark.parametrize("layout", [".", "VOCdevkit/VOC2007", "VOC2007"])
def test_where_the_folder_may_lie(tmp_path, layout):
    write_lists(tmp_path / layout, trainval=["1"], test=["2"])
    files = [source.name(0, 0) for source in load_dataset("voc", tmp_path)]
    assert files == [str(tmp_path / layout / f"JPEGImages/{name}.jpg") for name in (1, 2)]


def test_several_years_train_together_and_test_where_there_is_a_test_list(tmp_path):
    write_lists(tmp_path / "VOCdevkit/VOC2007", trainval=["1", "2"], test=["2", "1"])
    write_lists(tmp_path / "VOCdevkit/VOC2012", trainval=["3"])
    for given, names in (
        ({"years": ("2007", "2012")}, [["1", "2", "3"], ["2", "1"]]),
        ({"years": ("2012", "2007"), "limit_train": 2, "limit_test": 1}, [["3", "1"], ["2"]]),
        ({}, [["1", "2"], ["2", "1"]]),
    ):
        assert [names_of(source) for source in load_dataset("voc", tmp_path, **given)] == names
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*VOC2010.*--data-path.*--download"):
        load_dataset("voc", tmp_path, years=("2007", "2010"))


def test_classes_are_vocs_20_if_no_others_occur_else_those_of_all_annotations(folder):
    for names, classes, labels in (
        (("cat", "dog", "cow"), VOC_CLASSES, [8, 12, 10]),
        (("zebra", "cat", "ant"), ("ant", "cat", "zebra"), [3, 2, 1]),
    ):
        write_image(folder, "1", [(name, (1, 1, 5, 5), 0) for name in names[:2]])
        write_image(folder, "2", [(names[2], (1, 1, 5, 5), 0)])
        train, test = load_dataset("voc", folder)
        assert train.classes == test.classes == classes and [*train.labels, *test.labels] == labels


def test_val_is_to_tune_on(tmp_path):
    write_lists(tmp_path, train=["0"], val=["1"], trainval=["2"], test=["3"])
    (tmp_path / "ImageSets/Main/train.txt").write_text("\n0  -1\n\n")  # a list may hold flags and blank lines
    for split, names in (("val", [["0"], ["1"]]), ("test", [["2"], ["3"]])):
        assert [names_of(source) for source in load_dataset("voc", tmp_path, split=split)] == names
        assert names_of(load_test_set("voc", VOC_CLASSES, tmp_path, split=split)) == names[1]


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_without_a_network_the_download_is_refused_in_one_line(tmp_path, monkeypatch, error):
    monkeypatch.setattr("tar.data.voc.VOCDetection", Mock(side_effect=error))
    with pytest.raises(UserError, match=f"VOC 2007 trainval.*{re.escape(str(tmp_path))}") as refusal:
        load_dataset("voc", tmp_path, download=True)
    assert "\n" not in str(refusal.value)


def test_the_download_fetches_what_each_year_has_and_reads_it(tmp_path, monkeypatch):
    fetched = []

    def fetch(root, year, image_set, download):
        assert root == tmp_path and download
        fetched.append((year, image_set))
        write_lists(tmp_path / f"VOCdevkit/VOC{year}", **{image_set: ["1"]})

    monkeypatch.setattr("tar.data.voc.VOCDetection", fetch)
    for _ in range(2):  # a list that is there is not fetched again
        train, test = load_dataset("voc", tmp_path, years=("2007", "2012"), download=True)
        assert sorted(fetched) == [("2007", "test"), ("2007", "trainval"), ("2012", "trainval")]
        assert (len(train), len(test)) == (2, 1)
