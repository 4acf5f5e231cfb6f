"""One distillation step on one image, without learning: what the pictures of the method show."""

from dataclasses import dataclass, replace

import torch
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou

from tar.data.loader import to_device
from tar.method.proposal_sharing import faster_rcnn_outputs, retinanet_outputs
from tar.method.regression_level import paired_iou, regression_gate


@dataclass
class StepOnImage:
    """L pyramid levels, R shared regions, P positive ones. Boxes are xyxy in pixels of the image; all on the CPU."""

    image: torch.Tensor  # uint8 [3, H, W]
    target: dict  # boxes [N, 4], labels [N] from 1
    levels: list  # L (name, (width, height) of a cell in pixels of the image, mask, feature error), both [H_l, W_l]
    regions: torch.Tensor  # [R, 4]
    label: torch.Tensor  # int64 [R], the true class, 0 for background
    region_iou: torch.Tensor  # [P], IoU of region and ground truth
    teacher_boxes: torch.Tensor  # [P, 4], decoded from the regions
    teacher_iou: torch.Tensor  # [P], IoU of the teacher's box and ground truth
    gate: torch.Tensor  # bool [P], the regression gate
    reg_gate: str  # what the teacher's box must beat
    object: torch.Tensor  # int64 [P], index of the ground-truth box
    teacher_probabilities: torch.Tensor  # [P, classes], without the background
    student_probabilities: torch.Tensor


@torch.inference_mode()
def step_on_image(step, teacher, image, target, device):
    """Runs teacher and student on one image, with the student's proposals.

    Args:
        step: a DistillationStep; without adapters the feature errors are 0.
        image: uint8 [3, H, W]; target: boxes float [N, 4] xyxy in its pixels, labels int64 [N] from 1.
    """
    student, settings = step.student, step.settings
    images, targets = student.transform(*to_device([image], [target], device))
    pixels = images.tensors.contiguous(memory_format=torch.channels_last)
    features, teacher_features = student.backbone(pixels), teacher.backbone(pixels)
    teacher_maps = list(teacher_features.values())
    masks = step.masks(images, targets, teacher_maps)
    errors = [torch.zeros_like(mask) for mask in masks]
    if len(step.adapters):
        adapted = [adapter(f) for adapter, f in zip(step.adapters, features.values(), strict=True)]
        # the mean over the channels of |adapter(F_S) - F_T|
        errors = [(a.float() - t.float()).abs().mean(1) for a, t in zip(adapted, teacher_maps, strict=True)]
    height, width = images.image_sizes[0]
    to_image = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
    levels = []
    for stride, mask, error in zip(student.strides, masks, errors, strict=True):
        inside = 0, slice(-(-height // stride)), slice(-(-width // stride))  # without the padding
        cell = float(stride * to_image[0]), float(stride * to_image[1])
        levels.append((f"P{stride.bit_length() - 1}", cell, mask[inside].float().cpu(), error[inside].cpu()))
    outputs = retinanet_outputs if isinstance(student, RetinaNet) else faster_rcnn_outputs
    all_regions = replace(settings, soft_labels="all", proposals="student", no_sharing=False)
    _, shared = outputs(student, features, images, targets, teacher, teacher_features, all_regions)
    positive, box_coder = shared.positive(), shared.box_coder
    teacher_boxes = box_coder.decode_single(positive.teacher_deltas, positive.region)
    where = positive.region, positive.teacher_region, positive.gt_box
    gate = regression_gate(settings.reg_gate, box_coder, positive.deltas, positive.teacher_deltas, *where)
    number = box_iou(positive.gt_box, targets[0]["boxes"]).argmax(1) if len(gate) else positive.label
    logits = positive.teacher_logits.float(), positive.logits.float()
    probabilities = [(x.sigmoid() if positive.sigmoid else x.softmax(1))[:, 1:].cpu() for x in logits]
    return StepOnImage(
        image=image,
        target=target,
        levels=levels,
        regions=shared.region.cpu() * to_image,
        label=shared.label.cpu(),
        region_iou=paired_iou(positive.region, positive.gt_box).cpu(),
        teacher_boxes=teacher_boxes.cpu() * to_image,
        teacher_iou=paired_iou(teacher_boxes, positive.gt_box).cpu(),
        gate=gate.cpu(),
        reg_gate=settings.reg_gate,
        object=number.cpu(),
        teacher_probabilities=probabilities[0],
        student_probabilities=probabilities[1],
    )
