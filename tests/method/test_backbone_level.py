"""The backbone level's parts: masks and loss against loops in plain Python, sparse adapters against dense ones."""

import math

import pytest
import torch
from by_hand import backbone_by_hand, drawn, drawn_boxes, fine_grained_by_hand, mask_by_hand

from tar.method.backbone_level import (
    Adapter,
    adapted_features,
    backbone_loss,
    backbone_normalizer,
    fine_grained_mask,
    gaussian_mask,
    pyramid_masks,
)

SIZES = [(9, 12), (5, 6), (1, 1)]  # of the levels


def test_gaussian_mask_has_the_values_done_by_hand():
    box = torch.tensor([[4.0, 4.0, 36.0, 20.0]])  # centre (20, 12): that of cell (1, 2); half sides 16 and 8
    mask = gaussian_mask(box, 4, 6, 8)
    assert mask[1, 2] == 1
    assert mask[1, 1].item() == pytest.approx(math.exp(-(8**2) / (2 * 16**2)))  # 8 pixels beside the centre
    assert mask[0, 2].item() == pytest.approx(math.exp(-0.5))  # on the upper edge
    assert mask[0, 0].item() == pytest.approx(math.exp(-1.0))  # on the corner
    assert mask[1, 5] == 0 and mask[3, 2] == 0  # outside
    assert gaussian_mask(box, 4, 6, 8, 8.0)[1, 0].item() == pytest.approx(math.exp(-1 / 8))


def test_no_boxes_and_boxes_without_area_or_cell_give_zeros():
    between = [5.0, 5.0, 11.0, 11.0]  # between the centres 4 and 12
    flat = [12.0, 12.0, 12.0, 12.0], [12.0, 0.0, 12.0, 32.0], [0.0, 12.0, 32.0, 12.0]  # on the centre 12
    for boxes in ([], [between], *[[box] for box in flat]):
        assert gaussian_mask(torch.tensor(boxes).view(-1, 4), 4, 5, 8).tolist() == [[0.0] * 5] * 4


@pytest.mark.parametrize("kind", ["gaussian", "box", "full"])
def test_masks_of_a_batch_whose_second_image_has_no_boxes(kind):
    boxes, sizes = drawn_boxes(5, seed=7, side=64), ((8, 16), (4, 8))
    boxes[3, 2:] = boxes[3, :2]  # without area
    targets, features = [{"boxes": boxes}, {"boxes": boxes[:0]}], [torch.zeros(2, 5, *size) for size in sizes]
    masks = pyramid_masks(targets, features, (8, 16), kind, sigma2=1.5)
    boxless = pyramid_masks(targets[1:], [f[:1] for f in features], (8, 16), kind)
    for mask, empty, size, stride in zip(masks, boxless, sizes, (8, 16), strict=True):
        expected = [mask_by_hand(rows, *size, stride, 1.5, kind) for rows in (boxes.tolist(), [])]
        torch.testing.assert_close(mask, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        assert torch.equal(empty[0], mask[1])
        if kind == "gaussian":
            assert torch.equal(gaussian_mask(boxes, *size, stride, 1.5), mask[0])


@pytest.mark.parametrize("part", [0.5, 0.8])
def test_fine_grained_mask_is_the_definition(part):
    sizes = [(4, 6), (2, 3)]
    for seed in range(3):
        boxes, anchors = drawn_boxes(3, seed, least=4), drawn_boxes(3 * 30, seed + 9, 90, 4)
        expected = fine_grained_by_hand(boxes.tolist(), anchors.tolist(), 3, part)
        assert 0 < sum(expected) < 30
        levels = fine_grained_mask(boxes, anchors, sizes, part)
        assert [tuple(m.shape) for m in levels] == sizes
        assert torch.cat([m.flatten() for m in levels]).tolist() == expected


def test_fine_grained_mask_leaves_out_half_of_the_best_and_boxes_that_no_anchor_meets():
    far, whole, half, more = [90.0, 90, 99, 99], [0.0, 0, 8, 8], [0.0, 0, 8, 4], [0.0, 0, 8, 5]
    anchors = torch.tensor([far, half, more, far, whole, far, far, far])  # two a cell
    assert fine_grained_mask(torch.tensor([whole]), anchors, [(2, 2)])[0].tolist() == [[0, 1], [1, 0]]
    assert fine_grained_mask(torch.tensor([[40.0, 40, 50, 50]]), anchors, [(2, 2)])[0].tolist() == [[0, 0], [0, 0]]
    assert fine_grained_mask(torch.zeros(0, 4), anchors, [(1, 1), (1, 3)])[1].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("norm", ["energy", "cells"])
def test_the_loss_is_the_equation_and_its_gradient_that_of_finite_differences(norm):
    student, teacher = ([drawn(2, 3, *size, seed=seed) for size in SIZES[1:]] for seed in (1, 2))
    masks = [drawn(2, *size, seed=3).abs() for size in SIZES[1:]]
    expected, below = backbone_by_hand(*([x.tolist() for x in levels] for levels in (student, teacher, masks)), norm)
    normalizer = backbone_normalizer(teacher, masks, norm)
    assert normalizer.item() == pytest.approx(below, rel=1e-12)
    assert backbone_loss(student, teacher, masks, normalizer).item() == pytest.approx(expected, rel=1e-12)
    inputs = [s.requires_grad_() for s in student]
    assert torch.autograd.gradcheck(lambda *s: backbone_loss(s, teacher, masks, normalizer), inputs)


def test_the_cells_under_the_mask_give_the_loss_and_the_gradients_of_all_cells():
    torch.manual_seed(0)
    adapters = [Adapter(4, 6).double() for _ in SIZES]
    features = [drawn(2, 4, *size).requires_grad_() for size in SIZES]
    taught = [drawn(2, 6, *size, seed=1) for size in SIZES]
    masks = [torch.rand(2, *size, dtype=torch.float64) * (torch.rand(2, *size) < 0.4) for size in SIZES]
    masks[0][0, 0, 0] = masks[0][1, -1, -1] = 0.7  # the corners: their neighbours lie outside
    masks[1][1] = 0  # an image without a box
    masks[2][:] = 0  # a level without a cell
    inputs, losses, found = [*features, *(p for a in adapters for p in a.parameters())], [], []
    for sparse in (False, True):
        mine, wanted, where = adapted_features(adapters, features, taught, masks, sparse)
        losses.append(backbone_loss(mine, wanted, where, backbone_normalizer(wanted, where)))
        found.append(torch.autograd.grad(losses[-1], inputs, allow_unused=False))
    for a, t, m, mask in zip(mine, wanted, where, masks, strict=True):  # the last were sparse: no other cell
        assert a.shape == t.shape == (int((mask > 0).sum()), 6) and torch.equal(m, mask[mask > 0])
    assert losses[0] > 0 and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert any(g.abs().max() > 0 for g in found[0])
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_cells_add_up_to_the_same_bits_with_several_threads(dtype):
    torch.manual_seed(0)
    adapter, cells = Adapter(8, 8).to(dtype), torch.ones(2, 60, 60).nonzero(as_tuple=True)
    features = torch.randn(2, 8, 60, 60).to(dtype).requires_grad_()
    weight, threads, gradients = torch.randn(7200, 8).to(dtype), torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        for _ in range(5):
            gradients += torch.autograd.grad((adapter.in_cells(features, cells) * weight).sum(), features)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, gradients[0]) for g in gradients)
