"""Average precision of detections: COCO's by pycocotools, VOC's by the rules of its development kit."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def voc_ap(recall, precision, use_07_metric):
    """Average precision of a recall-precision curve by PASCAL VOC's rules.

    Args:
        recall, precision: float [N], in the order of falling scores, so that recall does not fall. N may be 0.
        use_07_metric: True for the mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC 2007); False for the
            area under the curve made monotone (VOC 2010 on).

    Returns:
        float in [0, 1].
    """
    recall, precision = np.asarray(recall, dtype=float), np.asarray(precision, dtype=float)
    if use_07_metric:
        return float(np.mean([precision[recall >= k / 10].max(initial=0.0) for k in range(11)]))
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or beyond
    return float(np.sum(np.diff(recall) * best[1:]))


def voc_curve(results, label):
    """Recall and precision of one class at IoU 0.5, as VOC's development kit counts.

    Detections are taken by falling score. One is right if the box of its class with the largest IoU has an IoU of at
    least 0.5 and no detection yet. A difficult box is neither found nor missed, and a detection of it is not wrong.

    Args:
        results: list of dicts, see detect().
        label: the class, from 1.

    Returns:
        recall, precision: float [detections that count]; None if the class has no box that counts.
    """
    scores, right, wrong, total = [], [], [], 0
    for r in results:
        of_class = r["gt_labels"] == label
        gt_boxes, ignored = r["gt_boxes"][of_class], r["gt_ignored"][of_class]
        total += int((~ignored).sum())
        of_class = r["labels"] == label
        order = np.argsort(-r["scores"][of_class], kind="stable")
        boxes, taken = r["boxes"][of_class][order], np.zeros(len(gt_boxes), dtype=bool)
        scores.append(r["scores"][of_class][order])
        iou = box_iou(boxes, gt_boxes)
        for i in range(len(boxes)):
            best = int(iou[i].argmax()) if len(gt_boxes) else -1
            hit = best >= 0 and iou[i, best] >= 0.5
            is_right = hit and not ignored[best] and not taken[best]
            right.append(is_right)
            wrong.append(not is_right and not (hit and ignored[best]))
            if is_right:
                taken[best] = True
    if total == 0:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable") if scores else np.zeros(0, dtype=int)
    right, wrong = np.array(right, dtype=bool)[order], np.array(wrong, dtype=bool)[order]
    counts = right | wrong
    right = np.cumsum(right[counts])
    return right / total, right / np.arange(1, len(right) + 1)


def box_iou(a, b):
    """IoU of each box with each other box: [N, 4], [M, 4] xyxy -> [N, M]."""
    corner0 = np.maximum(a[:, None, :2], b[None, :, :2])
    corner1 = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = (corner1 - corner0).clip(0).prod(2)
    union = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None] - overlap
    return overlap / np.maximum(union, 1e-9)


def voc_metrics(results, classes):
    """VOC's mAP at IoU 0.5, the mean of the classes that have boxes.

    Returns:
        {"voc07": percent by the 11-point rule, "voc_area": percent by area,
         "per_class": {name: {"voc07": percent or None, "voc_area": percent or None}}}.
    """
    per_class = {}
    for label, name in enumerate(classes, 1):
        curve = voc_curve(results, label)
        rules = {"voc07": True, "voc_area": False}
        per_class[name] = {key: None if curve is None else 100 * voc_ap(*curve, rule) for key, rule in rules.items()}
    means = {}
    for key in ("voc07", "voc_area"):
        values = [row[key] for row in per_class.values() if row[key] is not None]
        means[key] = float(np.mean(values)) if values else None
    return {**means, "per_class": per_class}


def coco_metrics(results, classes, source=None):
    """COCO's AP by pycocotools. Ignored boxes count as crowds: no reward, no penalty.

    Args:
        results: list of dicts, see detect().
        classes: names, label 1 first.
        source: a Coco; the ground truth is then its file's annotations, with the file's ids.

    Returns:
        {"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large": percent or None,
         "per_class": {name: {"AP": percent or None, "AP50": ...}}}.
    """
    run = _coco_eval(results, classes, source)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    metrics = {name: _percent(run.stats[i]) for i, name in enumerate(names)}
    precision = run.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes], all areas, 100 detections
    per_class = {}
    for k, name in enumerate(classes):
        per_class[name] = {"AP": _percent(precision[:, :, k].mean()), "AP50": _percent(precision[0, :, k].mean())}
    return {**metrics, "per_class": per_class}


def _coco_eval(results, classes, source=None):
    """pycocotools' COCOeval with its figures computed; arguments as in coco_metrics."""
    run = COCOeval(*_coco_tables(results, classes, source), iouType="bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def recall_curves(results, classes, source=None):
    """Precision at recall 0, 0.01, ..., 1, the mean of the classes that have boxes: {IoU: list of 101 in 0..1}."""
    precision = _coco_eval(results, classes, source).eval["precision"][:, :, :, 0, -1]  # [IoUs, recalls, classes]
    precision = precision[:, :, (precision >= 0).all((0, 1))]
    return {iou: precision[k].mean(1).tolist() for iou, k in ((0.5, 0), (0.75, 5))}


def _coco_tables(results, classes, source=None):
    """Ground truth and detections as two COCO objects of pycocotools; arguments as in coco_metrics."""
    image_id, category_id, ground_truth, detections = int, int, [], []
    if source is not None:  # from index and label to the file's ids
        image_id, category_id = lambda i: source.samples[i][0], lambda label: source.category_ids[label - 1]
    for r in results:
        rows = zip(r["gt_boxes"].tolist(), r["gt_labels"].tolist(), r["gt_ignored"].tolist(), strict=True)
        ground_truth += [_coco_box(r["image_id"], label, box, crowd) for box, label, crowd in rows]
        rows = zip(r["boxes"].tolist(), r["labels"].tolist(), r["scores"].tolist(), strict=True)
        image = image_id(r["image_id"])
        detections += [{**_coco_box(image, category_id(label), box, 0), "score": score} for box, label, score in rows]
    images = [{"id": image_id(r["image_id"])} for r in results]
    categories = [{"id": category_id(label), "name": name} for label, name in enumerate(classes, 1)]
    tables = []
    for annotations in (ground_truth if source is None else source.dataset["annotations"], detections):
        coco = COCO()
        annotations = [{**a, "id": number} for number, a in enumerate(annotations, 1)]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        tables.append(coco)
    return tables


def _coco_box(image, category, box, crowd):
    x0, y0, x1, y1 = box
    size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(crowd)}
    return {"image_id": image, "category_id": category, **size}


def _percent(value):
    return None if value < 0 else 100 * float(value)
