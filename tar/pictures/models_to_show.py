"""The models of a picture: a student, its teacher, and a plain student beside them."""

import contextlib
from dataclasses import replace
from pathlib import Path

from tar import UserError
from tar.detectors.coco_teacher import build_coco_teacher
from tar.method.step import DistillationSettings, DistillationStep
from tar.pictures.detections import detection_row
from tar.pictures.images_to_show import flags_of
from tar.pictures.method_panels import ground_truth, method_rows
from tar.pictures.step_on_image import step_on_image
from tar.pictures.tiles import WIDE, sheet
from tar.training import checkpoint
from tar.training.flags import distillation_settings


class StudentAndTeacher:
    """A student, its adapters, its teacher, and the plain student to compare it with; the last two may be None.

    Args:
        weights: the student's checkpoint.
        teacher_weights: default: as in the student's settings.
        plain_weights: default: the run `plain` beside the student's, if it fits.

    Raises:
        UserError: a file that is not there, or models that do not belong together.
    """

    def __init__(self, weights, process, teacher_weights=None, plain_weights=None):
        self.weights, self.device = Path(weights), process.device
        self.student, self.saved = checkpoint.load_detector(weights)
        settings, self.classes = self.saved["settings"], tuple(self.saved["classes"])
        self.distilled = bool(settings.get("teacher"))
        self.teacher = self._read_teacher(teacher_weights or settings.get("teacher_weights"), settings)
        self.plain = self._read(plain_weights) if plain_weights else None
        beside = self.weights.resolve().parent.parent / "plain/last.pth"
        if plain_weights is None and beside.is_file() and beside != self.weights.resolve():
            with contextlib.suppress(UserError):  # a run of this name by chance
                self.plain = self._read(beside)
        self.step = self._read_step(settings)
        student = "TAR student" if self.distilled else "student"
        models = {"plain student": self.plain, student: self.student, "teacher": self.teacher}
        self.models = {name: model for name, model in models.items() if model is not None}
        for model in (self.step, *self.models.values()):
            process.place(model).eval()

    def _read(self, path):
        model, saved = checkpoint.load_detector(path)
        mine, its = ({**s["build"], "classes": tuple(s["classes"])} for s in (self.saved, saved))
        for what in ("detector", "classes"):
            if mine[what] != its[what]:
                raise UserError(f"{path}: its {what}, {its[what]}, are not those of {self.weights}, {mine[what]}")
        return model

    def _read_teacher(self, path, settings):
        if path == "coco":
            return build_coco_teacher(settings["detector"], self.classes, *settings["size"])[0]
        if path and not Path(path).is_file():
            raise UserError(f"{path}: the teacher of {self.weights} is not there; give --teacher-weights FILE")
        return self._read(path) if path else None

    def _read_step(self, settings):
        distillation = distillation_settings(flags_of(settings)) if self.distilled else DistillationSettings()
        adapters = self.saved["adapters"] if self.teacher else {}
        if not adapters:
            distillation = replace(distillation, weight_backbone=0.0)
        width = self.teacher.backbone.out_channels if self.teacher else 1
        step = DistillationStep(self.student, distillation, width)
        try:
            step.adapters.load_state_dict(adapters)
        except RuntimeError:
            raise UserError(f"{self.weights}: its adapters do not lead to this teacher's features") from None
        return step

    def panel(self, image, target, threshold, title, level=None):
        """A picture of PIL of an image uint8 [3, H, W]: the method and the detections of all models.

        Args:
            target: boxes and labels; None, or no teacher: detections only.
            threshold: least score of a detection.
            level: "backbone", "cls" or "reg": this level only.
        """
        rows = []
        if target is not None and self.teacher is not None:
            view = step_on_image(self.step, self.teacher, image, target, self.device)
            rows = method_rows(view, self.classes, level)
        if not rows or level is None:
            rows.append(detection_row(self.models, image, self.classes, self.device, threshold))
        if target is not None and self.teacher is None:
            rows[0].insert(0, ground_truth(image, target, self.classes, side=WIDE))
        return sheet(rows, title)
