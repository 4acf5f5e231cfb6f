"""Average precision of detections: COCO's by pycocotools, VOC's by the rules of its development kit."""

import contextlib
import io

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first of COCOeval.stats


def voc_ap(recall, precision, use_07_metric):
    """Average precision of a recall-precision curve by PASCAL VOC's rules, 0 to 1.

    recall, precision: float [N], in the order of falling scores, so that recall does not fall; N may be 0.
    use_07_metric: True for the mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC 2007); False for the area
    under the curve made monotone (VOC 2010 on).
    """
    recall, precision = np.asarray(recall, dtype=float), np.asarray(precision, dtype=float)
    if use_07_metric:
        return float(np.mean([precision[recall >= k / 10].max(initial=0.0) for k in range(11)]))
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or beyond
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def voc_curve(results, label):
    """Recall and precision of one class (label from 1) at IoU 0.5, as VOC's development kit counts.

    Detections are taken by falling score. One is right if the box of its class with the largest IoU has an IoU of at
    least 0.5 and no detection yet. A difficult box is neither found nor missed, and a detection of it is not wrong.
    results: of detect(). Returns float [detections that count] twice; None if the class has no box that counts.
    """
    scores, right, total = [], [], 0
    for r in results:
        truth, found = r["gt_labels"] == label, np.flatnonzero(r["labels"] == label)
        found = found[np.argsort(-r["scores"][found], kind="stable")]
        difficult = np.append(False, r["gt_ignored"][truth])  # box 0 stands for no box
        total += np.count_nonzero(~difficult[1:])
        iou = box_iou(*(torch.from_numpy(boxes) for boxes in (r["boxes"][found], r["gt_boxes"][truth]))).numpy()
        iou = np.pad(iou, ((0, 0), (1, 0)))
        best = np.where(iou.max(1) >= 0.5, iou.argmax(1), 0)
        first = np.isin(np.arange(len(best)), np.unique(best, return_index=True)[1])
        counts = ~difficult[best]
        scores.append(r["scores"][found][counts])
        right.append((first & (best > 0))[counts])
    if total == 0:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right = np.cumsum(np.concatenate(right)[order])
    return right / total, right / np.arange(1, len(right) + 1)


def voc_metrics(results, classes):
    """VOC's AP at IoU 0.5 by both rules, in percent; None without boxes that count. results: of detect().

    {"voc07", "voc_area": mean of the classes with boxes, "per_class": {name: {"voc07", "voc_area"}}}.
    """
    rules, per_class, means = {"voc07": True, "voc_area": False}, {}, {}
    for label, name in enumerate(classes, 1):
        curve = voc_curve(results, label)
        per_class[name] = {key: curve and 100 * voc_ap(*curve, rule) for key, rule in rules.items()}
    for key in rules:
        values = [row[key] for row in per_class.values() if row[key] is not None]
        means[key] = float(np.mean(values)) if values else None
    return {**means, "per_class": per_class}


def coco_metrics(results, classes, source=None):
    """COCO's AP by pycocotools, in percent; None without boxes. Ignored boxes are crowds: no reward, no penalty.

    results: of detect(). classes: names, label 1 first. source: a Coco, if the ground truth is its file's annotations.
    Returns {each of FIGURES, "per_class": {name: {"AP", "AP50"}}}.
    """
    truth, found, images = source.annotations() if source else [], [], []
    for r in results:
        image = source.image_ids[r["image_id"]] if source else r["image_id"]
        images.append(image)
        found += coco_annotations(image, r["boxes"], r["labels"], "score", r["scores"])
        if not source:
            truth += coco_annotations(image, r["gt_boxes"], r["gt_labels"], "iscrowd", r["gt_ignored"])
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(*(_as_coco(images, each, len(classes)) for each in (truth, found)), iouType="bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    metrics = dict(zip(FIGURES, map(_percent, run.stats), strict=False))
    precision = run.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes], all areas, 100 detections
    per_class = {}
    for k, name in enumerate(classes):
        per_class[name] = {"AP": _percent(precision[:, :, k].mean()), "AP50": _percent(precision[0, :, k].mean())}
    return {**metrics, "per_class": per_class}


def coco_annotations(image, boxes, labels, name, values):
    """Boxes xyxy [N, 4] and labels [N] of an image, by its id, in COCO's format; name, values [N]: one more column."""
    for (x0, y0, x1, y1), label, value in zip(boxes.tolist(), labels.tolist(), values.tolist(), strict=True):
        size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
        yield {"image_id": image, "category_id": label, **size, name: value}


def _as_coco(images, annotations, classes):
    """A COCO object of pycocotools; images: their ids. Annotations get new ids: 0 and equal ones go wrong there."""
    coco = COCO()
    coco.dataset["images"] = [{"id": image} for image in images]
    coco.dataset["annotations"] = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
    coco.dataset["categories"] = [{"id": label} for label in range(1, classes + 1)]
    coco.createIndex()
    return coco


def _percent(value):
    return None if value < 0 else 100 * float(value)
