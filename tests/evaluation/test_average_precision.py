"""Average precision: VOC's against its development kit's rule in plain Python, COCO's against pycocotools."""

import numpy as np
import pytest
from coco_sets import FIGURES, LABELS, SPARSE, annotation, entry, pycocotools_stats, results_of, write_coco

from tar.data.coco import Coco
from tar.evaluation import voc_ap
from tar.evaluation.average_precision import coco_metrics, voc_curve, voc_metrics


def result(truth=(), found=()):
    """One image's result; truth: (box, label, ignored), found: (box, label, score)."""
    columns = {"image_id": 0}
    for start, last, kind, rows in (("gt_", "gt_ignored", bool, truth), ("", "scores", np.float32, found)):
        boxes, labels, values = zip(*rows, strict=True) if rows else ((), (), ())
        columns[f"{start}boxes"] = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        columns[f"{start}labels"], columns[last] = np.array(labels, dtype=np.int64), np.array(values, dtype=kind)
    return columns


CURVES = {  # recall, precision, AP by the 11-point rule and by area
    "no detection": ([], [], 0.0, 0.0),
    "recall on a threshold reaches it": (np.arange(1, 4) / 10, [1.0] * 3, 4 / 11, 0.3),
    "a later, higher precision counts too": ([0.0, 0.5, 1.0], [0.0, 1 / 2, 2 / 3], 2 / 3, 2 / 3),
}


@pytest.mark.parametrize(("recall", "precision", "points", "area"), CURVES.values(), ids=CURVES)
def test_voc_ap_by_hand(recall, precision, points, area):
    assert voc_ap(recall, precision, use_07_metric=True) == pytest.approx(points)
    assert voc_ap(recall, precision, use_07_metric=False) == pytest.approx(area)


BOX, LESS, BELOW, FAR = (0, 0, 10, 10), (0, 0, 10, 8), (0, 20, 10, 30), (50, 50, 60, 60)
ONE, TWO, WITH_DIFFICULT = [[(BOX, 1, False), *more] for more in ([], [(LESS, 1, False)], [(BELOW, 1, True)])]
VOC_CASES = {  # ground truth, detections, recall and precision after each detection that counts
    "nothing found": (ONE, [], [], []),
    "found as another class": (ONE, [(BOX, 2, 0.9)], [], []),
    "IoU exactly 0.5": (ONE, [((0, 0, 10, 5), 1, 0.9)], [1], [1]),
    "IoU 0.49": (ONE, [((0, 0, 10, 4.9), 1, 0.9)], [0], [0]),
    "duplicate is wrong": (ONE, [(BOX, 1, 0.9), (BOX, 1, 0.8)], [1, 1], [1, 1 / 2]),
    "the score decides": (ONE, [(BOX, 1, 0.6), (LESS, 1, 0.9)], [1, 1], [1, 1 / 2]),
    "the best box is taken": (TWO, [(BOX, 1, 0.9), ((0, 0, 10, 9.5), 1, 0.8)], [1 / 2, 1 / 2], [1, 1 / 2]),
    "difficult is not missed": (WITH_DIFFICULT, [(BOX, 1, 0.9)], [1], [1]),
    "found twice": (WITH_DIFFICULT, [(BELOW, 1, 0.9), (BELOW, 1, 0.85), (BOX, 1, 0.8)], [1], [1]),
}


@pytest.mark.parametrize(("truth", "found", "recall", "precision"), VOC_CASES.values(), ids=VOC_CASES)
def test_voc_curve_by_hand(truth, found, recall, precision):
    got = voc_curve([result(truth, found)], 1)
    assert [list(column) for column in got] == [pytest.approx(recall), pytest.approx(precision)]


def test_a_class_or_size_without_boxes_that_count_has_no_figure():
    for truth in ([], [(BOX, 1, True)]):
        results = [result(truth, [(BOX, 1, 0.9)])]
        assert voc_metrics(results, ("a",))["voc07"] is coco_metrics(results, ("a",))["AP"] is None
    metrics = coco_metrics([result(ONE, [(BOX, 1, 0.9), (FAR, 2, 0.9)])], ("a", "b"))
    assert [metrics[name] for name in FIGURES] == [*[pytest.approx(100)] * 4, None, None]
    assert metrics["per_class"] == {"a": pytest.approx({"AP": 100, "AP50": 100}), "b": {"AP": None, "AP50": None}}


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return width * height / (areas - width * height) if min(width, height) > 0 else 0.0


def devkit_ap(results, label):
    """VOCevaldet.m for one class in plain Python: {"voc07", "voc_area": AP in percent}."""
    columns = [[r[f"gt_{key}"].tolist() for key in ("boxes", "labels", "ignored")] for r in results]
    truth = [[(b, difficult) for b, k, difficult in zip(*row, strict=True) if k == label] for row in columns]
    columns = [zip(*(r[key].tolist() for key in ("scores", "boxes", "labels")), strict=True) for r in results]
    ranked = sorted(((s, i, b) for i, row in enumerate(columns) for s, b, k in row if k == label), reverse=True)
    count = sum(not difficult for row in truth for _, difficult in row)
    taken, right, wrong, curve = set(), 0, 0, []
    for _, image, box in ranked:
        overlap, best = max(((iou(box, b), i) for i, (b, _) in enumerate(truth[image])), default=(0.0, -1))
        if overlap >= 0.5 and truth[image][best][1]:
            continue  # a difficult box: the detection does not count
        if overlap >= 0.5 and (image, best) not in taken:
            taken.add((image, best))
            right += 1
        else:
            wrong += 1
        curve.append((right / count, right / (right + wrong)))
    eleven = sum(max((p for r, p in curve if r >= k / 10), default=0.0) for k in range(11)) / 11
    area = last = 0.0
    for i, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[i:])
        last = recall
    return {"voc07": 100 * eleven, "voc_area": 100 * area}


def random_set(folder, seed, plain):
    """Boxes of all sizes in quarters of a pixel, some crowds; detections near them, elsewhere, inside crowds and of the
    wrong category. Unless plain, some boxes reach over the border, and areas are less than the boxes'."""
    rng, boxes, found = np.random.default_rng(seed), [], []
    entries = [entry(int(i), *((500, 500) if plain else (320, 240))) for i in rng.permutation(900)[:24]]

    def quarters(values):
        return (np.round(np.asarray(values) * 4) / 4).tolist()

    for image in entries:
        for _ in range(rng.integers(0, 7)):
            side = np.exp(rng.random(2) * 3.4 + 2)
            corner, category = rng.random(2) * (300, 220) - (0 if plain else 5), int(rng.choice([1, 13, 90]))
            bbox, crowd = quarters([*corner, *side]), int(rng.random() < 0.15)
            area = bbox[2] * bbox[3] * (1 if plain else rng.uniform(0.3, 0.9))
            boxes.append(annotation(image["id"], category, bbox, area=area, iscrowd=crowd, id=3 * len(boxes) + 1))
            for _ in range(rng.integers(0, 3) + crowd):
                near = bbox + rng.normal(size=4) * np.tile(side, 2) * 0.08
                near = [*(corner + side / 4), *side / 2] if crowd else near
                kind = category if rng.random() < 0.8 else int(rng.choice([1, 13, 90]))
                found.append(annotation(image["id"], kind, quarters(near)))
        found.append(annotation(image["id"], 13, quarters([*rng.random(2) * 200, 20, 20])))
    places = rng.permutation(len(found)) / 1024  # no two scores are equal: VOC's rule does not say which comes first
    found = [{**row, "score": score} for row, score in zip(found, places.tolist(), strict=True)]
    return write_coco(folder, entries, boxes), found, boxes


@pytest.mark.parametrize("plain", [True, False], ids=["by index and label", "by the file's ids and areas"])
@pytest.mark.parametrize("seed", range(2))
def test_metrics_are_pycocotools_own_of_the_file_and_the_development_kits(seed, plain, tmp_path):
    file, found, boxes = random_set(tmp_path, seed, plain)
    source = Coco(file, tmp_path)
    assert sum(a["iscrowd"] for a in boxes) > 2 and len(source.boxes) == len(boxes)
    results, expected, means = results_of(source, found), pycocotools_stats(file, found), []
    coco, voc = coco_metrics(results, source.classes, None if plain else source), voc_metrics(results, source.classes)
    assert [coco[name] for name in FIGURES] == pytest.approx(expected)
    assert None not in expected and 5 < expected[0] < 95
    for category, name in SPARSE:
        stats, aps = pycocotools_stats(file, found, only=category), devkit_ap(results, LABELS[category])
        assert coco["per_class"][name] == pytest.approx({"AP": stats[0], "AP50": stats[1]})
        assert voc["per_class"][name] == pytest.approx(aps, abs=1e-9)
        means.append([aps["voc07"], aps["voc_area"]])
    assert [voc["voc07"], voc["voc_area"]] == pytest.approx(np.mean(means, 0), abs=1e-9) and 10 < voc["voc07"] < 95
    assert list(coco["per_class"]) == list(voc["per_class"]) == ["person", "sign", "brush"]


@pytest.mark.parametrize("area", [{}, {"area": "large"}], ids=str)
def test_without_a_proper_area_in_the_file_the_boxes_counts(tmp_path, area):
    bbox = [2, 2, 40, 40]  # 1600 pixels: medium is from 32 x 32 to 96 x 96
    source = Coco(write_coco(tmp_path, [entry(7, 64, 64)], [annotation(7, 90, bbox, **area)]), tmp_path)
    metrics = coco_metrics(results_of(source, [annotation(7, 90, bbox, score=0.5)]), source.classes, source)
    assert metrics["AP_medium"] == pytest.approx(100) and metrics["AP_small"] is metrics["AP_large"] is None


@pytest.mark.parametrize("ids", [{"id": 0}, {"id": 5}, {}], ids=["0", "twice", "none"])
def test_the_ids_of_annotations_do_not_matter(tmp_path, ids):
    """pycocotools takes a match with annotation 0 for none, and of two with one id keeps one."""
    boxes = [annotation(image, 1, [5, 5, 9, 9], **ids) for image in (0, 8)]
    source = Coco(write_coco(tmp_path, [entry(0), entry(8)], boxes), tmp_path)
    found = [{**a, "score": 0.5} for a in boxes]
    assert coco_metrics(results_of(source, found), source.classes, source)["AP"] == pytest.approx(100)
