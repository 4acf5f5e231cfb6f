"""Looks at what train.py has trained: figures, pictures, comparisons, a report; detections on any image; an export.

python eval.py --weights runs/demo/tar/last.pth [--json FILE]
python eval.py --weights runs/demo/tar/last.pth --show 4
python eval.py --weights runs/demo/tar/last.pth --predict PHOTOS
python eval.py --compare runs/demo/plain runs/demo/tar
python eval.py --report runs/demo/plain runs/demo/tar
python eval.py --table voc [--results runs]    or --table FILE, for example one of .results/
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from tar import UserError, fail
from tar.evaluation import compare_runs
from tar.evaluation.detect import evaluate
from tar.evaluation.markdown import class_table, markdown
from tar.pictures.charts import curves_picture
from tar.pictures.detections import predict
from tar.pictures.export import export
from tar.pictures.images_to_show import flags_of, image_files, images_to_show, make_folder, open_test_set
from tar.pictures.models_to_show import StudentAndTeacher
from tar.pictures.report import report
from tar.tables.print_table import classes_text, curves_of, main_figure, read_table, table_text
from tar.training import checkpoint
from tar.training.flags import LEVELS
from tar.training.parser import Parser, count, number, positive
from tar.training.process import set_up

# flags that replace a run's own settings
REPLACING = ("data_path", "split", "val_json", "val_images", "limit_test", "batch_size", "amp", "teacher_weights")


def parser():
    """The command line of eval.py; what is not given is taken from the checkpoint's own settings."""
    p = Parser(description="Look at what train.py has trained. --weights alone measures AP and, for voc, mAP.")
    g = p.add_argument_group("what to look at (one of these)")
    what = g.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="FILE", help="checkpoint, the last.pth of a run")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="folders of runs: figures and classes side by side")
    what.add_argument("--report", nargs="+", metavar="RUN", help="folders of runs: figures, curves, pictures as HTML")
    text = "print a table of train.py --table: its JSON file, or the table's name"
    what.add_argument("--table", metavar="FILE", help=text)
    g = p.add_argument_group("what to do with --weights instead of evaluating")
    do = g.add_mutually_exclusive_group()
    text = "pictures of the method: a number of test images, or image files"
    do.add_argument("--show", nargs="+", metavar="IMAGE", help=text)
    text = "detect on images, or on all in a folder: drawn, and as JSON in COCO's format"
    do.add_argument("--predict", nargs="+", metavar="PATH", help=text)
    text = "write the detector as TorchScript (FILE.pt) or ONNX (FILE.onnx, needs the package onnx)"
    do.add_argument("--export", metavar="FILE", help=text)
    g.add_argument("--level", choices=LEVELS, help="with --show: this level only (default: all, and the detections)")
    score, text = number(float, 0, "a score from 0 to 1", 1), "least score of a detection that is shown (default: 0.5)"
    g.add_argument("--threshold", type=score, default=0.5, metavar="SCORE", help=text)
    text = "checkpoint of the teacher, for --show and --report (default: the one of the student's settings)"
    g.add_argument("--teacher-weights", metavar="FILE", help=text)
    text = "checkpoint of a plain student, for --show (default: the run `plain` beside the student's, if there is one)"
    g.add_argument("--plain-weights", metavar="FILE", help=text)
    g = p.add_argument_group("data")
    g.add_argument("--data-path", metavar="DIR", help="folder of the data (default: as in training)")
    g.add_argument("--split", choices=("test", "val"), help="what to measure on (default: as in training)")
    g.add_argument("--val-json", metavar="FILE", help="coco: annotations to test on (default: as in training)")
    g.add_argument("--val-images", metavar="DIR", help="coco: images to test on (default: as in training)")
    g.add_argument("--limit-test", type=count, metavar="N", help="test images; 0: all (default: as in training)")
    g.add_argument("--batch-size", type=positive, metavar="N", help="images at a time (default: as in training)")
    g.add_argument("--workers", type=count, default=1, metavar="N", help="loader processes (default: 1)")
    g = p.add_argument_group("device")
    g.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), help="precision (default: as in training)")
    g.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    g.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads; 0: torch's choice")
    g = p.add_argument_group("output")
    text = "folder to search for a table that --table gives by name (default: runs)"
    g.add_argument("--results", default="runs", metavar="DIR", help=text)
    g.add_argument("--per-class", action="store_true", help="with --table: the figures of each class too")
    g.add_argument("--json", metavar="FILE", help="write the figures there too")
    text = "folder to write to (default: the run's); with --table: folder for a picture of the curves"
    g.add_argument("--output", metavar="DIR", help=text)
    return p


def main(argv=None):
    given = parse(argv)
    try:
        if given.json and not Path(given.json).resolve().parent.is_dir():
            raise UserError(f"--json {given.json}: there is no such folder")
        if given.table:
            print_tables(given.table, Path(given.results), given.output, given.per_class)
        elif given.compare:
            compare(given)
        elif given.report:
            write_report(given)
        else:
            look_at_weights(given)
        sys.stdout.flush()
    except UserError as error:
        fail("eval.py", error)
    except BrokenPipeError:  # the reader of `eval.py ... | head` has ended; Python's own flush at the end must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(argv):
    p = parser()
    given = p.parse_args(argv)
    of_weights = [name for name in ("show", "predict", "export", "plain_weights") if getattr(given, name)]
    if of_weights and not given.weights:
        p.error(f"--{of_weights[0].replace('_', '-')} needs --weights FILE")
    if given.per_class and not given.table:
        p.error("--per-class needs --table FILE; --weights FILE alone prints the classes anyway")
    if given.level and not given.show:
        p.error(f"--level {given.level} needs --show")
    given.replacing = {name: getattr(given, name) for name in REPLACING}
    return given


def look_at_weights(given):
    """--weights, alone or with --export, --predict or --show."""
    model, saved = checkpoint.load_detector(given.weights)
    args = flags_of(saved["settings"], **given.replacing)
    if args.dataset == "coco" and args.split == "val":
        raise UserError("--split val: COCO has one split to test on; give --val-json and --val-images")
    process, run = set_up(given.device, args.amp, given.threads), Path(given.weights).parent
    if given.export:
        export(model, given.export)
        process.say(f"{given.export}: the {args.detector} of {given.weights}, for one image of any size")
    elif given.predict:
        folder, files = Path(given.output or run / "detections"), image_files(given.predict)
        images, boxes = predict(model, saved["classes"], files, process, given.threshold, folder)
        process.say(f"{boxes} detections on {images} images: {folder}, {folder / 'detections.json'}")
    elif given.show:
        show(given, args, process, run)
    else:
        measure(model, saved["classes"], given, args, process)


def show(given, args, process, run):
    """A picture of the method and the detections for each image."""
    models = StudentAndTeacher(given.weights, process, given.teacher_weights, given.plain_weights)
    if given.level and models.teacher is None:
        raise UserError(f"--level {given.level}: {given.weights} has no teacher; give --teacher-weights FILE")
    folder = make_folder(given.output or run / "pictures")
    for name, image, target in images_to_show(given.show, args, models.classes, process.say):
        panel = models.panel(image, target, given.threshold, name, given.level)
        panel.save(folder / f"{name}.png", optimize=True)
        process.say(f"{folder / name}.png")


def measure(model, classes, given, args, process):
    """The detector's figures on the test set, overall and by class."""
    test_set, voc = open_test_set(args, classes), args.dataset == "voc"
    loading = args.batch_size, given.workers, process.progress("evaluating")
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
    checkpoint.save_text(file, report(runs, process, given.threshold, given.replacing))
    process.say(f"{file}")


def open_runs(given, folders):
    runs = compare_runs.open_runs(folders)
    compare_runs.same_test(runs)
    return runs, set_up(given.device, given.amp or runs[0].settings["amp"], given.threads)


def print_tables(name, folder, output=None, per_class=False):
    """Prints the table of a file, or all tables of a name in a folder; draws their curves into output."""
    files = [Path(name)] if Path(name).is_file() else sorted(folder.glob(f"table-{name}-*.json"))
    files = files or sorted((folder / name).glob(f"table-{name}-*.json"))
    if not files:
        raise UserError(f"--table {name}: no such file, and no table-{name}-*.json in {folder}; train.py makes it")
    for file in files:
        table = read_table(file)
        print(table_text(table) + "\n")
        if per_class:
            print((classes_text(table) or "no run has ended: no figures by class") + "\n")
        if output:
            figure, title = main_figure(table["dataset"])
            curves = curves_of(table, figure)
            if not curves:
                raise UserError(f"{file}: no run of it has been evaluated yet; there are no curves to draw")
            picture = make_folder(output) / f"{file.stem}.svg"
            checkpoint.save_text(picture, curves_picture(file.stem, f"{title}, percent", curves))
            print(picture)


if __name__ == "__main__":
    main()
