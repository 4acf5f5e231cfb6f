"""Panels of the method on one image: mask, feature errors, shared regions, gate, soft labels. view: step_on_image()."""

from torchvision.ops import box_iou

from tar.method.regression_level import paired_iou
from tar.pictures.tiles import SMALL, WIDE, class_colour, table, with_boxes, with_heat, with_objects

PASSES, STOPPED = (0, 140, 60), (130, 130, 130)  # a box at the gate
TEACHER, STUDENT = (60, 80, 150), (225, 125, 40)
LISTED = 20  # regions whose IoUs are written out
OBJECTS, CLASSES = 6, 5  # objects whose soft labels are drawn; their likeliest classes


def method_rows(view, classes, level=None):
    """Rows of tiles: of one level ("backbone", "cls", "reg"), or of all three."""
    truth = "ground truth", with_objects(view.image, view.target, classes)
    errors = heat_row(view, view.errors, "|adapter(F_S) - F_T| on {}, max {:.2f}")
    rows = {
        "backbone": [[truth, *heat_row(view, view.masks, "mask on {}")], errors],
        "reg": [region_row(view)],
        "cls": [soft_label_row(view, classes)],
    }
    return [row for name in rows if level in (None, name) for row in rows[name] if row]


def heat_row(view, maps, title):
    """Tiles: the maps of the levels of the pyramid on the image, on one scale; none without adapters."""
    tiles, highest = [], max((float(values.max()) for values in maps), default=0.0) or 1.0
    for stride, values in zip(view.strides, maps, strict=False):
        name = title.format(f"P{stride.bit_length() - 1}", values.max())
        tiles.append((name, with_heat(view.image, values, stride, highest)))
    return tiles


def region_row(view):
    """Tiles: the positive regions, the teacher's boxes there, and the IoUs that the gate compares."""
    positive, passing = view.positive, int(view.gate.sum())
    regions = with_boxes(view.image, positive.region, [*map(class_colour, positive.label)], side=WIDE)
    order = view.gate.long().argsort(stable=True)  # boxes that pass lie on top
    colours = [PASSES if passes else STOPPED for passes in view.gate[order]]
    teachers = with_boxes(view.image, view.teacher_boxes[order], colours, side=WIDE)
    lines = [[(text, "black") for text in ("teacher's IoU", "IoU to beat", "gate")]]
    ious = (paired_iou(boxes, positive.gt_box).tolist() for boxes in (view.teacher_boxes, view.to_beat))
    for *both, passes in zip(*ious, view.gate, strict=True):
        word, colour = ("open", PASSES) if passes else ("closed", STOPPED)
        lines.append([(cell, colour) for cell in (*both, word)])
    return [
        (f"{len(view.gate)} positive regions", regions),
        (f"teacher's boxes there: {passing} pass the gate (green), {len(view.gate) - passing} do not", teachers),
        (f"IoU with the ground truth (first {LISTED})", table(lines[: LISTED + 1])),
    ]


def soft_label_row(view, classes):
    """Tiles: both models' class probabilities at the best positive region of each object, as bars."""
    tiles, positive = [], view.positive
    both = [x.sigmoid() if positive.sigmoid else x.softmax(1) for x in (positive.teacher_logits, positive.logits)]
    for box, label in zip(view.target["boxes"], view.target["labels"], strict=True):
        overlap = box_iou(box[None], positive.region)[0] * (positive.gt_box == box).all(1)
        overlap[overlap > 0.999] = 0  # the ground-truth boxes are among the regions; they are left out
        if overlap.any() and len(tiles) < OBJECTS:
            teacher, student = (model[overlap.argmax(), 1:] for model in both)  # without the background
            lines = [[("", "black"), ("teacher", TEACHER), ("student", STUDENT)]]
            for k in teacher.maximum(student).argsort(descending=True)[:CLASSES].tolist():
                bars = (float(teacher[k]), TEACHER), (float(student[k]), STUDENT)
                lines.append([(classes[k], "black"), *bars])
            tiles.append((f"a region on the {classes[label - 1]}", table(lines, SMALL // 3)))
    return tiles
