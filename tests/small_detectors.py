"""Small detectors, a small batch and one distillation step of them, for the tests that need a whole model."""

import copy
from functools import cache

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from tar.detectors.build import build_detector
from tar.method.step import DistillationSettings, DistillationStep
from tar.training import checkpoint

KINDS = ("faster-rcnn", "retinanet")
CLASSES = ("disc", "square", "bar")
SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "head_channels": 32, "rois": 64, "rpn_top_n": (1000, 200)}
LOSSES = {
    "faster-rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
    "retinanet": {"classification", "bbox_regression"},
}
BACKBONE, CLS, REG = "distill_backbone", "distill_cls", "distill_reg"


def detector(kind="faster-rcnn", backbone="r10", seed=0, **changes):
    """A detector of three classes, from drawn weights."""
    torch.manual_seed(seed)
    model = build_detector(kind, backbone, 3, **{**SMALL, "anchor_scale": 4 if kind == "faster-rcnn" else 2, **changes})
    for module in model.modules():  # a block's last norm may start at zero, and would hide its convolutions
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model.to(memory_format=torch.channels_last)


@cache
def _pair(kind):
    student = detector(kind).train()
    teacher = detector(kind, "r18", seed=1, fpn_channels=24).eval().requires_grad_(False)
    with torch.no_grad():
        if kind == "faster-rcnn":
            teacher.roi_heads.box_predictor.bbox_pred.weight *= 2
            return student, teacher
        for model, size, bias in ((student, 6, -0.5), (teacher, 3, 0.0)):
            outputs = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
            for layer in outputs:
                layer.weight *= size
            outputs[0].bias.fill_(bias)
    return student, teacher


def pair(kind="faster-rcnn"):
    """A student in training mode, and a frozen teacher of another backbone and a wider pyramid.

    Their heads' outputs differ, as those of fresh detectors hardly do.
    """
    return copy.deepcopy(_pair(kind))


def batch(boxless=()):
    """Two images, one halved by the resizing and one padded; some may be without boxes.

    Boxes are whole numbers after the resizing, so that IoUs are exact; one is too small for most levels.
    """
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 128, 192, generator=random), torch.rand(3, 64, 64, generator=random)]
    boxes = [[[16.0, 12, 92, 100], [60, 40, 160, 112], [172, 100, 184, 110]], [[6.0, 4, 38, 40], [30, 20, 62, 60]]]
    labels = [[1, 2, 3], [3, 1]]
    targets = [{"boxes": torch.tensor(b), "labels": torch.tensor(k)} for b, k in zip(boxes, labels, strict=True)]
    return images, [{k: v[:0] for k, v in t.items()} if i in boxless else t for i, t in enumerate(targets)]


def make_step(student, teacher, **settings):
    """A step with all levels on, but for what `settings` says."""
    torch.manual_seed(2)  # of the adapters
    on = {"weight_backbone": 0.5, "weight_cls": 0.5, "weight_reg": 0.5}
    step = DistillationStep(student, DistillationSettings(**{**on, **settings}), teacher.backbone.out_channels)
    return step.to(memory_format=torch.channels_last)


def run(step, batch, teacher=None):
    """What a step returns, with the same region sampling each time."""
    torch.manual_seed(5)
    return step(*batch, teacher)


def norms(module):
    """The batch norms of a module, frozen or not."""
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def reached(module):
    """Names of the parameters that have a gradient that is not zero."""
    return {name for name, gradient in gradients(module).items() if gradient.abs().sum() > 0}


def same(one, other):
    """Whether two dicts of tensors have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def save(path, kind="faster-rcnn", backbone="r10", classes=CLASSES, **changes):
    """Writes a checkpoint of a small detector; returns the detector and its build."""
    build = {"detector": kind, "backbone": backbone, "num_classes": len(classes), "norm": "batch", **SMALL}
    build |= {"anchor_scale": 4 if kind == "faster-rcnn" else 2, **changes}
    torch.manual_seed(8)
    model = build_detector(**build)
    checkpoint.save(path, {"model": model.state_dict(), "build": build, "classes": list(classes), "settings": {}})
    return model, build
