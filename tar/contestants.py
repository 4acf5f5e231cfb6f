"""What tar/bench.py times: one training step by torchvision's stock detector, by ours, and by a naive framework.

All start from the same weights, see the same images and boxes and sample the same regions; nothing is learnt (the
learning rate is 0), so that every round is the same work.
"""

import tempfile
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tar.adapters import compared
from tar.distill import Levels, Step, faster_rcnn, retinanet
from tar.masks import box_mask
from tar.models import BACKBONES, build_backbone, build_detector
from tar.regions import box_head, region_proposals

CLASSES = 20
STOCK, PLAIN, TAR, FLOOR = "stock", "plain", "tar", "floor"


def draw_batch(count, height, width, seed=0):
    """Images and boxes of a photograph's size and texture: soft blobs, fine noise, two to nine boxes each, which cover
    42% of an image on the average of many, as those of VOC 2007's trainval list do.

    Returns:
        list of uint8 [3, height, width]; list of dicts: boxes float [N, 4] xyxy in pixels, labels int64 [N] from 1.
    """
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


def calibrated(name, folder):
    """A file of a backbone's weights, random, with the batch statistics of drawn images: its features neither grow
    from block to block nor die, as they would if batch norm were frozen at its initial values."""
    network = build_backbone(name, norm="batch")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            module.momentum = None  # the statistics are those of one batch
    images, _ = draw_batch(2, 160, 160)
    with torch.no_grad():
        network.train()(torch.stack(images).float() / 128 - 1)
    torch.save(network.state_dict(), folder / f"{name}.pth")
    return folder / f"{name}.pth"


def stock_detector(args, backbone, state):
    """torchvision's own detector as its reference script builds it, with our weights."""
    first, extra = ([1, 2, 3, 4], None) if args.detector == "faster-rcnn" else ([2, 3, 4], LastLevelP6P7(256, 256))
    body = resnet_fpn_backbone(
        backbone_name=BACKBONES[backbone],
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
        returned_layers=first,
        extra_blocks=extra,
    )
    size = {"min_size": args.size[0], "max_size": args.size[1]}
    if args.detector == "faster-rcnn":
        model = FasterRCNN(body, CLASSES + 1, **size, box_batch_size_per_image=args.rois)
    else:
        model = RetinaNet(body, CLASSES + 1, **size)
    model.load_state_dict(state)
    return model


def our_detector(args, backbone, file):
    scale = 8 if args.detector == "faster-rcnn" else 4
    size = {"min_size": args.size[0], "max_size": args.size[1], "anchor_scale": scale, "rois": args.rois}
    return build_detector(args.detector, backbone, CLASSES, backbone_weights=str(file), **size)


def sgd(module):
    """SGD with momentum that moves nothing."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return partial(torch.optim.SGD, trained, lr=0.0, momentum=0.9, weight_decay=1e-4)


class Contestants:
    """The models and the batch, and one method a kind of step.

    Args:
        args: of tar.bench.
        machine: a tar.machine.Machine.
    """

    def __init__(self, args, machine):
        self.args, self.machine, device = args, machine, machine.device
        torch.manual_seed(args.seed)
        with tempfile.TemporaryDirectory() as folder:
            student, teacher = (
                our_detector(args, name, calibrated(name, Path(folder))) for name in (args.student, args.teacher)
            )
        self.stock = stock_detector(args, args.student, student.state_dict()).to(device).train()
        self.stock_teacher = stock_detector(args, args.teacher, teacher.state_dict()).to(device).eval()
        self.step = machine.place(Step(student, Levels(), 256)).train()
        self.teacher = machine.place(teacher.eval().requires_grad_(False))
        machine.freeze(self.teacher)
        self.stock_optimizer = sgd(self.stock)()
        self.optimizer = sgd(self.step)(fused=True)
        copies = [deepcopy(self.step), Step(deepcopy(student))] if machine.world > 1 else []
        self.copies = [(copy.train(), sgd(copy)(fused=True)) for copy in copies]
        self.wrapped = machine.parallel(self.step)
        images, targets = draw_batch(args.batch_size, *args.image, seed=args.seed + machine.rank)
        self.images = [image.to(device).float() / 255 for image in images]
        self.targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
        inside = [box_mask(target["boxes"], *args.image, stride=1) for target in targets]
        self.covered = float(torch.stack(inside).mean())  # by boxes: the adapters work there
        self.prepared = None
        self.ours(Levels())  # fused SGD wants all momenta to begin in the same step

    def rows(self):
        """{name: (what it is, a function that does one step)}."""
        levels = {"backbone": "distill_backbone", "cls": "distill_cls", "reg": "distill_reg"}
        off = dict.fromkeys(levels, 0.0)
        single = {
            f"{name} level": (f"our step, {name} level only", partial(self.ours, Levels(**{**off, name: 1.0})))
            for name in levels
        }
        return {
            STOCK: ("torchvision's student, float32, its own layout", partial(self.as_usual, self.stock_step)),
            "stock autocast": (f"the same under {self.machine.amp} autocast", partial(self.stock_step, True)),
            PLAIN: ("our plain student step", partial(self.ours, None)),
            TAR: ("our TAR step, all three levels", partial(self.ours, Levels())),
            FLOOR: ("our plain step, the teacher's backbone and head on the same regions", self.floor),
            **single,
            "naive": (
                "stock step, the teacher's whole model(images), feature loss by hooks, float32",
                partial(self.as_usual, self.naive),
            ),
            "naive equal": ("the same with our precision and layout", partial(self.naive, True)),
            "adapters": ("of the TAR step: masks and adapters alone, forward and backward", self.adapters),
            "terms": ("of the TAR step: masks, gate and losses alone, forward and backward", self.terms),
        }

    def rows_of_many(self):
        """The rows of a training by several processes, and what DDP costs there."""
        (unused, its), (plain, plains) = self.copies
        unused = DistributedDataParallel(unused, find_unused_parameters=True)
        plain = self.machine.parallel(plain)
        return {
            PLAIN: ("our plain student step", partial(self.ours, None, plain, plains)),
            TAR: ("our TAR step, all three levels", partial(self.ours, Levels())),
            "tar alone": ("the same, gradients not summed over processes", partial(self.ours, Levels(), self.step)),
            "tar unused": (
                "the TAR step, DDP told to find unused parameters",
                partial(self.ours, Levels(), unused, its),
            ),
        }

    def as_usual(self, step):
        """A step with torch's own defaults for float32, whatever tar.machine has said: on a GPU products in float32,
        convolutions in TF32."""
        usual = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision(usual)

    def learn(self, losses, optimizer):
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return losses

    def stock_step(self, autocast=False):
        with self.machine.autocast() if autocast else nullcontext():
            losses = self.stock(self.images, self.targets)
        return self.learn(losses.values(), self.stock_optimizer)

    def ours(self, levels, step=None, optimizer=None):
        self.step.levels = levels or Levels()
        with self.machine.autocast():
            given = self.images, self.targets, self.teacher if levels else None
            detection, distillation, _ = (step or self.wrapped)(*given)
        return self.learn([*detection.values(), *distillation.values()], optimizer or self.optimizer)

    def naive(self, equal=False):
        student, teacher = (self.step.student, self.teacher) if equal else (self.stock, self.stock_teacher)
        seen = {}
        hooks = [
            model.backbone.register_forward_hook(lambda _, __, features, name=name: seen.update({name: features}))
            for name, model in (("student", student), ("teacher", teacher))
        ]
        with self.machine.autocast() if equal else nullcontext():
            losses = list(student(self.images, self.targets).values())
            with torch.no_grad():
                teacher(self.images)
            losses += [F.mse_loss(mine, seen["teacher"][level]) for level, mine in seen["student"].items()]
        for hook in hooks:
            hook.remove()
        return self.learn(losses, self.optimizer if equal else self.stock_optimizer)

    def floor(self):
        student, teacher = self.step.student, self.teacher
        with self.machine.autocast():
            images, targets = student.transform(self.images, self.targets)
            pixels = images.tensors.contiguous(memory_format=torch.channels_last)
            features = student.backbone(pixels)
            with torch.no_grad():
                taught = teacher.backbone(pixels)
            if self.args.detector == "retinanet":
                detection, _ = retinanet(student, features, images, targets)
                with torch.no_grad():
                    teacher.head(list(taught.values()))
                return self.learn(detection.values(), self.optimizer)
            heads, sizes = student.roi_heads, images.image_sizes
            proposals, detection = region_proposals(student.rpn, images, features, targets)
            regions, _, labels, deltas = heads.select_training_samples(proposals, targets)
            answers = box_head(student, features, regions, sizes)
            losses = fastrcnn_loss(*answers, labels, deltas)
            with torch.no_grad():  # the positive ones: the soft labels are for them
                box_head(teacher, taught, [r[y > 0] for r, y in zip(regions, labels, strict=True)], sizes)
        return self.learn([*detection.values(), *losses], self.optimizer)

    def prepare(self):
        """What the adapters and the losses of a TAR step are given: tensors that end the graph."""
        if self.prepared is None:
            student, levels = self.step.student, Levels()
            share = retinanet if self.args.detector == "retinanet" else faster_rcnn
            with self.machine.autocast():
                images, targets = student.transform(self.images, self.targets)
                pixels = images.tensors.contiguous(memory_format=torch.channels_last)
                features = student.backbone(pixels)
                with torch.no_grad():
                    taught = self.teacher.backbone(pixels)
                _, shared = share(student, features, images, targets, (self.teacher, taught, levels))
            leaf = {name: getattr(shared, name).detach().requires_grad_() for name in ("logits", "deltas")}
            features = [f.detach().requires_grad_() for f in features.values()]
            self.prepared = images, targets, features, list(taught.values()), replace(shared, **leaf)
            self.pairs = self.adapted()
        return self.prepared

    def adapted(self):
        """The adapters' answers under the masks, as the step compares them."""
        images, targets, features, wanted, _ = self.prepared
        self.step.levels = Levels()
        with self.machine.autocast():
            where = self.step.masks(images, targets, wanted)
            return compared(self.step.adapters, features, wanted, where, sparse=self.machine.device.type == "cpu")

    def adapters(self):
        self.prepare()
        adapted, _, _ = self.adapted()
        torch.autograd.backward(adapted, [torch.ones_like(level) for level in adapted])

    def terms(self):
        images, targets, _, wanted, shared = self.prepare()
        adapted, taught, where = self.pairs
        adapted = [level.detach().requires_grad_() for level in adapted]
        self.step.levels = Levels()
        with self.machine.autocast():
            self.step.masks(images, targets, wanted)
            distillation, _ = self.step.terms((adapted, taught, where), shared)
        sum(distillation.values()).backward()
