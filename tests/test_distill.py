"""The Step: what is computed, from what, and where gradients go; the three losses recomputed with plain loops."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import train
from tar.distill import Levels, Step
from tar.machine import Machine
from tar.regions import box_head
from tar.shapes import Shapes

NAMES = {"backbone": "distill_backbone", "cls": "distill_cls", "reg": "distill_reg"}
ALL_ON = {"backbone": 0.5, "cls": 0.5, "reg": 0.5}


def seeded(step, batch, teacher=None, seed=5):
    torch.manual_seed(seed)  # of the region sampling
    return step(*batch, teacher)


def make_step(student, teacher, **levels):
    torch.manual_seed(2)  # of the adapters
    step = Step(student, Levels(**{**ALL_ON, **levels}), teacher.backbone.out_channels)
    return step.to(memory_format=torch.channels_last)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def reached(module):
    """Names of the parameters that have a gradient that is not zero."""
    return {name for name, gradient in gradients(module).items() if gradient.abs().sum() > 0}


def empty():
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


# The plain step


def test_plain_losses_are_torchvisions(student, batch):
    ours, distillation, _ = seeded(Step(student), batch)
    torch.manual_seed(5)
    theirs = student(*batch)
    assert distillation == {}
    assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in theirs.items()}


def test_sampling_follows_the_seed(student, batch):
    first, again, other = (seeded(Step(student), batch, seed=s)[0]["loss_classifier"].item() for s in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("with_teacher", [False, True])
def test_all_levels_off_gives_the_plain_gradients(make_detector, teacher, batch, with_teacher):
    plain, distilled = make_detector().train(), make_detector().train()
    torch.manual_seed(5)
    sum(plain(*batch).values()).backward()
    step = make_step(distilled, teacher, backbone=0, cls=0, reg=0)
    detection, distillation, _ = seeded(step, batch, teacher if with_teacher else None)
    sum(detection.values()).backward()
    assert distillation == {} and len(step.adapters) == 0
    expected, got = gradients(plain), gradients(distilled)
    assert expected.keys() == got.keys() and len(got) > 40
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_training_without_the_teacher_gives_the_plain_weights(make_detector, teacher, batch):
    plain, distilled = make_detector().train(), make_detector().train()
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    step = make_step(distilled, teacher)
    for parameters, losses in (
        (plain.parameters(), lambda: plain(*batch)),
        (step.parameters(), lambda: step(*batch)[0]),
    ):
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05)
        for i in range(3):
            torch.manual_seed(i)
            optimizer.zero_grad()
            sum(losses().values()).backward()
            optimizer.step()
    expected, got = plain.state_dict(), distilled.state_dict()
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    moved = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(start[moved], got[moved])


# Where gradients go


def test_gradients_reach_every_parameter_and_adapter_and_never_the_teacher(student, teacher, batch):
    step = make_step(student, teacher)
    detection, distillation, _ = seeded(step, batch, teacher)
    sum([*detection.values(), *distillation.values()]).backward()
    assert len(step.adapters) == 5
    assert reached(step) == {name for name, _ in step.named_parameters()}
    assert all(p.grad is None for p in teacher.parameters())


def test_frozen_stages_get_no_gradient(make_detector, teacher, batch):
    step = make_step(make_detector(norm="frozen", trainable_layers=3).train(), teacher)
    detection, distillation, _ = seeded(step, batch, teacher)
    sum([*detection.values(), *distillation.values()]).backward()
    missed = {name for name, _ in step.named_parameters()} - gradients(step).keys()
    body = "student.backbone.body."
    assert missed == {n for n, _ in step.named_parameters() if n.startswith((f"{body}conv1", f"{body}layer1"))} != set()


@pytest.mark.parametrize(
    ("level", "reaches", "spares"),
    [
        ("backbone", ("adapters", "student.backbone"), ("student.rpn", "student.roi_heads")),
        ("cls", ("student.backbone", "cls_score"), ("adapters", "student.rpn", "bbox_pred")),
        ("reg", ("student.backbone", "bbox_pred"), ("adapters", "student.rpn", "cls_score")),
    ],
)
def test_each_distillation_term_trains_its_own_part(student, teacher, batch, level, reaches, spares):
    step = make_step(student, teacher, reg_gate="none")
    seeded(step, batch, teacher)[1][NAMES[level]].backward()
    got = reached(step)
    assert all(any(part in name for name in got) for part in reaches)
    assert not any(part in name for name in got for part in spares)


def test_the_teacher_stays_bit_identical_and_outside_the_step(student, teacher, batch):
    step = make_step(student, teacher)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    mine = {k: v.clone() for k, v in step.state_dict().items()}
    optimizer = torch.optim.SGD(step.parameters(), 0.01, momentum=0.9)
    step.train()
    for i in range(3):
        detection, distillation, _ = seeded(step, batch, teacher, seed=i)
        optimizer.zero_grad()
        (sum(detection.values()) + 0.01 * sum(distillation.values())).backward()
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not teacher.training
    assert {k.split(".")[0] for k in step.state_dict()} == {"student", "adapters"}
    assert not {id(p) for p in step.parameters()} & {id(p) for p in teacher.parameters()}
    changed = {k for k, v in step.state_dict().items() if not torch.equal(mine[k], v)}
    assert any("running_mean" in k for k in changed) and any("adapters" in k for k in changed)


# What of the teacher runs


def test_the_teacher_runs_its_backbone_and_box_head_once_and_nothing_else(student, teacher, batch, monkeypatch):
    def never(*_, **__):
        raise AssertionError("this part of the teacher must not run")

    monkeypatch.setattr(teacher, "forward", never)
    monkeypatch.setattr(teacher.transform, "forward", never)
    monkeypatch.setattr(teacher.rpn, "forward", never)
    monkeypatch.setattr(teacher.roi_heads, "forward", never)
    monkeypatch.setattr(teacher.roi_heads, "postprocess_detections", never)
    calls = []
    for part in (teacher.backbone, teacher.roi_heads.box_head):
        part.register_forward_hook(
            lambda module, *_: calls.append((module, torch.is_grad_enabled(), module.training)),
        )
    seeded(make_step(student, teacher), batch, teacher)
    assert calls == [(teacher.backbone, False, False), (teacher.roi_heads.box_head, False, False)]


def test_the_teacher_pools_the_students_positive_regions_from_its_own_features(student, teacher, batch):
    pooled = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model.roi_heads.box_roi_pool.register_forward_hook(
            lambda _, given, out, name=name: pooled.__setitem__(name, (given, out))
        )
    seeded(make_step(student, teacher), batch, teacher)
    (mine, regions, sizes), own = pooled["student"]
    (taught, shared, shared_sizes), other = pooled["teacher"]
    _, targets = student.transform(*batch)  # the same boxes in pixels of the resized image
    for of_student, of_teacher, target in zip(regions, shared, targets, strict=True):
        best = box_iou(target["boxes"], of_student).amax(0) if len(target["boxes"]) else torch.zeros(len(of_student))
        assert torch.equal(of_teacher, of_student[best >= 0.5])
    assert sum(map(len, shared)) > 0 and sizes == shared_sizes
    assert mine["0"].shape[1] == 16 and taught["0"].shape[1] == 24
    assert own.shape[1:] == (16, 7, 7) and other.shape[1:] == (24, 7, 7) and len(other) == sum(map(len, shared))


def test_the_backbone_level_alone_leaves_the_teachers_box_head_alone(student, teacher, batch, monkeypatch):
    monkeypatch.setattr(teacher.roi_heads.box_head, "forward", None)
    assert set(seeded(make_step(student, teacher, cls=0, reg=0), batch, teacher)[1]) == {"distill_backbone"}


@pytest.mark.parametrize("at_work", [(0,), (0, 1, 2)])
def test_train_asks_nothing_of_the_teacher_at_decay_zero(make_detector, monkeypatch, tmp_path, at_work):
    teacher = make_detector("r18", num_classes=len(Shapes.classes)).eval().requires_grad_(False)
    calls = []
    teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(train, "load_teacher", lambda *_: teacher)
    monkeypatch.setattr(train, "cost_of_distillation", lambda *_: 1.0)  # it asks the teacher, when all is over
    monkeypatch.setattr(train, "decay", lambda step, total, kind: float(step in at_work))
    small = "--size 64 64 --fpn-channels 16 --head-channels 32 --rois 16 --rpn-top-n 50 20 --anchor-scale 4 --workers 0"
    run = f"--limit-train 12 --limit-test 2 --epochs 1 --batch-size 4 --threads 1 --log-every 1 --output {tmp_path}/run"
    teach = "--decay-end 1 --student r10 --teacher r18 --teacher-weights unused --amp none --device cpu"
    train.main(f"{small} {run} {teach}".split())
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert len(calls) == len(at_work)
    assert [i for i, line in enumerate(steps) if "distill_backbone" in line] == list(at_work)
    assert len(steps) == 3


# The losses, worked out another way


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def apply_deltas(deltas, region):
    """R-CNN's box regression with the weights 10, 10, 5, 5."""
    width, height = region[2] - region[0], region[3] - region[1]
    x = region[0] + width / 2 + deltas[0] / 10 * width
    y = region[1] + height / 2 + deltas[1] / 10 * height
    half_width, half_height = math.exp(deltas[2] / 5) * width / 2, math.exp(deltas[3] / 5) * height / 2
    return [x - half_width, y - half_height, x + half_width, y + half_height]


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [p / sum(powers) for p in powers]


def mask_at(kind, x, y, boxes):
    best = 0.0
    for x0, y0, x1, y1 in boxes:
        if x0 <= x <= x1 and y0 <= y <= y1:
            u, v = (x - (x0 + x1) / 2) / ((x1 - x0) / 2), (y - (y0 + y1) / 2) / ((y1 - y0) / 2)
            best = max(best, math.exp(-(u * u) / 2 - v * v / 2) if kind == "gaussian" else 1.0)
    return 1.0 if kind == "full" else best


def convolve(features, adapter):
    """A 3x3 convolution with a border of zeros as a sum of nine shifted products: [B, C, H, W] -> [B, D, H, W]."""
    x = np.pad(features.detach().double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    weight, (height, width) = adapter.weight.detach().double().numpy(), features.shape[-2:]
    out = adapter.bias.detach().double().numpy()[None, :, None, None]
    for i in range(3):
        for j in range(3):
            out = out + np.einsum("bchw,dc->bdhw", x[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return out


class ByHand:
    """The raw answers of both models for one batch, with the regions that seeded() draws."""

    def __init__(self, step, teacher, batch):
        student = step.student
        torch.manual_seed(5)
        images, targets = student.transform(*batch)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        self.truth = [t["boxes"].tolist() for t in targets]
        self.labels = [t["labels"].tolist() for t in targets]
        self.features, taught = student.backbone(pixels), teacher.backbone(pixels)
        self.adapted = [convolve(f, a) for f, a in zip(self.features.values(), step.adapters, strict=True)]
        self.wanted = [f.double().numpy() for f in taught.values()]
        proposals, _ = student.rpn(images, self.features, targets)
        regions = student.roi_heads.select_training_samples(proposals, targets)[0]
        answers = []
        for model, features in ((student, self.features), (teacher, taught)):
            heads = model.roi_heads
            logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, [(0, 0)] * 2)))
            answers += [logits.detach().double().tolist(), deltas.detach().double().tolist()]
        self.positives = []  # (region, box, label, student's logits, its deltas, teacher's logits, its deltas)
        row = 0
        for image, mine in enumerate(regions):
            for region in mine.double().tolist():
                overlaps = [iou(region, box) for box in self.truth[image]]
                best = overlaps.index(max(overlaps))
                if overlaps[best] >= 0.5:
                    k = self.labels[image][best]
                    logits, deltas, soft, taught_deltas = (answer[row] for answer in answers)
                    both = (logits, deltas[4 * k : 4 * k + 4], soft, taught_deltas[4 * k : 4 * k + 4])
                    self.positives.append((region, self.truth[image][best], k, *both))
                row += 1

    def backbone_loss(self, kind, norm):
        total = below = 0.0
        for level, (mine, wanted) in enumerate(zip(self.adapted, self.wanted, strict=True)):
            stride = 4 * 2**level
            for image, boxes in enumerate(self.truth):
                for i in range(mine.shape[2]):
                    for j in range(mine.shape[3]):
                        weight = mask_at(kind, (j + 0.5) * stride, (i + 0.5) * stride, boxes)
                        below += weight * (1 if norm == "cells" else (wanted[image, :, i, j] ** 2).sum())
                        total += weight * ((mine[image, :, i, j] - wanted[image, :, i, j]) ** 2).sum()
        return total / (2 * below)

    def cls_loss(self, kind):
        total, kept = 0.0, 0
        for _, _, label, logits, _, soft, _ in self.positives:
            student, teacher = softmax(logits), softmax(soft)
            if kind == "none" or teacher[label] > student[label]:
                kept += 1
                total -= sum(t * math.log(s) for t, s in zip(teacher, student, strict=True))
        return total / len(self.positives), kept

    def reg_loss(self, kind):
        total, opened = 0.0, 0
        for region, box, _, _, mine, _, taught in self.positives:
            reference = {"proposal": region, "student": apply_deltas(mine, region)}.get(kind)
            if kind == "none" or iou(apply_deltas(taught, region), box) > iou(reference, box):
                opened += 1
                for a, b in zip(mine, taught, strict=True):
                    gap = abs(a - b)
                    total += gap * gap * 9 / 2 if gap < 1 / 9 else gap - 1 / 18
        return total / len(self.positives), opened


@pytest.mark.parametrize("norm", ["energy", "cells"])
@pytest.mark.parametrize("mask", ["gaussian", "box", "full"])
def test_backbone_level_is_the_equation(student, teacher, batch, mask, norm):
    step = make_step(student, teacher, mask=mask, sigma2=2.0, backbone_norm=norm)
    got = seeded(step, batch, teacher)[1]["distill_backbone"].item()
    assert got == pytest.approx(ByHand(step, teacher, batch).backbone_loss(mask, norm), rel=1e-4)


@pytest.mark.parametrize("gate", ["none", "better"])
def test_classification_level_is_the_equation(student, teacher, batch, gate):
    step = make_step(student, teacher, cls_gate=gate)
    _, distillation, seen = seeded(step, batch, teacher)
    hand = ByHand(step, teacher, batch)
    expected, kept = hand.cls_loss(gate)
    assert seen["positives"].item() == len(hand.positives) > 5
    assert kept == len(hand.positives) if gate == "none" else 0 < kept < len(hand.positives)
    assert distillation["distill_cls"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gate", ["proposal", "student", "none"])
def test_regression_level_is_the_equation(student, teacher, batch, gate):
    step = make_step(student, teacher, reg_gate=gate)
    _, distillation, seen = seeded(step, batch, teacher)
    hand = ByHand(step, teacher, batch)
    expected, opened = hand.reg_loss(gate)
    assert opened == len(hand.positives) if gate == "none" else 0 < opened < len(hand.positives)
    assert seen["gate_open"].item() == pytest.approx(opened / len(hand.positives), rel=1e-5)
    assert distillation["distill_reg"].item() == pytest.approx(expected, rel=1e-4)


# Levels


@pytest.mark.parametrize("off", ["backbone", "cls", "reg"])
def test_a_level_switched_off_takes_its_term_and_nothing_else(student, teacher, batch, off):
    detection, full, _ = seeded(make_step(student, teacher), batch, teacher)
    without_detection, without, _ = seeded(make_step(student, teacher, **{off: 0.0}), batch, teacher)
    assert full.keys() - without.keys() == {NAMES[off]} and len(full) == 3
    assert all(torch.equal(full[k], without[k]) for k in without)
    assert all(torch.equal(detection[k], without_detection[k]) for k in detection)


def test_distillation_leaves_the_detection_losses_untouched(student, teacher, batch):
    with_teacher, without = seeded(make_step(student, teacher), batch, teacher)[0], seeded(Step(student), batch)[0]
    assert all(torch.equal(with_teacher[k], without[k]) for k in without) and len(without) == 4


def test_weights_name_the_levels_that_are_on():
    assert Levels(backbone=0.5, cls=0, reg=2).weights() == {"distill_backbone": 0.5, "distill_reg": 2}


# Images without boxes


@pytest.mark.parametrize("boxless", [(0,), (1,), (0, 1)])
def test_images_without_boxes_give_finite_losses_and_gradients(student, teacher, batch, boxless):
    images, targets = batch
    step = make_step(student, teacher, reg_gate="none" if len(boxless) == 1 else "proposal")
    targets = [empty() if i in boxless else t for i, t in enumerate(targets)]
    detection, distillation, seen = seeded(step, (images, targets), teacher)
    sum([*detection.values(), *distillation.values()]).backward()
    values = [*detection.values(), *distillation.values(), *seen.values(), *gradients(step).values()]
    assert all(torch.isfinite(v).all() for v in values)
    # DDP waits for the gradient of every parameter, so a zero must be there too.
    assert gradients(step).keys() == {name for name, _ in step.named_parameters()}
    if len(boxless) == 2:
        assert [v.item() for v in distillation.values()] == [0.0, 0.0, 0.0]
        assert seen["positives"].item() == 0.0 and seen["gate_open"].item() == 0.0
    else:
        assert all(v.item() > 0 for v in distillation.values())
        assert seen["positives"].item() > 1


def test_an_image_without_boxes_adds_nothing_to_the_backbone_level(make_detector, teacher, batch):
    images, targets = batch
    student = make_detector(norm="frozen", trainable_layers=5).train()  # else the images share their statistics
    step = make_step(student, teacher)
    images = [images[0], images[0]]
    alone = seeded(step, (images[:1], targets[:1]), teacher)[1]["distill_backbone"]
    both = seeded(step, (images, [targets[0], empty()]), teacher)[1]["distill_backbone"]
    assert both.item() == pytest.approx(alone.item(), rel=1e-5) and both > 0


# Widths and precisions


@pytest.mark.parametrize("width", [8, 16, 40])
def test_the_teachers_pyramid_may_have_any_width(student, make_detector, batch, width):
    teacher = make_detector("r18", fpn_channels=width, head_channels=48).eval().requires_grad_(False)
    step = make_step(student, teacher)
    distillation = seeded(step, batch, teacher)[1]
    sum(distillation.values()).backward()
    assert [tuple(a.weight.shape) for a in step.adapters] == [(width, 16, 3, 3)] * 5
    assert all(a.weight.grad.abs().sum() > 0 for a in step.adapters)


def test_bfloat16_is_near_float32(student, teacher, batch, monkeypatch):
    step = make_step(student, teacher, reg_gate="none")
    sampled = []
    sample = student.roi_heads.select_training_samples
    monkeypatch.setattr(
        student.roi_heads, "select_training_samples", lambda *a: sampled.append(sample(*a)) or sampled[0]
    )  # the regions of the first call: rounding would draw others
    exact = seeded(step, batch, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = seeded(step, batch, teacher)
    for full, half in zip(exact[:2], rounded[:2], strict=True):
        for name in full:
            assert half[name].dtype == torch.float32
            assert half[name].item() == pytest.approx(full[name].item(), rel=0.05), name
    assert any(half.item() != exact[1][name].item() for name, half in rounded[1].items())  # it did round
    sum([*rounded[0].values(), *rounded[1].values()]).backward()
    assert all(torch.isfinite(g).all() for g in gradients(step).values())


def test_a_teacher_that_is_cast_once_gives_the_same_numbers(teacher):
    machine, cast = Machine(0, 1, torch.device("cpu"), "bf16"), copy.deepcopy(teacher)
    machine.freeze(cast)
    assert cast.backbone.body.conv1.weight.dtype == torch.bfloat16
    images, regions = torch.rand(2, 3, 64, 96), [torch.tensor([[4.0, 4, 40, 50]]), torch.tensor([[9.0, 2, 90, 60]])]
    with machine.autocast(), torch.no_grad():
        levels, cast_levels = teacher.backbone(images), cast.backbone(images)
        answers = [box_head(m, f, regions, [(64, 96)] * 2) for m, f in ((teacher, levels), (cast, cast_levels))]
    assert all(torch.equal(levels[name], cast_levels[name]) for name in levels)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
