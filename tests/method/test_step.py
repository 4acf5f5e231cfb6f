"""The distillation step of both detectors: what runs, where gradients go, and the three losses against plain loops."""

import pytest
import torch
from by_hand import ByHand
from small_detectors import (
    BACKBONE,
    CLS,
    KINDS,
    LOSSES,
    REG,
    batch,
    gradients,
    make_step,
    pair,
    reached,
    run,
    same,
)

from tar.method.step import DistillationSettings, DistillationStep

LEVELS = {"weight_backbone": BACKBONE, "weight_cls": CLS, "weight_reg": REG}
both_detectors = pytest.mark.parametrize("kind", KINDS)


def test_weights_name_the_levels_that_are_on():
    settings = DistillationSettings(weight_backbone=0.5, weight_cls=0, weight_reg=2)
    assert settings.weights() == {BACKBONE: 0.5, REG: 2}


# The detection losses


@pytest.mark.parametrize("way", ["plain", "all levels off", "no teacher in this step", "distilled"])
@both_detectors
def test_detection_losses_and_gradients_are_torchvisions_to_the_bit(kind, way):
    student, teacher = pair(kind)
    for images, targets in (batch(), batch(boxless=[1])):
        student.zero_grad()
        torch.manual_seed(5)
        theirs = student(images, targets)
        sum(theirs.values()).backward()
        expected = {name: gradient.clone() for name, gradient in gradients(student).items()}
        off = dict.fromkeys(LEVELS, 0.0) if way == "all levels off" else {}
        step = DistillationStep(student) if way == "plain" else make_step(student, teacher, **off)
        student.zero_grad()
        asked = teacher if way in ("all levels off", "distilled") else None
        detection, distillation, _ = run(step, (images, targets), asked)
        sum(detection.values()).backward()
        assert detection.keys() == LOSSES[kind] and same(detection, theirs)
        assert len(expected) > 40 and same(gradients(student), expected)
        assert distillation.keys() == (set(LEVELS.values()) if way == "distilled" else set())


# Where gradients go


@both_detectors
def test_gradients_reach_every_parameter_and_adapter_and_never_the_teacher(kind):
    student, teacher = pair(kind)
    step = make_step(student, teacher, reg_gate="none", mask="full")  # no box covers the one cell of P7
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    detection, distillation, _ = run(step.train(), batch(), teacher)
    sum([*detection.values(), *distillation.values()]).backward()
    assert [tuple(adapter.weight.shape) for adapter in step.adapters] == [(24, 16, 3, 3)] * 5
    assert reached(step) == {name for name, _ in step.named_parameters()}
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert same(teacher.state_dict(), before)
    assert {name.split(".")[0] for name in step.state_dict()} == {"student", "adapters"}
    assert not {id(p) for p in step.parameters()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize(
    ("level", "reaches", "spares"),
    [
        (BACKBONE, ("adapters", "student.backbone"), ("student.rpn", "student.roi_heads", "student.head")),
        (CLS, ("student.backbone", "cls_"), ("adapters", "student.rpn", "bbox_pred", "regression_head")),
        (REG, ("student.backbone", "bbox_"), ("adapters", "student.rpn", "cls_score", "classification_head")),
    ],
)
@both_detectors
def test_each_distillation_term_trains_its_own_part(kind, level, reaches, spares):
    student, teacher = pair(kind)
    step = make_step(student, teacher, reg_gate="none")
    run(step, batch(), teacher)[1][level].backward()
    got = reached(step)
    assert all(any(part in name for name in got) for part in reaches)
    assert not any(part in name for name in got for part in spares)


# What of the teacher runs


@both_detectors
def test_the_teacher_runs_its_backbone_and_head_once_and_nothing_else(kind, monkeypatch):
    student, teacher = pair(kind)
    monkeypatch.setattr(teacher, "forward", None)
    monkeypatch.setattr(teacher.transform, "forward", None)
    if kind == "retinanet":
        head = teacher.head
        for name in ("anchor_generator", "postprocess_detections", "compute_loss"):
            monkeypatch.setattr(teacher, name, None)
    else:
        head = teacher.roi_heads.box_head
        for part in (teacher.rpn, teacher.roi_heads):
            monkeypatch.setattr(part, "forward", None)
    calls = []
    for part in (teacher.backbone, head):
        part.register_forward_hook(lambda module, *_: calls.append((module, torch.is_grad_enabled(), module.training)))
    run(make_step(student, teacher), batch(), teacher)
    assert calls == [(teacher.backbone, False, False), (head, False, False)]
    run(make_step(student, teacher, weight_cls=0, weight_reg=0), batch(), teacher)
    assert len(calls) == 3 and calls[-1][0] is teacher.backbone


# The losses


@pytest.mark.parametrize(
    ("mask", "norm", "sigma2"),
    [
        ("gaussian", "energy", 2.0),
        ("gaussian", "cells", 0.7),
        ("box", "energy", 2.0),
        ("full", "energy", 2.0),
        ("fine-grained", "cells", 2.0),
    ],
)
@both_detectors
def test_the_backbone_level_is_the_equation(kind, mask, norm, sigma2):
    student, teacher = pair(kind)
    step = make_step(student, teacher, mask=mask, sigma2=sigma2, backbone_norm=norm, weight_cls=0, weight_reg=0)
    got = run(step, batch(), teacher)[1][BACKBONE].item()
    assert got == pytest.approx(ByHand(step, teacher, batch()).backbone_loss(mask, norm, sigma2), rel=1e-4)


@pytest.mark.parametrize(
    ("cls_gate", "reg_gate"), [("none", "proposal"), ("better", "student"), ("none", "none")], ids=lambda gate: gate
)
@both_detectors
def test_the_heads_levels_are_the_equations(kind, cls_gate, reg_gate):
    student, teacher = pair(kind)
    step = make_step(student, teacher, cls_gate=cls_gate, reg_gate=reg_gate)
    _, distillation, seen = run(step, batch(), teacher)
    hand = ByHand(step, teacher, batch())
    (cls, kept), (reg, opened), positives = hand.cls_loss(cls_gate), hand.reg_loss(reg_gate), len(hand.positives)
    assert kept == positives if cls_gate == "none" else 0 < kept < positives
    assert opened == positives if reg_gate == "none" else 0 < opened < positives
    assert seen["positives"].item() == positives > 5
    assert seen["gate_open"].item() == pytest.approx(opened / positives, rel=1e-5)
    assert distillation[CLS].item() == pytest.approx(cls, rel=1e-4)
    assert distillation[REG].item() == pytest.approx(reg, rel=1e-4)


@both_detectors
def test_soft_labels_on_all_regions_are_the_equation(kind):
    student, teacher = pair(kind)
    step = make_step(student, teacher, soft_labels="all")
    _, distillation, seen = run(step, batch(), teacher)
    hand = ByHand(step, teacher, batch())
    positives, regions = len(hand.positives), len(hand.positives) + len(hand.background)
    if kind == "retinanet":  # the anchors between the two thresholds are left out
        assert 1000 < regions < sum(map(len, hand.anchors))
    assert 5 < positives == seen["positives"].item() < regions / 2
    assert distillation[CLS].item() == pytest.approx(hand.cls_loss_of_all(), rel=1e-4)
    assert distillation[REG].item() == pytest.approx(hand.reg_loss()[0], rel=1e-4)


# Images without boxes


@pytest.mark.parametrize("boxless", [(0,), (0, 1)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, {}) for kind in KINDS],
        *[(kind, {"soft_labels": "all", "mask": "fine-grained"}) for kind in KINDS],
        *[("faster-rcnn", {"proposals": whose}) for whose in ("teacher", "both")],
        ("faster-rcnn", {"no_sharing": True}),
    ],
)
def test_images_without_boxes_give_finite_losses_and_gradients(kind, settings, boxless):
    student, teacher = pair(kind)
    step = make_step(student, teacher, reg_gate="none" if len(boxless) == 1 else "proposal", **settings)
    detection, distillation, seen = run(step, batch(boxless), teacher)
    sum([*detection.values(), *distillation.values()]).backward()
    values = [*detection.values(), *distillation.values(), *seen.values(), *gradients(step).values()]
    assert all(torch.isfinite(v).all() for v in values)
    # DDP waits for the gradient of every parameter, so a zero must be there too.
    assert gradients(step).keys() == {name for name, _ in step.named_parameters()}
    if len(boxless) == 1:
        assert all(v.item() > 0 for v in distillation.values()) and seen["positives"].item() > 1
    else:
        assert distillation[BACKBONE] == distillation[REG] == seen["positives"] == seen["gate_open"] == 0
        assert (distillation[CLS].item() > 0) == ("soft_labels" in settings)


# Precision


def test_bfloat16_is_near_float32(monkeypatch):
    student, teacher = pair()
    step, sampled, sample = make_step(student, teacher, reg_gate="none"), [], student.roi_heads.select_training_samples
    monkeypatch.setattr(
        student.roi_heads, "select_training_samples", lambda *a: sampled.append(sample(*a)) or sampled[0]
    )  # the regions of the first call: rounding would draw others
    exact = run(step, batch(), teacher)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(step, batch(), teacher)
    for full, half in zip(exact[:2], rounded[:2], strict=True):
        for name in full:
            assert half[name].dtype == torch.float32
            assert half[name].item() == pytest.approx(full[name].item(), rel=0.05), name
    assert any(half.item() != exact[1][name].item() for name, half in rounded[1].items())  # it did round
    sum([*rounded[0].values(), *rounded[1].values()]).backward()
    assert all(torch.isfinite(g).all() for g in gradients(step).values())
