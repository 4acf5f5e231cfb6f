"""One training step of task adaptive regularization, from images to losses (METHOD sections 1 to 4).

    images --student--> features --RPN--> proposals --sampled--> regions --student's box head--> its answers
       |                   |                                        |
       +-----teacher--> features ---------------------------------- + ---teacher's box head--> its answers

Both answer for the same regions, so they can be compared. The teacher runs its backbone and box head and nothing
else: no RPN, no suppression, no post-processing, no gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.detection.roi_heads import fastrcnn_loss

from tar import masks
from tar.losses import backbone_loss, better_gate, classification_loss, decode, regression_gate, regression_loss


@dataclass
class Levels:
    """What is distilled and how; a weight of 0 switches a level off. Defaults: README, table of choices."""

    backbone: float = 0.1
    cls: float = 1.0
    reg: float = 0.1
    mask: str = "gaussian"
    sigma2: float = 2.0
    cls_gate: str = "none"
    reg_gate: str = "proposal"

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
                self.adapters.append(nn.Conv2d(student.backbone.out_channels, teacher_channels, 3, padding=1))

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
        student = self.student
        images, targets = student.transform(images, targets)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        features = student.backbone(pixels)
        proposals, detection = student.rpn(images, features, targets)
        regions, matched_idxs, labels, deltas = student.roi_heads.select_training_samples(proposals, targets)
        logits, boxes = box_head(student, features, regions, images.image_sizes)
        detection["loss_classifier"], detection["loss_box_reg"] = fastrcnn_loss(logits, boxes, labels, deltas)
        if teacher is None:
            return detection, {}, {}

        levels, distillation, seen = self.levels, {}, {}
        with torch.no_grad():
            teacher_features = teacher.backbone(pixels)
        if levels.backbone > 0:
            adapted = [adapt(f).float() for adapt, f in zip(self.adapters, features.values(), strict=True)]
            wanted = list(teacher_features.values())
            where = masks.pyramid_masks(targets, wanted, student.strides, levels.mask, levels.sigma2)
            cells = over_processes(sum(m.sum() for m in where))
            distillation["distill_backbone"] = backbone_loss(adapted, wanted, where, cells)
        if levels.cls > 0 or levels.reg > 0:
            label = torch.cat(labels)
            positive = torch.where(label > 0)[0]
            label = label[positive]
            count = over_processes(torch.tensor(float(len(positive)), device=label.device), least=1.0)
            with torch.no_grad():  # only the positive regions' answers are compared, so only they are asked for
                asked = [r[y > 0] for r, y in zip(regions, labels, strict=True)]
                teacher_logits, teacher_boxes = box_head(teacher, teacher_features, asked, images.image_sizes)
            if levels.cls > 0:
                soft = logits[positive], teacher_logits
                keep = better_gate(*soft, label) if levels.cls_gate == "better" else None
                distillation["distill_cls"] = classification_loss(*soft, count, keep)
            if levels.reg > 0:
                mine, taught = of_class(boxes[positive], label), of_class(teacher_boxes, label)
                region = torch.cat(asked)
                truth = torch.cat([boxes_of(t, m) for t, m in zip(targets, matched_idxs, strict=True)])[positive]
                gate = open_gate(levels.reg_gate, student.roi_heads.box_coder, mine, taught, region, truth)
                distillation["distill_reg"] = regression_loss(mine, taught, gate, count)
                seen["gate_open"] = over_processes(gate.float().sum()) / count
            seen["positives"] = torch.tensor(float(len(positive)), device=label.device)
        return detection, distillation, seen


def box_head(model, features, regions, image_sizes):
    """A detector's answers for given regions.

    Args:
        model: teacher or student.
        features: its own pyramid, OrderedDict of [B, C, H_l, W_l].
        regions: list of B float [R, 4] xyxy in pixels of the resized image.
        image_sizes: list of B (height, width) of the resized images.

    Returns:
        class logits [B * R, classes + 1]; box deltas [B * R, 4 * (classes + 1)].
    """
    heads = model.roi_heads
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, image_sizes)))


def of_class(deltas, label):
    """Each region's four deltas of its own class: [P, 4 * (classes + 1)], int [P] -> [P, 4]."""
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label]


def boxes_of(target, matched_idxs):
    """The ground-truth box that each region is matched to; in an image without boxes zeros (no region is positive)."""
    boxes = target["boxes"]
    return boxes[matched_idxs] if len(boxes) else boxes.new_zeros(len(matched_idxs), 4)


@torch.no_grad()
def open_gate(kind, box_coder, mine, taught, region, truth):
    """The regression gate v: bool [P].

    Args:
        kind: "proposal" (the teacher's box must beat the region itself), "student" (the student's own box) or
            "none" (always open).
        box_coder: torchvision's, from deltas to boxes.
        mine, taught: deltas [P, 4] of student and teacher for the true class.
        region, truth: [P, 4] xyxy, the regions and their matched ground truth.
    """
    if kind == "none":
        return torch.ones(len(region), dtype=torch.bool, device=region.device)
    reference = region if kind == "proposal" else decode(box_coder, mine, region)
    return regression_gate(decode(box_coder, taught, region), reference, truth)


def over_processes(count, least=0.0):
    """A count summed over all processes, at least `least`, divided by their number.

    DDP averages the gradients of N processes; each process's sum over (total / N) therefore gives the gradient of
    one process with the whole batch.
    """
    count = count.detach().clone()
    world = 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    return count.clamp(min=least) / world
