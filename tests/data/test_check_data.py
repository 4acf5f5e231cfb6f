"""What --check-data prints about a folder."""

import os
import re
import tempfile
from pathlib import Path

import pytest
from tiny_runs import call, write_voc

import train


def check(data, *flags):
    call(train.main, "--dataset", "voc", "--data-path", data, "--check-data", "--device", "cpu", *flags)


@pytest.fixture
def data(tmp_path):
    return write_voc(tmp_path / "discs", ("disc", "square"), {"trainval": 12, "test": 6})


def test_check_data_counts_images_and_boxes_and_trains_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (data / "Annotations/000003.xml").write_text("<annotation/>")
    text = (data / "Annotations/000004.xml").read_text()
    (data / "Annotations/000004.xml").write_text(re.sub("<xmin>[0-9]+", "<xmin>nan", text, count=1))
    check(data)
    out = capsys.readouterr().out
    assert "training set: 12 images, 21 boxes, 5 of them ignored" in out and "test set: 6 images, 12 boxes, 3" in out
    assert "96 to 96 wide, 72 to 72 high" in out and re.search("images without a box: 1 .*000003.jpg", out)
    assert "shorter side of a box: 28.0 to 28.0, median 28.0 pixels" in out
    assert re.search("^training: .*no area.*: 1 .*000004.jpg", out, re.M)
    rows = re.findall(r"^ *(disc|square) +(\d+) +(\d+)$", out, re.M)
    assert rows[:2] == [("disc", "10", "10"), ("square", "11", "11")]
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


FILES = "JPEGImages/000000.jpg", "Annotations/000000.xml", "ImageSets/Main/test.txt"
LOCKED = ".", "JPEGImages", "Annotations", *FILES


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
