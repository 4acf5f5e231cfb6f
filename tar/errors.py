"""Where a detector loses AP50: a split of its errors in the manner of TIDE (Bolya et al., ECCV 2020).

Detections are matched as COCO does at IoU 0.5. A wrong one is, by the box that it overlaps most: `classification`
(0.5 or more with a box of another class), `localisation` (0.1 to 0.5 with one of its own class), `both` (0.1 to 0.5
with one of another class), `duplicate` (0.5 or more with a box of its own class that a better one has taken) or
`background` (less than 0.1 with any). A box that no detection found, nor would find if its class or its place were
mended, is `missed`. What a kind costs is what AP50 would gain without it: the class or the place is mended where the
box is still free, other wrong detections are taken away, missed boxes are not asked for.
"""

from dataclasses import dataclass

import numpy as np

from tar.evaluation import box_iou

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
FOUND, NEAR, MOST = 0.5, 0.1, 100  # IoU of a find, IoU of something near; detections an image


@dataclass
class Detections:
    """All detections of a test set, row by row: label, score, kind (KINDS or "right") and box, the number of the
    ground-truth box it is about, -1 for none; truth_label and found, one entry a ground-truth box."""

    label: np.ndarray
    score: np.ndarray
    kind: np.ndarray
    box: np.ndarray
    truth_label: np.ndarray
    found: np.ndarray


def sort_errors(results):
    """Says of each detection what it is. results: list of dicts, see tar.evaluation.detect(). Returns Detections."""
    rows, truth_label, found, first = [], [], [], 0
    for r in results:
        asked = ~r["gt_ignored"]
        truth, labels, ignored = r["gt_boxes"][asked], r["gt_labels"][asked], r["gt_boxes"][~asked]
        taken = np.zeros(len(truth), bool)
        order = np.argsort(-r["scores"], kind="stable")[:MOST]
        iou, inside = box_iou(r["boxes"][order], truth), box_iou(r["boxes"][order], ignored)
        own = r["labels"][order][:, None] == labels[None]
        for i, index in enumerate(order):
            mine, others = np.where(own[i], iou[i], 0), np.where(own[i], 0, iou[i])
            free = np.where(taken, 0, mine)
            box, kind = -1, "background"
            if free.max(initial=0) >= FOUND:
                box, kind = int(free.argmax()), "right"
                taken[box] = True
            elif inside[i].max(initial=0) >= FOUND:
                continue  # COCO: neither right nor wrong
            elif mine.max(initial=0) >= FOUND:
                kind = "duplicate"
            elif others.max(initial=0) >= FOUND:
                box, kind = int(others.argmax()), "classification"
            elif mine.max(initial=0) >= NEAR:
                box, kind = int(mine.argmax()), "localisation"
            elif others.max(initial=0) >= NEAR:
                kind = "both"
            rows.append((r["labels"][index], r["scores"][index], kind, box + first if box >= 0 else -1))
        truth_label.append(labels)
        found.append(taken)
        first += len(truth)
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    types = (int, float, object, int)
    return Detections(
        *(np.array(c, dtype=t) for c, t in zip(columns, types, strict=True)),
        np.concatenate([*truth_label, np.zeros(0, int)]),
        np.concatenate([*found, np.zeros(0, bool)]),
    )


def cost_of_errors(results, classes):
    """What each kind of error costs.

    Returns:
        {"AP50": percent; "costs": {kind: points of AP50 that it would gain without}, "counts": {kind: how many}}.
    """
    d = sort_errors(results)
    asked = np.bincount(d.truth_label, minlength=len(classes) + 1)
    base = average_precision(d.label, d.score, d.kind == "right", asked)
    mendable = np.zeros(len(d.found), bool)
    mendable[d.box[np.isin(d.kind, ("classification", "localisation"))]] = True
    missed = ~d.found & ~mendable
    costs, counts = {}, {kind: int((d.kind == kind).sum()) for kind in KINDS}
    counts["missed"] = int(missed.sum())
    for kind in KINDS:
        label, right, kept, wanted = d.label.copy(), d.kind == "right", np.ones(len(d.label), bool), asked
        if kind == "missed":
            wanted = asked - np.bincount(d.truth_label[missed], minlength=len(asked))
        taken = d.found.copy()
        rows = np.flatnonzero(d.kind == kind)
        for i in rows[np.argsort(-d.score[rows], kind="stable")]:
            box = d.box[i]
            if box >= 0 and not taken[box]:
                taken[box], right[i], label[i] = True, True, d.truth_label[box]
            else:
                kept[i] = False
        costs[kind] = average_precision(label[kept], d.score[kept], right[kept], wanted) - base
    return {"AP50": base, "costs": costs, "counts": counts}


def average_precision(label, score, right, asked):
    """COCO's AP at one IoU, 101 recalls, the mean over the classes that have a box; percent.

    Args:
        label, score, right: one entry a detection. asked: boxes of each class, from class 0.
    """
    each, recalls = [], np.linspace(0, 1, 101)
    for k in np.flatnonzero(asked):
        mine = np.flatnonzero(label == k)
        hits = right[mine][np.argsort(-score[mine], kind="stable")].cumsum()
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        at = np.searchsorted(hits / asked[k], recalls, side="left")
        each.append(np.append(precision, 0.0)[at.clip(max=len(precision))].mean())
    return 100 * float(np.mean(each)) if each else 0.0
