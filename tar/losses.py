"""The three distillation losses and the gate, one function an equation (README, the paper in one page).

Each returns the sum over this process's regions or cells divided by a count that the caller gives, because the
count is taken over all processes.
"""

import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder

SMOOTH_L1_BETA = 1 / 9  # a choice: as in torchvision's own box loss
REG_GATES = ("proposal", "student", "none")
CLS_GATES = ("none", "better")


BACKBONE_NORMS = ("energy", "cells")


def backbone_normalizer(teacher, masks, kind="energy"):
    """What the backbone level's sum is divided by, this process's part of it.

        energy:  Z = sum_l sum_ij M_l[ij] * sum_c teacher_l[c, ij]^2     (a choice; the loss does not depend on scale)
        cells:   Z = sum_l sum_ij M_l[ij]                                (the paper's)

    Args:
        teacher, masks: as backbone_loss().
        kind: one of BACKBONE_NORMS.

    Returns:
        scalar tensor; 0 without boxes.
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
        normalizer: Z of backbone_normalizer() over all images, a scalar tensor; 0 without boxes: the loss is 0 then.
    """
    total = sum((m * (s - t).square().sum(1)).sum() for s, t, m in zip(student, teacher, masks, strict=True))
    return total / (2 * normalizer.clamp(min=1e-6))


def classification_loss(student_logits, teacher_logits, positives, keep=None, sigmoid=False):
    """Soft labels on the positive regions: cross-entropy of the teacher's and the student's probabilities.

        Faster R-CNN:  L_cls = 1/K * sum_i CE(softmax(c_T_i), softmax(c_S_i))
        RetinaNet:     L_cls = 1/K * sum_i sum_k BCE(sigmoid(c_T_ik), sigmoid(c_S_ik))

    Args:
        student_logits, teacher_logits: [P, classes + 1], the rows of the positive regions; P may be 0. RetinaNet's
            first column, which torchvision keeps for the background and no region is positive for, is left out.
        positives: K, a scalar tensor.
        keep: bool or float [P], the regions that the gate lets through; None for all.
        sigmoid: RetinaNet's form.
    """
    if sigmoid:
        student_logits, teacher_logits = student_logits[:, 1:], teacher_logits[:, 1:]
        each = F.binary_cross_entropy_with_logits(student_logits, teacher_logits.sigmoid(), reduction="none").sum(1)
    else:
        each = F.cross_entropy(student_logits, teacher_logits.softmax(1), reduction="none")
    return (each if keep is None else each * keep).sum() / positives


def better_gate(student_logits, teacher_logits, labels, sigmoid=False):
    """`--cls-gate better`: where the teacher gives the true class a higher probability than the student. bool [P]."""
    rows = []
    for logits in (student_logits, teacher_logits):
        probability = logits.sigmoid() if sigmoid else logits.softmax(1)
        rows.append(probability.gather(1, labels[:, None])[:, 0])
    return rows[1] > rows[0]


def regression_loss(student_deltas, teacher_deltas, gate, positives):
    """Imitation of the box deltas where the gate is open.

        L_reg = 1/K * sum_i v_i * smooth_l1(r_S_i - r_T_i)      (summed over the four deltas)

    Args:
        student_deltas, teacher_deltas: [P, 4], those of the true class; P may be 0.
        gate: v, bool [P].
        positives: K, a scalar tensor.
    """
    each = F.smooth_l1_loss(student_deltas, teacher_deltas, beta=SMOOTH_L1_BETA, reduction="none").sum(1)
    return (each * gate).sum() / positives


def regression_gate(teacher_boxes, reference_boxes, gt_boxes):
    """v: where the teacher's box is nearer to the truth than the reference is.

        v_i = 1 if IoU(b_T_i, G_i) > IoU(ref_i, G_i) else 0

    Args:
        teacher_boxes, reference_boxes, gt_boxes: [P, 4] xyxy, row by row.

    Returns:
        bool [P].
    """
    return paired_iou(teacher_boxes, gt_boxes) > paired_iou(reference_boxes, gt_boxes)


def paired_iou(a, b):
    """IoU of row i of a with row i of b: [P, 4] xyxy each -> [P]; 0 where the union is empty."""
    corner0, corner1 = a[:, :2].maximum(b[:, :2]), a[:, 2:].minimum(b[:, 2:])
    overlap = (corner1 - corner0).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
    return overlap / union.clamp(min=1e-6)


def decode(box_coder: BoxCoder, deltas, regions):
    """Boxes from deltas, row by row: [P, 4] deltas of regions [P, 4] xyxy -> [P, 4] xyxy."""
    return box_coder.decode_single(deltas, regions)
