"""Looks at what train.py has trained: figures, pictures, comparisons, a report; detections on any image; an export.

python eval.py --weights runs/demo/tar/last.pth [--json FILE]
python eval.py --weights runs/demo/tar/last.pth --show 4
python eval.py --weights runs/demo/tar/last.pth --predict PHOTOS
python eval.py --weights runs/demo/tar/last.pth --export student.pt
python eval.py --compare runs/demo/plain runs/demo/tar
python eval.py --report runs/demo/plain runs/demo/tar
python eval.py --table runs/demo/table-demo-shapes-faster-rcnn.json
"""

import os
import signal
import sys
from pathlib import Path

from tar import UserError
from tar.evaluation import compare_runs
from tar.evaluation.detect import evaluate
from tar.evaluation.markdown import class_table, markdown
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
REPLACING = ("data_path", "split", "val_json", "val_images", "limit_test", "batch_size", "amp", "teacher_weights")
NEEDS = {"show": "weights", "predict": "weights", "export": "weights", "level": "show", "plain_weights": "show"}


def parser():
    """The command line of eval.py; what is not given is taken from the checkpoint's own settings."""
    p = Parser(description="Look at what train.py has trained. --weights alone measures AP and, for voc, mAP.")
    g = p.add_argument_group("what to look at (one of these)").add_mutually_exclusive_group(required=True)
    g.add_argument("--weights", metavar="FILE", help="checkpoint, the last.pth of a run")
    g.add_argument("--compare", nargs="+", metavar="RUN", help="folders of runs: figures and classes side by side")
    g.add_argument("--report", nargs="+", metavar="RUN", help="folders of runs: figures, curves, pictures as HTML")
    g.add_argument("--table", metavar="FILE", help="print a table of train.py --table from its JSON file")
    g = p.add_argument_group("what to do with --weights instead of evaluating").add_mutually_exclusive_group()
    text = "pictures of the method: a number of test images, or files of the test set"
    g.add_argument("--show", nargs="+", metavar="IMAGE", help=text)
    text = "detect on images, or on all in a folder: drawn, and as JSON in COCO's format"
    g.add_argument("--predict", nargs="+", metavar="PATH", help=text)
    text = "write the detector as TorchScript (FILE.pt) or ONNX (FILE.onnx, needs the package onnx)"
    g.add_argument("--export", metavar="FILE", help=text)
    g = p.add_argument_group("pictures and files")
    g.add_argument("--level", choices=LEVELS, help="with --show: this level only (default: all, and the detections)")
    score, text = number(float, 0, "a score from 0 to 1", 1), "least score of a detection that is shown (default: 0.5)"
    g.add_argument("--threshold", type=score, default=0.5, metavar="SCORE", help=text)
    text = "checkpoint of the teacher, for --show and --report (default: the one of the student's settings)"
    g.add_argument("--teacher-weights", metavar="FILE", help=text)
    text = "checkpoint of a plain student to show beside it, for --show"
    g.add_argument("--plain-weights", metavar="FILE", help=text)
    g.add_argument("--output", metavar="DIR", help="folder to write to (default: the run's)")
    g.add_argument("--json", metavar="FILE", help="write the figures of --weights or --compare there too")
    g = p.add_argument_group("data (default: as in training)")
    g.add_argument("--data-path", metavar="DIR", help="folder of the data")
    g.add_argument("--split", choices=("test", "val"), help="what to measure on")
    g.add_argument("--val-json", metavar="FILE", help="coco: annotations to test on")
    g.add_argument("--val-images", metavar="DIR", help="coco: images to test on")
    g.add_argument("--limit-test", type=count, metavar="N", help="test images; 0: all")
    g.add_argument("--batch-size", type=positive, metavar="N", help="images at a time")
    g.add_argument("--workers", type=count, default=1, metavar="N", help="loader processes (default: 1)")
    device_flags(p.add_argument_group("device"), amp=None)
    return p


def main(argv=None):
    given = parse(argv)
    with program("eval.py"):
        try:
            if given.table:
                print(table_text(read_table(given.table)))
            elif given.compare:
                compare(given)
            elif given.report:
                write_report(given)
            else:
                look_at_weights(given)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of `eval.py ... | head` has ended; Python's own flush must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def parse(argv):
    p = parser()
    given = p.parse_args(argv)
    for name, other in NEEDS.items():
        if getattr(given, name) and not getattr(given, other):
            p.error(f"--{name.replace('_', '-')} needs --{other}")
    given.replacing = {name: getattr(given, name) for name in REPLACING}
    return given


def look_at_weights(given):
    """--weights, alone or with --export, --predict or --show."""
    model, saved = checkpoint.load_detector(given.weights)
    args, classes = flags_of(saved["settings"], **given.replacing), saved["classes"]
    process, run = set_up(given.device, args.amp, given.threads), Path(given.weights).parent
    if process.world > 1 and (given.export or given.predict or given.show):
        raise UserError("--export, --predict and --show are of one process: leave torchrun out")
    if given.export:
        export(model, given.export)
        process.say(f"{given.export}: the {args.detector} of {given.weights}, for one image of any size")
    elif given.predict:
        folder = Path(given.output or run / "detections")
        images, boxes = predict(model, classes, given.predict, process, given.threshold, folder)
        process.say(f"{boxes} detections on {images} images: {folder}, {folder / 'detections.json'}")
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
    process.say(markdown(["figure", "percent"], [[k, v] for k, v in metrics.items()]))
    process.say("\n" + class_table(per_class))
    if given.json and process.main:
        about = {"weights": given.weights, "dataset": args.dataset, "split": args.split, "test_images": len(test_set)}
        checkpoint.save_json(given.json, {**about, **metrics, "per_class": per_class})


def compare(given):
    """--compare: figures and classes of runs side by side."""
    runs, process = open_runs(given, given.compare)
    test_set = open_test_set(flags_of(runs[0].settings, **given.replacing), tuple(runs[0].result["per_class"]))
    columns = compare_runs.figures(runs, test_set, process)
    process.say(compare_runs.figures_text(columns))
    process.say("\n" + compare_runs.class_text(runs))
    if given.json and process.main:
        checkpoint.save_json(given.json, {"figures": columns})


def write_report(given):
    """--report: one page of HTML."""
    runs, process = open_runs(given, given.report)
    file = make_folder(given.output or runs[-1].folder) / "report.html"
    checkpoint.save_text(file, report(runs, given.threshold, given.replacing))
    process.say(f"{file}")


def open_runs(given, folders):
    runs = compare_runs.open_runs(folders)
    compare_runs.same_test(runs)
    return runs, set_up(given.device, given.amp or runs[0].settings["amp"], given.threads)


if __name__ == "__main__":
    main()
