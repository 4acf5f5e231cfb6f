"""Real data, read whole, where it lies beside the repository: in ../shared/data."""

import re
from pathlib import Path

import pytest
import torch

from tar.data.datasets import load_dataset
from tar.data.voc import VOC_CLASSES

DATA = Path(__file__).resolve().parents[3] / "shared/data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: real data is no part of the project")


def counts_of(sources):
    """Images, boxes and ignored boxes of sources, none of which has a box that is dropped."""
    for source in sources:
        image, boxes, *_ = source.load(0, 7)
        height, width = image.shape[1:]
        assert source.wide[7] == (width > height) and image.float().std() > 5
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert not any("dropped" in note for note in source.notes)
    return [(len(source), len(source.boxes), int(source.ignored.sum())) for source in sources]


@pytest.mark.parametrize(
    ("name", "counts", "classes"),
    [
        ("minivoc", [(2000, 12074, 1991), (776, 4933, 811)], VOC_CLASSES),
        ("bccd", [(292, 3943, 0), (72, 945, 0)], ("Platelets", "RBC", "WBC")),  # two boxes have one pixel
    ],
)
def test_voc_sets_have_all_boxes_and_each_covers_the_pixels_that_its_annotation_counts(name, counts, classes):
    sources = load_dataset("voc", DATA / name)
    assert counts_of(sources) == counts
    assert {source.classes for source in sources} == {classes} and {*sources[0].labels} == {*range(1, len(classes) + 1)}
    source = sources[1]
    for index in range(len(source)):
        file = Path(source.name(0, index))
        text = (file.parents[1] / f"Annotations/{file.stem}.xml").read_text()
        columns = [map(int, re.findall(f"<{c}>([0-9]+)<", text)) for c in ("xmin", "ymin", "xmax", "ymax")]
        expected = [[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in zip(*columns, strict=True)]
        assert source.boxes_of(index)[0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "folder", "test", "counts", "classes", "unused"),
    [
        ("pcb", "images", "test", [(1000, 6873, 0), (500, 3140, 0)], 6, []),
        (
            *("minivoc", "VOCdevkit/VOC2007/JPEGImages", "val", [(2000, 18770, 17), (776, 7674, 2)], 80),
            ["classes without a box: zebra", "classes without a box: toaster"],
        ),
    ],
    ids=["pcb", "minivoc"],
)
def test_coco_sets_are_what_their_files_say(name, folder, test, counts, classes, unused):
    files, folder = [DATA / name / f"instances_{split}.json" for split in ("train", test)], DATA / name / folder
    sources = load_dataset("coco", files=(files[0], folder, files[1], folder))
    assert counts_of(sources) == counts and {len(source.classes) for source in sources} == {classes}
    assert [note for source in sources for note in source.notes if "without a box" in note] == unused
