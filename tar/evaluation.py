"""Detections to figures: COCO's AP by pycocotools, VOC's mAP by its development kit's rules."""

import contextlib
import io
import time

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tar.data import make_loader, test_batches, to_device


def voc_ap(recall, precision, use_07_metric):
    """Average precision of a recall-precision curve by PASCAL VOC's rules.

    Args:
        recall, precision: float [N], by falling score; recall does not fall. N may be 0.
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

    By falling score, a detection is right if the box of its class that it overlaps most is overlapped by 0.5 or
    more and not taken yet; a difficult box counts neither as found nor as missed nor as wrong.

    Args:
        results: list of dicts, see detect().
        label: the class, from 1.

    Returns:
        recall, precision: float [detections not ignored]; both empty where there are none. None where the class has
        no box that counts.
    """
    scores, right, wrong, total = [], [], [], 0
    for r in results:
        mine = r["gt_labels"] == label
        truth, ignored = r["gt_boxes"][mine], r["gt_ignored"][mine]
        total += int((~ignored).sum())
        found = r["labels"] == label
        order = np.argsort(-r["scores"][found], kind="stable")
        boxes, taken = r["boxes"][found][order], np.zeros(len(truth), dtype=bool)
        scores.append(r["scores"][found][order])
        overlap = box_iou(boxes, truth)
        for i in range(len(boxes)):
            best = int(overlap[i].argmax()) if len(truth) else -1
            hit = best >= 0 and overlap[i, best] >= 0.5
            free = hit and not ignored[best] and not taken[best]
            right.append(free)
            wrong.append(not free and not (hit and ignored[best]))
            if free:
                taken[best] = True
    if total == 0:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable") if scores else np.zeros(0, dtype=int)
    right, wrong = np.array(right, dtype=bool)[order], np.array(wrong, dtype=bool)[order]
    counts = right | wrong
    right = np.cumsum(right[counts])
    return right / total, right / np.arange(1, len(right) + 1)


def box_iou(a, b):
    """Pairwise IoU: [N, 4], [M, 4] xyxy -> [N, M]."""
    corner0 = np.maximum(a[:, None, :2], b[None, :, :2])
    corner1 = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = (corner1 - corner0).clip(0).prod(2)
    union = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None] - overlap
    return overlap / np.maximum(union, 1e-9)


def voc_metrics(results, classes):
    """VOC's mAP at IoU 0.5 over the classes that occur.

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
        known = [row[key] for row in per_class.values() if row[key] is not None]
        means[key] = float(np.mean(known)) if known else None
    return {**means, "per_class": per_class}


def coco_metrics(results, classes, source=None):
    """COCO's AP by pycocotools. Ignored boxes count as crowds: no reward, no penalty.

    Args:
        results: list of dicts, see detect().
        classes: names, label 1 first.
        source: a tar.coco.Coco, whose own annotations and ids are then measured against.

    Returns:
        {"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large": percent or None,
         "per_class": {name: {"AP": percent or None, "AP50": ...}}}.
    """
    run = coco_run(results, classes, source)
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    metrics = {name: _percent(run.stats[i]) for i, name in enumerate(names)}
    precision = run.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes], all areas, 100 detections
    per_class = {}
    for k, name in enumerate(classes):
        known = precision[:, :, k]
        per_class[name] = {"AP": _percent(known.mean()), "AP50": _percent(known[0].mean())}
    return {**metrics, "per_class": per_class}


def coco_run(results, classes, source=None):
    """pycocotools' COCOeval after its work; arguments as coco_metrics."""
    run = COCOeval(*coco_pair(results, classes, source), iouType="bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def recall_curves(results, classes, source=None):
    """Precision at recall 0, 0.01, ..., 1, the mean of the classes that occur: {IoU: list of 101 in 0..1}."""
    precision = coco_run(results, classes, source).eval["precision"][:, :, :, 0, -1]  # [IoUs, recalls, classes]
    known = precision[:, :, (precision >= 0).all((0, 1))]
    return {iou: known[k].mean(1).tolist() for iou, k in ((0.5, 0), (0.75, 5))}


def coco_pair(results, classes, source=None):
    """Ground truth and detections as pycocotools wants them; arguments as coco_metrics."""
    image_id, category_id, truth, found = int, int, [], []
    if source is not None:  # our index and label back to the file's ids
        image_id, category_id = lambda i: source.samples[i][0], lambda label: source.category_ids[label - 1]
    for r in results:
        rows = zip(r["gt_boxes"].tolist(), r["gt_labels"].tolist(), r["gt_ignored"].tolist(), strict=True)
        truth += [_coco_box(r["image_id"], label, box, crowd) for box, label, crowd in rows]
        rows = zip(r["boxes"].tolist(), r["labels"].tolist(), r["scores"].tolist(), strict=True)
        where = image_id(r["image_id"])
        found += [{**_coco_box(where, category_id(label), box, 0), "score": score} for box, label, score in rows]
    images = [{"id": image_id(r["image_id"])} for r in results]
    categories = [{"id": category_id(label), "name": name} for label, name in enumerate(classes, 1)]
    pair = []
    for annotations in (truth if source is None else source.dataset["annotations"], found):
        coco = COCO()
        annotations = [{**a, "id": number} for number, a in enumerate(annotations, 1)]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        pair.append(coco)
    return pair


def _coco_box(image, category, box, crowd):
    x0, y0, x1, y1 = box
    size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(crowd)}
    return {"image_id": image, "category_id": category, **size}


def _percent(value):
    return None if value < 0 else 100 * float(value)


@torch.inference_mode()
def detect(model, source, device, batch_size=1, workers=0, rank=0, world=1, progress=iter):
    """Runs a detector over a test source, this process's share of the images.

    Returns:
        list of dicts of numpy arrays: image_id; gt_boxes [N, 4], gt_labels [N], gt_ignored bool [N]; boxes [D, 4],
        labels [D], scores [D]; boxes xyxy in pixels of the image.
    """
    was_training = model.training
    model.eval()
    results = []
    batches = test_batches(len(source), batch_size, rank, world)
    for images, targets in progress(make_loader(source, False, batches, workers=workers)):
        for target, found in zip(targets, model(to_device(images, [], device)[0]), strict=True):
            real = found["labels"] > 0  # torchvision's RetinaNet may answer with the background
            found = {key: value[real] for key, value in found.items()}
            truth = {f"gt_{key}": target[key].numpy() for key in ("boxes", "labels", "ignored")}
            found = {
                key: found[key].float().cpu().numpy() if key != "labels" else found[key].cpu().numpy() for key in found
            }
            results.append({"image_id": target["image_id"], **truth, **found})
    model.train(was_training)
    return results


def evaluate(model, source, device, voc=False, batch_size=1, workers=0, progress=iter):
    """The figures of a detector on a test source; under torch.distributed the processes share the images.

    Args:
        voc: VOC's two rules as well.

    Returns:
        coco_metrics(), with voc_metrics() merged into it where voc; the same dict on every process.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    results = detect(model, source, device, batch_size, workers, rank, world, progress)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = sorted((r for share in shares for r in share), key=lambda r: r["image_id"])
    metrics = coco_metrics(results, source.classes, source if hasattr(source, "dataset") else None)
    if voc:
        extra = voc_metrics(results, source.classes)
        rows = extra.pop("per_class")
        metrics = {**metrics, **extra}
        metrics["per_class"] = {name: {**row, **rows[name]} for name, row in metrics["per_class"].items()}
    return metrics


@torch.inference_mode()
def latency(model, source, device, autocast, images=20):
    """Milliseconds a detector takes for one image at batch 1, from pixels to boxes: the median over some images."""
    model.eval()
    seconds = []
    for index in range(min(images + 3, len(source))):
        batch, _ = to_device([source.load(0, index)[0]], [], device)
        started = time.perf_counter()
        with autocast:
            scores = model(batch)[0]["scores"]
        scores.cpu()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[3:] or seconds))  # the first are warm-up


def cost_of_distillation(step, teacher, loader, optimizer, machine):
    """How many plain steps a distillation step costs: a ratio of medians, the two kinds taking turns.

    Nothing is learnt in these steps: the run is over, and its weights are saved. What processes send each other is
    left out.

    Args:
        step: a tar.distill.Step.
        loader: of the batches to time, each once of both kinds.
        optimizer: of what the step trains; its learning rate is set to 0.

    Returns:
        the ratio, a float.
    """
    seconds = {True: [], False: []}
    step.train()
    step.adapters.requires_grad_(True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for batch in loader:
        images, targets = to_device(*batch, machine.device)
        for with_teacher in (True, False):
            machine.wait()
            started = time.perf_counter()
            with machine.autocast():
                detection, distillation, _ = step(images, targets, teacher if with_teacher else None)
            optimizer.zero_grad()
            sum([*detection.values(), *distillation.values()]).backward()
            optimizer.step()
            machine.wait()
            seconds[with_teacher].append(time.perf_counter() - started)
    return float(np.median(seconds[True]) / np.median(seconds[False]))
