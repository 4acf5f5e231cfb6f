"""Backbones: where their weights come from, which stages train, frozen norm."""

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from small_detectors import detector, norms
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError
from tar.detectors.backbones import FrozenNorm, build_classifier
from tar.detectors.build import STRIDES
from tar.detectors.coco_teacher import build_coco_teacher


def trainable(model):
    return {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if p.requires_grad}


def assert_loaded(model, state):
    mine = {k: v for k, v in model.backbone.body.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(mine) > 50
    assert all(torch.equal(value, state[name]) for name, value in mine.items())


@pytest.fixture(scope="module")
def drawn():
    """A state dict of an r10 with values of its own, statistics included."""
    torch.manual_seed(7)
    state = build_classifier("r10").state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


def test_fresh_and_loaded_backbones_have_their_norm_and_trained_stages(drawn, tmp_path):
    torch.save(drawn, tmp_path / "r10.pth")
    file, stages = {"backbone_weights": str(tmp_path / "r10.pth")}, ["conv1", "bn1"]
    stages += [f"layer{i}" for i in range(1, 5)]
    for options, norm, first in (
        ({}, nn.BatchNorm2d, 0),
        (file, FrozenNorm, 3),
        ({**file, "norm": "batch", "trainable_layers": 1}, nn.BatchNorm2d, 5),
        ({"norm": "frozen", "trainable_layers": 0}, FrozenNorm, 6),
    ):
        model = detector(**options)
        assert {type(m) for m in norms(model)} == {norm} and trainable(model) == set(stages[first:])


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_frozen_norm_is_torchvisions_and_keeps_the_type(eps):
    torch.manual_seed(0)
    mine, theirs = FrozenNorm(6, eps=eps), FrozenBatchNorm2d(6, eps=eps)
    mine.load_state_dict({k: torch.rand_like(v) + 0.1 for k, v in theirs.state_dict().items()})
    theirs.load_state_dict(mine.state_dict())
    x, weight = torch.randn(2, 6, 5, 7, requires_grad=True), torch.randn(2, 6, 5, 7)
    a, b = mine(x), theirs(x)
    for one, other in ((a, b), [torch.autograd.grad((y * weight).sum(), x)[0] for y in (a, b)]):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    coarse = mine(x.bfloat16())
    assert coarse.dtype == torch.bfloat16 and torch.allclose(coarse.float(), b, rtol=0.02, atol=0.02)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.train().state_dict().items())


def test_a_file_is_loaded_whatever_its_classifier(drawn, tmp_path):
    state = {k: v for k, v in drawn.items() if not k.startswith("fc.")}
    for classifier in ({}, {"fc.weight": torch.rand(7, 512), "fc.bias": torch.rand(7)}):
        torch.save(state | classifier, tmp_path / "r10.pth")
        assert_loaded(detector(backbone_weights=str(tmp_path / "r10.pth")), state)


def test_imagenet_weights_are_torchvisions_first(monkeypatch):
    state, asked = torchvision.models.resnet18().state_dict(), []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *_, **__: asked.append(self) or state)
    model = detector(backbone="r18", backbone_weights="imagenet")
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    assert {type(m) for m in norms(model)} == {FrozenNorm}
    assert_loaded(model, state)


@pytest.mark.parametrize(
    ("build", "file", "way"),
    [
        (lambda: build_classifier("r18", "imagenet"), "resnet18-f37072fd.pth", "--backbone-weights none"),
        (lambda: build_coco_teacher("retinanet", ["dog"]), "eeacb38b.pth", "--teacher-weights FILE"),
    ],
)
@pytest.mark.parametrize("error", [URLError("no route\nto host"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_downloaded_are_refused_with_a_way_out(monkeypatch, build, file, way, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError) as refusal:
        build()
    message = str(refusal.value)
    assert "\n" not in message and " ".join(str(error).split()) in message and way in message
    assert message.count(file) == 2 and f"{torch.hub.get_dir()}/checkpoints" in message  # the address, and the place


WRONG = {  # what is wrong with a file of weights, and how to write it
    "missing": lambda path, state: None,
    "text": lambda path, state: path.write_text("hello world\n"),
    "truncated": lambda path, state: torch.save(state, path) or path.write_bytes(path.read_bytes()[:5000]),
    "another network": lambda path, state: torch.save({k: v for k, v in state.items() if "layer4" not in k}, path),
    "a list": lambda path, state: torch.save([torch.zeros(1)], path),
    "code": lambda path, state: torch.save(Path("x"), path),
}


@pytest.mark.parametrize("write", WRONG.values(), ids=WRONG)
def test_a_wrong_file_of_weights_is_refused_by_name(drawn, tmp_path, write):
    write(tmp_path / "r10.pth", drawn)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "r10.pth"))) as error:
        build_classifier("r10", str(tmp_path / "r10.pth"))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """torchvision's MobileNet with statistics of its own, in evaluation mode, and a file of its weights."""
    torch.manual_seed(3)
    network = torchvision.models.mobilenet_v3_large().eval()
    for module in norms(network):
        module.running_mean.uniform_(-0.1, 0.1)
        module.running_var.uniform_(0.001, 0.02)  # so small that the eps is seen
        nn.init.uniform_(module.weight, 0.03, 0.1)
    path = tmp_path_factory.mktemp("mobilenet") / "weights.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize(
    ("kind", "layers", "first"), [("faster-rcnn", None, 4), ("retinanet", 1, 13), ("retinanet", 5, 0)]
)
def test_mobilenets_stages_are_torchvisions_with_frozen_norm_and_the_last_ones_train(mobilenet, kind, layers, first):
    network, path = mobilenet
    model = detector(kind, "mobilenet_v3_large", backbone_weights=str(path), trainable_layers=layers)
    assert {int(name) for name in trainable(model)} == set(range(first, 17))  # blocks 2, 4, 7 and 13 halve the image
    frozen = norms(model.backbone)
    assert {(type(m), m.eps) for m in frozen} == {(FrozenNorm, 0.001)} and len(frozen) > 40
    stages, x = {}, torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        taken = model.backbone.body(x)
        for block in network.features:
            x = block(x)
            stages[64 // x.shape[2]] = x  # the last one of each stride stays
    assert list(stages) == [2, 4, 8, 16, 32]
    for stride, level in zip([s for s in STRIDES[kind] if s <= 32], taken.values(), strict=True):
        torch.testing.assert_close(level, stages[stride], rtol=1e-3, atol=1e-4 * stages[stride].abs().max().item())
