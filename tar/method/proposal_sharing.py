"""Region proposal sharing: the regions at which both models' heads run, and what the heads give there.

Faster R-CNN: the regions that the student's own box head trains on in this step. The teacher's box head runs on the
positive ones among them; the others have no distillation term. The teacher's RPN runs for `--proposals` and
`--no-sharing` only. RetinaNet: the anchors, the same for both models.
"""

from dataclasses import dataclass

import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou

PROPOSALS = ("student", "teacher", "both")


@dataclass
class SharedRegions:
    """What both models give at R regions, row by row; boxes are xyxy in pixels of the resized image."""

    label: torch.Tensor  # int64 [R], the true class, 0 for background
    region: torch.Tensor  # [R, 4], where the student's head ran
    teacher_region: torch.Tensor  # [R, 4], where the teacher's ran: the same but for --no-sharing
    gt_box: torch.Tensor  # [R, 4], the matched ground-truth box
    logits: torch.Tensor  # [R, classes + 1], the student's
    deltas: torch.Tensor  # [R, 4], the student's box deltas for the true class
    teacher_logits: torch.Tensor
    teacher_deltas: torch.Tensor
    box_coder: object  # torchvision's BoxCoder, from deltas to boxes
    sigmoid: bool  # a logit is one class's own yes or no (RetinaNet), or one of a softmax (Faster R-CNN)

    def positive(self):
        """The rows of positive regions only: another SharedRegions."""
        [kept] = nonzero_rows([self.label])
        rows = {name: value[kept] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return SharedRegions(**rows, box_coder=self.box_coder, sigmoid=self.sigmoid)


def faster_rcnn_outputs(student, features, images, targets, teacher=None, teacher_features=None, settings=None):
    """Faster R-CNN's ordinary losses, and what both models give at the sampled regions.

    Args:
        student: in training mode.
        features, teacher_features: each model's own pyramid, OrderedDict of [B, C, H_l, W_l].
        images: ImageList after the student's transform; targets: resized with them.
        teacher: None where only the ordinary losses are wanted.
        settings: DistillationSettings of tar.method.step.

    Returns:
        {name: scalar}; SharedRegions, or None without a teacher.
    """
    heads, sizes = student.roi_heads, images.image_sizes
    proposals, losses = student.rpn(images, features, targets)
    regions, matched, labels, delta_targets = heads.select_training_samples(proposals, targets)
    logits, deltas = box_head(student, features, regions, sizes)
    losses["loss_classifier"], losses["loss_box_reg"] = fastrcnn_loss(logits, deltas, labels, delta_targets)
    if teacher is None:
        return losses, None

    sets = []  # student's regions, teacher's, labels, ground-truth boxes: lists of B; the student's outputs if known
    if not settings.no_sharing and settings.proposals in ("student", "both"):
        sets.append((regions, regions, labels, matched_boxes(targets, matched), (logits, deltas)))
    if settings.no_sharing or settings.proposals in ("teacher", "both"):
        with torch.no_grad():
            teacher_proposals, _ = teacher.rpn(images, teacher_features)
        if settings.no_sharing:
            sets.append((*nearest_proposals(proposals, teacher_proposals, targets), None))
        else:
            regions, matched, labels, _ = heads.select_training_samples(teacher_proposals, targets)
            sets.append((regions, regions, labels, matched_boxes(targets, matched), None))
    rows = []
    for *of_images, outputs in sets:
        if settings.soft_labels == "positive":
            positive = nonzero_rows(of_images[2])
            if outputs is not None:
                sampled = [len(labels) for labels in of_images[2]]
                outputs = (torch.cat(selected(output.split(sampled), positive)) for output in outputs)
            of_images = [selected(each, positive) for each in of_images]
        mine, theirs, labels, gt_boxes = of_images
        logits, deltas = outputs or box_head(student, features, mine, sizes)
        with torch.no_grad():
            teacher_logits, teacher_deltas = box_head(teacher, teacher_features, theirs, sizes)
        label, *where = map(torch.cat, (labels, mine, theirs, gt_boxes))
        both = logits, of_class(deltas, label), teacher_logits, of_class(teacher_deltas, label)
        rows.append((label, *where, *both))
    return losses, SharedRegions(*map(torch.cat, zip(*rows, strict=True)), heads.box_coder, sigmoid=False)


def retinanet_outputs(student, features, images, targets, teacher=None, teacher_features=None, settings=None):
    """RetinaNet's ordinary losses, and what both models give at the anchors; as faster_rcnn_outputs()."""
    levels = list(features.values())
    outputs, anchors = student.head(levels), student.anchor_generator(images, levels)
    matched = []  # each anchor's ground-truth box by index; -1 background, -2 neither (between the thresholds)
    for target, grid in zip(targets, anchors, strict=True):
        if len(target["boxes"]):
            matched.append(student.proposal_matcher(box_iou(target["boxes"], grid)))
        else:
            matched.append(torch.full((len(grid),), -1, device=grid.device))
    losses = student.head.compute_loss(targets, outputs, anchors, matched)
    if teacher is None:
        return losses, None

    both = [outputs["cls_logits"], outputs["bbox_regression"]] * 2
    levels = list(teacher_features.values())
    with torch.no_grad():  # where a level is off, the student's own outputs stand in: no loss reads them
        if settings.weight_cls > 0:
            both[2] = teacher.head.classification_head(levels).float()
        if settings.weight_reg > 0:
            both[3] = teacher.head.regression_head(levels).float()
    rows, least = [], 0 if settings.soft_labels == "positive" else -1
    for i, (target, kept) in enumerate(zip(targets, nonzero_rows([m >= least for m in matched]), strict=True)):
        index = matched[i][kept]
        label = torch.cat([target["labels"], target["labels"].new_zeros(1)])[index]  # -1 is the last: background
        region, gt_box = anchors[i][kept], matched_boxes([target], [index.clamp(min=0)])[0]
        rows.append((label, region, region, gt_box, *(output[i][kept] for output in both)))
    return losses, SharedRegions(*map(torch.cat, zip(*rows, strict=True)), student.box_coder, sigmoid=True)


def box_head(model, features, regions, image_sizes):
    """A Faster R-CNN's box head at given regions, in the model's own features {name: [B, C, H_l, W_l]}.

    regions: list of B float [R, 4] xyxy in pixels of the resized image; image_sizes: list of B (height, width).
    Returns class logits [B * R, classes + 1]; box deltas [B * R, 4 * (classes + 1)].
    """
    heads = model.roi_heads
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, image_sizes)))


def nearest_proposals(proposals, teacher_proposals, targets, least=0.5):
    """`--no-sharing`: of each model's own proposals the one that overlaps a ground-truth box best.

    Args:
        proposals, teacher_proposals: lists of B float [R, 4] xyxy, before the ground truth is mixed in.
        targets: list of B dicts with boxes [N, 4] and labels [N].
        least: IoU; a box that the student's best proposal overlaps less is left out.

    Returns:
        lists of B: the student's regions [M, 4], the teacher's [M, 4], labels [M], ground-truth boxes [M, 4].
    """
    rows = []
    for mine, theirs, target in zip(proposals, teacher_proposals, targets, strict=True):
        gt_boxes, labels = target["boxes"], target["labels"]
        if not (len(gt_boxes) and len(mine) and len(theirs)):
            rows.append((gt_boxes[:0], gt_boxes[:0], labels[:0], gt_boxes[:0]))
            continue
        overlap, best = box_iou(gt_boxes, mine).max(1)
        near = overlap >= least
        nearest = theirs[box_iou(gt_boxes, theirs).argmax(1)]
        rows.append((mine[best][near], nearest[near], labels[near], gt_boxes[near]))
    return tuple(map(list, zip(*rows, strict=True)))


def anchor_generator(model):
    """A detector's own anchor generator."""
    return model.anchor_generator if isinstance(model, RetinaNet) else model.rpn.anchor_generator


def nonzero_rows(each):
    """Where tensors [R] of B images are not 0: B int64 [n]; the host waits for a GPU once, for all of their sizes."""
    counts = torch.stack([x.count_nonzero() for x in each]).tolist()
    return [torch.nonzero_static(x, size=count)[:, 0] for x, count in zip(each, counts, strict=True)]


def selected(each, index):
    """Rows of each tensor of a list, by its own int64 index."""
    return [x[i] for x, i in zip(each, index, strict=True)]


def of_class(deltas, label):
    """Each region's four deltas of its own class: [R, 4 * (classes + 1)], int64 [R] -> [R, 4]."""
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label]


def matched_boxes(targets, matched):
    """The ground-truth box of each region, image by image; zeros in an image without boxes (no region is positive)."""
    boxes = [target["boxes"] for target in targets]
    return [b[m] if len(b) else b.new_zeros(len(m), 4) for b, m in zip(boxes, matched, strict=True)]
