"""The flags of train.py, filled in from the data set's recipe and checked against each other."""

import argparse
from functools import cache, partial

from tar.data.datasets import DATASETS, SHAPES_IMAGES
from tar.detectors.backbones import BACKBONES
from tar.detectors.build import DETECTORS
from tar.method.backbone_level import BACKBONE_NORMS, MASKS
from tar.method.classification_level import CLS_GATES, SOFT_LABELS
from tar.method.decay import DECAYS
from tar.method.proposal_sharing import PROPOSALS
from tar.method.regression_level import REG_GATES
from tar.method.step import DistillationSettings
from tar.training.learning_rate import SCHEDULES
from tar.training.parser import Defaults, Parser, above_0, count, positive, up_to_1, weight
from tar.training.recipes import RECIPES

BUILD = ("fpn_channels", "head_channels", "anchor_scale", "rois", "roi_samples", "rpn_top_n")
LEVELS = ("backbone", "cls", "reg")
DISTILLATION = (*vars(DistillationSettings()), "decay", "decay_end", "inherit", "teacher_epochs")
ENDLESS = ("none", "step")  # decays that do not reach 0
COCO_FILES = ("train_json", "train_images", "val_json", "val_images")
TABLE_DATASETS = {"voc": "voc", "coco": "coco", "retinanet": "coco"}  # of the paper's tables; of the others: shapes
TABLES = ("shapes", "voc", "coco", "retinanet", "claim", "teachers", "masks", "decay", "gates", "proposals")


def parser():
    """The command line of train.py."""
    p = Parser(
        description="Train a detector, or distil one from a teacher. Without --student: the demonstration on drawn "
        "shapes (teacher, plain student, plain student of equal cost, distilled student) and its table.",
        formatter_class=Defaults,
    )
    for title, fill in GROUPS.items():
        fill(partial(add_flag, p.add_argument_group(title)))
    return p


def add_flag(group, flag, text, **options):
    """Adds a flag; the help of one that the recipes fill in names their values."""
    name = flag[2:].replace("-", "_")
    if name in RECIPES["voc"]:
        values = (f"{d}: {' '.join(map(str, v)) if isinstance(v := r[name], list) else v}" for d, r in RECIPES.items())
        text, options = f"{text} (default: {', '.join(values)})", {"default": argparse.SUPPRESS, **options}
    group.add_argument(flag, help=text, **options)


def data_flags(add):
    text = "shapes are drawn by the program (default: shapes; of --table voc, coco, retinanet: the paper's)"
    add("--dataset", text, choices=DATASETS)
    text = "folder with VOCdevkit/VOC2007, or JPEGImages, or annotations/instances_train2017.json"
    add("--data-path", text, default="data", metavar="DIR")
    add("--train-json", "coco: annotation file to train on, instead of --data-path's", metavar="FILE")
    add("--train-images", "coco: folder of images to train on, instead of --data-path's", metavar="DIR")
    add("--val-json", "coco: annotation file to test on, instead of --data-path's", metavar="FILE")
    add("--val-images", "coco: folder of images to test on, instead of --data-path's", metavar="DIR")
    add("--keep-empty", "coco: train on images without boxes too", action="store_true")
    add("--voc-years", "train on trainval, test on test", nargs="+", default=["2007"], metavar="YEAR")
    add("--download", "fetch VOC into --data-path first (torchvision's downloader)", action="store_true")
    text = "what to measure on; val: to tune (voc: train list against val list; shapes: other images; coco: none)"
    add("--split", text, choices=("test", "val"), default="test")
    text = "read every image of the data set, print what is in it and which cannot be used, and train nothing"
    add("--check-data", text, action="store_true")
    add("--size", "shorter side, and limit of the longer, pixels", nargs=2, type=positive, metavar=("MIN", "MAX"))
    text = f"training images an epoch; 0: all (shapes: {SHAPES_IMAGES['train']})"
    add("--limit-train", text, type=count, default=0, metavar="N")
    text = f"test images; 0: all (shapes: {SHAPES_IMAGES['test']})"
    add("--limit-test", text, type=count, default=0, metavar="N")
    add("--workers", "loader processes", type=count, metavar="N")


def model_flags(add):
    add("--student", "backbone of the detector to train", choices=BACKBONES)
    add("--teacher", "backbone of the teacher; none: train the student plainly", choices=BACKBONES)
    text = "checkpoint of the teacher; coco: torchvision's r50 trained on COCO; none: train it first, once"
    add("--teacher-weights", text, metavar="FILE")
    text = "epochs of a teacher that is trained first; 0: as many as the student's (in tables on shapes a quarter more)"
    add("--teacher-epochs", text, type=count, default=0, metavar="N")
    add("--student-weights", "checkpoint that the student starts from", metavar="FILE")
    text = "start the student's pyramid and heads from the teacher's where shapes match (not the paper's)"
    add("--inherit", text, action="store_true")
    add("--detector", "of teacher and student", choices=DETECTORS, default="faster-rcnn")
    add("--backbone-weights", "imagenet (frozen batch norm), none (trained batch norm) or FILE", metavar="WHICH")
    text = "trained batch norm over the images of all processes (GPUs); else each normalises its own"
    add("--sync-bn", text, action="store_true")
    add("--fpn-channels", "width of the pyramid", type=positive, metavar="N")
    add("--head-channels", "width of the box head", type=positive, metavar="N")
    text = "side of an anchor in strides of its level; RetinaNet: half of it"
    add("--anchor-scale", text, type=positive, metavar="N")
    add("--rois", "regions an image that the box head trains on", type=positive, metavar="N")
    add("--roi-samples", "RoIAlign's sampling points a side in each of 7 x 7 bins", type=positive, metavar="N")
    numbers = {"nargs": 2, "type": positive, "metavar": ("TRAIN", "TEST")}
    add("--rpn-top-n", "proposals kept in training and in evaluation", **numbers)


def distillation_flags(add):
    d = DistillationSettings()
    text = f"weight a of L_backbone (default: {d.weight_backbone}; with --backbone-norm cells that / --fpn-channels)"
    add("--weight-backbone", text, type=weight, default=argparse.SUPPRESS, metavar="A")
    add("--weight-cls", "weight b of L_cls", type=weight, default=d.weight_cls, metavar="B")
    add("--weight-reg", "weight g of L_reg", type=weight, default=d.weight_reg, metavar="G")
    for level in LEVELS:
        add(f"--no-{level}", f"leave the {level} level out", action="store_true")
    add("--mask", "where the backbone level imitates", choices=MASKS, default=d.mask)
    add("--sigma2", "width of the Gaussian mask", type=above_0, default=d.sigma2, metavar="S2")
    text = "what L_backbone is divided by: the teacher's energy under the mask, or the mask's cells (the paper's)"
    add("--backbone-norm", text, choices=BACKBONE_NORMS, default=d.backbone_norm)
    text = "soft labels: all positives, or where the teacher is better"
    add("--cls-gate", text, choices=CLS_GATES, default=d.cls_gate)
    text = "regions whose soft labels are imitated; all: background too, as Chen et al. 2017"
    add("--soft-labels", text, choices=SOFT_LABELS, default=d.soft_labels)
    add("--reg-gate", "what the teacher's box must beat", choices=REG_GATES, default=d.reg_gate)
    add("--proposals", "whose regions both models' heads run on", choices=PROPOSALS, default=d.proposals)
    text = "each model's head runs on its own proposals; those nearest to a ground-truth box are compared"
    add("--no-sharing", text, action="store_true")
    add("--decay", "of the distillation weight over the run", choices=DECAYS, default="linear")
    constant = {"action": "store_const", "const": "none", "dest": "decay", "default": argparse.SUPPRESS}
    add("--no-decay", "the same as --decay none", **constant)
    text = "part of the run after which the weight has reached 0 and nothing of the teacher is computed"
    add("--decay-end", text, type=up_to_1, metavar="PART")


def training_flags(add):
    text = "whose defaults to take: voc's (ImageNet weights) or shapes' (small, from scratch); default: the data set's"
    add("--recipe", text, choices=RECIPES)
    add("--epochs", "passes over the training images", type=positive, metavar="N")
    add("--batch-size", "images a process and step", type=positive, metavar="N")
    add("--optimizer", "sgd with momentum, or adamw", choices=("sgd", "adamw"))
    text = "learning rate per 16 images a step, scaled linearly with them; RetinaNet with sgd: half of it"
    add("--lr", text, type=weight, metavar="RATE")
    add("--schedule", "step drops at 8/12 and 11/12 of the run", choices=SCHEDULES)
    add("--warmup", "steps of warm-up, at most a tenth of the run", type=count, metavar="N")
    add("--momentum", "of SGD", type=weight, default=0.9, metavar="M")
    add("--weight-decay", "of the optimizer", type=weight, metavar="W")
    add("--clip-grad", "largest norm of the gradient; 0: no limit", type=weight, metavar="NORM")
    text = "steps in a row whose gradient is not finite, after which a run stops; none of them is applied"
    add("--max-bad-steps", text, type=positive, default=3, metavar="N")
    text = "of weights, order, flips, region sampling and drawn shapes"
    add("--seed", text, type=count, default=0, metavar="N")
    text = "a GPU gives the same bits every time, more slowly (a CPU does so anyway, with the same --threads)"
    add("--deterministic", text, action="store_true")
    text = "precision of the convolutions; auto: bf16 where the processor has it"
    add("--amp", text, choices=("auto", "bf16", "fp16", "none"), default="auto")
    text = "torch.compile both backbones: minutes for every new image size, and slower on a CPU; needs a C++ compiler"
    add("--compile", text, action="store_true")
    add("--device", "cpu, cuda; auto: cuda where there is one", default="auto", metavar="NAME")
    add("--threads", "CPU threads a process; 0: torch's choice", type=count, default=0, metavar="N")


def table_flags(add):
    add("--table", "run all rows of a table instead of one run, and print it", choices=TABLES)
    text = "runs a row, with --seed and the seeds after it; the table shows mean and standard deviation"
    add("--seeds", text, type=positive, default=1, metavar="N")


def output_flags(add):
    text = "run folder; of a table: the folder of its runs (default: runs/ and a name made of the settings; runs/)"
    add("--output", text, metavar="DIR")
    add("--eval-every", "epochs between evaluations; the last is always", type=positive, metavar="N")
    text = "steps between checkpoints; there is one after each epoch too"
    add("--save-every", text, type=positive, default=1000, metavar="N")
    add("--log-every", "steps between lines of log.jsonl", type=positive, default=20, metavar="N")


GROUPS = {
    "data": data_flags,
    "models": model_flags,
    "distillation": distillation_flags,
    "training": training_flags,
    "tables": table_flags,
    "output": output_flags,
}


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
    wrong = contradiction(args)
    if wrong:
        p.error(wrong)
    if args.teacher and not distillation_settings(args).weights():  # the plain student: no teacher is needed
        args.teacher, args.teacher_weights, args.inherit = None, None, False
    return args


def contradiction(args):
    """What is wrong with the flags taken together: a line, or None."""
    usual = {**vars(_parsed_nothing()), **RECIPES[args.recipe or args.dataset]}
    usual["weight_backbone"] = usual_backbone_weight(args)
    names = [*DISTILLATION, *(f"no_{level}" for level in LEVELS)]
    distils = [f"--{n.replace('_', '-')}" for n in names if getattr(args, n) != usual[n]]
    files = [f"--{name.replace('_', '-')}" for name in COCO_FILES if getattr(args, name)]
    heads, other_regions = args.weight_cls or args.weight_reg, args.no_sharing or args.proposals != "student"
    all_regions, low, high = args.soft_labels == "all", *args.size
    needs_student = args.teacher or args.teacher_weights or args.dataset != "shapes"
    for wrong, why in (
        (needs_student and not (args.student or args.table or args.check_data), "--student BACKBONE is missing"),
        (args.teacher_weights and args.student and not args.teacher, "--teacher-weights needs --teacher BACKBONE"),
        (args.teacher_weights and args.teacher_epochs, "--teacher-epochs: --teacher-weights is trained already"),
        (args.teacher_weights == "coco" and args.teacher != "r50", "--teacher-weights coco is an r50: --teacher r50"),
        (low > high, f"--size {low} {high}: the limit of the longer side is below the shorter side"),
        (
            distils and args.student and not (args.teacher or args.table),
            f"{''.join(distils[:1])} needs --teacher BACKBONE",
        ),
        (args.decay in ENDLESS and args.decay_end < 1, f"--decay-end: --decay {args.decay} never reaches 0"),
        (
            other_regions and args.detector == "retinanet",
            "--proposals and --no-sharing: RetinaNet's anchors are shared",
        ),
        (other_regions and not heads, "--proposals and --no-sharing are of the cls and reg levels, which are off"),
        (args.no_sharing and args.proposals != "student", "--no-sharing contradicts --proposals"),
        (args.no_sharing and all_regions, "--no-sharing compares positive regions only: not with --soft-labels all"),
        (all_regions and args.cls_gate == "better", "--cls-gate better: a background region has no true class"),
        (all_regions and not args.weight_cls, "--soft-labels all is of the cls level, which is off"),
        (args.sync_bn and args.backbone_weights != "none", "--sync-bn: batch norm is frozen with --backbone-weights"),
        (files and args.dataset != "coco", f"{''.join(files[:1])} needs --dataset coco"),
        (args.keep_empty and args.dataset != "coco", "--keep-empty needs --dataset coco"),
        (args.voc_years != ["2007"] and args.dataset != "voc", "--voc-years needs --dataset voc"),
        (args.download and args.dataset != "voc", "--download fetches VOC only"),
        (args.dataset == "coco" and args.split == "val", "--split val: COCO has one split to test on; cut your own"),
        (args.check_data and args.dataset == "shapes", "--check-data reads files, and shapes are drawn"),
        (args.optimizer == "adamw" and args.momentum != usual["momentum"], "--momentum is of --optimizer sgd"),
        (args.seeds > 1 and not args.table, "--seeds is of --table; one run has one --seed"),
    ):
        if wrong:
            return why
    return None


@cache
def _parsed_nothing():
    return parser().parse_args([])


def usual_backbone_weight(args):
    """The weight of L_backbone where no flag gives one: the paper's form sums over channels."""
    return DistillationSettings().weight_backbone / (args.fpn_channels if args.backbone_norm == "cells" else 1)


def distillation_settings(args):
    """The distillation settings of the flags."""
    return DistillationSettings(**{name: getattr(args, name) for name in vars(DistillationSettings())})


def build_of(args, backbone, num_classes):
    """The arguments of build_detector that make the detector of the flags."""
    frozen = args.backbone_weights != "none"
    return {
        **{"detector": args.detector, "backbone": backbone, "num_classes": num_classes},
        **{"backbone_weights": args.backbone_weights, "norm": "frozen" if frozen else "batch"},
        **{"trainable_layers": 3 if frozen else 5, "min_size": args.size[0], "max_size": args.size[1]},
        **{name: getattr(args, name) for name in BUILD},
    }
