"""Running a detector over a test source: every image once, on one process and on two."""

import pytest
import torch
from coco_sets import annotation, entry, write_coco

from tar.data.coco import Coco
from tar.evaluation.detect import detect, evaluate

CPU = torch.device("cpu")
BOXES = {i: [1.0, 2.0, 6.0 + i, 9.0] for i in range(7)}


class Oracle(torch.nn.Module):
    """Knows an image by its grey level, and answers with its box, and with one of the background."""

    seen = ()

    def forward(self, images):
        assert not self.training
        levels = [round(image.mean().item() * 255) for image in images]
        self.seen += (*levels,)
        boxes = [torch.tensor([[3.0, 4, 8, 8], BOXES[i]]) for i in levels]
        labels, scores = [torch.tensor([0, 1 + i % 2]) for i in levels], torch.tensor([0.9, 0.5])
        return [{"boxes": b, "labels": k, "scores": scores} for b, k in zip(boxes, labels, strict=True)]


@pytest.fixture
def source(tmp_path):
    """Images of grey levels 0 to 6, each with one box; the last one's is a crowd."""
    boxes = [annotation(i, 1 + 12 * (i % 2), [1, 2, 5 + i, 7], iscrowd=int(i == 6)) for i in BOXES]
    return Coco(write_coco(tmp_path, [entry(i) for i in BOXES], boxes), tmp_path)


@pytest.mark.parametrize(("batch_size", "training"), [(1, True), (3, False)])
def test_evaluate_sees_every_image_once_and_leaves_the_model_in_its_mode(source, batch_size, training):
    oracle = Oracle().train(training)
    metrics = evaluate(oracle, source, CPU, voc=True, batch_size=batch_size)
    assert sorted(oracle.seen) == list(range(7)) and oracle.training == training
    assert metrics["AP"] == pytest.approx(100) and metrics["voc07"] == pytest.approx(100)
    assert set(metrics["per_class"]["sign"]) == {"AP", "AP50", "voc07", "voc_area"}


def test_two_processes_detect_what_one_does_and_nothing_of_the_background(source):
    parts = [detect(Oracle(), source, CPU, 2, rank=rank, world=2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 3]
    names = "gt_boxes", "boxes", "labels", "scores"
    found = {r["image_id"]: [r[name].tolist() for name in names] for part in parts for r in part}
    assert found == {i: [[box], [box], [1 + i % 2], [0.5]] for i, box in BOXES.items()}
