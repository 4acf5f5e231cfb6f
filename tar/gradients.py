"""How each level pulls at the student, beside the detector's own losses: sizes and directions of the gradients.

    python -m tar.gradients --weights runs/demo/tar/last.pth [--batches 8]

A term that is large and points elsewhere than the detection loss is paid for with accuracy. The sizes are those of the
weighted terms at a decay of 1, wherever in its run the checkpoint was written.
"""

from statistics import mean, stdev

import torch

from tar import UserError, fail
from tar.arguments import Parser, count, positive
from tar.data import load_dataset, make_loader, to_device, train_batches
from tar.distill import Step
from tar.machine import set_up
from tar.options import COCO_FILES
from tar.show import Trio, flags_of
from tar.tabulation import markdown

# of the detector's losses; the others place boxes
CLASS_LOSSES = ("loss_objectness", "loss_classifier", "classification")
GROUPS = {"backbone": "backbone.body.", "pyramid": "backbone.fpn.", "head": ("roi_heads.box_head.", "head.")}


def parser():
    p = Parser(prog="python -m tar.gradients", description=__doc__.split("\n")[0])
    text = "checkpoints of distilled students; a table for each"
    p.add_argument("--weights", nargs="+", required=True, metavar="FILE", help=text)
    text = "checkpoint of the teacher (default: the one of the student's settings)"
    p.add_argument("--teacher-weights", metavar="FILE", help=text)
    p.add_argument("--data-path", metavar="DIR", help="folder of the data (default: as in training)")
    p.add_argument("--batches", type=positive, default=8, metavar="N", help="of training images (default: 8)")
    p.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    p.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads; 0: torch's choice")
    return p


def main(argv=None):
    given = parser().parse_args(argv)
    try:
        machine = set_up(given.device, "none", given.threads)
        for path in given.weights:
            rows = [
                [*key, *map(spread, zip(*each, strict=True))] for key, each in measure(path, given, machine).items()
            ]
            machine.say(f"\n{path}\n")
            header = ["part", "level", "size / detection's", "cosine with detection's", "classes'", "boxes'"]
            machine.say(markdown(header, rows))
    except UserError as error:
        fail("tar.gradients", error)


def measure(path, given, machine):
    """Gradients of a checkpoint on some batches of its training images; its weights stay as they are.

    Returns:
        {(part of the student, level): a list, one a batch, of (size of the weighted term's gradient over that of the
        detection loss, cosine with the gradient of the detection loss, with that of its losses of classes, with that
        of its losses of boxes)}.
    """
    trio = Trio(path, machine, given.teacher_weights)
    if not trio.distilled or trio.teacher is None:
        raise UserError(f"{path}: a plain student; give the checkpoint of a distilled one")
    args = flags_of(trio.saved["settings"], data_path=given.data_path)
    where = {"years": args.voc_years, "split": args.split, "seed": args.seed, "keep_empty": args.keep_empty}
    where |= {"limit_train": args.limit_train, "limit_test": 1, "download": False}
    files = [getattr(args, name) for name in COCO_FILES]
    source, _ = load_dataset(args.dataset, data_path=args.data_path, files=files, **where)
    batches = train_batches(len(source), args.batch_size, args.seed, 0, wide=getattr(source, "wide", None))
    loader = make_loader(source, True, batches[: given.batches], args.seed)
    rows = {}
    for number, batch in enumerate(loader):
        torch.manual_seed(number)  # of the regions
        for key, row in compare(trio.step, trio.teacher, to_device(*batch, machine.device)).items():
            rows.setdefault(key, []).append(row)
    return rows


def compare(step: Step, teacher, batch):
    """measure()'s row of one batch: {(part, level): (size, cosine, cosine, cosine)}."""
    step.train()
    named = [(n.removeprefix("student."), p) for n, p in step.named_parameters() if n.startswith("student.")]
    named = [(n, p) for n, p in named if p.requires_grad]
    detection, distillation, _ = step(*batch, teacher)
    own = {
        "all": sum(detection.values()),
        "classes": sum(v for n, v in detection.items() if n in CLASS_LOSSES),
        "boxes": sum(v for n, v in detection.items() if n not in CLASS_LOSSES),
    }
    levels = {name: weight * distillation[name] for name, weight in step.levels.weights().items()}
    gradients = {}
    for name, loss in {**own, **levels}.items():
        each = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        gradients[name] = [torch.zeros_like(p) if g is None else g for g, (_, p) in zip(each, named, strict=True)]
    rows = {}
    for part, prefix in GROUPS.items():
        inside = [i for i, (n, _) in enumerate(named) if n.startswith(prefix)]
        if not inside:
            continue
        flat = {name: torch.cat([each[i].flatten() for i in inside]).double() for name, each in gradients.items()}
        for name in levels:
            if flat[name].any():
                size = (flat[name].norm() / flat["all"].norm()).item()
                cosines = (torch.cosine_similarity(flat[name], flat[of], dim=0).item() for of in own)
                rows[part, name.removeprefix("distill_")] = (size, *cosines)
    return rows


def spread(values):
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
