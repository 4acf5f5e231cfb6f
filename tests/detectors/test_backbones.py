"""Backbones: where their weights come from, which stages train, frozen norm."""

import re
from urllib.error import URLError

import pytest
import torch
import torchvision
from small_detectors import KINDS, detector
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError
from tar.detectors.backbones import FrozenNorm, build_backbone
from tar.detectors.build import STRIDES


def norms(model):
    return {type(m) for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}


def trainable(model):
    return {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if p.requires_grad}


def assert_loaded(model, state):
    mine = {k: v for k, v in model.backbone.body.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(mine) > 90
    assert all(torch.equal(value, state[name]) for name, value in mine.items())


@pytest.fixture
def r18_file(tmp_path):
    """A state dict of a ResNet-18 with values of its own, statistics included."""
    torch.manual_seed(7)
    state = torchvision.models.resnet18().state_dict()
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "r18.pth")
    return tmp_path / "r18.pth"


def test_fresh_and_loaded_backbones_have_their_norm_and_trained_stages(r18_file):
    fresh, loaded = detector(), detector(backbone="r18", backbone_weights=str(r18_file))
    assert norms(fresh) == {nn.BatchNorm2d} and norms(loaded) == {FrozenNorm}
    assert trainable(fresh) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert trainable(loaded) == {"layer2", "layer3", "layer4"}
    assert_loaded(loaded, torch.load(r18_file))
    chosen = detector(backbone="r18", backbone_weights=str(r18_file), norm="batch", trainable_layers=1)
    assert norms(chosen) == {nn.BatchNorm2d} and trainable(chosen) == {"layer4"}
    assert norms(detector(norm="frozen")) == {FrozenNorm} and trainable(detector(trainable_layers=0)) == set()


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


# Files of weights, and downloads


@pytest.mark.parametrize("classes", [None, 7], ids=["no classifier", "classifier of 7 classes"])
def test_the_classifier_of_a_file_does_not_matter(r18_file, classes):
    state = {k: v for k, v in torch.load(r18_file).items() if not k.startswith("fc.")}
    if classes:
        state |= {"fc.weight": torch.rand(classes, 512), "fc.bias": torch.rand(classes)}
    torch.save(state, r18_file)
    assert_loaded(detector(backbone="r18", backbone_weights=str(r18_file)), state)


def test_imagenet_weights_are_torchvisions_first(monkeypatch, r18_file):
    asked = []
    monkeypatch.setattr(
        WeightsEnum, "get_state_dict", lambda self, *_, **__: asked.append(self) or torch.load(r18_file)
    )
    model = detector(backbone="r18", backbone_weights="imagenet")
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1] and norms(model) == {FrozenNorm}
    assert_loaded(model, torch.load(r18_file))


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash value")])
def test_imagenet_weights_without_a_network_are_refused_with_a_way_out(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    with pytest.raises(UserError) as refusal:
        build_backbone("r18", "imagenet")
    message = str(refusal.value)
    assert url in message and str(error) in message and "\n" not in message
    assert f"checkpoints/{url.rsplit('/', 1)[1]}" in message  # where the file would be found
    assert "--backbone-weights none" in message and "--backbone-weights FILE" in message


def test_there_are_no_imagenet_weights_for_r10():
    with pytest.raises(UserError, match=r"r10.*--backbone-weights none"):
        build_backbone("r10", "imagenet")


# What is wrong with a file of weights, and how to write it.
WRONG = {
    "missing": lambda path: path.unlink(),
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


@pytest.mark.parametrize("kind", KINDS)
def test_mobilenets_stages_are_torchvisions_with_frozen_norm(mobilenet, kind):
    network, path = mobilenet
    model = detector(kind, "mobilenet_v3_large", backbone_weights=str(path))
    frozen = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert {(type(m), m.eps) for m in frozen} == {(FrozenNorm, 0.001)} and len(frozen) > 40
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


@pytest.mark.parametrize(("layers", "first"), [(None, 4), (0, 17), (1, 13), (4, 2), (5, 0)])
def test_mobilenets_last_stages_train(mobilenet, layers, first):
    model = detector(backbone="mobilenet_v3_large", backbone_weights=str(mobilenet[1]), trainable_layers=layers)
    assert {int(name) for name in trainable(model)} == set(range(first, 17))  # blocks 2, 4, 7 and 13 halve the image
