"""Small data sets of the kinds that users bring, where they lie beside the repository: in ../shared/cases.

Things of class 1 are red and those of class 2 blue there, so the pixels tell whether a box lies where it was drawn.
"""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import SMALL, call

import eval as eval_script
import train
from tar.data.datasets import load_dataset

CASES = Path(__file__).resolve().parents[3] / "shared/cases"

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there: it is no part of the project")

USED = {  # {name: what is said in training and by --check-data, a pattern, or None}
    **dict.fromkeys(("png", "mixed", "missing", "ext-in-lists", "spaces-in-names", "gb2312-declared-ascii"), None),
    **dict.fromkeys(("one-pixel", "wh-zero", "ids-strings", "crowd-strings-mixed", "no-bbox-polygon"), None),
    **dict.fromkeys(("ids-swapped", "space-in-val", "png-broken-exif", "equal-stems"), None),
    **dict.fromkeys(("swapped", "smaller"), "another size than .*: 5"),
    "test-only": "no box among the training images: square",
    "capital-in-test-only": "'Disc' and 'disc'(?s:.)*no box among the training images: Disc",
    "corners-exchanged": "corners are exchanged.*: 1",
    "no-xml-negatives": "without an XML file.*: 1",
    "dummy0-same-name": "category 0 is called disc.*dropped",
    **dict.fromkeys(("prefix-images", "backslash"), "images lie under other names.*: 5"),
    "dup-annotations-whole": "10 annotations.*twice",
    **dict.fromkeys(("exif3-shown-96x72-COCO", "exif6-shown-96x72-COCO"), "5 are turned upright, 0 stay.*--exif"),
    "16bit-to-255": "nearly black.*: 5",
}
REFUSED = {  # {name: what the line says, a pattern}
    "resized-image": "trainval.txt: most boxes are beyond the image.*resized",
    "no-lists": "trainval.txt: no such list.*write it",
    "train-val-only": "trainval.txt: no such list.*val.txt.*--split val",
    "uppercase-all": "no box to train on.*without an object: 5",
    "difficult-all": "no box to train on.*difficult",
    "no-bndbox": "000000.xml.*object 1, 'disc'",
    "iscrowd-all": "all 10 boxes are crowds",
    "data-uri": "train.json: file_name data:image",
    "bbox-normalised": "smaller than a pixel.*fractions",
    "bbox-xyxy": "beyond the image.*corners",
}
BOXES = {"no-xml-negatives": (8, 6), "equal-stems": (10, 8)}  # of training and test images, where not 10 and 6
SET_FLAGS = ("--train-json", "--train-images", "--val-json", "--val-images")


def places(name):
    """The data set's kind and what load_dataset is given."""
    case = CASES / name
    if (case / "JPEGImages").is_dir():
        return "voc", {"data_path": case}
    parts = ("train", "valid") if (case / "valid").is_dir() else ("train", "val")
    files = [case / part / "_annotations.coco.json" for part in parts]
    if not files[0].exists():
        files = [case / f"{part}.json" for part in parts]
    return "coco", {"files": (files[0], case / parts[0], files[1], case / parts[1])}


def flags(name):
    kind, given = places(name)
    voc = ("--data-path", given.get("data_path"))
    where = voc if kind == "voc" else sum(zip(SET_FLAGS, given["files"], strict=True), ())
    return ("--dataset", kind, *where, "--device", "cpu")


def wrong_colours(source):
    """The boxes inside which the colour of their class is not the strongest, as (file, box, class)."""
    found = []
    for index in range(len(source)):
        image, boxes, labels, _ = source.load(0, index)
        for (x0, y0, x1, y1), label in zip(boxes.round().int().tolist(), labels.tolist(), strict=True):
            name, colour = source.classes[label - 1], image[:, y0:y1, x0:x1].float().mean((1, 2))
            channel = 0 if name.strip().lower() == "disc" else 2
            if colour[channel] < colour[2 - channel] + 60:
                found.append((source.name(0, index), (x0, y0, x1, y1), name))
    return found


def test_no_case_is_forgotten():
    assert {*USED, *REFUSED} == {path.name for path in CASES.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", USED)
def test_a_case_is_used_and_every_box_lies_where_it_was_drawn(name, capsys):
    kind, given = places(name)
    sources = load_dataset(kind, **given)
    assert tuple(len(source.boxes) for source in sources) == BOXES.get(name, (10, 6))
    assert not any(source.ignored.any() for source in sources)
    if name == "one-pixel":  # whose first box is a pixel of noise
        assert sources[0].boxes[0].tolist() == [19, 19, 20, 20]
    elif name != "16bit-to-255":
        assert [wrong_colours(source)[name == "one-pixel" :] for source in sources] == [[], []]
    call(train.main, *flags(name), "--check-data")
    out, err = capsys.readouterr()
    assert re.search(USED[name] or "", out) and "Every image can be used" in out and not err
    said = [line for line in out.splitlines() if re.match("(training|test): ", line)]
    assert bool(said) == bool(USED[name]), said
    assert max(map(len, said), default=0) < 800


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_is_refused_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(train.main, *flags(name), "--student", "r10")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and len(err) < 1000
    assert re.search(REFUSED[name], err) and str(CASES / name) in err, err


def test_equal_names_are_shown_in_one_picture_each_and_what_is_said_is_said_in_training(tmp_path, capsys):
    call(train.main, *SMALL, *flags("equal-stems"), "--epochs", 1, "--student", "r10", "--output", tmp_path / "run")
    weights = "--weights", tmp_path / "run/last.pth"
    call(eval_script.main, *weights, "--show", 4, "--output", tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").iterdir())) == 4
    # The same detector on pictures that EXIF rotates, in a folder behind a link, beside a file that is none.
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/more").symlink_to(CASES / "exif6-shown-96x72-COCO/val")
    (tmp_path / "photos/notes.txt").touch()
    capsys.readouterr()
    call(eval_script.main, *weights, "--predict", tmp_path / "photos", "--output", tmp_path / "found")
    assert "notes.txt" in capsys.readouterr().out
    found = json.loads((tmp_path / "found/detections.json").read_text())["images"]
    assert [(image["width"], image["height"]) for image in found] == [(96, 72)] * 3
    assert all(Image.open(file).width > Image.open(file).height for file in (tmp_path / "found").glob("*.png"))
