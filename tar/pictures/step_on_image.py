"""One distillation step on one image, without learning: what the pictures of the method show."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torchvision.models.detection import RetinaNet
from torchvision.transforms.v2 import functional as v2

from tar.data.loader import to_device
from tar.method.proposal_sharing import faster_rcnn_outputs, retinanet_outputs
from tar.method.regression_level import regression_gate
from tar.method.step import teacher_pixels


@torch.inference_mode()
def step_on_image(step, teacher, image, target):
    """What teacher and student compute on one image, on the CPU; boxes are xyxy in pixels of the resized image.

    step: a DistillationStep in evaluation mode. image: uint8 [3, H, W].
    target: boxes float [N, 4] xyxy in pixels of the image, labels int64 [N] from 1.
    """
    student, settings = step.student, step.settings
    images, targets = student.transform(*to_device([image], [target], "cpu"))
    features = student.backbone(images.tensors)
    teacher_features = teacher.backbone(teacher_pixels(student, teacher, images.tensors, images.image_sizes))
    teacher_maps = list(teacher_features.values())
    levels = zip(step.adapters, features.values(), teacher_maps, strict=False)  # there may be no adapters
    outputs = retinanet_outputs if isinstance(student, RetinaNet) else faster_rcnn_outputs
    both_heads = replace(settings, weight_cls=1.0, weight_reg=1.0)
    torch.manual_seed(0)  # regions are sampled: the same in every picture
    _, shared = outputs(student, features, images, targets, teacher, teacher_features, both_heads)
    positive, coder = shared.positive(), shared.box_coder
    where = positive.region, positive.teacher_region, positive.gt_box
    student_boxes = coder.decode_single(positive.deltas, positive.region)
    return SimpleNamespace(
        image=v2.resize(image, images.image_sizes[0]),  # uint8 [3, H, W], resized
        target=targets[0],  # boxes [N, 4], labels [N] from 1
        strides=student.strides,  # of the L pyramid levels
        masks=[mask[0] for mask in step.masks(images, targets, teacher_maps)],  # L float [H_l, W_l]
        errors=[(adapt(s) - t).abs().mean(1)[0] for adapt, s, t in levels],  # L float [H_l, W_l], means over channels
        positive=positive,  # SharedRegions, P rows
        teacher_boxes=coder.decode_single(positive.teacher_deltas, positive.teacher_region),  # [P, 4]
        gate=regression_gate(settings.reg_gate, coder, positive.deltas, positive.teacher_deltas, *where),  # bool [P]
        to_beat=student_boxes if settings.reg_gate == "student" else positive.region,  # [P, 4], by the teacher's box
    )
