"""Images and boxes in files: how images are read, sizes, orientations, what is noted and what is refused."""

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tar import UserError
from tar.data.image_files import EXIF, files_in, read_header, read_image, turn
from tar.data.source import SAMPLE, Source
from tar.pictures.images_to_show import images_to_show

BOX = (2, 4, 10, 20)
SIZE = (40, 30)


def write(file, size=SIZE, orientation=None):
    """An image of noise, with an EXIF orientation."""
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    pixels = np.random.default_rng(orientation or 0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, exif=exif)
    return str(file)


def source(files, boxes=((0, *BOX),), sizes=None, **options):
    """boxes: of class 1, (number of the image, x0, y0, x1, y1)."""
    return Source(("thing",), files, sizes or [SIZE] * len(files), [(*b, 1, 0) for b in boxes], "list.txt", **options)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "a.png")


def test_images_of_16_bits_become_three_channels_of_eight_bits(tmp_path):
    values = np.array([[0, 257, 514], [32896, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").tolist() == [[[0, 1, 2], [128, 254, 255]]] * 3


@pytest.mark.parametrize("given", [(0, 0), (None, None), (float("nan"), 30), (-40, 30), (30, 40), (20, 15), SIZE])
@pytest.mark.parametrize("trust", [True, False])
def test_the_image_decides_its_own_size(file, given, trust):
    """Unknown sizes are read; exchanged and smaller ones cost no box, and are counted."""
    found = source([file], [(0, 2, 4, 38, 28)], [given], trust=trust)
    assert found.sizes.tolist() == [[40, 30]] and found.wide == [True] and found.boxes.tolist() == [[2, 4, 38, 28]]
    assert any("another size" in note and ": 1 (" in note for note in found.notes) == (given in ((30, 40), (20, 15)))


@pytest.mark.parametrize("wrong", [0, 1])
def test_given_sizes_are_trusted_as_long_as_a_sample_agrees(file, monkeypatch, wrong):
    """Of 300 images 200 headers are read; then all if one of the 200 disagrees (the last is in every sample)."""
    read = []
    monkeypatch.setattr("tar.data.source.read_header", lambda *a, **k: read.append(a) or read_header(*a, **k))
    found = source([file] * 300, sizes=[SIZE] * 299 + [SIZE[::-1] if wrong else SIZE])
    assert len(read) == (SAMPLE + 300 if wrong else SAMPLE) and (found.sizes == [40, 30]).all()
    assert ["another size" in note for note in found.notes] == [True] * wrong


def test_an_image_of_another_size_than_thought_cuts_its_boxes_when_it_is_loaded(tmp_path, file):
    found = source([file], [(0, *BOX), (0, 30, 20, 38, 28)])
    write(tmp_path / "a.png", (20, 15))
    image, boxes, labels, ignored = found.load(0, 0)
    assert image.shape == (3, 15, 20) and boxes.tolist() == [[2, 4, 10, 15]] and boxes.dtype == torch.float32
    assert labels.tolist() == [1] and ignored.tolist() == [False]


def test_boxes_beyond_the_image_are_counted_and_most_of_them_refused(file):
    far, near = (0, 30, 20, 42, 30), (0, 30, 20, 41, 30)
    found = source([file], [(0, *BOX), near, far])
    assert [": 1 (" in note and "beyond" in note for note in found.notes] == [True]
    assert found.boxes[1:].tolist() == [[30, 20, 40, 30]] * 2
    with pytest.raises(UserError, match=r"list.txt: most boxes are beyond.*corners.*resized.*a.png"):
        source([file], [(0, *BOX), far, far])


@pytest.mark.parametrize("fractions", [(0.1, 0.2, 0.7, 0.9), (-0.9, -0.8, 0.7, 0.9)], ids=["COCO", "VOC"])
def test_most_boxes_under_one_pixel_are_refused_as_fractions(file, fractions):
    found = source([file], [(0, *BOX), (0, *fractions)])
    assert any("smaller than a pixel" in note for note in found.notes) and len(found.boxes) == 2
    with pytest.raises(UserError, match=r"list.txt: most boxes are smaller.*fractions"):
        source([file], [(0, *BOX), (0, *fractions), (0, *fractions)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_and_its_boxes_are_turned_as_pil_turns_them(tmp_path, orientation):
    """ "auto" leaves an image as it is stored where only the stored pixels have the annotation's size."""
    file = write(tmp_path / "a.png", orientation=orientation)
    with Image.open(file) as image:
        both = image, ImageOps.exif_transpose(image)
        stored, upright = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) for pixels in both)
    size = upright.shape[:0:-1]
    assert read_header(file) == (size, orientation, orientation, "RGB")
    as_said = stored if orientation >= 5 else upright
    for options, expected in (
        ((), upright),
        ((size,), upright),
        (((50, 50),), upright),
        ((SIZE,), as_said),
        ((SIZE, "stored"), stored),
        ((SIZE, "upright"), upright),
    ):
        assert torch.equal(read_image(file, *options), expected)
    marked = torch.zeros(1, 30, 40)
    marked[:, 4:20, 2:10] = 1
    turned, [[x0, y0, x1, y1]] = turn(marked, torch.tensor([BOX]).float(), orientation)
    assert turned[:, int(y0) : int(y1), int(x0) : int(x1)].sum() == turned.sum() == 8 * 16


@pytest.mark.parametrize("exif", EXIF)
def test_rotated_images_are_counted_with_the_reading_that_is_used(tmp_path, exif):
    files = [write(tmp_path / f"{orientation}.png", orientation=orientation) for orientation in (3, 6, 1)]
    found = source(files, [(i, *BOX) for i in range(3)], exif=exif)
    upright = {"auto": 1, "upright": 2, "stored": 0}[exif]
    assert any(f"{upright} are turned upright, {2 - upright} stay as stored" in note for note in found.notes)
    for index, file in enumerate(files):
        image = found.load(0, index)[0]
        assert torch.equal(image, read_image(file, SIZE, exif)) and image.shape[:0:-1] == tuple(found.sizes[index])


def test_an_image_that_is_read_as_stored_is_shown_upright_with_its_boxes(tmp_path):
    file = write(tmp_path / "a.png", orientation=6)
    [(name, image, target)] = images_to_show([file], source([file], exif="stored"))
    assert name == "a" and torch.equal(image, read_image(file)) and image.shape == (3, 40, 30)
    assert target["boxes"].tolist() == [[30 - 20, 2, 30 - 4, 10]]  # what was at the left is at the top


NINETY_NINE = b"MM\0*\0\0\0\x08\0\x01\1\x12\0\3\0\0\0\1\0\x63\0\0"  # for an orientation


@pytest.mark.parametrize(("kind", "exif"), [("JPEG", b"Exif\0\0rubbish"), ("PNG", b"rubbish"), ("PNG", NINETY_NINE)])
def test_rubbish_for_exif_is_no_orientation(tmp_path, kind, exif):
    Image.new("RGB", SIZE).save(tmp_path / "a", kind, exif=exif)
    assert read_header(tmp_path / "a") == (SIZE, 1, 1, "RGB") and read_image(tmp_path / "a").shape == (3, 30, 40)


@pytest.mark.parametrize(("highest", "dark"), [(255, True), (16383, True), (40000, False), (65535, False)])
def test_images_of_16_bits_that_end_far_below_are_said(tmp_path, highest, dark):
    Image.fromarray(np.linspace(0, highest, 1200).reshape(30, 40).astype(np.uint16)).save(tmp_path / "a.png")
    found = source([tmp_path / "a.png"])
    assert any("nearly black" in note for note in found.notes) == dark
    assert (found.load(0, 0)[0].max() < 64) == dark


def test_a_broken_image_of_16_bits_and_images_beyond_the_limit_do_not_stop_the_rest(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file in files:
        Image.fromarray(np.full((30, 40), 40000, dtype=np.uint16)).save(file)
    with open(files[1], "r+b") as broken:
        broken.truncate(60)
    found = source(files, [(1, *BOX)], sizes=[(0, 0)] * 3)
    assert len(found) == 3 and found.boxes.tolist() == [list(BOX)]
    with pytest.raises(UserError, match=r"1.png: cannot be read as an image"):
        found.load(0, 1)
    beyond = [(i, *BOX) if i == 0 else (i, 0, 0, 900, 900) for i in range(3)]
    assert source(files, beyond, limit=1).notes == []


def test_a_folder_is_searched_through_links_each_folder_once(tmp_path):
    for name in ("all/a", "elsewhere/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").touch()
    (tmp_path / "all/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "all")
    found = sorted(re.sub(".*/all/", "", file) for file in files_in(tmp_path / "all"))
    assert found == ["a/x.png", "link/b/x.png"]
