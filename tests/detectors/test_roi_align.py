"""The sparse RoIAlign against torchvision's own kernel."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from tar.detectors.roi_align import PyramidRoIAlign

NAMES, STRIDES, SHAPES = ("a", "b", "c", "d"), (4, 8, 16, 32), [(128, 192), (120, 160)]
SCALE = 32  # regions of 8 to 128 pixels meet all four levels


def random_regions(seed, count=60):
    """Regions of 1/4 to 200 pixels, a quarter of them reaching far out of an image of 128 x 192."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=g, dtype=torch.float64) * torch.tensor([240.0, 180.0]) - 24
    half = torch.exp(torch.rand(count, 2, generator=g, dtype=torch.float64) * 6.7 - 1.4) / 2
    return torch.cat([centre - half, centre + half], 1)


ODD = torch.tensor(
    [
        [10.0, 10.0, 10.0, 10.0],  # no area
        [10.0, 10.0, 10.0, 50.0],
        [30.1, 40.2, 30.3, 40.3],  # far smaller than a cell
        [0.0, 0.0, 192.0, 128.0],  # the whole image
        [-500.0, -400.0, -300.0, -200.0],  # outside
        [150.0, 100.0, 400.0, 300.0],  # mostly outside
        [-90.0, 20.0, 60.0, 90.0],
        [64.0, 32.0, 80.0, 48.0],  # exactly where a level begins
        [64.0, 32.0, 96.0, 64.0],
        [64.0, 32.0, 128.0, 96.0],
    ],
    dtype=torch.float64,
)


def features(dtype=torch.float64, channels=3):
    g = torch.Generator().manual_seed(0)
    sizes = [(128 // s, 192 // s) for s in STRIDES]
    return {
        name: torch.randn(2, channels, *size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for name, size in zip(NAMES, sizes, strict=True)
    }


def pooled(pool, regions, dtype=torch.float64):
    """Values, and the gradients of a random linear function of them by level."""
    x = features(dtype)
    out = pool(x, [r.to(dtype) for r in regions], SHAPES)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (out * weight).sum().backward()
    return out.detach(), [level.grad for level in x.values()]


@pytest.mark.parametrize(("samples", "dtype", "within"), [(1, torch.float64, 1e-9), (2, torch.float32, 1e-3)])
@pytest.mark.parametrize(
    "regions",
    [
        pytest.param([random_regions(1), random_regions(2)], id="random"),
        pytest.param([ODD, ODD.flip(0)], id="odd"),
        pytest.param([random_regions(3), torch.zeros(0, 4)], id="second image without regions"),
        pytest.param([torch.zeros(0, 4), random_regions(4)], id="first image without regions"),
        pytest.param([torch.zeros(0, 4), torch.zeros(0, 4)], id="no regions"),
    ],
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
