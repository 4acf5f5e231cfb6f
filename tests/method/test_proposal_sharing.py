"""No sharing: each model's own proposals."""

import pytest
import torch
from by_hand import compared_by_hand
from small_detectors import detector, pair

from tar.method.proposal_sharing import nearest_proposals

BOX, FAR = [0.0, 0, 10, 10], [80.0, 80, 90, 90]


def one(boxes):
    boxes = torch.tensor(boxes).view(-1, 4)
    return [{"boxes": boxes, "labels": torch.full((len(boxes),), 7)}]


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
    rows, _, opened = compared_by_hand(student, teacher, no_sharing=True, reg_gate=gate)
    assert 0 < opened < len(rows) < 5  # of five boxes: the student's few proposals are far from some
    assert all(row.label and row.region != row.teacher_region for row in rows)
