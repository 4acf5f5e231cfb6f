"""The distillation step of both detectors: what runs, where gradients go, and the three losses against plain loops."""

from itertools import product

import pytest
import torch
from by_hand import backbone_of_batch, compared_by_hand
from small_detectors import BACKBONE, CLS, KINDS, LOSSES, REG, batch, gradients, make_step, pair, reached, run, same

from tar.method.step import DistillationStep

LEVELS = {"weight_backbone": BACKBONE, "weight_cls": CLS, "weight_reg": REG}
both_detectors = pytest.mark.parametrize("kind", KINDS)


@both_detectors
def test_detection_losses_and_gradients_are_torchvisions_to_the_bit(kind):
    student, teacher = pair(kind)
    off, on = make_step(student, teacher, **dict.fromkeys(LEVELS, 0.0)), make_step(student, teacher)
    plain, others = DistillationStep(student), [{"soft_labels": "all", "cls_gate": "better"}]
    if kind == "faster-rcnn":
        others = [{"proposals": "both"}, {"no_sharing": True}]
    others = [(make_step(student, teacher, **settings), teacher) for settings in others]
    ways_with_boxes = [(plain, None), (off, teacher), *others]
    for (images, targets), ways in ((batch(), ways_with_boxes), (batch(boxless=[1]), [(on, None), (on, teacher)])):
        torch.manual_seed(5)
        theirs = student(images, targets)
        expected = torch.autograd.grad(sum(theirs.values()), list(student.parameters()))
        for step, asked in ways:
            detection, distillation, _ = run(step, (images, targets), asked)
            found = torch.autograd.grad(sum(detection.values()), list(student.parameters()))
            assert detection.keys() == LOSSES[kind] and same(detection, theirs)
            assert all(map(torch.equal, found, expected))
            assert distillation.keys() == (set(LEVELS.values()) if step is not off and asked else set())


@both_detectors
def test_each_term_trains_its_own_part_and_all_together_everything_but_the_teacher(kind):
    student, teacher = pair(kind)
    step = make_step(student, teacher, reg_gate="none", mask="full").train()  # no box covers the one cell of P7
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    detection, distillation, _ = run(step, batch(), teacher)
    heads = ("student.rpn", "student.roi_heads", "student.head")
    for level, reaches, spares in (
        (BACKBONE, ("adapters", "student.backbone"), heads),
        (CLS, ("student.backbone", "cls_"), ("adapters", "student.rpn", "bbox_pred", "regression_head")),
        (REG, ("student.backbone", "bbox_"), ("adapters", "student.rpn", "cls_score", "classification_head")),
    ):
        step.zero_grad()
        distillation[level].backward(retain_graph=True)
        got = reached(step)
        assert all(any(part in name for name in got) for part in reaches)
        assert not any(part in name for name in got for part in spares)
    step.zero_grad()
    sum([*detection.values(), *distillation.values()]).backward()
    assert [tuple(adapter.weight.shape) for adapter in step.adapters] == [(24, 16, 3, 3)] * 5
    assert reached(step) == {name for name, _ in step.named_parameters()}
    assert {name.split(".")[0] for name in step.state_dict()} == {"student", "adapters"}
    assert not {id(p) for p in step.parameters()} & {id(p) for p in teacher.parameters()}
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert same(teacher.state_dict(), before)


@both_detectors
def test_the_teacher_runs_its_backbone_and_head_once_and_nothing_else(kind, monkeypatch):
    student, teacher = pair(kind)
    monkeypatch.setattr(teacher, "forward", None)
    monkeypatch.setattr(teacher.transform, "forward", None)
    if kind == "retinanet":
        heads = [teacher.head.classification_head, teacher.head.regression_head]
        for name in ("anchor_generator", "postprocess_detections", "compute_loss"):
            monkeypatch.setattr(teacher, name, None)
    else:
        heads = [teacher.roi_heads.box_head]
        for part in (teacher.rpn, teacher.roi_heads):
            monkeypatch.setattr(part, "forward", None)
    calls = []
    for part in (teacher.backbone, *heads):
        part.register_forward_hook(lambda module, *_: calls.append((module, torch.is_grad_enabled(), module.training)))
    backbone, cls, reg = LEVELS
    for off, ran in (((), heads), ((backbone,), heads), ((cls,), heads[-1:]), ((reg,), heads[:1]), ((cls, reg), [])):
        _, distillation, _ = run(make_step(student, teacher, **dict.fromkeys(off, 0)), batch(), teacher)
        assert distillation.keys() == {name for weight, name in LEVELS.items() if weight not in off}
        assert calls == [(part, False, False) for part in (teacher.backbone, *ran)]
        calls.clear()


@pytest.mark.parametrize(
    ("mask", "norm", "sigma2"), [("gaussian", "energy", 0.7), ("full", "cells", 2.0), ("fine-grained", "energy", 2.0)]
)
@both_detectors
def test_the_backbone_level_is_the_equation(kind, mask, norm, sigma2):
    student, teacher = pair(kind)
    step = make_step(student, teacher, mask=mask, sigma2=sigma2, backbone_norm=norm, weight_cls=0, weight_reg=0)
    got = run(step, batch(), teacher)[1][BACKBONE].item()
    assert got == pytest.approx(backbone_of_batch(step, teacher, mask, norm, sigma2), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *product(KINDS, [{}, {"cls_gate": "better", "reg_gate": "student"}, {"soft_labels": "all"}]),
        ("faster-rcnn", {"proposals": "teacher"}),
        ("faster-rcnn", {"proposals": "both"}),
    ],
)
def test_the_heads_levels_are_the_equations(kind, settings):
    rows, kept, opened = compared_by_hand(*pair(kind), **settings)
    positives = sum(row.label > 0 for row in rows)
    assert 5 < positives < len(rows) / 2 and 0 < opened < positives
    assert 0 < kept < positives if "cls_gate" in settings else kept == positives
    if kind == "retinanet":  # the anchors between the two thresholds are left out
        assert 1000 < len(rows) < 2 * 9 * (96 + 24 + 6 + 2 + 1)


@pytest.mark.parametrize("boxless", [(0,), (0, 1)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *product(KINDS, [{}, {"soft_labels": "all", "mask": "fine-grained"}]),
        ("faster-rcnn", {"proposals": "both"}),
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
