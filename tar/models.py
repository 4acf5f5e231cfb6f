"""Detectors from torchvision's own parts: a ResNet, an FPN, Faster R-CNN.

bfloat16 keeps 8 bits of a number: a corner at pixel 500 would be rounded to a multiple of 4. torchvision's anchor
generator and box coder compute in the dtype of what they are given, so every part here hands float32 on: the
convolutions run in the autocast type, coordinates never do.
"""

from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError, one_line
from tar.pooling import PyramidRoIAlign

DETECTORS = ("faster-rcnn",)
BACKBONES = {
    "r10": None,
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "r101": "resnet101",
    "r152": "resnet152",
}
STRIDES = {"faster-rcnn": (4, 8, 16, 32, 64)}  # of the pyramid levels P2 .. P6, pixels of the resized image


class FloatFPN(BackboneWithFPN):
    """torchvision's backbone with FPN; its features leave as float32."""

    def forward(self, x):
        return OrderedDict((name, level.float()) for name, level in super().forward(x).items())


class FloatRPNHead(RPNHead):
    """torchvision's RPN head; scores and deltas leave as float32."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class FloatPredictor(FastRCNNPredictor):
    """torchvision's last layer of the box head; scores and deltas leave as float32."""

    def forward(self, x):
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


def build_resnet(name, weights="none", norm="batch"):
    """A ResNet for detection.

    Args:
        name: a key of BACKBONES; r10 is a ResNet with one basic block a stage.
        weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none", or the path of a state dict.
        norm: "batch" or "frozen" (statistics and affine parameters fixed).

    Raises:
        UserError: no such backbone, no ImageNet weights for it, no network, or a file that does not fit.
    """
    if name not in BACKBONES:
        raise UserError(f"no backbone is called {name!r}; there are {', '.join(BACKBONES)}")
    norm_layer = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}[norm]
    instead = "give --backbone-weights none (trains from scratch) or --backbone-weights FILE (a ResNet's state dict)"
    if name == "r10":
        if weights == "imagenet":
            raise UserError(f"there are no ImageNet weights for r10: {instead}")
        resnet = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer, zero_init_residual=norm == "batch")
    else:
        resnet = get_model(BACKBONES[name], weights=None, norm_layer=norm_layer, zero_init_residual=norm == "batch")
    if weights == "imagenet":
        enum = get_model_weights(BACKBONES[name]).IMAGENET1K_V1
        try:
            state = enum.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            cache = Path(torch.hub.get_dir()) / "checkpoints" / enum.url.rsplit("/", 1)[1]
            raise UserError(
                f"ImageNet weights of {name} are neither at {cache} nor to be had from {enum.url} ({one_line(error)}): "
                f"put the file there, or {instead}"
            ) from error
        resnet.load_state_dict(state)
    elif weights != "none":
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            resnet.load_state_dict(state | _fc_of(resnet))
        except FileNotFoundError:
            raise UserError(f"--backbone-weights {weights}: no such file; {instead}") from None
        except UnpicklingError:
            raise UserError(f"--backbone-weights {weights}: holds more than tensors; not loaded; {instead}") from None
        except Exception as error:
            raise UserError(
                f"--backbone-weights {weights}: not the state dict of a {name} ({one_line(error)})"
            ) from error
    return resnet


def _fc_of(resnet):
    """The classification layer's entries, which a detector does not use, so that a file may come without."""
    return {f"fc.{name}": value for name, value in resnet.fc.state_dict().items()}


def build_detector(
    detector,
    backbone,
    num_classes,
    *,
    backbone_weights="none",
    norm=None,
    trainable_layers=None,
    fpn_channels=256,
    head_channels=1024,
    anchor_scale=8,
    min_size=600,
    max_size=1000,
    rois=512,
    roi_samples=2,
    rpn_top_n=(2000, 1000),
):
    """A detector with torchvision's calling convention.

    In training mode `model(images, targets)` returns a dict of losses, in evaluation mode `model(images)` a list
    of {boxes [N, 4] xyxy in pixels of the given image, labels [N], scores [N]}. images: list of float [3, H, W]
    in 0..1; targets: list of {boxes, labels}, labels from 1, 0 is the background.

    Args:
        detector: "faster-rcnn" (Ren et al. 2015, with the FPN of Lin et al. 2017).
        backbone: a key of BACKBONES.
        num_classes: without the background.
        backbone_weights: "imagenet", "none" or a file, see build_resnet.
        norm: "frozen" or "batch"; default frozen where weights are loaded, batch where there are none.
        trainable_layers: how many of the backbone's five stages train, from the last; default 3 of a loaded
            backbone, as torchvision does, and 5 of a fresh one.
        fpn_channels: width of the pyramid.
        head_channels: width of the box head's two hidden layers.
        anchor_scale: an anchor's side in strides of its level; a region 28 times as large is pooled from stride 16.
        min_size, max_size: the shorter side is resized to min_size pixels, the longer to no more than max_size.
        rois: regions an image that the box head trains on (25% positive at IoU >= 0.5).
        roi_samples: sampling points a side in each of RoIAlign's 7 x 7 bins.
        rpn_top_n: proposals that the RPN takes from each level before non-maximum suppression, and from the image
            after it: in training, in evaluation.

    Raises:
        UserError: an unknown detector or backbone, or weights that cannot be had.
    """
    if detector not in DETECTORS:
        raise UserError(f"no detector is called {detector!r}; there are {', '.join(DETECTORS)}")
    loaded = backbone_weights != "none"
    norm = norm or ("frozen" if loaded else "batch")
    resnet = build_resnet(backbone, backbone_weights, norm)
    stages = ["layer4", "layer3", "layer2", "layer1", "conv1"]
    trainable = stages[: (3 if loaded else 5) if trainable_layers is None else trainable_layers]
    if len(trainable) == 5:
        trainable.append("bn1")
    for name, parameter in resnet.named_parameters():
        parameter.requires_grad_(any(name.startswith(stage) for stage in trainable))
    widths = [resnet.inplanes // 2 ** (3 - i) for i in range(4)]
    fpn_norm = nn.BatchNorm2d if norm == "batch" else None  # from scratch the pyramid needs it too (He et al. 2019)
    body = FloatFPN(resnet, {f"layer{i + 1}": str(i) for i in range(4)}, widths, fpn_channels, norm_layer=fpn_norm)
    strides = STRIDES[detector]
    anchors = AnchorGenerator(tuple((anchor_scale * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
    training, testing = rpn_top_n
    model = FasterRCNN(
        body,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=anchors,
        rpn_head=FloatRPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=training,
        rpn_post_nms_top_n_train=training,
        rpn_pre_nms_top_n_test=testing,
        rpn_post_nms_top_n_test=testing,
        box_roi_pool=PyramidRoIAlign(
            ["0", "1", "2", "3"], strides[:4], sampling_ratio=roi_samples, canonical_scale=28 * anchor_scale
        ),
        box_head=TwoMLPHead(fpn_channels * 7 * 7, head_channels),
        box_predictor=FloatPredictor(head_channels, num_classes + 1),
        box_batch_size_per_image=rois,
    )
    model.strides = strides
    return model
