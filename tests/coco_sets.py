"""Small data sets in COCO's format, and pycocotools' own figures for them."""

import contextlib
import io
import json

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SPARSE = ((90, "brush"), (1, "person"), (13, "sign"))  # (category id, name), not in the order of the ids
LABELS = {1: 1, 13: 2, 90: 3}
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def entry(number, width=40, height=30):
    return {"id": number, "file_name": f"{number:03d}.png", "width": width, "height": height}


def annotation(image_id, category_id, bbox, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def write_json(file, images, annotations=(), categories=SPARSE):
    categories = [{"id": number, "name": name} for number, name in categories]
    file.write_text(json.dumps({"images": images, "annotations": list(annotations), "categories": categories}))
    return file


def write_coco(folder, images, annotations=(), categories=SPARSE):
    """A file in COCO's format and beside it its images, each of the grey level of its id."""
    for image in images:
        level = (image["id"] % 256,) * 3
        Image.new("RGB", (image["width"], image["height"]), level).save(folder / image["file_name"])
    return write_json(folder / "set.json", images, annotations, categories)


def pycocotools_stats(file, found, only=None):
    """COCOeval's first six statistics, in percent, of an annotation file and detections; only: of one category."""
    (file.parent / "found.json").write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(file))
        run = COCOeval(ground_truth, ground_truth.loadRes(str(file.parent / "found.json")), "bbox")
        run.params.catIds = [only] if only else run.params.catIds
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if value < 0 else 100 * value for value in run.stats[:6]]


def results_of(source, found):
    """Results as detect() returns them, of detections in COCO's format."""
    results = []
    for index, image_id in enumerate(source.image_ids):
        rows = [row for row in found if row["image_id"] == image_id]
        gt_boxes, gt_labels, gt_ignored = source.boxes_of(index)
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        result = {"image_id": index, "gt_boxes": gt_boxes, "gt_labels": gt_labels, "gt_ignored": gt_ignored}
        result |= {"boxes": boxes, "labels": np.array([LABELS[row["category_id"]] for row in rows], dtype=np.int64)}
        results.append({**result, "scores": np.array([row["score"] for row in rows], dtype=np.float32)})
    return results
