"""Looks at what train.py has trained: figures, pictures, comparisons, a report; detections on any image; an export.

python eval.py --weights runs/demo/tar/last.pth         README.md, "Look at the results", has more commands
"""

import os
import signal
import sys
from pathlib import Path

from tar import UserError
from tar.evaluation import compare_runs
from tar.evaluation.detect import evaluate
from tar.evaluation.markdown import markdown, rows_table
from tar.pictures.detections import make_folder, predict
from tar.pictures.export import export
from tar.pictures.images_to_show import flags_of, images_to_show, open_test_set
from tar.pictures.models_to_show import ModelsToShow
from tar.pictures.report import report
from tar.tables.print_table import read_table, table_text
from tar.training import checkpoint
from tar.training.failure import program
from tar.training.flags import LEVELS
from tar.training.parser import Parser, count, device_flags, number, positive
from tar.training.process import set_up

# flags that replace a run's own settings
REPLACING = ("data_path", "split", "val_json", "val_images", "limit_test", "batch_size", "teacher_weights")
NEEDS = {"level": ["show"], "plain_weights": ["show"], "json": ["weights", "compare"]}  # flags that need one of others
NEEDS |= {what: ["weights"] for what in ("show", "predict", "export")}


def parser():
    """The command line of eval.py; what is not given is taken from the checkpoint's own settings."""
    p = Parser(
        description="Look at what train.py has trained. --weights alone measures AP; voc: mAP too (voc07, voc_area)."
    )
    group = p.add_argument_group("what to look at (one of these)")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--weights", metavar="FILE", help="checkpoint, the last.pth of a run")
    add("--compare", nargs="+", metavar="RUN", help="folders of runs: figures and classes side by side")
    add("--report", nargs="+", metavar="RUN", help="folders of runs: figures, curves, pictures as HTML")
    add("--table", metavar="FILE", help="print a table of train.py --table from its JSON file")
    add = p.add_argument_group("what to do with it (at most one)").add_mutually_exclusive_group().add_argument
    add("--show", nargs="+", metavar="IMAGE", help="pictures of the method: a number of test images, or their files")
    add("--predict", nargs="+", metavar="PATH", help="detections on images or folders: drawn, and as JSON like COCO's")
    add("--export", metavar="FILE", help="the detector as TorchScript (FILE.pt) or ONNX (FILE.onnx, needs onnx)")
    add("--json", metavar="FILE", help="write the figures of --weights or --compare there too")
    add = p.add_argument_group("pictures").add_argument
    add("--level", choices=LEVELS, help="with --show: this level only (default: all, and the detections)")
    score = number(float, 0, "a score from 0 to 1", 1)
    add("--threshold", type=score, default=0.5, metavar="SCORE", help="least score that is shown (default: 0.5)")
    add("--teacher-weights", metavar="FILE", help="the teacher of --show and --report (default: of the run's settings)")
    add("--plain-weights", metavar="FILE", help="a plain student to --show beside it")
    add("--output", metavar="DIR", help="folder to write to (default: the run's)")
    add = p.add_argument_group("data (default: as in training)").add_argument
    add("--data-path", metavar="DIR", help="folder of the data")
    add("--split", choices=("test", "val"), help="what to measure on")
    add("--val-json", metavar="FILE", help="coco: annotations to test on")
    add("--val-images", metavar="DIR", help="coco: images to test on")
    add("--limit-test", type=count, metavar="N", help="test images; 0: all")
    add("--batch-size", type=positive, metavar="N", help="images at a time")
    add("--workers", type=count, default=1, metavar="N", help="loader processes (default: 1)")
    device_flags(p.add_argument_group("device"), amp=None)
    return p


def main(argv=None):
    p = parser()
    given = p.parse_args(argv)
    for name, others in NEEDS.items():
        if getattr(given, name) and not any(getattr(given, other) for other in others):
            p.error(f"--{name.replace('_', '-')} needs --{' or --'.join(others)}")
    given.replacing = {name: getattr(given, name) for name in REPLACING}
    with program("eval.py"):
        try:
            if given.table:
                print(table_text(read_table(given.table)))
            elif given.weights:
                look_at_weights(given)
            else:
                look_at_runs(given)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of `eval.py ... | head` has ended; Python's own flush must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def as_trained(amp):
    """The --amp for a run that was trained with this one: 16 bits only where the processor is fast at them."""
    return "none" if amp == "none" else "auto"


def look_at_weights(given):
    """--weights, alone or with --export, --predict or --show."""
    model, saved = checkpoint.load_detector(given.weights)
    args, classes = flags_of(saved["settings"], **given.replacing), saved["classes"]
    process, run = set_up(given.device, given.amp or as_trained(args.amp), given.threads), Path(given.weights).parent
    if process.world > 1 and (given.export or given.predict or given.show):
        raise UserError("--export, --predict and --show are of one process: leave torchrun out")
    if given.export:
        process.say(f"{given.export}: the {args.detector} of {given.weights}, {export(model, given.export, classes)}")
    elif given.predict:
        folder = Path(given.output or run / "detections")
        images, boxes = predict(model, classes, given.predict, process, given.threshold, folder)
        found = f"{boxes} detections at {given.threshold:g} or more on {images} images"
        process.say(f"{found}: {folder}, {folder / 'detections.json'}")
    elif given.show:
        models = ModelsToShow(given.weights, given.teacher_weights, given.plain_weights)
        if given.level and models.teacher is None:
            raise UserError(f"--level {given.level}: {given.weights} has no teacher; give --teacher-weights FILE")
        folder = make_folder(given.output or run / "pictures")
        for name, image, target in images_to_show(given.show, open_test_set(args, classes)):
            models.panel(image, target, given.threshold, name, given.level).save(folder / f"{name}.png")
            process.say(f"{folder / name}.png")
    else:
        measure(model, classes, given, args, process)


def measure(model, classes, given, args, process):
    """The detector's figures on the test set, overall and by class."""
    test_set, voc = open_test_set(args, classes), args.dataset == "voc"
    loading = args.batch_size, given.workers, process.progress("evaluating"), process.control
    with process.autocast():
        metrics = evaluate(process.place(model), test_set, process.device, voc, *loading)
    per_class = metrics.pop("per_class")
    process.say(f"{given.weights}: {len(test_set)} {args.split} images of {args.dataset}, {process.amp} autocast\n")
    process.say(markdown(["figure", "percent"], metrics.items()))
    process.say("\n" + rows_table([{"class": name, **figures} for name, figures in per_class.items()]))
    if given.json and process.main:
        about = {"weights": given.weights, "dataset": args.dataset, "split": args.split, "test_images": len(test_set)}
        checkpoint.save_json(given.json, {**about, **metrics, "per_class": per_class})


def look_at_runs(given):
    """--compare: figures and classes of runs side by side. --report: one page of HTML."""
    runs = compare_runs.open_runs(given.compare or given.report)
    process = set_up(given.device, given.amp or as_trained(runs[0].settings["amp"]), given.threads)
    if given.report:
        file = make_folder(given.output or runs[-1].folder) / "report.html"
        checkpoint.save_text(file, report(runs, given.threshold, given.replacing, process.say))
        process.say(f"{file}")
        return
    test_set = open_test_set(flags_of(runs[0].settings, **given.replacing), tuple(runs[0].result["per_class"]))
    columns = compare_runs.figures(runs, test_set, process)
    process.say(compare_runs.figures_text(columns))
    process.say("\n" + compare_runs.class_text(runs))
    if given.json and process.main:
        checkpoint.save_json(given.json, {"figures": columns})


if __name__ == "__main__":
    main()
