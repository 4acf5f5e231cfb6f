"""Looks at what train.py has trained: figures, pictures, comparisons, a report; detections on any image; an export.

python eval.py --weights runs/demo/tar/last.pth [--json FILE]
python eval.py --weights runs/demo/tar/last.pth --show 4
python eval.py --weights runs/demo/tar/last.pth --predict PHOTOS
python eval.py --compare runs/demo/plain runs/demo/tar
python eval.py --report runs/demo/plain runs/demo/tar
python eval.py --table voc [--results runs]
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from tar import UserError, checkpoint, compare, fail, show
from tar.arguments import Parser, count, positive, weight
from tar.errors import cost_of_errors
from tar.evaluation import evaluate
from tar.export import export
from tar.machine import set_up
from tar.options import LEVELS, TABLES
from tar.report import curves_picture
from tar.runs import read_json
from tar.tabulation import class_table, classes_text, curves_of, logs_of, main_figure, markdown, table_text

GIVEN = ("data_path", "split", "val_json", "val_images", "limit_test", "batch_size", "amp", "teacher_weights")


def parser():
    """The command line of eval.py; what is not given is taken from the checkpoint's own settings."""
    p = Parser(
        description="Look at what train.py has trained. --weights alone evaluates: AP, AP50, AP75 and, for voc, mAP.",
    )
    g = p.add_argument_group("what to look at (one of these)")
    what = g.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="FILE", help="checkpoint, the last.pth of a run")
    text = "folders of runs: their figures side by side, and for two where the difference comes from"
    what.add_argument("--compare", nargs="+", metavar="RUN", help=text)
    text = "folders of runs: a page of HTML with figures, curves and pictures"
    what.add_argument("--report", nargs="+", metavar="RUN", help=text)
    what.add_argument("--table", choices=("demo", *TABLES), help="print a table that train.py --table has run")
    g = p.add_argument_group("what to do with --weights instead of evaluating")
    do = g.add_mutually_exclusive_group()
    text = "pictures of the method: a number of test images, or image files"
    do.add_argument("--show", nargs="+", metavar="IMAGE", help=text)
    text = "detect on images, or on all in a folder: drawn, and as JSON in COCO's format"
    do.add_argument("--predict", nargs="+", metavar="PATH", help=text)
    text = "write the detector as TorchScript (FILE.pt) or ONNX (FILE.onnx, needs the package onnx)"
    do.add_argument("--export", metavar="FILE", help=text)
    text = "of --show: only what one level is about (default: all, and the detections)"
    g.add_argument("--level", choices=LEVELS, help=text)
    text = "least score of a detection that is shown, 0 to 1 (default: 0.5)"
    g.add_argument("--threshold", type=weight, default=0.5, metavar="SCORE", help=text)
    text = "checkpoint of the teacher, for --show and --report (default: the one of the student's settings)"
    g.add_argument("--teacher-weights", metavar="FILE", help=text)
    text = "checkpoint of a plain student, for --show (default: the run `plain` beside the student's, if there is one)"
    g.add_argument("--plain-weights", metavar="FILE", help=text)
    g = p.add_argument_group("data")
    g.add_argument("--data-path", metavar="DIR", help="folder of the data (default: as in training)")
    g.add_argument("--split", choices=("test", "val"), help="what to measure on (default: as in training)")
    for part, kind in (("JSON", "FILE"), ("images", "DIR")):
        text = f"coco: {part} to test on (default: as in training)"
        g.add_argument(f"--val-{part.lower()}", metavar=kind, help=text)
    g.add_argument("--limit-test", type=count, metavar="N", help="test images; 0: all (default: as in training)")
    g.add_argument("--batch-size", type=positive, metavar="N", help="images at a time (default: as in training)")
    g.add_argument("--workers", type=count, default=1, metavar="N", help="loader processes (default: 1)")
    g = p.add_argument_group("machine")
    g.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), help="precision (default: as in training)")
    g.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    g.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads; 0: torch's choice")
    g = p.add_argument_group("output")
    g.add_argument("--results", default="runs", metavar="DIR", help="folder of --table's runs (default: runs)")
    text = "with --table: the figures of each class too"
    g.add_argument("--per-class", action="store_true", help=text)
    g.add_argument("--json", metavar="FILE", help="write the figures there too")
    text = "folder of pictures, detections or the report (default: in the run's, `pictures`, `detections` and itself); "
    text += "with --table: of a picture of its curves"
    g.add_argument("--output", metavar="DIR", help=text)
    return p


def main(argv=None):
    p = parser()
    given = p.parse_args(argv)
    only_weights = [name for name in ("show", "predict", "export", "plain_weights") if getattr(given, name)]
    if only_weights and not given.weights:
        p.error(f"--{only_weights[0].replace('_', '-')} needs --weights FILE")
    if given.threshold > 1:
        p.error(f"--threshold {given.threshold}: a score lies between 0 and 1")
    if given.per_class and not given.table:
        p.error("--per-class needs --table NAME; --weights FILE alone prints the classes anyway")
    if given.level and not given.show:
        p.error(f"--level {given.level} needs --show")
    flags = {name: getattr(given, name) for name in GIVEN}
    try:
        if given.json and not Path(given.json).resolve().parent.is_dir():
            raise UserError(f"--json {given.json}: there is no such folder")
        if given.table:
            print_tables(given.table, Path(given.results), given.output, given.per_class)
        elif given.compare:
            compare_runs(given, flags)
        elif given.report:
            write_report(given, flags)
        else:
            look_at_weights(given, flags)
        sys.stdout.flush()
    except UserError as error:
        fail("eval.py", error)
    except BrokenPipeError:  # the reader of `eval.py ... | head` has seen enough; nor can the end of Python flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def look_at_weights(given, flags):
    model, saved = checkpoint.load_detector(given.weights)
    args = show.flags_of(saved["settings"], **flags)
    if args.dataset == "coco" and args.split == "val":
        raise UserError("--split val: COCO has one split to test on; give --val-json and --val-images")
    machine = set_up(given.device, args.amp, given.threads)
    run = Path(given.weights).parent
    if given.export:
        export(model, given.export)
        return machine.say(f"{given.export}: the {args.detector} of {given.weights}, for one image of any size")
    if given.predict:
        folder, files = Path(given.output or run / "detections"), show.images_at(given.predict)
        images, boxes = show.predict(model, saved["classes"], files, machine, given.threshold, folder)
        return machine.say(f"{boxes} detections on {images} images: {folder}, {folder / 'detections.json'}")
    if given.show:
        trio = show.Trio(given.weights, machine, given.teacher_weights, given.plain_weights)
        if given.level and trio.teacher is None:
            raise UserError(f"--level {given.level}: {given.weights} has no teacher; give --teacher-weights FILE")
        samples = show.samples_to_show(given.show, args, trio.classes, machine.say)
        for file in show.save_pictures(trio, samples, given.threshold, given.output or run / "pictures", given.level):
            machine.say(str(file))
        return None
    test_set = show.test_set_of(args, saved["classes"])
    with machine.autocast():
        voc, progress = args.dataset == "voc", machine.progress("evaluating")
        metrics = evaluate(
            machine.place(model), test_set, machine.device, voc, args.batch_size, given.workers, progress
        )
    per_class = metrics.pop("per_class")
    machine.say(f"{given.weights}: {len(test_set)} {args.split} images of {args.dataset}, {machine.amp} autocast\n")
    machine.say(markdown(["figure", "percent"], [[k, v] for k, v in metrics.items()]))
    machine.say("\n" + class_table(per_class))
    if given.json and machine.main:
        about = {"weights": given.weights, "dataset": args.dataset, "split": args.split, "test_images": len(test_set)}
        checkpoint.save_json(given.json, {**about, **metrics, "per_class": per_class})


def compare_runs(given, flags):
    """--compare: figures, classes, and of two runs the split of errors."""
    runs = compare.open_runs(given.compare)
    compare.same_test(runs)
    machine = set_up(given.device, given.amp or runs[0].settings["amp"], given.threads)
    args = show.flags_of(runs[0].settings, **flags)
    test_set = show.test_set_of(args, tuple(runs[0].result["per_class"]))
    columns = compare.figures(runs, test_set, machine)
    machine.say(compare.figures_text(columns))
    machine.say("\n" + compare.class_text(runs))
    found = {"figures": columns}
    if len(runs) == 2:
        results = {run.name: show.results_of(run, test_set, machine) for run in runs}
        found["errors"] = split = {name: cost_of_errors(r, test_set.classes) for name, r in results.items()}
        machine.say("\n" + compare.errors_text(split))
        file = show.made(given.output or runs[-1].folder / "pictures") / "errors.png"
        compare.errors_picture(split).save(file)
        machine.say(f"\n{file}")
    if given.json and machine.main:
        checkpoint.save_json(given.json, found)


def write_report(given, flags):
    runs = compare.open_runs(given.report)
    if len(runs) > 1:
        compare.same_test(runs)
    machine = set_up(given.device, given.amp or runs[0].settings["amp"], given.threads)
    file = show.made(given.output or runs[-1].folder) / "report.html"
    checkpoint.save_text(file, show.report(runs, machine, flags, given.threshold))
    machine.say(f"{file}")


def print_tables(name, folder, output=None, per_class=False):
    """Prints the tables that train.py has noted in a folder, with the results there; draws their curves into output."""
    found = sorted(folder.glob(f"table-{name}-*.json")) or sorted((folder / name).glob(f"table-{name}-*.json"))
    if not found:
        first = "train.py" if name == "demo" else f"train.py --table {name}"
        raise UserError(f"{folder}: no table-{name}-*.json; run {first} first, or give --results DIR")
    for file in found:
        index = read_json(file)
        print(table_text(index, file.parent) + "\n")
        if per_class:
            print((classes_text(index, file.parent) or "no run has ended: no figures by class") + "\n")
        if output:
            figure, title = main_figure(index["dataset"])
            curves = curves_of(logs_of(index, file.parent), figure)
            if not curves:
                raise UserError(f"{file}: no run of it has been evaluated yet; there are no curves to draw")
            picture = show.made(output) / f"{file.stem}.svg"
            checkpoint.save_text(picture, curves_picture(file.stem, f"{title}, percent", curves))
            print(picture)


if __name__ == "__main__":
    main()
