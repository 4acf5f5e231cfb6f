"""A corpus of broken, hostile or odd input: each case trains, or is refused in one line that names what is wrong.

    PYTHONPATH=.:tests python tests/data/bad_input.py

prints a table of inputs and outcomes. A case fails on a traceback, on more than one line, on another exit code than 2,
on a line that does not name what is wrong, or if a file that was there before is changed.
"""

import contextlib
import io
import json
import pickle
import re
import shutil
import struct
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from coco_sets import annotation, write_json
from PIL import Image
from tiny_runs import SMALL, read_log, write_voc

import train

# Plain SGD has no state, so that a case writes a third as much.
SHORT = "--epochs 1 --limit-train 4 --limit-test 2 --student r10 --optimizer sgd --momentum 0 --lr 0.001"
QUICK = [*SMALL, *SHORT.split()]
TRAINS = None  # instead of the word that a refusal must hold

IMAGE, XML, LIST = "voc/JPEGImages/000000.jpg", "voc/Annotations/000000.xml", "voc/ImageSets/Main/trainval.txt"


def picture(width=96, height=72):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def noise(kind):
    return Image.fromarray((np.random.default_rng(0).random((72, 96)) * 65535).astype(kind))


def saved(mode, kind, **options):
    return lambda file: picture().convert(mode).save(file, kind, **options)


def rotated(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(72, 96).save(file, "JPEG", exif=exif)


def one_pixel(file):
    picture(1, 1).save(file, "PNG")
    xml = file.parents[2] / XML
    xml.write_text(re.sub(r"<(width|height)>\d+", r"<\1>1", xml.read_text()))


def cut_png(file):
    picture().save(file, "PNG")
    file.write_bytes(file.read_bytes()[:900])


def broken_chunk(file):
    header = struct.pack(">IIBBBBB", 96, 72, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header) ^ 1)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + checksum)


NO_TEXT = bytes(range(128, 256))
ENTITIES = b"".join(b"<!ENTITY x%d '%s'>" % (i, b"&x%d;" % (i - 1) * 10) for i in range(1, 12))
BOMB = b"<!DOCTYPE a [<!ENTITY x0 'lol'>%s]><annotation><size><width>&x11;</width></size></annotation>" % ENTITIES
OUTSIDE = b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><object>&x;</object></annotation>"


def corners(xmin, ymin, xmax, ymax):
    box = f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"
    return lambda xml: re.sub(b"<bndbox>.*?</bndbox>", box.encode(), xml, count=1)


def exchange(old, new, count=1):
    return lambda xml: xml.replace(old, new, count)


def field(key, name, value):
    """Puts a value into the first entry of a list."""
    return lambda data: data[key][0].update({name: value})


def box(*bbox):
    return field("annotations", "bbox", list(bbox))


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


def on_image(change, folder):
    change(folder / IMAGE)


def on_bytes(path, change, folder):
    """Puts other bytes into a file: the given ones, or those that a function makes of the file's own."""
    old = (folder / path).read_bytes()
    new = change(old) if callable(change) else change
    assert new != old
    (folder / path).write_bytes(new)


on_xml, on_list = partial(on_bytes, XML), partial(on_bytes, LIST)


def missing(path, folder):
    (folder / path).unlink()


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
    return ["--dataset", "voc", "--data-path", folder / "voc", "--teacher", "r10", "--teacher-weights", file]


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


# {(spoiler, word of the refusal, or TRAINS): {name: the spoiler's argument}}
TABLE = {
    (on_image, TRAINS): {
        "a grey JPEG": saved("L", "JPEG"),
        "a CMYK JPEG": saved("CMYK", "JPEG"),
        "a progressive JPEG": saved("RGB", "JPEG", progressive=True),
        "a JPEG with rubbish for EXIF": saved("RGB", "JPEG", exif=b"Exif\0\0rubbish"),
        "an EXIF-rotated JPEG whose annotation is upright": rotated,
        "an RGBA PNG": saved("RGBA", "PNG"),
        "a grey PNG with alpha": saved("LA", "PNG"),
        "a palette PNG": saved("P", "PNG"),
        "a palette PNG with transparency": saved("P", "PNG", transparency=3),
        "a one-bit PNG": saved("1", "PNG"),
        "a 16-bit PNG": lambda file: noise("uint16").save(file, "PNG"),
        "a GIF": saved("P", "GIF"),
        "an image of one pixel": one_pixel,
    },
    (on_image, "000000"): {
        "a strip of 20,000 x 1 pixels": lambda file: picture(20000, 1).save(file, "PNG"),
        "a decompression bomb": lambda file: Image.new("1", (14000, 14000)).save(file, "PNG", compress_level=1),
        "a float TIFF": lambda file: noise("float32").save(file, "TIFF"),
        "a JPEG cut short": lambda file: file.write_bytes(file.read_bytes()[:900]),
        "a PNG cut short": cut_png,
        "a PNG with a broken chunk": broken_chunk,
        "an image of no bytes": lambda file: file.write_bytes(b""),
        "a text named .jpg": lambda file: file.write_text("no image\n" * 50),
        "a missing image": lambda file: file.unlink(),
        "a folder in an image's place": lambda file: (file.unlink(), file.mkdir()),
    },
    (on_xml, TRAINS): {
        "XML with exchanged corners": corners(40, 40, 10, 10),
        "XML with negative coordinates": corners(-20, -5, 30, 30),
        "XML with a coordinate NaN": corners("nan", 5, 30, 30),
        "XML with a coordinate inf": corners(5, 5, "inf", 30),
        "XML with a box beyond the image": corners(60, 40, 500, 900),
        "XML with a box outside the image": corners(200, 200, 300, 300),
        "XML with a box of one pixel": corners(20, 20, 20, 20),
        "XML without objects": b"<annotation><size><width>96</width><height>72</height></size></annotation>",
        "XML with a byte order mark": lambda xml: b"\xef\xbb\xbf" + xml,
        "XML with CRLF": exchange(b"><", b">\r\n<", -1),
        "XML of an image of size NaN": exchange(b"<width>96</width>", b"<width>nan</width>"),
        "XML of an image of size 0": exchange(b"<width>96</width>", b"<width>0</width>"),
        "XML without a size": exchange(b"<width>96</width>", b""),
    },
    (on_xml, "000000.xml"): {
        "XML that is not XML": b"x0 y0 x1 y1 disc",
        "XML of no bytes": b"",
        "XML cut short": lambda xml: xml[: len(xml) // 2],
        "XML of bytes that are no text": NO_TEXT,
        "an entity bomb": BOMB,
        "an entity that reads another file": OUTSIDE,
        "XML in an unknown encoding": b"<?xml version='1.0' encoding='foo'?><annotation/>",
        "XML without a box": exchange(b"<bndbox>", b"<box>"),
        "XML without xmin": exchange(b"<xmin>", b"<xmine>"),
        "XML with a word for a coordinate": corners("left", 5, 30, 30),
        "XML with an object without a name": exchange(b"<name>disc</name>", b""),
    },
    (on_list, TRAINS): {
        "a list with blank lines": lambda names: b"\n\n" + names.replace(b"\n", b"\n\n"),
        "a list with a byte order mark": lambda names: b"\xef\xbb\xbf" + names,
        "a list with CRLF": exchange(b"\n", b"\r\n", -1),
        "a list with a name twice": lambda names: names + b"000000\n",
    },
    (on_list, "987654"): {"a list with a name that is not there": lambda names: b"987654\n" + names},
    (on_list, "trainval.txt"): {"a list of no names": b"\n \n", "a list of bytes that are no text": NO_TEXT},
    (missing, TRAINS): {"a missing annotation": XML},
    (missing, "trainval.txt"): {"a missing list": LIST},
    (coco_text, TRAINS): {"JSON with a byte order mark": lambda text: b"\xef\xbb\xbf" + text},
    (coco, TRAINS): {
        "JSON with a box NaN": box(float("nan"), 1, 2, 3),
        "JSON with a box of negative width": box(30, 10, -20, 20),
        "JSON with a box of three numbers": box(30, 10, 20),
        "JSON with words for a box": box("a", "b", "c", "d"),
        "JSON with a box outside the image": box(300, 300, 20, 20),
        "JSON with an id that is a text": field("images", "id", "100"),
        "JSON with a category that no image uses": lambda data: data["annotations"].__delitem__(slice(1, None, 2)),
    },
    (coco_text, "train.json"): {
        "JSON that is not JSON": lambda _: b"images: []",
        "JSON of no bytes": lambda _: b"",
        "JSON cut short": lambda text: text[:-40],
        "JSON of bytes that are no text": lambda _: NO_TEXT,
        "JSON nested without end": lambda _: b"[" * 100000,
        "JSON that is a list": lambda _: b"[1, 2]",
    },
    (coco, "train.json"): {
        "JSON with two images of one id": field("images", "id", 101),
        "JSON with a box of an unlisted image": field("annotations", "image_id", 5),
        "JSON with an unlisted category": field("annotations", "category_id", 5),
    },
    (coco, "categories"): {"JSON without categories": lambda data: data.pop("categories")},
    (coco, "images"): {"JSON without images": lambda data: data["images"].clear()},
    (coco, "x.jpg"): {"JSON with an image that is not there": field("images", "file_name", "x.jpg")},
    (coco, "no box to train on"): {"JSON without a box": lambda data: data["annotations"].clear()},
    (coco, "ball"): {"JSON with other categories than the test set's": field("categories", "name", "ball")},
    (teacher, "teacher.pth"): {
        "a checkpoint that is a pickle with code": lambda f: f.write_bytes(pickle.dumps({"model": Code(f)}, 2)),
        "a checkpoint with code in it": lambda f: torch.save({"format": 2, "model": Code(f)}, f),
        "a checkpoint of no bytes": lambda f: f.write_bytes(b""),
        "a checkpoint cut short": lambda f: f.write_bytes(f.read_bytes()[:-3000]),
        "a checkpoint with a flipped bit": flip,
        "a text for a checkpoint": lambda f: f.write_text("weights"),
        "a checkpoint that is missing": lambda f: f.unlink(),
        "a folder for a checkpoint": lambda f: (f.unlink(), f.mkdir()),
        "a checkpoint of weights alone": lambda f: torch.save(torch.load(f, weights_only=True)["model"], f),
        "a checkpoint of a tensor": lambda f: torch.save(torch.zeros(3), f),
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
}
FLAGS = {  # name: (flags, word of the refusal)
    "an unknown flag": ("--no-such-flag", "--no-such-flag"),
    "an unknown backbone": ("--student r11", "r11"),
    "no epochs": ("--epochs 0", "--epochs"),
    "a word for a number": ("--batch-size two", "two"),
    "a negative rate": ("--lr -1", "--lr"),
    "a rate NaN": ("--lr nan", "--lr"),
    "sides that are exchanged": ("--size 100 50", "--size"),
    "a device that is not there": ("--device toaster", "toaster"),
    "a year that is not there": ("--voc-years 1999 --data-path .", "VOC1999"),
    "weights of ImageNet for r10": ("--backbone-weights imagenet", "r10"),
    "a missing data folder": ("--dataset voc --data-path nowhere", "nowhere"),
}
# {name: (a function that spoils a fresh folder and may return a list of flags, word or TRAINS)}
CASES = {name: (partial(spoil, given), says) for (spoil, says), cases in TABLE.items() for name, given in cases.items()}
CASES |= {name: (lambda _, flags=flags: flags.split(), says) for name, (flags, says) in FLAGS.items()}


def files_in(folder):
    """{file: its size and the time it was written last}."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def prepare(folder):
    """The sound data and the sound teacher; each case spoils a copy."""
    write_voc(folder / "voc", ("disc", "square"), {"trainval": 4, "test": 2})
    flags = [*QUICK, "--dataset", "voc", "--data-path", folder / "voc", "--output", folder / "run"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(list(map(str, flags)))
    shutil.move(folder / "run/last.pth", folder / "teacher.pth")
    shutil.rmtree(folder / "run")
    return folder


def outcome(name, sound, folder):
    """Runs a case in a copy of the sound folder: whether the outcome is as it should be; the outcome in words."""
    spoil, says = CASES[name]
    shutil.copytree(sound, folder, ignore=None if "checkpoint" in name else shutil.ignore_patterns("teacher.pth"))
    flags = spoil(folder) or []
    if "--dataset" not in flags:
        flags = ["--dataset", "voc", "--data-path", folder / "voc", *flags]
    before, run = files_in(folder), folder / "run"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main(list(map(str, [*QUICK, "--output", run, *flags])))
        except SystemExit as stopped:
            code = stopped.code
    if (folder / "trap").exists():
        return False, "code ran"
    if {file: state for file, state in files_in(folder).items() if file in before} != before:
        return False, "a file that was there is changed"
    ended = (run / "result.json").exists()
    if code == 0:
        finite = all(np.isfinite([v for v in line.values() if v is not None]).all() for line in read_log(run)[0])
        dropped = [line for line in out.getvalue().splitlines() if "no area" in line]
        return says is TRAINS and finite and ended, "; ".join(["trains", *dropped])
    lines = [line for line in err.getvalue().splitlines() if "usage:" not in line and not line.startswith(" ")]
    refused = says is not TRAINS and code == 2 and len(lines) == 1 and says in lines[0]
    good = refused and "Traceback" not in err.getvalue() and not ended
    return good, (lines or ["nothing"])[-1].replace(str(folder), "DIR")


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        sound = prepare(Path(place) / "sound")
        print("| input | outcome |\n|---|---|")
        for number, name in enumerate(CASES):
            good, text = outcome(name, sound, Path(place) / str(number))
            failed += not good
            print(f"| {name} | {'' if good else 'WRONG: '}{text} |", flush=True)
            shutil.rmtree(Path(place) / str(number))
    print(f"\n{len(CASES)} cases, {failed} wrong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
