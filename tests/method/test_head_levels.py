"""The classification and the regression level: losses and gates against loops in plain Python."""

import math
from functools import partial

import pytest
import torch
from by_hand import decode, iou, sigmoid, smooth_l1, softmax
from torchvision.models.detection._utils import BoxCoder

from tar.method.classification_level import better_gate, classification_loss
from tar.method.regression_level import is_nearer, paired_iou, regression_gate, regression_loss

K = torch.tensor(7.0, dtype=torch.float64)


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def drawn_boxes(count, seed):
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 40
    sides = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * 40 + 1
    return torch.cat([corners, corners + sides], 1)


class TestClassification:
    student, teacher = drawn(6, 5, seed=1, scale=2), drawn(6, 5, seed=2, scale=2)

    @pytest.mark.parametrize("kept", [None, [1, 0, 0, 1, 1, 0], [1, 1.5, 1.5, 1, 0, 1]])
    @pytest.mark.parametrize("form", ["softmax", "sigmoid"])
    def test_it_is_the_cross_entropy_of_the_kept_regions(self, form, kept):
        total = 0.0
        for s, t, weight in zip(self.student.tolist(), self.teacher.tolist(), kept or [1] * 6, strict=True):
            if form == "softmax":
                total -= weight * sum(p * math.log(q) for p, q in zip(softmax(t), softmax(s), strict=True))
            for a, b in zip(s[1:], t[1:], strict=True) if form == "sigmoid" else ():  # without the background's column
                total -= weight * (sigmoid(b) * math.log(sigmoid(a)) + sigmoid(-b) * math.log(sigmoid(-a)))
        weights = None if kept is None else torch.tensor(kept, dtype=torch.float64)
        loss = classification_loss(self.student, self.teacher, K, weights, form == "sigmoid")
        assert loss.item() == pytest.approx(total / K.item(), rel=1e-12)

    @pytest.mark.parametrize("form", [False, True])
    def test_its_gradient_is_that_of_finite_differences(self, form):
        student = self.student.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s: classification_loss(s, self.teacher, K, sigmoid=form), student)


def test_the_better_gate_is_closed_for_equals_and_no_regions():
    logits = drawn(3, 4)
    assert better_gate(logits, logits.clone(), torch.tensor([0, 1, 2])).tolist() == [False] * 3
    assert better_gate(logits[:0], logits[:0], torch.zeros(0, dtype=torch.int64)).tolist() == []


class TestRegression:
    student, teacher = drawn(8, 4, seed=1, scale=0.15), drawn(8, 4, seed=2, scale=0.15)
    gate = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1]).bool()

    def test_it_is_smooth_l1_of_the_deltas_where_the_gate_is_open(self):
        total = 0.0
        for s, t, v in zip(self.student.tolist(), self.teacher.tolist(), self.gate.tolist(), strict=True):
            total += v * sum(map(smooth_l1, s, t))
        near = (self.student - self.teacher).abs() < 1 / 9
        assert near.any() and not near.all()  # both branches are met
        loss = regression_loss(self.student, self.teacher, self.gate, K)
        assert loss.item() == pytest.approx(total / K.item(), rel=1e-12)

    def test_its_gradient_is_that_of_finite_differences_and_zero_where_the_gate_is_closed(self):
        student = self.student.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s: regression_loss(s, self.teacher, self.gate, K), student)
        regression_loss(student, self.teacher, self.gate, K).backward()
        assert (student.grad[~self.gate] == 0).all() and (student.grad[self.gate] != 0).all()


class TestRegressionGate:
    @pytest.mark.parametrize("kind", ["proposal", "student", "none"])
    def test_it_is_the_equation_on_drawn_regions(self, kind):
        region = drawn_boxes(60, 1)
        teacher_region, gt = region + drawn(60, 4, seed=4).abs(), region + drawn(60, 4, seed=5, scale=4)
        student, teacher = drawn(60, 4, seed=6), drawn(60, 4, seed=7)
        expected = []
        for s, t, r, o, g in zip(*(x.tolist() for x in (student, teacher, region, teacher_region, gt)), strict=True):
            reference = r if kind == "proposal" else decode(s, r)
            expected.append(kind == "none" or iou(decode(t, o), g) > iou(reference, g))
        assert any(expected) and (kind == "none" or not all(expected))
        coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        assert regression_gate(kind, coder, student, teacher, region, teacher_region, gt).tolist() == expected

    def test_equal_boxes_and_no_regions_do_not_open_it(self):
        near, far, gt = ([11.0, 10, 30, 30], [15.0, 15, 35, 35], [10.0, 10, 30, 30])
        teacher, reference = torch.tensor([near, far, near, gt]), torch.tensor([far, near, near, gt])
        assert is_nearer(teacher, reference, torch.tensor([gt] * 4)).tolist() == [True, False, False, False]
        assert is_nearer(*[torch.zeros(0, 4)] * 3).shape == (0,)


@pytest.mark.parametrize("loss", [classification_loss, partial(classification_loss, sigmoid=True), regression_loss])
def test_no_positives_give_zero_and_a_gradient(loss):
    student, kept, one = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.bool), torch.tensor(1.0)
    value = loss(student, torch.zeros(0, 4), *((kept, one) if loss is regression_loss else (one, kept)))
    value.backward()
    assert value.item() == 0 and student.grad.shape == (0, 4)


def test_paired_iou_is_the_definition_on_drawn_boxes():
    a, b = drawn_boxes(200, 3), drawn_boxes(200, 13)
    a[0] = b[0] = torch.tensor([5.0, 5.0, 5.0, 5.0])  # an empty union
    expected = [iou(*boxes) for boxes in zip(a.tolist(), b.tolist(), strict=True)]
    assert 0 in expected and max(expected) > 0.3
    assert paired_iou(a, b).tolist() == pytest.approx(expected, rel=1e-12)
