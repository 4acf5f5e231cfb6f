"""One training step of task adaptive regularization, from images to losses (README, the paper in one page).

    images --student--> features --> regions --student's head--> its answers
       |                   |            |
       +-----teacher--> features -------+--------teacher's head--> its answers

Both answer for the same regions, so they can be compared: Faster R-CNN for those that the student's box head trains on
(the teacher for the positive ones among them, for the others have no term), RetinaNet for the anchors. The teacher runs
its backbone and its head and nothing else: no RPN (unless its own proposals are asked for), no suppression, no
post-processing, no gradient.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou

from tar.adapters import Adapter, compared
from tar.losses import (
    backbone_loss,
    backbone_normalizer,
    better_gate,
    classification_loss,
    decode,
    regression_gate,
    regression_loss,
)
from tar.masks import pyramid_masks
from tar.regions import (
    anchor_generator,
    box_head,
    boxes_of,
    nearest_proposals,
    of_class,
    over_processes,
    region_proposals,
    share_of_batch,
)

PROPOSALS = ("student", "teacher", "both")
SOFT_LABELS = ("positive", "all")
ANSWERS = ("teacher", "truth", "smoothed")


@dataclass
class Levels:
    """What is distilled and how; a weight of 0 switches a level off. Defaults: README, table of choices."""

    backbone: float = 6.4
    cls: float = 1.0
    reg: float = 0.1
    mask: str = "gaussian"
    sigma2: float = 2.0
    backbone_norm: str = "energy"
    cls_gate: str = "none"
    reg_gate: str = "proposal"
    proposals: str = "student"
    sharing: bool = True
    soft_labels: str = "positive"
    background_weight: float = 1.5
    answers: str = "teacher"

    def weights(self):
        """The levels that are on: {name: weight}."""
        weights = {"distill_backbone": self.backbone, "distill_cls": self.cls, "distill_reg": self.reg}
        return {name: weight for name, weight in weights.items() if weight > 0}


class Step(nn.Module):
    """The student, and the adapters that lead its features to the teacher's: all that is trained.

    Its forward is one training step's losses; DDP wraps it. The teacher is an argument, not a member: it is not
    among the parameters, not in the state dict, and train() and DDP never touch it.

    Args:
        student: a detector of tar.models.
        levels: what to distil; None for a plain student, which needs no adapters.
        teacher_channels: width of the teacher's pyramid.
    """

    def __init__(self, student, levels=None, teacher_channels=256):
        super().__init__()
        self.student = student
        self.levels = levels
        self.adapters = nn.ModuleList()
        if levels is not None and levels.backbone > 0:
            for _ in student.strides:
                self.adapters.append(Adapter(student.backbone.out_channels, teacher_channels))

    def forward(self, images, targets, teacher=None):
        """The losses of a batch.

        Args:
            images: list of B float [3, H, W] in 0..1.
            targets: list of B dicts: boxes float [N, 4] xyxy in pixels of the image, labels int64 [N] from 1.
            teacher: a detector in evaluation mode; None leaves the distillation out.

        Returns:
            detection: {name: scalar}, the detector's ordinary losses, untouched.
            distillation: {name: scalar}, L_backbone, L_cls and L_reg, those that are on, not yet weighted.
            seen: {name: scalar without gradient}: positives of this process; gate_open, the share of all processes'
                positives that the gate lets through.
        """
        student, levels = self.student, self.levels
        images, targets = student.transform(images, targets)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        features = student.backbone(pixels)
        with torch.no_grad():
            teacher_features = teacher.backbone(pixels) if teacher is not None else None
        asks_heads = teacher is not None and (levels.cls > 0 or levels.reg > 0)
        share = retinanet if isinstance(student, RetinaNet) else faster_rcnn
        pair = (teacher, teacher_features, levels) if asks_heads else None
        detection, shared = share(student, features, images, targets, pair)
        if teacher is None:
            return detection, {}, {}

        pairs = None
        if levels.backbone > 0:
            mine, wanted = list(features.values()), list(teacher_features.values())
            sparse = pixels.device.type == "cpu" and levels.mask != "full"
            pairs = compared(self.adapters, mine, wanted, self.masks(images, targets, wanted), sparse)
        return detection, *self.terms(pairs, shared)

    def masks(self, images, targets, maps):
        """Where the backbone level imitates: a list of L float [B, H_l, W_l].

        Args:
            images, targets: after the student's transform.
            maps: list of L tensors [B, C, H_l, W_l], for their sizes.
        """
        levels = self.levels
        anchors = anchor_generator(self.student)(images, maps) if levels.mask == "fine-grained" else None
        return pyramid_masks(targets, maps, self.student.strides, levels.mask, levels.sigma2, anchors)

    def terms(self, pairs, shared):
        """The three losses, from what both models have answered.

        Args:
            pairs: the student's features after the adapters, the teacher's, and the masks, as compared() gives them;
                None where the backbone level is off.
            shared: Shared, or None where both other levels are off.

        Returns:
            distillation, seen: as forward().
        """
        levels, distillation, seen = self.levels, {}, {}
        if pairs is not None:
            adapted, wanted, where = pairs
            normalizer = over_processes(backbone_normalizer(wanted, where, levels.backbone_norm))
            distillation["distill_backbone"] = backbone_loss(adapted, wanted, where, normalizer)
        if shared is not None:
            if levels.answers != "teacher":
                shared = shared.by_the_truth() if levels.answers == "truth" else shared.smoothed()
            positive = shared.label > 0
            count = over_processes(positive.sum(), least=1.0)  # K
            soft = shared.logits, shared.teacher_logits
            if levels.cls > 0:
                keep = better_gate(*soft, shared.label, shared.sigmoid) if levels.cls_gate == "better" else None
                if levels.soft_labels == "all":
                    each = torch.where(positive, 1.0, levels.background_weight)
                    keep = each if keep is None else keep * each
                regions = count if levels.soft_labels == "positive" else over_processes(torch.ones_like(positive).sum())
                distillation["distill_cls"] = classification_loss(*soft, regions, keep, shared.sigmoid)
            if levels.reg > 0:
                mine, taught = shared.deltas[positive], shared.teacher_deltas[positive]
                places = shared.region[positive], shared.teacher_region[positive], shared.truth[positive]
                gate = open_gate(levels.reg_gate, shared.box_coder, mine, taught, *places)
                distillation["distill_reg"] = regression_loss(mine, taught, gate, count)
                seen["gate_open"] = over_processes(gate.sum()) / count
            seen["positives"] = positive.sum().float()
        return distillation, seen


@dataclass
class Shared:
    """What both models say of the same regions, row by row.

    label int64 [P], the true class, 0 for background; region and teacher_region [P, 4] xyxy, where each was asked
    (the same but for --no-sharing); truth [P, 4], the matched ground-truth boxes; logits [P, classes + 1] and deltas
    [P, 4] of the true class from the student, teacher_logits and teacher_deltas from the teacher.
    """

    label: torch.Tensor
    region: torch.Tensor
    teacher_region: torch.Tensor
    truth: torch.Tensor
    logits: torch.Tensor
    deltas: torch.Tensor
    teacher_logits: torch.Tensor
    teacher_deltas: torch.Tensor
    box_coder: object
    sigmoid: bool  # whether a logit is a class's own yes or no (RetinaNet), or one of a softmax (Faster R-CNN)

    def by_the_truth(self):
        """The same with the ground truth in the place of the teacher's answers: its class, certainly, and its box."""
        certain = 200.0 * F.one_hot(self.label, self.logits.shape[1]) - 100.0  # 1 or 0 by softmax and by sigmoid
        deltas = self.box_coder.encode_single(self.truth, self.region)
        return replace(self, teacher_logits=certain, teacher_deltas=deltas)

    def smoothed(self):
        """The same with smoothed hard labels in the place of the teacher's soft ones, as sure of the truth as it is.

        The true class has the teacher's mean probability of it over all positive regions of the batch, each other class
        the mean of the others: as unsure of the truth on average, and the same for every region of a class.
        """
        given = self.teacher_logits.float()
        given = given.sigmoid() if self.sigmoid else given.softmax(1)
        true = F.one_hot(self.label, given.shape[1]).bool()
        other = ~true
        if self.sigmoid:
            other[:, 0] = False  # RetinaNet has no background class
        of_true, of_other = (
            over_processes((given * kind).sum()) / over_processes(kind.sum(), least=1.0) for kind in (true, other)
        )
        mean = torch.where(true, of_true, of_other)
        return replace(self, teacher_logits=mean.logit() if self.sigmoid else mean.log())


def faster_rcnn(student, features, images, targets, pair=None):
    """Faster R-CNN's ordinary losses, and what both models say of the sampled regions.

    Args:
        features: the student's pyramid; images: ImageList after the transform; targets: resized with them.
        pair: (teacher, its features, levels); None where only the ordinary losses are wanted.

    Returns:
        {name: scalar}; Shared, or None without a pair.
    """
    heads, sizes = student.roi_heads, images.image_sizes
    proposals, detection = region_proposals(student.rpn, images, features, targets)
    regions, matched_idxs, labels, deltas = heads.select_training_samples(proposals, targets)
    logits, boxes = box_head(student, features, regions, sizes)
    share = share_of_batch(logits.new_tensor(float(len(logits))))
    losses = fastrcnn_loss(logits, boxes, labels, deltas)
    detection["loss_classifier"], detection["loss_box_reg"] = (loss * share for loss in losses)
    if pair is None:
        return detection, None

    teacher, teacher_features, levels = pair
    sets = []  # the student's and the teacher's regions, their labels and truth, a list of B each; answers known yet
    if levels.sharing and levels.proposals in ("student", "both"):
        truth = [boxes_of(t, m) for t, m in zip(targets, matched_idxs, strict=True)]
        sets.append((regions, regions, labels, truth, (logits, boxes)))
    if not levels.sharing or levels.proposals in ("teacher", "both"):
        with torch.no_grad():
            taught, _ = teacher.rpn(images, teacher_features)
        if levels.sharing:
            regions, matched_idxs, labels, _ = heads.select_training_samples(taught, targets)
            truth = [boxes_of(t, m) for t, m in zip(targets, matched_idxs, strict=True)]
            sets.append((regions, regions, labels, truth, None))
        else:
            sets.append((*nearest_proposals(proposals, taught, targets), None))
    rows = []
    for mine, theirs, labels, truth, answers in sets:
        # Soft labels are for the positive regions, unless all are wanted: nothing is asked for the others.
        asked = [y > 0 if levels.soft_labels == "positive" else y >= 0 for y in labels]
        mine, theirs = ([r[a] for r, a in zip(model, asked, strict=True)] for model in (mine, theirs))
        kept = torch.cat(asked)
        label = torch.cat(labels)[kept]
        if answers is None:
            logits, boxes = box_head(student, features, mine, sizes)
        else:
            logits, boxes = (a[kept] for a in answers)
        with torch.no_grad():
            teacher_logits, teacher_boxes = box_head(teacher, teacher_features, theirs, sizes)
        places = torch.cat(mine), torch.cat(theirs), torch.cat(truth)[kept]
        rows.append((label, *places, logits, of_class(boxes, label), teacher_logits, of_class(teacher_boxes, label)))
    return detection, Shared(*map(torch.cat, zip(*rows, strict=True)), heads.box_coder, sigmoid=False)


def retinanet(student, features, images, targets, pair=None):
    """RetinaNet's ordinary losses, and what both models say of the anchors; as faster_rcnn()."""
    levels_of_pyramid = list(features.values())
    answers, anchors = student.head(levels_of_pyramid), student.anchor_generator(images, levels_of_pyramid)
    matched_idxs = []
    for target, grid in zip(targets, anchors, strict=True):
        if len(target["boxes"]):
            matched_idxs.append(student.proposal_matcher(box_iou(target["boxes"], grid)))
        else:
            matched_idxs.append(torch.full((len(grid),), -1, device=grid.device))
    detection = student.head.compute_loss(targets, answers, anchors, matched_idxs)
    if pair is None:
        return detection, None

    teacher, teacher_features, levels = pair
    with torch.no_grad():
        taught = teacher.head(list(teacher_features.values()))
    rows = []
    for i, (target, matched) in enumerate(zip(targets, matched_idxs, strict=True)):
        # -1 is background, -2 neither: too near to a box for the one, not near enough for the other
        asked = matched >= 0 if levels.soft_labels == "positive" else matched >= -1
        matched = matched[asked]
        label = torch.zeros_like(matched)
        label[matched >= 0] = target["labels"][matched[matched >= 0]]
        region, truth = anchors[i][asked], boxes_of(target, matched.clamp(min=0))
        both = [a[key][i][asked] for a in (answers, taught) for key in ("cls_logits", "bbox_regression")]
        rows.append((label, region, region, truth, *both))
    return detection, Shared(*map(torch.cat, zip(*rows, strict=True)), student.box_coder, sigmoid=True)


@torch.no_grad()
def open_gate(kind, box_coder, mine, taught, region, teacher_region, truth):
    """The regression gate v: bool [P].

    Args:
        kind: "proposal" (the teacher's box must beat the region itself), "student" (the student's own box) or
            "none" (always open).
        box_coder: torchvision's, from deltas to boxes.
        mine, taught: deltas [P, 4] of student and teacher for the true class.
        region, teacher_region, truth: [P, 4] xyxy, the regions of each and their matched ground truth.
    """
    if kind == "none":
        return torch.ones(len(region), dtype=torch.bool, device=region.device)
    reference = region if kind == "proposal" else decode(box_coder, mine, region)
    return regression_gate(decode(box_coder, taught, teacher_region), reference, truth)
