"""Training learns: two easy images, learnt by heart in some tens of steps, alone and from a teacher."""

import numpy as np
import pytest
import torch

from tar.data.loader import to_device
from tar.detectors.build import build_detector
from tar.evaluation.detect import evaluate
from tar.method.step import DistillationSettings, DistillationStep

CPU = torch.device("cpu")


class Easy:
    """Images of 96 pixels, each with a red square and a green bar on grey."""

    classes = ("square", "bar")

    def __len__(self):
        return 2

    def load(self, epoch, index):
        rng = np.random.default_rng(index)
        image, boxes = torch.full((3, 96, 96), 60, dtype=torch.uint8), []
        colours = torch.tensor([[220, 40, 40], [40, 220, 40]], dtype=torch.uint8)
        for k, (width, height) in enumerate(((30, 30), (42, 15))):
            x = int(rng.integers(2, 90 - width))
            y = int(rng.integers(2, 44 - height)) + 48 * ((k + index) % 2)
            image[:, y : y + height, x : x + width] = colours[k][:, None, None]
            boxes.append([x, y, x + width, y + height])
        return image, torch.tensor(boxes, dtype=torch.float32), torch.tensor([1, 2]), torch.zeros(2, dtype=torch.bool)


def fresh(seed, **changes):
    torch.manual_seed(seed)
    small = {"min_size": 64, "max_size": 64, "fpn_channels": 32, "head_channels": 64, "rois": 32, "anchor_scale": 4}
    detector = build_detector("faster-rcnn", "r10", 2, **{**small, "rpn_top_n": (200, 50), **changes})
    return detector.to(memory_format=torch.channels_last)


def learn(step, steps, teacher=None, weight=0.2):
    """Some steps on the images; each loss term of the first step, and its mean in the last five."""
    samples = [Easy().load(0, i) for i in range(2)]
    batch = to_device([s[0] for s in samples], [{"boxes": s[1], "labels": s[2]} for s in samples], CPU)
    optimizer, history = torch.optim.AdamW(step.parameters(), 2e-3, fused=True), []
    step.train()
    for _ in range(steps):
        detection, distillation, _ = step(*batch, teacher)
        loss = weight * sum(distillation.values()) + sum(detection.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({k: v.item() for k, v in {**detection, **distillation}.items()})
    return history[0], {k: np.mean([h[k] for h in history[-5:]]) for k in history[0]}


@pytest.fixture(scope="module")
def learnt():
    detector = fresh(0)
    losses = learn(DistillationStep(detector), 50)
    return detector.eval().requires_grad_(False), losses


def test_a_detector_learns_and_finds_what_it_learnt(learnt):
    first, last = learnt[1]
    assert sum(last.values()) < sum(first.values()) / 3
    assert all(last[k] < first[k] for k in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier"))
    metrics = evaluate(learnt[0], Easy(), CPU, voc=True, batch_size=2)  # of 96 pixels: boxes are those of the image
    assert metrics["AP50"] > 90 and metrics["AP"] > 50 and metrics["voc07"] > 90
    assert all(row["AP50"] > 80 for row in metrics["per_class"].values())
    assert evaluate(fresh(0), Easy(), CPU)["AP50"] < 20


def test_a_student_comes_nearer_to_its_teachers_features_and_classes(learnt):
    settings = DistillationSettings(weight_backbone=0.5, weight_cls=1.0, weight_reg=1.0, reg_gate="none")
    step = DistillationStep(fresh(1, fpn_channels=24), settings, 32).to(memory_format=torch.channels_last)
    first, last = learn(step, 14, learnt[0], weight=1.0)
    assert all(last[k] < first[k] / 2 for k in ("distill_backbone", "distill_cls"))
