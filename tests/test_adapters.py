"""The adapters in the cells under the mask, against the whole convolution."""

import pytest
import torch

from tar.adapters import Adapter, compared
from tar.losses import backbone_loss

SIZES = [(9, 12), (5, 6), (1, 1)]


def drawn(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    adapters = [Adapter(4, 6).to(dtype) for _ in SIZES]
    features = [torch.randn(2, 4, *size, dtype=dtype, requires_grad=True) for size in SIZES]
    taught = [torch.randn(2, 6, *size, dtype=dtype) for size in SIZES]
    masks = [torch.rand(2, *size, dtype=dtype) * (torch.rand(2, *size) < 0.4) for size in SIZES]
    masks[0][0, 0, 0] = masks[0][1, -1, -1] = 0.7  # the corners: their neighbours lie outside
    masks[1][1] = 0  # an image without a box
    masks[2][:] = 0  # a level without a cell
    return adapters, features, taught, masks


def loss_and_gradients(sparse, given):
    adapters, features, taught, masks = given
    mine, wanted, where = compared(adapters, features, taught, masks, sparse)
    loss = backbone_loss(mine, wanted, where, sum(m.sum() for m in masks))
    inputs = [*features, *(p for a in adapters for p in a.parameters())]
    return loss, torch.autograd.grad(loss, inputs, allow_unused=False)


@pytest.mark.parametrize("seed", range(3))
def test_cells_under_the_mask_give_the_loss_and_the_gradients_of_all(seed):
    given = drawn(seed)
    dense, dense_gradients = loss_and_gradients(False, given)
    sparse, sparse_gradients = loss_and_gradients(True, given)
    assert dense > 0 and torch.allclose(dense, sparse.to(dense.dtype), rtol=1e-6)
    assert any(g.abs().max() > 0 for g in dense_gradients)
    for a, b in zip(dense_gradients, sparse_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


def test_only_the_cells_asked_for_are_worked_out():
    adapters, features, taught, masks = drawn()
    mine, wanted, where = compared(adapters, features, taught, masks, True)
    for a, t, m, mask in zip(mine, wanted, where, masks, strict=True):
        assert a.shape == t.shape == (int((mask > 0).sum()), 6) and torch.equal(m, mask[mask > 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_cells_add_up_to_the_same_bits_with_several_threads(dtype):
    torch.manual_seed(0)
    adapter, cells = Adapter(8, 8).to(dtype), torch.ones(2, 60, 60).nonzero(as_tuple=True)
    features = torch.randn(2, 8, 60, 60).to(dtype).requires_grad_()
    weight, threads = torch.randn(7200, 8).to(dtype), torch.get_num_threads()
    gradients = []
    try:
        torch.set_num_threads(4)
        for _ in range(5):
            gradients += torch.autograd.grad((adapter.at(features, cells) * weight).sum(), features)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_under_autocast_the_gradient_is_as_coarse_as_bf16():
    torch.manual_seed(0)
    adapter, features = Adapter(16, 16), torch.randn(2, 16, 12, 12, requires_grad=True)
    cells, weight = torch.ones(2, 12, 12).nonzero(as_tuple=True), torch.randn(288, 16)
    exact = torch.autograd.grad((adapter.at(features, cells) * weight).sum(), features)[0]
    with torch.autocast("cpu", torch.bfloat16):
        answers = adapter.at(features, cells)
        whole = adapter(features)
    assert answers.dtype == whole.dtype == torch.bfloat16
    coarse = torch.autograd.grad((answers * weight).sum(), features)[0]
    dense = torch.autograd.grad((whole.permute(0, 2, 3, 1).flatten(0, 2) * weight).sum(), features)[0]
    off = [((g - exact).norm() / exact.norm()).item() for g in (coarse, dense)]
    assert off[1] < off[0] < 0.01
