"""The flags, and the recipe of each data set that fills in what no flag says."""

import argparse
from functools import cache

from tar.arguments import Defaults, Parser, above_0, count, positive, up_to_1, weight
from tar.data import DATASETS, SHAPES_IMAGES
from tar.distill import ANSWERS, PROPOSALS, SOFT_LABELS, Levels
from tar.losses import BACKBONE_NORMS, CLS_GATES, REG_GATES
from tar.masks import MASKS
from tar.models import BACKBONES, DETECTORS
from tar.recipes import RECIPES
from tar.schedule import DECAYS, SCHEDULES

BUILD = ("fpn_channels", "head_channels", "anchor_scale", "rois", "roi_samples", "rpn_top_n")
LEVELS = ("backbone", "cls", "reg")
DISTILLATION = (
    *(
        "weight_backbone",
        "weight_cls",
        "weight_reg",
        "mask",
        "sigma2",
        "backbone_norm",
        "cls_gate",
        "reg_gate",
        "decay",
        "decay_end",
    ),
    *("proposals", "no_sharing", "soft_labels", "background_weight", "answers", "inherit", "teacher_epochs"),
)
ENDLESS = ("none", "step")  # decays that do not reach 0
COCO_FILES = ("train_json", "train_images", "val_json", "val_images")
TABLE_DATASETS = {"voc": "voc", "coco": "coco", "retinanet": "coco"}  # of the paper's tables; of the others: shapes
TABLES = (
    *("shapes", "voc", "coco", "retinanet", "claim", "teachers"),
    *("masks", "sigma2", "decay", "gates", "proposals", "answers"),
)


def parser():
    """The command line of train.py."""
    p = Parser(
        description="Train a detector, or distil one from a teacher. Without --student: the demonstration on drawn "
        "shapes (teacher, plain student, plain student of equal cost, distilled student) and its table.",
        formatter_class=Defaults,
    )

    def recipe(group, flag, text, **kwargs):
        values = ", ".join(f"{d}: {_words(r[flag[2:].replace('-', '_')])}" for d, r in RECIPES.items())
        group.add_argument(flag, default=argparse.SUPPRESS, help=f"{text} (default: {values})", **kwargs)

    g = p.add_argument_group("data")
    text = "shapes are drawn by the program (default: shapes; of --table voc, coco, retinanet: the paper's)"
    g.add_argument("--dataset", choices=DATASETS, help=text)
    g.add_argument(
        "--data-path",
        default="data",
        metavar="DIR",
        help="folder with VOCdevkit/VOC2007, or JPEGImages, or annotations/instances_train2017.json",
    )
    for part, kind in (("train", "JSON"), ("train", "images"), ("val", "JSON"), ("val", "images")):
        what = "annotation file" if kind == "JSON" else "folder of images"
        text = f"coco: {what} to {'train on' if part == 'train' else 'test on'}, instead of --data-path's"
        g.add_argument(f"--{part}-{kind.lower()}", metavar="FILE" if kind == "JSON" else "DIR", help=text)
    g.add_argument("--keep-empty", action="store_true", help="coco: train on images without boxes too")
    g.add_argument("--voc-years", nargs="+", default=["2007"], metavar="YEAR", help="train on trainval, test on test")
    g.add_argument(
        "--download", action="store_true", help="fetch VOC into --data-path first (torchvision's downloader)"
    )
    text = "what to measure on; val: to tune (voc: train list against val list; shapes: other images; coco: none)"
    g.add_argument("--split", choices=("test", "val"), default="test", help=text)
    text = "read every image of the data set, print what is in it and which cannot be used, and train nothing"
    g.add_argument("--check-data", action="store_true", help=text)
    recipe(g, "--size", "shorter side, and limit of the longer, pixels", nargs=2, type=positive, metavar=("MIN", "MAX"))
    g.add_argument(
        "--limit-train",
        type=count,
        default=0,
        metavar="N",
        help=f"training images an epoch; 0: all (shapes: {SHAPES_IMAGES['train']})",
    )
    g.add_argument(
        "--limit-test",
        type=count,
        default=0,
        metavar="N",
        help=f"test images; 0: all (shapes: {SHAPES_IMAGES['test']})",
    )
    recipe(g, "--workers", "loader processes", type=count, metavar="N")

    g = p.add_argument_group("models")
    g.add_argument("--student", choices=BACKBONES, help="backbone of the detector to train")
    g.add_argument("--teacher", choices=BACKBONES, help="backbone of the teacher; none: train the student plainly")
    text = "checkpoint of the teacher; coco: torchvision's r50 trained on COCO; none: train it first, once"
    g.add_argument("--teacher-weights", metavar="FILE", help=text)
    text = "epochs of a teacher that is trained first; 0: as many as the student's (in tables on shapes a quarter more)"
    g.add_argument("--teacher-epochs", type=count, default=0, metavar="N", help=text)
    g.add_argument("--student-weights", metavar="FILE", help="checkpoint that the student starts from")
    text = "start the student's pyramid and heads from the teacher's where shapes match (not the paper's)"
    g.add_argument("--inherit", action="store_true", help=text)
    g.add_argument("--detector", choices=DETECTORS, default="faster-rcnn", help="of teacher and student")
    recipe(g, "--backbone-weights", "imagenet (frozen batch norm), none (trained batch norm) or FILE", metavar="WHICH")
    text = "trained batch norm over the images of all processes (GPUs); else each normalises its own"
    g.add_argument("--sync-bn", action="store_true", help=text)
    recipe(g, "--fpn-channels", "width of the pyramid", type=positive, metavar="N")
    recipe(g, "--head-channels", "width of the box head", type=positive, metavar="N")
    text = "side of an anchor in strides of its level; RetinaNet: half of it"
    recipe(g, "--anchor-scale", text, type=positive, metavar="N")
    recipe(g, "--rois", "regions an image that the box head trains on", type=positive, metavar="N")
    recipe(g, "--roi-samples", "RoIAlign's sampling points a side in each of 7 x 7 bins", type=positive, metavar="N")
    recipe(
        g,
        "--rpn-top-n",
        "proposals kept in training and in evaluation",
        nargs=2,
        type=positive,
        metavar=("TRAIN", "TEST"),
    )

    d = Levels()
    g = p.add_argument_group("distillation")
    text = f"weight a of L_backbone (default: {d.backbone}; with --backbone-norm cells {d.backbone} / --fpn-channels)"
    g.add_argument("--weight-backbone", type=weight, default=argparse.SUPPRESS, metavar="A", help=text)
    g.add_argument("--weight-cls", type=weight, default=d.cls, metavar="B", help="weight b of L_cls")
    g.add_argument("--weight-reg", type=weight, default=d.reg, metavar="G", help="weight g of L_reg")
    for level in LEVELS:
        g.add_argument(f"--no-{level}", action="store_true", help=f"leave the {level} level out")
    g.add_argument("--mask", choices=MASKS, default=d.mask, help="where the backbone level imitates")
    text = "what L_backbone is divided by: the teacher's energy under the mask, or the mask's cells (the paper's)"
    g.add_argument("--backbone-norm", choices=BACKBONE_NORMS, default=d.backbone_norm, help=text)
    g.add_argument("--sigma2", type=above_0, default=d.sigma2, metavar="S2", help="width of the Gaussian mask")
    g.add_argument(
        "--cls-gate",
        choices=CLS_GATES,
        default=d.cls_gate,
        help="soft labels: all positives, or where the teacher is better",
    )
    g.add_argument("--reg-gate", choices=REG_GATES, default=d.reg_gate, help="what the teacher's box must beat")
    g.add_argument("--proposals", choices=PROPOSALS, default=d.proposals, help="whose regions both models answer for")
    text = "each model answers for its own proposals; those nearest to a ground-truth box are compared"
    g.add_argument("--no-sharing", action="store_true", help=text)
    text = "regions whose classes are imitated; all: background too, as Chen et al. 2017"
    g.add_argument("--soft-labels", choices=SOFT_LABELS, default=d.soft_labels, help=text)
    text = "weight of a background region among --soft-labels all"
    g.add_argument("--background-weight", type=weight, default=d.background_weight, metavar="W", help=text)
    text = (
        "whose classes and boxes the heads' levels imitate; controls, not the paper's: truth: the ground truth's; "
        "smoothed: its classes, on average as sure as the teacher is"
    )
    g.add_argument("--answers", choices=ANSWERS, default=d.answers, help=text)
    g.add_argument("--decay", choices=DECAYS, default="linear", help="of the distillation weight over the run")
    g.add_argument(
        "--no-decay",
        action="store_const",
        const="none",
        dest="decay",
        default=argparse.SUPPRESS,
        help="the same as --decay none",
    )

    text = "part of the run after which the decay has reached 0 and the teacher is no longer asked"
    recipe(g, "--decay-end", text, type=up_to_1, metavar="PART")

    g = p.add_argument_group("training")
    text = (
        "whose defaults to take: voc's (ImageNet weights) or shapes' (small and from scratch); default: the data set's"
    )
    g.add_argument("--recipe", choices=RECIPES, help=text)
    recipe(g, "--epochs", "passes over the training images", type=positive, metavar="N")
    recipe(g, "--batch-size", "images a process and step", type=positive, metavar="N")
    recipe(g, "--optimizer", "sgd with momentum, or adamw", choices=("sgd", "adamw"))
    text = "learning rate per 16 images a step, scaled linearly with them; RetinaNet with sgd: half of it"
    recipe(g, "--lr", text, type=weight, metavar="RATE")
    recipe(g, "--schedule", "step drops at 8/12 and 11/12 of the run", choices=SCHEDULES)
    recipe(g, "--warmup", "steps of warm-up, at most a tenth of the run", type=count, metavar="N")
    g.add_argument("--momentum", type=weight, default=0.9, metavar="M", help="of SGD")
    recipe(g, "--weight-decay", "of the optimizer", type=weight, metavar="W")
    recipe(g, "--clip-grad", "largest norm of the gradient; 0: no limit", type=weight, metavar="NORM")
    text = "steps in a row whose gradient is not finite, after which a run stops; none of them is applied"
    g.add_argument("--max-bad-steps", type=positive, default=3, metavar="N", help=text)
    g.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of weights, order, flips, region sampling and drawn shapes"
    )
    text = "a GPU gives the same bits every time, more slowly (a CPU does so anyway, with the same --threads)"
    g.add_argument("--deterministic", action="store_true", help=text)
    g.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "none"),
        default="auto",
        help="precision of the convolutions; auto: bf16 where the processor has it",
    )
    text = "torch.compile both backbones: minutes for every new image size, and slower on a CPU; needs a C++ compiler"
    g.add_argument("--compile", action="store_true", help=text)
    g.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    g.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads a process; 0: torch's choice")

    g = p.add_argument_group("tables")
    g.add_argument("--table", choices=TABLES, help="run all rows of a table instead of one run, and print it")
    text = "runs a row, with --seed and the seeds after it; the table shows mean and standard deviation"
    g.add_argument("--seeds", type=positive, default=1, metavar="N", help=text)

    g = p.add_argument_group("output")
    text = "run folder; of a table: the folder of its runs (default: runs/ and a name made of the settings; runs/)"
    g.add_argument("--output", metavar="DIR", help=text)
    recipe(g, "--eval-every", "epochs between evaluations; the last is always", type=positive, metavar="N")
    text = "steps between checkpoints; there is one after each epoch too"
    g.add_argument("--save-every", type=positive, default=1000, metavar="N", help=text)
    g.add_argument("--log-every", type=positive, default=20, metavar="N", help="steps between lines of log.jsonl")
    return p


def parse(argv=None):
    """The flags with the recipe filled in, and checked against each other; exits with 2 on a wrong flag."""
    p = parser()
    args = p.parse_args(argv)
    args.dataset = args.dataset or TABLE_DATASETS.get(args.table, "shapes")
    if args.table == "retinanet":
        args.detector = "retinanet"
    recipe = dict(RECIPES[args.recipe or args.dataset])
    if args.detector == "retinanet":  # its pyramid starts at twice the stride; torchvision's own rate is half as high
        recipe["anchor_scale"] //= 2
        recipe["lr"] /= 2 if getattr(args, "optimizer", recipe["optimizer"]) == "sgd" else 1
    if args.decay in ENDLESS:
        recipe["decay_end"] = 1.0
    for name, value in recipe.items():
        if not hasattr(args, name):
            setattr(args, name, value)
    if not hasattr(args, "weight_backbone"):
        args.weight_backbone = usual_backbone_weight(args)
    for level in LEVELS:
        if getattr(args, f"no_{level}"):
            setattr(args, f"weight_{level}", 0.0)
    wrong = complaint(args)
    if wrong:
        p.error(wrong)
    if args.teacher and not levels_of(args).weights():  # the plain student: no teacher is needed
        args.teacher, args.teacher_weights, args.inherit = None, None, False
    return args


def complaint(args):
    """What is wrong with the flags taken together: a line, or None."""
    default = Levels()
    named = [*DISTILLATION, *(f"no_{level}" for level in LEVELS)]
    usual = {**vars(_parsed_nothing()), **RECIPES[args.recipe or args.dataset]}
    usual["weight_backbone"] = usual_backbone_weight(args)
    given = [f"--{n.replace('_', '-')}" for n in named if getattr(args, n) != usual[n]]
    retinanet, all_regions = args.detector == "retinanet", args.soft_labels == "all"
    own_proposals = args.no_sharing or args.proposals != "student"
    anchors = "RetinaNet's anchors are the same for both models"
    files = [f"--{name.replace('_', '-')}" for name in COCO_FILES if getattr(args, name)]
    for bad, why in (
        (
            not (args.student or args.table or args.check_data)
            and (args.teacher or args.teacher_weights or args.dataset != "shapes"),
            "--student BACKBONE is missing: which detector is to be trained?",
        ),
        (
            args.teacher_weights and not args.teacher and args.student,
            f"--teacher-weights {args.teacher_weights} needs --teacher BACKBONE",
        ),
        (
            args.teacher_weights and args.teacher_epochs,
            "--teacher-epochs: the teacher of --teacher-weights is trained already",
        ),
        (
            args.size[0] > args.size[1],
            f"--size {args.size[0]} {args.size[1]}: the limit of the longer side is below the shorter side",
        ),
        (
            given and args.student and not (args.teacher or args.table),
            f"{given and given[0]} needs --teacher BACKBONE: nothing is distilled without",
        ),
        (
            args.decay in ENDLESS and args.decay_end < 1,
            f"--decay-end {args.decay_end}: --decay {args.decay} never reaches 0",
        ),
        (retinanet and args.proposals != "student", f"--proposals {args.proposals}: {anchors}; there are no proposals"),
        (retinanet and args.no_sharing, f"--no-sharing: {anchors}; there is nothing else to answer for"),
        (
            args.sync_bn and args.backbone_weights != "none",
            "--sync-bn: batch norm is frozen with --backbone-weights; there is nothing to share between processes",
        ),
        (args.no_sharing and args.proposals != "student", "--no-sharing contradicts --proposals"),
        (args.no_sharing and all_regions, "--no-sharing compares positive regions only: not with --soft-labels all"),
        (
            own_proposals and not (args.weight_cls or args.weight_reg),
            "--proposals and --no-sharing say what the heads' levels compare, and both are off",
        ),
        (
            args.answers == "truth" and not (args.weight_cls or args.weight_reg),
            "--answers truth is of the heads' levels, and both are off",
        ),
        (
            args.answers == "truth" and (own_proposals or args.inherit),
            "--answers truth is a control without the teacher: not with --proposals, --no-sharing or --inherit",
        ),
        (
            args.answers == "smoothed" and not (args.weight_cls and not args.weight_reg and not all_regions),
            "--answers smoothed is of the cls level's positive regions: give --no-reg, no --no-cls, no --soft-labels",
        ),
        (all_regions and args.cls_gate == "better", "--cls-gate better: a background region has no true class"),
        (all_regions and not args.weight_cls, "--soft-labels all is of the cls level, which is off"),
        (
            args.background_weight != default.background_weight and not all_regions,
            "--background-weight needs --soft-labels all",
        ),
        (files and args.dataset != "coco", f"{files and files[0]} needs --dataset coco"),
        (args.keep_empty and args.dataset != "coco", "--keep-empty needs --dataset coco"),
        (args.voc_years != ["2007"] and args.dataset != "voc", "--voc-years needs --dataset voc"),
        (args.dataset == "coco" and args.split == "val", "--split val: COCO has one split to test on; cut your own"),
        (args.check_data and args.dataset == "shapes", "--check-data reads files, and shapes are drawn"),
        (args.download and args.dataset != "voc", "--download fetches VOC only"),
        (
            args.teacher_weights == "coco" and args.teacher != "r50",
            f"--teacher-weights coco: torchvision's COCO detectors are r50, not {args.teacher}",
        ),
        (args.optimizer == "adamw" and args.momentum != usual["momentum"], "--momentum is of --optimizer sgd"),
        (args.seeds > 1 and not args.table, "--seeds is of --table; one run has one --seed"),
    ):
        if bad:
            return why
    return None


@cache
def _parsed_nothing():
    return parser().parse_args([])


def usual_backbone_weight(args):
    """The weight of L_backbone where no flag gives one: the paper's form sums over channels."""
    return Levels().backbone / (args.fpn_channels if args.backbone_norm == "cells" else 1)


def levels_of(args):
    """The distillation settings of the flags."""
    names = (
        "mask",
        "sigma2",
        "backbone_norm",
        "cls_gate",
        "reg_gate",
        "proposals",
        "soft_labels",
        "background_weight",
        "answers",
    )
    weights = {level: getattr(args, f"weight_{level}") for level in LEVELS}
    return Levels(**weights, sharing=not args.no_sharing, **{name: getattr(args, name) for name in names})


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
