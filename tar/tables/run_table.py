"""Trains the rows of a table, and keeps all that is printed of them in one JSON file."""

import json
import math
from pathlib import Path
from statistics import fmean, mean

from tar import UserError
from tar.tables.print_table import DISTILLED, EQUAL, FIGURES, PLAIN, TEACHER, table_text
from tar.tables.rows import command_of, rows_of
from tar.training import checkpoint
from tar.training.flags import TABLE_DATASETS, contradiction
from tar.training.initial_weights import check_student, read_teacher
from tar.training.run_folder import changed, read_log, run_name

CLASSES = {"voc": 20, "coco": 80}  # of the paper's data
ALL_OVER_TEACHER = 3.1  # time of all runs of the demonstration, over that of its first: 566 s over 182 s, measured


def run_table(args, process, train):
    """Trains the rows that have not been trained, saves table-NAME-DATASET-DETECTOR.json after each, and prints it.

    args: flags; student and teacher may be missing. Without --table: the demonstration, in folders of its own.
    train: train.train_with_teacher(), a run of args, process, parent, name and title.
    """
    teacher, student = ("r18", "r10") if args.dataset == "shapes" else ("r101", "r50")
    with_teacher = args.teacher or args.teacher_weights
    args = changed(args, student=args.student or student, teacher=args.teacher or teacher)
    if args.dataset == "shapes" and not args.teacher_weights:  # about as long as a plain student of equal cost
        args.teacher_epochs = args.teacher_epochs or args.epochs * 5 // 4
    parent = Path(args.output or ("runs" if args.table else "runs/demo"))
    rows = rows_of(args, parent)
    if args.teacher_weights not in (None, "coco"):
        process.main_first(read_teacher, args, None)
    for row in rows:  # before the first is trained
        if row.kind == DISTILLED and (wrong := contradiction(row.flags(args))):
            raise UserError(f"--table {args.table}, row {row.title}: {wrong}")
        if with_teacher and row.changes.get("teacher"):
            text = "its rows name their teachers, which are trained first; leave --teacher and --teacher-weights out"
            raise UserError(f"--table {args.table}: {text}")
        if row.kind in (PLAIN, TEACHER):
            folder = parent / (row.folder or run_name(row.flags(args), process))
            if not (folder / "last.pth").is_file():
                process.main_first(check_student, row.flags(args))
    table = {"table": args.table or "demo", "dataset": args.dataset, "detector": args.detector, "split": args.split}
    of_paper = args.dataset == TABLE_DATASETS.get(args.table)
    process.runs_ahead = 0.0 if args.table else ALL_OVER_TEACHER
    split = "" if args.split == "test" else f"-{args.split}"
    file = parent / f"table-{table['table']}-{args.dataset}{split}-{args.detector}.json"
    for row in rows:  # that of equal cost is the last
        flags = row.flags(args)
        if row.kind == EQUAL:
            flags.epochs = epochs_of_equal_cost(args, rows, process)
        row.command = command_of(flags)
        for seed in range(args.seed, args.seed + args.seeds):
            title = f"{row.title}, seed {seed}" if args.seeds > 1 else row.title
            results, folder = train(changed(flags, seed=seed), process, parent, row.folder, title)
            *_, result = results.values()
            process.runs_ahead = 0.0
            row.runs.append(process.shared(process.on_main(summary_of, result, folder, seed)))
        table["test_images"] = result["test_images"]  # and the paper's figures, if the classes are those of its data
        table["papers"] = of_paper and len(result["per_class"]) == CLASSES[args.dataset]
        table["rows"] = [{k: v for k, v in vars(row).items() if k not in ("changes", "folder")} for row in rows]
        process.on_main(checkpoint.save_text, file, json.dumps(table) + "\n")
    process.say("\n" + table_text(table))
    run = parent / costly(rows)[0].runs[0]["folder"]
    process.say(f"Table: {file}. Next: python eval.py --weights {run / 'last.pth'}")


def costly(rows):
    """The rows whose cost counts for the row of equal cost: the whole method's, or else all distilled ones."""
    distilled = [row for row in rows if row.kind == DISTILLED]
    return [row for row in distilled if row.whole] or distilled


def epochs_of_equal_cost(args, rows, process):
    """How long a plain student trains that costs as much as the dearest distillation: whole epochs, rounded up."""
    cost, title = max((mean(run["cost"] for run in row.runs), row.title) for row in costly(rows))
    epochs = max(math.ceil(args.epochs * cost), args.epochs)
    process.say(f"\nThe distillation ({title}) costs {cost:.2f} plain trainings: {epochs} epochs for {args.epochs}.")
    return epochs


def summary_of(result, folder, seed):
    """What a table keeps of a run: figures, also of each class and at each evaluation; cost; gate."""

    def chosen(figures, names=("AP", "AP50", "voc07")):
        return {name: figures[name] for name in names if name in figures}

    try:
        log = read_log(folder / "log.jsonl")
    except UserError as error:  # the figures do not hang on a log
        print(f"Curve and gate are left out: {error}")
        log = []
    about = {"seed": seed, "folder": folder.name, "device": result["environment"]["device"]}
    about |= chosen(result, ("cost", "parameters", "ms_per_image", "epochs", "seconds", *FIGURES))
    curve = [[line["epoch"], chosen(line["metrics"])] for line in log if "metrics" in line]
    per_class = {name: chosen(figures) for name, figures in result["per_class"].items()}
    return {**about, "curve": curve, "gate": gate_by_quarter(log), "per_class": per_class}


def gate_by_quarter(log):
    """Percent of the positives that the regression gate lets through in each quarter of a run: four numbers, or None.

    A number is None where the teacher was not used. log: lines of log.jsonl, means of the steps since the line before.
    """
    steps = [line for line in log if "metrics" not in line]
    quarters, before = [[] for _ in range(4)], 0
    for line in steps:
        if "gate_open" in line:
            quarters[4 * before // steps[-1]["step"]] += [100 * line["gate_open"]] * (line["step"] - before)
        before = line["step"]
    return [fmean(quarter) if quarter else None for quarter in quarters] if any(quarters) else None
