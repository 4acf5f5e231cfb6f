"""What each flag of the ablations changes, and what it leaves alone to the bit; which flags contradict each other;
whose weights a run may start from."""

import copy
import json
import math
from functools import cache, partial

import pytest
import torch
from conftest import SMALL
from test_distill import NAMES, apply_deltas, convolve, empty, gradients, iou, make_step, seeded, softmax
from test_mistakes import wrong
from test_retinanet import detector, retinanet_pair
from tiny_runs import SMALL as TINY
from tiny_runs import call

import train
from tar import UserError, checkpoint, options
from tar.masks import fine_grained_mask
from tar.models import build_detector
from tar.regions import nearest_proposals
from tar.teacher import inherit, read_teacher, start_from

BACKBONE, CLS, REG = NAMES.values()
ABLATIONS = [  # (changed levels, the terms that differ then)
    ({"mask": "box"}, {BACKBONE}),
    ({"mask": "full"}, {BACKBONE}),
    ({"mask": "fine-grained"}, {BACKBONE}),
    ({"sigma2": 0.7}, {BACKBONE}),
    ({"cls_gate": "better"}, {CLS}),
    ({"reg_gate": "student"}, {REG, "gate_open"}),
    ({"reg_gate": "none"}, {REG, "gate_open"}),
    ({"soft_labels": "all"}, {CLS}),
    ({"soft_labels": "all", "background_weight": 0.5}, {CLS}),
    ({"answers": "truth"}, {CLS, REG, "gate_open"}),
    ({"answers": "smoothed"}, {CLS}),
    ({"backbone": 0.0}, {BACKBONE}),
    ({"cls": 0.0}, {CLS}),
    ({"reg": 0.0}, {REG, "gate_open"}),
    ({"cls": 0.0, "reg": 0.0}, {CLS, REG, "positives", "gate_open"}),
]
OF_PROPOSALS = [  # of Faster R-CNN only
    ({"proposals": "teacher"}, {CLS, REG, "positives", "gate_open"}),
    ({"proposals": "both"}, {CLS, REG, "positives", "gate_open"}),
    ({"sharing": False}, {CLS, REG, "positives", "gate_open"}),
]
ALL = [("faster-rcnn", *a) for a in ABLATIONS + OF_PROPOSALS] + [("retinanet", *a) for a in ABLATIONS]


@cache
def drawn_pair(kind):
    if kind == "retinanet":
        return retinanet_pair()
    student = detector(kind=kind, anchor_scale=4).train()
    teacher = detector("r18", 1, kind, anchor_scale=4, fpn_channels=24).eval().requires_grad_(False)
    teacher.roi_heads.box_predictor.bbox_pred.weight *= 2
    return student, teacher


@pytest.fixture
def pair():
    return copy.deepcopy(drawn_pair("faster-rcnn"))


@pytest.fixture
def outcome(batch):
    """outcome(detector, **levels): the terms of one step on one batch and seed, and detection's own gradients."""

    def run(kind="faster-rcnn", **levels):
        student, teacher = copy.deepcopy(drawn_pair(kind))
        detection, distillation, seen = seeded(make_step(student, teacher, **levels), batch, teacher)
        sum(detection.values()).backward()
        return detection, {**distillation, **seen}, gradients(student)

    return run


@pytest.fixture(scope="module")
def usual():
    """What outcome() gave without a changed level, by detector."""
    return {}


@pytest.mark.parametrize(("kind", "levels", "changes"), ALL, ids=[f"{a[0]} {a[1]}" for a in ALL])
def test_an_ablation_changes_its_terms_and_no_other_bit(outcome, usual, kind, levels, changes):
    usual[kind] = usual.get(kind) or outcome(kind)
    detection, terms, gradient = usual[kind]
    other_detection, other_terms, other_gradient = outcome(kind, **levels)
    assert terms.keys() == {BACKBONE, CLS, REG, "positives", "gate_open"} and other_terms.keys() <= terms.keys()
    # The product of matrices that answers for all regions rounds otherwise than that of the positive ones.
    rounded = {REG} if "soft_labels" in levels and kind == "faster-rcnn" else set()
    same = {name for name in other_terms if torch.equal(terms[name], other_terms[name])}
    assert same | rounded == (terms.keys() - changes) | rounded
    assert all(other_terms[name].item() == pytest.approx(terms[name].item(), rel=1e-5) for name in rounded)
    switched_off = {NAMES[level] for level, weight in levels.items() if weight == 0.0 and level in NAMES}
    assert terms.keys() - other_terms.keys() == (changes if switched_off else set())
    assert all(torch.equal(value, other_detection[name]) for name, value in detection.items())
    assert gradient.keys() == other_gradient.keys() and len(gradient) > 40
    assert all(torch.equal(value, other_gradient[name]) for name, value in gradient.items())


# The fine-grained mask


def fine_grained_cells(boxes, cells, share=0.5):
    """The definition, anchor by anchor: cells is a list of lists of anchors; 1 or 0 a cell."""
    mask = [0] * len(cells)
    for box in boxes:
        best = max(iou(anchor, box) for anchors in cells for anchor in anchors)
        for i, anchors in enumerate(cells):
            if any(iou(anchor, box) > share * best for anchor in anchors):
                mask[i] = 1
    return mask


def random_boxes(count, seed, side):
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=random, dtype=torch.float64) * side
    return torch.cat([corners, corners + 4 + torch.rand(count, 2, generator=random, dtype=torch.float64) * side], 1)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_fine_grained_mask_is_the_definition(share):
    sizes, each = [(4, 6), (2, 3)], 3
    for seed in range(4):
        boxes, anchors = random_boxes(3, seed, 40), random_boxes(30 * each, seed + 9, 60)
        cells = [anchors[each * i : each * (i + 1)].tolist() for i in range(30)]
        expected = fine_grained_cells(boxes.tolist(), cells, share)
        assert 0 < sum(expected) < 30
        levels = fine_grained_mask(boxes, anchors, sizes, share)
        assert [tuple(m.shape) for m in levels] == sizes
        assert torch.cat([m.flatten() for m in levels]).tolist() == expected


def test_fine_grained_mask_leaves_out_half_of_the_best_and_boxes_that_no_anchor_meets():
    far, whole, half, more = [90.0, 90, 99, 99], [0.0, 0, 8, 8], [0.0, 0, 8, 4], [0.0, 0, 8, 5]
    anchors = torch.tensor([far, half, more, far, whole, far, far, far])  # two a cell
    assert fine_grained_mask(torch.tensor([whole]), anchors, [(2, 2)])[0].tolist() == [[0, 1], [1, 0]]
    assert fine_grained_mask(torch.tensor([[40.0, 40, 50, 50]]), anchors, [(2, 2)])[0].tolist() == [[0, 0], [0, 0]]
    assert fine_grained_mask(torch.zeros(0, 4), anchors, [(1, 1), (1, 3)])[1].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("boxless", [False, True])
@pytest.mark.parametrize(("kind", "per_cell"), [("faster-rcnn", 3), ("retinanet", 9)])
def test_the_backbone_level_imitates_in_the_fine_grained_cells(batch, kind, per_cell, boxless):
    student, teacher = copy.deepcopy(drawn_pair(kind))
    images, targets = batch[0], [batch[1][0], empty()] if boxless else batch[1]
    step = make_step(student, teacher, mask="fine-grained", backbone_norm="cells", cls=0, reg=0)
    got = seeded(step, (images, targets), teacher)[1][BACKBONE].item()
    images, targets = student.transform(images, targets)
    pixels = images.tensors.contiguous(memory_format=torch.channels_last)
    features, taught = (list(model.backbone(pixels).values()) for model in (student, teacher))
    make_anchors = student.anchor_generator if kind == "retinanet" else student.rpn.anchor_generator
    gaps = [
        ((convolve(f, a) - t.double().numpy()) ** 2).sum(1)
        for f, a, t in zip(features, step.adapters, taught, strict=True)
    ]
    total = count = 0.0
    for i, anchors in enumerate(make_anchors(images, features)):
        flat = [value for level in gaps for value in level[i].flatten().tolist()]  # a cell each, level by level
        cells = anchors.view(-1, per_cell, 4).tolist()
        mask = fine_grained_cells(targets[i]["boxes"].tolist(), cells)
        total += sum(m * value for m, value in zip(mask, flat, strict=True))
        count += sum(mask)
    assert 0 < count < 2 * len(cells)
    assert got == pytest.approx(total / (2 * count), rel=1e-4)


# Other regions than the student's, and soft labels on all of them


class ByHand:
    """Both models' raw answers for the regions of each way to choose them, drawn as seeded() draws them."""

    def __init__(self, student, teacher, batch):
        torch.manual_seed(5)
        images, self.targets = student.transform(*batch)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        self.models = [(model, model.backbone(pixels)) for model in (student, teacher)]
        self.own, _ = student.rpn(images, self.models[0][1], self.targets)
        self.sampled = {"student": student.roi_heads.select_training_samples(self.own, self.targets)[0]}
        self.taught, _ = teacher.rpn(images, self.models[1][1])
        self.sampled["teacher"] = student.roi_heads.select_training_samples(self.taught, self.targets)[0]
        both = zip(self.sampled["student"], self.sampled["teacher"], strict=True)
        self.sampled["both"] = [torch.cat(regions) for regions in both]

    def rows(self, mine, theirs):
        """(region, teacher's region, box, label, the four deltas and the logits of student and teacher) by region."""
        answers = []
        for (model, features), regions in zip(self.models, (mine, theirs), strict=True):
            heads = model.roi_heads
            pooled = heads.box_roi_pool(features, regions, [(64, 96)] * 2)
            logits, deltas = heads.box_predictor(heads.box_head(pooled))
            answers.append(zip(logits.double().tolist(), deltas.double().tolist(), strict=True))
        rows, answers = [], zip(*answers, strict=True)
        for own, taught, target in zip(mine, theirs, self.targets, strict=True):
            boxes, labels = target["boxes"].tolist(), target["labels"].tolist()
            for region, other in zip(own.tolist(), taught.tolist(), strict=True):
                overlaps = [iou(region, box) for box in boxes]
                best = overlaps.index(max(overlaps))
                k = labels[best] if overlaps[best] >= 0.5 else 0
                (mine_k, deltas), (soft, taught_deltas) = next(answers)
                cut = slice(4 * k, 4 * k + 4)
                rows.append((region, other, boxes[best], k, deltas[cut], mine_k, taught_deltas[cut], soft))
        return rows

    def nearest(self):
        """The rows of the pairs that overlap a box best: a proposal of the student's and one of the teacher's."""
        mine, theirs = [], []
        for own, taught, target in zip(self.own, self.taught, self.targets, strict=True):
            best = [[max(p.tolist(), key=partial(iou, box)) for p in (own, taught)] for box in target["boxes"].tolist()]
            near = [pair for pair, box in zip(best, target["boxes"].tolist(), strict=True) if iou(pair[0], box) >= 0.5]
            mine.append(torch.tensor([pair[0] for pair in near]).view(-1, 4))
            theirs.append(torch.tensor([pair[1] for pair in near]).view(-1, 4))
        return self.rows(mine, theirs)


def cross_entropy(row):
    student, teacher = softmax(row[5]), softmax(row[7])
    return -sum(t * math.log(s) for t, s in zip(teacher, student, strict=True))


def sums(rows, gate="proposal"):
    """Over the positive rows: their number, the sum of L_cls, the sum of L_reg, how many gates are open."""
    positives, cls, reg, opened = [row for row in rows if row[3] > 0], 0.0, 0.0, 0
    for row in positives:
        region, other, box, _, mine, _, taught, _ = row
        cls += cross_entropy(row)
        reference = region if gate == "proposal" else apply_deltas(mine, region)
        if iou(apply_deltas(taught, other), box) > iou(reference, box):
            opened += 1
            gaps = [abs(a - b) for a, b in zip(mine, taught, strict=True)]
            reg += sum(gap * gap * 9 / 2 if gap < 1 / 9 else gap - 1 / 18 for gap in gaps)
    return len(positives), cls, reg, opened


def assert_step_is(got, count, cls, reg, opened):
    assert got["positives"].item() == count
    assert got[CLS].item() == pytest.approx(cls / count, rel=1e-4)
    assert got[REG].item() == pytest.approx(reg / count, rel=1e-4)
    assert got["gate_open"].item() == pytest.approx(opened / count, rel=1e-5)


@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_both_models_answer_for_the_regions_asked_for(outcome, pair, batch, whose):
    got = outcome(proposals=whose)[1]
    hand = ByHand(*pair, batch)
    regions = hand.sampled[whose]
    expected = sums(hand.rows(regions, regions))
    assert 0 < expected[3] < expected[0]
    assert_step_is(got, *expected)


def test_both_are_the_union(outcome):
    own, taught, both = (outcome(proposals=whose)[1] for whose in ("student", "teacher", "both"))
    counts = [terms["positives"].item() for terms in (own, taught, both)]
    assert counts[2] == counts[0] + counts[1] and counts[1] > 5
    for name in (CLS, REG, "gate_open"):
        parts = [terms[name].item() * count for terms, count in zip((own, taught, both), counts, strict=True)]
        assert parts[2] == pytest.approx(parts[0] + parts[1], rel=1e-5)


@pytest.mark.parametrize("levels", [{"proposals": "teacher"}, {"proposals": "both"}, {"sharing": False}])
def test_the_student_trains_on_its_own_regions_all_the_same(pair, batch, monkeypatch, levels):
    student, teacher = pair
    drawn, sample = [], student.roi_heads.select_training_samples
    monkeypatch.setattr(student.roi_heads, "select_training_samples", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    seeded(make_step(student, teacher), batch, teacher)
    seeded(make_step(student, teacher, **levels), batch, teacher)
    usual, first, *more = [regions for regions, *_ in drawn]
    assert all(torch.equal(a, b) for a, b in zip(usual, first, strict=True))
    assert len(more) == ("proposals" in levels)  # the teacher's proposals are sampled after, if they are


@pytest.mark.parametrize("background_weight", [1.5, 0.0, 4.0])
@pytest.mark.parametrize("whose", ["student", "both"])
def test_soft_labels_on_all_regions(outcome, pair, batch, whose, background_weight):
    got = outcome(soft_labels="all", background_weight=background_weight, proposals=whose)[1]
    hand = ByHand(*pair, batch)
    rows = hand.rows(hand.sampled[whose], hand.sampled[whose])
    count, _, reg, opened = sums(rows)
    assert len(rows) > 64 and 0 < count < len(rows) / 2
    total = sum(cross_entropy(row) * (1.0 if row[3] else background_weight) for row in rows)
    assert got[CLS].item() == pytest.approx(total / len(rows), rel=1e-4)
    assert got[REG].item() == pytest.approx(reg / count, rel=1e-4)
    assert (got["positives"].item(), got["gate_open"].item()) == (count, pytest.approx(opened / count))


# The ground truth in the place of the teacher's answers


def test_by_the_truth_soft_labels_are_hard_ones_and_the_gate_is_open(outcome, pair, batch):
    got = outcome(answers="truth")[1]
    hand = ByHand(*pair, batch)
    rows = hand.rows(hand.sampled["student"], hand.sampled["student"])
    positives = [row for row in rows if row[3] > 0]
    cls = -sum(math.log(softmax(row[5])[row[3]]) for row in positives)
    assert got[CLS].item() == pytest.approx(cls / len(positives), rel=1e-4)
    beside = [row for row in positives if row[0] != row[2]]  # a ground-truth box itself cannot be bettered
    assert got["gate_open"].item() == pytest.approx(len(beside) / len(positives)) and len(beside) < len(positives)


@pytest.mark.parametrize("gate", ["none", "student"])
def test_by_the_truth_the_regression_level_is_the_box_loss_of_torchvision(outcome, gate):
    detection, terms, _ = outcome(answers="truth", reg_gate=gate)
    regions = SMALL["rois"] * 2  # torchvision divides the same sum by all regions
    assert terms[REG].item() * terms["positives"].item() == pytest.approx(
        detection["loss_box_reg"].item() * regions, rel=1e-5
    )
    assert terms["gate_open"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("soft_labels", ["positive", "all"])
def test_by_the_truth_products_in_bf16_have_finite_terms_and_gradients(pair, batch, soft_labels):
    student, teacher = pair
    with torch.autocast("cpu", torch.bfloat16):
        _, terms, _ = seeded(make_step(student, teacher, answers="truth", soft_labels=soft_labels), batch, teacher)
    sum(terms.values()).backward()
    assert len(terms) == 3 and all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(g.isfinite().all() for g in gradients(student).values())


def test_by_the_truth_the_heads_of_the_teacher_do_not_matter(pair, batch):
    student, teacher = pair
    step = make_step(student, teacher, answers="truth", backbone=0.0)
    before = seeded(step, batch, teacher)[1]
    with torch.no_grad():
        for parameter in teacher.roi_heads.parameters():
            parameter.mul_(-3.0)
    after = seeded(step, batch, teacher)[1]
    assert len(before) == 2 and all(torch.equal(before[name], after[name]) for name in before)


def test_smoothed_labels_have_the_mean_of_the_teachers_for_the_true_class_and_for_the_others(outcome, pair, batch):
    got = outcome(answers="smoothed")[1][CLS].item()
    hand = ByHand(*pair, batch)
    positives = [row for row in hand.rows(hand.sampled["student"], hand.sampled["student"]) if row[3] > 0]
    taught = [(softmax(row[7]), row[3]) for row in positives]
    true = sum(p[k] for p, k in taught) / len(taught)
    other = (1 - true) / (len(taught[0][0]) - 1)
    assert 0.01 < other < true < 0.99
    cls = 0.0
    for row in positives:
        cls -= sum((true if k == row[3] else other) * math.log(p) for k, p in enumerate(softmax(row[5])))
    assert got == pytest.approx(cls / len(positives), rel=1e-4)


def test_smoothed_labels_of_a_teacher_that_rules_the_true_classes_out_are_finite(pair, batch):
    student, teacher = pair
    with torch.no_grad():  # sure of "background" for every region, by a margin that float32 rounds to 0 and 1
        teacher.roi_heads.box_predictor.cls_score.bias[0] = 1e4
    with torch.autocast("cpu", torch.bfloat16):
        _, terms, _ = seeded(make_step(student, teacher, answers="smoothed", reg=0.0, backbone=0.0), batch, teacher)
    terms[CLS].backward()
    assert terms[CLS].isfinite() and all(g.isfinite().all() for g in gradients(student).values())


# No sharing

BOX, FAR = [0.0, 0, 10, 10], [80.0, 80, 90, 90]


def one(boxes, labels=None):
    boxes = torch.tensor(boxes).view(-1, 4)
    return [{"boxes": boxes, "labels": torch.tensor(labels or [7] * len(boxes), dtype=torch.int64)}]


def test_the_best_pair_of_each_box_is_compared():
    targets = one([BOX, FAR], [4, 9])
    own = torch.tensor([[0.0, 0, 10, 6], [80, 81, 90, 90], [0, 0, 10, 8], [80, 80, 90, 87]])  # IoU .6, .9, .8, .7
    taught = torch.tensor([[70.0, 70, 81, 81], [0, 0, 9, 9], [0, 0, 4, 4]])  # 1 / 220 of the second box
    mine, theirs, labels, truth = nearest_proposals([own], [taught], targets)
    assert torch.equal(mine[0], own[[2, 1]]) and torch.equal(theirs[0], taught[[1, 0]])
    assert labels[0].tolist() == [4, 9] and torch.equal(truth[0], targets[0]["boxes"])


@pytest.mark.parametrize(("height", "kept"), [(5.0, 1), (4.99, 0), (10.0, 1), (20.0, 1), (20.1, 0)])
def test_a_box_that_the_students_best_proposal_overlaps_less_than_half_is_left_out(height, kept):
    taught = torch.tensor([BOX])
    found = nearest_proposals([torch.tensor([[0.0, 0, 10, height]])], [taught], one([BOX]))
    assert [len(part[0]) for part in found] == [kept] * 4
    assert len(nearest_proposals([taught], [torch.tensor([FAR])], one([BOX]))[0][0]) == 1  # the teacher's may be far


@pytest.mark.parametrize(("own", "taught", "boxes"), [([], [BOX], [BOX]), ([BOX], [], [BOX]), ([BOX], [BOX], [])])
def test_images_without_proposals_or_boxes_give_no_pair(own, taught, boxes):
    own, taught = ([torch.tensor(rows).view(-1, 4), torch.tensor([BOX])] for rows in (own, taught))
    mine, theirs, labels, truth = nearest_proposals(own, taught, one(boxes) + one([BOX]))
    assert [tuple(part[0].shape) for part in (mine, theirs, truth)] == [(0, 4)] * 3 and labels[0].shape == (0,)
    assert [part[1].tolist() for part in (mine, theirs, truth)] == [[BOX]] * 3 and labels[1].tolist() == [7]
    assert labels[0].dtype == torch.int64


@pytest.mark.parametrize("gate", ["proposal", "student"])
def test_without_sharing_each_model_answers_for_its_own_proposals(pair, batch, gate):
    student, teacher = detector(kind="faster-rcnn", anchor_scale=4, rpn_top_n=(40, 200)).train(), pair[1]
    _, distillation, seen = seeded(make_step(student, teacher, sharing=False, reg_gate=gate), batch, teacher)
    rows = ByHand(student, teacher, batch).nearest()
    expected = sums(rows, gate)
    assert 0 < expected[3] < len(rows) < 5  # of five boxes: the student's few proposals are far from some
    assert all(row[0] != row[1] for row in rows)
    assert_step_is({**distillation, **seen}, *expected)


@pytest.mark.parametrize("levels", [{"proposals": "teacher"}, {"proposals": "both"}, {"sharing": False}])
@pytest.mark.parametrize("boxless", [(0,), (0, 1)])
def test_other_regions_of_images_without_boxes_give_finite_losses(pair, batch, levels, boxless):
    targets = [empty() if i in boxless else t for i, t in enumerate(batch[1])]
    step = make_step(*pair, **levels)
    detection, distillation, seen = seeded(step, (batch[0], targets), pair[1])
    sum([*detection.values(), *distillation.values()]).backward()
    values = [*detection.values(), *distillation.values(), *seen.values(), *gradients(step).values()]
    assert all(torch.isfinite(v).all() for v in values)
    assert gradients(step).keys() == {name for name, _ in step.named_parameters()}
    assert (seen["positives"].item() > 0) == (len(boxless) == 1)
    if len(boxless) == 2:
        assert [v.item() for v in distillation.values()] == [0.0, 0.0, 0.0]


# Flags

PAIR = "--student r10 --teacher r18"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (f"{PAIR} --detector retinanet --proposals teacher", "--proposals teacher: RetinaNet's anchors are the same"),
        (f"{PAIR} --detector retinanet --proposals both", "--proposals both: RetinaNet's anchors are the same"),
        (f"{PAIR} --detector retinanet --no-sharing", "--no-sharing: RetinaNet's anchors are the same"),
        (f"{PAIR} --no-sharing --proposals teacher", "--no-sharing contradicts --proposals"),
        (f"{PAIR} --no-sharing --proposals both", "--no-sharing contradicts --proposals"),
        (f"{PAIR} --no-sharing --soft-labels all", "--no-sharing compares positive regions only"),
        (f"{PAIR} --no-sharing --no-cls --no-reg", "--no-sharing say what the heads' levels compare, and both are off"),
        (f"{PAIR} --proposals both --weight-cls 0 --no-reg", "both are off"),
        (f"{PAIR} --background-weight 2", "--background-weight needs --soft-labels all"),
        (f"{PAIR} --soft-labels all --no-cls", "--soft-labels all is of the cls level, which is off"),
        (f"{PAIR} --soft-labels all --cls-gate better", "--cls-gate better: a background region has no true class"),
        (f"{PAIR} --answers truth --no-cls --no-reg", "--answers truth is of the heads' levels, and both are off"),
        (f"{PAIR} --answers truth --no-sharing", "--answers truth is a control without the teacher"),
        (f"{PAIR} --answers truth --proposals both", "--answers truth is a control without the teacher"),
        (f"{PAIR} --answers truth --inherit", "--answers truth is a control without the teacher"),
        ("--student r10 --answers truth", "--answers needs --teacher BACKBONE"),
        (f"{PAIR} --answers smoothed", "--answers smoothed is of the cls level's positive regions"),
        (f"{PAIR} --answers smoothed --no-cls --no-reg", "--answers smoothed is of the cls level's positive regions"),
        (f"{PAIR} --answers smoothed --no-reg --soft-labels all", "--answers smoothed is of the cls level's positive"),
        (f"{PAIR} --teacher-weights coco", "torchvision's COCO detectors are r50, not r18"),
        ("--student r10 --teacher r101 --teacher-weights coco --detector retinanet", "are r50, not r101"),
        (f"{PAIR} --teacher-weights x.pth --teacher-epochs 3", "--teacher-epochs: the teacher of --teacher-weights"),
        ("--student r10 --teacher-weights coco", "needs --teacher BACKBONE"),
        ("--student r10 --proposals both", "--proposals needs --teacher BACKBONE"),
        ("--student r10 --decay-end 0.25", "--decay-end needs --teacher BACKBONE"),
        (f"{PAIR} --no-decay --decay-end 0.25", "--decay-end 0.25: --decay none never reaches 0"),
        (f"{PAIR} --decay-end 1.5", "'1.5' is not a number above 0 and up to 1"),
        (f"{PAIR} --decay-end 0", "'0' is not a number above 0 and up to 1"),
        ("--student r10 --inherit", "--inherit needs --teacher BACKBONE"),
        ("--student r10 --train-json x.json", "--train-json needs --dataset coco"),
        ("--student r10 --dataset voc --val-images x", "--val-images needs --dataset coco"),
        ("--student r10 --voc-years 2012", "--voc-years needs --dataset voc"),
        ("--student r10 --keep-empty", "--keep-empty needs --dataset coco"),
        ("--student r10 --dataset coco --split val", "--split val: COCO has one split"),
        ("--student r10 --dataset coco --download", "--download fetches VOC only"),
        ("--student r10 --seeds 3", "--seeds is of --table"),
        ("--student r10 --momentum 0.8", "--momentum is of --optimizer sgd"),
        (f"{PAIR} --sigma2 0", "'0' is not a number above 0"),
        (f"{PAIR} --background-weight -1", "--background-weight"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_with_the_reason(capsys, flags, says):
    assert says in wrong(capsys, options.parse, *flags.split())


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("", {}),
        ("--no-backbone --no-reg", {"backbone": 0.0, "reg": 0.0}),
        ("--mask fine-grained --sigma2 0.5", {"mask": "fine-grained", "sigma2": 0.5}),
        ("--cls-gate better --reg-gate student", {"cls_gate": "better", "reg_gate": "student"}),
        ("--soft-labels all --background-weight 2", {"soft_labels": "all", "background_weight": 2.0}),
        ("--answers truth --no-reg", {"answers": "truth", "reg": 0.0}),
        ("--answers smoothed --no-reg", {"answers": "smoothed", "reg": 0.0}),
        ("--proposals both --no-cls", {"proposals": "both", "cls": 0.0}),
        ("--no-sharing", {"sharing": False}),
        ("--weight-backbone 0.5 --weight-cls 2 --weight-reg 3", {"backbone": 0.5, "cls": 2.0, "reg": 3.0}),
        ("--backbone-norm cells", {"backbone_norm": "cells", "backbone": 0.1}),  # 64 channels
        ("--backbone-norm cells --fpn-channels 256", {"backbone_norm": "cells", "backbone": 0.025}),
        ("--backbone-norm cells --weight-backbone 0.3", {"backbone_norm": "cells", "backbone": 0.3}),
    ],
)
def test_flags_become_the_levels_of_the_step(flags, levels):
    usual = {
        "backbone": 6.4,
        "backbone_norm": "energy",
        "cls": 1.0,
        "reg": 0.1,
        "mask": "gaussian",
        "sigma2": 2.0,
        "cls_gate": "none",
    }
    usual |= {"reg_gate": "proposal", "proposals": "student", "sharing": True, "soft_labels": "positive"}
    usual |= {"background_weight": 1.5, "answers": "teacher"}
    assert vars(options.levels_of(options.parse([*PAIR.split(), *flags.split()]))) == {**usual, **levels}


@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_retinanet_has_torchvisions_anchors_and_half_the_rate(dataset):
    common = ["--student", "r50", "--dataset", dataset]
    two = [options.parse([*common, "--detector", kind]) for kind in ("faster-rcnn", "retinanet")]
    assert [args.anchor_scale for args in two] == [8, 4] and two[1].lr == two[0].lr / 2
    assert options.parse([*common, "--detector", "retinanet", "--lr", "0.3", "--anchor-scale", "5"]).lr == 0.3


# Whose weights a run starts from

CLASSES = ("disc", "square", "bar")


def save(path, kind="faster-rcnn", backbone="r10", classes=CLASSES, seed=8, **changes):
    """A checkpoint of a small detector, and the detector."""
    build = {"detector": kind, "backbone": backbone, "num_classes": len(classes), "norm": "batch", **SMALL, **changes}
    torch.manual_seed(seed)
    model = build_detector(**build)
    checkpoint.save(path, {"model": model.state_dict(), "build": build, "classes": list(classes), "settings": {}})
    return model, build


@pytest.fixture
def file(tmp_path):
    return tmp_path / "last.pth"


@pytest.mark.parametrize("kind", ["faster-rcnn", "retinanet"])
def test_inherit_copies_the_pyramid_and_heads_and_not_the_body(kind):
    student, teacher = detector(kind=kind), detector(seed=1, kind=kind)  # the same body: its shapes would match
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copied = inherit(student, teacher)
    after, theirs = student.state_dict(), teacher.state_dict()
    body = {name for name in after if name.startswith("backbone.body.")}
    assert all(torch.equal(after[name], before[name]) for name in body)
    assert all(torch.equal(after[name], theirs[name]) for name in after.keys() - body)
    assert copied == len(after) - len(body) > 20
    assert not torch.equal(
        before["backbone.fpn.layer_blocks.0.0.weight"], theirs["backbone.fpn.layer_blocks.0.0.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"backbone": "r50"}, ("backbone.fpn.inner_blocks",)),  # four times as wide stages
        ({"head_channels": 48}, ("box_head.fc", "box_predictor")),
        ({"fpn_channels": 24}, ("backbone.fpn", "rpn.head", "box_head.fc6.weight")),
    ],
)
def test_inherit_copies_where_shapes_match_and_leaves_the_rest(changes, stays):
    student, teacher = detector(kind="faster-rcnn"), detector(seed=1, kind="faster-rcnn", **changes)
    before, theirs = {name: value.clone() for name, value in student.state_dict().items()}, teacher.state_dict()
    copied = inherit(student, teacher)
    expected = {name for name, value in before.items() if "body" not in name and value.shape == theirs[name].shape}
    assert copied == len(expected) > 5
    for name, value in student.state_dict().items():
        assert torch.equal(value, theirs[name] if name in expected else before[name]), name
    kept = before.keys() - expected
    assert all(any(part in name for name in kept) for part in stays)


def test_inherit_of_a_cast_teacher_keeps_the_students_type():
    student, teacher = detector(), detector(seed=1).to(torch.bfloat16)
    inherit(student, teacher)
    assert {v.dtype for v in student.state_dict().values() if v.is_floating_point()} == {torch.float32}
    weight = student.head.classification_head.cls_logits.weight
    assert torch.equal(weight, teacher.head.classification_head.cls_logits.weight.float())


@pytest.mark.parametrize("kind", ["faster-rcnn", "retinanet"])
def test_student_weights_are_loaded_whole(file, kind):
    model, build = save(file, kind)
    torch.manual_seed(3)
    student = build_detector(**build)
    start_from(student, file, build, CLASSES)
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and len(state) > 100


@pytest.mark.parametrize(
    ("changes", "classes", "says"),
    [
        ({}, ("disc", "square", "ball"), "other classes: without ball; besides bar"),
        ({}, ("disc", "square"), "other classes: besides bar"),
        ({}, CLASSES[::-1], "other classes: the same names in another order"),
        ({"backbone": "r18"}, CLASSES, "not the weights of this student.*'backbone': 'r10'"),
        ({"fpn_channels": 24}, CLASSES, "not the weights of this student.*'fpn_channels': 16"),
        ({"detector": "retinanet"}, CLASSES, "not the weights of this student.*'detector': 'faster-rcnn'"),
    ],
)
def test_student_weights_of_another_student_are_refused_by_name(file, changes, classes, says):
    _, build = save(file)
    build = {**build, **changes}
    with pytest.raises(UserError, match=says) as error:
        start_from(build_detector(**build), file, build, classes)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_student_weights_that_are_not_there_are_refused_by_name(file):
    with pytest.raises(UserError, match=f"{file}: no such checkpoint"):
        start_from(None, file, {}, CLASSES)


def arguments(file, *flags):
    return options.parse(["--student", "r10", "--teacher", "r18", "--teacher-weights", str(file), *flags])


@pytest.mark.parametrize("kind", ["faster-rcnn", "retinanet"])
def test_a_teacher_that_fits_is_read(file, kind):
    model, build = save(file, kind, "r18", anchor_scale=3)
    teacher, saved = read_teacher(arguments(file, "--detector", kind, "--anchor-scale", "3"), CLASSES)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert saved["build"] == build and not teacher.training


@pytest.mark.parametrize(
    ("saved", "flags", "classes", "says"),
    [
        ({"kind": "retinanet"}, "", CLASSES, "detector: retinanet, not faster-rcnn"),
        ({}, "--detector retinanet", CLASSES, "detector: faster-rcnn, not retinanet"),
        ({"backbone": "r10"}, "", CLASSES, "backbone: r10, not r18"),
        ({}, "", CLASSES[:2], "classes: others: besides bar"),
        ({}, "", CLASSES[::-1], "classes: others: the same names in another order"),
        ({"kind": "retinanet", "anchor_scale": 3}, "--detector retinanet", CLASSES, "anchor scale: 3, not 2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_by_name(file, saved, flags, classes, says):
    save(file, **{"backbone": "r18", **saved})
    with pytest.raises(UserError, match=says) as error:
        read_teacher(arguments(file, *flags.split()), classes)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_faster_rcnns_anchors_may_differ(file):
    save(file, backbone="r18", anchor_scale=7)
    assert read_teacher(arguments(file), CLASSES)[1]["build"]["anchor_scale"] == 7


@pytest.mark.parametrize("scale", [4, 3])
def test_cocos_teacher_is_asked_for_by_name(monkeypatch, scale):
    asked, build = [], {"detector": "retinanet", "backbone": "r50", "anchor_scale": 4}
    monkeypatch.setattr("tar.teacher.build_coco_teacher", lambda *given: asked.append(given) or ("teacher", build))
    words = "--student r10 --teacher r50 --teacher-weights coco --detector retinanet --size 64 96 --anchor-scale"
    args = options.parse([*words.split(), str(scale)])
    if scale == 4:
        expected = {"build": build, "classes": list(CLASSES), "settings": {}}
        assert read_teacher(args, CLASSES) == ("teacher", expected)
    else:
        with pytest.raises(UserError, match=r"^coco: the teacher's anchor scale: 4, not 3 as"):
            read_teacher(args, CLASSES)
    assert asked == [("retinanet", CLASSES, 64, 96)]


def test_a_student_that_inherits_trains_its_teacher_first(tmp_path, capsys):
    flags = [*TINY, "--epochs", "1", "--student", "r10", "--teacher", "r18", "--output", tmp_path / "run"]
    call(train.main, *flags, "--inherit")
    line = next(line for line in capsys.readouterr().out.splitlines() if "start the student's" in line)
    assert int(line.split()[6]) > 20
    settings = {run.name: json.loads((run / "config.json").read_text()) for run in tmp_path.iterdir()}
    assert settings.pop("run")["inherit"] is True
    assert ["inherit" in teacher for teacher in settings.values()] == [False]


def test_all_levels_off_inherits_nothing():
    args = options.parse(["--student", "r10", "--teacher", "r18", "--no-backbone", "--no-cls", "--no-reg", "--inherit"])
    assert args.teacher is None and args.inherit is False
