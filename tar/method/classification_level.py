"""Classification level: the teacher's soft labels on positive regions; the detector's own loss keeps the hard ones."""

import torch
import torch.nn.functional as F

CLS_GATES = ("none", "better")
SOFT_LABELS = ("positive", "all")
BACKGROUND_WEIGHT = 1.5  # of a background region among `all`, as in Chen et al. 2017


def classification_loss(student_logits, teacher_logits, count, region_weights=None, sigmoid=False):
    """L_cls: cross-entropy of the teacher's and the student's class probabilities.

        Faster R-CNN:  L_cls = 1/K * sum_i CE(softmax(c_T_i), softmax(c_S_i))
        RetinaNet:     L_cls = 1/K * sum_i sum_k BCE(sigmoid(c_T_ik), sigmoid(c_S_ik))

    Args:
        student_logits, teacher_logits: [R, classes + 1], a row a region; R may be 0. RetinaNet's first column, which
            torchvision keeps for the background and no region is positive for, is left out.
        count: K of total_per_process(): all processes' regions, divided by the number of processes; a scalar tensor.
        region_weights: bool or float [R], what the gate makes of each region; None for 1.
        sigmoid: RetinaNet's form.

    Returns:
        scalar tensor, this process's sum divided by K.
    """
    if sigmoid:
        student_logits, teacher_logits = student_logits[:, 1:], teacher_logits[:, 1:]
        each = F.binary_cross_entropy_with_logits(student_logits, teacher_logits.sigmoid(), reduction="none").sum(1)
    else:
        each = F.cross_entropy(student_logits, teacher_logits.softmax(1), reduction="none")
    return (each if region_weights is None else each * region_weights).sum() / count


def region_weights(student_logits, teacher_logits, labels, cls_gate="none", soft_labels="positive", sigmoid=False):
    """What each region counts in L_cls: None for 1 everywhere (the default), else a float [R].

    labels: int64 [R], the true class, 0 for background. cls_gate "better" keeps the regions to whose true class the
    teacher gives a higher probability; soft_labels "all" gives background regions BACKGROUND_WEIGHT.
    """
    if soft_labels == "all":
        return torch.where(labels > 0, 1.0, BACKGROUND_WEIGHT)
    return better_gate(student_logits, teacher_logits, labels, sigmoid).float() if cls_gate == "better" else None


def better_gate(student_logits, teacher_logits, labels, sigmoid=False):
    """`--cls-gate better`: where the teacher gives the true class a higher probability than the student. bool [R]."""
    student, teacher = (
        (logits.sigmoid() if sigmoid else logits.softmax(1)).gather(1, labels[:, None])[:, 0]
        for logits in (student_logits, teacher_logits)
    )
    return teacher > student
