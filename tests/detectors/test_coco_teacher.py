"""COCO's teachers: torchvision's own detectors, cut to the classes of a data set."""

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from tar import UserError
from tar.detectors.coco_teacher import build_coco_teacher
from tar.method.proposal_sharing import box_head

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
        ours, _ = build_coco_teacher(request.param, CLASSES, 64, 96)
    return request.param, theirs, ours


def test_cocos_teacher_scores_its_classes_as_torchvisions_does(coco):
    kind, theirs, ours = coco
    anchors = [m.anchor_generator if kind == "retinanet" else m.rpn.anchor_generator for m in (theirs, ours)]
    assert anchors[0].sizes == anchors[1].sizes and not ours.training
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


@pytest.mark.parametrize("kind", COCO)
def test_a_class_that_coco_lacks_is_refused_before_anything_is_fetched(monkeypatch, kind):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", None)
    with pytest.raises(UserError, match=r"COCO has no class called aeroplane, unicorn$"):
        build_coco_teacher(kind, ("dog", "aeroplane", "unicorn"))
