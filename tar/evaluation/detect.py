"""Running a detector over a test source: its detections, and the figures of AP that they give."""

import torch
import torch.distributed as dist

from tar.data.loader import make_loader, test_batches, to_device
from tar.evaluation.average_precision import coco_metrics, voc_metrics


@torch.inference_mode()
def detect(model, source, device, batch_size=1, workers=0, rank=0, world=1, progress=iter):
    """Runs a detector over those images of a test source that fall to one process of several.

    Returns a list with a dict for each image: image_id; ground truth gt_boxes [N, 4], gt_labels [N], gt_ignored
    bool [N]; detections boxes [D, 4], labels [D], scores [D]. Numpy arrays; boxes are xyxy in pixels of the image.
    """
    was_training, results = model.training, []
    model.eval()
    batches = test_batches(len(source), batch_size, rank, world)
    for images, targets in progress(make_loader(source, False, batches, workers=workers)):
        for target, found in zip(targets, detections(model, images, device), strict=True):
            row = {f"gt_{key}": target[key] for key in ("boxes", "labels", "ignored")} | found
            results.append({"image_id": target["image_id"], **{key: value.numpy() for key, value in row.items()}})
    model.train(was_training)
    return results


@torch.inference_mode()
def detections(model, images, device="cpu", threshold=0.0):
    """A dict for each image uint8 [3, H, W]: its boxes [D, 4], labels [D] and scores [D] >= threshold, on the CPU."""
    found = model(to_device(images, [], device)[0])
    for each in found:
        kept = (each["labels"] > 0) & (each["scores"] >= threshold)  # torchvision's RetinaNet may find the background
        for key, value in each.items():
            each[key] = value[kept].cpu() if key == "labels" else value[kept].float().cpu()
    return found


def evaluate(model, source, device, voc=False, batch_size=1, workers=0, progress=iter, group=None):
    """The figures of a detector on a test source: those of coco_metrics(), and if voc also those of voc_metrics().

    With torch.distributed each process takes a part of the images, rank 0 computes the figures, and all return them.
    group: of the processes, for what they send one another; default: that of the gradients.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    results, metrics = detect(model, source, device, batch_size, workers, rank, world, progress), None
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(results, parts, 0, group)
        results = sorted((r for part in parts or () for r in part), key=lambda r: r["image_id"])
    if rank == 0:
        metrics = coco_metrics(results, source.classes, source if hasattr(source, "annotations") else None)
        if voc:
            extra = voc_metrics(results, source.classes)
            rows = {name: {**row, **extra["per_class"][name]} for name, row in metrics["per_class"].items()}
            metrics = {**metrics, **extra, "per_class": rows}
    if world > 1:
        box = [metrics]
        dist.broadcast_object_list(box, 0, group)
        [metrics] = box
    return metrics
