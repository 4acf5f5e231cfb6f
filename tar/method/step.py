"""One training step of task adaptive regularization, from images to losses.

    images --student's backbone--> features --+--> regions --student's head--> its outputs --+--> detection losses
       |                                      |       |                                      |
       |                           L_backbone +       | (shared)                             +--> L_cls, L_reg
       |                                      |       v                                      |
       +-----teacher's backbone--> features --+-----------teacher's head--> its outputs -----+

    L = L_det + lambda(t) * (a L_backbone + b L_cls + g L_reg)

The caller, train.py, multiplies with the weights a, b, g and lambda(t), which tar.method.decay gives.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.detection import RetinaNet

from tar.method.backbone_level import Adapter, adapted_features, backbone_loss, backbone_normalizer, pyramid_masks
from tar.method.classification_level import classification_loss, region_weights
from tar.method.proposal_sharing import anchor_generator, faster_rcnn_outputs, retinanet_outputs
from tar.method.regression_level import regression_gate, regression_loss


@dataclass
class DistillationSettings:
    """What is distilled and how, by the names of train.py's flags; a weight of 0 switches its level off."""

    weight_backbone: float = 6.4  # a
    weight_cls: float = 1.0  # b
    weight_reg: float = 0.1  # g
    mask: str = "gaussian"
    sigma2: float = 2.0
    backbone_norm: str = "energy"
    cls_gate: str = "none"
    soft_labels: str = "positive"
    reg_gate: str = "proposal"
    proposals: str = "student"
    no_sharing: bool = False

    def weights(self):
        """The levels that are on: {name of the loss: weight}."""
        weights = {level: getattr(self, f"weight_{level}") for level in ("backbone", "cls", "reg")}
        return {f"distill_{level}": weight for level, weight in weights.items() if weight > 0}


class DistillationStep(nn.Module):
    """The student, and the adapters that lead its features to the teacher's: all that is trained.

    Its forward is one training step's losses; DDP wraps it. The teacher is an argument, not a member: it is not
    among the parameters, not in the state dict, and train() and DDP never touch it.

    Args:
        student: a detector of tar.detectors.
        settings: what to distil; None for a plain student, which needs no adapters.
        teacher_channels: width of the teacher's pyramid.
    """

    def __init__(self, student, settings=None, teacher_channels=256):
        super().__init__()
        self.student = student
        self.settings = settings
        self.adapters = nn.ModuleList()
        if settings is not None and settings.weight_backbone > 0:
            self.adapters.extend(Adapter(student.backbone.out_channels, teacher_channels) for _ in student.strides)

    def forward(self, images, targets, teacher=None):
        """The losses of a batch.

        Args:
            images: list of B float [3, H, W] in 0..1.
            targets: list of B dicts: boxes float [N, 4] xyxy in pixels of the image, labels int64 [N] from 1.
            teacher: a detector in evaluation mode; None leaves the distillation out.

        Returns:
            detection: {name: scalar}, the detector's ordinary losses, untouched.
            distillation: {name: scalar}, L_backbone, L_cls and L_reg, those that are on, not yet weighted.
            seen: {name: scalar without gradient}: positives of this process; gate_open, the part of all processes'
                positives whose regression gate is open.
        """
        student, settings = self.student, self.settings
        images, targets = student.transform(images, targets)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        features = student.backbone(pixels)
        teacher_features = None
        if teacher is not None:
            with torch.no_grad():
                teacher_features = teacher.backbone(teacher_pixels(student, teacher, pixels, images.image_sizes))

        outputs = retinanet_outputs if isinstance(student, RetinaNet) else faster_rcnn_outputs
        with_heads = teacher is not None and (settings.weight_cls > 0 or settings.weight_reg > 0)
        distilled_heads = (teacher, teacher_features, settings) if with_heads else ()
        detection, shared = outputs(student, features, images, targets, *distilled_heads)
        if teacher is None:
            return detection, {}, {}

        distillation, seen = {}, {}
        if settings.weight_backbone > 0:
            maps, teacher_maps = list(features.values()), list(teacher_features.values())
            masks = self.masks(images, targets, teacher_maps)
            sparse = pixels.device.type == "cpu" and settings.mask != "full"
            compared = adapted_features(self.adapters, maps, teacher_maps, masks, sparse)
            normalizer = total_per_process(backbone_normalizer(*compared[1:], settings.backbone_norm))  # Z
            distillation["distill_backbone"] = backbone_loss(*compared, normalizer)
        if with_heads:
            head_losses, seen = self.head_losses(shared)
            distillation |= head_losses
        return detection, distillation, seen

    def masks(self, images, targets, maps):
        """The masks of a transformed batch: L float [B, H_l, W_l], as large as the maps [B, C, H_l, W_l]."""
        settings = self.settings
        anchors = anchor_generator(self.student)(images, maps) if settings.mask == "fine-grained" else None
        return pyramid_masks(targets, maps, self.student.strides, settings.mask, settings.sigma2, anchors)

    def head_losses(self, shared):
        """L_cls and L_reg of SharedRegions: distillation and seen, as forward()."""
        settings, distillation, seen = self.settings, {}, {}
        positive = shared if settings.soft_labels == "positive" else shared.positive()
        positives = total_per_process(len(positive.label), device=shared.label.device, least=1.0)  # K
        if settings.weight_cls > 0:
            logits = shared.logits, shared.teacher_logits
            weights = region_weights(*logits, shared.label, settings.cls_gate, settings.soft_labels, shared.sigmoid)
            count = positives
            if settings.soft_labels == "all":
                count = total_per_process(len(shared.label), device=shared.label.device, least=1.0)
            distillation["distill_cls"] = classification_loss(*logits, count, weights, shared.sigmoid)
        if settings.weight_reg > 0:
            deltas = positive.deltas, positive.teacher_deltas
            where = positive.region, positive.teacher_region, positive.gt_box
            gate = regression_gate(settings.reg_gate, shared.box_coder, *deltas, *where)
            distillation["distill_reg"] = regression_loss(*deltas, gate, positives)
            seen["gate_open"] = total_per_process(gate.sum()) / positives
        seen["positives"] = shared.region.new_full((), len(positive.label))
        return distillation, seen


def teacher_pixels(student, teacher, pixels, image_sizes):
    """The student's pixels [B, 3, H, W] with the teacher's mean and standard deviation, padded by 0 as they are."""
    own, wanted = ((t.image_mean, t.image_std) for t in (student.transform, teacher.transform))
    if own == wanted:
        return pixels
    (mean, std), (its_mean, its_std) = (pixels.new_tensor(each).view(2, 3, 1, 1) for each in (own, wanted))
    renormalised = torch.zeros_like(pixels)
    for new, old, (height, width) in zip(renormalised, pixels, image_sizes, strict=True):
        new[:, :height, :width] = (old[:, :height, :width] * std + mean - its_mean) / its_std
    return renormalised


def total_per_process(count, least=0.0, device=None):
    """A count or a sum over all N processes, at least `least`, divided by N: a scalar tensor without gradient.

    DDP averages the gradients of the processes: a process's sum over (total / N) gives the gradient of one process with
    the whole batch. count: a scalar tensor, or a number, which is put on the device.
    """
    if isinstance(count, torch.Tensor):
        total = count.detach().clone() if count.is_floating_point() else count.float()
    else:  # full() is a kernel of a GPU; as_tensor() would copy, and the host wait
        total = torch.full((), float(count), device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.clamp(min=least) / (dist.get_world_size() if dist.is_initialized() else 1)
