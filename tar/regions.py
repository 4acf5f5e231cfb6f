"""Regions, and what a Faster R-CNN says of them, in the steps of torchvision's; counts over all processes."""

import torch
import torch.distributed as dist
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_iou


def region_proposals(rpn, images, features, targets):
    """A training student's proposals and the RPN's ordinary losses, in the steps of torchvision's RPN.

    Returns:
        list of B float [R, 4] xyxy; {name: scalar}.
    """
    maps = list(features.values())
    objectness, deltas = rpn.head(maps)
    anchors = rpn.anchor_generator(images, maps)
    anchors_per_level = [o[0].numel() for o in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    boxes = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(boxes, objectness, images.image_sizes, anchors_per_level)
    labels, truth = rpn.assign_targets_to_anchors(anchors, targets)
    losses = rpn.compute_loss(objectness, deltas, labels, rpn.box_coder.encode(truth, anchors))
    size, most = rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction
    positives = [(y >= 1).sum().clamp(max=int(size * most)) for y in labels]
    sampled = sum(p + torch.minimum((y == 0).sum(), size - p) for y, p in zip(labels, positives, strict=True))
    share = share_of_batch(sampled)
    return proposals, {"loss_objectness": losses[0] * share, "loss_rpn_box_reg": losses[1] * share}


def box_head(model, features, regions, image_sizes):
    """A Faster R-CNN's answers for given regions.

    Args:
        model: teacher or student.
        features: its own pyramid, OrderedDict of [B, C, H_l, W_l].
        regions: list of B float [R, 4] xyxy in pixels of the resized image.
        image_sizes: list of B (height, width) of the resized images.

    Returns:
        class logits [B * R, classes + 1]; box deltas [B * R, 4 * (classes + 1)].
    """
    heads = model.roi_heads
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, image_sizes)))


def nearest_proposals(proposals, teacher_proposals, targets, least=0.5):
    """`--no-sharing`: of each model's own proposals the one that overlaps a ground-truth box best.

    Args:
        proposals, teacher_proposals: lists of B float [R, 4] xyxy, before the ground truth is mixed in.
        targets: list of B dicts with boxes [N, 4] and labels [N].
        least: a box that the student's best proposal overlaps less is left out.

    Returns:
        lists of B: the student's regions [M, 4], the teacher's [M, 4], labels [M], ground-truth boxes [M, 4].
    """
    rows = []
    for own, taught, target in zip(proposals, teacher_proposals, targets, strict=True):
        truth, labels = target["boxes"], target["labels"]
        if not len(own) or not len(taught):
            truth, labels = truth[:0], labels[:0]
        if not len(truth):
            rows.append((truth, truth, labels, truth))
            continue
        overlap, best = box_iou(truth, own).max(1)
        near = overlap >= least
        rows.append((own[best][near], taught[box_iou(truth, taught).argmax(1)][near], labels[near], truth[near]))
    return tuple(map(list, zip(*rows, strict=True)))


def anchor_generator(model):
    """A detector's own anchor generator."""
    return model.anchor_generator if isinstance(model, RetinaNet) else model.rpn.anchor_generator


def of_class(deltas, label):
    """Each region's four deltas of its own class: [P, 4 * (classes + 1)], int [P] -> [P, 4]."""
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(label), device=label.device), label]


def boxes_of(target, matched_idxs):
    """The ground-truth box that each region is matched to; in an image without boxes zeros (no region is positive)."""
    boxes = target["boxes"]
    return boxes[matched_idxs] if len(boxes) else boxes.new_zeros(len(matched_idxs), 4)


def share_of_batch(count):
    """What turns a mean over this process's samples into its share of the mean over all processes'; 1 for one alone.

    Torchvision's losses of Faster R-CNN are such means; RetinaNet's are means over images, of which all have as many.
    """
    return count / over_processes(count, least=1.0) if dist.is_initialized() else 1.0


def over_processes(count, least=0.0):
    """A count summed over all processes, at least `least`, divided by their number.

    DDP averages the gradients of N processes; each process's sum over (total / N) therefore gives the gradient of
    one process with the whole batch.
    """
    count = count.detach().clone()
    count = count if count.is_floating_point() else count.float()
    world = 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    return count.clamp(min=least) / world
