"""The method's equations in plain Python, and what they give on both models' raw outputs for a batch."""

import math
from collections import namedtuple
from functools import partial
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from small_detectors import CLS, REG, batch, make_step, run
from torchvision.models.detection import RetinaNet

# A region, and both models' raw outputs there, all lists; label 0 is the background.
Row = namedtuple("Row", "label region teacher_region gt_box logits deltas teacher_logits teacher_deltas")


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def drawn_boxes(count, seed, side=60, least=1.0):
    """float64 [count, 4], with corners in a square of this side; no box is smaller than `least` pixels."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=random, dtype=torch.float64) * side
    return torch.cat([corners.amin(1), corners.amax(1) + least], 1)


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


def cross_entropy(student, teacher, retinanet=False):
    """Of the class probabilities of two lists of logits; RetinaNet's first, of the background, is left out."""
    if not retinanet:
        return -sum(t * math.log(s) for t, s in zip(softmax(teacher), softmax(student), strict=True))
    return -sum(
        sigmoid(t) * math.log(sigmoid(s)) + sigmoid(-t) * math.log(sigmoid(-s))
        for s, t in zip(student[1:], teacher[1:], strict=True)
    )


def smooth_l1(student, teacher, beta=1 / 9):
    """The sum over the deltas of one region."""
    gaps = [abs(s - t) for s, t in zip(student, teacher, strict=True)]
    return sum(gap * gap / (2 * beta) if gap < beta else gap - beta / 2 for gap in gaps)


def decode(deltas, region, weights=(10, 10, 5, 5)):
    """R-CNN's box regression; RetinaNet's has weights of 1."""
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, weights, strict=True))
    width, height = region[2] - region[0], region[3] - region[1]
    x, y = region[0] + (0.5 + dx) * width, region[1] + (0.5 + dy) * height
    half_width, half_height = math.exp(dw) * width / 2, math.exp(dh) * height / 2
    return [x - half_width, y - half_height, x + half_width, y + half_height]


def is_open(gate, student, teacher, region, teacher_region, gt_box, decode=decode):
    """The gate of L_reg, of both models' deltas and regions."""
    reference = region if gate == "proposal" else decode(student, region)
    return gate == "none" or iou(decode(teacher, teacher_region), gt_box) > iou(reference, gt_box)


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


def fine_grained_by_hand(boxes, anchors, per_cell, part=0.5):
    """The definition, anchor by anchor: 1 or 0 a cell; `per_cell` anchors after one another are a cell's."""
    cells = [anchors[i : i + per_cell] for i in range(0, len(anchors), per_cell)]
    mask = [0] * len(cells)
    for box in boxes:
        best = max(iou(anchor, box) for anchor in anchors)
        for i, of_cell in enumerate(cells):
            if any(iou(anchor, box) > part * best for anchor in of_cell):
                mask[i] = 1
    return mask


def backbone_by_hand(student, teacher, masks, norm):
    """L_backbone and Z; student, teacher: nested lists of L levels [B, C, H, W]; masks: of [B, H, W]."""
    total = below = 0.0
    for level in zip(student, teacher, masks, strict=True):
        for mine, wanted, mask in zip(*level, strict=True):
            for i, row in enumerate(mask):
                for j, weight in enumerate(row):
                    below += weight * (1 if norm == "cells" else sum(t[i][j] ** 2 for t in wanted))
                    total += weight * sum((s[i][j] - t[i][j]) ** 2 for s, t in zip(mine, wanted, strict=True))
    return total / (2 * below), below


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


def both_models(student, teacher):
    """The batch as a step sees it: images, targets, [(model, its pyramid)] of both, lists of each image's anchors."""
    torch.manual_seed(5)  # as run()
    images, targets = student.transform(*batch())
    pixels = images.tensors.contiguous(memory_format=torch.channels_last)
    models = [(model, model.backbone(pixels)) for model in (student, teacher)]
    generator = student.anchor_generator if isinstance(student, RetinaNet) else student.rpn.anchor_generator
    return images, targets, models, [grid.tolist() for grid in generator(images, list(models[0][1].values()))]


@torch.no_grad()
def backbone_of_batch(step, teacher, kind, norm, sigma2):
    """L_backbone of the batch."""
    _, targets, models, anchors = both_models(step.student, teacher)
    mine, wanted = (list(pyramid.values()) for _, pyramid in models)
    boxes, per_cell = [target["boxes"].tolist() for target in targets], 9 if isinstance(step.student, RetinaNet) else 3
    if kind == "fine-grained":
        fine = [iter(fine_grained_by_hand(b, grid, per_cell)) for b, grid in zip(boxes, anchors, strict=True)]
    masks = []
    for stride, level in zip(step.student.strides, wanted, strict=True):
        height, width = level.shape[2:]
        if kind == "fine-grained":
            masks.append([[list(islice(cells, width)) for _ in range(height)] for cells in fine])
        else:
            masks.append([mask_by_hand(b, height, width, stride, sigma2, kind) for b in boxes])
    weights = [(adapter.weight.double(), adapter.bias.double()) for adapter in step.adapters]
    adapted = [F.conv2d(f.double(), *w, padding=1).tolist() for f, w in zip(mine, weights, strict=True)]
    return backbone_by_hand(adapted, [f.tolist() for f in wanted], masks, norm)[0]


def anchor_rows(targets, models, anchors):
    outputs = [model.head(list(pyramid.values())) for model, pyramid in models]
    for i, (grid, target) in enumerate(zip(anchors, targets, strict=True)):
        boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
        both = [o[key][i].tolist() for o in outputs for key in ("cls_logits", "bbox_regression")]
        for anchor, k, *raw in zip(grid, match_anchors(grid, boxes), *both, strict=True):
            if k != "neither":
                yield Row(0 if k is None else labels[k], anchor, anchor, boxes[k or 0], *raw)


def regions_of(settings, images, targets, models):
    """The regions of the student's head, and the teacher's beside them: two lists of B [R, 4]."""
    (student, features), (teacher, teacher_features) = models
    own, _ = student.rpn(images, features, targets)
    mine = student.roi_heads.select_training_samples(own, targets)[0]
    taught, _ = teacher.rpn(images, teacher_features)
    if settings.no_sharing:
        return nearest(own, taught, targets)
    if settings.proposals == "student":
        return mine, mine
    theirs = student.roi_heads.select_training_samples(taught, targets)[0]
    if settings.proposals == "both":
        theirs = [torch.cat(regions) for regions in zip(mine, theirs, strict=True)]
    return theirs, theirs


def nearest(own, taught, targets):
    """Of the student's and of the teacher's proposals those that overlap a box best: two lists of B [M, 4]."""
    found = ([], [])
    for *proposals, target in zip(own, taught, targets, strict=True):
        boxes = target["boxes"].tolist()
        best = [[max(p.tolist(), key=partial(iou, box)) for p in proposals] for box in boxes]
        near = [two for two, box in zip(best, boxes, strict=True) if iou(two[0], box) >= 0.5]
        for i in (0, 1):
            found[i].append(torch.tensor([two[i] for two in near]).view(-1, 4))
    return found


def region_rows(regions, targets, models):
    outputs = []
    for (model, features), each in zip(models, regions, strict=True):
        heads = model.roi_heads
        raw = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, each, [(64, 96)] * 2)))
        outputs += [iter(output.tolist()) for output in raw]
    for mine, theirs, target in zip(*regions, targets, strict=True):
        boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
        for region, other in zip(mine.tolist(), theirs.tolist(), strict=True):
            overlaps = [iou(region, box) for box in boxes]
            best = overlaps.index(max(overlaps))
            k = labels[best] if overlaps[best] >= 0.5 else 0
            logits, deltas, teacher_logits, teacher_deltas = map(next, outputs)
            own = slice(4 * k, 4 * k + 4)
            yield Row(k, region, other, boxes[best], logits, deltas[own], teacher_logits, teacher_deltas[own])


@torch.no_grad()
def compared_by_hand(student, teacher, **settings):
    """Holds a step's L_cls and L_reg against the equations; returns the rows, and how many regions each gate keeps."""
    step, retinanet = make_step(student, teacher, **settings), isinstance(student, RetinaNet)
    settings = step.settings
    _, distillation, seen = run(step, batch(), teacher)
    images, targets, models, anchors = both_models(student, teacher)
    if retinanet:
        rows = list(anchor_rows(targets, models, anchors))
    else:
        rows = list(region_rows(regions_of(settings, images, targets, models), targets, models))
    probabilities = (lambda logits: list(map(sigmoid, logits))) if retinanet else softmax
    boxes = partial(decode, weights=(1, 1, 1, 1)) if retinanet else decode
    cls = reg = kept = opened = 0
    for label, *where, logits, deltas, teacher_logits, teacher_deltas in rows:
        term = cross_entropy(logits, teacher_logits, retinanet)
        if not label:
            cls += 1.5 * term if settings.soft_labels == "all" else 0
            continue
        gain = probabilities(teacher_logits)[label] - probabilities(logits)[label]
        if settings.cls_gate == "none" or gain > 0:
            cls, kept = cls + term, kept + 1
        if is_open(settings.reg_gate, deltas, teacher_deltas, *where, boxes):
            reg, opened = reg + smooth_l1(deltas, teacher_deltas), opened + 1
    positives = sum(row.label > 0 for row in rows)
    assert seen["positives"].item() == positives
    assert seen["gate_open"].item() == pytest.approx(opened / positives, rel=1e-5)
    counted = len(rows) if settings.soft_labels == "all" else positives
    assert distillation[CLS].item() == pytest.approx(cls / counted, rel=1e-4)
    assert distillation[REG].item() == pytest.approx(reg / positives, rel=1e-4)
    return rows, kept, opened
