"""Detectors from torchvision's own parts: a ResNet or MobileNet, an FPN, Faster R-CNN or RetinaNet.

bfloat16 keeps 8 bits of a number: a corner at pixel 500 would be rounded to a multiple of 4. torchvision's anchor
generator and box coder compute in the dtype of what they are given, so every part here hands float32 on: the
convolutions run in the autocast type, coordinates never do.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from tar import UserError
from tar.detectors.backbones import build_backbone
from tar.detectors.roi_align import PyramidRoIAlign

DETECTORS = ("faster-rcnn", "retinanet")
PYRAMID_NORMS = ("none", "batch")
STRIDES = {  # of the pyramid levels, pixels of the resized image
    "faster-rcnn": (4, 8, 16, 32, 64),  # P2 .. P6
    "retinanet": (8, 16, 32, 64, 128),  # P3 .. P7
}


class InFloat32:
    """Hands what a part of a detector returns, tensors in lists, tuples or dicts, on as float32."""

    def forward(self, x):
        return tree_map(torch.Tensor.float, super().forward(x))


class FloatFPN(InFloat32, BackboneWithFPN):
    """torchvision's backbone with FPN (Lin et al. 2017).

    Args:
        body: of Backbone, with the channels of its levels.
        width: channels of every level of the pyramid.
        coarser: makes the levels after stride 32.
        norm: layer of normalisation, or None.
    """

    def __init__(self, body, channels, width, coarser, norm):
        nn.Module.__init__(self)
        self.body, self.out_channels = body, width
        self.fpn = FeaturePyramidNetwork(channels, width, coarser, norm)


class FloatRPNHead(InFloat32, RPNHead):
    """torchvision's RPN head: objectness and box deltas."""


class FloatRetinaNetHead(InFloat32, RetinaNetHead):
    """torchvision's RetinaNet head: class logits and box deltas."""


class FloatPredictor(InFloat32, FastRCNNPredictor):
    """The last layers of torchvision's box head: class logits and box deltas."""


def group_norm(channels):
    """Normalisation of RetinaNet's head from scratch: groups of eight channels, as torchvision's second version."""
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


def build_detector(
    detector, backbone, num_classes, *, backbone_weights="none", norm=None, trainable_layers=None, fpn_channels=256,
    pyramid_norm=None, head_channels=1024, anchor_scale=8, min_size=600, max_size=1000, rois=512, roi_samples=2,
    rpn_top_n=(2000, 1000),
):  # fmt: skip
    """A detector of torchvision: model(images, targets) gives losses in training, model(images) boxes in evaluation.

    images: list of float [3, H, W] in 0..1; targets: list of {boxes [N, 4] xyxy in pixels, labels [N] from 1}. In
    evaluation each image's {boxes [N, 4] xyxy in pixels of the given image, labels [N], scores [N]}.

    Args:
        detector: "faster-rcnn" (Ren et al. 2015, with the FPN of Lin et al. 2017) or "retinanet" (Lin et al. 2017).
        backbone, backbone_weights, norm: as build_backbone; norm is frozen by default where weights are loaded.
        num_classes: without the background.
        trainable_layers: stages of the backbone's five that train, from the last; default 3 of a loaded one, else 5.
        fpn_channels, head_channels: width of the pyramid, and of the box head's two hidden layers (Faster R-CNN).
        pyramid_norm: "none" (the paper's) or "batch", of the pyramid; batch also puts group norm into RetinaNet's head.
            Default: batch where norm is.
        anchor_scale: an anchor's side in strides of its level (RetinaNet: of the smallest of three); Faster R-CNN
            pools a region 28 times as large from stride 16.
        min_size, max_size: pixels of the shorter side after resizing, and limit of the longer.
        rois: regions an image that the box head trains on (25% positive at IoU >= 0.5; Faster R-CNN).
        roi_samples: sampling points a side in each of RoIAlign's 7 x 7 bins (Faster R-CNN).
        rpn_top_n: in training, in evaluation: proposals from each level before non-maximum suppression, and from the
            image after it; RetinaNet takes as many detections of each level as the second.

    Raises:
        UserError: an unknown detector or backbone, or weights that are not there.
    """
    if detector not in DETECTORS:
        raise UserError(f"no detector is called {detector!r}; there are {', '.join(DETECTORS)}")
    loaded = backbone_weights != "none"
    norm = norm or ("frozen" if loaded else "batch")
    trained_stages = (3 if loaded else 5) if trainable_layers is None else trainable_layers
    strides, classes, (training, testing) = STRIDES[detector], num_classes + 1, rpn_top_n
    taken = build_backbone(backbone, backbone_weights, norm, strides[0], trained_stages)
    normalised = (pyramid_norm or norm) == "batch"
    # P2 to P5 and a pooled P6, or P3 to P5 and strided P6, P7
    coarser = LastLevelMaxPool() if detector == "faster-rcnn" else LastLevelP6P7(fpn_channels, fpn_channels)
    body = FloatFPN(taken.body, taken.channels, fpn_channels, coarser, nn.BatchNorm2d if normalised else None)
    sizes = {"min_size": min_size, "max_size": max_size, "image_mean": taken.mean, "image_std": taken.std}
    if detector == "retinanet":
        scales = tuple(tuple(int(anchor_scale * s * 2 ** (k / 3)) for k in range(3)) for s in strides)
        anchors = AnchorGenerator(scales, ((0.5, 1.0, 2.0),) * len(strides))
        per_cell, head_norm = anchors.num_anchors_per_location()[0], group_norm if normalised else None
        head = FloatRetinaNetHead(fpn_channels, per_cell, classes, norm_layer=head_norm)
        model = RetinaNet(body, classes, anchor_generator=anchors, head=head, topk_candidates=testing, **sizes)
    else:
        anchors = AnchorGenerator(tuple((anchor_scale * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
        pooling = {"sampling_ratio": roi_samples, "canonical_scale": 28 * anchor_scale}
        model = FasterRCNN(
            body,
            rpn_anchor_generator=anchors,
            rpn_head=FloatRPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
            **{f"rpn_{when}_nms_top_n_train": training for when in ("pre", "post")},
            **{f"rpn_{when}_nms_top_n_test": testing for when in ("pre", "post")},
            box_roi_pool=PyramidRoIAlign(["0", "1", "2", "3"], strides[:4], **pooling),
            box_head=TwoMLPHead(fpn_channels * 7 * 7, head_channels),
            box_predictor=FloatPredictor(head_channels, classes),
            box_batch_size_per_image=rois,
            **sizes,
        )
    model.strides = strides
    return model
