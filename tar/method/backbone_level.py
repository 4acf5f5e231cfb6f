"""Backbone level: imitation of the teacher's features under a mask of the ground-truth boxes.

Mask, adapter, loss. A mask weighs each cell of each pyramid level. An adapter, one a level, is a 3x3 convolution from
the student's channels to the teacher's, trained with the student and thrown away afterwards.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

MASKS = ("gaussian", "box", "full", "fine-grained")
BACKBONE_NORMS = ("energy", "cells")


def gaussian_mask(boxes, height, width, stride, sigma2=2.0):
    """The paper's Gaussian mask at the cell centres ((i + 0.5) * stride); the maximum where boxes overlap.

        M(x, y) = exp(-(x - x0)^2 / (s2 (w/2)^2) - (y - y0)^2 / (s2 (h/2)^2))  inside the box, 0 outside

    Args:
        boxes: float [N, 4] xyxy in pixels of the resized image; N may be 0. Leading dimensions are kept.
        height, width: cells of the level.
        stride: pixels of the resized image from cell to cell.
        sigma2: s2, a choice: 2. With half a side as unit the variance is s2 / 2; in the middle of an edge M is 0.61.

    Returns:
        float [height, width] in 0..1.
    """
    if boxes.shape[-2] == 0:
        return boxes.new_zeros(*boxes.shape[:-2], height, width)
    return _gaussians(boxes, [(height, width)], [stride], sigma2)[0]


def _gaussians(boxes, sizes, strides, sigma2):
    """gaussian_mask() of all levels in one pass over the boxes (a Gaussian is one along x times one along y).

    boxes: float [..., N, 4], N > 0; sizes: (height, width) of each level. Returns a list of L float [..., H_l, W_l].
    """
    profiles = []
    for axis in (0, 1):  # x, then y, at the cell centres of all levels one after the other
        cells = [size[1 - axis] for size in sizes]
        at = [(torch.arange(n, device=boxes.device) + 0.5) * stride for n, stride in zip(cells, strides, strict=True)]
        at, low, high = torch.cat(at).to(boxes.dtype), boxes[..., axis, None], boxes[..., axis + 2, None]
        centre, half = (low + high) / 2, (high - low) / 2
        inside = (at >= low) & (at <= high) & (half > 0)
        exponent = (at - centre).square() / (sigma2 * half.clamp(min=1e-6).square())
        profiles.append((torch.exp(-exponent) * inside).split(cells, -1))
    return [(y[..., :, None] * x[..., None, :]).amax(-3) for x, y in zip(*profiles, strict=True)]


def fine_grained_mask(boxes, anchors, sizes, part=0.5):
    """1 in the cells with an anchor near a ground-truth box, 0 elsewhere (Wang et al., CVPR 2019).

    An anchor is near a box if their IoU is above `part` times the best IoU that the box has with any anchor.

    Args:
        boxes: float [N, 4] xyxy in pixels of the resized image; N may be 0.
        anchors: float [A, 4] of all levels, level by level, row by row, a cell's anchors together.
        sizes: (height, width) of each level.

    Returns:
        list of L float [H_l, W_l].
    """
    cells = [height * width for height, width in sizes]
    near = boxes.new_zeros(sum(cells))
    if len(boxes):
        overlap = box_iou(boxes, anchors)
        best = overlap.amax(1, keepdim=True)
        near = (overlap > part * best).any(0).view(sum(cells), -1).any(1).to(boxes.dtype)
    return [m.view(size) for m, size in zip(near.split(cells), sizes, strict=True)]


def pyramid_masks(targets, features, strides, kind="gaussian", sigma2=2.0, anchors=None):
    """The masks of a batch.

    Args:
        targets: list of B dicts with boxes float [N, 4] xyxy in pixels of the resized image.
        features: list of L tensors [B, C, H_l, W_l], for their sizes.
        strides: of the L levels, pixels of the resized image.
        kind: one of MASKS: gaussian (the paper's), box (1 inside boxes), full (1 everywhere, the naive imitation),
            fine-grained (1 where anchors are near a box).
        anchors: for fine-grained: list of B float [A, 4].

    Returns:
        list of L tensors [B, H_l, W_l].
    """
    if kind == "fine-grained":
        sizes = [level.shape[-2:] for level in features]
        each = [fine_grained_mask(t["boxes"], grid, sizes) for t, grid in zip(targets, anchors, strict=True)]
        return [torch.stack(level) for level in zip(*each, strict=True)]
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)  # padded by boxes of no area, which weigh 0
    sizes = [tuple(level.shape[-2:]) for level in features]
    if kind == "full" or boxes.shape[1] == 0:
        return [boxes.new_full((len(targets), *size), float(kind == "full")) for size in sizes]
    levels = _gaussians(boxes, sizes, strides, sigma2 if kind == "gaussian" else float("inf"))
    return levels if kind == "gaussian" else [(level > 0).to(boxes.dtype) for level in levels]


class Adapter(nn.Conv2d):
    """A 3x3 convolution from the student's channels to the teacher's, of one level of the pyramid."""

    def __init__(self, channels, teacher_channels):
        super().__init__(channels, teacher_channels, 3, padding=1)

    def in_cells(self, features, cells):
        """The convolution's output in some cells only: their 3x3 neighbourhoods are the rows of one matrix product.

        features: [B, C, H, W]; cells: image, row and column of n cells, three int64 [n]. Returns [n, C']. The gradient
        adds the neighbours in autocast's type: in bf16 it is off by 0.5%, that of the whole convolution by 0.3%.
        """
        image, row, column = cells
        device = features.device.type
        if torch.is_autocast_enabled(device):  # as autocast would, but before the neighbourhoods are made
            features = features.to(torch.get_autocast_dtype(device))
        padded = F.pad(features.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        height, width = padded.shape[1:3]
        corner = (image * height + row) * width + column
        square = torch.arange(3, device=corner.device)
        neighbours = corner[:, None] + (square[:, None] * width + square).flatten()
        # embedding, for indexing's gradient takes six times as long
        rows = F.embedding(neighbours, padded.flatten(0, 2)).flatten(1)
        return F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


def adapted_features(adapters, features, teacher_features, masks, sparse):
    """The features that the backbone level compares, and their weights.

    Args:
        adapters: of the L levels.
        features, teacher_features: lists of L tensors [B, C, H_l, W_l] and [B, C', H_l, W_l].
        masks: list of L tensors [B, H_l, W_l].
        sparse: compute only the cells under the mask; the others weigh nothing. It takes a third of the time on a CPU
            (P2, 28% of the cells under the mask). On a GPU counting the cells would make the host wait.

    Returns:
        the student's features after the adapters, the teacher's, and the masks: lists of L, each [B, C', H_l, W_l] and
        [B, H_l, W_l], or where sparse [n_l, C'] and [n_l].
    """
    if not sparse:
        return [adapt(f).float() for adapt, f in zip(adapters, features, strict=True)], teacher_features, masks
    cells = [mask.nonzero(as_tuple=True) for mask in masks]
    adapted = [adapt.in_cells(f, c).float() for adapt, f, c in zip(adapters, features, cells, strict=True)]
    teacher_rows = [t.permute(0, 2, 3, 1)[c] for t, c in zip(teacher_features, cells, strict=True)]
    return adapted, teacher_rows, [mask[c] for mask, c in zip(masks, cells, strict=True)]


def backbone_normalizer(teacher, masks, kind="energy"):
    """What the backbone level's sum is divided by, this process's part of it: a scalar tensor, 0 without boxes.

        energy:  Z = sum_l sum_ij M_l[ij] * sum_c teacher_l[c, ij]^2     (a choice; the loss does not depend on scale)
        cells:   Z = sum_l sum_ij M_l[ij]                                (the paper's)

    teacher, masks: as backbone_loss(). kind: one of BACKBONE_NORMS.
    """
    if kind == "cells":
        return sum(m.sum() for m in masks)
    return sum((m * t.square().sum(1)).sum() for t, m in zip(teacher, masks, strict=True))


def backbone_loss(student, teacher, masks, normalizer):
    """Masked imitation of the features.

        L_backbone = 1 / (2 Z) * sum_l sum_ij M_l[ij] * sum_c (student_l[c, ij] - teacher_l[c, ij])^2,   over all images

    Args:
        student: list of L tensors [B, C, H_l, W_l], the student's features after the adapters; or [n_l, C], those of
            the cells under the mask.
        teacher: the same of the teacher.
        masks: list of L tensors [B, H_l, W_l], or [n_l].
        normalizer: Z, total_per_process() of backbone_normalizer(), a scalar tensor; 0 without boxes: the loss is 0.
    """
    total = sum((m * (s - t).square().sum(1)).sum() for s, t, m in zip(student, teacher, masks, strict=True))
    return total / (2 * normalizer.clamp(min=1e-6))
