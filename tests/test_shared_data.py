"""Real data, read whole, where it is at hand: ../shared/data beside the repository."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tar.data import Samples, load_dataset
from tar.evaluation import voc_metrics
from tar.voc import VOC_CLASSES, voc_classes

DATA = Path(__file__).resolve().parents[2] / "shared/data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: real data is no part of the project")


@pytest.fixture(scope="module")
def minivoc():
    return load_dataset("voc", DATA / "minivoc")


@pytest.fixture(scope="module")
def bccd():
    return load_dataset("voc", DATA / "bccd")


def test_minivoc_has_all_images_and_boxes(minivoc):
    train, test = minivoc
    assert (len(train), len(test)) == (2000, 776)
    samples = train.samples + test.samples
    assert sum(len(boxes) for _, boxes, _, _ in samples) == 17007
    assert sum(int(ignored.sum()) for _, _, _, ignored in samples) == 2802
    assert train.classes == test.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert set(np.concatenate([labels for _, _, labels, _ in samples])) == set(range(1, 21))
    assert train.dropped == test.dropped == []
    assert not {s[0] for s in train.samples} & {s[0] for s in test.samples}


def test_minivoc_is_mostly_people(minivoc):
    labels = np.concatenate([s[2] for source in minivoc for s in source.samples])
    assert 0.64 < (labels == VOC_CLASSES.index("person") + 1).mean() < 0.66


def test_bccd_drops_and_names_the_two_boxes_of_no_size(bccd):
    train, test = bccd
    assert sorted(train.dropped) == ["BloodImage_00338", "BloodImage_00343"] and test.dropped == []
    assert sum(len(s[1]) for source in bccd for s in source.samples) == 4888 - 2


def test_bccd_has_its_images_and_classes(bccd):
    train, test = bccd
    assert (len(train), len(test)) == (292, 72)
    assert train.classes == test.classes == ("Platelets", "RBC", "WBC")
    assert set(np.concatenate([s[2] for source in bccd for s in source.samples])) == {1, 2, 3}
    assert voc_classes([(DATA / "bccd", "train")]) == train.classes


@pytest.mark.parametrize("name", ["minivoc", "bccd"])
@pytest.mark.parametrize("part", [0, 1])
def test_images_and_boxes_fit_together(name, part, request):
    source = request.getfixturevalue(name)[part]
    for index in (0, 7, len(source) - 1):
        image, boxes, labels, ignored = source.load(0, index)
        height, width = image.shape[1:]
        assert image.dtype == torch.uint8 and image.float().std() > 5
        assert max(height, width) == (320 if name == "minivoc" else 640)
        assert len(boxes) == len(labels) == len(ignored)
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes == boxes.round()).all()


@pytest.mark.parametrize("name", ["minivoc", "bccd"])
def test_boxes_cover_the_pixels_that_the_annotations_count(name, request):
    for image, boxes, _, _ in request.getfixturevalue(name)[1].samples:
        text = (image.parents[1] / "Annotations" / f"{image.stem}.xml").read_text()
        x0, y0, x1, y1 = (list(map(int, re.findall(f"<{c}>([0-9]+)<", text))) for c in ("xmin", "ymin", "xmax", "ymax"))
        pixels = [(d - b + 1) * (c - a + 1) for a, b, c, d in zip(x0, y0, x1, y1, strict=True)]
        assert (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist() == pixels
        assert boxes[:, :2].tolist() == [[a - 1, b - 1] for a, b in zip(x0, y0, strict=True)]


def test_training_leaves_difficult_boxes_out(minivoc):
    train = minivoc[0]
    index = next(i for i, s in enumerate(train.samples) if 0 < s[3].sum() < len(s[3]))
    target = Samples(train, True)[(0, index)][1]
    assert len(target["boxes"]) == (~train.samples[index][3]).sum()
    assert len(Samples(train, False)[(0, index)][1]["boxes"]) == len(train.samples[index][3])


# VOC's mAP on VOC 2007's own test boxes, against the development kit's rule in plain Python


def read_lines(name):
    return {w[0]: list(map(int, w[1:])) for w in map(str.split, (DATA / "voc_annotations" / name).open())}


@pytest.fixture(scope="module")
def voc07():
    """500 images: {name: [(box as in the file, 1-based, ends included; class 0..19; difficult)]}."""
    boxes, difficult = read_lines("voc07_test.txt"), read_lines("voc07_test_difficult.txt")
    assert boxes.keys() == difficult.keys() and len(boxes) == 4952
    truth = {}
    for name in list(boxes)[:500]:
        rows = [boxes[name][i : i + 5] for i in range(0, len(boxes[name]), 5)]
        truth[name] = [(row[:4], row[4], flag) for row, flag in zip(rows, difficult[name], strict=True)]
    return truth


def synthetic(truth, noise):
    """Jittered boxes, some twice, some of a wrong class, some left out: {name: [(box, class, score)]}."""
    rng, found = np.random.default_rng(0), {}
    for name, rows in truth.items():
        found[name] = []
        for box, label, _ in rows:
            for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
                side = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2)
                shifted = np.round(box + rng.uniform(-noise, noise, 4) * side)
                shifted[2:] = np.maximum(shifted[2:], shifted[:2])
                wrong = rng.random() < 0.1
                found[name].append((shifted.tolist(), int(rng.integers(20)) if wrong else label, rng.random()))
    return found


def devkit_iou(a, b):
    """Overlap of two boxes that count whole pixels, both ends included."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b))
    return width * height / (areas - width * height)


def devkit_ap(truth, found, label):
    """VOCevaldet.m for one class: the AP of VOC 2007 and of VOC 2010 on, in percent."""
    count = sum(k == label and not difficult for rows in truth.values() for _, k, difficult in rows)
    ranked = sorted(((s, n, b) for n, rows in found.items() for b, k, s in rows if k == label), reverse=True)
    taken, right, wrong, curve = set(), 0, 0, []
    for _, name, box in ranked:
        overlap, best = max(
            ((devkit_iou(box, b), i) for i, (b, k, _) in enumerate(truth[name]) if k == label), default=(0.0, -1)
        )
        if overlap >= 0.5 and truth[name][best][2]:
            continue  # a difficult box: the detection does not count
        if overlap >= 0.5 and (name, best) not in taken:
            taken.add((name, best))
            right += 1
        else:
            wrong += 1
        curve.append((right / count, right / (right + wrong)))
    eleven = sum(max((p for r, p in curve if r >= k / 10), default=0.0) for k in range(11)) / 11
    area = last = 0.0
    for i, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[i:])
        last = recall
    return 100 * eleven, 100 * area


@pytest.mark.parametrize("noise", [0.05, 0.25])
def test_voc_metrics_are_the_development_kits(voc07, noise):
    found = synthetic(voc07, noise)
    shift = np.array([1, 1, 0, 0])  # to 0-based boxes with open ends, as tar.data reads them
    results = []
    for number, (name, rows) in enumerate(voc07.items()):
        mine = found[name]
        results.append(
            {
                "image_id": number,
                "gt_boxes": np.array([b for b, _, _ in rows], dtype=float) - shift,
                "gt_labels": np.array([k + 1 for _, k, _ in rows]),
                "gt_ignored": np.array([bool(d) for _, _, d in rows]),
                "boxes": np.array([b for b, _, _ in mine], dtype=float).reshape(-1, 4) - shift,
                "labels": np.array([k + 1 for _, k, _ in mine], dtype=int),
                "scores": np.array([s for _, _, s in mine], dtype=float),
            }
        )
    got = voc_metrics(results, VOC_CLASSES)
    expected = {name: devkit_ap(voc07, found, label) for label, name in enumerate(VOC_CLASSES)}
    for name, (eleven, area) in expected.items():
        assert got["per_class"][name]["voc07"] == pytest.approx(eleven, abs=1e-9), name
        assert got["per_class"][name]["voc_area"] == pytest.approx(area, abs=1e-9), name
    for key, column in (("voc07", 0), ("voc_area", 1)):
        mean = sum(row[column] for row in expected.values()) / 20
        assert got[key] == pytest.approx(mean, abs=1e-9) and 10 < mean < 95
