"""Detectors: torchvision's calling convention, weights from where they come, float32 where coordinates are."""

import re
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError
from tar.models import BACKBONES, STRIDES, FrozenNorm, build_backbone, build_detector

SMALL = {
    **{"min_size": 64, "max_size": 64, "fpn_channels": 16, "head_channels": 32, "rois": 16},
    "rpn_top_n": (50, 20),
}
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def detector(backbone="r10", classes=3, **options):
    torch.manual_seed(0)
    return build_detector("faster-rcnn", backbone, classes, **{**SMALL, **options})


def batch():
    images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3])}, {"boxes": boxes[:0], "labels": torch.zeros(0).long()}]
    return images, targets


@pytest.mark.parametrize("backbone", ["r10", "r18"])
def test_training_returns_losses_that_reach_every_parameter(backbone):
    model = detector(backbone).train()
    losses = model(*batch())
    assert losses.keys() == LOSSES
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("backbone", ["r10", "r18"])
def test_evaluation_returns_boxes_in_pixels_of_the_given_images(backbone):
    model = detector(backbone).eval()
    model.roi_heads.score_thresh = 0.0
    sizes = [(64, 64), (32, 48)]
    with torch.no_grad():
        found = model([torch.rand(3, *size) for size in sizes])
    assert len(found) == 2
    for result, (height, width) in zip(found, sizes, strict=True):
        assert result.keys() == {"boxes", "labels", "scores"}
        assert 0 < len(result["boxes"]) == len(result["labels"]) == len(result["scores"])
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert result["boxes"][:, 2].max() > 0.7 * width  # not in pixels of a smaller image
        assert set(result["labels"].tolist()) <= {1, 2, 3}
        assert ((result["scores"] >= 0) & (result["scores"] <= 1)).all()


@pytest.mark.parametrize(
    ("backbone", "blocks", "widths"),
    [
        ("r10", [1, 1, 1, 1], [64, 128, 256, 512]),
        ("r18", [2, 2, 2, 2], [64, 128, 256, 512]),
        ("r34", [3, 4, 6, 3], [64, 128, 256, 512]),
        ("r50", [3, 4, 6, 3], [256, 512, 1024, 2048]),
        ("r101", [3, 4, 23, 3], [256, 512, 1024, 2048]),
        ("r152", [3, 8, 36, 3], [256, 512, 1024, 2048]),
    ],
)
def test_backbones_have_the_stages_of_their_names(backbone, blocks, widths):
    with torch.device("meta"):
        body = build_detector("faster-rcnn", backbone, 3, **SMALL).backbone
        pyramid = body(torch.zeros(1, 3, 128, 64))
    assert [len(body.body[f"layer{i}"]) for i in range(1, 5)] == blocks
    assert [block[0].in_channels for block in body.fpn.inner_blocks] == widths
    assert [tuple(level.shape) for level in pyramid.values()] == [
        (1, 16, 128 // stride, 64 // stride) for stride in STRIDES["faster-rcnn"]
    ]


def test_every_backbone_is_named_above():
    assert list(BACKBONES) == ["r10", "r18", "r34", "r50", "r101", "r152", "mobilenet_v3_large"]


def test_widths_and_classes_are_options():
    model = detector(classes=5, fpn_channels=24, head_channels=40)
    assert model.backbone.out_channels == 24
    assert model.roi_heads.box_head.fc7.out_features == 40
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    assert model.roi_heads.box_predictor.bbox_pred.out_features == 24


def test_anchors_are_scale_times_stride_wide_in_three_shapes():
    model = detector(anchor_scale=4)
    for stride, cell in zip(STRIDES["faster-rcnn"], model.rpn.anchor_generator.cell_anchors, strict=True):
        sides = cell[:, 2:] - cell[:, :2]
        areas = sides.prod(1) / (4 * stride) ** 2
        assert areas.tolist() == pytest.approx([1, 1, 1], rel=0.1)  # torchvision rounds corners to whole pixels
        assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5, 1, 2], rel=0.1)


def test_the_box_head_trains_on_the_regions_asked_for():
    model = detector(rois=12, rpn_top_n=(100, 50)).train()
    _, targets = model.transform(*batch())
    proposals = [torch.rand(40, 4).sort(1).values * 64 for _ in targets]
    regions, *_ = model.roi_heads.select_training_samples(proposals, targets)
    assert [len(r) for r in regions] == [12, 12]


@pytest.mark.parametrize(("training", "kept"), [(True, 50), (False, 20)])
def test_the_rpn_keeps_as_many_proposals_as_asked_for(training, kept):
    model = detector(rpn_top_n=(50, 20)).train(training)
    model.rpn.nms_thresh = 1.0  # suppresses nothing: the counts alone decide
    images, targets = model.transform(*batch())
    features = model.backbone(images.tensors)
    assert features["0"][0, 0].numel() * 3 > 50  # anchors of one level
    proposals, _ = model.rpn(images, features, targets)
    assert [len(p) for p in proposals] == [kept, kept]


def test_images_are_resized_to_the_shorter_side_within_the_limit():
    model = detector(min_size=64, max_size=96).eval()
    images, _ = model.transform([torch.zeros(3, 32, 40), torch.zeros(3, 32, 64)])
    assert images.image_sizes == [(64, 80), (48, 96)]


def norms(model):
    return {type(m) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}


def trainable(model):
    return {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if p.requires_grad}


def test_a_fresh_backbone_trains_whole_with_batch_norm():
    model = detector()
    assert norms(model) == {nn.BatchNorm2d}
    assert trainable(model) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


@pytest.fixture
def r18_file(tmp_path):
    """A state dict of a ResNet-18 with values of its own, statistics included."""
    torch.manual_seed(7)
    state = torchvision.models.resnet18().state_dict()
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "r18.pth")
    return tmp_path / "r18.pth"


def assert_loaded(model, state):
    mine = {k: v for k, v in model.backbone.body.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(mine) > 90
    assert all(torch.equal(value, state[name]) for name, value in mine.items())


def test_a_loaded_backbone_has_frozen_norm_and_three_trained_stages(r18_file):
    model = detector("r18", backbone_weights=str(r18_file))
    assert norms(model) == {FrozenNorm}
    assert trainable(model) == {"layer2", "layer3", "layer4"}
    assert_loaded(model, torch.load(r18_file))


@pytest.mark.parametrize("eps", [1e-5, 0.001, 0.0])
def test_frozen_norm_is_torchvisions_and_keeps_the_type(eps):
    torch.manual_seed(0)
    mine, theirs = FrozenNorm(6, eps=eps), FrozenBatchNorm2d(6, eps=eps)
    mine.load_state_dict({k: torch.rand_like(v) + 0.1 for k, v in theirs.state_dict().items()})
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    weight = torch.randn(2, 6, 5, 7)
    a, b = mine(x), theirs(x)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (a, b)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
    coarse = mine(x.bfloat16())
    assert coarse.dtype == torch.bfloat16 and torch.allclose(coarse.float(), b, rtol=0.02, atol=0.02)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.train().state_dict().items())


def test_norm_and_trained_stages_can_be_chosen(r18_file):
    model = detector("r18", backbone_weights=str(r18_file), norm="batch", trainable_layers=1)
    assert norms(model) == {nn.BatchNorm2d}
    assert trainable(model) == {"layer4"}
    assert norms(detector(norm="frozen")) == {FrozenNorm}
    assert trainable(detector(trainable_layers=0)) == set()


@pytest.mark.parametrize("classes", [None, 7], ids=["no classifier", "classifier of 7 classes"])
def test_the_classifier_of_a_file_does_not_matter(r18_file, classes):
    state = torch.load(r18_file)
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    if classes:
        state |= {"fc.weight": torch.rand(classes, 512), "fc.bias": torch.rand(classes)}
    torch.save(state, r18_file)
    assert_loaded(detector("r18", backbone_weights=str(r18_file)), state)


def test_imagenet_weights_are_torchvisions_first(monkeypatch, r18_file):
    asked = []

    def have(self, *args, **kwargs):
        asked.append(self)
        return torch.load(r18_file)

    monkeypatch.setattr(WeightsEnum, "get_state_dict", have)
    model = detector("r18", backbone_weights="imagenet")
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    assert norms(model) == {FrozenNorm}
    assert_loaded(model, torch.load(r18_file))


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash value")])
def test_imagenet_weights_without_a_network_are_refused_with_a_way_out(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    with pytest.raises(UserError) as refusal:
        detector("r18", backbone_weights="imagenet")
    message = str(refusal.value)
    assert url in message and str(error) in message and "\n" not in message
    assert f"checkpoints/{url.rsplit('/', 1)[1]}" in message  # where the file would be found
    assert "--backbone-weights none" in message and "--backbone-weights FILE" in message


def test_there_are_no_imagenet_weights_for_r10():
    with pytest.raises(UserError, match=r"r10.*--backbone-weights none"):
        build_backbone("r10", "imagenet")


# What is wrong with a file of weights, and how to write it.
WRONG = {
    "text": lambda path: path.write_text("hello world\n"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "another network": lambda path: torch.save(torchvision.models.resnet34().state_dict(), path),
    "a list": lambda path: torch.save([torch.zeros(1)], path),
    "a missing entry": lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "bn1.bias"}, path),
}


@pytest.mark.parametrize("write", WRONG.values(), ids=WRONG)
def test_a_wrong_file_of_weights_is_refused_by_name(r18_file, write):
    write(r18_file)
    with pytest.raises(UserError, match=re.escape(str(r18_file))) as error:
        build_backbone("r18", str(r18_file))
    assert "\n" not in str(error.value)


def test_a_missing_file_of_weights_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'no.pth'))}: no such file"):
        build_backbone("r18", str(tmp_path / "no.pth"))


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'r11'.*r10, r18"):
        build_backbone("r11")
    with pytest.raises(UserError, match=r"'r11'.*r10, r18"):
        build_detector("faster-rcnn", "r11", 3)
    with pytest.raises(UserError, match=r"'yolo'.*faster-rcnn"):
        build_detector("yolo", "r10", 3)


class TestBfloat16:
    """Under autocast the convolutions compute in bfloat16, whatever is handed on is float32."""

    @pytest.fixture
    def autocast(self):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            yield

    def test_features_logits_and_deltas_leave_as_float32(self, autocast):
        model, computed = detector().eval(), []
        for part in (model.backbone.fpn.layer_blocks[0][0], model.rpn.head.cls_logits, model.roi_heads.box_head.fc7):
            part.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
        features = model.backbone(torch.rand(1, 3, 64, 64))
        assert [f.dtype for f in features.values()] == [torch.float32] * 5
        logits, deltas = model.rpn.head(list(features.values()))
        assert {t.dtype for t in (*logits, *deltas)} == {torch.float32}
        regions = [torch.tensor([[3.0, 5.0, 40.0, 60.0]])]
        heads = model.roi_heads
        answers = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, [(64, 64)])))
        assert {t.dtype for t in answers} == {torch.float32}
        assert set(computed) == {torch.bfloat16}

    def test_boxes_are_float32_and_not_rounded(self, autocast):
        model = detector(min_size=256, max_size=256).eval()
        model.roi_heads.score_thresh = 0.0
        result = model([torch.rand(3, 256, 256)])[0]
        assert result["boxes"].dtype == result["scores"].dtype == torch.float32
        inner = result["boxes"][(result["boxes"] > 64) & (result["boxes"] < 250)]
        assert len(inner) > 10
        assert (inner != inner.bfloat16().float()).float().mean() > 0.5

    def test_losses_are_float32(self):
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector().train()(*batch())
        assert {value.dtype for value in losses.values()} == {torch.float32}
