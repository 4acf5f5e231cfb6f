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
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tar.data.loader import to_device
from tar.detectors.backbones import BACKBONES
from tar.detectors.build import DETECTORS, build_detector
from tar.evaluation.cost import flops, timed
from tar.evaluation.markdown import rows_table
from tar.method.proposal_sharing import faster_rcnn_outputs, retinanet_outputs
from tar.method.step import DistillationSettings, DistillationStep
from tar.training import checkpoint
from tar.training.failure import program
from tar.training.flags import LEVELS
from tar.training.parser import Defaults, Parser, count, device_flags, positive
from tar.training.process import TYPES, set_up

RESNETS = ("r18", "r34", "r50", "r101", "r152")
CLASSES = 20
STOCK, PLAIN, TAR, FLOOR = "stock", "plain", "tar", "floor"
ROWS = (STOCK, PLAIN, TAR, FLOOR, *(f"{level} level" for level in LEVELS))


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
    p.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="kinds of step")
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
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    kinds = {name: kind for name, kind in kinds_of_step(args, process).items() if name in args.rows}
    steps, ratios = times(args, process, kinds)
    peaks = {amp: peak(process, amp) for amp in ("none", process.amp)}
    counted, shares, lines = {}, {}, []
    for name, (what, step) in kinds.items():
        torch.manual_seed(1000)
        counted[name] = flops(step) / args.batch_size
        ms, low, high = (f(steps[name]) for f in (median, min, max))
        shares[name] = counted[name] / (ms / 1000) / peaks["none" if name == STOCK else process.amp]
        line = {"row": name, "what": what, "ms an image": f"{ms:.0f} ({low:.0f} to {high:.0f})"}
        lines.append(line | {"GFLOP an image": counted[name] / 1e9, "of peak": f"{100 * shares[name]:.0f}%"})
    print("\n" + rows_table(lines) + "\n")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    return {"about": about, "steps": steps, "ratios": ratios, "flops": counted, "peak": peaks, "of_peak": shares}


def times(args, process, kinds):
    """Rounds of one step of each kind: {row: ms an image of each round}, {name of a ratio: {median, min, max}}."""
    steps, ratios = {name: [] for name in kinds}, {}
    for number in range(-args.warmup, args.rounds):
        for name, (_, step) in kinds.items():
            torch.manual_seed(1000 + number)  # all kinds sample the same regions
            steps[name].append(1000 * timed(process, step) / args.batch_size)
    steps = {name: of_row[args.warmup :] for name, of_row in steps.items()}
    for one, other in ((TAR, FLOOR), (TAR, PLAIN), *((row, STOCK) for row in kinds if row != STOCK)):
        if {one, other} <= kinds.keys():
            each = [a / b for a, b in zip(steps[one], steps[other], strict=True)]
            ratios[f"{one}_over_{other}".replace(" ", "_")] = {f.__name__: f(each) for f in (median, min, max)}
    return steps, ratios


def peak(process, amp):
    """FLOP a second of a large matrix product of a type; on a GPU float32 is TF32, there and in the steps."""
    n = 8192 if process.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=process.device, dtype=TYPES.get(amp, torch.float32))
    return 2 * n**3 / min(timed(process, lambda: a @ a) for _ in range(7))


def draw_batch(count, height, width):
    """Noise as images uint8 [3, height, width], and targets; boxes cover 42%, as they do on average in VOC 2007."""
    images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    boxes = torch.tensor([[0.05, 0.1, 0.45, 0.7], [0.5, 0.3, 0.95, 0.7]]) * torch.tensor([width, height] * 2)
    return list(images), [{"boxes": boxes, "labels": torch.tensor([1, CLASSES])}] * count


def our_detector(args, backbone):
    """Our detector, random but for the end of each residual block, which adds little: features stay finite."""
    sizes = {"min_size": args.size[0], "max_size": args.size[1], "rois": args.rois}
    sizes["anchor_scale"] = 8 if args.detector == "faster-rcnn" else 4
    model = build_detector(args.detector, backbone, CLASSES, norm="frozen", trainable_layers=3, **sizes)
    for block in model.backbone.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            getattr(block, "bn3", block.bn2).weight.fill_(0.2)
    return model


def stock_detector(args, weights):
    """torchvision's own student as its reference script builds it, with our weights."""
    sizes = {"min_size": args.size[0], "max_size": args.size[1]}
    if args.detector == "faster-rcnn":
        levels, kind, sizes["box_batch_size_per_image"] = {}, FasterRCNN, args.rois
    else:
        levels, kind = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}, RetinaNet
    body = resnet_fpn_backbone(backbone_name=BACKBONES[args.student], weights=None, **levels)
    model = kind(body, CLASSES + 1, **sizes)
    model.load_state_dict(weights)
    return model


def kinds_of_step(args, process):
    """{name: (what it is, a function that does one step and returns its losses)}."""
    torch.manual_seed(0)
    student, teacher = our_detector(args, args.student), our_detector(args, args.teacher)
    stock = stock_detector(args, student.state_dict()).to(process.device).train()
    step = process.place(DistillationStep(student, DistillationSettings())).train()
    teacher = process.place(teacher.eval().requires_grad_(False))
    process.freeze(teacher)
    images, targets = to_device(*draw_batch(args.batch_size, *args.image), process.device)
    optimizers, precision = {}, torch.get_float32_matmul_precision()
    for module in (stock, step):
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizers[module] = torch.optim.SGD(trained, 0.0, 0.9, weight_decay=1e-4, fused=module is step)

    def learn(module, losses):
        optimizers[module].zero_grad()
        sum(losses).backward()
        optimizers[module].step()
        return losses

    def stock_step():  # with torch's default: on a GPU products in float32, convolutions in TF32
        torch.set_float32_matmul_precision("highest")
        losses = learn(stock, stock(images, targets).values())
        torch.set_float32_matmul_precision(precision)
        return losses

    def our_step(settings):
        step.settings = settings
        with process.autocast():
            detection, distillation, _ = step(images, targets, teacher if settings else None)
        return learn(step, [*detection.values(), *distillation.values()])

    def floor_step():
        with process.autocast():
            resized, boxes = student.transform(images, targets)
            pixels = resized.tensors.contiguous(memory_format=torch.channels_last)
            features = student.backbone(pixels)
            with torch.no_grad():
                given = teacher, teacher.backbone(pixels), DistillationSettings()
            outputs = retinanet_outputs if args.detector == "retinanet" else faster_rcnn_outputs
            losses, _ = outputs(student, features, resized, boxes, *given)
        return learn(step, losses.values())

    our_step(DistillationSettings())  # fused SGD wants all momenta to begin in the same step
    kinds = {
        STOCK: ("torchvision's student, float32, its own layout", stock_step),
        PLAIN: ("our plain student step", partial(our_step, None)),
        TAR: ("our TAR step, all three levels", partial(our_step, DistillationSettings())),
        FLOOR: ("our plain step, the teacher's backbone and head on the same regions", floor_step),
    }
    for level in LEVELS:
        settings = DistillationSettings(**{f"weight_{other}": float(other == level) for other in LEVELS})
        kinds[f"{level} level"] = f"our step, {level} level only", partial(our_step, settings)
    return kinds


if __name__ == "__main__":
    main()
