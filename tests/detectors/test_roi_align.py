"""The sparse RoIAlign against torchvision's own kernel."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from tar.detectors.roi_align import PyramidRoIAlign, pyramid_level

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


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "regions",
    [
        pytest.param([random_regions(1), random_regions(2)], id="random"),
        pytest.param([ODD, ODD.flip(0)], id="odd"),
        pytest.param([random_regions(3), torch.zeros(0, 4)], id="second image without regions"),
        pytest.param([torch.zeros(0, 4), random_regions(4)], id="first image without regions"),
    ],
)
def test_values_and_gradients_are_torchvisions(regions, samples):
    ours = pooled(PyramidRoIAlign(NAMES, STRIDES, sampling_ratio=samples, canonical_scale=SCALE), regions)
    theirs = pooled(MultiScaleRoIAlign(NAMES, 7, samples, canonical_scale=SCALE), regions)
    assert ours[0].shape == (sum(map(len, regions)), 3, 7, 7)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
    for mine, its in zip(ours[1], theirs[1], strict=True):
        assert its.abs().max() > 0  # every level is pooled from
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_values_are_torchvisions_in_single_precision():
    regions = [random_regions(5), random_regions(6)]
    ours = pooled(PyramidRoIAlign(NAMES, STRIDES, canonical_scale=SCALE), regions, torch.float32)
    theirs = pooled(MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=SCALE), regions, torch.float32)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)


def test_no_regions_at_all():
    x = features()
    out = PyramidRoIAlign(NAMES, STRIDES)(x, [torch.zeros(0, 4, dtype=torch.float64)] * 2, SHAPES)
    assert out.shape == (0, 3, 7, 7)
    out.sum().backward()
    assert all((level.grad == 0).all() for level in x.values())


def test_levels_are_those_of_fpns_equation():
    """k = floor(4 + log2(side / 224)), level k of stride 2^k: 224 pixels are pooled from stride 16."""
    sides = torch.tensor([0.0, 10.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    regions = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], 1)
    assert pyramid_level(regions, STRIDES).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
