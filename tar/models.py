"""Detectors from torchvision's own parts: a ResNet or MobileNet, an FPN, Faster R-CNN or RetinaNet.

bfloat16 keeps 8 bits of a number: a corner at pixel 500 would be rounded to a multiple of 4. torchvision's anchor
generator and box coder compute in the dtype of what they are given, so every part here hands float32 on: the
convolutions run in the autocast type, coordinates never do.
"""

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_Weights,
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from tar import UserError, one_line
from tar.pooling import PyramidRoIAlign

DETECTORS = ("faster-rcnn", "retinanet")
BACKBONES = {
    "r10": None,
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "r101": "resnet101",
    "r152": "resnet152",
    "mobilenet_v3_large": "mobilenet_v3_large",
}
STRIDES = {  # of the pyramid levels, pixels of the resized image
    "faster-rcnn": (4, 8, 16, 32, 64),  # P2 .. P6
    "retinanet": (8, 16, 32, 64, 128),  # P3 .. P7
}


class FloatFPN(BackboneWithFPN):
    """torchvision's backbone with FPN; its features leave as float32."""

    def forward(self, x):
        return OrderedDict((name, level.float()) for name, level in super().forward(x).items())


class FloatRPNHead(RPNHead):
    """torchvision's RPN head; scores and deltas leave as float32."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class FloatRetinaNetHead(RetinaNetHead):
    """torchvision's RetinaNet head; logits and deltas leave as float32."""

    def forward(self, x):
        return {name: answer.float() for name, answer in super().forward(x).items()}


class FloatPredictor(FastRCNNPredictor):
    """torchvision's last layer of the box head; scores and deltas leave as float32."""

    def forward(self, x):
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class FrozenNorm(FrozenBatchNorm2d):
    """Frozen batch norm in one pass, which keeps the features' type.

    Torchvision multiplies by float32 factors, and so turns bf16 features into float32 ones: a ResNet-50 takes 1.16
    times as long to train that way on a CPU, and a ResNet-101 1.28 times as long to ask.
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
        weights_enum = get_model_weights(BACKBONES[name]).IMAGENET1K_V1
        state = fetch(weights_enum, f"ImageNet weights of {name}", instead)
        network.load_state_dict(state)
    elif weights != "none":
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict(state | _classifier_of(network))
        except FileNotFoundError:
            raise UserError(f"--backbone-weights {weights}: no such file; {instead}") from None
        except UnpicklingError:
            raise UserError(f"--backbone-weights {weights}: holds more than tensors; not loaded; {instead}") from None
        except Exception as error:
            raise UserError(
                f"--backbone-weights {weights}: not the state dict of a {name} ({one_line(error)})"
            ) from error
    return network


def fetch(weights, what, instead):
    """The state dict of one of torchvision's weights, downloaded once; UserError where that cannot be."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        raise UserError(
            f"{what} are neither at {cache} nor to be had from {weights.url} ({one_line(error)}): put the file there, "
            f"or {instead}"
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


def group_norm(channels):
    """Normalisation of RetinaNet's head from scratch: groups of eight channels, as torchvision's second version."""
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


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
        detector: "faster-rcnn" (Ren et al. 2015, with the FPN of Lin et al. 2017) or "retinanet" (Lin et al. 2017).
        backbone: a key of BACKBONES.
        num_classes: without the background.
        backbone_weights: "imagenet", "none" or a file, see build_backbone.
        norm: "frozen" or "batch"; default frozen where weights are loaded, batch where there are none.
        trainable_layers: how many of the backbone's five stages train, from the last; default 3 of a loaded
            backbone, as torchvision does, and 5 of a fresh one.
        fpn_channels: width of the pyramid.
        head_channels: width of the box head's two hidden layers (Faster R-CNN).
        anchor_scale: an anchor's side in strides of its level (RetinaNet: of the smallest of three); Faster R-CNN
            pools a region 28 times as large from stride 16.
        min_size, max_size: the shorter side is resized to min_size pixels, the longer to no more than max_size.
        rois: regions an image that the box head trains on (25% positive at IoU >= 0.5; Faster R-CNN).
        roi_samples: sampling points a side in each of RoIAlign's 7 x 7 bins (Faster R-CNN).
        rpn_top_n: proposals that the RPN takes from each level before non-maximum suppression, and from the image
            after it: in training, in evaluation. RetinaNet takes as many detections of each level as the second.

    Raises:
        UserError: an unknown detector or backbone, or weights that cannot be had.
    """
    if detector not in DETECTORS:
        raise UserError(f"no detector is called {detector!r}; there are {', '.join(DETECTORS)}")
    loaded = backbone_weights != "none"
    norm = norm or ("frozen" if loaded else "batch")
    network, stages, widths = stages_of(build_backbone(backbone, backbone_weights, norm))
    kept = stages[5 - ((3 if loaded else 5) if trainable_layers is None else trainable_layers) :]
    trained = {name for stage in kept for name in stage}
    for name, child in network.named_children():
        child.requires_grad_(name in trained)
    strides, fpn_norm = STRIDES[detector], nn.BatchNorm2d if norm == "batch" else None  # from scratch it needs one too
    first = 1 if detector == "faster-rcnn" else 2  # the pyramid starts at stride 4, or 8
    taken = {stage[-1]: str(i) for i, stage in enumerate(stages[first:])}
    more = LastLevelMaxPool() if detector == "faster-rcnn" else LastLevelP6P7(fpn_channels, fpn_channels)
    body = FloatFPN(network, taken, widths[first - 1 :], fpn_channels, extra_blocks=more, norm_layer=fpn_norm)
    training, testing = rpn_top_n
    if detector == "retinanet":
        sizes = tuple(tuple(int(anchor_scale * s * 2 ** (k / 3)) for k in range(3)) for s in strides)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))
        head_norm = group_norm if norm == "batch" else None
        per_cell = anchors.num_anchors_per_location()[0]
        head = FloatRetinaNetHead(fpn_channels, per_cell, num_classes + 1, norm_layer=head_norm)
        image_size = {"min_size": min_size, "max_size": max_size}
        model = RetinaNet(
            body, num_classes + 1, anchor_generator=anchors, head=head, topk_candidates=testing, **image_size
        )
        model.strides = strides
        return model
    anchors = AnchorGenerator(tuple((anchor_scale * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
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


def build_coco_teacher(detector, classes, min_size=800, max_size=1333):
    """torchvision's own ResNet-50 detector, trained on COCO, for those of COCO's classes that a data set has.

    Args:
        detector: one of DETECTORS.
        classes: names as COCO spells them, in the order of the data set's labels.
        min_size, max_size: as build_detector.

    Returns:
        the detector; the arguments of build_detector that made it.

    Raises:
        UserError: a class that COCO does not have, or no network.
    """
    enum = {"faster-rcnn": FasterRCNN_ResNet50_FPN_Weights, "retinanet": RetinaNet_ResNet50_FPN_Weights}[detector]
    weights = enum.COCO_V1
    names = weights.meta["categories"]  # 91, with gaps; the first is the background
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise UserError(f"--teacher-weights coco: COCO has no class called {', '.join(unknown[:5])}")
    instead = "give --teacher-weights FILE, or none to train a teacher"
    state = fetch(weights, f"COCO weights of {detector} r50", instead)
    build = {"detector": detector, "backbone": "r50", "num_classes": len(classes), "norm": "frozen"}
    build |= {"anchor_scale": 8 if detector == "faster-rcnn" else 4, "min_size": min_size, "max_size": max_size}
    model = build_detector(**build)
    rows = [0, *(names.index(name) for name in classes)]
    for kind in ("weight", "bias"):
        if detector == "faster-rcnn":
            head = f"roi_heads.box_predictor.cls_score.{kind}", f"roi_heads.box_predictor.bbox_pred.{kind}"
            state[head[0]] = state[head[0]][rows]
            state[head[1]] = state[head[1]].unflatten(0, (len(names), 4))[rows].flatten(0, 1)
        else:
            head = f"head.classification_head.cls_logits.{kind}"
            state[head] = state[head].unflatten(0, (-1, len(names)))[:, rows].flatten(0, 1)
    model.load_state_dict(state)
    for module in model.modules():  # torchvision trained these with an eps of 0
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    return model.eval(), build
