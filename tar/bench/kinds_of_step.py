"""The kinds of training step that the benchmark times: torchvision's, ours, and a naive distillation's.

All have the same weights, images, boxes and sampled regions. The learning rate is 0: every step is the same work.
"""

import re
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tar.data.loader import to_device
from tar.detectors.backbones import BACKBONES, build_backbone
from tar.detectors.build import build_detector
from tar.method.backbone_level import adapted_features
from tar.method.proposal_sharing import box_head, faster_rcnn_outputs, retinanet_outputs
from tar.method.step import DistillationSettings, DistillationStep
from tar.training.process import set_up

CLASSES = 20
STOCK, PLAIN, TAR, FLOOR = "stock", "plain", "tar", "floor"
ROWS = (STOCK, "stock autocast", PLAIN, TAR, FLOOR, "backbone level", "cls level", "reg level")
ROWS += ("naive", "naive equal", "adapters", "terms")


def draw_batch(count, height, width, seed=0):
    """Images uint8 [3, height, width] and targets; the boxes cover 42% on average, as in VOC 2007's trainval list."""
    rng, images, targets = np.random.default_rng(seed), [], []
    for _ in range(count):
        blobs = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 12)).astype(np.float32))
        image = F.interpolate(blobs, (height, width), mode="bicubic")[0]
        image = image + torch.from_numpy(rng.normal(0, 9, (3, height, width)).astype(np.float32))
        images.append(image.clamp(0, 255).to(torch.uint8))
        number = int(rng.integers(2, 10))
        sides = np.exp(rng.uniform(np.log(0.1), np.log(0.83), (number, 2))) * [width, height]
        corners = rng.uniform(0, 1, (number, 2)) * ([width, height] - sides)
        boxes = torch.from_numpy(np.hstack([corners, corners + sides]).astype(np.float32))
        targets.append({"boxes": boxes, "labels": torch.from_numpy(rng.integers(1, CLASSES + 1, number))})
    return images, targets


def our_detector(args, backbone):
    """Our detector with random weights; its frozen batch norm has the statistics of drawn images."""
    network = build_backbone(backbone, norm="batch")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            module.momentum = None  # the statistics of one batch
    with torch.no_grad():
        network.train()(torch.stack(draw_batch(2, 160, 160)[0]).float() / 128 - 1)
    options = {"min_size": args.size[0], "max_size": args.size[1], "rois": args.rois}
    options["anchor_scale"] = 8 if args.detector == "faster-rcnn" else 4
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "backbone.pth"
        torch.save(network.state_dict(), file)
        return build_detector(args.detector, backbone, CLASSES, backbone_weights=str(file), **options)


def stock_detector(args, backbone, weights):
    """torchvision's own detector as its reference script builds it, with our weights."""
    faster_rcnn = args.detector == "faster-rcnn"
    pyramid = {} if faster_rcnn else {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(backbone_name=BACKBONES[backbone], weights=None, **pyramid)
    options = {"min_size": args.size[0], "max_size": args.size[1]}
    options |= {"box_batch_size_per_image": args.rois} if faster_rcnn else {}
    model = (FasterRCNN if faster_rcnn else RetinaNet)(body, CLASSES + 1, **options)
    model.load_state_dict(weights)
    return model


def sgd(module, **options):
    """SGD with momentum and a learning rate of 0."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4, **options)


def in_float32(step):
    """A step with torch's defaults: on a GPU products in float32, convolutions in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    losses = step()
    torch.set_float32_matmul_precision(before)
    return losses


def resident_peak(args, name):
    """Peak resident size of this process after three steps of a kind, GiB (Linux)."""
    args.rows = [name]
    _, step = KindsOfStep(args, set_up(args.device, args.amp, args.threads)).rows()[name]
    for _ in range(3):
        step()
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


class KindsOfStep:
    """The models, the batch, and a method for each kind of step. args: flags of python -m tar.bench."""

    def __init__(self, args, process):
        self.args, self.process, device = args, process, process.device
        torch.manual_seed(args.seed)
        student, teacher = our_detector(args, args.student), our_detector(args, args.teacher)
        self.stock = stock_detector(args, args.student, student.state_dict()).to(device).train()
        self.stock_teacher = stock_detector(args, args.teacher, teacher.state_dict()).to(device).eval()
        self.step = process.place(DistillationStep(student, DistillationSettings())).train()
        self.student, self.teacher = student, process.place(teacher.eval().requires_grad_(False))
        process.freeze(self.teacher)
        self.stock_optimizer, self.optimizer = sgd(self.stock), sgd(self.step, fused=True)
        self.images, self.targets = to_device(*draw_batch(args.batch_size, *args.image, seed=args.seed), device)
        self.outputs = retinanet_outputs if args.detector == "retinanet" else faster_rcnn_outputs
        self.ours(DistillationSettings())  # fused SGD wants all momenta to begin in the same step
        if {"adapters", "terms"} & set(args.rows):
            self.prepare()

    def rows(self):
        """{name: (description, function that does one step)}."""
        levels = ("backbone", "cls", "reg")
        single = {n: DistillationSettings(**{f"weight_{m}": float(m == n) for m in levels}) for n in levels}
        return {
            STOCK: ("torchvision's student, float32, its own layout", partial(in_float32, self.stock_step)),
            "stock autocast": (f"the same under {self.process.amp} autocast", partial(self.stock_step, True)),
            PLAIN: ("our plain student step", partial(self.ours, None)),
            TAR: ("our TAR step, all three levels", partial(self.ours, DistillationSettings())),
            FLOOR: ("our plain step, the teacher's backbone and head on the same regions", self.floor),
            **{f"{n} level": (f"our step, {n} level only", partial(self.ours, s)) for n, s in single.items()},
            "naive": ("stock step, teacher(images), feature loss by hooks, float32", partial(in_float32, self.naive)),
            "naive equal": ("the same with our precision and layout", partial(self.naive, True)),
            "adapters": ("of the TAR step: masks and adapters alone, forward and backward", self.adapters),
            "terms": ("of the TAR step: masks, gate and losses alone, forward and backward", self.terms),
        }

    def learn(self, losses, optimizer):
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return losses

    def stock_step(self, autocast=False):
        with self.process.autocast() if autocast else nullcontext():
            losses = self.stock(self.images, self.targets)
        return self.learn(losses.values(), self.stock_optimizer)

    def ours(self, settings):
        """Our step; settings None: without the teacher."""
        self.step.settings = settings
        with self.process.autocast():
            detection, distillation, _ = self.step(self.images, self.targets, self.teacher if settings else None)
        self.step.settings = DistillationSettings()
        return self.learn([*detection.values(), *distillation.values()], self.optimizer)

    def naive(self, equal=False):
        """A detection step, the teacher's detections too, and an imitation of all features; equal: our detectors."""
        student, teacher = (self.student, self.teacher) if equal else (self.stock, self.stock_teacher)
        seen = []
        hooks = [m.backbone.register_forward_hook(lambda _, __, out: seen.append(out)) for m in (student, teacher)]
        with self.process.autocast() if equal else nullcontext():
            losses = list(student(self.images, self.targets).values())
            with torch.no_grad():
                teacher(self.images)
            maps, teacher_maps = (list(features.values()) for features in seen)
            losses += map(F.mse_loss, maps, teacher_maps)
        for hook in hooks:
            hook.remove()
        return self.learn(losses, self.optimizer if equal else self.stock_optimizer)

    def features(self):
        """Images and targets after the transform; the student's features and the teacher's."""
        images, targets = self.student.transform(self.images, self.targets)
        pixels = images.tensors.contiguous(memory_format=torch.channels_last)
        features = self.student.backbone(pixels)
        with torch.no_grad():
            return images, targets, features, self.teacher.backbone(pixels)

    def floor(self):
        """What any distillation on shared regions computes: a plain step, the teacher's backbone and head."""
        with self.process.autocast():
            images, targets, features, teacher_features = self.features()
            if self.args.detector == "retinanet":
                losses, _ = retinanet_outputs(self.student, features, images, targets)
                with torch.no_grad():
                    self.teacher.head(list(teacher_features.values()))
                return self.learn(losses.values(), self.optimizer)
            heads, sizes = self.student.roi_heads, images.image_sizes
            proposals, losses = self.student.rpn(images, features, targets)
            regions, _, labels, delta_targets = heads.select_training_samples(proposals, targets)
            outputs = box_head(self.student, features, regions, sizes)
            box_losses = fastrcnn_loss(*outputs, labels, delta_targets)
            positive = [r[y > 0] for r, y in zip(regions, labels, strict=True)]
            with torch.no_grad():
                box_head(self.teacher, teacher_features, positive, sizes)
        return self.learn([*losses.values(), *box_losses], self.optimizer)

    def prepare(self):
        """Keeps what the adapters and the losses of a TAR step take; gradients end there."""
        with self.process.autocast():
            images, targets, features, teacher_features = self.features()
            given = features, images, targets, self.teacher, teacher_features, self.step.settings
            _, shared = self.outputs(self.student, *given)
        self.resized = images, targets
        self.maps = [f.detach().requires_grad_() for f in features.values()]
        self.teacher_maps = list(teacher_features.values())
        leaves = {name: getattr(shared, name).detach().requires_grad_() for name in ("logits", "deltas")}
        self.shared = replace(shared, **leaves)
        adapted, teacher_rows, masks = self.compared()
        self.leaves = [level.detach().requires_grad_() for level in adapted], teacher_rows, masks

    def compared(self):
        with self.process.autocast():
            masks = self.step.masks(*self.resized, self.teacher_maps)
            on_cpu = self.process.device.type == "cpu"
            return adapted_features(self.step.adapters, self.maps, self.teacher_maps, masks, sparse=on_cpu)

    def adapters(self):
        adapted, _, _ = self.compared()
        torch.autograd.backward(adapted, [torch.ones_like(level) for level in adapted])

    def terms(self):
        with self.process.autocast():
            self.step.masks(*self.resized, self.teacher_maps)
            losses = {"distill_backbone": self.step.feature_loss(*self.leaves), **self.step.head_losses(self.shared)[0]}
        sum(losses.values()).backward()
