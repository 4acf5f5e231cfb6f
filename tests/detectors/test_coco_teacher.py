"""COCO's teachers: torchvision's own detectors, cut to the classes of a data set."""

import pytest
import torch
from small_detectors import norms
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
    for module in norms(theirs):
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
    kind, *models = coco
    image, regions = torch.rand(3, 64, 96), [torch.tensor([[4.0, 6, 40, 50], [20, 10, 90, 60], [3, 3, 12, 12]])]
    anchors, pixels, proposals, outputs = [], [], [], []
    for model in models:
        with torch.no_grad():
            images, _ = model.transform([image])
            levels = model.backbone(images.tensors)
            pixels.append(images.tensors)
            anchors.append((model if kind == "retinanet" else model.rpn).anchor_generator.sizes)
            if kind == "retinanet":
                outputs += [output[0] for output in model.head(list(levels.values())).values()]
            else:
                proposals.append(model.rpn(images, levels)[0][0])
                outputs += box_head(model, levels, regions, [(64, 96)])
    assert anchors[0] == anchors[1] and torch.equal(*pixels) and not models[1].training
    whole, deltas, scores, boxes = outputs
    if kind == "faster-rcnn":
        torch.testing.assert_close(*proposals, rtol=1e-3, atol=1e-2)
        deltas = torch.cat([deltas[:, 4 * k : 4 * k + 4] for k in ROWS], 1)
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
