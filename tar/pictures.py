"""Pictures of what the method does on one image: masks, shared regions, gate, feature errors, detections."""

import colorsys
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as v2

from tar.data import to_device
from tar.distill import faster_rcnn, open_gate, retinanet
from tar.losses import decode, paired_iou

TILE, WIDE, GAP, LINE = (
    232,
    480,
    8,
    18,
)  # pixels: sides of a small and a large tile, space between them, height of a line
USED, UNUSED, NEGATIVE = (0, 140, 60), (130, 130, 130), (170, 170, 170)
TEACHER, STUDENT = (60, 80, 150), (225, 125, 40)
LISTED = 20  # regions whose overlaps are written out


@dataclass
class View:
    """What a teacher and a student say of one image; boxes are xyxy in its own pixels.

    image uint8 [3, H, W]; target as tar.data's; masks and errors: lists of [H_l, W_l], errors empty without adapters;
    cells: of each level the width and height of a cell in pixels of the image;
    regions [P, 4] with label [P] (0: background); of the M positive ones region_iou, teacher_boxes [M, 4], teacher_iou
    [M], gate bool [M], number [M] (which ground-truth box), and teacher_says, student_says [M, classes], the
    probabilities of the classes.
    """

    image: torch.Tensor
    target: dict
    masks: list = field(default_factory=list)
    errors: list = field(default_factory=list)
    cells: list = field(default_factory=list)
    regions: torch.Tensor = None
    label: torch.Tensor = None
    region_iou: torch.Tensor = None
    teacher_boxes: torch.Tensor = None
    teacher_iou: torch.Tensor = None
    gate: torch.Tensor = None
    number: torch.Tensor = None
    teacher_says: torch.Tensor = None
    student_says: torch.Tensor = None


@torch.inference_mode()
def look(step, teacher, image, target, device):
    """One distillation step on one image, without learning.

    Args:
        step: tar.distill.Step of a student, with its adapters or none.
        teacher: a detector.
        image: uint8 [3, H, W]; target: boxes float [N, 4] xyxy in its pixels, labels int64 [N].

    Returns:
        View, on the CPU.
    """
    student, levels = step.student, step.levels
    view = View(image, target)
    batch, targets = to_device([image], [target], device)
    images, targets = student.transform(batch, targets)
    pixels = images.tensors.contiguous(memory_format=torch.channels_last)
    features, taught = student.backbone(pixels), teacher.backbone(pixels)
    wanted = list(taught.values())
    where = step.masks(images, targets, wanted)
    height, width = images.image_sizes[0]
    shown = [(-(-height // stride), -(-width // stride)) for stride in student.strides]  # without the padding
    view.masks = [m[0, :h, :w].float().cpu() for m, (h, w) in zip(where, shown, strict=True)]
    if len(step.adapters):
        adapted = [adapt(f) for adapt, f in zip(step.adapters, features.values(), strict=True)]
        errors = [(a.float() - t.float()).abs().mean(1)[0] for a, t in zip(adapted, wanted, strict=True)]
        view.errors = [e[:h, :w].cpu() for e, (h, w) in zip(errors, shown, strict=True)]
    share = retinanet if isinstance(student, RetinaNet) else faster_rcnn
    everything = replace(levels, soft_labels="all", proposals="student", sharing=True)
    _, shared = share(student, features, images, targets, (teacher, taught, everything))
    positive = shared.label > 0
    mine, theirs = shared.deltas[positive].float(), shared.teacher_deltas[positive].float()
    places = shared.region[positive], shared.teacher_region[positive], shared.truth[positive]
    boxes = decode(shared.box_coder, theirs, places[1])
    view.gate = open_gate(levels.reg_gate, shared.box_coder, mine, theirs, *places).cpu()
    view.region_iou, view.teacher_iou = (paired_iou(b, places[2]).cpu() for b in (places[0], boxes))
    view.number = box_iou(places[2], targets[0]["boxes"]).max(1).indices.cpu() if len(boxes) else view.gate.long()
    said = (
        (logits[positive].float().sigmoid() if shared.sigmoid else logits[positive].float().softmax(1)).cpu()
        for logits in (shared.teacher_logits, shared.logits)
    )
    view.teacher_says, view.student_says = (p[:, 1:] for p in said)  # without the background
    scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
    view.cells = [(float(stride * scale[0]), float(stride * scale[1])) for stride in student.strides]
    view.regions, view.label = shared.region.cpu() * scale, shared.label.cpu()
    view.teacher_boxes = boxes.cpu() * scale
    return view


@torch.inference_mode()
def detections(model, image, device, threshold):
    """Boxes [D, 4], labels [D] and scores [D] above a threshold: of one image uint8 [3, H, W], on the CPU."""
    found = model(to_device([image], [], device)[0])[0]
    kept = (found["scores"] >= threshold) & (found["labels"] > 0)
    return tuple(found[key][kept].float().cpu() for key in ("boxes", "labels", "scores"))


def class_colour(label):
    """The colour of a class, the same in every picture: three numbers to 255; label from 1."""
    hue = (0.61 + 0.381966 * (int(label) - 1)) % 1  # the golden ratio: neighbours differ
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.38, 0.9))


def font(size=13):
    return ImageFont.load_default(size)


class Tile:
    """A picture with a title over it; boxes are given in pixels of the image.

    Args:
        image: uint8 [3, H, W].
        title: a line.
        side: pixels of the longer side.
    """

    def __init__(self, image, title, side=TILE):
        self.scale = side / max(image.shape[1:])
        size = [max(round(self.scale * n), 1) for n in (image.shape[2], image.shape[1])]
        self.picture = v2.to_pil_image(image).resize(size, Image.Resampling.BICUBIC)
        self.title, self.side = title, side

    def box(self, box, colour, text="", width=2):
        """Draws a box, and a text in its upper corner."""
        draw = ImageDraw.Draw(self.picture)
        x0, y0, x1, y1 = (float(v) * self.scale for v in box)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour, width=width)
        if text:
            left, top, right, bottom = draw.textbbox((0, 0), text, font=font(12))
            wide, high = right - left + 4, bottom - top + 4
            x = min(max(x0, 0), max(self.picture.width - wide, 0))
            y = y0 - high if y0 >= high else min(y0, self.picture.height - high)
            draw.rectangle((x, y, x + wide, y + high), fill=colour)
            draw.text((x + 2 - left, y + 2 - top), text, fill="white", font=font(12))
        return self

    def heat(self, values, cell, most=None):
        """Lays a map [h, w] over the image: 0 leaves it dark, `most` is bright yellow.

        Args:
            cell: width and height of a cell in pixels of the image; the last ones may reach over its border.
        """
        share = (values / (most or float(values.max()) or 1.0)).clamp(0, 1).numpy()
        columns, rows = (
            ((np.arange(n) + 0.5) / self.scale // side).astype(int).clip(max=count - 1)
            for n, side, count in zip(self.picture.size, cell, share.shape[::-1], strict=True)
        )
        share = share[rows][:, columns][..., None]
        hot = np.array([255, 225, 60]) * share + np.array([40, 0, 90]) * (1 - share)
        mixed = 0.35 * np.asarray(self.picture.convert("L").convert("RGB")) + 0.65 * hot
        self.picture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
        return self


class Words:
    """Lines of text as a tile."""

    def __init__(self, lines, title, side=TILE):
        self.title, self.side = title, side
        self.picture = Image.new("RGB", (side, max(LINE * len(lines), 1)), "white")
        for i, (text, colour) in enumerate(lines):
            ImageDraw.Draw(self.picture).text((2, LINE * i), text, fill=colour, font=font())

    def bars(self, rows):
        """Draws what teacher and student say instead: (name, the teacher's share, the student's) a row."""
        high, left = 2 * LINE, 84
        self.picture = Image.new("RGB", (self.side, high * len(rows) + LINE), "white")
        draw, wide = ImageDraw.Draw(self.picture), self.side - left - 44
        for k, (name, *shares) in enumerate(rows):
            draw.text((2, high * k + 6), name, fill="black", font=font(12))
            for n, (share, colour) in enumerate(zip(shares, (TEACHER, STUDENT), strict=True)):
                y = high * k + n * (LINE - 3)
                draw.rectangle((left, y + 3, left + wide * share, y + LINE - 3), fill=colour)
                draw.text((left + wide * share + 4, y + 1), f"{share:.2f}", fill="black", font=font(11))
        for n, (who, colour) in enumerate((("teacher", TEACHER), ("student", STUDENT))):
            x = left + 70 * n
            draw.rectangle((x, high * len(rows) + 4, x + 9, high * len(rows) + 13), fill=colour)
            draw.text((x + 13, high * len(rows)), who, fill="black", font=font(12))


def few_colours(picture):
    """A picture in 256 colours, by an octree, which keeps small bright lines as they are."""
    return picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def sheet(rows, title):
    """Rows of tiles as one picture of PIL, with a line above them."""
    height = LINE + GAP
    for row in rows:
        height += LINE + max(tile.picture.height for tile in row) + 2 * GAP
    width = max(sum(tile.side + GAP for tile in row) for row in rows) + GAP
    page = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(page), GAP
    draw.text((GAP, y), title, fill="black", font=font(15))
    y += LINE + GAP
    for row in rows:
        x = GAP
        for tile in row:
            draw.text((x, y), tile.title, fill="black", font=font())
            page.paste(tile.picture, (x, y + LINE))
            x += tile.side + GAP
        y += LINE + max(tile.picture.height for tile in row) + 2 * GAP
    return page


def labelled(tile, boxes, labels, classes, scores=None):
    """Draws boxes with the names of their classes, and scores where there are any, the best on top."""
    order = range(len(boxes)) if scores is None else scores.argsort().tolist()
    for i in order:
        name = classes[int(labels[i]) - 1] + (f" {float(scores[i]):.2f}" if scores is not None else "")
        tile.box(boxes[i], class_colour(labels[i]), name)
    return tile


def levels_names(strides):
    return [f"P{stride.bit_length() - 1}" for stride in strides]


def truth_of(view):
    return view.target["boxes"], view.target["labels"]


def mask_row(view, classes, strides):
    """Tiles: the ground truth, and the mask on each level of the pyramid."""
    truth = labelled(Tile(view.image, "ground truth"), *truth_of(view), classes)
    names = levels_names(strides)
    return [
        truth,
        *(
            Tile(view.image, f"mask on {n}").heat(m, c, 1.0)
            for n, m, c in zip(names, view.masks, view.cells, strict=True)
        ),
    ]


def region_row(view, gate="proposal"):
    """Tiles: the shared regions, the teacher's boxes at the positive ones, and their overlaps."""
    positive = view.label > 0
    title = f"{len(view.label)} shared regions, {int(positive.sum())} positive (coloured)"
    regions, taught = Tile(view.image, title, WIDE), view.teacher_boxes
    background = view.regions[~positive]
    for box in background if len(background) <= 200 else []:  # RetinaNet's anchors would hide the image
        regions.box(box, NEGATIVE, width=1)
    for box, label in zip(view.regions[positive], view.label[positive], strict=True):
        regions.box(box, class_colour(label))
    used = int(view.gate.sum())
    boxes = Tile(
        view.image, f"the teacher's boxes there: {used} green ones are used, {len(taught) - used} are not", WIDE
    )
    for i in view.gate.long().argsort(stable=True).tolist():  # those that are used lie on top
        boxes.box(taught[i], USED if view.gate[i] else UNUSED)
    lines = [("teacher's IoU   region's IoU   gate", "black")]
    for i in range(min(len(taught), LISTED)):
        open_, colour = ("used", USED) if view.gate[i] else ("not used", UNUSED)
        lines.append(
            (f"       {view.teacher_iou[i]:.2f}                 {view.region_iou[i]:.2f}            {open_}", colour)
        )
    more = f" (the first {LISTED} of {len(taught)})" if len(taught) > LISTED else ""
    reference = {"proposal": "the region", "student": "the student's box", "none": "nothing"}[gate]
    return [regions, boxes, Words(lines, f"overlap with the truth{more}; to beat: {reference}", WIDE)]


def soft_row(view, classes, most=6, shown=5):
    """Tiles: what both models say of a positive region of each object, the soft labels as bars."""
    tiles = []
    for number in range(len(view.target["boxes"])):
        mine = torch.nonzero((view.number == number) & (view.region_iou < 0.999))[:, 0]  # not the true box itself
        if len(mine) and len(tiles) < most:
            i = mine[view.region_iou[mine].argmax()]
            label = int(view.label[view.label > 0][i])
            tile = Words([], f"a region on the {classes[label - 1]}")
            likely = view.teacher_says[i].maximum(view.student_says[i]).argsort(descending=True)[:shown].tolist()
            tile.bars([(classes[k], float(view.teacher_says[i, k]), float(view.student_says[i, k])) for k in likely])
            tiles.append(tile)
    return tiles


def error_row(view, strides):
    """Tiles: where the student's features are off the teacher's, on each level; [] without adapters."""
    most = max((float(e.max()) for e in view.errors), default=0.0)
    names = levels_names(strides)
    return [
        Tile(view.image, f"|adapt(F_S) - F_T| on {n}, max {e.max():.2f}").heat(e, c, most)
        for n, e, c in zip(names, view.errors, view.cells, strict=False)  # no errors: no tiles
    ]


def detection_row(image, found, classes, threshold):
    """Tiles: the detections of some detectors. found: {title: (boxes, labels, scores)}."""
    return [
        labelled(Tile(image, f"{title}: {len(boxes)} at {threshold:g} or more", WIDE), boxes, labels, classes, scores)
        for title, (boxes, labels, scores) in found.items()
    ]


def panel(view, classes, strides, found, threshold, title, gate="proposal", level=None):
    """All there is to see of one image, a picture of PIL; with a level (backbone, cls, reg) only what that is about."""
    rows = {
        "backbone": [mask_row(view, classes, strides), error_row(view, strides)],
        "reg": [region_row(view, gate)],
        "cls": [soft_row(view, classes)],
        None: [detection_row(view.image, found, classes, threshold)],
    }
    if not any(rows[level]):
        rows[level] = [[labelled(Tile(view.image, "no region to show"), *truth_of(view), classes)]]
    chosen = [rows[level]] if level else rows.values()
    return sheet([row for part in chosen for row in part if row], title)
