"""The flags, and the recipe of each data set that fills in what no flag says."""

import argparse

from tar.data import DATASETS, SHAPES_IMAGES
from tar.distill import Levels
from tar.losses import CLS_GATES, REG_GATES
from tar.masks import MASKS
from tar.models import BACKBONES, DETECTORS
from tar.schedule import DECAYS, SCHEDULES

RECIPES = {
    "voc": {
        "epochs": 12,
        "batch_size": 2,
        "optimizer": "sgd",
        "lr": 0.02,
        "weight_decay": 1e-4,
        "schedule": "step",
        "warmup": 500,
        "clip_grad": 0.0,
        "size": [600, 1000],
        "backbone_weights": "imagenet",
        "fpn_channels": 256,
        "head_channels": 1024,
        "anchor_scale": 8,
        "rois": 512,
        "roi_samples": 2,
        "rpn_top_n": [2000, 1000],
        "workers": 2,
    },
    "shapes": {
        "epochs": 4,
        "batch_size": 8,
        "optimizer": "adamw",
        "lr": 0.004,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup": 100,
        "clip_grad": 0.0,
        "size": [96, 96],
        "backbone_weights": "none",
        "fpn_channels": 64,
        "head_channels": 256,
        "anchor_scale": 4,
        "rois": 64,
        "roi_samples": 1,
        "rpn_top_n": [200, 100],
        "workers": 0,
    },
}
BUILD = ("fpn_channels", "head_channels", "anchor_scale", "rois", "roi_samples", "rpn_top_n")
LEVELS = ("backbone", "cls", "reg")
DISTILLATION = ("weight_backbone", "weight_cls", "weight_reg", "mask", "sigma2", "cls_gate", "reg_gate", "decay")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help text, but not those that say nothing."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def parser():
    """The command line of train.py."""
    p = argparse.ArgumentParser(
        description="Train a detector, or distil one from a teacher. Without --student: the demonstration on drawn "
        "shapes (teacher, plain student, plain student of equal cost, distilled student) and its table.",
        formatter_class=_Defaults,
    )

    def recipe(group, flag, text, **kwargs):
        values = ", ".join(f"{d}: {_words(r[flag[2:].replace('-', '_')])}" for d, r in RECIPES.items())
        group.add_argument(flag, default=argparse.SUPPRESS, help=f"{text} (default: {values})", **kwargs)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=DATASETS, default="shapes", help="shapes are drawn by the program")
    g.add_argument(
        "--data-path", default="data", metavar="DIR", help="folder with VOCdevkit/VOC2007, or with JPEGImages"
    )
    g.add_argument("--voc-years", nargs="+", default=["2007"], metavar="YEAR", help="train on trainval, test on test")
    g.add_argument(
        "--download", action="store_true", help="fetch VOC into --data-path first (torchvision's downloader)"
    )
    text = "what to measure on; val is for tuning (voc: train list against val list; shapes: other images than test's)"
    g.add_argument("--split", choices=("test", "val"), default="test", help=text)
    recipe(
        g, "--size", "shorter side, and limit of the longer, pixels", nargs=2, type=_positive, metavar=("MIN", "MAX")
    )
    g.add_argument(
        "--limit-train",
        type=_count,
        default=0,
        metavar="N",
        help=f"training images an epoch; 0: all (shapes: {SHAPES_IMAGES['train']})",
    )
    g.add_argument(
        "--limit-test",
        type=_count,
        default=0,
        metavar="N",
        help=f"test images; 0: all (shapes: {SHAPES_IMAGES['test']})",
    )
    recipe(g, "--workers", "loader processes", type=_count, metavar="N")

    g = p.add_argument_group("models")
    g.add_argument("--student", choices=BACKBONES, help="backbone of the detector to train")
    g.add_argument("--teacher", choices=BACKBONES, help="backbone of the teacher; none: train the student plainly")
    g.add_argument("--teacher-weights", metavar="FILE", help="checkpoint of the teacher; none: train it first, once")
    g.add_argument("--detector", choices=DETECTORS, default="faster-rcnn", help="of teacher and student")
    recipe(g, "--backbone-weights", "imagenet (frozen batch norm), none (trained batch norm) or FILE", metavar="WHICH")
    recipe(g, "--fpn-channels", "width of the pyramid", type=_positive, metavar="N")
    recipe(g, "--head-channels", "width of the box head", type=_positive, metavar="N")
    recipe(g, "--anchor-scale", "side of an anchor in strides of its level", type=_positive, metavar="N")
    recipe(g, "--rois", "regions an image that the box head trains on", type=_positive, metavar="N")
    recipe(g, "--roi-samples", "RoIAlign's sampling points a side in each of 7 x 7 bins", type=_positive, metavar="N")
    recipe(
        g,
        "--rpn-top-n",
        "proposals kept in training and in evaluation",
        nargs=2,
        type=_positive,
        metavar=("TRAIN", "TEST"),
    )

    d = Levels()
    g = p.add_argument_group("distillation")
    g.add_argument("--weight-backbone", type=_weight, default=d.backbone, metavar="A", help="weight a of L_backbone")
    g.add_argument("--weight-cls", type=_weight, default=d.cls, metavar="B", help="weight b of L_cls")
    g.add_argument("--weight-reg", type=_weight, default=d.reg, metavar="G", help="weight g of L_reg")
    for level in LEVELS:
        g.add_argument(f"--no-{level}", action="store_true", help=f"leave the {level} level out")
    g.add_argument("--mask", choices=MASKS, default=d.mask, help="where the backbone level imitates")
    g.add_argument("--sigma2", type=_above_0, default=d.sigma2, metavar="S2", help="width of the Gaussian mask")
    g.add_argument(
        "--cls-gate",
        choices=CLS_GATES,
        default=d.cls_gate,
        help="soft labels: all positives, or where the teacher is better",
    )
    g.add_argument("--reg-gate", choices=REG_GATES, default=d.reg_gate, help="what the teacher's box must beat")
    g.add_argument("--decay", choices=DECAYS, default="linear", help="of the distillation weight over the run")
    g.add_argument(
        "--no-decay",
        action="store_const",
        const="none",
        dest="decay",
        default=argparse.SUPPRESS,
        help="the same as --decay none",
    )

    g = p.add_argument_group("training")
    text = (
        "whose defaults to take: voc's (ImageNet weights) or shapes' (small and from scratch); default: the data set's"
    )
    g.add_argument("--recipe", choices=RECIPES, help=text)
    recipe(g, "--epochs", "passes over the training images", type=_positive, metavar="N")
    recipe(g, "--batch-size", "images a process and step", type=_positive, metavar="N")
    recipe(g, "--optimizer", "sgd with momentum, or adamw", choices=("sgd", "adamw"))
    recipe(g, "--lr", "learning rate per 16 images a step, scaled linearly with them", type=_weight, metavar="RATE")
    recipe(g, "--schedule", "step drops at 8/12 and 11/12 of the run", choices=SCHEDULES)
    recipe(g, "--warmup", "steps of warm-up, at most a tenth of the run", type=_count, metavar="N")
    g.add_argument("--momentum", type=_weight, default=0.9, metavar="M", help="of SGD")
    recipe(g, "--weight-decay", "of the optimizer", type=_weight, metavar="W")
    recipe(g, "--clip-grad", "largest norm of the gradient; 0: no limit", type=_weight, metavar="NORM")
    g.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="of weights, order, flips, region sampling and drawn shapes"
    )
    g.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "none"),
        default="auto",
        help="precision of the convolutions; auto: bf16 where the processor has it",
    )
    g.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    g.add_argument("--threads", type=_count, default=0, metavar="N", help="CPU threads a process; 0: torch's choice")

    g = p.add_argument_group("output")
    g.add_argument("--output", metavar="DIR", help="run folder (default: runs/ and a name made of the settings)")
    g.add_argument(
        "--eval-every", type=_positive, default=1, metavar="N", help="epochs between evaluations; the last is always"
    )
    g.add_argument("--log-every", type=_positive, default=20, metavar="N", help="steps between lines of log.jsonl")
    return p


def parse(argv=None):
    """The flags with the recipe filled in, and checked against each other; exits with 2 on a wrong flag."""
    p = parser()
    args = p.parse_args(argv)
    for name, value in RECIPES[args.recipe or args.dataset].items():
        if not hasattr(args, name):
            setattr(args, name, value)
    if args.student is None and (args.teacher or args.teacher_weights or args.dataset != "shapes"):
        p.error("--student BACKBONE is missing: which detector is to be trained?")
    if args.teacher_weights and not args.teacher and args.student:
        p.error(f"--teacher-weights {args.teacher_weights} needs --teacher BACKBONE")
    if args.size[0] > args.size[1]:
        p.error(f"--size {args.size[0]} {args.size[1]}: the limit of the longer side is below the shorter side")
    named = [*DISTILLATION, *(f"no_{level}" for level in LEVELS)]
    given = [f"--{name.replace('_', '-')}" for name in named if getattr(args, name) != p.get_default(name)]
    if given and args.student and not args.teacher:
        p.error(f"{given[0]} needs --teacher BACKBONE: nothing is distilled without")
    for level in LEVELS:
        if getattr(args, f"no_{level}"):
            setattr(args, f"weight_{level}", 0.0)
    if args.teacher and not levels_of(args).weights():  # the plain student: no teacher is needed
        args.teacher = args.teacher_weights = None
    return args


def levels_of(args):
    """The distillation settings of the flags."""
    return Levels(
        args.weight_backbone, args.weight_cls, args.weight_reg, args.mask, args.sigma2, args.cls_gate, args.reg_gate
    )


def build_of(args, backbone, num_classes):
    """The arguments of build_detector that make the detector of the flags."""
    options = {name: getattr(args, name) for name in BUILD}
    frozen = args.backbone_weights != "none"
    return {
        "detector": args.detector,
        "backbone": backbone,
        "num_classes": num_classes,
        "backbone_weights": args.backbone_weights,
        "norm": "frozen" if frozen else "batch",
        "trainable_layers": 3 if frozen else 5,
        "min_size": args.size[0],
        "max_size": args.size[1],
        **options,
    }


def _words(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _number(kind, least, text):
    def convert(word):
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{word!r} is not {text}")
        return value

    return convert


_positive = _number(int, 1, "a whole number from 1")
_count = _number(int, 0, "a whole number from 0")
_weight = _number(float, 0, "a number from 0")
_above_0 = _number(float, 1e-9, "a number above 0")
