"""The split of errors: kinds by hand, AP50 by pycocotools."""

import numpy as np
import pytest

from tar.errors import KINDS, average_precision, cost_of_errors, sort_errors
from tar.evaluation import coco_metrics
from tar.surroundings import drawn_results

SQUARE = [0.0, 0.0, 10.0, 10.0]
CLASSES = ("a", "b")


def image(truth, found, ignored=()):
    """A result of one image. truth: [(box, label)]; found: [(box, label, score)]; ignored: numbers of truth."""
    return {
        "image_id": 0,
        "gt_boxes": np.array([b for b, _ in truth], dtype=np.float32).reshape(-1, 4),
        "gt_labels": np.array([y for _, y in truth], dtype=int),
        "gt_ignored": np.array([i in ignored for i in range(len(truth))], dtype=bool),
        "boxes": np.array([b for b, *_ in found], dtype=np.float32).reshape(-1, 4),
        "labels": np.array([y for _, y, _ in found], dtype=int),
        "scores": np.array([s for *_, s in found], dtype=np.float32),
    }


def shifted(by):
    return [by, 0.0, 10.0 + by, 10.0]


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        ((shifted(1), 1), "right"),  # IoU 9 / 11
        ((shifted(4), 1), "localisation"),  # 6 / 14
        ((shifted(1), 2), "classification"),
        ((shifted(4), 2), "both"),
        ((shifted(9), 1), "background"),  # 1 / 19
        ((shifted(50), 2), "background"),
    ],
)
def test_what_a_detection_is(detection, kind):
    [found] = sort_errors([image([(SQUARE, 1)], [(*detection, 0.9)])]).kind
    assert found == kind


def test_the_second_find_of_a_box_is_a_duplicate_the_better_score_first():
    sorted_ = sort_errors([image([(SQUARE, 1)], [(shifted(0), 1, 0.5), (shifted(2), 1, 0.8)])])
    assert dict(zip(sorted_.score.round(1).tolist(), sorted_.kind, strict=True)) == {0.8: "right", 0.5: "duplicate"}


def test_what_lies_on_an_ignored_box_is_no_error():
    assert len(sort_errors([image([(SQUARE, 1)], [(shifted(1), 1, 0.9)], ignored={0})]).kind) == 0


def test_costs_by_hand():
    """One class, two boxes. A find, then a background detection, then the second box badly placed.

    Precisions 1, 1/2, 1/3 at recalls 1/2, 1/2, 1/2: AP = 51/101. With the place mended the second box is found at
    precision 2/3: AP = (51 + 50 * 2/3) / 101. Without the background nothing changes, for the third is still wrong.
    """
    far = [30.0, 0.0, 40.0, 10.0]
    found = [(SQUARE, 1, 0.9), ([60.0, 0.0, 70.0, 10.0], 1, 0.8), ([34.0, 0.0, 44.0, 10.0], 1, 0.7)]
    split = cost_of_errors([image([(SQUARE, 1), (far, 1)], found)], CLASSES)
    assert split["AP50"] == pytest.approx(100 * 51 / 101)
    assert split["costs"]["localisation"] == pytest.approx(100 * 50 * 2 / 3 / 101)
    assert split["costs"]["background"] == split["costs"]["missed"] == 0
    assert split["counts"] == dict.fromkeys(KINDS, 0) | {"localisation": 1, "background": 1}


def test_a_missed_box_costs_the_recall_it_takes():
    split = cost_of_errors([image([(SQUARE, 1), ([30.0, 0.0, 40.0, 10.0], 1)], [(SQUARE, 1, 0.9)])], CLASSES)
    assert split["counts"]["missed"] == 1 and split["costs"]["missed"] == pytest.approx(100 * 50 / 101)


def test_a_wrong_class_costs_both_classes():
    """Both boxes are found, the second under the wrong name: class a has a false detection, class b none at all."""
    far = [30.0, 0.0, 40.0, 10.0]
    split = cost_of_errors([image([(SQUARE, 1), (far, 2)], [(far, 1, 0.95), (SQUARE, 1, 0.9)])], CLASSES)
    assert split["AP50"] == pytest.approx((50 + 0) / 2) and split["costs"]["classification"] == pytest.approx(75)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap50_is_that_of_pycocotools(seed):
    classes = list("abcdef")
    results = drawn_results(30, 6, 4, 12, seed)
    assert cost_of_errors(results, classes)["AP50"] == pytest.approx(coco_metrics(results, classes)["AP50"], abs=1e-6)


def test_no_detection_and_no_box():
    split = cost_of_errors([image([], [])], CLASSES)
    assert split["AP50"] == 0 and set(split["counts"].values()) == {0}
    assert average_precision(np.zeros(0, int), np.zeros(0), np.zeros(0, bool), np.array([0, 2])) == 0
