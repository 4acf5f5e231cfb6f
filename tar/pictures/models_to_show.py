"""The models of a picture: a student, its teacher, and a plain student beside them."""

import os

from tar import UserError
from tar.detectors.coco_teacher import build_coco_teacher
from tar.evaluation.detect import detections
from tar.method.step import DistillationStep
from tar.pictures.images_to_show import flags_of
from tar.pictures.method_panels import method_rows
from tar.pictures.step_on_image import step_on_image
from tar.pictures.tiles import WIDE, sheet, with_objects
from tar.training import checkpoint
from tar.training.flags import distillation_settings


class ModelsToShow:
    """The models of checkpoints, on the CPU. teacher_weights: by default that of the student's settings, if any.

    UserError: a file that is not there, or models that do not belong together.
    """

    def __init__(self, weights, teacher_weights=None, plain_weights=None):
        student, saved = checkpoint.load_detector(weights)
        self.classes, self.teacher, settings = saved["classes"], None, flags_of(saved["settings"])
        self.models = {"plain student": read_other(plain_weights, weights, saved)} if plain_weights else {}
        self.models["TAR student" if settings.teacher else "student"] = student
        teacher_weights = teacher_weights or settings.teacher_weights
        if teacher_weights == "coco":
            self.teacher = build_coco_teacher(settings.detector, self.classes, *settings.size)[0]
        elif teacher_weights and not os.path.isfile(teacher_weights):
            raise UserError(f"{teacher_weights}: the teacher of {weights} is not there; give --teacher-weights FILE")
        elif teacher_weights:
            self.teacher = read_other(teacher_weights, weights, saved)
        if self.teacher is None:
            return
        self.models["teacher"] = self.teacher
        if not saved["adapters"]:  # a plain student has none
            settings.weight_backbone = 0.0
        width = self.teacher.backbone.out_channels
        self.step = DistillationStep(student, distillation_settings(settings), width).eval()
        try:
            self.step.adapters.load_state_dict(saved["adapters"])
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
            row = {"ground truth": target}
            for name, model in self.models.items():
                [found] = detections(model, [image], threshold=threshold)
                row[f"{name}: {len(found['boxes'])} at {threshold:g} or more"] = found
            rows.append([(text, with_objects(image, each, self.classes, WIDE)) for text, each in row.items()])
        return sheet(rows, title)


def read_other(path, weights, saved):
    """The detector of a checkpoint that must have the kind and classes of the student that was saved in weights."""
    model, other = checkpoint.load_detector(path)
    its, students = (f"{s['build']['detector']} of {', '.join(s['classes'])}" for s in (other, saved))
    if its != students:
        raise UserError(f"{path}: a {its}, but {weights} is a {students}")
    return model
