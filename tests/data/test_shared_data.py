"""Real data, read whole, where it lies beside the repository: in ../shared/data."""

import re
from pathlib import Path

import pytest
import torch

from tar.data.datasets import load_dataset
from tar.data.voc import VOC_CLASSES

DATA = Path(__file__).resolve().parents[3] / "shared/data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: real data is no part of the project")


def image_with_boxes_inside(source, index):
    image, boxes, *_ = source.load(0, index)
    height, width = image.shape[1:]
    assert source.wide[index] == (width > height) and image.float().std() > 5
    assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
    return image


# Two sets in VOC's layout, training and test: images, boxes, difficult ones; classes; pixels of the longer side.
VOC_MINIVOC = ("minivoc", [2000, 776], 17007, 2802, VOC_CLASSES, 320)
BCCD = ("bccd", [292, 72], 4888, 0, ("Platelets", "RBC", "WBC"), 640)  # two boxes have one pixel


@pytest.mark.parametrize(
    ("name", "images", "boxes", "ignored", "classes", "longer"), [VOC_MINIVOC, BCCD], ids=["minivoc", "bccd"]
)
def test_voc_sets_have_all_boxes_and_each_covers_the_pixels_that_its_annotation_counts(
    name, images, boxes, ignored, classes, longer
):
    sources = load_dataset("voc", DATA / name)
    assert [len(source) for source in sources] == images
    assert sum(len(source.boxes) for source in sources) == boxes
    assert sum(source.ignored.sum() for source in sources) == ignored
    assert {source.classes for source in sources} == {classes} and {*sources[0].labels} == {*range(1, len(classes) + 1)}
    assert [source.dropped for source in sources] == [[], []]
    source = sources[1]
    for index in range(len(source)):
        file = Path(source.name(0, index))
        text = (file.parents[1] / f"Annotations/{file.stem}.xml").read_text()
        columns = [map(int, re.findall(f"<{c}>([0-9]+)<", text)) for c in ("xmin", "ymin", "xmax", "ymax")]
        expected = [[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in zip(*columns, strict=True)]
        assert source.boxes_of(index)[0].tolist() == expected
    for index in (0, 7, len(source) - 1):
        assert max(image_with_boxes_inside(source, index).shape) == longer


# Two sets in COCO's format, training and test: images, boxes, crowds; classes; classes without a box.
PCB = ("pcb", "images", "test", [1000, 500], [6873, 3140], [0, 0], 6, [[], []])
MINIVOC = ("minivoc", "VOCdevkit/VOC2007/JPEGImages", "val", [2000, 776], [18770, 7674], [17, 2], 80)


@pytest.mark.parametrize("counts", [PCB, (*MINIVOC, [["zebra"], ["toaster"]])], ids=["pcb", "minivoc"])
def test_coco_sets_are_what_their_files_say(counts):
    name, folder, test, images, boxes, crowds, classes, unused = counts
    files, folder = [DATA / name / f"instances_{split}.json" for split in ("train", test)], DATA / name / folder
    sources = load_dataset("coco", files=(files[0], folder, files[1], folder))
    assert [len(source) for source in sources] == images
    assert [len(source.boxes) for source in sources] == boxes
    assert [source.ignored.sum() for source in sources] == crowds
    assert {len(source.classes) for source in sources} == {classes}
    assert [source.unused for source in sources] == unused and [source.dropped for source in sources] == [[], []]
    for source in sources:
        image_with_boxes_inside(source, 7)
