"""Backbones: classifiers of torchvision and timm whose stages a detector takes, their weights, frozen batch norm."""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError, one_line

BACKBONES = {
    "r10": None,
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "r101": "resnet101",
    "r152": "resnet152",
    "mobilenet_v3_large": "mobilenet_v3_large",
}
INSTEAD = "give --backbone-weights none (trains from scratch) or FILE (the state dict of the classifier)"


class FrozenNorm(FrozenBatchNorm2d):
    """Frozen batch norm in one pass, which keeps the features' type.

    Torchvision multiplies by float32 factors, and so turns bf16 features into float32 ones: a ResNet-50 takes 1.16
    times as long to train that way on a CPU, and a ResNet-101 1.28 times as long to run.
    """

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps)


@dataclass
class Backbone:
    """What a detector takes of a classifier: its levels, finest first, the last of stride 32."""

    body: nn.Module  # normalised images float [B, 3, H, W] -> {"0", "1", ...: float [B, C, H / stride, W / stride]}
    channels: list  # of these levels
    mean: tuple = (0.485, 0.456, 0.406)  # of the input, of its three channels in 0..1
    std: tuple = (0.229, 0.224, 0.225)


def build_backbone(name, weights="none", norm="batch", stride=4, trained_stages=5):
    """The levels of a classifier from a stride on.

    Args:
        name: a key of BACKBONES, or "timm/" and the name of a timm model with features_only.
        weights: "imagenet" (torchvision's or timm's own, downloaded once), "none", the file of a classifier's state
            dict, or a folder with such a file for each backbone: r50.pth, resnet18.pth for timm/resnet18.
        norm: "batch" or "frozen" (statistics and affine parameters fixed).
        stride: of the finest level, 4 or 8 pixels of the image a cell.
        trained_stages: how many of the five stages of strides 2, 4, 8, 16 and 32 train, from the last.

    Raises:
        UserError: no such backbone, one without these levels, or weights that are not there or do not fit.
    """
    if weights not in ("imagenet", "none") and Path(weights).is_dir():
        weights = str(Path(weights) / f"{name.removeprefix('timm/')}.pth")
    if name.startswith("timm/"):
        return timm_backbone(name, weights, norm, stride, trained_stages)
    network, stages, widths = stages_of(build_classifier(name, weights, norm))
    trained = {child for stage in stages[5 - trained_stages :] for child in stage}
    for child, module in network.named_children():
        module.requires_grad_(child in trained)
    first = {4: 1, 8: 2}[stride]
    taken = {stage[-1]: str(i) for i, stage in enumerate(stages[first:])}
    return Backbone(IntermediateLayerGetter(network, taken), widths[first - 1 :])


def build_classifier(name, weights="none", norm="batch"):
    """A classifier of torchvision; arguments as build_backbone(). r10 is a ResNet with one basic block a stage."""
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}; there are {', '.join(BACKBONES)} and timm/NAME")
    norm_layer = {"batch": nn.BatchNorm2d, "frozen": FrozenNorm}[norm]
    options = {"norm_layer": norm_layer, "zero_init_residual": norm == "batch"}
    if name.startswith("mobilenet"):
        options = {"norm_layer": partial(norm_layer, eps=0.001)}  # as its weights were trained
    if name == "r10":
        if weights == "imagenet":
            raise UserError(f"there are no ImageNet weights for r10: {INSTEAD}")
        network = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    else:
        network = get_model(BACKBONES[name], weights=None, **options)
    if weights == "imagenet":
        enum = get_model_weights(BACKBONES[name]).IMAGENET1K_V1
        network.load_state_dict(fetch(enum, f"ImageNet weights of {name}", INSTEAD))
    elif weights != "none":
        state = {k: v for k, v in network.state_dict().items() if k.startswith(("fc.", "classifier."))}
        try:  # a file may come without the classifier's last layers, which a detector does not use
            network.load_state_dict(read_weights(weights) | state)
        except (RuntimeError, TypeError) as error:
            text = f"--backbone-weights {weights}: not the state dict of a {name} ({one_line(error)})"
            raise UserError(text) from error
    return network


def timm_backbone(name, weights, norm, stride, trained_stages):
    """build_backbone() for a model of timm."""
    try:
        import timm
    except ImportError:
        raise UserError(f"{name} needs a package more: pip install timm") from None
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of the classifier's layers, which are left out
    loading = {"pretrained": weights != "none", "pretrained_cfg_overlay": {}}
    if weights not in ("imagenet", "none"):
        loading["pretrained_cfg_overlay"] = {"state_dict": read_weights(weights)}
    try:
        network = timm.create_model(name.removeprefix("timm/"), features_only=True, scriptable=True, **loading)
        body = TimmLevels(network, stride)
        shapes = [level.shape[1:] for level in body.eval()(torch.zeros(1, 3, 64, 64)).values()]
        if shapes != [(c, 64 // s, 64 // s) for c, s in zip(body.channels, body.strides, strict=True)]:
            raise ValueError(f"its maps have the shapes {[tuple(shape) for shape in shapes]}")
        freeze_stages(network, 2 ** (5 - trained_stages))
    except Exception as error:  # whatever timm and its models raise
        text = f"{name}, --backbone-weights {weights}: timm's model cannot be a detector's backbone ({one_line(error)})"
        raise UserError(f"{text}; without a network {INSTEAD}" if weights == "imagenet" else text) from error
    cfg = network.pretrained_cfg
    network.pretrained_cfg = network.default_cfg = None  # it may hold the weights once more
    if norm == "frozen":
        freeze_norms(network)
    return Backbone(body.train(), body.channels, tuple(cfg["mean"]), tuple(cfg["std"]))


class TimmLevels(nn.Module):
    """The levels of strides `stride` to 32 of a timm model with features_only, {"0": finest, ...}."""

    def __init__(self, network, stride):
        super().__init__()
        self.network, info = network, network.feature_info
        wanted = [s for s in (4, 8, 16, 32) if s >= stride]
        of_stride = dict(zip(info.reduction(), range(len(info.reduction())), strict=True))
        if missing := [s for s in wanted if s not in of_stride]:
            raise ValueError(f"it has no level of stride {missing[0]}; its strides are {info.reduction()}")
        self.strides, self.taken = wanted, [of_stride[s] for s in wanted]
        self.channels = [info.channels()[i] for i in self.taken]

    def forward(self, x):
        levels, taken = self.network(x), OrderedDict()
        for i, k in enumerate(self.taken):  # no comprehension: TorchScript (--export) knows none over dicts
            taken[str(i)] = levels[k]
        return taken


def freeze_stages(network, stride):
    """Freezes a timm model's stages up to a stride: all modules before the end of this level."""
    info = network.feature_info
    ends = [name for name, s in zip(info.module_name(), info.reduction(), strict=True) if s <= stride]
    if not ends:
        return
    modules = list(network.named_modules())
    plain = [name.removeprefix("model.").replace("_", ".") + "." for name, _ in modules]
    inside = [i for i, name in enumerate(plain) if name.startswith(ends[-1].replace("_", ".") + ".")]
    if not inside:
        raise ValueError(f"its stage {ends[-1]} is not found: it cannot be frozen")
    for _, module in modules[: inside[-1] + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def freeze_norms(network):
    """Freezes a timm model's batch norm; activations that are part of it stay."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenNorm(norm.num_features, norm.eps)
                frozen.load_state_dict({k: norm.state_dict()[k] for k in frozen.state_dict()})
                layers = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
                setattr(parent, name, nn.Sequential(frozen, *layers) if layers else frozen)


def read_weights(file):
    """The state dict of --backbone-weights FILE; UserError if there is none."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is no state dict
        why = {FileNotFoundError: "no such file", UnpicklingError: "holds more than tensors; not loaded"}
        what = why.get(type(error), f"not a state dict ({one_line(error)})")
        raise UserError(f"--backbone-weights {file}: {what}; {INSTEAD}") from error


def fetch(weights, what, instead):
    """The state dict of one of torchvision's weights, downloaded once; UserError where that cannot be."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        text = f"{what} are not at {cache} and cannot be downloaded from {weights.url} ({one_line(error)})"
        raise UserError(f"{text}: put the file there, or {instead}") from error


def stages_of(network):
    """The stages of strides 2 to 32: their module, five lists of its children's names, channels of the last four."""
    if isinstance(network, ResNet):
        widths = [network.inplanes // 2 ** (3 - i) for i in range(4)]
        return network, [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]], widths
    blocks = network.features  # a strided block begins a stage
    begins = [0, *(i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)), len(blocks)]
    stages = [[str(i) for i in range(a, b)] for a, b in pairwise(begins)]
    return blocks, stages, [blocks[int(stage[-1])].out_channels for stage in stages[1:]]
