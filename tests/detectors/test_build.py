"""Detectors: torchvision's calling convention, the options of build_detector, float32 where coordinates are."""

import pytest
import torch
from small_detectors import KINDS, LOSSES, SMALL, batch, detector, make_step, pair, reached, run
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError
from tar.detectors.backbones import BACKBONES, FrozenNorm
from tar.detectors.build import STRIDES, build_detector

both_detectors = pytest.mark.parametrize("kind", KINDS)


@both_detectors
def test_training_returns_losses_that_reach_every_parameter(kind):
    model = detector(kind).train()
    losses = model(*batch())
    assert losses.keys() == LOSSES[kind] and all(torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert reached(model) == {name for name, _ in model.named_parameters()}


@both_detectors
def test_evaluation_returns_boxes_in_pixels_of_the_given_images(kind):
    model, sizes = pair(kind)[1], [(128, 192), (32, 48)]
    (model if kind == "retinanet" else model.roi_heads).score_thresh = 0.0
    found = model([torch.rand(3, *size) for size in sizes])
    assert len(found) == 2
    for result, (height, width) in zip(found, sizes, strict=True):
        assert result.keys() == {"boxes", "labels", "scores"}
        assert 0 < len(result["boxes"]) == len(result["labels"]) == len(result["scores"])
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert result["boxes"][:, 2].max() > 0.7 * width  # not in pixels of the resized image
        assert result["labels"].max() <= 3 and ((result["scores"] >= 0) & (result["scores"] <= 1)).all()


def test_a_students_state_dict_loads_into_torchvisions_own_detector(tmp_path):
    torch.manual_seed(0)
    build = {"detector": "faster-rcnn", "backbone": "r50", "num_classes": 3, "norm": "frozen"}
    student = build_detector(**build, min_size=96, max_size=128).eval()
    for module in student.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    torch.save(student.state_dict(), tmp_path / "student.pth")
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3 + 1, min_size=96, max_size=128
    ).eval()
    theirs.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True))
    assert theirs.rpn.anchor_generator.sizes == student.rpn.anchor_generator.sizes
    image = torch.rand(3, 120, 144)
    with torch.no_grad():
        pyramids = [model.backbone(image[None]) for model in (student, theirs)]
        (mine,), (its,) = (model([image]) for model in (student, theirs))
    for level, other in zip(*(pyramid.values() for pyramid in pyramids), strict=True):
        torch.testing.assert_close(level, other, rtol=1e-3, atol=1e-3 * other.std().item())
    assert len(its["boxes"]) > 20 and torch.equal(mine["labels"], its["labels"])
    torch.testing.assert_close(mine["scores"], its["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine["boxes"], its["boxes"], rtol=1e-3, atol=0.1)


# The pyramid and the anchors


@pytest.mark.parametrize(
    ("backbone", "blocks", "widths"),
    [
        ("r10", [1, 1, 1, 1], [64, 128, 256, 512]),
        ("r18", [2, 2, 2, 2], [64, 128, 256, 512]),
        ("r34", [3, 4, 6, 3], [64, 128, 256, 512]),
        ("r50", [3, 4, 6, 3], [256, 512, 1024, 2048]),
        ("r101", [3, 4, 23, 3], [256, 512, 1024, 2048]),
        ("r152", [3, 8, 36, 3], [256, 512, 1024, 2048]),
        ("mobilenet_v3_large", None, [24, 40, 112, 960]),
    ],
)
def test_every_backbone_has_the_stages_of_its_name_and_the_strides_of_the_detector(backbone, blocks, widths):
    assert list(BACKBONES) == ["r10", "r18", "r34", "r50", "r101", "r152", "mobilenet_v3_large"]
    levels = {"faster-rcnn": ["0", "1", "2", "3", "pool"], "retinanet": ["0", "1", "2", "p6", "p7"]}
    for kind in KINDS if backbone in ("r10", "mobilenet_v3_large") else ("faster-rcnn",):
        with torch.device("meta"):
            model = build_detector(kind, backbone, 3, **SMALL)
            pyramid = model.backbone(torch.zeros(1, 3, 256, 128))
        first = 0 if kind == "faster-rcnn" else 1
        assert [block[0].in_channels for block in model.backbone.fpn.inner_blocks] == widths[first:]
        assert list(pyramid) == levels[kind] and model.strides == STRIDES[kind]
        shapes = [(1, 16, 256 // stride, 128 // stride) for stride in STRIDES[kind]]
        assert [tuple(level.shape) for level in pyramid.values()] == shapes
        if blocks:
            assert [len(model.backbone.body[f"layer{i}"]) for i in range(1, 5)] == blocks


def test_faster_rcnns_anchors_are_scale_times_stride_wide_in_three_shapes():
    for stride, cell in zip(STRIDES["faster-rcnn"], detector().rpn.anchor_generator.cell_anchors, strict=True):
        sides = cell[:, 2:] - cell[:, :2]
        areas = sides.prod(1) / (4 * stride) ** 2
        assert areas.tolist() == pytest.approx([1, 1, 1], rel=0.1)  # torchvision rounds corners to whole pixels
        assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.1)


# Options


@pytest.mark.parametrize(("training", "kept"), [(True, 50), (False, 20)])
def test_proposals_and_regions_are_as_many_as_asked_for(training, kept):
    model = detector(rois=12, rpn_top_n=(50, 20)).train(training)
    model.rpn.nms_thresh = 1.0  # suppresses nothing: the counts alone decide
    images, targets = model.transform(*batch())
    features = model.backbone(images.tensors)
    assert features["0"][0, 0].numel() * 3 > 50  # anchors of one level
    proposals, _ = model.rpn(images, features, targets)
    assert [len(p) for p in proposals] == [kept, kept]
    assert [len(r) for r in model.roi_heads.select_training_samples(proposals, targets)[0]] == [12, 12]
    assert detector("retinanet", rpn_top_n=(50, 20)).topk_candidates == 20


@pytest.mark.parametrize(("norm", "channels", "groups"), [("batch", 16, 2), ("batch", 12, 1), ("frozen", 16, None)])
def test_the_norms_of_backbone_pyramid_and_retinanets_head(norm, channels, groups):
    model = detector("retinanet", norm=norm, fpn_channels=channels)
    found = [m for m in model.head.modules() if "Norm" in type(m).__name__ and "Conv" not in type(m).__name__]
    expected = [(nn.GroupNorm, groups, channels)] * (8 if groups else 0)  # four in each of the two branches
    assert [(type(m), m.num_groups, m.num_channels) for m in found] == expected
    kinds = {type(m) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}
    assert kinds == {nn.BatchNorm2d if groups else FrozenNorm}
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.fpn.modules()) == bool(groups)


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'r11'.*r10, r18"):
        build_detector("faster-rcnn", "r11", 3)
    with pytest.raises(UserError, match=r"'yolo'.*faster-rcnn"):
        build_detector("yolo", "r10", 3)


@both_detectors
def test_mobilenet_from_scratch_is_distilled_from_a_resnet(kind):
    student, teacher = detector(kind, "mobilenet_v3_large").train(), pair(kind)[1]
    norms = {(type(m), m.eps) for m in student.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(nn.BatchNorm2d, 0.001)}
    step = make_step(student, teacher, reg_gate="none")
    detection, distillation, _ = run(step, batch(), teacher)
    values = [*detection.values(), *distillation.values()]
    assert len(distillation) == 3 and all(torch.isfinite(v) and v > 0 for v in values)
    sum(values).backward()
    assert all(p.grad is not None for p in step.parameters())


# Under autocast the convolutions compute in bfloat16; whatever is handed on is float32


@both_detectors
def test_features_outputs_and_losses_leave_as_float32(kind):
    student, computed = pair(kind)[0], []
    if kind == "retinanet":
        parts = student.head.classification_head.cls_logits, student.head.regression_head.bbox_reg
    else:
        parts = student.backbone.fpn.layer_blocks[0][0], student.rpn.head.cls_logits, student.roi_heads.box_head.fc7
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = student.backbone(torch.rand(1, 3, 64, 64))
        if kind == "retinanet":
            outputs = student.head(list(features.values())).values()
        else:
            heads, regions = student.roi_heads, [torch.tensor([[3.0, 5.0, 40.0, 60.0]])]
            outputs = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, [(64, 64)])))
            outputs = [*outputs, *(level for of in student.rpn.head(list(features.values())) for level in of)]
        losses = student(*batch())
    assert set(computed) == {torch.bfloat16} and len(features) == 5
    assert {t.dtype for t in (*features.values(), *outputs, *losses.values())} == {torch.float32}


def test_boxes_are_not_rounded():
    model = detector(min_size=256, max_size=256).eval()
    model.roi_heads.score_thresh = 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model([torch.rand(3, 256, 256)])[0]
    assert result["boxes"].dtype == result["scores"].dtype == torch.float32
    inner = result["boxes"][(result["boxes"] > 64) & (result["boxes"] < 250)]
    assert len(inner) > 10
    assert (inner != inner.bfloat16().float()).float().mean() > 0.5
