"""Folders in PASCAL VOC's layout: what is read from them, what is refused, and the download."""

import re
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from tar import UserError
from tar.data.datasets import load_dataset, load_test_set
from tar.data.voc import VOC_CLASSES, Voc

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
    return [file.stem for file, *_ in source.samples]


@pytest.fixture
def folder(tmp_path):
    """Image 1 to train on, 2 to test on."""
    write_lists(tmp_path, trainval=["1"], test=["2"])
    return tmp_path


class TestVoc:
    def test_boxes_become_continuous_and_end_at_the_border(self, folder):
        write_image(folder, "1", [CAT, ("dog", (1, 1, 40, 30), 1), ("cat", (0, -4, 45, 31), 0)])
        source = Voc([folder], "trainval", ("cat", "dog"))
        image, boxes, labels, ignored = source.load(0, 0)
        assert len(source) == 1 and source.classes == ("cat", "dog") and source.dropped == []
        assert boxes.tolist() == [[2, 4, 10, 20], [0, 0, 40, 30], [0, 0, 40, 30]] and boxes.dtype == torch.float32
        assert labels.tolist() == [1, 2, 1] and labels.dtype == torch.int64
        assert ignored.tolist() == [False, True, False]
        assert image.shape == (3, 30, 40) and image.dtype == torch.uint8 and abs(image.float() - 1).max() <= 2

    def test_boxes_without_area_are_dropped_and_their_images_named(self, folder):
        write_image(folder, "1", [("dog", (9, 5, 8, 20), 1), CAT, ("dog", (5, 25, 9, 20), 0)])
        write_lists(folder, trainval=["1", "2"])
        source = Voc([folder], "trainval", ("cat", "dog"))
        _, boxes, labels, ignored = source.load(0, 0)
        assert (boxes.tolist(), labels.tolist(), ignored.tolist()) == ([[2, 4, 10, 20]], [1], [False])
        assert source.dropped == ["1"]

    def test_a_list_may_hold_flags_and_blank_lines(self, folder):
        write_lists(folder, trainval=["2  1", "", "1 -1"])
        assert names_of(Voc([folder], "trainval", ("cat",))) == ["2", "1"]

    def test_an_unknown_class_is_refused_by_name(self, folder):
        with pytest.raises(UserError, match=f"{re.escape(str(folder / 'Annotations/1.xml'))}.*'cat'"):
            Voc([folder], "trainval", ("dog", "cow"))


class TestLoadDataset:
    @pytest.mark.parametrize("layout", [".", "VOCdevkit/VOC2007", "VOC2007"])
    def test_where_the_folder_may_lie(self, tmp_path, layout):
        write_lists(tmp_path / layout, trainval=["1"], test=["2"])
        files = [source.samples[0][0] for source in load_dataset("voc", tmp_path)]
        assert files == [tmp_path / layout / f"JPEGImages/{name}.jpg" for name in (1, 2)]

    def test_several_years_train_together_and_test_where_there_is_a_test_list(self, tmp_path):
        write_lists(tmp_path / "VOCdevkit/VOC2007", trainval=["1", "2"], test=["2"])
        write_lists(tmp_path / "VOCdevkit/VOC2012", trainval=["3"])
        sources = load_dataset("voc", tmp_path, years=("2007", "2012"))
        assert [names_of(source) for source in sources] == [["1", "2", "3"], ["2"]]
        train, _ = load_dataset("voc", tmp_path, years=("2012", "2007"), limit_train=2)
        assert names_of(train) == ["3", "1"]
        assert names_of(load_dataset("voc", tmp_path)[0]) == ["1", "2"]

    def test_vocs_classes_are_taken_if_no_others_occur(self, folder):
        train, test = load_dataset("voc", folder)
        assert train.classes == test.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
        assert train.load(0, 0)[2].tolist() == [8]  # cat is the eighth by alphabet

    def test_other_classes_are_read_from_all_annotations(self, folder):
        write_image(folder, "1", [("zebra", (1, 1, 5, 5), 0), CAT])
        write_image(folder, "2", [("ant", (1, 1, 5, 5), 0)])
        train, test = load_dataset("voc", folder)
        assert train.classes == test.classes == ("ant", "cat", "zebra")
        assert train.load(0, 0)[2].tolist() == [3, 2] and test.load(0, 0)[2].tolist() == [1]

    def test_val_is_to_tune_on(self, tmp_path):
        write_lists(tmp_path, train=["0"], val=["1"], trainval=["2"], test=["3"])
        for split, names in (("val", [["0"], ["1"]]), ("test", [["2"], ["3"]])):
            assert [names_of(source) for source in load_dataset("voc", tmp_path, split=split)] == names
            assert names_of(load_test_set("voc", VOC_CLASSES, tmp_path, split=split)) == names[1]

    def test_limits(self, tmp_path):
        write_lists(tmp_path, trainval=list("12345"), test=list("12345"))
        assert list(map(len, load_dataset("voc", tmp_path, limit_train=3, limit_test=2))) == [3, 2]

    @pytest.mark.parametrize("names", [None, []], ids=["no list", "empty list"])
    def test_without_test_images_it_is_refused(self, folder, names):
        file = folder / "ImageSets/Main/test.txt"
        file.unlink() if names is None else file.write_text("\n")
        with pytest.raises(UserError, match=re.escape(str(file))):
            load_dataset("voc", folder)


class TestDownload:
    @pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")])
    def test_without_a_network_it_is_refused_in_one_line(self, tmp_path, monkeypatch, error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr("tar.data.voc.VOCDetection", fail)
        with pytest.raises(UserError, match=f"VOC 2007 trainval.*{re.escape(str(tmp_path))}") as refusal:
            load_dataset("voc", tmp_path, download=True)
        assert "\n" not in str(refusal.value)

    def test_it_fetches_what_each_year_has_and_reads_it(self, tmp_path, monkeypatch):
        fetched = []

        def fetch(root, year, image_set, download):
            assert root == tmp_path and download
            fetched.append((year, image_set))
            write_lists(tmp_path / f"VOCdevkit/VOC{year}", **{image_set: ["1"]})

        monkeypatch.setattr("tar.data.voc.VOCDetection", fetch)
        train, test = load_dataset("voc", tmp_path, years=("2007", "2012"), download=True)
        assert sorted(fetched) == [("2007", "test"), ("2007", "trainval"), ("2012", "trainval")]
        assert (len(train), len(test)) == (2, 1)
