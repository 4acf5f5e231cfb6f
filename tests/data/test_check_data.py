"""What --check-data prints about a folder, and how images of unusual kinds are read."""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import call, write_voc

import train
from tar.data.image_files import oddities, read_image


def test_images_of_other_modes_become_three_channels_of_eight_bits(tmp_path):
    values = np.array([[0, 257, 514], [32896, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.new("L", (40, 30), 99).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "deep.png")[0].tolist() == [[0, 1, 2], [128, 254, 255]]
    image = read_image(tmp_path / "grey.png")
    assert image.shape == (3, 30, 40) and image.unique().tolist() == [99]


@pytest.mark.parametrize(("size", "turned"), [((40, 30), False), ((30, 40), True), (None, True), ((50, 50), True)])
def test_a_rotated_image_is_turned_unless_its_annotation_is_as_stored(tmp_path, size, turned):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 30))
    image.paste((255, 255, 255), (0, 0, 20, 30))  # its left half is white; turned, its upper half
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png", size)
    assert pixels.shape == ((3, 40, 30) if turned else (3, 30, 40))
    assert pixels[:, 2, 2].min() == 255 and pixels[:, -2, -2].max() == 0
    assert (pixels[0, 2, -2] == 255) == turned and (pixels[0, -2, 2] == 255) != turned


def test_oddities_of_an_image(tmp_path):
    Image.new("CMYK", (40, 20)).save(tmp_path / "a.jpg")
    for size in (20, 40), (40, 40):
        assert oddities(tmp_path / "a.jpg", size) == ["CMYK", "width or height other than its annotation says"]
    assert oddities(tmp_path / "a.jpg", (40, 20)) == ["CMYK"]


@pytest.fixture
def data(tmp_path):
    return write_voc(tmp_path / "discs", ("disc", "square"), {"trainval": 12, "test": 6})


LOCKED = [
    ".",
    "JPEGImages",
    "JPEGImages/000000.jpg",
    "Annotations",
    "Annotations/000000.xml",
    "ImageSets/Main/test.txt",
]


def check(data, *flags):
    call(train.main, "--dataset", "voc", "--data-path", data, "--check-data", "--device", "cpu", *flags)


def test_check_data_counts_images_and_boxes_and_trains_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.open(data / "JPEGImages/000003.jpg").convert("L").save(data / "JPEGImages/000003.jpg")
    text = (data / "Annotations/000004.xml").read_text()
    (data / "Annotations/000004.xml").write_text(re.sub("<xmin>[0-9]+", "<xmin>nan", text, count=1))
    check(data)
    out = capsys.readouterr().out
    assert "training set: 12 images, 23 boxes, 6 of them ignored" in out and "test set: 6 images, 12 boxes, 3" in out
    assert "96 to 96 wide, 72 to 72 high" in out and re.search("1 images: grey: .*000003.jpg", out)
    assert re.search("^training: .*no area.*: 1 .*000004.jpg", out, re.M)
    rows = re.findall(r"^ *(disc|square) +(\d+) +(\d+)$", out, re.M)
    assert rows[:2] == [("disc", "11", "11"), ("square", "12", "12")]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_check_data_names_every_image_that_cannot_be_used(data, capsys, workers):
    for name in ("000001", "000007", "000013"):
        (data / f"JPEGImages/{name}.jpg").write_bytes(b"broken")
    with pytest.raises(SystemExit) as stopped:
        check(data, "--workers", workers)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and "3 images" in err
    assert all(f"{name}.jpg: cannot be read" in out for name in ("000001", "000007", "000013"))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="other rights than POSIX's")
@pytest.mark.parametrize("path", [*LOCKED, "x" * 300])
def test_what_may_not_be_read_is_refused_in_one_line_that_names_it(path, capsys):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        data = write_voc(Path(place) / "discs", ("disc", "square"), {"trainval": 2, "test": 1})
        user = os.geteuid()
        if path in LOCKED:
            (data / path).chmod(0)
        if user == 0:
            os.seteuid(65534)  # nobody: root may read everything
        try:
            with pytest.raises(SystemExit) as stopped:
                check(data if path in LOCKED else data / path)
        finally:
            os.seteuid(user)
            (data / path if path in LOCKED else data).chmod(0o755)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and str(data / path) in out + err, err
