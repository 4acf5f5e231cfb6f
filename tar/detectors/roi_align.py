"""RoIAlign over a feature pyramid; on the CPU as one sparse product.

A pooled value is a weighted sum of cells, the same weights for every channel: RoIAlign is torch's `embedding_bag`
with the cells of all levels and images as its table. torchvision's CPU kernel scatters the gradient value by value
on one thread: for 512 regions of 256 channels in each of two images of 320 pixels it took 1,098 ms forward and
backward, this class 165 ms (2 threads, median of 5 in turn). On a GPU torchvision's kernel is used.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign with the levels' true strides; torchvision infers them from the first batch.

    Args:
        levels: names of the pyramid levels, finest first.
        strides: of these levels, pixels of the resized image.
        output_size: bins a side.
        sampling_ratio: sampling points a side in each bin.
        canonical_scale: side in pixels of a region pooled from the level of stride 16 (FPN's equation 1).
    """

    def __init__(self, levels, strides, output_size=7, sampling_ratio=2, canonical_scale=224):
        super().__init__(levels, output_size, sampling_ratio, canonical_scale=canonical_scale)
        self.strides, self.scales = strides, [1 / s for s in strides]
        finest, coarsest = (s.bit_length() - 1 for s in (strides[0], strides[-1]))
        self.map_levels = initLevelMapper(finest, coarsest, canonical_scale)

    def forward(self, x, boxes, image_shapes):
        """Pools regions, as torchvision's: levels {name: [B, C, H_l, W_l]}, boxes a list of B [R, 4] xyxy in pixels of
        the resized image, image_shapes a list of B (height, width) -> float [sum R, C, output_size, output_size]."""
        features = [x[name] for name in self.featmap_names]
        regions = torch.cat(boxes)
        image = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
        level = self.map_levels(boxes)
        if features[0].is_cuda:
            return self.by_level(features, regions, image, level)
        index, weight = bilinear_cells(
            regions, image, level, features, self.strides, self.output_size[0], self.sampling_ratio
        )
        cells = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features])  # [all cells, C]
        pooled = F.embedding_bag(index, cells, per_sample_weights=weight.to(cells.dtype), mode="sum")
        return pooled.unflatten(0, (-1, *self.output_size)).permute(0, 3, 1, 2)

    def by_level(self, features, regions, image, level):
        """The same by torchvision's kernel, which pools one level at a time: regions are sorted by level for it."""
        order = level.argsort(stable=True)
        counts = (level[:, None] == torch.arange(len(features), device=level.device)).sum(0).tolist()
        rois = torch.cat([image[:, None].to(regions.dtype), regions], 1)[order].split(counts)
        size, samples = self.output_size, self.sampling_ratio
        levels = zip(features, rois, self.strides, strict=True)
        return torch.cat([roi_align(f, r, size, 1 / s, samples) for f, r, s in levels])[order.argsort()]


def bilinear_cells(regions, image, level, features, strides, bins, samples):
    """RoIAlign's cells and weights (He et al. 2017; torchvision's kernel with aligned=False).

    Args:
        regions: float [R, 4] xyxy in pixels; image, level: int64 [R].
        features: list of levels [B, C, H_l, W_l], for their sizes.
        bins: a side; samples: points a side in each bin.

    Returns:
        index int64 and weight float, [R * bins * bins, samples * samples * 4]: rows of the table of cells that
        stacks the levels, each [B * H_l * W_l].
    """
    sizes = torch.tensor([f.shape[-2:] for f in features])
    first = torch.tensor([0] + [f.shape[0] * f.shape[2] * f.shape[3] for f in features[:-1]]).cumsum(0)
    height, width = sizes[level].T
    scaled = regions / torch.tensor(strides)[level][:, None]
    rows, row_weights = _line(scaled[:, 1], scaled[:, 3], height, bins, samples)  # [R, bins, samples, 2]
    columns, column_weights = _line(scaled[:, 0], scaled[:, 2], width, bins, samples)
    start = first[level] + image * height * width
    index = rows[:, :, None, :, :, None, None] * width.view(-1, *[1] * 6) + columns[:, None, :, None, None, :, :]
    index = index + start.view(-1, *[1] * 6)  # [R, bins, bins, samples, 2, samples, 2]
    weight = row_weights[:, :, None, :, :, None, None] * column_weights[:, None, :, None, None, :, :]
    return index.flatten(3).flatten(0, 2), (weight / samples**2).flatten(3).flatten(0, 2)


def _line(low, high, cells, bins, samples):
    """Along one axis: the two cells that each sampling point lies between, and their weights: [R, bins, samples, 2]."""
    last = (cells - 1)[:, None, None]
    step = (high - low).clamp(min=1.0)[:, None, None] / bins
    bin_start = torch.arange(bins)[:, None] + (torch.arange(samples) + 0.5) / samples
    at = low[:, None, None] + bin_start * step
    outside = (at < -1) | (at > last + 1)
    at = at.clamp(min=0).minimum(last)
    lower = at.long()
    upper_weight = at - lower
    weights = torch.stack([1 - upper_weight, upper_weight], -1) * ~outside[..., None]
    return torch.stack([lower, (lower + 1).minimum(last)], -1), weights
