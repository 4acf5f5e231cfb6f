"""The method's equations in plain Python, and what they give on both models' raw outputs for a batch."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_detectors import CLS, REG, batch, make_step, run
from torchvision.models.detection import RetinaNet

from tar.detectors.build import STRIDES


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union else 0.0


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [p / sum(powers) for p in powers]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def smooth_l1(a, b, beta=1 / 9):
    gap = abs(a - b)
    return gap * gap / (2 * beta) if gap < beta else gap - beta / 2


def decode(deltas, region, weights=(10, 10, 5, 5)):
    """R-CNN's box regression; RetinaNet's has weights of 1."""
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, weights, strict=True))
    width, height = region[2] - region[0], region[3] - region[1]
    x, y = region[0] + (0.5 + dx) * width, region[1] + (0.5 + dy) * height
    half_width, half_height = math.exp(dw) * width / 2, math.exp(dh) * height / 2
    return [x - half_width, y - half_height, x + half_width, y + half_height]


def mask_by_hand(boxes, height, width, stride, sigma2=2.0, kind="gaussian"):
    """The mask of a level, cell by cell: list of rows."""
    mask = [[float(kind == "full")] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            x, y = (j + 0.5) * stride, (i + 0.5) * stride
            for x0, y0, x1, y1 in boxes:
                if x0 <= x <= x1 and y0 <= y <= y1:
                    u, v = (x - (x0 + x1) / 2) / ((x1 - x0) / 2), (y - (y0 + y1) / 2) / ((y1 - y0) / 2)
                    value = math.exp(-(u * u + v * v) / sigma2) if kind == "gaussian" else 1.0
                    mask[i][j] = max(mask[i][j], value)
    return mask


def fine_grained_by_hand(boxes, cells, part=0.5):
    """The definition, anchor by anchor: cells is a list of lists of anchors; 1 or 0 a cell."""
    mask = [0] * len(cells)
    for box in boxes:
        best = max(iou(anchor, box) for anchors in cells for anchor in anchors)
        for i, anchors in enumerate(cells):
            if any(iou(anchor, box) > part * best for anchor in anchors):
                mask[i] = 1
    return mask


def convolve(features, adapter):
    """A 3x3 convolution with a border of zeros as a sum of nine shifted products: [B, C, H, W] -> [B, D, H, W]."""
    x = np.pad(features.detach().double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    weight, (height, width) = adapter.weight.detach().double().numpy(), features.shape[-2:]
    out = adapter.bias.detach().double().numpy()[None, :, None, None]
    for i in range(3):
        for j in range(3):
            out = out + np.einsum("bchw,dc->bdhw", x[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return out


def match_anchors(anchors, boxes):
    """Each anchor's box; None for the background, "neither" from IoU 0.4 to 0.5. A box's best anchors are its own."""
    overlaps = [[iou(anchor, box) for box in boxes] for anchor in anchors]
    bests = [max(row[k] for row in overlaps) for k in range(len(boxes))]
    found = []
    for row in overlaps:
        k = row.index(max(row))
        own = any(value == best for value, best in zip(row, bests, strict=True))
        found.append(k if own or row[k] >= 0.5 else None if row[k] < 0.4 else "neither")
    return found


class Row(NamedTuple):
    """A region, and both models' raw outputs there; label 0 is the background."""

    region: list
    teacher_region: list
    gt_box: list
    label: int
    logits: list
    deltas: list
    teacher_logits: list
    teacher_deltas: list


class ByHand:
    """The three losses of a batch, worked out from both models' raw outputs.

    Args:
        step, teacher, batch: what run() of small_detectors is given; every image has boxes.
        proposals: student, teacher, both, or nearest (without sharing).
    """

    def __init__(self, step, teacher, batch, proposals="student"):
        student = step.student
        self.retinanet = isinstance(student, RetinaNet)
        self.decode = partial(decode, weights=(1, 1, 1, 1)) if self.retinanet else decode
        torch.manual_seed(5)  # as run()
        images, self.targets = student.transform(*batch)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            self.models = [(model, model.backbone(pixels)) for model in (student, teacher)]
            features, teacher_features = (list(pyramid.values()) for _, pyramid in self.models)
            self.adapted = [convolve(f, a) for f, a in zip(features, step.adapters, strict=True)]
            self.wanted = [f.double().numpy() for f in teacher_features]
            generator = student.anchor_generator if self.retinanet else student.rpn.anchor_generator
            self.anchors = [grid.tolist() for grid in generator(images, features)]
            rows = list(self.anchor_rows() if self.retinanet else self.region_rows(images, proposals))
        self.positives = [row for row in rows if row.label]
        self.background = [row for row in rows if not row.label]

    def anchor_rows(self):
        outputs = [model.head(list(pyramid.values())) for model, pyramid in self.models]
        for i, (anchors, target) in enumerate(zip(self.anchors, self.targets, strict=True)):
            boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
            both = [o[key][i].double().tolist() for o in outputs for key in ("cls_logits", "bbox_regression")]
            for anchor, k, *raw in zip(anchors, match_anchors(anchors, boxes), *both, strict=True):
                if k != "neither":
                    yield Row(anchor, anchor, boxes[k or 0], 0 if k is None else labels[k], *raw)

    def region_rows(self, images, proposals):
        (student, features), (teacher, teacher_features) = self.models
        own, _ = student.rpn(images, features, self.targets)
        mine = student.roi_heads.select_training_samples(own, self.targets)[0]
        if proposals == "student":
            return self.rows_at(mine, mine)
        taught, _ = teacher.rpn(images, teacher_features)
        if proposals == "nearest":
            return self.rows_at(*self.nearest(own, taught))
        theirs = student.roi_heads.select_training_samples(taught, self.targets)[0]
        if proposals == "both":
            theirs = [torch.cat(regions) for regions in zip(mine, theirs, strict=True)]
        return self.rows_at(theirs, theirs)

    def nearest(self, own, taught):
        """Of the student's and of the teacher's proposals those that overlap a box best: two lists of [M, 4]."""
        found = ([], [])
        for *proposals, target in zip(own, taught, self.targets, strict=True):
            boxes = target["boxes"].tolist()
            best = [[max(p.tolist(), key=partial(iou, box)) for p in proposals] for box in boxes]
            near = [two for two, box in zip(best, boxes, strict=True) if iou(two[0], box) >= 0.5]
            for i in (0, 1):
                found[i].append(torch.tensor([two[i] for two in near]).view(-1, 4))
        return found

    def rows_at(self, mine, theirs):
        """The rows of the student's regions, and of the teacher's beside them."""
        outputs = []
        for (model, features), regions in zip(self.models, (mine, theirs), strict=True):
            heads = model.roi_heads
            logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, [(64, 96)] * 2)))
            outputs += [iter(logits.double().tolist()), iter(deltas.double().tolist())]
        for own, taught, target in zip(mine, theirs, self.targets, strict=True):
            boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
            for region, other in zip(own.tolist(), taught.tolist(), strict=True):
                overlaps = [iou(region, box) for box in boxes]
                best = overlaps.index(max(overlaps))
                k = labels[best] if overlaps[best] >= 0.5 else 0
                logits, deltas, teacher_logits, teacher_deltas = map(next, outputs)
                cut = slice(4 * k, 4 * k + 4)
                yield Row(region, other, boxes[best], k, logits, deltas[cut], teacher_logits, teacher_deltas[cut])

    def backbone_loss(self, kind="gaussian", norm="energy", sigma2=2.0):
        strides = STRIDES["retinanet" if self.retinanet else "faster-rcnn"]
        total = below = 0.0
        for image, target in enumerate(self.targets):
            boxes, start, per_cell = target["boxes"].tolist(), 0, 9 if self.retinanet else 3
            grid = self.anchors[image]
            cells = [grid[i : i + per_cell] for i in range(0, len(grid), per_cell)]
            fine = fine_grained_by_hand(boxes, cells) if kind == "fine-grained" else None
            for stride, mine, wanted in zip(strides, self.adapted, self.wanted, strict=True):
                height, width = mine.shape[2:]
                if fine:
                    mask = np.array(fine[start : start + height * width]).reshape(height, width)
                else:
                    mask = np.array(mask_by_hand(boxes, height, width, stride, sigma2, kind))
                start += height * width
                below += (mask * (1 if norm == "cells" else (wanted[image] ** 2).sum(0))).sum()
                total += (mask * ((mine[image] - wanted[image]) ** 2).sum(0)).sum()
        return total / (2 * below)

    def cross_entropy(self, row):
        if not self.retinanet:
            student, teacher = softmax(row.logits), softmax(row.teacher_logits)
            return -sum(t * math.log(s) for t, s in zip(teacher, student, strict=True))
        return -sum(  # the first column, of the background, is left out
            sigmoid(t) * math.log(sigmoid(s)) + sigmoid(-t) * math.log(sigmoid(-s))
            for s, t in zip(row.logits[1:], row.teacher_logits[1:], strict=True)
        )

    def cls_loss(self, gate="none", soft_labels="positive"):
        """L_cls, and how many regions are kept; with soft labels on all, background regions weigh 1.5."""
        of = (lambda logits: logits) if self.retinanet else softmax
        kept = [r for r in self.positives if gate == "none" or of(r.teacher_logits)[r.label] > of(r.logits)[r.label]]
        rest = self.background if soft_labels == "all" else []
        total = sum(map(self.cross_entropy, kept)) + 1.5 * sum(map(self.cross_entropy, rest))
        return total / (len(self.positives) + len(rest)), len(kept)

    def reg_loss(self, gate="proposal"):
        """L_reg, and how many gates are open."""
        total, opened = 0.0, 0
        for row in self.positives:
            reference = row.region if gate == "proposal" else self.decode(row.deltas, row.region)
            taught = self.decode(row.teacher_deltas, row.teacher_region)
            if gate == "none" or iou(taught, row.gt_box) > iou(reference, row.gt_box):
                opened += 1
                total += sum(map(smooth_l1, row.deltas, row.teacher_deltas))
        return total / len(self.positives), opened


def compared_by_hand(student, teacher, proposals="student", soft="positive", cls_gate="none", reg_gate="proposal"):
    """Holds a step's L_cls and L_reg against the equations; returns ByHand, and how many regions each gate keeps."""
    regions = {"no_sharing": True} if proposals == "nearest" else {"proposals": proposals}
    step = make_step(student, teacher, soft_labels=soft, cls_gate=cls_gate, reg_gate=reg_gate, **regions)
    _, distillation, seen = run(step, batch(), teacher)
    hand = ByHand(step, teacher, batch(), proposals)
    (cls, kept), (reg, opened) = hand.cls_loss(cls_gate, soft), hand.reg_loss(reg_gate)
    assert seen["positives"].item() == len(hand.positives)
    assert seen["gate_open"].item() == pytest.approx(opened / len(hand.positives), rel=1e-5)
    assert distillation[CLS].item() == pytest.approx(cls, rel=1e-4)
    assert distillation[REG].item() == pytest.approx(reg, rel=1e-4)
    return hand, kept, opened
