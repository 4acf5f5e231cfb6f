"""The classification and the regression level: losses and gates against loops in plain Python."""

from functools import partial

import pytest
import torch
from by_hand import cross_entropy, drawn, drawn_boxes, iou, is_open, smooth_l1
from torchvision.models.detection._utils import BoxCoder

from tar.method.classification_level import better_gate, classification_loss
from tar.method.regression_level import is_nearer, paired_iou, regression_gate, regression_loss

K = torch.tensor(7.0, dtype=torch.float64)


@pytest.mark.parametrize("weights", [[1] * 6, [1, 0, 0, 1, 1, 0], [1, 1.5, 1.5, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_l_cls_is_the_cross_entropy_of_the_weighted_regions(sigmoid, weights):
    student, teacher = drawn(2, 6, 5, scale=2)
    regions = zip(weights, student.tolist(), teacher.tolist(), strict=True)
    total = sum(weight * cross_entropy(s, t, sigmoid) for weight, s, t in regions)
    of_regions = None if all(w == 1 for w in weights) else torch.tensor(weights, dtype=torch.float64)
    loss = partial(classification_loss, teacher_logits=teacher, count=K, region_weights=of_regions, sigmoid=sigmoid)
    assert loss(student).item() == pytest.approx(total / 7, rel=1e-12)
    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_l_reg_is_smooth_l1_of_the_deltas_where_the_gate_is_open():
    student, teacher = drawn(2, 8, 4, scale=0.15)
    gate = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()
    near = (student - teacher).abs() < 1 / 9
    assert near.any() and not near.all()  # both branches are met
    regions = zip(gate.tolist(), student.tolist(), teacher.tolist(), strict=True)
    total = sum(v * smooth_l1(s, t) for v, s, t in regions)
    loss = partial(regression_loss, teacher_deltas=teacher, gate=gate, count=K)
    assert loss(student).item() == pytest.approx(total / 7, rel=1e-12)
    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    loss(student).backward()
    assert ((student.grad != 0) == gate[:, None]).all()


@pytest.mark.parametrize("loss", [classification_loss, partial(classification_loss, sigmoid=True), regression_loss])
def test_no_positives_give_zero_and_a_gradient(loss):
    student, kept, one = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.bool), torch.tensor(1.0)
    value = loss(student, torch.zeros(0, 4), *((kept, one) if loss is regression_loss else (one, kept)))
    value.backward()
    assert value.item() == 0 and student.grad.shape == (0, 4)


@pytest.mark.parametrize("kind", ["proposal", "student", "none"])
def test_the_regression_gate_is_the_equation(kind):
    region, (student, teacher, shift, jitter) = drawn_boxes(60, 1, 40), drawn(4, 60, 4)
    rows = student, teacher, region, region + shift.abs(), region + 4 * jitter
    expected = [is_open(kind, *row) for row in zip(*(x.tolist() for x in rows), strict=True)]
    assert any(expected) and (kind == "none" or not all(expected))
    assert regression_gate(kind, BoxCoder((10.0, 10.0, 5.0, 5.0)), *rows).tolist() == expected


def test_equals_and_no_regions_do_not_open_a_gate():
    near, far, gt = [11.0, 10, 30, 30], [15.0, 15, 35, 35], [10.0, 10, 30, 30]
    teacher, reference = torch.tensor([near, far, near, gt]), torch.tensor([far, near, near, gt])
    assert is_nearer(teacher, reference, torch.tensor([gt] * 4)).tolist() == [True, False, False, False]
    assert is_nearer(*[torch.zeros(0, 4)] * 3).shape == (0,)
    logits = drawn(3, 4)
    assert better_gate(logits, logits.clone(), torch.tensor([0, 1, 2])).tolist() == [False] * 3
    assert better_gate(logits[:0], logits[:0], torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_paired_iou_is_the_definition():
    a, b = drawn_boxes(200, 3), drawn_boxes(200, 13)
    a[0] = b[0] = torch.tensor([5.0, 5.0, 5.0, 5.0])  # an empty union
    expected = [iou(*boxes) for boxes in zip(a.tolist(), b.tolist(), strict=True)]
    assert 0 in expected and max(expected) > 0.3
    assert paired_iou(a, b).tolist() == pytest.approx(expected, rel=1e-12)
