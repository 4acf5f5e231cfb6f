"""Detectors: torchvision's calling convention, the options of build_detector, float32 where coordinates are."""

import pytest
import torch
from small_detectors import KINDS, batch, detector, norms, pair
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from tar import UserError
from tar.detectors.backbones import BACKBONES, FrozenNorm, build_classifier, stages_of
from tar.detectors.build import STRIDES, build_detector

both_detectors = pytest.mark.parametrize("kind", KINDS)


def test_a_students_state_dict_loads_into_torchvisions_own_detector():
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 96}
    student = build_detector("faster-rcnn", "r50", 3, norm="frozen", **sizes).eval()
    for module in norms(student):
        nn.init.uniform_(module.weight, 0.3, 0.6)
        nn.init.normal_(module.bias, std=0.1)
        nn.init.normal_(module.running_mean, std=0.1)
    with torch.device("meta"):  # its own weights are not drawn
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3 + 1, **sizes).eval()
    theirs.load_state_dict(student.state_dict(), assign=True)
    assert theirs.rpn.anchor_generator.sizes == student.rpn.anchor_generator.sizes
    image = torch.rand(3, 80, 96)
    with torch.no_grad():
        pyramids = [model.backbone(image[None]) for model in (student, theirs)]
        (mine,), (its,) = (model([image]) for model in (student, theirs))
    for level, other in zip(*(pyramid.values() for pyramid in pyramids), strict=True):
        torch.testing.assert_close(level, other, rtol=1e-3, atol=1e-3 * other.std().item())
    assert len(its["boxes"]) > 20 and torch.equal(mine["labels"], its["labels"])
    torch.testing.assert_close(mine["scores"], its["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine["boxes"], its["boxes"], rtol=1e-3, atol=0.1)


NARROW, WIDE, MOBILENET = [64, 128, 256, 512], [256, 512, 1024, 2048], [24, 40, 112, 960]
BLOCKS = {"r10": [1, 1, 1, 1], "r18": [2, 2, 2, 2], "r34": [3, 4, 6, 3]}
BLOCKS |= {"r50": [3, 4, 6, 3], "r101": [3, 4, 23, 3], "r152": [3, 8, 36, 3]}


def test_every_resnet_has_the_stages_of_its_name():
    assert list(BACKBONES) == [*BLOCKS, "mobilenet_v3_large"]
    for backbone, blocks in BLOCKS.items():
        with torch.device("meta"):
            body, _, widths = stages_of(build_classifier(backbone))
        assert [len(body.get_submodule(f"layer{i}")) for i in range(1, 5)] == blocks
        assert widths == (NARROW if backbone in ("r10", "r18", "r34") else WIDE)


@pytest.mark.parametrize(("backbone", "widths"), [("r10", NARROW), ("mobilenet_v3_large", MOBILENET)])
@both_detectors
def test_the_pyramid_has_the_levels_and_strides_of_the_detector(kind, backbone, widths):
    levels = {"faster-rcnn": ["0", "1", "2", "3", "pool"], "retinanet": ["0", "1", "2", "p6", "p7"]}[kind]
    model = detector(kind, backbone)
    with torch.no_grad():
        pyramid = model.backbone(torch.zeros(1, 3, 256, 128))
    first = 0 if kind == "faster-rcnn" else 1
    assert [block[0].in_channels for block in model.backbone.fpn.inner_blocks] == widths[first:]
    assert list(pyramid) == levels and model.strides == STRIDES[kind]
    eps = {m.eps for m in norms(model.backbone.body)}
    assert eps == {0.001 if widths is MOBILENET else 1e-5}  # as the weights of each were trained
    shapes = [(1, 16, 256 // stride, 128 // stride) for stride in STRIDES[kind]]
    assert [tuple(level.shape) for level in pyramid.values()] == shapes


def test_faster_rcnns_anchors_are_scale_times_stride_wide_in_three_shapes():
    for stride, cell in zip(STRIDES["faster-rcnn"], detector().rpn.anchor_generator.cell_anchors, strict=True):
        sides = cell[:, 2:] - cell[:, :2]
        areas = sides.prod(1) / (4 * stride) ** 2
        assert areas.tolist() == pytest.approx([1, 1, 1], rel=0.1)  # torchvision rounds corners to whole pixels
        assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.1)


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
    found = [(m.num_groups, m.num_channels) for m in model.head.modules() if isinstance(m, nn.GroupNorm)]
    assert found == [(groups, channels)] * (8 if groups else 0)  # four in each of the two branches
    assert {type(m) for m in norms(model)} == {nn.BatchNorm2d if groups else FrozenNorm}
    assert bool(norms(model.backbone.fpn)) == bool(groups) and not norms(model.head)


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'r11'.*r10, r18"):
        build_detector("faster-rcnn", "r11", 3)
    with pytest.raises(UserError, match=r"r10.*--backbone-weights none"):  # ImageNet's
        build_classifier("r10", "imagenet")
    with pytest.raises(UserError, match=r"'yolo'.*faster-rcnn"):
        build_detector("yolo", "r10", 3)


@both_detectors
def test_features_outputs_and_losses_of_bfloat16_convolutions_leave_as_float32(kind):
    student, computed = pair(kind)[0], []
    if kind == "retinanet":
        parts = student.head.classification_head.cls_logits, student.head.regression_head.bbox_reg
        leaving = [student.backbone, student.head]
    else:
        parts = student.backbone.fpn.layer_blocks[0][0], student.rpn.head.cls_logits, student.roi_heads.box_head.fc7
        leaving = [student.backbone, student.rpn.head, student.roi_heads.box_predictor]
    outputs = []
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    for part in leaving:
        part.register_forward_hook(lambda module, inputs, output: outputs.extend(tree_leaves(output)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = student(*batch())
    assert set(computed) == {torch.bfloat16} and len(outputs) == (7 if kind == "retinanet" else 17)
    assert {t.dtype for t in (*outputs, *losses.values())} == {torch.float32}
