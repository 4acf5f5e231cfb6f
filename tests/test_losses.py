"""The losses and the gate of README, the paper in one page against loops in plain Python."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from tar.losses import (
    backbone_loss,
    backbone_normalizer,
    better_gate,
    classification_loss,
    decode,
    paired_iou,
    regression_gate,
    regression_loss,
)

K = torch.tensor(7.0, dtype=torch.float64)


def rand(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def random_boxes(count, seed):
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 40
    sides = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * 40 + 1
    return torch.cat([corners, corners + sides], 1)


def softmax(row):
    exps = [math.exp(value) for value in row]
    return [value / sum(exps) for value in exps]


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


class TestBackbone:
    """Two images, three channels, levels of 4 x 5 and 2 x 3 cells."""

    student = (rand(2, 3, 4, 5, seed=1), rand(2, 3, 2, 3, seed=2))
    teacher = (rand(2, 3, 4, 5, seed=3), rand(2, 3, 2, 3, seed=4))
    masks = (rand(2, 4, 5, seed=5).abs(), rand(2, 2, 3, seed=6).abs())

    def test_it_is_the_equation(self):
        total = cells = 0.0
        for s, t, m in zip(self.student, self.teacher, self.masks, strict=True):
            s, t, m = s.tolist(), t.tolist(), m.tolist()
            for b, rows in enumerate(m):
                for i, row in enumerate(rows):
                    for j, weight in enumerate(row):
                        cells += weight
                        total += weight * sum((s[b][c][i][j] - t[b][c][i][j]) ** 2 for c in range(3))
        loss = backbone_loss(self.student, self.teacher, self.masks, sum(m.sum() for m in self.masks))
        assert loss.item() == pytest.approx(total / (2 * cells), rel=1e-12)

    def test_it_divides_by_the_count_that_it_is_given(self):
        one, four = (
            backbone_loss(self.student, self.teacher, self.masks, torch.tensor(n, dtype=torch.float64))
            for n in (1.0, 4.0)
        )
        assert one.item() > 0
        assert four.item() == pytest.approx(one.item() / 4)

    def test_what_it_is_divided_by(self):
        energy = cells = 0.0
        for t, m in zip(self.teacher, self.masks, strict=True):
            for b, rows in enumerate(m.tolist()):
                for i, row in enumerate(rows):
                    for j, weight in enumerate(row):
                        cells += weight
                        energy += weight * sum(t[b, c, i, j].item() ** 2 for c in range(3))
        for kind, expected in (("energy", energy), ("cells", cells)):
            assert backbone_normalizer(self.teacher, self.masks, kind).item() == pytest.approx(expected, rel=1e-12)

    def test_the_energy_makes_it_independent_of_the_features_scale(self):
        losses = []
        for scale in (1, 30):
            student, teacher = ([scale * f for f in features] for features in (self.student, self.teacher))
            losses.append(backbone_loss(student, teacher, self.masks, backbone_normalizer(teacher, self.masks)).item())
        assert losses[0] > 0.1
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)

    def test_no_boxes_have_no_energy_and_give_zero(self):
        masks = [torch.zeros_like(m) for m in self.masks]
        assert backbone_normalizer(self.teacher, masks) == 0
        assert backbone_loss(self.student, self.teacher, masks, backbone_normalizer(self.teacher, masks)) == 0

    def test_no_cells_give_zero_and_zero_gradients(self):
        student = [s.clone().requires_grad_() for s in self.student]
        masks = [torch.zeros_like(m) for m in self.masks]
        loss = backbone_loss(student, self.teacher, masks, torch.tensor(0.0, dtype=torch.float64))
        loss.backward()
        assert loss.item() == 0
        assert all((s.grad == 0).all() for s in student)

    def test_its_gradient_is_that_of_finite_differences(self):
        student = [s.clone().requires_grad_() for s in self.student]
        cells = sum(m.sum() for m in self.masks)
        assert torch.autograd.gradcheck(lambda *s: backbone_loss(s, self.teacher, self.masks, cells), student)


class TestClassification:
    student, teacher = rand(6, 5, seed=1, scale=2), rand(6, 5, seed=2, scale=2)

    def expected(self, keep):
        total = 0.0
        for s, t, weight in zip(self.student.tolist(), self.teacher.tolist(), keep, strict=True):
            total -= weight * sum(p * math.log(q) for p, q in zip(softmax(t), softmax(s), strict=True))
        return total / K.item()

    def test_it_is_the_cross_entropy_of_the_two_distributions(self):
        loss = classification_loss(self.student, self.teacher, K)
        assert loss.item() == pytest.approx(self.expected([1] * 6), rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
    def test_only_the_kept_regions_count(self, dtype):
        keep = [1, 0, 0, 1, 1, 0]
        loss = classification_loss(self.student, self.teacher, K, torch.tensor(keep, dtype=dtype))
        assert loss.item() == pytest.approx(self.expected(keep), rel=1e-12)

    @pytest.mark.parametrize("keep", [None, torch.zeros(0, dtype=torch.bool)])
    def test_no_positives_give_zero_and_a_gradient(self, keep):
        student = torch.zeros(0, 5, requires_grad=True)
        loss = classification_loss(student, torch.zeros(0, 5), torch.tensor(1.0), keep)
        loss.backward()
        assert loss.item() == 0
        assert student.grad.shape == (0, 5)

    def test_its_gradient_is_that_of_finite_differences(self):
        student = self.student.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s: classification_loss(s, self.teacher, K), student)

    def test_its_gradient_vanishes_where_the_student_says_what_the_teacher_says(self):
        student = (self.teacher + 3).requires_grad_()  # the same distribution
        classification_loss(student, self.teacher, K).backward()
        assert student.grad.abs().max() < 1e-12


class TestBetterGate:
    def test_it_compares_the_probabilities_of_the_true_class(self):
        student, teacher, labels = rand(40, 4, seed=1), rand(40, 4, seed=2), [i % 4 for i in range(40)]
        expected = [
            softmax(t)[k] > softmax(s)[k] for s, t, k in zip(student.tolist(), teacher.tolist(), labels, strict=True)
        ]
        assert any(expected) and not all(expected)
        assert better_gate(student, teacher, torch.tensor(labels)).tolist() == expected

    def test_a_higher_logit_is_not_enough(self):
        student, teacher = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[5.0, 2.0, 0.0]])
        assert better_gate(student, teacher, torch.tensor([1])).tolist() == [False]

    def test_equals_and_no_regions(self):
        logits = rand(3, 4)
        assert better_gate(logits, logits.clone(), torch.tensor([0, 1, 2])).tolist() == [False] * 3
        assert better_gate(logits[:0], logits[:0], torch.zeros(0, dtype=torch.int64)).tolist() == []


class TestRegression:
    student, teacher = rand(8, 4, seed=1, scale=0.15), rand(8, 4, seed=2, scale=0.15)
    gate = (1, 0, 1, 1, 0, 0, 1, 1)

    def test_it_is_smooth_l1_of_the_deltas_where_the_gate_is_open(self):
        beta, total, parts = 1 / 9, 0.0, set()
        for s, t, v in zip(self.student.tolist(), self.teacher.tolist(), self.gate, strict=True):
            for a, b in zip(s, t, strict=True):
                d = abs(a - b)
                parts.add(d < beta)
                total += v * (d * d / (2 * beta) if d < beta else d - beta / 2)
        assert parts == {True, False}  # both branches are met
        loss = regression_loss(self.student, self.teacher, torch.tensor(self.gate).bool(), K)
        assert loss.item() == pytest.approx(total / K.item(), rel=1e-12)

    def test_no_positives_give_zero_and_a_gradient(self):
        student = torch.zeros(0, 4, requires_grad=True)
        loss = regression_loss(student, torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool), torch.tensor(1.0))
        loss.backward()
        assert loss.item() == 0
        assert student.grad.shape == (0, 4)

    def test_closed_gates_pass_no_gradient(self):
        student, gate = self.student.clone().requires_grad_(), torch.tensor(self.gate).bool()
        regression_loss(student, self.teacher, gate, K).backward()
        assert (student.grad[~gate] == 0).all() and (student.grad[gate] != 0).all()

    def test_its_gradient_is_that_of_finite_differences(self):
        student, gate = self.student.clone().requires_grad_(), torch.tensor(self.gate).bool()
        assert torch.autograd.gradcheck(lambda s: regression_loss(s, self.teacher, gate, K), student)


class TestRegressionGate:
    truth = ((10.0, 10.0, 30.0, 30.0),)
    near, far = ((11.0, 10.0, 30.0, 30.0),), ((15.0, 15.0, 35.0, 35.0),)

    @pytest.mark.parametrize(
        ("teacher", "reference", "expected"), [(near, far, True), (far, near, False), (near, near, False)]
    )
    def test_it_opens_only_where_the_teacher_is_nearer(self, teacher, reference, expected):
        boxes = [torch.tensor(b) for b in (teacher, reference, self.truth)]
        assert regression_gate(*boxes).tolist() == [expected]

    def test_it_is_the_equation_on_random_boxes(self):
        teacher, reference, truth = (random_boxes(60, seed) for seed in (1, 11, 21))
        expected = [
            iou(t, g) > iou(r, g) for t, r, g in zip(teacher.tolist(), reference.tolist(), truth.tolist(), strict=True)
        ]
        assert any(expected) and not all(expected)
        assert regression_gate(teacher, reference, truth).tolist() == expected

    def test_no_regions(self):
        assert regression_gate(*[torch.zeros(0, 4)] * 3).shape == (0,)


def test_paired_iou_is_the_definition_on_random_boxes():
    a, b = random_boxes(200, 3), random_boxes(200, 13)
    expected = [iou(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert 0 in expected and max(expected) > 0.3
    assert paired_iou(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def test_paired_iou_by_hand():
    a = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    b = torch.tensor([[2.0, 0.0, 6.0, 4.0], [0.0, 0.0, 4.0, 4.0], [6.0, 6.0, 8.0, 8.0], [5.0, 5.0, 5.0, 5.0]])
    assert paired_iou(a, b).tolist() == pytest.approx([8 / 24, 1, 0, 0])


def test_decode_is_fast_rcnns_parametrization():
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    regions, deltas = random_boxes(20, 5), rand(20, 4, seed=9)
    deltas[0, 2] = 100.0  # exp is cut off at a factor of 1000 / 16
    expected = []
    for (x0, y0, x1, y1), (dx, dy, dw, dh) in zip(regions.tolist(), deltas.tolist(), strict=True):
        width, height = x1 - x0, y1 - y0
        centre_x, centre_y = x0 + width / 2 + dx / 10 * width, y0 + height / 2 + dy / 10 * height
        half_width = width * min(math.exp(dw / 5), 1000 / 16) / 2
        half_height = height * min(math.exp(dh / 5), 1000 / 16) / 2
        expected.append([centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height])
    torch.testing.assert_close(decode(coder, deltas, regions), torch.tensor(expected, dtype=torch.float64))


def test_decode_of_no_regions():
    assert decode(BoxCoder((10.0, 10.0, 5.0, 5.0)), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
