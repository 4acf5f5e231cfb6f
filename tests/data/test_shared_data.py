"""Real data, read whole, where it lies beside the repository: in ../shared/data."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tar.data.datasets import load_dataset
from tar.data.voc import VOC_CLASSES

DATA = Path(__file__).resolve().parents[3] / "shared/data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: real data is no part of the project")


@pytest.fixture(scope="module")
def minivoc():
    return load_dataset("voc", DATA / "minivoc")


@pytest.fixture(scope="module")
def bccd():
    return load_dataset("voc", DATA / "bccd")


def test_minivoc_has_all_images_and_boxes(minivoc):
    train, test = minivoc
    samples = train.samples + test.samples
    assert (len(train), len(test)) == (2000, 776) and len({file for file, *_ in samples}) == 2776
    assert sum(len(boxes) for _, boxes, _, _ in samples) == 17007
    assert sum(int(ignored.sum()) for _, _, _, ignored in samples) == 2802
    assert train.classes == test.classes == VOC_CLASSES
    labels = np.concatenate([labels for _, _, labels, _ in samples])
    assert set(labels) == set(range(1, 21))
    assert 0.64 < (labels == VOC_CLASSES.index("person") + 1).mean() < 0.66
    assert train.dropped == test.dropped == []


def test_bccd_has_all_images_and_boxes_but_two_of_no_size(bccd):
    train, test = bccd
    assert (len(train), len(test)) == (292, 72)
    assert train.classes == test.classes == ("Platelets", "RBC", "WBC")
    assert sum(len(s[1]) for source in bccd for s in source.samples) == 4888 - 2
    assert sorted(train.dropped) == ["BloodImage_00338", "BloodImage_00343"] and test.dropped == []


@pytest.mark.parametrize(("name", "longer"), [("minivoc", 320), ("bccd", 640)])
def test_boxes_cover_the_pixels_that_the_annotations_count(name, longer, request):
    source = request.getfixturevalue(name)[1]
    for file, boxes, _, _ in source.samples:
        text = (file.parents[1] / "Annotations" / f"{file.stem}.xml").read_text()
        x0, y0, x1, y1 = (list(map(int, re.findall(f"<{c}>([0-9]+)<", text))) for c in ("xmin", "ymin", "xmax", "ymax"))
        pixels = [(d - b + 1) * (c - a + 1) for a, b, c, d in zip(x0, y0, x1, y1, strict=True)]
        assert (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist() == pixels
        assert boxes[:, :2].tolist() == [[a - 1, b - 1] for a, b in zip(x0, y0, strict=True)]
    for index in (0, 7, len(source) - 1):
        image, boxes, *_ = source.load(0, index)
        height, width = image.shape[1:]
        assert max(height, width) == longer and image.dtype == torch.uint8 and image.float().std() > 5
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()


# Two sets in COCO's format, training and test: images, boxes, crowds; classes; classes without a box.
PCB = ("pcb", "images", "test", [1000, 500], [6873, 3140], [0, 0], 6, [[], []])
MINIVOC = ("minivoc", "VOCdevkit/VOC2007/JPEGImages", "val", [2000, 776], [18770, 7674], [17, 2], 80)


@pytest.mark.parametrize("counts", [PCB, (*MINIVOC, [["zebra"], ["toaster"]])], ids=["pcb", "minivoc"])
def test_coco_sets_are_what_their_files_say(counts):
    name, folder, test, images, boxes, crowds, classes, unused = counts
    files, folder = [DATA / name / f"instances_{split}.json" for split in ("train", test)], DATA / name / folder
    sources = load_dataset("coco", files=(files[0], folder, files[1], folder))
    assert [len(source) for source in sources] == images
    assert [sum(len(s[2]) for s in source.samples) for source in sources] == boxes
    assert [sum(s[4].sum() for s in source.samples) for source in sources] == crowds
    assert {len(source.classes) for source in sources} == {classes}
    assert [source.unused for source in sources] == unused and [source.dropped for source in sources] == [[], []]
    for source in sources:
        image, boxes, *_ = source.load(0, 7)
        height, width = image.shape[1:]
        assert source.wide[7] == (width > height) and image.float().std() > 5
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
