"""Detections to figures: VOC's rules by hand, COCO's by hand and against pycocotools through its JSON files."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tar import data
from tar.evaluation import coco_metrics, detect, evaluate, voc_ap, voc_curve, voc_metrics
from tar.shapes import Shapes

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def result(truth=(), found=(), image_id=0):
    """One image's result; truth: (box, label, ignored), found: (box, label, score)."""
    columns = {}
    for names, rows in ((("gt_boxes", "gt_labels", "gt_ignored"), truth), (("boxes", "labels", "scores"), found)):
        boxes, labels, last = zip(*rows, strict=True) if rows else ((), (), ())
        columns[names[0]] = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        columns[names[1]] = np.array(labels, dtype=np.int64)
        columns[names[2]] = np.array(last, dtype=bool if names[2] == "gt_ignored" else np.float32)
    return {"image_id": image_id, **columns}


# Recall-precision curves with the average precision by the 11-point rule and by area.
CURVES = {
    "perfect": ([0.5, 1.0], [1.0, 1.0], 1.0, 1.0),
    "no detection": ([], [], 0.0, 0.0),
    "all wrong": ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
    # Recall that lies exactly on a threshold reaches it: 0, 0.1, 0.2, 0.3 are four of eleven.
    "3 of 10 found": (np.arange(1, 4) / 10, [1.0] * 3, 4 / 11, 0.3),
    "7 of 10 found": (np.arange(1, 8) / 10, [1.0] * 7, 8 / 11, 0.7),
    "6 of 20 found": (np.arange(1, 7) / 20, [1.0] * 6, 4 / 11, 0.3),
    "half of the detections right": ([0.0, 1.0], [0.0, 0.5], 0.5, 0.5),
    # Right, wrong, right, wrong, wrong, right of 4 boxes. Best precision from recall 0: 1, from 0.25 on: 2/3, from
    # 0.5 on: 1/2, from 0.75 on: 0.
    "zig-zag": (
        [0.25, 0.25, 0.5, 0.5, 0.5, 0.75],
        [1, 1 / 2, 2 / 3, 2 / 4, 2 / 5, 3 / 6],
        (3 * 1 + 3 * 2 / 3 + 2 * 1 / 2) / 11,
        (1 + 2 / 3 + 1 / 2) / 4,
    ),
    # A later, higher precision counts for the lower recalls too.
    "wrong first": ([0.0, 0.5, 1.0], [0.0, 1 / 2, 2 / 3], 2 / 3, 2 / 3),
}


@pytest.mark.parametrize(("recall", "precision", "points", "area"), CURVES.values(), ids=CURVES)
def test_voc_ap_by_hand(recall, precision, points, area):
    assert voc_ap(recall, precision, use_07_metric=True) == pytest.approx(points)
    assert voc_ap(recall, precision, use_07_metric=False) == pytest.approx(area)


BOX, BELOW, FAR = (0, 0, 10, 10), (0, 20, 10, 30), (50, 50, 60, 60)


@pytest.mark.parametrize(
    ("truth", "found", "recall", "precision"),
    [
        pytest.param([(BOX, 1, False)], [(BOX, 1, 0.9)], [1], [1], id="right"),
        pytest.param([(BOX, 1, False)], [(FAR, 1, 0.9)], [0], [0], id="elsewhere"),
        pytest.param([(BOX, 1, False)], [], [], [], id="nothing found"),
        pytest.param([(BOX, 1, False)], [(BOX, 2, 0.9)], [], [], id="found as another class"),
        pytest.param([(BOX, 1, False)], [((0, 0, 10, 5), 1, 0.9)], [1], [1], id="IoU exactly 0.5"),
        pytest.param([(BOX, 1, False)], [((0, 0, 10, 4.9), 1, 0.9)], [0], [0], id="IoU 0.49"),
        pytest.param([(BOX, 1, False)], [(BOX, 1, 0.9), (BOX, 1, 0.8)], [1, 1], [1, 1 / 2], id="duplicate is wrong"),
        pytest.param(
            [(BOX, 1, False)],
            [(BOX, 1, 0.6), ((0, 0, 10, 8), 1, 0.9)],
            [1, 1],
            [1, 1 / 2],
            id="higher score first, though it fits less",
        ),
        pytest.param(
            [(BOX, 1, False), ((0, 0, 10, 8), 1, False)],
            [(BOX, 1, 0.9), ((0, 0, 10, 9.5), 1, 0.8)],
            [1 / 2, 1 / 2],
            [1, 1 / 2],
            id="no second best box for one whose best is taken",
        ),
        pytest.param([(BOX, 1, False), (BELOW, 1, True)], [(BOX, 1, 0.9)], [1], [1], id="difficult is not missed"),
        pytest.param(
            [(BOX, 1, False), (BELOW, 1, True)],
            [(BELOW, 1, 0.9), (BELOW, 1, 0.85), (BOX, 1, 0.8)],
            [1],
            [1],
            id="difficult is neither right nor wrong, found once or twice",
        ),
        pytest.param([(BOX, 2, False), (FAR, 1, False)], [(BOX, 1, 0.9)], [0], [0], id="on a box of another class"),
    ],
)
def test_voc_curve_by_hand(truth, found, recall, precision):
    got = voc_curve([result(truth, found)], 1)
    assert [list(column) for column in got] == [pytest.approx(recall), pytest.approx(precision)]


def test_voc_curve_goes_by_falling_score_over_all_images():
    results = [
        result([(BOX, 1, False)], [(FAR, 1, 0.5), (BOX, 1, 0.7)], image_id=0),
        result([(BOX, 1, False), (BELOW, 1, False)], [(BELOW, 1, 0.6), (FAR, 1, 0.8)], image_id=1),
        result([], [(FAR, 1, 0.4)], image_id=2),
    ]  # wrong (0.8), right (0.7), right (0.6), wrong (0.5), wrong (0.4); 3 boxes
    recall, precision = voc_curve(results, 1)
    assert recall == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert precision == pytest.approx([0, 1 / 2, 2 / 3, 2 / 4, 2 / 5])


def test_a_box_is_found_only_in_its_own_image():
    recall, _ = voc_curve([result([(BOX, 1, False)], []), result([], [(BOX, 1, 0.9)], image_id=1)], 1)
    assert list(recall) == [0]


@pytest.mark.parametrize("truth", [[], [(BOX, 1, True)]], ids=["no box", "difficult only"])
def test_a_class_without_boxes_that_count_has_no_curve(truth):
    assert voc_curve([result(truth, [(BOX, 1, 0.9)])], 1) is None


def test_voc_metrics_are_means_over_the_classes_that_occur():
    results = [result([(BOX, 1, False), (BELOW, 2, False)], [(BOX, 1, 0.9), (FAR, 2, 0.9), (BELOW, 2, 0.8)])]
    metrics = voc_metrics(results, ("a", "b", "c"))
    assert metrics["voc07"] == pytest.approx(75) and metrics["voc_area"] == pytest.approx(75)
    assert metrics["per_class"]["a"] == pytest.approx({"voc07": 100, "voc_area": 100})
    assert metrics["per_class"]["b"] == pytest.approx({"voc07": 50, "voc_area": 50})
    assert metrics["per_class"]["c"] == {"voc07": None, "voc_area": None}


def test_voc_metrics_without_any_box_are_none():
    metrics = voc_metrics([result([], [(BOX, 1, 0.9)])], ("a",))
    assert metrics["voc07"] is None and metrics["voc_area"] is None


SMALL, MEDIUM, LARGE = (0, 0, 20, 20), (50, 50, 110, 110), (150, 150, 300, 300)


def test_coco_of_perfect_detections_is_100():
    boxes = [(SMALL, 1), (MEDIUM, 1), (LARGE, 2)]
    results = [result([(b, k, False) for b, k in boxes], [(b, k, 0.5) for b, k in boxes], image_id=i) for i in range(3)]
    metrics = coco_metrics(results, ("a", "b", "c"))
    assert {name: metrics[name] for name in FIGURES} == pytest.approx(dict.fromkeys(FIGURES, 100))
    assert metrics["per_class"]["a"] == metrics["per_class"]["b"] == pytest.approx({"AP": 100, "AP50": 100})
    assert metrics["per_class"]["c"] == {"AP": None, "AP50": None}


def test_coco_without_detections_is_0():
    metrics = coco_metrics([result([(SMALL, 1, False)]), result(image_id=1)], ("a",))
    assert metrics == {
        **{name: 0 for name in ("AP", "AP50", "AP75", "AP_small")},
        **{"AP_medium": None, "AP_large": None},
        "per_class": {"a": {"AP": 0, "AP50": 0}},
    }


def test_coco_without_boxes_is_none():
    metrics = coco_metrics([result([], [(SMALL, 1, 0.9)])], ("a",))
    assert [metrics[name] for name in FIGURES] == [None] * 6


def test_coco_counts_the_ten_thresholds():
    found = (0, 0, 10, 6.2)  # IoU 0.62: over 0.5, 0.55 and 0.6
    metrics = coco_metrics([result([(BOX, 1, False)], [(found, 1, 0.9)])], ("a",))
    assert [metrics[name] for name in ("AP", "AP50", "AP75")] == pytest.approx([30, 100, 0])


@pytest.mark.parametrize(("truth", "ap"), [([(MEDIUM, 1, True)], 100), ([], 50)], ids=["ignored box", "no box"])
def test_coco_does_not_punish_the_detection_of_an_ignored_box(truth, ap):
    results = [result([(SMALL, 1, False), *truth], [(MEDIUM, 1, 0.9), (SMALL, 1, 0.8)])]
    assert coco_metrics(results, ("a",))["AP"] == pytest.approx(ap)


def random_results(seed, images=12, classes=3):
    """Boxes of all sizes, a fifth ignored; detections near them, elsewhere and of the wrong class."""
    rng = np.random.default_rng(seed)
    results = []
    for image_id in range(images):
        truth, found = [], []
        for _ in range(rng.integers(0, 7)):
            corner, side = rng.random(2) * 200, np.exp(rng.random(2) * 3.6 + 2)
            box, label = np.concatenate([corner, corner + side]), int(rng.integers(1, classes + 1))
            truth.append((box, label, rng.random() < 0.2))
            for _ in range(rng.integers(0, 3)):
                near = box + rng.normal(size=4) * np.tile(side, 2) * 0.08
                found.append((near, label if rng.random() < 0.8 else int(rng.integers(1, classes + 1)), rng.random()))
        for _ in range(rng.integers(0, 3)):
            corner = rng.random(2) * 200
            found.append((np.concatenate([corner, corner + 20]), int(rng.integers(1, classes + 1)), rng.random()))
        results.append(result(truth, found, image_id * 3 + 1))
    return results


def xywh(box):
    x0, y0, x1, y1 = (float(v) for v in box)
    return [x0, y0, x1 - x0, y1 - y0]


def pycocotools_stats(results, classes, folder, only=None):
    """COCOeval's statistics, in percent, of files in COCO's own formats."""
    truth, found = [], []
    for r in results:
        for box, label, ignored in zip(r["gt_boxes"], r["gt_labels"], r["gt_ignored"], strict=True):
            row = {"image_id": r["image_id"], "category_id": int(label), "bbox": xywh(box), "iscrowd": int(ignored)}
            truth.append({"id": len(truth) + 1, "area": row["bbox"][2] * row["bbox"][3], **row})
        for box, label, score in zip(r["boxes"], r["labels"], r["scores"], strict=True):
            row = {"image_id": r["image_id"], "category_id": int(label), "bbox": xywh(box), "score": float(score)}
            found.append(row)
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, 1)]
    images = [{"id": r["image_id"]} for r in results]
    files = folder / "truth.json", folder / "found.json"
    files[0].write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    files[1].write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(files[0]))
        run = COCOeval(coco, coco.loadRes(str(files[1])), "bbox")
        if only:
            run.params.catIds = [only]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if value < 0 else 100 * value for value in run.stats]


@pytest.mark.parametrize("seed", range(3))
def test_coco_metrics_are_those_of_pycocotools_own_files(seed, tmp_path):
    results, classes = random_results(seed), ("a", "b", "c")
    metrics = coco_metrics(results, classes)
    expected = pycocotools_stats(results, classes, tmp_path)
    assert 5 < expected[0] < 95 and None not in expected[:6]
    assert [metrics[name] for name in FIGURES] == pytest.approx(expected[:6])
    for label, name in enumerate(classes, 1):
        stats = pycocotools_stats(results, classes, tmp_path, only=label)
        assert metrics["per_class"][name] == pytest.approx({"AP": stats[0], "AP50": stats[1]})


class Source:
    """Images whose pixels are their number, each with one box; the last one's is ignored."""

    classes = ("a", "b")

    def __len__(self):
        return 7

    def load(self, epoch, index):
        image = torch.full((3, 10 + index, 12), index, dtype=torch.uint8)
        box, label = torch.tensor([[1.0, 2.0, 6.0 + index, 9.0]]), torch.tensor([1 + index % 2])
        return image, box, label, torch.tensor([index == 6])


class Oracle(torch.nn.Module):
    """Knows the image by its pixels and answers with its box."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        assert not self.training
        numbers = [round(image.mean().item() * 255) for image in images]
        self.seen += numbers
        truth = [Source().load(0, number) for number in numbers]
        return [{"boxes": boxes, "labels": labels, "scores": torch.tensor([0.5])} for _, boxes, labels, _ in truth]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluate_sees_every_image_once(batch_size):
    oracle = Oracle()
    metrics = evaluate(oracle, Source(), torch.device("cpu"), voc=True, batch_size=batch_size)
    assert sorted(oracle.seen) == list(range(7))
    assert metrics["AP"] == pytest.approx(100)
    assert metrics["voc07"] == pytest.approx(100)
    assert set(metrics["per_class"]["b"]) == {"AP", "AP50", "voc07", "voc_area"}


@pytest.mark.parametrize("training", [True, False])
def test_detect_leaves_the_model_in_the_mode_it_was_in(training):
    oracle = Oracle().train(training)
    detect(oracle, Source(), torch.device("cpu"))
    assert oracle.training == training


def test_two_processes_detect_what_one_does():
    def by_image(*shares):
        return {r["image_id"]: r["gt_boxes"].tolist() for share in shares for r in share}

    one, *two = (
        detect(Oracle(), Source(), torch.device("cpu"), 2, rank=rank, world=world)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert sum(map(len, two)) == 7
    assert by_image(*two) == by_image(one) == {i: [[1, 2, 6 + i, 9]] for i in range(7)}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 6, 7])
def test_test_batches_share_out_every_image_once(length, world):
    shares = [data.test_batches(length, 2, rank, world) for rank in range(world)]
    keys = [key for share in shares for batch in share for key in batch]
    assert sorted(keys) == [(0, i) for i in range(length)]
    assert all(len(batch) <= 2 for share in shares for batch in share)


def test_an_answer_of_the_background_class_is_left_out():
    class Answers(torch.nn.Module):
        def forward(self, images):
            boxes = torch.tensor([[1.0, 2, 9, 9], [3, 4, 8, 8]])
            labels, scores = torch.tensor([0, 2]), torch.tensor([0.9, 0.5])
            return [{"boxes": boxes, "labels": labels, "scores": scores} for _ in images]

    [found] = detect(Answers(), Shapes("test", 1), torch.device("cpu"))
    assert (found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist()) == ([[3, 4, 8, 8]], [2], [0.5])
