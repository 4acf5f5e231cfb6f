"""Where the backbone level imitates: a weight for every cell of every pyramid level (METHOD section 2)."""

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
        sigma2: s2, the variance in units of the box's half sides squared (a choice: 2).

    Returns:
        float [height, width] in 0..1.
    """
    if boxes.shape[-2] == 0:
        return boxes.new_zeros(*boxes.shape[:-2], height, width)
    columns, rows = _profiles(boxes, height, width, stride, sigma2)
    return (rows[..., :, None] * columns[..., None, :]).amax(-3)


def box_mask(boxes, height, width, stride):
    """1 at the cell centres inside any box, 0 elsewhere; arguments as gaussian_mask."""
    return (gaussian_mask(boxes, height, width, stride, sigma2=float("inf")) > 0).to(boxes.dtype)


def _profiles(boxes, height, width, stride, sigma2):
    """The two factors of every box's Gaussian: along x float [..., N, width] and along y float [..., N, height]."""
    profiles = []
    for low, high, cells in ((boxes[..., 0], boxes[..., 2], width), (boxes[..., 1], boxes[..., 3], height)):
        at = (torch.arange(cells, device=boxes.device, dtype=boxes.dtype) + 0.5) * stride
        centre, half = (low + high)[..., None] / 2, (high - low)[..., None] / 2
        inside = (at >= low[..., None]) & (at <= high[..., None]) & (half > 0)
        exponent = (at - centre).square() / (sigma2 * half.clamp(min=1e-6).square())
        profiles.append(torch.exp(-exponent) * inside)
    return profiles


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
        near = ((overlap > share * best) & (best > 0)).any(0).view(sum(cells), -1).any(1).to(boxes.dtype)
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
    masks = []
    for level, stride in zip(features, strides, strict=True):
        height, width = level.shape[-2:]
        if kind == "full":
            masks.append(level.new_ones(len(targets), height, width))
        elif kind == "box":
            masks.append(box_mask(boxes, height, width, stride))
        else:
            masks.append(gaussian_mask(boxes, height, width, stride, sigma2))
    return masks
