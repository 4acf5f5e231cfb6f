"""Broken, hostile or odd input: each case trains, or is refused in one line that names what is wrong.

A case fails on a traceback, on more than one line, on another exit code than 2, on a line that does not name what is
wrong, or if a file that was there before is changed.
"""

import json
import pickle
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from coco_sets import annotation, write_json
from PIL import Image
from tiny_runs import SMALL, call, read_log, write_voc

import train

# Plain SGD has no state, so that a case writes a third as much.
SHORT = "--epochs 1 --limit-train 4 --limit-test 2 --student r10 --optimizer sgd --momentum 0 --lr 0.001"
QUICK = [*SMALL, *SHORT.split()]
TRAINS = None  # instead of the word that a refusal must hold

IMAGE, XML, LIST = "voc/JPEGImages/000000.jpg", "voc/Annotations/000000.xml", "voc/ImageSets/Main/trainval.txt"
NO_TEXT = bytes(range(128, 256))
ENTITIES = b"".join(b"<!ENTITY x%d '%s'>" % (i, b"&x%d;" % (i - 1) * 10) for i in range(1, 12))
BOMB = b"<!DOCTYPE a [<!ENTITY x0 'lol'>%s]><annotation><size><width>&x11;</width></size></annotation>" % ENTITIES
OUTSIDE = b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><object>&x;</object></annotation>"


class Code:
    """Unpickled, it would make a file `trap`."""

    def __init__(self, checkpoint):
        self.path = str(checkpoint.parent / "trap")

    def __reduce__(self):
        return open, (self.path, "w")


def flip(file):
    """Flips one bit of a weight, past all of the file's own structure."""
    weights = torch.load(file, weights_only=True)["model"]
    largest = max(weights.values(), key=torch.Tensor.numel)
    whole = bytearray(file.read_bytes())
    whole[whole.index(bytes(largest.untyped_storage()[400:440])) + 7] ^= 16
    file.write_bytes(whole)


# Spoilers: what they change in a folder of sound data, and the flags of the training then, if they are others.


def odd_images(folder):
    """CMYK, grey with alpha, a palette with transparency, one pixel of one bit, 16 bits, GIF."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), dtype=np.uint8))
    deep = Image.fromarray(np.array(picture.convert("L")).astype(np.uint16) * 257)
    modes = [(picture.convert("CMYK"), "JPEG"), (picture.convert("LA"), "PNG"), (picture.convert("P"), "PNG")]
    modes += [(Image.new("1", (1, 1)), "PNG"), (deep, "PNG"), (picture.convert("P"), "GIF")]
    for number, (image, kind) in enumerate(modes):
        options = {"transparency": 3} if image.mode == "P" and kind == "PNG" else {}
        image.save(folder / f"voc/JPEGImages/{number:06d}.jpg", kind, **options)
    xml = folder / "voc/Annotations/000003.xml"
    xml.write_text(re.sub(r"<(width|height)>\d+", r"<\1>1", xml.read_text()))


def odd_xml(folder):
    """A coordinate inf, a box outside the image, an image of size NaN."""
    xmax, xmin = r"(?<=<xmax>)\d+", r"(?<=<xmin>)\d+"
    for number, pattern, value in ((0, xmax, "inf"), (1, f"{xmin}|{xmax}", "300"), (2, r"(?<=<width>)\d+", "nan")):
        xml = folder / f"voc/Annotations/{number:06d}.xml"
        xml.write_text(re.sub(pattern, value, xml.read_text(), count=2 if number == 1 else 1))


def odd_list(folder):
    """A byte order mark, CRLF, a name twice."""
    names = (folder / LIST).read_bytes().replace(b"\n", b"\r\n")
    (folder / LIST).write_bytes(b"\xef\xbb\xbf" + names + b"000000\n")


def odd_json(folder):
    """A byte order mark, a box NaN, an image's id as a text."""

    def change(data):
        data["annotations"][0]["bbox"][0], data["images"][0]["id"] = float("nan"), "100"

    return coco(change, folder, lambda text: b"\xef\xbb\xbf" + text)


def on_all(change, folder):
    return change(folder)


def on_image(change, folder):
    change(folder / IMAGE)


def on_bytes(path, change, folder):
    """Puts other bytes into a file: the given ones, or those that a function makes of the file's own."""
    old = (folder / path).read_bytes()
    new = change(old) if callable(change) else change
    assert new != old
    (folder / path).write_bytes(new)


on_xml, on_list = partial(on_bytes, XML), partial(on_bytes, LIST)


def coco(change_data, folder, change_text=bytes):
    """The same images in COCO's format, after a change of the file's data or text."""
    images = [{"id": 100 + i, "file_name": f"{i:06d}.jpg", "width": 96, "height": 72} for i in range(6)]
    boxes = [annotation(100 + i, c, [5 + 40 * k, 10, 28, 28]) for i in range(6) for k, c in enumerate((7, 9))]
    data = json.loads(write_json(folder / "val.json", images, boxes, ((7, "disc"), (9, "square"))).read_text())
    change_data(data)
    (folder / "train.json").write_bytes(change_text(json.dumps(data).encode()))
    images = folder / "voc/JPEGImages"
    flags = ["--train-json", folder / "train.json", "--train-images", images]
    return ["--dataset", "coco", *flags, "--val-json", folder / "val.json", "--val-images", images]


def coco_text(change, folder):
    return coco(len, folder, change)


def teacher(change, folder):
    """Distils from a checkpoint, after a change of its file."""
    file = folder / "teacher.pth"
    change(file)
    return ["--teacher", "r10", "--teacher-weights", file]


def teacher_state(change, folder):
    """Distils from a checkpoint, after a change of its contents."""
    state = torch.load(folder / "teacher.pth", weights_only=True)
    change(state)
    return teacher(partial(torch.save, state), folder)


def output(argument, folder):
    """Writes a file, and trains with an --output: (file, its text, --output)."""
    file, text, name = argument
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    return ["--output", folder / name]


def flags(words, folder):
    return words.split()


TABLE = {  # {(spoiler, word of the refusal, or TRAINS): {name: the spoiler's argument}}
    (on_all, TRAINS): {f.__name__: f for f in (odd_images, odd_xml, odd_list, odd_json)},
    (on_image, "000000"): {
        "a strip of 20,000 x 1 pixels": lambda file: Image.new("RGB", (20000, 1)).save(file, "PNG"),
        "a decompression bomb": lambda file: Image.new("1", (14000, 14000)).save(file, "PNG", compress_level=1),
        "a float TIFF": lambda file: Image.new("F", (96, 72)).save(file, "TIFF"),
        "a JPEG cut short": lambda file: file.write_bytes(file.read_bytes()[:900]),
        "a text named .jpg": lambda file: file.write_text("no image\n" * 50),
        "a missing image": lambda file: file.unlink(),
        "a folder in an image's place": lambda file: (file.unlink(), file.mkdir()),
    },
    (on_xml, "000000.xml"): {
        "XML cut short": lambda xml: xml[: len(xml) // 2],
        "XML of bytes that are no text": NO_TEXT,
        "an entity bomb": BOMB,
        "an entity that reads another file": OUTSIDE,
        "XML in an unknown encoding": b"<?xml version='1.0' encoding='foo'?><annotation/>",
    },
    (on_list, "987654"): {"a list with a name that is not there": lambda names: b"987654\n" + names},
    (on_list, "trainval.txt"): {"a list of bytes that are no text": NO_TEXT},
    (coco_text, "train.json"): {
        "JSON cut short": lambda text: text[:-40],
        "JSON of bytes that are no text": lambda _: NO_TEXT,
        "JSON nested without end": lambda _: b"[" * 100000,
        "JSON that is a list": lambda _: b"[1, 2]",
    },
    (coco, "train.json"): {
        "JSON with a box of an unlisted image": lambda data: data["annotations"][0].update(image_id=5),
        "JSON with an unlisted category": lambda data: data["annotations"][0].update(category_id=5),
    },
    (coco, "categories"): {"JSON without categories": lambda data: data.pop("categories")},
    (coco, "images"): {"JSON without images": lambda data: data["images"].clear()},
    (coco, "no box to train on"): {"JSON without a box": lambda data: data["annotations"].clear()},
    (teacher, "teacher.pth"): {
        "a checkpoint that is a pickle with code": lambda f: f.write_bytes(pickle.dumps({"model": Code(f)}, 2)),
        "a checkpoint with code in it": lambda f: torch.save({"format": 2, "model": Code(f)}, f),
        "a checkpoint cut short": lambda f: f.write_bytes(f.read_bytes()[:-3000]),
        "a checkpoint with a flipped bit": flip,
        "a checkpoint that is missing": lambda f: f.unlink(),
        "a folder for a checkpoint": lambda f: (f.unlink(), f.mkdir()),
        "a checkpoint of weights alone": lambda f: torch.save(torch.load(f, weights_only=True)["model"], f),
    },
    (teacher_state, "teacher.pth"): {
        "a checkpoint of a newer format": lambda s: s.update(format=99),
        "a checkpoint of an unknown backbone": lambda s: s["build"].update(backbone="r999"),
        "a checkpoint of unknown options": lambda s: s["build"].update(colour="red"),
        "a checkpoint that lacks a weight": lambda s: s["model"].pop(next(iter(s["model"]))),
        "a checkpoint with a weight of another shape": lambda s: s["build"].update(fpn_channels=8),
        "a checkpoint of other classes": lambda s: s.update(classes=["disc", "ball"]),
        "a checkpoint of another backbone": lambda s: s["build"].update(backbone="r18"),
        "a checkpoint of another detector": lambda s: s["build"].update(detector="retinanet"),
    },
    (output, "--output"): {
        "an output folder inside a file": ("file", "", "file/run"),
        "an output folder that is a file": ("file", "", "file"),
        "an output folder with a run of other settings": ("old/config.json", '{"lr": 1.0}', "old"),
    },
    (output, "config.json"): {
        "an output folder with a broken config.json": ("old/config.json", '{"lr": ', "old"),
        "an output folder with a config.json that is a list": ("old/config.json", "[1, 2]", "old"),
    },
    (flags, "--no-such-flag"): {"an unknown flag": "--no-such-flag"},
    (flags, "r11"): {"an unknown backbone": "--student r11"},
    (flags, "--epochs"): {"no epochs": "--epochs 0"},
    (flags, "two"): {"a word for a number": "--batch-size two"},
    (flags, "--lr"): {"a rate NaN": "--lr nan"},
    (flags, "--size"): {"sides that are exchanged": "--size 100 50"},
    (flags, "toaster"): {"a device that is not there": "--device toaster"},
    (flags, "VOC1999"): {"a year that is not there": "--voc-years 1999 --data-path ."},
    (flags, "r10"): {"weights of ImageNet for r10": "--backbone-weights imagenet"},
    (flags, "nowhere"): {"a missing data folder": "--data-path nowhere"},
}
CASES = {name: (partial(spoil, given), says) for (spoil, says), cases in TABLE.items() for name, given in cases.items()}


def states_in(folder):
    """{file: its size and the time it was written last}."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The sound data and the sound teacher; each case spoils a copy."""
    folder = tmp_path_factory.mktemp("sound")
    write_voc(folder / "voc", ("disc", "square"), {"trainval": 4, "test": 2})
    call(train.main, *QUICK, "--dataset", "voc", "--data-path", folder / "voc", "--output", folder / "run")
    shutil.move(folder / "run/last.pth", folder / "teacher.pth")
    shutil.rmtree(folder / "run")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_input_trains_or_is_refused_in_one_line(sound, tmp_path, capsys, name):
    spoil, says = CASES[name]
    folder, run = tmp_path / "case", tmp_path / "case/run"
    shutil.copytree(sound, folder, ignore=None if "checkpoint" in name else shutil.ignore_patterns("teacher.pth"))
    given = spoil(folder) or []
    before, code = states_in(folder), 0
    capsys.readouterr()
    try:
        call(train.main, *QUICK, "--output", run, "--dataset", "voc", "--data-path", folder / "voc", *given)
    except SystemExit as stopped:
        code = stopped.code
    assert not (folder / "trap").exists(), "code ran"
    assert {file: state for file, state in states_in(folder).items() if file in before} == before
    assert (run / "result.json").exists() == (says is TRAINS) == (code == 0)
    if says is TRAINS:
        assert all(np.isfinite([v for v in line.values() if v is not None]).all() for line in read_log(run)[0])
    else:
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if "usage:" not in line and not line.startswith(" ")]
        assert code == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in err, err
