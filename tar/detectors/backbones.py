"""Backbones: torchvision's classifiers whose stages a detector takes, their weights, frozen batch norm."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, get_model_weights
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


class FrozenNorm(FrozenBatchNorm2d):
    """Frozen batch norm in one pass, which keeps the features' type.

    Torchvision multiplies by float32 factors, and so turns bf16 features into float32 ones: a ResNet-50 takes 1.16
    times as long to train that way on a CPU, and a ResNet-101 1.28 times as long to run.
    """

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps)


def build_backbone(name, weights="none", norm="batch"):
    """A classifier's network whose stages a detector takes.

    Args:
        name: a key of BACKBONES; r10 is a ResNet with one basic block a stage.
        weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none", or the path of a state dict.
        norm: "batch" or "frozen" (statistics and affine parameters fixed).

    Raises:
        UserError: no such backbone, no ImageNet weights for it, no network, or a file that does not fit.
    """
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}; there are {', '.join(BACKBONES)}")
    norm_layer = {"batch": nn.BatchNorm2d, "frozen": FrozenNorm}[norm]
    options = {"norm_layer": norm_layer, "zero_init_residual": norm == "batch"}
    if name.startswith("mobilenet"):
        options = {"norm_layer": partial(norm_layer, eps=0.001)}  # as its weights were trained
    instead = "give --backbone-weights none (trains from scratch) or --backbone-weights FILE (its state dict)"
    if name == "r10":
        if weights == "imagenet":
            raise UserError(f"there are no ImageNet weights for r10: {instead}")
        network = ResNet(BasicBlock, [1, 1, 1, 1], **options)
    else:
        network = get_model(BACKBONES[name], weights=None, **options)
    if weights == "imagenet":
        enum = get_model_weights(BACKBONES[name]).IMAGENET1K_V1
        network.load_state_dict(fetch(enum, f"ImageNet weights of {name}", instead))
    elif weights != "none":
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict(state | _classifier_of(network))
        except FileNotFoundError:
            raise UserError(f"--backbone-weights {weights}: no such file; {instead}") from None
        except UnpicklingError:
            raise UserError(f"--backbone-weights {weights}: holds more than tensors; not loaded; {instead}") from None
        except Exception as error:
            text = f"--backbone-weights {weights}: not the state dict of a {name} ({one_line(error)})"
            raise UserError(text) from error
    return network


def fetch(weights, what, instead):
    """The state dict of one of torchvision's weights, downloaded once; UserError where that cannot be."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        raise UserError(
            f"{what} are not at {cache} and cannot be downloaded from {weights.url} ({one_line(error)}): put the "
            f"file there, or {instead}"
        ) from error


def _classifier_of(network):
    """The classifier's entries, which a detector does not use, so that a file may come without."""
    return {k: v for k, v in network.state_dict().items() if k.startswith(("fc.", "classifier."))}


def stages_of(network):
    """The stages of strides 2, 4, 8, 16 and 32 of a backbone.

    Returns:
        the module that holds them; a list of five lists of names of its children; the channels of the last four.
    """
    if isinstance(network, ResNet):
        widths = [network.inplanes // 2 ** (3 - i) for i in range(4)]
        return network, [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]], widths
    blocks = network.features  # a strided block begins a stage
    begins = [0, *(i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)), len(blocks)]
    stages = [[str(i) for i in range(a, b)] for a, b in pairwise(begins)]
    return blocks, stages, [blocks[int(stage[-1])].out_channels for stage in stages[1:]]
