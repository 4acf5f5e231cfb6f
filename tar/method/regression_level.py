"""Regression level: the teacher's box deltas, where its box is nearer to the ground truth than what it must beat."""

import torch
import torch.nn.functional as F

SMOOTH_L1_BETA = 1 / 9  # our choice: as in torchvision's own box loss
REG_GATES = ("proposal", "student", "none")


def regression_loss(student_deltas, teacher_deltas, gate, count):
    """L_reg = 1/K * sum_i v_i * smooth_l1(r_S_i - r_T_i), summed over the four deltas.

    Args:
        student_deltas, teacher_deltas: [P, 4], those of the true class; P may be 0.
        gate: v, bool [P].
        count: K of total_per_process(): all processes' positive regions, closed gates too, divided by the number of
            processes; a scalar tensor.

    Returns:
        scalar tensor, this process's sum divided by K.
    """
    each = F.smooth_l1_loss(student_deltas, teacher_deltas, beta=SMOOTH_L1_BETA, reduction="none").sum(1)
    return (each * gate).sum() / count


@torch.no_grad()
def regression_gate(kind, box_coder, student_deltas, teacher_deltas, region, teacher_region, gt_boxes):
    """The gate v of each positive region: v_i = 1 if IoU(b_T_i, G_i) > IoU(ref_i, G_i) else 0.

    Args:
        kind: what the teacher's box must beat. "proposal": the region itself (the default); "student": the student's
            box; "none": nothing, the gate is always open.
        box_coder: torchvision's BoxCoder, from deltas to boxes.
        student_deltas, teacher_deltas: [P, 4], those of the true class.
        region, teacher_region, gt_boxes: [P, 4] xyxy in pixels of the resized image: each model's region (the same but
            for --no-sharing) and the matched ground-truth box.

    Returns:
        bool [P].
    """
    if kind == "none":
        return torch.ones(len(region), dtype=torch.bool, device=region.device)
    reference = region if kind == "proposal" else box_coder.decode_single(student_deltas, region)
    return is_nearer(box_coder.decode_single(teacher_deltas, teacher_region), reference, gt_boxes)


def is_nearer(boxes, reference_boxes, gt_boxes):
    """Where a box overlaps the ground truth more than its reference does: [P, 4] xyxy each -> bool [P]."""
    return paired_iou(boxes, gt_boxes) > paired_iou(reference_boxes, gt_boxes)


def paired_iou(a, b):
    """IoU of row i of a with row i of b: [P, 4] xyxy each -> [P]; 0 where the union is empty."""
    corner0, corner1 = a[:, :2].maximum(b[:, :2]), a[:, 2:].minimum(b[:, 2:])
    overlap = (corner1 - corner0).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
    return overlap / union.clamp(min=1e-6)
