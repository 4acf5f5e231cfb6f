"""Folders in PASCAL VOC's layout: what is read from them, what is refused, and the download."""

import re
import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from tar import UserError
from tar.data.datasets import load_dataset, load_test_set
from tar.data.voc import VOC_CLASSES

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


def write_lists(folder, **lists):
    """Lists of image names by split, and the images that are not there yet."""
    for split, names in lists.items():
        for name in names:
            if name.isdigit() and not (folder / f"JPEGImages/{name}.jpg").exists():
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
    assert len(source) == 1 and source.dropped == [] and source.wide == [True] and source.sizes.tolist() == [[40, 30]]
    assert boxes.tolist() == [[2, 4, 10, 20], [0, 0, 40, 30], [0, 0, 40, 30]] and boxes.dtype == torch.float32
    assert [VOC_CLASSES[i - 1] for i in labels] == ["cat", "dog", "cat"] and labels.dtype == torch.int64
    assert ignored.tolist() == [False, True, False]
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8 and abs(image.float() - 1).max() <= 2


def test_corners_are_put_in_order_one_pixel_is_a_box_and_what_lies_outside_is_dropped_and_named(folder):
    objects = [("dog", (9, 25, 5, 20), 1), CAT, ("dog", (7, 7, 7, 7), 0), ("cow", (50, 5, 60, 20), 0)]
    write_image(folder, "1", [*objects, ("cow", ("nan", 1, 2, 3), 0)])
    write_lists(folder, trainval=["1", "2"])
    source, _ = load_dataset("voc", folder)
    _, boxes, labels, ignored = source.load(0, 0)
    assert boxes.tolist() == [[4, 19, 9, 25], [2, 4, 10, 20], [6, 6, 7, 7]]
    assert [VOC_CLASSES[i - 1] for i in labels] == ["dog", "cat", "dog"] and ignored.tolist() == [True, False, False]
    assert source.dropped == [str(folder / "JPEGImages/1.jpg")] and len(source.load(0, 1)[1]) == 1
    assert "cow" in source.unused and "cat" not in source.unused
    for what in ("corners are exchanged.*: 1 ", "beyond the image.*: 1 ", "no area or outside.*: 1 ", "without a box"):
        assert any(re.search(what, note) for note in source.notes), what


@pytest.mark.parametrize(
    ("entry", "files", "found"),
    [
        ("1", ["1.png"], "1.png"),
        ("1.jpg", ["1.JPG"], "1.JPG"),
        ("1.jpg", ["1.png"], "1.png"),
        ("1.png", ["1.png", "1.jpg"], "1.png"),
        ("my photo 1", ["my photo 1.jpg", "my.jpg"], "my photo 1.jpg"),
        ("my photo 1  -1", ["my photo 1.jpg"], "my photo 1.jpg"),
        ("a.b", ["a.b.jpg", "a.jpg"], "a.b.jpg"),
        ("/old/VOC2007/JPEGImages/1.jpg", ["1.jpg"], "1.jpg"),
        (r"JPEGImages\1.jpg", ["1.jpg"], "1.jpg"),
        ("x/1", ["x/1.jpg", "y/1.jpg"], "x/1.jpg"),
        ("1", ["1.jpg", "y/1.jpg"], "1.jpg"),
        ("1", ["1.txt", "1.webp"], "1.webp"),
        ("1", ["from the XML.jpg"], "from the XML.jpg"),
        ("1", ["1.png", "1.jpg"], UserError),
        ("1", ["2.png"], UserError),
        ("cam2/1", ["cam1/1.jpg"], UserError),  # another picture
    ],
)
def test_which_file_an_entry_of_a_list_means(tmp_path, entry, files, found):
    write_lists(tmp_path, trainval=["2"], test=["2"])
    shutil.rmtree(tmp_path / "JPEGImages")
    for file in files:
        place = tmp_path / "JPEGImages" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(place, "PNG")
    stem = Path(entry.replace("\\", "/").removesuffix(".jpg").removesuffix(".png").removesuffix("  -1")).name
    xml = (tmp_path / "Annotations/2.xml").read_text().replace("<size>", "<filename>from the XML.jpg</filename><size>")
    (tmp_path / f"Annotations/{stem}.xml").write_text(xml)
    for split in ("trainval", "test"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text(entry + "\n")
    if found is UserError:
        with pytest.raises(
            UserError, match="'1' may be .*1.(jpg|png) or .*1.(jpg|png)" if files[1:] else f"no image '{entry}'"
        ):
            load_dataset("voc", tmp_path)
    else:
        source = load_dataset("voc", tmp_path)[0]
        assert source.files == [str(tmp_path / "JPEGImages" / found)] and len(source.boxes) == 1


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


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("bndbox", "polygon", "object 1, 'cat'.*polygon"),
        ("bndbox", "robndbox", "object 1, 'cat'.*robndbox"),
        ("xmin", "x1", "object 1, 'cat'.*None"),
        (">3<", ">left<", "object 1, 'cat'.*left"),
        (">3<", "><", "object 1, 'cat'"),
        (">cat<", "><", "object 1"),
    ],
)
def test_an_object_without_a_box_is_refused_by_file_and_object(folder, old, new, says):
    file = folder / "Annotations/1.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}.*{says}"):
        load_dataset("voc", folder)


def test_images_without_xml_or_objects_are_background_and_counted(folder):
    write_lists(folder, trainval=["1", "3", "4"])
    (folder / "Annotations/3.xml").unlink()
    (folder / "Annotations/4.xml").write_text("<annotation/>")
    source, _ = load_dataset("voc", folder)
    assert [len(source.boxes_of(i)[0]) for i in range(3)] == [1, 0, 0]
    assert [sum(what in note for note in source.notes) for what in ("XML file, used", "without an object: 1 (")] == [
        1,
        1,
    ]


def test_classes_that_are_tested_only_or_spelt_in_two_ways_are_said(folder):
    write_image(folder, "1", [("cafe\u0301", (1, 1, 5, 5), 0), ("traffic light", (1, 1, 5, 5), 0), CAT])
    write_image(folder, "2", [("caf\xe9", (1, 1, 5, 5), 0), ("Traffic_Light", (1, 1, 5, 5), 0), CAT])
    train, test = load_dataset("voc", folder)
    [pairs] = [note for note in train.notes if "two ways" in note]
    assert r"'cafe\u0301' and 'caf\xe9'" in pairs and "'Traffic_Light' and 'traffic light'" in pairs
    assert any("among the training images: Traffic_Light, caf\xe9" in note for note in test.notes)


@pytest.mark.parametrize("difficult", [1, None])
def test_no_box_to_train_on_is_refused(folder, difficult):
    write_image(folder, "1", [("cat", (3, 5, 10, 20), difficult)] if difficult else [])
    with pytest.raises(UserError, match=f"trainval.txt: no box to train on.*{'difficult' if difficult else 'none'}"):
        load_dataset("voc", folder)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (["train", "val"], "holds.*val.txt.*give --split val"),
        (["train", "test"], "holds test.txt, train.txt: write it"),
        ([], "holds no list: write it"),
    ],
)
def test_a_missing_list_is_refused_with_those_that_are_there(folder, there, says):
    shutil.rmtree(folder / "ImageSets/Main")
    if there:
        (folder / "ImageSets/Main").mkdir()
        write_lists(folder, **{split: ["1"] for split in there})
    with pytest.raises(UserError, match=f"Main/trainval.txt: no such list.*{says}"):
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
    sources = load_dataset("voc", tmp_path, years=("2007", "2012"))
    assert [names_of(source) for source in sources] == [["1", "2", "3"], ["2", "1"]]
    sources = load_dataset("voc", tmp_path, years=("2012", "2007"), limit_train=2, limit_test=1)
    assert [names_of(source) for source in sources] == [["3", "1"], ["2"]]
    assert names_of(load_dataset("voc", tmp_path)[0]) == ["1", "2"]


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [(("cat", "dog", "cow"), VOC_CLASSES, [8, 12, 10]), (("zebra", "cat", "ant"), ("ant", "cat", "zebra"), [3, 2, 1])],
    ids=["VOC's 20 if no others occur", "those of all annotations"],
)
def test_classes(folder, names, classes, labels):
    write_image(folder, "1", [(name, (1, 1, 5, 5), 0) for name in names[:2]])
    write_image(folder, "2", [(names[2], (1, 1, 5, 5), 0)])
    train, test = load_dataset("voc", folder)
    assert train.classes == test.classes == classes and len(VOC_CLASSES) == 20
    assert [*train.load(0, 0)[2].tolist(), *test.load(0, 0)[2].tolist()] == labels


def test_val_is_to_tune_on(tmp_path):
    write_lists(tmp_path, train=["0"], val=["1"], trainval=["2"], test=["3"])
    (tmp_path / "ImageSets/Main/train.txt").write_text("\n0  -1\n\n")  # a list may hold flags and blank lines
    for split, names in (("val", [["0"], ["1"]]), ("test", [["2"], ["3"]])):
        assert [names_of(source) for source in load_dataset("voc", tmp_path, split=split)] == names
        assert names_of(load_test_set("voc", VOC_CLASSES, tmp_path, split=split)) == names[1]


@pytest.mark.parametrize("names", [None, []], ids=["no list", "empty list"])
def test_without_test_images_it_is_refused(folder, names):
    file = folder / "ImageSets/Main/test.txt"
    file.unlink() if names is None else file.write_text("\n")
    with pytest.raises(UserError, match=re.escape(str(file))):
        load_dataset("voc", folder)


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_without_a_network_the_download_is_refused_in_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("tar.data.voc.VOCDetection", fail)
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
