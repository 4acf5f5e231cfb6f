"""The flags of train.py, filled in from the data set's recipe and checked against each other."""

from argparse import SUPPRESS, ArgumentTypeError, Namespace
from functools import partial

from tar.data.datasets import DATASETS, SHAPES_IMAGES
from tar.data.image_files import EXIF
from tar.detectors.backbones import BACKBONES
from tar.detectors.build import DETECTORS, PYRAMID_NORMS
from tar.method.backbone_level import BACKBONE_NORMS, MASKS
from tar.method.classification_level import CLS_GATES, SOFT_LABELS
from tar.method.decay import DECAYS
from tar.method.proposal_sharing import PROPOSALS
from tar.method.regression_level import REG_GATES
from tar.method.step import DistillationSettings
from tar.training.optimizer import SCHEDULES
from tar.training.parser import Defaults, Parser, above_0, count, device_flags, positive, up_to_1, weight
from tar.training.recipes import RECIPES

BUILD = ("backbone_weights", "trainable_layers", "fpn_channels", "pyramid_norm", "head_channels", "anchor_scale")
BUILD += ("rois", "roi_samples", "rpn_top_n")
LEVELS = ("backbone", "cls", "reg")
DISTILLATION = (*vars(DistillationSettings()), "decay", "decay_end", "teacher_epochs")
COCO_FILES = ("train_json", "train_images", "val_json", "val_images")
ONLY_OF = {"voc": ("voc_years", "download"), "coco": (*COCO_FILES, "keep_empty")}  # flags of one data set
TABLE_DATASETS = {"voc": "voc", "coco": "coco", "retinanet": "coco"}  # of the paper's tables; of the others: shapes
TABLES = ("shapes", "voc", "coco", "retinanet", "claim", "teachers", "masks", "decay", "gates", "proposals")


def parser():
    """The command line of train.py."""
    p = Parser(description="Train a detector. Without --student: the demonstration.", formatter_class=Defaults)
    for fill in (data_flags, model_flags, distillation_flags, training_flags, output_flags):
        fill(partial(add_flag, p.add_argument_group(fill.__name__.removesuffix("_flags"))))
    device_flags(p.add_argument_group("device"))
    return p


def add_flag(group, flag, text, **options):
    """Adds a flag; the help of one that the recipes fill in names their values."""
    name = flag[2:].replace("-", "_")
    if name in RECIPES["voc"]:
        values = (f"{d}: {' '.join(map(str, v)) if isinstance(v := r[name], list) else v}" for d, r in RECIPES.items())
        text, options = f"{text} (default: {', '.join(values)})", {"default": SUPPRESS, **options}
    group.add_argument(flag, help=text, **options)


def data_flags(add):
    add("--dataset", "shapes are drawn by the program (default: shapes; of a table: the paper's)", choices=DATASETS)
    add("--data-path", "folder with VOCdevkit/, JPEGImages/ or annotations/", default="data", metavar="DIR")
    for part, use in (("train", "train"), ("val", "test")):
        add(f"--{part}-json", f"coco: annotation file to {use} on, instead of --data-path's", metavar="FILE")
        add(f"--{part}-images", f"coco: images to {use} on (default: beside --{part}-json)", metavar="DIR")
    add("--exif", "turn images as EXIF says; auto: if their annotations fit", choices=EXIF, default="auto")
    add("--keep-empty", "coco: train on images without boxes too", action="store_true")
    add("--voc-years", "train on trainval, test on test", nargs="+", default=["2007"], metavar="YEAR")
    add("--download", "fetch VOC into --data-path first (torchvision's downloader)", action="store_true")
    add("--split", "images to measure on; val: to tune (coco has none)", choices=("test", "val"), default="test")
    add("--check-data", "read every image, print what is there and what cannot be used", action="store_true")
    add("--size", "shorter side, and limit of the longer, pixels", nargs=2, type=positive, metavar=("MIN", "MAX"))
    for part, images in SHAPES_IMAGES.items():
        add(f"--limit-{part}", f"{part} images; 0: all (shapes: {images})", type=count, default=0, metavar="N")
    add("--workers", "loader processes", type=count, metavar="N")


def model_flags(add):
    names = f"{', '.join(BACKBONES)} or timm/NAME"
    add("--student", f"backbone of the detector to train: {names}", type=backbone, metavar="BACKBONE")
    add("--teacher", "its backbone; without it the student is trained plainly", type=backbone, metavar="BACKBONE")
    add("--teacher-weights", "its checkpoint (default: trained first); coco: torchvision's r50", metavar="FILE")
    add("--teacher-epochs", "of a teacher that is trained first; 0: the student's", type=count, default=0, metavar="N")
    add("--student-weights", "checkpoint that the student starts from", metavar="FILE")
    add("--detector", "of teacher and student", choices=DETECTORS, default="faster-rcnn")
    text = "imagenet, none (from scratch), FILE (a classifier's state dict), DIR with r50.pth or timm's NAME.pth"
    add("--backbone-weights", text, metavar="WHICH")
    text = "stages of five that train, from the last (default: 3; from scratch: 5)"
    add("--trainable-layers", text, type=int, choices=range(6), metavar="N")
    add("--pyramid-norm", "of pyramid and RetinaNet's head (default: none; from scratch: batch)", choices=PYRAMID_NORMS)
    add("--sync-bn", "trained batch norm over the images of all GPUs, not of each", action="store_true")
    add("--fpn-channels", "width of the pyramid", type=positive, metavar="N")
    add("--head-channels", "width of the box head", type=positive, metavar="N")
    add("--anchor-scale", "anchor's side in strides of its level; RetinaNet: half", type=positive, metavar="N")
    add("--rois", "regions an image that the box head trains on", type=positive, metavar="N")
    add("--roi-samples", "RoIAlign's sampling points a side in each of 7 x 7 bins", type=positive, metavar="N")
    add("--rpn-top-n", "proposals kept", nargs=2, type=positive, metavar=("TRAIN", "TEST"))


def distillation_flags(add):
    d = DistillationSettings()
    text = f"weight a of L_backbone (default: {d.weight_backbone}; with --backbone-norm cells that / --fpn-channels)"
    add("--weight-backbone", text, type=weight, metavar="A")
    add("--weight-cls", "weight b of L_cls", type=weight, default=d.weight_cls, metavar="B")
    add("--weight-reg", "weight g of L_reg", type=weight, default=d.weight_reg, metavar="G")
    for level in LEVELS:
        add(f"--no-{level}", f"leave the {level} level out", action="store_true")
    add("--mask", "where the backbone level imitates", choices=MASKS, default=d.mask)
    add("--sigma2", "width of the Gaussian mask", type=above_0, default=d.sigma2, metavar="S2")
    text = "what L_backbone is divided by: the teacher's energy under the mask, or the mask's cells (the paper's)"
    add("--backbone-norm", text, choices=BACKBONE_NORMS, default=d.backbone_norm)
    add("--cls-gate", "soft labels of all positives, or where teacher is better", choices=CLS_GATES, default=d.cls_gate)
    add("--soft-labels", "of these regions; all: as Chen et al. 2017", choices=SOFT_LABELS, default=d.soft_labels)
    add("--reg-gate", "what the teacher's box must beat", choices=REG_GATES, default=d.reg_gate)
    add("--proposals", "whose regions both models' heads run on", choices=PROPOSALS, default=d.proposals)
    add("--no-sharing", "compare each model's own proposals, those nearest to a box", action="store_true")
    add("--decay", "of the distillation weight over the run", choices=DECAYS, default="linear")
    add("--no-decay", "as --decay none", action="store_const", const="none", dest="decay", default=SUPPRESS)
    add("--decay-end", "part of the run after which nothing of the teacher is computed", type=up_to_1, metavar="PART")


def training_flags(add):
    add("--recipe", "whose defaults to take (default: the data set's); shapes: small, from scratch", choices=RECIPES)
    add("--epochs", "passes over the training images", type=positive, metavar="N")
    add("--batch-size", "images a process and step", type=positive, metavar="N")
    add("--optimizer", "sgd with momentum, or adamw", choices=("sgd", "adamw"))
    add("--lr", "learning rate per 16 images a step; RetinaNet with sgd: half", type=weight, metavar="RATE")
    add("--schedule", "step drops at 8/12 and 11/12 of the run", choices=SCHEDULES)
    add("--warmup", "steps of warm-up, at most a tenth of the run", type=count, metavar="N")
    add("--momentum", "of SGD", type=weight, default=0.9, metavar="M")
    add("--weight-decay", "of the optimizer", type=weight, metavar="W")
    add("--clip-grad", "largest norm of the gradient; 0: no limit", type=weight, metavar="NORM")
    add("--max-bad-steps", "steps in a row, not finite, that end a run", type=positive, default=3, metavar="N")
    add("--seed", "of weights, order, flips, regions and drawn shapes", type=count, default=0, metavar="N")
    add("--deterministic", "a GPU too gives the same bits every time, more slowly", action="store_true")


def output_flags(add):
    add("--table", "run all rows of a table instead of one run, and print it", choices=TABLES)
    add("--seeds", "runs a row of a table: --seed and the seeds after it", type=positive, default=1, metavar="N")
    add("--output", "folder of the run (default: in runs/, named by the settings), or of a table's", metavar="DIR")
    add("--eval-every", "epochs between evaluations; the last is always", type=positive, metavar="N")
    add("--save-every", "steps between checkpoints within an epoch", type=positive, default=1000, metavar="N")
    add("--log-every", "steps between lines of log.jsonl", type=positive, default=20, metavar="N")


def parse(argv=None):
    """The flags with the recipe filled in, and checked against each other; exits with 2 on a wrong flag."""
    p = parser()
    args = p.parse_args(argv)
    args.dataset = args.dataset or TABLE_DATASETS.get(args.table, "shapes")
    args.detector = "retinanet" if args.table == "retinanet" else args.detector
    recipe = dict(RECIPES[args.recipe or args.dataset])
    if args.detector == "retinanet":  # its pyramid starts at twice the stride; torchvision's own rate is half as high
        recipe["anchor_scale"] //= 2
        recipe["lr"] /= 2 if getattr(args, "optimizer", recipe["optimizer"]) == "sgd" else 1
    if args.decay in ("none", "step"):  # which do not reach 0
        recipe["decay_end"] = 1.0
    args = Namespace(**{**recipe, **vars(args)})
    layers, norm = (5, "batch") if args.backbone_weights == "none" else (3, "none")
    usual = {"trainable_layers": layers, "pyramid_norm": norm, "weight_backbone": usual_backbone_weight(args)}
    missing = {name: value for name, value in usual.items() if getattr(args, name) is None}
    off = {f"weight_{level}": 0.0 for level in LEVELS if getattr(args, f"no_{level}")}
    args = Namespace(**{**vars(args), **missing, **off})
    if wrong := contradiction(args):
        p.error(wrong)
    if args.teacher and not distillation_settings(args).weights():  # the plain student: no teacher is needed
        args.teacher, args.teacher_weights = None, None
    return args


def contradiction(args):
    """Which flags, taken together, would train something else than they say: a line, or None."""
    usual = {**vars(parser().parse_args([])), **RECIPES[args.recipe or args.dataset]}
    usual["weight_backbone"] = usual_backbone_weight(args)

    def given(names):
        return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != usual[name]]

    plain = args.student and not (args.teacher or args.table)
    distilling = given((*(f"no_{level}" for level in LEVELS), *DISTILLATION))
    distils_nothing = (args.table or not args.student) and not distillation_settings(args).weights()
    needs_student = args.teacher or args.teacher_weights or args.dataset != "shapes"
    other_regions = args.detector == "retinanet" and (args.no_sharing or args.proposals != "student")
    all_regions, (low, high) = args.soft_labels == "all", args.size
    rules = (
        (needs_student and not (args.student or args.table or args.check_data), "--student BACKBONE is missing"),
        (args.teacher_weights and args.student and not args.teacher, "--teacher-weights needs --teacher BACKBONE"),
        (args.teacher_weights and args.teacher_epochs, "--teacher-epochs: --teacher-weights is trained already"),
        *((plain, f"{flag} needs --teacher BACKBONE") for flag in distilling),
        *((flag, f"{flag} needs --dataset {d}") for d in ONLY_OF if d != args.dataset for flag in given(ONLY_OF[d])),
        (low > high, f"--size {low} {high}: the limit of the longer side is below the shorter side"),
        (args.dataset == "coco" and args.split == "val", "--split val: COCO has one split to test on; cut your own"),
        (args.check_data and args.dataset == "shapes", "--check-data reads files, and shapes are drawn"),
        (distils_nothing, "no level is left: nothing to distil"),
        (args.seeds > 1 and not args.table, "--seeds is of --table; one run has one --seed"),
        (other_regions, "--proposals and --no-sharing: RetinaNet's anchors are shared"),
        (args.no_sharing and args.proposals != "student", "--no-sharing contradicts --proposals"),
        (args.no_sharing and all_regions, "--no-sharing compares positive regions only: not with --soft-labels all"),
        (all_regions and args.cls_gate == "better", "--cls-gate better: a background region has no true class"),
    )
    return next((why for wrong, why in rules if wrong), None)


def usual_backbone_weight(args):
    """The weight of L_backbone where no flag gives one: the paper's form sums over channels."""
    return DistillationSettings().weight_backbone / (args.fpn_channels if args.backbone_norm == "cells" else 1)


def distillation_settings(args):
    """The distillation settings of the flags."""
    return DistillationSettings(**{name: getattr(args, name) for name in vars(DistillationSettings())})


def build_of(args, backbone, num_classes):
    """The arguments of build_detector that make the detector of the flags."""
    norm, (low, high) = "batch" if args.backbone_weights == "none" else "frozen", args.size
    build = {"detector": args.detector, "backbone": backbone, "num_classes": num_classes, "norm": norm}
    return {**build, "min_size": low, "max_size": high, **{name: getattr(args, name) for name in BUILD}}


def backbone(word):
    if word not in BACKBONES and not word.startswith("timm/"):
        raise ArgumentTypeError(f"{word!r} is none of {', '.join(BACKBONES)} and timm/NAME")
    return word
