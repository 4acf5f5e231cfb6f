"""The models of a picture: a student, its teacher, and a plain student beside them."""

import os
from dataclasses import replace

from tar import UserError
from tar.detectors.coco_teacher import build_coco_teacher
from tar.method.step import DistillationStep
from tar.pictures.detections import detect_one
from tar.pictures.images_to_show import flags_of
from tar.pictures.method_panels import method_rows
from tar.pictures.step_on_image import step_on_image
from tar.pictures.tiles import WIDE, sheet, with_objects
from tar.training import checkpoint
from tar.training.flags import distillation_settings


class ModelsToShow:
    """A student, its adapters, its teacher or None, and perhaps a plain student to compare it with, on the CPU.

    Args: checkpoints; the teacher's by default that of the student's settings.
    Raises UserError: a file that is not there, or models that do not belong together.
    """

    def __init__(self, weights, teacher_weights=None, plain_weights=None):
        student, saved = checkpoint.load_detector(weights)
        self.classes, settings = saved["classes"], flags_of(saved["settings"])
        self.models = {"plain student": read_other(plain_weights, weights, saved)} if plain_weights else {}
        self.models["TAR student" if settings.teacher else "student"] = student
        teacher_weights, self.teacher = teacher_weights or settings.teacher_weights, None
        if teacher_weights == "coco":
            self.teacher = build_coco_teacher(settings.detector, self.classes, *settings.size)[0]
        elif teacher_weights and not os.path.isfile(teacher_weights):
            raise UserError(f"{teacher_weights}: the teacher of {weights} is not there; give --teacher-weights FILE")
        elif teacher_weights:
            self.teacher = read_other(teacher_weights, weights, saved)
        distillation, adapters, width = distillation_settings(settings), {}, None
        if self.teacher:
            self.models["teacher"] = self.teacher
            adapters, width = saved["adapters"], self.teacher.backbone.out_channels
        if not adapters:
            distillation = replace(distillation, weight_backbone=0.0)
        self.step = DistillationStep(student, distillation, width).eval()
        try:
            self.step.adapters.load_state_dict(adapters)
        except RuntimeError:
            raise UserError(f"{weights}: its adapters do not lead to this teacher's features") from None

    def panel(self, image, target, threshold, title, level=None):
        """A picture of PIL of an image uint8 [3, H, W]: the method, with a teacher, and the detections of all models.

        target: boxes and labels. threshold: least score of a detection. level: "backbone", "cls" or "reg" only.
        """
        rows = []
        if self.teacher:
            rows = method_rows(step_on_image(self.step, self.teacher, image, target), self.classes, level)
        if level is None or not rows:
            row = [("ground truth", with_objects(image, target["boxes"], target["labels"], self.classes, side=WIDE))]
            for name, model in self.models.items():
                boxes, labels, scores = detect_one(model, image, threshold)
                picture = with_objects(image, boxes, labels, self.classes, scores, WIDE)
                row.append((f"{name}: {len(boxes)} at {threshold:g} or more", picture))
            rows.append(row)
        return sheet(rows, title)


def read_other(path, weights, saved):
    """The detector of a checkpoint that must have the kind and classes of the student that was saved in weights."""
    model, other = checkpoint.load_detector(path)
    its, students = (f"{s['build']['detector']} of {', '.join(s['classes'])}" for s in (other, saved))
    if its != students:
        raise UserError(f"{path}: a {its}, but {weights} is a {students}")
    return model
