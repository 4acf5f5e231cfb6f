"""Small detectors and a small batch, for the tests that need a whole model."""

import pytest
import torch
from beside import begun  # noqa: F401  (a fixture, as those of the next line)
from tiny_runs import plain, voc  # noqa: F401

from tar.models import build_detector

SMALL = {
    "min_size": 64,
    "max_size": 96,
    "fpn_channels": 16,
    "head_channels": 32,
    "anchor_scale": 4,
    "rois": 64,
    "rpn_top_n": (1000, 200),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums come out the same on every machine, and the tests do not fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def make_detector():
    """make_detector(backbone, seed, **arguments of build_detector): a small one of three classes."""

    def make(backbone="r10", seed=0, num_classes=3, **changes):
        torch.manual_seed(seed)
        detector = build_detector("faster-rcnn", backbone, num_classes, **{**SMALL, **changes})
        for module in detector.modules():  # a block's last norm may start at zero, and would hide its convolutions
            if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
                torch.nn.init.ones_(module.weight)
        return detector.to(memory_format=torch.channels_last)

    return make


@pytest.fixture
def student(make_detector):
    return make_detector().train()


@pytest.fixture
def teacher(make_detector):
    """A frozen one with another backbone and a wider pyramid than the student's; its box deltas are doubled."""
    detector = make_detector("r18", seed=1, fpn_channels=24).eval().requires_grad_(False)
    detector.roi_heads.box_predictor.bbox_pred.weight *= 2
    return detector


@pytest.fixture
def batch():
    """Two images that are resized, one of them padded, with boxes that overlap, and one too small for most levels."""
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 80, 120, generator=random), torch.rand(3, 96, 96, generator=random)]
    boxes = [
        [[8.0, 6, 46, 50], [30, 20, 80, 72], [100, 60, 103, 64]],
        [[20.0, 10, 84, 60], [50, 40, 94, 90]],
    ]
    labels = [[1, 2, 3], [3, 1]]
    targets = [{"boxes": torch.tensor(b), "labels": torch.tensor(k)} for b, k in zip(boxes, labels, strict=True)]
    return images, targets
