"""The adapters: they lead the student's features to the teacher's, where the backbone level compares them."""

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Conv2d):
    """A 3x3 convolution from the student's channels to the teacher's, of one level of the pyramid."""

    def __init__(self, channels, teacher_channels):
        super().__init__(channels, teacher_channels, 3, padding=1)

    def at(self, features, cells):
        """The convolution's answers in some cells only: their 3x3 neighbourhoods are the rows of one matrix product.

        Args:
            features: [B, C, H, W].
            cells: image, row and column of n cells, three int64 [n].

        Returns:
            [n, C']. Nine rows a cell are kept for the gradient (at most nine times the features, in the type of
            autocast), which adds the neighbours in that type: in bf16 it is off by 0.5% where the whole convolution's
            is by 0.3%.
        """
        image, row, column = cells
        device = features.device.type
        if torch.is_autocast_enabled(device):  # as autocast would, but before the neighbourhoods are made
            features = features.to(torch.get_autocast_dtype(device))
        padded = F.pad(features.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        height, width = padded.shape[1:3]
        corner = (image * height + row) * width + column
        square = torch.arange(3, device=corner.device)
        near = corner[:, None] + (square[:, None] * width + square).flatten()
        # embedding, for indexing's gradient takes six times as long
        rows = F.embedding(near, padded.flatten(0, 2)).flatten(1)
        return F.linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


def compared(adapters, features, teacher_features, masks, sparse):
    """What the backbone level compares.

    Args:
        adapters: of the L levels.
        features, teacher_features: lists of L tensors [B, C, H_l, W_l] and [B, C', H_l, W_l].
        masks: list of L tensors [B, H_l, W_l].
        sparse: work out only what lies under the mask; what does not weighs nothing. A third of the time on a CPU, of
            P2 with a mask over 28% of its cells (755 ms against 2,194, two images of 600 x 800 pixels, 256 channels,
            bf16, one thread, forward and backward). A GPU has to be waited for to count the cells.

    Returns:
        adapted float, wanted, masks: lists of L, each [B, C', H_l, W_l] and [B, H_l, W_l], or [n_l, C'] and [n_l].
    """
    if not sparse:
        return [adapt(f).float() for adapt, f in zip(adapters, features, strict=True)], teacher_features, masks
    cells = [mask.nonzero(as_tuple=True) for mask in masks]
    adapted = [adapt.at(f, c).float() for adapt, f, c in zip(adapters, features, cells, strict=True)]
    wanted = [t.permute(0, 2, 3, 1)[c] for t, c in zip(teacher_features, cells, strict=True)]
    return adapted, wanted, [mask[c] for mask, c in zip(masks, cells, strict=True)]
