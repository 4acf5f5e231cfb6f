"""Whose weights a run starts from: the teacher's, a checkpoint's, torchvision's."""

from pathlib import Path

from tar import UserError
from tar.data.datasets import difference
from tar.detectors.build import build_detector
from tar.detectors.coco_teacher import build_coco_teacher
from tar.training import checkpoint
from tar.training.flags import build_of


def check_student(args):
    """Builds the student of the flags and lets it go: what is wrong with it is said before another run is trained."""
    build_detector(**build_of(args, args.student, num_classes=1))


def read_teacher(args, classes):
    """The teacher of --teacher-weights, and its checkpoint; UserError if it is not what the flags and the data say.

    classes: of the data; None where they are not known yet.
    """
    if args.teacher_weights == "coco":
        teacher, build = build_coco_teacher(args.detector, classes, *args.size)
        saved = {"build": build, "classes": list(classes), "settings": {}}
    else:
        try:
            teacher, saved = checkpoint.load_detector(args.teacher_weights)
        except UserError as error:
            ended = Path(args.teacher_weights).with_name("result.json")
            remedy = f"; remove {ended}: the teacher then goes on from an earlier checkpoint, or begins anew"
            raise UserError(f"{error}{remedy if ended.is_file() else ''}") from None
    build = saved["build"]
    said = {"detector": args.detector, "backbone": args.teacher}
    if args.detector == "retinanet":  # both models' heads run on the anchors
        said["anchor_scale"] = args.anchor_scale
    wrong = [f"its {name} is {build[name]}, not {value}" for name, value in said.items() if build[name] != value]
    if classes is not None and list(classes) != saved["classes"]:
        wrong.append(f"its classes are others: {difference(classes, saved['classes'])}")
    if wrong:
        raise UserError(f"{args.teacher_weights}: not the teacher of the flags and the data: {wrong[0]}")
    return teacher, saved


def start_from(student, path, build, classes):
    """Loads --student-weights into a student of the same architecture and classes."""
    saved = checkpoint.load(path)
    if list(classes) != saved["classes"]:
        raise UserError(f"{path}: trained on other classes: {difference(classes, saved['classes'])}")
    try:
        student.load_state_dict(saved["model"])
    except RuntimeError as error:
        its = {k: v for k, v in saved["build"].items() if v != build.get(k)}
        raise UserError(f"{path}: not the weights of this student; it was built with {its}") from error
