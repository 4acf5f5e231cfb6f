"""RetinaNet, MobileNet and COCO's teachers: built as torchvision builds them, distilled over anchors."""

import copy
import math
from functools import cache
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import SMALL
from test_distill import convolve, empty, gradients, iou, make_step, mask_at, reached
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError, checkpoint
from tar.distill import Step
from tar.models import STRIDES, FrozenNorm, build_coco_teacher, build_detector
from tar.regions import box_head

LOSSES = {"classification", "bbox_regression"}
DISTILLED = {"distill_backbone", "distill_cls", "distill_reg"}


def detector(backbone="r10", seed=0, kind="retinanet", **changes):
    torch.manual_seed(seed)
    model = build_detector(kind, backbone, 3, **{**SMALL, "anchor_scale": 2, **changes})
    for module in model.modules():  # a block's last norm may start at zero, and would hide its convolutions
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model.to(memory_format=torch.channels_last)


@cache
def _drawn_pair():
    """A student, and a frozen teacher with a wider pyramid; their heads' answers differ, as fresh ones hardly do."""
    student, teacher = detector().train(), detector("r18", seed=1, fpn_channels=24).eval().requires_grad_(False)
    with torch.no_grad():
        for model, size, bias in ((student, 6, -0.5), (teacher, 3, 0.0)):
            answers = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
            for layer in answers:
                layer.weight *= size
            answers[0].bias.fill_(bias)
    return student, teacher


def retinanet_pair():
    return copy.deepcopy(_drawn_pair())


@pytest.fixture
def pair():
    return retinanet_pair()


@pytest.fixture
def halves():
    """Two images of which one is halved and one padded; all boxes are whole numbers after that, so IoUs are exact."""
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 128, 192, generator=random), torch.rand(3, 64, 64, generator=random)]
    boxes = [[[16.0, 12, 92, 100], [60, 40, 160, 112], [172, 100, 184, 110]], [[6.0, 4, 38, 40], [30, 20, 62, 60]]]
    labels = [[1, 2, 3], [3, 1]]
    return images, [{"boxes": torch.tensor(b), "labels": torch.tensor(k)} for b, k in zip(boxes, labels, strict=True)]


# The detector


def test_the_pyramid_is_p3_to_p7():
    with torch.device("meta"):
        model = build_detector("retinanet", "r50", 3, **SMALL)
        levels = model.backbone(torch.zeros(1, 3, 256, 384))
    assert list(levels) == ["0", "1", "2", "p6", "p7"] and model.strides == (8, 16, 32, 64, 128)
    assert [tuple(level.shape) for level in levels.values()] == [(1, 16, 256 // s, 384 // s) for s in model.strides]


def test_anchors_of_scale_4_are_torchvisions():
    mine, theirs = detector(anchor_scale=4).anchor_generator, _default_anchorgen()
    assert mine.sizes[0] == (32, 40, 50) and mine.sizes == theirs.sizes and mine.aspect_ratios == theirs.aspect_ratios
    assert all(torch.equal(a, b) for a, b in zip(mine.cell_anchors, theirs.cell_anchors, strict=True))
    assert detector(anchor_scale=2).anchor_generator.sizes[:2] == ((16, 20, 25), (32, 40, 50))


def test_training_returns_losses_that_reach_every_parameter(halves):
    model = detector().train()
    losses = model(*halves)
    assert losses.keys() == LOSSES and all(torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert reached(model) == {name for name, _ in model.named_parameters()}


def test_evaluation_returns_boxes_in_pixels_of_the_given_images(pair):
    model, sizes = pair[1], [(128, 192), (32, 48)]
    model.score_thresh = 0.0
    found = model([torch.rand(3, *size) for size in sizes])
    assert len(found) == 2
    for result, (height, width) in zip(found, sizes, strict=True):
        assert result.keys() == {"boxes", "labels", "scores"}
        assert 0 < len(result["boxes"]) == len(result["labels"]) == len(result["scores"])
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert result["boxes"][:, 2].max() > 0.7 * width  # not in pixels of the resized image
        assert result["labels"].max() <= 3 and ((result["scores"] >= 0) & (result["scores"] <= 1)).all()


def test_as_many_candidates_of_a_level_as_the_second_number_of_rpn_top_n():
    assert detector(rpn_top_n=(70, 30)).topk_candidates == 30


@pytest.mark.parametrize(("norm", "channels", "groups"), [("batch", 16, 2), ("batch", 12, 1), ("frozen", 16, None)])
def test_the_head_has_group_norm_from_scratch_and_none_beside_frozen_norm(norm, channels, groups):
    model = detector(norm=norm, fpn_channels=channels)
    found = [m for m in model.head.modules() if "Norm" in type(m).__name__ and "Conv" not in type(m).__name__]
    expected = [(nn.GroupNorm, groups, channels)] * (8 if groups else 0)  # four in each of the two branches
    assert [(type(m), m.num_groups, m.num_channels) for m in found] == expected
    kinds = {type(m) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}
    assert kinds == {nn.BatchNorm2d if groups else FrozenNorm}
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.fpn.modules()) == bool(groups)


def test_answers_leave_as_float32_under_autocast(pair, halves):
    student, computed = pair[0], []
    for part in (student.head.classification_head.cls_logits, student.head.regression_head.bbox_reg):
        part.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = student.backbone(torch.rand(1, 3, 64, 64))
        answers = student.head(list(features.values()))
        losses = student(*halves)
    assert set(computed) == {torch.bfloat16} and len(features) == 5
    assert {t.dtype for t in (*features.values(), *answers.values(), *losses.values())} == {torch.float32}


# The step


def test_plain_losses_are_torchvisions(pair, halves):
    images, targets = halves
    for batch in ((images, targets), (images, [targets[0], empty()])):
        ours, distillation, seen = Step(pair[0])(*batch)
        theirs = pair[0](*batch)
        assert ours.keys() == LOSSES and (distillation, seen) == ({}, {})
        assert all(torch.equal(ours[name], theirs[name]) and ours[name] > 0 for name in LOSSES)


def test_distillation_leaves_losses_and_gradients_of_detection_alone(pair, halves):
    student, teacher = pair
    sum(student(*halves).values()).backward()
    plain = gradients(student)
    student.zero_grad()
    sum(make_step(student, teacher)(*halves, teacher)[0].values()).backward()
    assert gradients(student).keys() == plain.keys()
    assert all(torch.equal(plain[name], gradient) for name, gradient in gradients(student).items())


def test_gradients_reach_every_parameter_and_adapter_and_never_the_teacher(pair, halves):
    student, teacher = pair
    step = make_step(student, teacher, reg_gate="none", mask="full")  # no box covers the one cell of P7
    before = [v.clone() for v in teacher.state_dict().values()]
    detection, distillation, _ = step(*halves, teacher)
    assert distillation.keys() == DISTILLED
    sum([*detection.values(), *distillation.values()]).backward()
    assert len(step.adapters) == 5 and reached(step) == {name for name, _ in step.named_parameters()}
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("level", "reaches", "spares"),
    [
        ("backbone", ("adapters", "student.backbone"), ("student.head",)),
        ("cls", ("student.backbone", "classification_head"), ("adapters", "regression_head")),
        ("reg", ("student.backbone", "regression_head"), ("adapters", "classification_head")),
    ],
)
def test_each_distillation_term_trains_its_own_part(pair, halves, level, reaches, spares):
    step = make_step(*pair, reg_gate="none")
    step(*halves, pair[1])[1][f"distill_{level}"].backward()
    assert all(any(part in name for name in reached(step)) for part in reaches)
    assert not any(part in name for name in reached(step) for part in spares)


def test_the_teacher_runs_its_backbone_and_head_once_and_nothing_else(pair, halves, monkeypatch):
    student, teacher = pair
    for name in ("forward", "transform", "anchor_generator", "postprocess_detections", "compute_loss"):
        monkeypatch.setattr(teacher, name, None)
    calls = []
    for part in (teacher.backbone, teacher.head):
        part.register_forward_hook(lambda module, *_: calls.append((module, torch.is_grad_enabled())))
    make_step(student, teacher)(*halves, teacher)
    assert calls == [(teacher.backbone, False), (teacher.head, False)]


# The losses, anchor by anchor


def decode(deltas, anchor):
    """RetinaNet's box regression, without weights."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + (0.5 + deltas[0]) * width, anchor[1] + (0.5 + deltas[1]) * height
    half_width, half_height = math.exp(deltas[2]) * width / 2, math.exp(deltas[3]) * height / 2
    return [x - half_width, y - half_height, x + half_width, y + half_height]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def match(anchors, boxes):
    """Each anchor's box; None for the background, "neither" from IoU 0.4 to 0.5. A box's best anchors are its own."""
    overlaps = [[iou(anchor, box) for box in boxes] for anchor in anchors]
    bests = [max(row[k] for row in overlaps) for k in range(len(boxes))]
    found = []
    for row in overlaps:
        k = row.index(max(row))
        own = any(value == best for value, best in zip(row, bests, strict=True))
        found.append(k if own or row[k] >= 0.5 else None if row[k] < 0.4 else "neither")
    return found


class ByHand:
    """The raw answers of both models for every anchor of a batch that is positive or background."""

    def __init__(self, step, teacher, batch):
        student = step.student
        images, targets = student.transform(*batch)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            features, taught = (list(m.backbone(pixels).values()) for m in (student, teacher))
            answers = [model.head(levels) for model, levels in ((student, features), (teacher, taught))]
        self.adapted = [convolve(f, a) for f, a in zip(features, step.adapters, strict=True)]
        self.wanted = [f.double().numpy() for f in taught]
        self.truth = [t["boxes"].tolist() for t in targets]
        self.positives, self.background = [], []  # (anchor, box, label, student's logits and deltas, teacher's)
        for i, anchors in enumerate(student.anchor_generator(images, features)):
            outputs = [a[key][i].double().tolist() for a in answers for key in ("cls_logits", "bbox_regression")]
            labels, anchors = targets[i]["labels"].tolist(), anchors.tolist()
            for anchor, k, *both in zip(anchors, match(anchors, self.truth[i]), *outputs, strict=True):
                if k is None:
                    self.background.append((anchor, None, 0, *both))
                elif k != "neither":
                    self.positives.append((anchor, self.truth[i][k], labels[k], *both))

    def backbone_loss(self, norm):
        total = below = 0.0
        for stride, mine, wanted in zip((8, 16, 32, 64, 128), self.adapted, self.wanted, strict=True):
            for image, boxes in enumerate(self.truth):
                for i in range(mine.shape[2]):
                    for j in range(mine.shape[3]):
                        weight = mask_at("gaussian", (j + 0.5) * stride, (i + 0.5) * stride, boxes)
                        below += weight * (1 if norm == "cells" else (wanted[image, :, i, j] ** 2).sum())
                        total += weight * ((mine[image, :, i, j] - wanted[image, :, i, j]) ** 2).sum()
        return total / (2 * below)

    def soft_labels(self, row):
        """The binary cross-entropies of an anchor, summed over the classes; the column of the background is left."""
        return -sum(
            sigmoid(t) * math.log(sigmoid(s)) + sigmoid(-t) * math.log(sigmoid(-s))
            for s, t in zip(row[3][1:], row[5][1:], strict=True)
        )

    def cls_loss(self, gate="none"):
        kept = [row for row in self.positives if gate == "none" or row[5][row[2]] > row[3][row[2]]]
        return sum(map(self.soft_labels, kept)) / len(self.positives), len(kept)

    def cls_loss_of_all(self, background_weight):
        total = sum(map(self.soft_labels, self.positives))
        total += background_weight * sum(map(self.soft_labels, self.background))
        return total / (len(self.positives) + len(self.background))

    def reg_loss(self, gate):
        total, opened = 0.0, 0
        for anchor, box, _, _, mine, _, taught in self.positives:
            reference = {"proposal": anchor, "student": decode(mine, anchor)}.get(gate)
            if gate == "none" or iou(decode(taught, anchor), box) > iou(reference, box):
                opened += 1
                gaps = [abs(a - b) for a, b in zip(mine, taught, strict=True)]
                total += sum(gap * gap * 9 / 2 if gap < 1 / 9 else gap - 1 / 18 for gap in gaps)
        return total / len(self.positives), opened


@pytest.mark.parametrize("norm", ["energy", "cells"])
def test_backbone_level_is_the_equation(pair, halves, norm):
    step = make_step(*pair, backbone_norm=norm)
    got = step(*halves, pair[1])[1]["distill_backbone"].item()
    assert got == pytest.approx(ByHand(step, pair[1], halves).backbone_loss(norm), rel=1e-4)


@pytest.mark.parametrize("gate", ["none", "better"])
def test_classification_level_is_the_equation(pair, halves, gate):
    step = make_step(*pair, cls_gate=gate)
    _, distillation, seen = step(*halves, pair[1])
    hand = ByHand(step, pair[1], halves)
    expected, kept = hand.cls_loss(gate)
    assert seen["positives"].item() == len(hand.positives) > 20
    assert kept == len(hand.positives) if gate == "none" else 0 < kept < len(hand.positives)
    assert distillation["distill_cls"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gate", ["proposal", "student", "none"])
def test_regression_level_is_the_equation(pair, halves, gate):
    step = make_step(*pair, reg_gate=gate)
    _, distillation, seen = step(*halves, pair[1])
    hand = ByHand(step, pair[1], halves)
    expected, opened = hand.reg_loss(gate)
    assert opened == len(hand.positives) if gate == "none" else 0 < opened < len(hand.positives)
    assert seen["gate_open"].item() == pytest.approx(opened / len(hand.positives), rel=1e-5)
    assert distillation["distill_reg"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weight", [1.5, 0.25])
def test_soft_labels_on_all_anchors_leave_out_those_that_are_neither(pair, halves, weight):
    step = make_step(*pair, soft_labels="all", background_weight=weight)
    _, distillation, seen = step(*halves, pair[1])
    hand = ByHand(step, pair[1], halves)
    assert seen["positives"].item() == len(hand.positives)
    anchors = 2 * 9 * (96 + 24 + 6 + 2 + 1)
    assert 1000 < len(hand.positives) + len(hand.background) < anchors
    assert distillation["distill_cls"].item() == pytest.approx(hand.cls_loss_of_all(weight), rel=1e-4)
    assert distillation["distill_reg"].item() == pytest.approx(hand.reg_loss("proposal")[0], rel=1e-4)


@pytest.mark.parametrize("soft_labels", ["positive", "all"])
def test_by_the_truth_the_heads_levels_have_the_labels_and_the_boxes(pair, halves, soft_labels):
    step = make_step(*pair, answers="truth", soft_labels=soft_labels)
    distillation = step(*halves, pair[1])[1]
    hand, cls, reg = ByHand(step, pair[1], halves), 0.0, 0.0
    kept = [(row, 1.0) for row in hand.positives]
    if soft_labels == "all":
        kept += [(row, 1.5) for row in hand.background]
    for row, weight in kept:
        signs = [1 if k == row[2] else -1 for k in range(1, len(row[3]))]
        cls -= weight * sum(math.log(sigmoid(sign * s)) for sign, s in zip(signs, row[3][1:], strict=True))
    for anchor, box, _, _, mine, *_ in hand.positives:
        (ax, ay, aw, ah), (bx, by, bw, bh) = ((x0 + x1, y0 + y1, x1 - x0, y1 - y0) for x0, y0, x1, y1 in (anchor, box))
        wanted = (bx - ax) / 2 / aw, (by - ay) / 2 / ah, math.log(bw / aw), math.log(bh / ah)
        gaps = [abs(a - b) for a, b in zip(mine, wanted, strict=True)]
        reg += sum(gap * gap * 9 / 2 if gap < 1 / 9 else gap - 1 / 18 for gap in gaps)
    assert distillation["distill_cls"].item() == pytest.approx(cls / len(kept), rel=1e-4)
    assert distillation["distill_reg"].item() == pytest.approx(reg / len(hand.positives), rel=1e-4)


def test_smoothed_labels_have_the_mean_of_the_teachers_for_the_true_class_and_for_the_others(pair, halves):
    step = make_step(*pair, answers="smoothed")
    pair[1].head.classification_head.cls_logits.bias.view(-1, 4)[:, 3] += 2.0  # lest all classes be alike to it
    got = step(*halves, pair[1])[1]["distill_cls"].item()
    positives = ByHand(step, pair[1], halves).positives
    taught = [(sigmoid(s), k == row[2]) for row in positives for k, s in enumerate(row[5][1:], 1)]
    mean = {kind: [p for p, true in taught if true == kind] for kind in (True, False)}
    mean = {kind: sum(p) / len(p) for kind, p in mean.items()}
    assert abs(mean[True] - mean[False]) > 0.01
    cls = 0.0
    for row in positives:
        for k, s in enumerate(row[3][1:], 1):
            wanted = mean[k == row[2]]
            cls -= wanted * math.log(sigmoid(s)) + (1 - wanted) * math.log(sigmoid(-s))
    assert got == pytest.approx(cls / len(positives), rel=1e-4)


def test_the_column_of_the_background_does_not_matter(pair, halves):
    student, teacher = pair
    step = make_step(student, teacher, cls_gate="better")
    before = step(*halves, teacher)[1]
    teacher.head.classification_head.cls_logits.bias.view(-1, 4)[:, 0] = 9.0
    after = step(*halves, teacher)[1]
    assert all(torch.equal(before[name], after[name]) for name in DISTILLED)


# Images without boxes


@pytest.mark.parametrize("soft_labels", ["positive", "all"])
@pytest.mark.parametrize("boxless", [(0,), (1,), (0, 1)])
def test_images_without_boxes_give_finite_losses_and_gradients(pair, halves, boxless, soft_labels):
    images, targets = halves
    step = make_step(*pair, reg_gate="none" if len(boxless) == 1 else "proposal", soft_labels=soft_labels)
    targets = [empty() if i in boxless else t for i, t in enumerate(targets)]
    detection, distillation, seen = step(images, targets, pair[1])
    sum([*detection.values(), *distillation.values()]).backward()
    values = [*detection.values(), *distillation.values(), *seen.values(), *gradients(step).values()]
    assert all(torch.isfinite(v).all() for v in values)
    # DDP waits for the gradient of every parameter, so a zero must be there too.
    assert gradients(step).keys() == {name for name, _ in step.named_parameters()}
    if len(boxless) == 2:
        assert [distillation[f"distill_{name}"].item() for name in ("backbone", "reg")] == [0, 0]
        assert (distillation["distill_cls"].item() > 0) == (soft_labels == "all")
        assert [seen["positives"].item(), seen["gate_open"].item(), detection["bbox_regression"].item()] == [0, 0, 0]
    else:
        assert all(v.item() > 0 for v in distillation.values()) and seen["positives"].item() > 1


def test_an_image_without_boxes_adds_nothing(pair, halves):
    (image, _), (target, _) = halves
    student = detector(norm="frozen", trainable_layers=5).train()  # else the images share their statistics
    step = make_step(student, pair[1], reg_gate="none")
    alone = step([image], [target], pair[1])[1]
    both = step([image, image], [target, empty()], pair[1])[1]
    assert all(both[name].item() == pytest.approx(alone[name].item(), rel=1e-5) and both[name] > 0 for name in alone)


# MobileNet


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """torchvision's MobileNet with statistics of its own, in evaluation mode, and a file of its weights."""
    torch.manual_seed(3)
    network = torchvision.models.mobilenet_v3_large().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.001, 0.02)  # so small that the eps is seen
            nn.init.uniform_(module.weight, 0.03, 0.1)
    path = tmp_path_factory.mktemp("mobilenet") / "weights.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("kind", STRIDES)
def test_mobilenets_pyramid_has_the_strides_of_the_detector(kind):
    with torch.device("meta"):
        model = build_detector(kind, "mobilenet_v3_large", 3, **SMALL)
        levels = model.backbone(torch.zeros(1, 3, 128, 256))
    assert [tuple(level.shape) for level in levels.values()] == [(1, 16, 128 // s, 256 // s) for s in STRIDES[kind]]


@pytest.mark.parametrize("kind", STRIDES)
def test_mobilenets_stages_are_torchvisions_with_frozen_norm(mobilenet, kind):
    network, path = mobilenet
    model = detector("mobilenet_v3_large", kind=kind, backbone_weights=str(path))
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert {(type(m), m.eps) for m in norms} == {(FrozenNorm, 0.001)} and len(norms) > 40
    stages, x = {}, torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        taken = model.backbone.body(x)
        for block in network.features:
            x = block(x)
            stages[64 // x.shape[2]] = x  # the last one of each stride stays
    assert list(stages) == [2, 4, 8, 16, 32]
    strides = [s for s in STRIDES[kind] if s <= 32]
    for stride, level in zip(strides, taken.values(), strict=True):
        torch.testing.assert_close(level, stages[stride], rtol=1e-3, atol=1e-4 * stages[stride].abs().max().item())


@pytest.mark.parametrize(("layers", "first"), [(None, 4), (0, 17), (1, 13), (2, 7), (3, 4), (4, 2), (5, 0)])
def test_mobilenets_last_stages_train(mobilenet, layers, first):
    model = detector("mobilenet_v3_large", backbone_weights=str(mobilenet[1]), trainable_layers=layers)
    trained = {int(name.split(".")[0]) for name, p in model.backbone.body.named_parameters() if p.requires_grad}
    assert trained == set(range(first, 17))  # blocks 2, 4, 7 and 13 halve the image


@pytest.mark.parametrize("kind", STRIDES)
def test_mobilenet_from_scratch_learns_from_a_resnet(halves, kind):
    student = detector("mobilenet_v3_large", kind=kind, anchor_scale=4 if kind == "faster-rcnn" else 2).train()
    norms = {(type(m), m.eps) for m in student.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(nn.BatchNorm2d, 0.001)}
    teacher = detector(seed=1, kind=kind, fpn_channels=24).eval().requires_grad_(False)
    step = make_step(student, teacher, reg_gate="none")
    detection, distillation, _ = step(*halves, teacher)
    assert distillation.keys() == DISTILLED
    values = [*detection.values(), *distillation.values()]
    sum(values).backward()
    assert all(torch.isfinite(v) and v > 0 for v in values)
    assert gradients(step).keys() == {name for name, _ in step.named_parameters()}


# COCO's teachers

CLASSES = ("dog", "person", "toothbrush", "bird")
ROWS = [0, 18, 1, 90, 16]  # in COCO's list of 91, the background first
COCO = {"faster-rcnn": fasterrcnn_resnet50_fpn, "retinanet": retinanet_resnet50_fpn}


def published(state):
    """A state dict under the names of the published files, which are older than those of today."""
    old = {"rpn.head.conv.0.0.": "rpn.head.conv."}
    for i in range(4):
        old |= {f"backbone.fpn.{part}_blocks.{i}.0.": f"backbone.fpn.{part}_blocks.{i}." for part in ("inner", "layer")}
        old |= {f"head.{k}_head.conv.{i}.0.": f"head.{k}_head.conv.{2 * i}." for k in ("classification", "regression")}
    renamed = {}
    for name, value in state.items():
        start, end = name.rsplit(".", 1)
        if end != "num_batches_tracked":  # frozen batch norm has none
            renamed[old.get(f"{start}.", f"{start}.") + end] = value
    return renamed


@pytest.fixture(scope="module", params=COCO)
def coco(request):
    """torchvision's own detector with weights drawn, in evaluation mode, and the teacher made of them."""
    torch.manual_seed(4)
    theirs = COCO[request.param](weights=None, weights_backbone=None, min_size=64, max_size=96).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
    theirs.backbone.body.bn1.running_var.fill_(1e-5)  # so small that an eps would be seen
    theirs.backbone.body.bn1.weight.data.fill_(0.003)
    for name, parameter in theirs.named_parameters():
        if "cls_logits" in name or "cls_score" in name or "bbox_" in name:
            nn.init.normal_(parameter, std=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: published(theirs.state_dict()))
        ours, build = build_coco_teacher(request.param, CLASSES, 64, 96)
    return request.param, theirs, ours, build


def test_cocos_teacher_scores_its_classes_as_torchvisions_does(coco):
    kind, theirs, ours, _ = coco
    image, regions = torch.rand(3, 64, 96), [torch.tensor([[4.0, 6, 40, 50], [20, 10, 90, 60], [3, 3, 12, 12]])]
    with torch.no_grad():
        pixels = [model.transform([image])[0] for model in (theirs, ours)]
        assert torch.equal(pixels[0].tensors, pixels[1].tensors)
        levels = [model.backbone(p.tensors) for model, p in zip((theirs, ours), pixels, strict=True)]
        if kind == "retinanet":
            answers = [model.head(list(f.values())) for model, f in zip((theirs, ours), levels, strict=True)]
            (whole, deltas), (scores, boxes) = ([a["cls_logits"][0], a["bbox_regression"][0]] for a in answers)
        else:
            answers = [box_head(model, f, regions, [(64, 96)]) for model, f in zip((theirs, ours), levels, strict=True)]
            (whole, deltas), (scores, boxes) = answers
            deltas = torch.cat([deltas[:, 4 * k : 4 * k + 4] for k in ROWS], 1)
            found = [model.rpn(p, f)[0][0] for model, p, f in zip((theirs, ours), pixels, levels, strict=True)]
            torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-2)
    expected = torch.stack([whole[:, k] for k in ROWS], 1)
    assert scores.shape == expected.shape and expected.std() > 0.01
    assert (expected[:, 1:] - expected[:, 1:].roll(1, 1)).abs().mean() > 0.1 * expected.std()  # classes do differ
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    torch.testing.assert_close(boxes, deltas, rtol=1e-3, atol=1e-3 * deltas.std().item())


def test_cocos_teacher_is_rebuilt_from_its_arguments(coco):
    kind, theirs, ours, build = coco
    anchors = [m.anchor_generator if kind == "retinanet" else m.rpn.anchor_generator for m in (theirs, ours)]
    assert anchors[0].sizes == anchors[1].sizes and not ours.training
    assert (build["detector"], build["backbone"], build["num_classes"]) == (kind, "r50", 4)
    with torch.device("meta"):
        again = build_detector(**build)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (again, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", COCO)
def test_a_class_that_coco_lacks_is_refused_before_anything_is_fetched(monkeypatch, kind):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", None)
    with pytest.raises(UserError, match=r"COCO has no class called aeroplane, unicorn$"):
        build_coco_teacher(kind, ("dog", "aeroplane", "unicorn"))


@pytest.mark.parametrize(("kind", "file"), [("faster-rcnn", "258fb6c6.pth"), ("retinanet", "eeacb38b.pth")])
def test_cocos_weights_without_a_network_are_refused_with_a_way_out(monkeypatch, kind, file):
    def fail(*args, **kwargs):
        raise URLError("no route\nto host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError) as refusal:
        build_coco_teacher(kind, CLASSES)
    message = str(refusal.value)
    assert "\n" not in message and "no route to host" in message and "--teacher-weights FILE" in message
    assert message.count(file) == 2 and f"{torch.hub.get_dir()}/checkpoints" in message  # the address, and the place


def test_a_retinanet_comes_back_from_its_checkpoint(tmp_path, halves):
    build = {"detector": "retinanet", "backbone": "r10", "num_classes": 3, "norm": "batch", **SMALL}
    torch.manual_seed(0)
    model = build_detector(**build).eval()
    state = {"model": model.state_dict(), "build": build, "classes": ["a", "b", "c"], "settings": {}}
    checkpoint.save(tmp_path / "last.pth", state)
    again, _ = checkpoint.load_detector(tmp_path / "last.pth")
    answers = [m.head(list(m.backbone(halves[0][1][None]).values())) for m in (model, again)]
    assert all(torch.equal(answers[0][key], answers[1][key]) for key in ("cls_logits", "bbox_regression"))
