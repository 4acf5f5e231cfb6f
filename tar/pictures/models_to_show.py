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
        teacher_weights, self.teacher = teacher_weights or settings.teacher_weights, None
        if teacher_weights == "coco":
            self.teacher = build_coco_teacher(settings.detector, self.classes, *settings.size)[0]
        elif teacher_weights and not os.path.isfile(teacher_weights):
            raise UserError(f"{teacher_weights}: the teacher of {weights} is not there; give --teacher-weights FILE")
        elif teacher_weights:
            self.teacher = self._read(teacher_weights, weights, saved)
        self.models = {"plain student": self._read(plain_weights, weights, saved)} if plain_weights else {}
        self.models["TAR student" if settings.teacher else "student"] = student
        if self.teacher:
            self.models["teacher"] = self.teacher

        distillation, adapters = distillation_settings(settings), saved["adapters"] if self.teacher else {}
        if not adapters:
            distillation = replace(distillation, weight_backbone=0.0)
        width = self.teacher.backbone.out_channels if self.teacher else 1
        self.step = DistillationStep(student, distillation, width).eval()
        try:
            self.step.adapters.load_state_dict(adapters)
        except RuntimeError:
            raise UserError(f"{weights}: its adapters do not lead to this teacher's features") from None

    @staticmethod
    def _read(path, weights, saved):
        """The detector of a checkpoint that shall be of the student's kind and classes."""
        model, other = checkpoint.load_detector(path)
        its, students = (f"{s['build']['detector']} of {', '.join(s['classes'])}" for s in (other, saved))
        if its != students:
            raise UserError(f"{path}: a {its}, but {weights} is a {students}")
        return model

    def panel(self, image, target, threshold, title, level=None):
        """A picture of PIL of an image uint8 [3, H, W]: the method, with a teacher, and the detections of all models.

        Args:
            target: boxes and labels.
            threshold: least score of a detection.
            level: "backbone", "cls" or "reg": this level only.
        """
        rows = []
        if self.teacher:
            rows = method_rows(step_on_image(self.step, self.teacher, image, target), self.classes, level)
        if not rows or level is None:
            truth = target["boxes"], target["labels"], self.classes
            row = [("ground truth", with_objects(image, *truth, side=WIDE))]
            for name, model in self.models.items():
                boxes, labels, scores = detect_one(model, image, threshold)
                picture = with_objects(image, boxes, labels, self.classes, scores, WIDE)
                row.append((f"{name}: {len(boxes)} at {threshold:g} or more", picture))
            rows.append(row)
        return sheet(rows, title)
