"""Running a detector over a test source: every image once, on one process and on two."""

import pytest
import torch
from coco_sets import annotation, entry, write_coco

from tar.data.coco import Coco
from tar.evaluation.detect import detect, evaluate

CPU = torch.device("cpu")


class Oracle(torch.nn.Module):
    """Knows an image by its grey level and answers with the (box, label) rows of that image."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.seen = answers, []

    def forward(self, images):
        assert not self.training
        levels = [round(image.mean().item() * 255) for image in images]
        self.seen += levels
        found = []
        for rows in (self.answers.get(level, []) for level in levels):
            boxes = torch.tensor([box for box, _ in rows]).reshape(-1, 4)
            labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
            found.append({"boxes": boxes, "labels": labels, "scores": torch.full((len(rows),), 0.5)})
        return found


BOXES = {i: [1.0, 2.0, 6.0 + i, 9.0] for i in range(7)}


@pytest.fixture
def source(tmp_path):
    """Images of grey levels 0 to 6, each with one box; the last one's is a crowd."""
    boxes = [annotation(i, 1 + 12 * (i % 2), [1, 2, 5 + i, 7], iscrowd=int(i == 6)) for i in BOXES]
    return Coco(write_coco(tmp_path, [entry(i) for i in BOXES], boxes), tmp_path)


@pytest.fixture
def oracle():
    return Oracle({i: [(box, 1 + i % 2)] for i, box in BOXES.items()})


@pytest.mark.parametrize(("batch_size", "training"), [(1, True), (3, False)])
def test_evaluate_sees_every_image_once_and_leaves_the_model_in_its_mode(oracle, source, batch_size, training):
    metrics = evaluate(oracle.train(training), source, CPU, voc=True, batch_size=batch_size)
    assert sorted(oracle.seen) == list(range(7)) and oracle.training == training
    assert metrics["AP"] == pytest.approx(100) and metrics["voc07"] == pytest.approx(100)
    assert set(metrics["per_class"]["sign"]) == {"AP", "AP50", "voc07", "voc_area"}


def test_two_processes_detect_what_one_does(oracle, source):
    parts = [detect(oracle, source, CPU, 2, rank=rank, world=2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 3]
    boxes = {r["image_id"]: (r["gt_boxes"].tolist(), r["boxes"].tolist()) for part in parts for r in part}
    assert boxes == {i: ([box], [box]) for i, box in BOXES.items()}


def test_detections_of_the_background_class_are_left_out(source):
    box, other = [1.0, 2, 9, 9], [3.0, 4, 8, 8]
    found = detect(Oracle({3: [(box, 0), (other, 2)]}), source, CPU)[3]
    assert (found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist()) == ([other], [2], [0.5])
