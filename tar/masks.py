"""Where the backbone level imitates: a weight for every cell of every pyramid level (README, Backbone level)."""

import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou

MASKS = ("gaussian", "box", "full", "fine-grained")


def gaussian_mask(boxes, height, width, stride, sigma2=2.0):
    """The paper's Gaussian mask, sampled at the cell centres ((i + 0.5) * stride).

        M(x, y) = exp(-(x - x0)^2 / (s2 (w/2)^2) - (y - y0)^2 / (s2 (h/2)^2))  inside the box, 0 outside;

    the maximum where boxes overlap.

    Args:
        boxes: float [N, 4] xyxy in pixels of the resized image; N may be 0. Leading dimensions are kept.
        height, width: cells of the level.
        stride: pixels of the resized image from cell to cell.
        sigma2: s2, a choice: 2. With half a side as unit the variance is s2 / 2; in the middle of an edge M is 0.61.

    Returns:
        float [height, width] in 0..1.
    """
    if boxes.shape[-2] == 0:
        return boxes.new_zeros(*boxes.shape[:-2], height, width)
    return _gaussians(boxes, [(height, width)], [stride], sigma2)[0]


def box_mask(boxes, height, width, stride):
    """1 at the cell centres inside any box, 0 elsewhere; arguments as gaussian_mask."""
    return (gaussian_mask(boxes, height, width, stride, sigma2=float("inf")) > 0).to(boxes.dtype)


def _gaussians(boxes, sizes, strides, sigma2):
    """gaussian_mask() of all levels in one pass over the boxes (a Gaussian is one along x times one along y).

    Args:
        boxes: float [..., N, 4], N > 0; sizes: (height, width) of each level.

    Returns:
        list of L float [..., H_l, W_l].
    """
    profiles = []
    for axis in (0, 1):  # x, then y, at the cell centres of all levels one after the other
        cells = [size[1 - axis] for size in sizes]
        at = [(torch.arange(n, device=boxes.device) + 0.5) * stride for n, stride in zip(cells, strides, strict=True)]
        at, low, high = torch.cat(at).to(boxes.dtype), boxes[..., axis, None], boxes[..., axis + 2, None]
        centre, half = (low + high) / 2, (high - low) / 2
        inside = (at >= low) & (at <= high) & (half > 0)
        exponent = (at - centre).square() / (sigma2 * half.clamp(min=1e-6).square())
        profiles.append((torch.exp(-exponent) * inside).split(cells, -1))
    return [(y[..., :, None] * x[..., None, :]).amax(-3) for x, y in zip(*profiles, strict=True)]


def fine_grained_mask(boxes, anchors, sizes, share=0.5):
    """1 in the cells with an anchor near a ground-truth box, 0 elsewhere (Wang et al., CVPR 2019).

    An anchor is near a box if their IoU is above `share` times the best IoU that the box has with any anchor.

    Args:
        boxes: float [N, 4] xyxy in pixels of the resized image; N may be 0.
        anchors: float [A, 4] of all levels, level by level, row by row, a cell's anchors together.
        sizes: (height, width) of each level.

    Returns:
        list of L float [H_l, W_l].
    """
    cells = [height * width for height, width in sizes]
    near = boxes.new_zeros(sum(cells))
    if len(boxes):
        overlap = box_iou(boxes, anchors)
        best = overlap.amax(1, keepdim=True)
        near = (overlap > share * best).any(0).view(sum(cells), -1).any(1).to(boxes.dtype)
    return [m.view(size) for m, size in zip(near.split(cells), sizes, strict=True)]


def pyramid_masks(targets, features, strides, kind="gaussian", sigma2=2.0, anchors=None):
    """The masks of a batch.

    Args:
        targets: list of B dicts with boxes float [N, 4] xyxy in pixels of the resized image.
        features: list of L tensors [B, C, H_l, W_l], for their sizes.
        strides: of the L levels, pixels of the resized image.
        kind: one of MASKS: gaussian (the paper's), box (1 inside boxes), full (1 everywhere, the naive imitation),
            fine-grained (1 where anchors are near a box).
        anchors: for fine-grained: list of B float [A, 4].

    Returns:
        list of L tensors [B, H_l, W_l].
    """
    if kind == "fine-grained":
        sizes = [level.shape[-2:] for level in features]
        each = [fine_grained_mask(t["boxes"], grid, sizes) for t, grid in zip(targets, anchors, strict=True)]
        return [torch.stack(level) for level in zip(*each, strict=True)]
    boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)  # padded by boxes of no area, which weigh 0
    sizes = [tuple(level.shape[-2:]) for level in features]
    if kind == "full" or boxes.shape[1] == 0:
        return [boxes.new_full((len(targets), *size), float(kind == "full")) for size in sizes]
    levels = _gaussians(boxes, sizes, strides, sigma2 if kind == "gaussian" else float("inf"))
    return levels if kind == "gaussian" else [(level > 0).to(boxes.dtype) for level in levels]
