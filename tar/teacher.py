"""Whose weights a run starts from: the teacher's, a checkpoint's, torchvision's."""

from tar import UserError, checkpoint
from tar.data import difference
from tar.models import build_coco_teacher


def read_teacher(args, classes):
    """The teacher of --teacher-weights, and its checkpoint.

    Raises:
        UserError: it is of another detector type, another backbone or other classes than the flags and the data say,
            or its anchors are others, where both models answer for anchors.
    """
    if args.teacher_weights == "coco":
        teacher, build = build_coco_teacher(args.detector, classes, *args.size)
        saved = {"build": build, "classes": list(classes), "settings": {}}
    else:
        teacher, saved = checkpoint.load_detector(args.teacher_weights)
    build = saved["build"]
    for what, mine, its in (
        ("detector", args.detector, build["detector"]),
        ("backbone", args.teacher, build["backbone"]),
        ("classes", list(classes), saved["classes"]),
        (
            "anchor scale",
            args.anchor_scale,
            build["anchor_scale"] if args.detector == "retinanet" else args.anchor_scale,
        ),
    ):
        matters = what != "anchor scale" or args.detector == "retinanet"  # its anchors are what both answer for
        if matters and mine != its:
            other = f"{its}, not {mine}" if what != "classes" else f"others: {difference(mine, its)}"
            raise UserError(f"{args.teacher_weights}: the teacher's {what}: {other} as the flags or the data say")
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


def inherit(student, teacher):
    """--inherit: copies the teacher's pyramid and heads into the student where shapes match; how many tensors did."""
    mine = student.state_dict()
    fitting = {
        name: value
        for name, value in teacher.state_dict().items()
        if not name.startswith("backbone.body") and name in mine and mine[name].shape == value.shape
    }
    student.load_state_dict({**mine, **{name: value.float() for name, value in fitting.items()}})
    return len(fitting)
