"""The sparse RoIAlign against torchvision's own kernel."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from tar.detectors.roi_align import PyramidRoIAlign

NAMES, STRIDES, SHAPES = ("a", "b", "c", "d"), (4, 8, 16, 32), [(128, 192), (120, 160)]
SCALE = 32  # regions of 8 to 128 pixels meet all four levels
NONE = torch.zeros(0, 4)


def random_regions(seed, count=60):
    """Regions of 1/4 to 200 pixels, a quarter of them reaching far out of an image of 128 x 192."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=g, dtype=torch.float64) * torch.tensor([240.0, 180.0]) - 24
    half = torch.exp(torch.rand(count, 2, generator=g, dtype=torch.float64) * 6.7 - 1.4) / 2
    return torch.cat([centre - half, centre + half], 1)


ODD = [[10.0, 10, 10, 10], [10, 10, 10, 50], [30.1, 40.2, 30.3, 40.3]]  # no area, far smaller than a cell
ODD += [[0, 0, 192, 128], [-500, -400, -300, -200], [150, 100, 400, 300], [-90, 20, 60, 90]]  # whole image, outside
ODD += [[64, 32, 80, 48], [64, 32, 96, 64], [64, 32, 128, 96]]  # exactly where a level begins
ODD = torch.tensor(ODD, dtype=torch.float64)


def pooled(pool, regions, dtype):
    """Values, and the gradients of a random linear function of them by level."""
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, 128 // s, 192 // s, dtype=torch.float64).to(dtype) for s in STRIDES]
    x = {name: level.requires_grad_() for name, level in zip(NAMES, levels, strict=True)}
    out = pool(x, [r.to(dtype) for r in regions], SHAPES)
    (out * torch.randn(out.shape, dtype=torch.float64).to(dtype)).sum().backward()
    return out.detach(), [level.grad for level in levels]


@pytest.mark.parametrize(("samples", "dtype", "within"), [(1, torch.float64, 1e-9), (2, torch.float32, 1e-3)])
@pytest.mark.parametrize(
    "regions",
    [[random_regions(1), random_regions(2)], [ODD, ODD.flip(0)], [random_regions(3), NONE], [NONE, ODD], [NONE, NONE]],
    ids=["random", "odd", "none in the second image", "none in the first", "none"],
)
def test_values_and_gradients_are_torchvisions(regions, samples, dtype, within):
    ours = pooled(PyramidRoIAlign(NAMES, STRIDES, sampling_ratio=samples, canonical_scale=SCALE), regions, dtype)
    theirs = pooled(MultiScaleRoIAlign(NAMES, 7, samples, canonical_scale=SCALE), regions, dtype)
    assert ours[0].shape == (sum(map(len, regions)), 3, 7, 7) and ours[0].dtype == dtype
    torch.testing.assert_close(ours[0], theirs[0], rtol=within, atol=within)
    for mine, its in zip(ours[1], theirs[1], strict=True):
        assert (its.abs().max() > 0) == (len(ours[0]) > 0)  # every level is pooled from
        torch.testing.assert_close(mine, its, rtol=within, atol=10 * within)


def test_levels_are_those_of_fpns_equation():
    """k = floor(4 + log2(side / 224)), level k of stride 2^k: 224 pixels are pooled from stride 16."""
    sides = torch.tensor([0.0, 10.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    regions = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], 1)
    assert PyramidRoIAlign(NAMES, STRIDES).map_levels([regions]).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_narrow_first_image_does_not_decide_the_strides():
    """torchvision guesses the strides from the padded size of the first batch, and keeps them."""
    random = torch.Generator().manual_seed(0)
    pool, guessing = PyramidRoIAlign(NAMES, STRIDES, canonical_scale=SCALE), MultiScaleRoIAlign(NAMES, 7, 2)
    for shape in ((40, 1000), (128, 192)):
        padded = [-(-side // 32) * 32 for side in shape]
        sizes = [[side // stride for side in padded] for stride in STRIDES]
        levels = [torch.randn(1, 3, *size, generator=random, dtype=torch.float64) for size in sizes]
        x, regions = dict(zip(NAMES, levels, strict=True)), [random_regions(5).clamp(min=0)]
        expected, level = pool(x, regions, [shape]), pool.map_levels(regions)
        by_level = pool.by_level(levels, regions[0], torch.zeros(60, dtype=torch.long), level)  # as on a GPU
        torch.testing.assert_close(by_level, expected)
        exported = MultiScaleRoIAlign.forward(pool, x, regions, [shape])  # torchvision's class with our strides
        torch.testing.assert_close(exported, expected)
        guessing(x, regions, [shape])
    assert guessing.scales != pool.scales and set(level.tolist()) == {0, 1, 2, 3}
