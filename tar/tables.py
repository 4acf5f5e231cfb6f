"""The paper's tables: which runs make the rows, and how the rows are printed."""

import math
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from tar import UserError, checkpoint
from tar.options import DISTILLATION, LEVELS, TABLE_DATASETS, complaint, parse, parser
from tar.recipes import RECIPES
from tar.runs import changed, read_json, read_lines, teacher_of

PLAIN, TEACHER, DISTILLED, EQUAL = "plain", "teacher", "distilled", "equal cost"
PAPERS_TEST_IMAGES = {"voc": 4952, "coco": 5000}  # the paper's figures are shown beside those measured on its data only
TAUGHT = {"teacher", "teacher_weights", "teacher_epochs"}  # flags that a row of the whole method may change


def only(*kept):
    """Flags of a row that keeps some of the three levels."""
    off = [name for name in LEVELS if name not in kept]
    return {f"no_{name}": True for name in off} | {f"weight_{name}": 0.0 for name in off}


CONSTANT = {"decay": "none", "decay_end": 1.0}  # flags of a row without decay
# A row is (title, what it is or the flags it changes, the paper's figure or None).
LEVEL_ROWS = (
    ("student, no distillation", PLAIN, 70.0),
    ("+ backbone level (Gaussian mask)", {**only("backbone"), **CONSTANT}, 72.4),
    ("+ classification level", {**only("cls"), **CONSTANT}, 73.2),
    ("+ regression level", {**only("reg"), **CONSTANT}, 73.4),
    ("all three levels, no decay", CONSTANT, 73.8),
    ("all three levels, decay", {}, 74.5),
    ("teacher", TEACHER, 74.3),
)
HEADS = only("cls", "reg")
ROWS = {
    "shapes": LEVEL_ROWS,
    "voc": LEVEL_ROWS,
    "coco": (
        ("student, no distillation", PLAIN, 36.3),
        ("TAR from r101", {"teacher": "r101"}, 39.0),
        ("teacher r101", (TEACHER, "r101"), 38.5),
        ("TAR from r152", {"teacher": "r152"}, 39.9),
        ("teacher r152", (TEACHER, "r152"), None),
    ),
    "retinanet": (("student, no distillation", PLAIN, None), ("TAR", {}, "+2.3"), ("teacher", TEACHER, None)),
    "claim": (("student, no distillation", PLAIN, None), ("TAR", {}, None), ("teacher", TEACHER, None)),
    "teachers": (
        ("student, no distillation", PLAIN, None),
        *(
            row
            for t in ("r18", "r34", "r50", "r101")
            for row in ((f"TAR from {t}", {"teacher": t}, None), (f"teacher {t}", (TEACHER, t), None))
        ),
    ),
    "masks": (
        ("student, no distillation", PLAIN, None),
        *(
            (f"backbone level, {m} mask", {**only("backbone"), "mask": m}, None)
            for m in ("gaussian", "box", "full", "fine-grained")
        ),
        ("teacher", TEACHER, None),
    ),
    "sigma2": (
        ("student, no distillation", PLAIN, None),
        *((f"backbone level, sigma2 {s}", {**only("backbone"), "sigma2": s}, None) for s in (0.5, 1.0, 2.0, 4.0, 8.0)),
        ("teacher", TEACHER, None),
    ),
    "decay": (
        ("student, no distillation", PLAIN, None),
        *(
            (f"all three levels, decay {d}", {"decay": d, "decay_end": 1.0}, None)
            for d in ("linear", "cosine", "step", "none")
        ),
        ("teacher", TEACHER, None),
    ),
    "gates": (
        ("student, no distillation", PLAIN, None),
        *(
            (f"regression level, gate {g}", {**only("reg"), "reg_gate": g}, None)
            for g in ("proposal", "student", "none")
        ),
        *((f"classification level, gate {g}", {**only("cls"), "cls_gate": g}, None) for g in ("none", "better")),
        ("classification level, all regions", {**only("cls"), "soft_labels": "all"}, None),
        ("teacher", TEACHER, None),
    ),
    "proposals": (
        ("student, no distillation", PLAIN, None),
        *(
            (f"both heads' levels, {p} proposals", {**HEADS, "proposals": p}, None)
            for p in ("student", "teacher", "both")
        ),
        ("both heads' levels, no sharing", {**HEADS, "no_sharing": True}, None),
        ("teacher", TEACHER, None),
    ),
}


@dataclass
class Row:
    """A row of a table: what it trains, and the runs that it consists of."""

    title: str
    kind: str
    paper: object = None  # its figure in the paper, or the gain
    changes: dict = field(default_factory=dict)  # flags
    folder: str = None  # of its run, where it is not named by its settings
    teacher: str = None  # title of its teacher's row, of the whole method
    command: str = ""
    runs: list = field(default_factory=list)  # folders, one a seed

    def flags(self, args, epochs=None):
        """The flags of the row's runs, but for the seed."""
        args = changed(args, **self.changes)
        if self.kind == DISTILLED:
            return args
        if self.kind == TEACHER:
            args = teacher_of(args)
        alone = {"teacher": None, "teacher_weights": None, "epochs": epochs or args.epochs}
        usual = {**vars(parse([])), **RECIPES[args.recipe or args.dataset]}
        return changed(args, **alone, **{name: usual[name] for name in DISTILLATION})


def rows_of(args, parent):
    """The rows of the table that the flags name, in its order; without --table those of the demonstration."""
    if args.table is None:
        taught = {"teacher_weights": parent / "teacher/last.pth", "teacher_epochs": 0}
        title = f"TAR {args.student} from {args.teacher}"
        return [
            Row(f"teacher {args.teacher}", TEACHER, folder="teacher"),
            Row(f"plain {args.student}", PLAIN, folder="plain"),
            Row(title, DISTILLED, changes=taught, folder="tar", teacher=f"teacher {args.teacher}"),
            Row(f"plain {args.student}, equal cost", EQUAL, folder="plain-equal-cost"),
        ]
    rows = []
    for title, what, paper in ROWS[args.table]:
        if isinstance(what, dict):
            rows.append(Row(title, DISTILLED, paper, what))
        else:
            kind, *teacher = what if isinstance(what, tuple) else (what,)
            rows.append(Row(title, kind, paper, {"teacher": teacher[0]} if teacher else {}))
    if args.teacher_weights:  # trained elsewhere
        rows = [row for row in rows if row.kind != TEACHER]
    titles = {row.changes.get("teacher"): row.title for row in rows if row.kind == TEACHER}
    for row in rows:
        if row.kind == DISTILLED and row.changes.keys() <= TAUGHT:
            row.teacher = titles.get(row.changes.get("teacher"))
    return [*rows, Row("student, equal cost", EQUAL)]


def run_table(args, machine, distil):
    """Runs the rows that have not been run, notes which runs make the table, and prints it.

    Args:
        args: flags; student and teacher may be missing. Without --table: the demonstration, in folders of its own.
        distil: train.py's function for a run: (args, machine, parent folder, name of its folder or None, its title)
            -> ({title: result.json's dict}, the student's last, and its folder).
    """
    teacher, student = ("r18", "r10") if args.dataset == "shapes" else ("r101", "r50")
    given = args.teacher
    args = changed(args, student=args.student or student, teacher=args.teacher or teacher)
    if args.dataset == "shapes" and not args.teacher_weights:  # as long as a plain student of equal cost, about
        args.teacher_epochs = args.teacher_epochs or args.epochs * 5 // 4
    parent = Path(args.output or ("runs" if args.table else "runs/demo"))
    rows = rows_of(args, parent)
    for row in rows:  # before the first is trained
        wrong = complaint(row.flags(args))
        if wrong:
            raise UserError(f"--table {args.table}, row {row.title}: {wrong}")
    if (args.teacher_weights or given) and any(row.changes.get("teacher") for row in rows):
        text = "its rows name their teachers, which are trained first; leave --teacher and --teacher-weights out"
        raise UserError(f"--table {args.table}: {text}")
    distilled = [row for row in rows if row.kind == DISTILLED]
    whole = [row for row in distilled if row.changes.keys() <= TAUGHT] or distilled  # what equal cost is equal to
    name, results = args.table or "demo", {}
    for row in sorted(rows, key=lambda row: row.kind == EQUAL):
        epochs = None
        if row.kind == EQUAL:
            costs = {r.title: mean(result["cost"] for result in results[r.title]) for r in whole}
            dearest = max(costs, key=costs.get)
            epochs = max(math.ceil(args.epochs * costs[dearest]), args.epochs)
            which = f" ({dearest})" if len(costs) > 1 else ""
            text = f"costs {costs[dearest]:.2f} plain trainings: {epochs} epochs for {args.epochs}"
            machine.say(f"\nThe distillation{which} {text}.")
        flags = row.flags(args, epochs)
        row.command = command_of(flags)
        for seed in range(args.seed, args.seed + args.seeds):
            title = f"{row.title}, seed {seed}" if args.seeds > 1 else row.title
            trained, folder = distil(changed(flags, seed=seed), machine, parent, row.folder, title)
            results.setdefault(row.title, []).append(list(trained.values())[-1])
            row.runs.append(folder.name)
        images = results[row.title][0]["test_images"]
        index = {"table": name, "dataset": args.dataset, "detector": args.detector, "test_images": images}
        index["papers"] = args.table in TABLE_DATASETS and papers_setting(args, images)
        index["rows"] = [{k: v for k, v in asdict(r).items() if k not in ("changes", "folder")} for r in rows]
        machine.alone(checkpoint.save_json, parent / f"table-{name}-{args.dataset}-{args.detector}.json", index)
    machine.alone(lambda: machine.say("\n" + table_text(index, parent)))
    machine.say(f"Runs: {parent}. Next: python eval.py --weights {parent / whole[0].runs[0] / 'last.pth'}")


def papers_setting(args, test_images):
    """Whether a table was measured on the data and with the models of the paper's."""
    detector = "retinanet" if args.table == "retinanet" else "faster-rcnn"
    models = (args.detector, args.student, args.teacher) == (detector, "r50", "r101")
    return models and args.dataset == TABLE_DATASETS[args.table] and test_images == PAPERS_TEST_IMAGES[args.dataset]


def main_figure(dataset):
    """The figure in which gains are counted, and what it is called."""
    return ("voc07", "VOC07 mAP") if dataset == "voc" else ("AP", "AP")


def table_text(index, parent):
    """A table as Markdown; under it what it says of teacher and student, AP over the epochs, and the rows' commands.

    Gains are taken seed by seed, where both rows have the same seeds.

    Args:
        index: what run_table() notes in table-NAME-....json.
        parent: the folder of that file and of the runs; rows without a result are shown empty.
    """
    voc, rows = index["dataset"] == "voc", index["rows"]
    main, main_title = main_figure(index["dataset"])
    papers = index.get("papers") and any(r["paper"] for r in rows)
    figures = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"} | (
        {"voc07": "VOC07 mAP", "voc_area": "VOC area mAP"} if voc else {}
    )
    results, logs = {}, {}
    for row in rows:
        ended = [Path(parent) / run for run in row["runs"] if (Path(parent) / run / "result.json").is_file()]
        results[row["title"]] = [read_json(run / "result.json") for run in ended]
        logs[row["title"]] = [read_lines(run / "log.jsonl") for run in ended if (run / "log.jsonl").is_file()]
    plain, equal = (next((results[r["title"]] for r in rows if r["kind"] == kind), []) for kind in (PLAIN, EQUAL))
    header = ["run", *figures.values(), "gain", "over equal cost", *(["paper"] if papers else [])]
    header += ["parameters (M)", "epochs", "training minutes", "ms an image"]
    lines = []
    for row in rows:
        runs = results[row["title"]]
        line = [row["title"], *(spread([r[f] for r in runs]) for f in figures)]
        line.append(None if row["kind"] == PLAIN else gain(runs, plain, main))
        line.append(None if row["kind"] in (PLAIN, EQUAL) else gain(runs, equal, main))
        line += [row["paper"]] if papers else []
        if runs:
            line += [runs[0]["parameters"] / 1e6, runs[0]["epochs"]]
            line += [mean(r["seconds"] for r in runs) / 60, mean(r["ms_per_image"] for r in runs)]
        lines.append(line + [None] * (len(header) - len(line)))
    seeds = max(len(runs) for runs in results.values())
    about = f"{index['test_images']} test images of {index['dataset']}, {index['detector']}; "
    about += f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    parts = [f"{about}; the gain is in {figures[main]}.", markdown(header, lines)]
    for row in rows:
        if row.get("teacher") and results[row["title"]] and results[row["teacher"]]:
            students, name = results[row["title"]], row["teacher"].removeprefix("teacher").strip()
            text = [verdict(students, results[row["teacher"]], main, main_title, name)]
            for which, others in (("the same epochs", plain), ("equal cost", equal)):
                gains = [f"{gain(students, others, f)} {figures[f]}" for f in (main, "AP50") if others]
                text += [f"Over the plain student of {which}: {', '.join(gains)}."] if gains else []
            parts.append(" ".join(text))
    parts += [text for text in (curves_text(logs, main, main_title), gates_text(logs)) if text]
    parts.append("\n".join(f"{row['title']}:\n    {row['command']}" for row in rows if row["command"]))
    return "\n\n".join(parts)


def verdict(students, teachers, figure, title, name=""):
    """Whether a student passes its teacher, in words.

    Args:
        students, teachers: result.json's dicts, of one seed after another.
        figure, title: what is compared, as main_figure() returns it.
        name: of the teacher, where there are several.
    """
    student, teacher = (mean(r[figure] for r in runs) for runs in (students, teachers))
    text = f"{student:.1f} {title} against {teacher:.1f}"
    if len(students) > 1 and len(students) == len(teachers):
        apart = spread([s[figure] - t[figure] for s, t in zip(students, teachers, strict=True)])
        text += f", a difference of {apart} over {len(students)} seeds"
    said = "passes" if student > teacher else "equals" if student == teacher else "does not pass"
    return f"The student {said} its teacher{f' {name}' if name else ''}: {text}."


def gain(runs, others, figure):
    """How much higher runs end than others, one seed after another: mean, and deviation of several; or None."""
    if not runs or not others:
        return None
    if len(runs) != len(others):  # a table that is under way
        return f"{mean(r[figure] for r in runs) - mean(r[figure] for r in others):+.1f}"
    apart = [run[figure] - other[figure] for run, other in zip(runs, others, strict=True)]
    return f"{mean(apart):+.1f}" + (f" ± {stdev(apart):.1f}" if len(apart) > 1 else "")


def curves_text(logs, figure, figure_title):
    """A figure at each evaluation as Markdown, or None where no run has two.

    Args:
        logs: {title of a row: log.jsonl's lines of each seed}.
        figure, figure_title: as main_figure() returns them.
    """
    measured = {}
    for title, runs in logs.items():
        for log in runs:
            for line in log:
                if "metrics" in line:
                    measured.setdefault(title, {}).setdefault(line["epoch"], []).append(line["metrics"][figure])
    epochs = sorted({epoch for curve in measured.values() for epoch in curve})
    if all(len(curve) < 2 for curve in measured.values()):
        return None
    rows = [[title, *(spread(curve.get(epoch)) for epoch in epochs)] for title, curve in measured.items()]
    return f"{figure_title} after so many epochs:\n\n" + markdown(["run", *map(str, epochs)], rows)


def gates_text(logs):
    """The share of positives whose gate is open, percent, in each quarter of a run, as Markdown, or None."""
    rows = []
    for title, runs in logs.items():
        quarters = [[] for _ in range(4)]
        for log in runs:
            last, each = max((line["step"] for line in log), default=0), [[] for _ in range(4)]
            for line in log:
                if "gate_open" in line:
                    each[min(4 * line["step"] // (last + 1), 3)].append(100 * line["gate_open"])
            for values, mine in zip(quarters, each, strict=True):
                values += [mean(mine)] if mine else []
        if any(quarters):
            rows.append([title, *map(spread, quarters)])
    text = "Positives whose gate is open, percent, in each quarter of a run that asks its teacher:\n\n"
    return text + markdown(["run", "first", "second", "third", "last"], rows) if rows else None


def figures_table(results):
    """The figures of some runs: {title: result.json's dict} -> Markdown."""
    figures = [f for f in ("AP", "AP50", "AP75", "voc07", "voc_area") if any(f in r for r in results.values())]
    rows = [[title, *(r[f] for f in figures), r["epochs"], r["seconds"] / 60] for title, r in results.items()]
    return markdown(["run", *figures, "epochs", "training minutes"], rows)


def spread(values):
    """Figures of several seeds in words: their mean, and their standard deviation if there are two or more; or None."""
    if not values or None in values:
        return None
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def command_of(args, *more):
    """The command line that gives these flags: what differs from the defaults of their data set or recipe.

    Args:
        more: words to end with; seed and output, which the rows of a table do not name, are added so.
    """
    words = ["--student", args.student]
    for name, default in (("dataset", "shapes"), ("detector", "faster-rcnn"), ("recipe", None)):
        words += [f"--{name}", getattr(args, name)] * (getattr(args, name) != default)
    usual = parse(words)
    for action in parser()._actions:
        name, value = action.dest, getattr(args, action.dest, None)
        switched_off = any(name == f"weight_{level}" and getattr(args, f"no_{level}") for level in LEVELS)
        apart = name in ("table", "seeds", "seed", "recipe", "output", "dataset", "detector", "student")
        unused = name in DISTILLATION and not args.teacher
        if apart or unused or switched_off or (action.dest == "decay" and "--no-decay" in action.option_strings):
            continue
        if value is not None and value != getattr(usual, name, None):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [action.option_strings[0], *map(str, values)]
    return "python train.py " + shlex.join([*words, *map(str, more)])


def markdown(header, rows):
    """A Markdown table with aligned columns.

    Args:
        header: list of column titles.
        rows: list of lists of cells; floats are shown with one digit, None as a dash.
    """
    cells = [header, *[[cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def cell(value):
    """A figure with one digit, a dash for none."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def class_table(per_class):
    """Figures by class: {class: {figure: percent or None}} -> Markdown."""
    header = ["class", *next(iter(per_class.values()))]
    return markdown(header, [[name, *row.values()] for name, row in per_class.items()])
