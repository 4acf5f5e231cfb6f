"""How long a TAR step takes, beside torchvision's stock step, our plain step and a lower bound.

    python -m tar.bench --teacher r101 --student r50 --size 600 1000 --batch-size 2 --json bench.json

All kinds of step have the same weights, images, boxes and sampled regions; the learning rate is 0. They take turns, so
that other load on the machine meets all kinds. A ratio is of two steps of the same round; the figure is its median.
"""

from functools import partial
from statistics import median

import torch
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tar.data.loader import to_device
from tar.detectors.backbones import BACKBONES
from tar.detectors.build import DETECTORS, build_detector
from tar.evaluation.cost import flops, timed
from tar.evaluation.markdown import rows_table
from tar.method.step import DistillationSettings, DistillationStep
from tar.training import checkpoint
from tar.training.failure import program
from tar.training.parser import Defaults, Parser, count, device_flags, positive
from tar.training.process import set_up

RESNETS = ("r18", "r34", "r50", "r101", "r152")
CLASSES = 20
KINDS = {  # of step: what it is
    "stock": "torchvision's student, float32, its own layout",
    "plain": "our plain student step",
    "tar": "our TAR step, all three levels",
    "floor": "our plain step, the teacher's backbone and head on the same regions",
}
RATIOS = (("tar", "floor"), ("tar", "plain"), *((kind, "stock") for kind in ("plain", "tar", "floor")))


def parser():
    p = Parser(prog="python -m tar.bench", description=__doc__.split("\n")[0], formatter_class=Defaults)
    p.add_argument("--teacher", choices=RESNETS, default="r101", help="backbone")
    p.add_argument("--student", choices=RESNETS, default="r50", help="backbone")
    p.add_argument("--detector", choices=DETECTORS, default=DETECTORS[0], help="of teacher and student")
    p.add_argument("--size", type=positive, nargs=2, default=[600, 1000], help="shorter side, longest side; pixels")
    p.add_argument("--image", type=positive, nargs=2, default=[375, 500], help="height, width before resizing; pixels")
    p.add_argument("--batch-size", type=positive, default=2, metavar="N", help="images a step")
    p.add_argument("--rois", type=positive, default=512, metavar="N", help="regions an image")
    p.add_argument("--rounds", type=positive, default=5, metavar="N", help="steps of each kind")
    p.add_argument("--warmup", type=count, default=2, metavar="N", help="rounds before the first counts")
    p.add_argument("--rows", nargs="+", choices=KINDS, default=[*KINDS], metavar="ROW", help="kinds of step")
    p.add_argument("--json", metavar="FILE", help="write the figures there too")
    device_flags(p)
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    with program("tar.bench"):
        figures = measure(args, set_up(args.device, args.amp, args.threads))
        if args.json:
            checkpoint.save_json(args.json, figures)


def measure(args, process):
    """Measures and prints the chosen kinds of step. Returns what --json holds."""
    about = vars(args) | process.about()
    print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    kinds = {kind: step for kind, step in kinds_of_step(args, process).items() if kind in args.rows}
    steps, ratios = times(args, process, kinds)
    counted, lines = {}, []
    for kind, step in kinds.items():
        torch.manual_seed(1000)
        counted[kind] = flops(step) / args.batch_size
        ms = "{:.0f} ({:.0f} to {:.0f})".format(*(f(steps[kind]) for f in (median, min, max)))
        lines.append({"row": kind, "what": KINDS[kind], "ms an image": ms, "GFLOP an image": counted[kind] / 1e9})
    print(rows_table(lines) + "\n")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    return {"about": about, "steps": steps, "ratios": ratios, "flops": counted}


def times(args, process, kinds):
    """Rounds of one step of each kind: {kind: ms an image of each round}, {name of a ratio: {median, min, max}}."""
    steps, ratios = {kind: [] for kind in kinds}, {}
    for number in range(-args.warmup, args.rounds):
        for kind, step in kinds.items():
            torch.manual_seed(1000 + number)  # all kinds sample the same regions
            steps[kind].append(1000 * timed(process, step) / args.batch_size)
    steps = {kind: ms[args.warmup :] for kind, ms in steps.items()}
    for one, other in RATIOS:
        if {one, other} <= kinds.keys():
            each = [a / b for a, b in zip(steps[one], steps[other], strict=True)]
            ratios[f"{one}_over_{other}"] = {f.__name__: f(each) for f in (median, min, max)}
    return steps, ratios


def draw_batch(count, height, width):
    """Noise as images uint8 [3, height, width], and targets; boxes cover 42%, as they do on average in VOC 2007."""
    images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    boxes = torch.tensor([[0.05, 0.1, 0.45, 0.7], [0.5, 0.3, 0.95, 0.7]]) * torch.tensor([width, height] * 2)
    return list(images), [{"boxes": boxes, "labels": torch.tensor([1, CLASSES])}] * count


def our_detector(args, backbone):
    """Our detector, random, but each residual block adds little: features stay finite."""
    sizes = {"min_size": args.size[0], "max_size": args.size[1], "rois": args.rois}
    sizes["anchor_scale"] = 8 if args.detector == "faster-rcnn" else 4
    model = build_detector(args.detector, backbone, CLASSES, norm="frozen", trainable_layers=3, **sizes)
    for name, factors in model.backbone.named_buffers():
        if name.endswith("bn2.weight"):
            factors.fill_(0.2)
    return model


def stock_detector(args, weights):
    """torchvision's own student as its reference script builds it, with our weights."""
    kind, levels = FasterRCNN, {}
    if args.detector == "retinanet":
        kind, levels = RetinaNet, {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body, (low, high) = resnet_fpn_backbone(backbone_name=BACKBONES[args.student], weights=None, **levels), args.size
    model = kind(body, CLASSES + 1, min_size=low, max_size=high, box_batch_size_per_image=args.rois)
    model.load_state_dict(weights)
    return model


class Floor(DistillationStep):
    """A step that computes the outputs of both models' heads, but no distillation loss."""

    def head_losses(self, shared):
        return {}, {}


def kinds_of_step(args, process):
    """{kind: a function that does one step and returns its losses}."""
    torch.manual_seed(0)
    student, teacher = our_detector(args, args.student), our_detector(args, args.teacher)
    stock = stock_detector(args, student.state_dict()).to(process.device).train()
    step = process.place(DistillationStep(student, DistillationSettings())).train()
    floor = Floor(student, DistillationSettings(weight_backbone=0.0))
    teacher = process.place(teacher.eval().requires_grad_(False))
    process.freeze(teacher)
    images, targets = to_device(*draw_batch(args.batch_size, *args.image), process.device)
    sgd = partial(torch.optim.SGD, lr=0.0, momentum=0.9, weight_decay=1e-4)
    stocks_optimizer, optimizer = sgd(stock.parameters()), sgd(step.parameters(), fused=True)

    def learn(optimizer, losses):
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return losses

    def stock_step():  # with torch's default: on a GPU products in float32, convolutions in TF32
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        losses = learn(stocks_optimizer, stock(images, targets).values())
        torch.set_float32_matmul_precision(precision)
        return losses

    def our_step(step, teacher=None):
        with process.autocast():
            detection, distillation, _ = step(images, targets, teacher)
        return learn(optimizer, [*detection.values(), *distillation.values()])

    ours = {"plain": (step,), "tar": (step, teacher), "floor": (floor, teacher)}
    our_step(step, teacher)  # fused SGD wants all momenta to begin in the same step
    return {"stock": stock_step, **{kind: partial(our_step, *models) for kind, models in ours.items()}}


if __name__ == "__main__":
    main()
