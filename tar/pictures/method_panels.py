"""Panels of the method on one image: mask, feature errors, shared regions, gate, soft labels. Input: a StepOnImage."""

from tar.pictures.tiles import WIDE, Bars, Table, Tile, class_colour

PASSES, STOPPED, NEGATIVE = (0, 140, 60), (130, 130, 130), (170, 170, 170)  # a box at the gate; a background region
TEACHER, STUDENT = (60, 80, 150), (225, 125, 40)
LISTED = 20  # regions whose IoUs are written out
OBJECTS, CLASSES = 6, 5  # objects whose soft labels are drawn; their likeliest classes


def method_rows(view, classes, level=None):
    """Rows of tiles: of one level ("backbone", "cls", "reg"), or of all three."""
    rows = {
        "backbone": [mask_row(view, classes), error_row(view)],
        "reg": [region_row(view)],
        "cls": [soft_label_row(view, classes)],
    }
    chosen = [row for name in rows if level in (None, name) for row in rows[name] if row]
    return chosen or [[ground_truth(view.image, view.target, classes, "no region to show")]]


def ground_truth(image, target, classes, title="ground truth", **size):
    return Tile(image, title, **size).objects(target["boxes"], target["labels"], classes)


def mask_row(view, classes):
    """Tiles: the ground truth, and the mask on each level of the pyramid."""
    masks = [Tile(view.image, f"mask on {name}").heat(mask, cell, 1.0) for name, cell, mask, _ in view.levels]
    return [ground_truth(view.image, view.target, classes), *masks]


def error_row(view):
    """Tiles: the distance of the student's features from the teacher's on each level; none without adapters."""
    highest = max(float(error.max()) for *_, error in view.levels)
    title = "|adapter(F_S) - F_T| on {}, max {:.2f}"
    tiles = [Tile(view.image, title.format(n, e.max())).heat(e, cell, highest) for n, cell, _, e in view.levels]
    return tiles if highest else []


def region_row(view):
    """Tiles: the shared regions, the teacher's boxes at the positive ones, and the IoUs that the gate compares."""
    positive = view.label > 0
    title = f"{len(view.label)} shared regions, {int(positive.sum())} positive (coloured)"
    regions = Tile(view.image, title, WIDE)
    background = view.regions[~positive]
    for box in background if len(background) <= 200 else []:  # RetinaNet's anchors would hide the image
        regions.box(box, NEGATIVE, width=1)
    for box, label in zip(view.regions[positive], view.label[positive], strict=True):
        regions.box(box, class_colour(label))
    count, passing = len(view.gate), int(view.gate.sum())
    title = f"teacher's boxes there: {passing} pass the gate (green), {count - passing} do not"
    boxes = Tile(view.image, title, WIDE)
    for i in view.gate.long().argsort(stable=True).tolist():  # boxes that pass lie on top
        boxes.box(view.teacher_boxes[i], PASSES if view.gate[i] else STOPPED)
    lines = [(("teacher's IoU", "region's IoU", "gate"), "black")]
    for teacher_iou, region_iou, passes in list(zip(view.teacher_iou, view.region_iou, view.gate, strict=True))[
        :LISTED
    ]:
        word, colour = ("open", PASSES) if passes else ("closed", STOPPED)
        lines.append(((f"{teacher_iou:.2f}", f"{region_iou:.2f}", word), colour))
    more = f" (first {LISTED} of {count})" if count > LISTED else ""
    beat = {"proposal": "the region's", "student": "the student's box's", "none": "nothing"}[view.reg_gate]
    return [regions, boxes, Table(lines, f"IoU with the ground truth{more}; to beat: {beat}")]


def soft_label_row(view, classes):
    """Tiles: both models' class probabilities at the best positive region of each object, as bars."""
    tiles, positive_labels = [], view.label[view.label > 0]
    for number in range(len(view.target["boxes"])):
        # the ground-truth boxes are among the regions; they are left out
        mine = ((view.object == number) & (view.region_iou < 0.999)).nonzero()[:, 0]
        if len(mine) and len(tiles) < OBJECTS:
            i = mine[view.region_iou[mine].argmax()]
            both = view.teacher_probabilities[i], view.student_probabilities[i]
            likeliest = both[0].maximum(both[1]).argsort(descending=True)[:CLASSES].tolist()
            groups = [(classes[k], [float(model[k]) for model in both]) for k in likeliest]
            title = f"a region on the {classes[int(positive_labels[i]) - 1]}"
            tiles.append(Bars(groups, {"teacher": TEACHER, "student": STUDENT}, title))
    return tiles
