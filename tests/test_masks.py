"""The masks of the backbone level against README, Backbone level, written out cell by cell."""

import math

import pytest
import torch

from tar.masks import box_mask, gaussian_mask, pyramid_masks


def expected_mask(boxes, height, width, stride, sigma2):
    """The equation of README, Backbone level in plain Python: list of rows."""
    mask = [[0.0] * width for _ in range(height)]
    for x0, y0, x1, y1 in boxes:
        centre_x, centre_y, half_width, half_height = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
        for i in range(height):
            for j in range(width):
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                if x0 <= x <= x1 and y0 <= y <= y1:
                    value = math.exp(
                        -((x - centre_x) ** 2) / (sigma2 * half_width**2)
                        - (y - centre_y) ** 2 / (sigma2 * half_height**2)
                    )
                    mask[i][j] = max(mask[i][j], value)
    return mask


def random_boxes(seed, count, side):
    corners = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * side
    return torch.cat([corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])], 1)


@pytest.mark.parametrize("sigma2", [0.5, 2.0, 3.7])
@pytest.mark.parametrize(("height", "width", "stride"), [(12, 16, 8), (24, 32, 4), (3, 4, 32)])
def test_gaussian_mask_is_the_equation_on_random_boxes(height, width, stride, sigma2):
    for seed in range(3):
        boxes = random_boxes(seed, 5, 128)
        expected = torch.tensor(expected_mask(boxes.tolist(), height, width, stride, sigma2), dtype=torch.float64)
        assert expected.max() > 0
        torch.testing.assert_close(gaussian_mask(boxes, height, width, stride, sigma2), expected, rtol=1e-12, atol=0)


def test_gaussian_mask_has_the_values_done_by_hand():
    box = torch.tensor([[4.0, 4.0, 36.0, 20.0]])  # centre (20, 12): that of cell (1, 2); half sides 16 and 8
    mask = gaussian_mask(box, 4, 6, 8)
    assert mask[1, 2] == 1
    assert mask[1, 1].item() == pytest.approx(math.exp(-(8**2) / (2 * 16**2)))  # 8 pixels beside the centre
    assert mask[0, 2].item() == pytest.approx(math.exp(-0.5))  # on the upper edge
    assert mask[0, 0].item() == pytest.approx(math.exp(-1.0))  # on the corner
    assert mask[1, 5] == 0 and mask[3, 2] == 0  # outside


def test_sigma2_widens_the_gaussian():
    box = torch.tensor([[4.0, 4.0, 36.0, 20.0]])
    for sigma2 in (0.5, 1.0, 8.0):
        assert gaussian_mask(box, 4, 6, 8, sigma2)[1, 0].item() == pytest.approx(math.exp(-1 / sigma2))


def test_the_maximum_counts_where_boxes_overlap():
    wide, tall = [4.0, 4.0, 36.0, 20.0], [12.0, 0.0, 28.0, 32.0]
    apart = [torch.tensor(expected_mask([box], 4, 6, 8, 2.0)) for box in (wide, tall)]
    both = gaussian_mask(torch.tensor([wide, tall]), 4, 6, 8)
    assert (apart[0] > apart[1]).any() and (apart[1] > apart[0]).any() and ((apart[0] > 0) & (apart[1] > 0)).any()
    torch.testing.assert_close(both, apart[0].maximum(apart[1]))


@pytest.mark.parametrize("mask", [gaussian_mask, box_mask])
def test_no_boxes_give_zeros(mask):
    assert mask(torch.zeros(0, 4), 3, 5, 8).tolist() == [[0.0] * 5] * 3


@pytest.mark.parametrize("mask", [gaussian_mask, box_mask])
def test_a_box_that_covers_no_cell_centre_gives_zeros(mask):
    box = torch.tensor([[5.0, 5.0, 11.0, 11.0]])  # between the centres 4 and 12
    assert mask(box, 4, 4, 8).tolist() == [[0.0] * 4] * 4


@pytest.mark.parametrize("mask", [gaussian_mask, box_mask])
@pytest.mark.parametrize("box", [[12.0, 12.0, 12.0, 12.0], [12.0, 0.0, 12.0, 32.0], [0.0, 12.0, 32.0, 12.0]])
def test_a_box_without_area_gives_zeros_even_on_a_cell_centre(mask, box):
    assert mask(torch.tensor([box]), 4, 4, 8).tolist() == [[0.0] * 4] * 4


def test_a_box_without_area_leaves_its_neighbours_alone():
    solid, flat = [4.0, 4.0, 36.0, 20.0], [12.0, 12.0, 12.0, 12.0]
    expected = torch.tensor(expected_mask([solid], 4, 6, 8, 2.0))
    torch.testing.assert_close(gaussian_mask(torch.tensor([flat, solid]), 4, 6, 8), expected)


def test_box_mask_is_one_inside_boxes():
    boxes = torch.tensor([[0.0, 0.0, 13.0, 5.0], [19.0, 11.0, 40.0, 32.0]])  # cell centres at 4, 12, 20, 28
    assert box_mask(boxes, 4, 4, 8).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


class TestPyramid:
    """A batch of two images, the second without boxes, on two levels."""

    boxes = random_boxes(7, 3, 64)
    targets = ({"boxes": boxes}, {"boxes": torch.zeros(0, 4, dtype=torch.float64)})
    features = (torch.zeros(2, 5, 8, 16, dtype=torch.float64), torch.zeros(2, 5, 4, 8, dtype=torch.float64))
    strides = (8, 16)

    def test_gaussian_masks_hold_each_level_and_image(self):
        masks = pyramid_masks(self.targets, self.features, self.strides, "gaussian", sigma2=1.5)
        assert [tuple(m.shape) for m in masks] == [(2, 8, 16), (2, 4, 8)]
        for mask, (height, width), stride in zip(masks, ((8, 16), (4, 8)), self.strides, strict=True):
            expected = torch.tensor(expected_mask(self.boxes.tolist(), height, width, stride, 1.5), dtype=torch.float64)
            assert expected.sum() > 0
            torch.testing.assert_close(mask[0], expected)
            assert (mask[1] == 0).all()

    def test_box_masks_are_one_where_the_gaussian_is_not_zero(self):
        masks = pyramid_masks(self.targets, self.features, self.strides, "box")
        for mask, (height, width), stride in zip(masks, ((8, 16), (4, 8)), self.strides, strict=True):
            expected = torch.tensor(expected_mask(self.boxes.tolist(), height, width, stride, 2.0), dtype=torch.float64)
            assert mask[0].tolist() == (expected > 0).double().tolist()
            assert (mask[1] == 0).all()

    def test_full_masks_are_one_everywhere_even_without_boxes(self):
        masks = pyramid_masks(self.targets, self.features, self.strides, "full")
        assert [tuple(m.shape) for m in masks] == [(2, 8, 16), (2, 4, 8)]
        assert all((m == 1).all() for m in masks)

    def test_a_batch_without_any_box_gives_zeros(self):
        masks = pyramid_masks(self.targets[1:], [f[:1] for f in self.features], self.strides)
        assert [m.sum().item() for m in masks] == [0, 0]
