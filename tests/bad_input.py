"""A corpus of input that is broken, hostile or merely odd: it either trains or is refused in one line that names it.

    python tests/bad_input.py

prints a table: what was given, what came of it. A case fails if there is a traceback, more than one line, another exit
code than 2, a line that does not name what is wrong, or if anything that was there before is changed.
"""

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_runs import SMALL, read_log, write_voc

import train
from tar import checkpoint

TRAINS = None
# plain SGD has no state: a case writes a third as much
SHORT = "--epochs 1 --limit-train 4 --limit-test 2 --student r10 --optimizer sgd --momentum 0 --lr 0.001"
QUICK = [*SMALL, *SHORT.split()]
CLASSES = ("disc", "square")
CASES = {}  # name: (what spoils a fresh folder and returns flags, what the refusal names, or TRAINS)


def case(name, says=TRAINS):
    """Registers a function that spoils the folder it is given and returns the flags of train.py, or none."""

    def register(spoil):
        assert name not in CASES
        CASES[name] = (spoil, says)
        return spoil

    return register


def image_of(folder):
    return folder / "voc/JPEGImages/000000.jpg"


def xml_of(folder):
    return folder / "voc/Annotations/000000.xml"


def list_of(folder):
    return folder / "voc/ImageSets/Main/trainval.txt"


def picture(size=(96, 72)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Images


def saved(mode, kind, **options):
    def spoil(folder):
        picture().convert(mode).save(image_of(folder), kind, **options)

    return spoil


for title, how in {
    "a grey JPEG": saved("L", "JPEG"),
    "a CMYK JPEG": saved("CMYK", "JPEG"),
    "a progressive JPEG": saved("RGB", "JPEG", progressive=True),
    "an RGBA PNG": saved("RGBA", "PNG"),
    "a grey PNG with alpha": saved("LA", "PNG"),
    "a palette PNG": saved("P", "PNG"),
    "a palette PNG with transparency": saved("P", "PNG", transparency=3),
    "a one-bit PNG": saved("1", "PNG"),
    "a GIF": saved("P", "GIF"),
}.items():
    case(title)(how)


@case("a 16-bit PNG")
def _(folder):
    values = np.random.default_rng(0).integers(0, 65535, (72, 96), dtype=np.uint16)
    Image.fromarray(values).save(image_of(folder), "PNG")


@case("an EXIF-rotated JPEG whose annotation is upright")
def _(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture((72, 96)).save(image_of(folder), "JPEG", exif=exif)


@case("a JPEG with rubbish for EXIF")
def _(folder):
    picture().save(image_of(folder), "JPEG", exif=b"Exif\0\0rubbish")


@case("an image of one pixel")
def _(folder):
    picture((1, 1)).save(image_of(folder), "PNG")
    text = (
        xml_of(folder).read_text().replace("<width>96</width><height>72</height>", "<width>1</width><height>1</height>")
    )
    xml_of(folder).write_text(text)


@case("a strip of 20,000 x 1 pixels", "000000.jpg")
def _(folder):
    picture((20000, 1)).save(image_of(folder), "PNG")


@case("a decompression bomb", "000000.jpg")
def _(folder):
    Image.new("1", (20000, 20000)).save(image_of(folder), "PNG")


@case("a float TIFF", "000000.jpg")
def _(folder):
    Image.fromarray(np.random.default_rng(0).normal(size=(72, 96)).astype(np.float32)).save(image_of(folder), "TIFF")


@case("a JPEG cut short", "000000.jpg")
def _(folder):
    image_of(folder).write_bytes(image_of(folder).read_bytes()[:900])


@case("a PNG cut short", "000000.jpg")
def _(folder):
    picture().save(image_of(folder), "PNG")
    image_of(folder).write_bytes(image_of(folder).read_bytes()[:900])


@case("a PNG with a broken chunk", "000000.jpg")
def _(folder):
    header = struct.pack(">IIBBBBB", 96, 72, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header) ^ 1)
    image_of(folder).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


@case("an image of no bytes", "000000.jpg")
def _(folder):
    image_of(folder).write_bytes(b"")


@case("a text named .jpg", "000000.jpg")
def _(folder):
    image_of(folder).write_text("no image\n" * 50)


@case("a missing image", "000000.jpg")
def _(folder):
    image_of(folder).unlink()


@case("a folder in an image's place", "000000.jpg")
def _(folder):
    image_of(folder).unlink()
    image_of(folder).mkdir()


# VOC's annotations and lists


def xml(find, put):
    def spoil(folder):
        text = xml_of(folder).read_text()
        assert find in text
        xml_of(folder).write_text(text.replace(find, put, 1))

    return spoil


def coordinates(xmin, ymin, xmax, ymax):
    def spoil(folder):
        ends = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
        head, tail = xml_of(folder).read_text().split("<bndbox>", 1)
        xml_of(folder).write_text(f"{head}<bndbox>{ends}{tail[tail.index('</bndbox>') :]}")

    return spoil


def raw(path, content):
    def spoil(folder):
        file = path(folder)
        value = content(file.read_bytes()) if callable(content) else content
        file.write_bytes(value)

    return spoil


BOMB = b"<!DOCTYPE a [<!ENTITY x0 'lol'>" + b"".join(
    b"<!ENTITY x%d '%s'>" % (i, b"&x%d;" % (i - 1) * 10) for i in range(1, 12)
)
BOMB += b"]><annotation><size><width>&x11;</width></size></annotation>"
OUTSIDE = (
    b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><object><name>&x;</name></object></annotation>"
)
for title, how, says in (
    ("XML with exchanged corners", coordinates(40, 40, 10, 10), TRAINS),
    ("XML with negative coordinates", coordinates(-20, -5, 30, 30), TRAINS),
    ("XML with a coordinate NaN", coordinates("nan", 5, 30, 30), TRAINS),
    ("XML with a coordinate inf", coordinates(5, 5, "inf", 30), TRAINS),
    ("XML with a box beyond the image", coordinates(60, 40, 500, 900), TRAINS),
    ("XML with a box outside the image", coordinates(200, 200, 300, 300), TRAINS),
    ("XML with a box of one pixel", coordinates(20, 20, 20, 20), TRAINS),
    (
        "XML without objects",
        raw(xml_of, b"<annotation><size><width>96</width><height>72</height></size></annotation>"),
        TRAINS,
    ),
    ("XML with a byte order mark", raw(xml_of, lambda b: b"\xef\xbb\xbf" + b), TRAINS),
    ("XML with CRLF", raw(xml_of, lambda b: b.replace(b"><", b">\r\n<")), TRAINS),
    ("XML that is not XML", raw(xml_of, b"x0 y0 x1 y1 disc"), "000000.xml"),
    ("XML of no bytes", raw(xml_of, b""), "000000.xml"),
    ("XML cut short", raw(xml_of, lambda b: b[: len(b) // 2]), "000000.xml"),
    ("XML of bytes that are no text", raw(xml_of, bytes(range(128, 256))), "000000.xml"),
    ("an entity bomb", raw(xml_of, BOMB), "000000.xml"),
    ("an entity that reads another file", raw(xml_of, OUTSIDE), "000000.xml"),
    ("XML in an unknown encoding", raw(xml_of, b"<?xml version='1.0' encoding='foo'?><annotation/>"), "000000.xml"),
    ("XML without a size", xml("<width>96</width>", ""), "000000.xml"),
    ("XML of an image of size 0", xml("<width>96</width>", "<width>0</width>"), "000000.xml"),
    ("XML of an image of size NaN", xml("<width>96</width>", "<width>nan</width>"), "000000.xml"),
    ("XML without a box", xml("<bndbox>", "<box>"), "000000.xml"),
    ("XML without xmin", xml("<xmin>", "<xmine>"), "000000.xml"),
    ("XML with a word for a coordinate", coordinates("left", 5, 30, 30), "000000.xml"),
    ("XML with an object without a name", xml("<name>disc</name>", ""), "000000.xml"),
    ("a list with blank lines", raw(list_of, lambda b: b"\n\n" + b.replace(b"\n", b"\n\n")), TRAINS),
    ("a list with a byte order mark", raw(list_of, lambda b: b"\xef\xbb\xbf" + b), TRAINS),
    ("a list with CRLF", raw(list_of, lambda b: b.replace(b"\n", b"\r\n")), TRAINS),
    ("a list with a name twice", raw(list_of, lambda b: b + b"000000\n"), TRAINS),
    ("a list with a name that is not there", raw(list_of, lambda b: b"987654\n" + b), "987654"),
    ("a list of no names", raw(list_of, b"\n \n"), "trainval.txt"),
    ("a list of bytes that are no text", raw(list_of, bytes(range(128, 256))), "trainval.txt"),
):
    case(title, says)(how)


@case("a missing annotation", "000000.xml")
def _(folder):
    xml_of(folder).unlink()


@case("a missing list", "trainval.txt")
def _(folder):
    list_of(folder).unlink()


@case("a missing data folder", "nowhere")
def _(folder):
    return ["--dataset", "voc", "--data-path", folder / "nowhere"]


# COCO's annotations


def coco(change, raw=None):
    """Trains on the same images in COCO's format, after a change of the file's contents."""

    def spoil(folder):
        data = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "disc"}, {"id": 9, "name": "square"}]}
        for i in range(6):
            data["images"].append({"id": 100 + i, "file_name": f"{i:06d}.jpg", "width": 96, "height": 72})
            for k, category in enumerate((7, 9)):
                row = {"id": 2 * i + k + 1, "image_id": 100 + i, "category_id": category, "iscrowd": 0}
                data["annotations"].append({**row, "bbox": [5 + 40 * k, 10, 28, 28], "area": 784})
        (folder / "val.json").write_text(json.dumps(data))
        text = json.dumps(data)
        if change:
            change(data)
            text = json.dumps(data)
        (folder / "train.json").write_bytes(raw(text.encode()) if raw else text.encode())
        images = folder / "voc/JPEGImages"
        flags = ["--train-json", folder / "train.json", "--train-images", images]
        return ["--dataset", "coco", *flags, "--val-json", folder / "val.json", "--val-images", images]

    return spoil


def box(*bbox):
    return lambda data: data["annotations"][0].__setitem__("bbox", list(bbox))


for title, how, says in (
    ("JSON with a byte order mark", coco(None, lambda b: b"\xef\xbb\xbf" + b), TRAINS),
    ("JSON with a box NaN", coco(box(float("nan"), 1, 2, 3)), TRAINS),
    ("JSON with a box of negative width", coco(box(30, 10, -20, 20)), TRAINS),
    ("JSON with a box of three numbers", coco(box(30, 10, 20)), TRAINS),
    ("JSON with words for a box", coco(box("a", "b", "c", "d")), TRAINS),
    ("JSON with a box outside the image", coco(box(300, 300, 20, 20)), TRAINS),
    (
        "JSON with a category that no image uses",
        coco(lambda d: d["annotations"].__delitem__(slice(1, None, 2))),
        TRAINS,
    ),
    ("JSON that is not JSON", coco(None, lambda _: b"images: []"), "train.json"),
    ("JSON of no bytes", coco(None, lambda _: b""), "train.json"),
    ("JSON cut short", coco(None, lambda b: b[:-40]), "train.json"),
    ("JSON of bytes that are no text", coco(None, lambda _: bytes(range(128, 256))), "train.json"),
    ("JSON nested without end", coco(None, lambda _: b"[" * 100000), "train.json"),
    ("JSON that is a list", coco(None, lambda _: b"[1, 2]"), "train.json"),
    ("JSON without categories", coco(lambda d: d.pop("categories")), "categories"),
    ("JSON without images", coco(lambda d: d.__setitem__("images", [])), "images"),
    ("JSON with an id that is a word", coco(lambda d: d["images"][0].__setitem__("id", "100")), "train.json"),
    ("JSON with two images of one id", coco(lambda d: d["images"][0].__setitem__("id", 101)), "train.json"),
    (
        "JSON with a box of an unlisted image",
        coco(lambda d: d["annotations"][0].__setitem__("image_id", 5)),
        "train.json",
    ),
    ("JSON with an unlisted category", coco(lambda d: d["annotations"][0].__setitem__("category_id", 5)), "train.json"),
    ("JSON with an image that is not there", coco(lambda d: d["images"][0].__setitem__("file_name", "x.jpg")), "x.jpg"),
    ("JSON without a box", coco(lambda d: d["annotations"].clear()), "--keep-empty"),
    (
        "JSON with other categories than the test set's",
        coco(lambda d: d["categories"][0].__setitem__("name", "ball")),
        "ball",
    ),
):
    case(title, says)(how)


# Checkpoints


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def teacher(change):
    """Distils from a checkpoint, after a change of its file."""

    def spoil(folder):
        change(folder / "teacher.pth")
        return [
            "--dataset",
            "voc",
            "--data-path",
            folder / "voc",
            "--teacher",
            "r10",
            "--teacher-weights",
            folder / "teacher.pth",
        ]

    return spoil


def state(change):
    def spoil(file):
        content = torch.load(file, weights_only=True)
        change(content)
        content["digest"] = checkpoint.digest(content)
        torch.save(content, file)

    return spoil


def flip(file):
    """Flips one bit of a weight, past all of the file's own structure."""
    content = torch.load(file, weights_only=True)
    name = max(content["model"], key=lambda k: content["model"][k].numel())
    inner = bytes(content["model"][name].untyped_storage()[400:440])
    whole = bytearray(file.read_bytes())
    whole[whole.index(inner) + 7] ^= 16
    file.write_bytes(whole)


def trap(folder):
    return folder / "trap"


for title, change in (
    (
        "a checkpoint that is a pickle with code",
        lambda f: f.write_bytes(pickle.dumps({"model": Code(str(trap(f.parent)))}, 2)),
    ),
    ("a checkpoint with code in it", lambda f: torch.save({"format": 2, "model": Code(str(trap(f.parent)))}, f)),
    ("a checkpoint of no bytes", lambda f: f.write_bytes(b"")),
    ("a checkpoint cut short", lambda f: f.write_bytes(f.read_bytes()[:-3000])),
    ("a checkpoint with a flipped bit", flip),
    ("a text for a checkpoint", lambda f: f.write_text("weights")),
    ("a checkpoint that is missing", lambda f: f.unlink()),
    ("a folder for a checkpoint", lambda f: (f.unlink(), f.mkdir())),
    ("a checkpoint of a newer format", state(lambda s: s.__setitem__("format", 99))),
    ("a checkpoint of weights alone", lambda f: torch.save(torch.load(f, weights_only=True)["model"], f)),
    ("a checkpoint of a tensor", lambda f: torch.save(torch.zeros(3), f)),
    ("a checkpoint of an unknown backbone", state(lambda s: s["build"].__setitem__("backbone", "r999"))),
    ("a checkpoint of unknown options", state(lambda s: s["build"].__setitem__("colour", "red"))),
    ("a checkpoint that lacks a weight", state(lambda s: s["model"].pop(next(iter(s["model"]))))),
    ("a checkpoint with a weight of another shape", state(lambda s: s["build"].__setitem__("fpn_channels", 8))),
    ("a checkpoint of other classes", state(lambda s: s.__setitem__("classes", ["disc", "ball"]))),
    ("a checkpoint of another backbone", state(lambda s: s["build"].__setitem__("backbone", "r18"))),
    ("a checkpoint of another detector", state(lambda s: s["build"].__setitem__("detector", "retinanet"))),
):
    case(title, "teacher.pth")(teacher(change))


# Outputs and flags


@case("an output folder inside a file", "--output")
def _(folder):
    (folder / "file").write_text("")
    return ["--output", folder / "file/run"]


@case("an output folder that is a file", "--output")
def _(folder):
    (folder / "file").write_text("")
    return ["--output", folder / "file"]


@case("an output folder with a run of other settings", "--output")
def _(folder):
    (folder / "old").mkdir()
    (folder / "old/config.json").write_text('{"lr": 1.0}')
    return ["--output", folder / "old"]


@case("an output folder with a broken config.json", "config.json")
def _(folder):
    (folder / "old").mkdir()
    (folder / "old/config.json").write_text('{"lr": ')
    return ["--output", folder / "old"]


@case("an output folder with a config.json that is a list", "config.json")
def _(folder):
    (folder / "old").mkdir()
    (folder / "old/config.json").write_text("[1, 2]")
    return ["--output", folder / "old"]


for title, words, says in (
    ("an unknown flag", "--no-such-flag", "--no-such-flag"),
    ("an unknown backbone", "--student r11", "r11"),
    ("no epochs", "--epochs 0", "--epochs"),
    ("a word for a number", "--batch-size two", "two"),
    ("a negative rate", "--lr -1", "--lr"),
    ("a rate NaN", "--lr nan", "--lr"),
    ("sides that are exchanged", "--size 100 50", "--size"),
    ("a device that is not there", "--device toaster", "toaster"),
    ("a year that is not there", "--voc-years 1999 --data-path .", "VOC1999"),
    ("weights of ImageNet for r10", "--backbone-weights imagenet", "r10"),
):
    case(title, says)(lambda _, words=words: words.split())


def contents(folder):
    """{file: digest of what is in it} of everything under a folder."""
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def prepare(folder):
    """The sound data and the sound teacher that the cases spoil copies of."""
    write_voc(folder / "voc", CLASSES, {"trainval": 4, "test": 2})
    flags = [*QUICK, "--dataset", "voc", "--data-path", folder / "voc", "--output", folder / "run"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(list(map(str, flags)))
    shutil.move(folder / "run/last.pth", folder / "teacher.pth")
    shutil.rmtree(folder / "run")
    return folder


def outcome(name, sound, folder):
    """Runs a case in a copy of the sound folder.

    Returns:
        (whether it came out as it should, what came of it in words).
    """
    spoil, says = CASES[name]
    shutil.copytree(sound, folder)
    given = spoil(folder) or []
    if "--dataset" not in given:
        given = ["--dataset", "voc", "--data-path", folder / "voc", *given]
    before, run = contents(folder), folder / "run"
    flags = [*QUICK, "--output", run, *given]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main(list(map(str, flags)))
        except SystemExit as stopped:
            code = stopped.code
    lines = [line for line in err.getvalue().splitlines() if "usage:" not in line and not line.startswith(" ")]
    kept = {file: digest for file, digest in contents(folder).items() if file in before} == before
    if (folder / "trap").exists():
        return False, "code ran"
    if not kept:
        return False, "what was there is changed"
    if code == 0:
        finite = all(np.isfinite(list(v for v in line.values() if v is not None)).all() for line in read_log(run)[0])
        dropped = [line for line in out.getvalue().splitlines() if "area" in line]
        return says is TRAINS and finite and (run / "result.json").exists(), "; ".join(["trains", *dropped])
    good = (
        says is not TRAINS and code == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in err.getvalue()
    )
    return good and not (run / "result.json").exists(), (lines or ["nothing"])[-1].replace(str(folder), "DIR")


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        sound = prepare(Path(place) / "sound")
        print("| given | outcome |\n|---|---|")
        for number, name in enumerate(CASES):
            good, text = outcome(name, sound, Path(place) / str(number))
            failed += not good
            print(f"| {name} | {'' if good else 'WRONG: '}{text} |", flush=True)
            shutil.rmtree(Path(place) / str(number))
    trains = sum(says is TRAINS for _, says in CASES.values())
    print(f"\n{len(CASES)} cases, {trains} that should train and {len(CASES) - trains} that should not; {failed} wrong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
