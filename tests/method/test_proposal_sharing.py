"""Regions other than the student's, and what each ablation changes and leaves alone to the bit."""

import pytest
import torch
from by_hand import ByHand
from small_detectors import BACKBONE, CLS, KINDS, REG, batch, detector, gradients, make_step, pair, run, same

from tar.method.proposal_sharing import nearest_proposals

HEADS = {CLS, REG, "positives", "gate_open"}
ABLATIONS = [  # (changed settings, the terms that differ then)
    ({"mask": "box"}, {BACKBONE}),
    ({"sigma2": 0.7}, {BACKBONE}),
    ({"cls_gate": "better"}, {CLS}),
    ({"reg_gate": "student"}, {REG, "gate_open"}),
    ({"soft_labels": "all"}, {CLS}),
    ({"weight_backbone": 0.0}, {BACKBONE}),
    ({"weight_cls": 0.0}, {CLS}),
    ({"weight_reg": 0.0}, {REG, "gate_open"}),
    ({"weight_cls": 0.0, "weight_reg": 0.0}, HEADS),
]
OF_PROPOSALS = [({"proposals": "teacher"}, HEADS), ({"proposals": "both"}, HEADS), ({"no_sharing": True}, HEADS)]
ALL = [(kind, *a) for kind in KINDS for a in ABLATIONS + (OF_PROPOSALS if kind == "faster-rcnn" else [])]


def outcome(kind="faster-rcnn", **settings):
    """The losses of one step on one batch and seed, and the gradients of detection alone."""
    student, teacher = pair(kind)
    detection, distillation, seen = run(make_step(student, teacher, **settings), batch(), teacher)
    sum(detection.values()).backward()
    return detection, {**distillation, **seen}, gradients(student)


@pytest.fixture(scope="module")
def usual():
    """What outcome() gives without a changed setting, by detector."""
    return {kind: outcome(kind) for kind in KINDS}


@pytest.mark.parametrize(("kind", "settings", "changes"), ALL, ids=[f"{a[0]} {a[1]}" for a in ALL])
def test_an_ablation_changes_its_terms_and_no_other_bit(usual, kind, settings, changes):
    detection, terms, gradient = usual[kind]
    other_detection, other_terms, other_gradient = outcome(kind, **settings)
    assert terms.keys() == {BACKBONE, *HEADS} and other_terms.keys() <= terms.keys()
    # The matrix product of all regions rounds otherwise than that of the positive ones.
    rounded = {REG} if "soft_labels" in settings and kind == "faster-rcnn" else set()
    equal = {name for name in other_terms if torch.equal(terms[name], other_terms[name])}
    assert equal | rounded == (terms.keys() - changes) | rounded
    assert all(other_terms[name].item() == pytest.approx(terms[name].item(), rel=1e-5) for name in rounded)
    assert terms.keys() - other_terms.keys() == (changes if 0.0 in settings.values() else set())
    assert same(detection, other_detection) and same(gradient, other_gradient)


@pytest.mark.parametrize("whose", ["teacher", "both"])
def test_other_proposals_are_the_regions_of_the_equations(whose):
    student, teacher = pair()
    step = make_step(student, teacher, proposals=whose)
    _, distillation, seen = run(step, batch(), teacher)
    hand = ByHand(step, teacher, batch(), whose)
    reg, opened = hand.reg_loss()
    assert 0 < opened < len(hand.positives) == seen["positives"].item()
    assert distillation[CLS].item() == pytest.approx(hand.cls_loss()[0], rel=1e-4)
    assert distillation[REG].item() == pytest.approx(reg, rel=1e-4)
    assert seen["gate_open"].item() == pytest.approx(opened / len(hand.positives), rel=1e-5)


# No sharing

BOX, FAR = [0.0, 0, 10, 10], [80.0, 80, 90, 90]


def one(boxes, labels=None):
    boxes = torch.tensor(boxes).view(-1, 4)
    return [{"boxes": boxes, "labels": torch.tensor(labels or [7] * len(boxes), dtype=torch.int64)}]


def test_the_best_pair_of_each_box_is_compared():
    targets = one([BOX, FAR], [4, 9])
    own = torch.tensor([[0.0, 0, 10, 6], [80, 81, 90, 90], [0, 0, 10, 8], [80, 80, 90, 87]])  # IoU .6, .9, .8, .7
    taught = torch.tensor([[70.0, 70, 81, 81], [0, 0, 9, 9], [0, 0, 4, 4]])  # 1 / 220 of the second box
    mine, theirs, labels, gt_boxes = nearest_proposals([own], [taught], targets)
    assert torch.equal(mine[0], own[[2, 1]]) and torch.equal(theirs[0], taught[[1, 0]])
    assert labels[0].tolist() == [4, 9] and torch.equal(gt_boxes[0], targets[0]["boxes"])


@pytest.mark.parametrize(("height", "kept"), [(5.0, 1), (4.99, 0), (20.0, 1), (20.1, 0)])
def test_a_box_that_the_students_best_proposal_overlaps_less_than_half_is_left_out(height, kept):
    taught = torch.tensor([BOX])
    found = nearest_proposals([torch.tensor([[0.0, 0, 10, height]])], [taught], one([BOX]))
    assert [len(part[0]) for part in found] == [kept] * 4
    assert len(nearest_proposals([taught], [torch.tensor([FAR])], one([BOX]))[0][0]) == 1  # the teacher's may be far


@pytest.mark.parametrize(("own", "taught", "boxes"), [([], [BOX], [BOX]), ([BOX], [], [BOX]), ([BOX], [BOX], [])])
def test_images_without_proposals_or_boxes_give_no_pair(own, taught, boxes):
    own, taught = ([torch.tensor(rows).view(-1, 4), torch.tensor([BOX])] for rows in (own, taught))
    mine, theirs, labels, gt_boxes = nearest_proposals(own, taught, one(boxes) + one([BOX]))
    assert [tuple(part[0].shape) for part in (mine, theirs, gt_boxes)] == [(0, 4)] * 3 and labels[0].shape == (0,)
    assert [part[1].tolist() for part in (mine, theirs, gt_boxes)] == [[BOX]] * 3 and labels[1].tolist() == [7]
    assert labels[0].dtype == torch.int64


@pytest.mark.parametrize("gate", ["proposal", "student"])
def test_without_sharing_each_head_runs_on_its_own_models_proposals(gate):
    student, teacher = detector(rpn_top_n=(100, 200)).train(), pair()[1]
    teacher.rpn.head.bbox_pred.weight *= 20  # lest its proposals be anchors, and no gate open
    step = make_step(student, teacher, no_sharing=True, reg_gate=gate)
    _, distillation, seen = run(step, batch(), teacher)
    hand = ByHand(step, teacher, batch(), "nearest")
    reg, opened = hand.reg_loss(gate)
    assert 0 < opened < len(hand.positives) < 5  # of five boxes: the student's few proposals are far from some
    assert all(row.region != row.teacher_region for row in hand.positives) and not hand.background
    assert seen["positives"].item() == len(hand.positives)
    assert distillation[CLS].item() == pytest.approx(hand.cls_loss()[0], rel=1e-4)
    assert distillation[REG].item() == pytest.approx(reg, rel=1e-4)
