"""The paper's tables: which runs make the rows, and in which order they are trained."""

import math
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from tar import UserError, checkpoint
from tar.options import DISTILLATION, LEVELS, TABLE_DATASETS, complaint, parse, parser
from tar.recipes import RECIPES
from tar.runs import changed, teacher_of
from tar.tabulation import DISTILLED, EQUAL, PLAIN, TEACHER, table_text

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
    "answers": (
        ("student, no distillation", PLAIN, None),
        *(
            (f"{name} level, the {answers}'s answers", {**only(level), **CONSTANT, "answers": answers}, None)
            for level, name in (("cls", "classification"), ("reg", "regression"))
            for answers in ("teacher", "truth")
        ),
        ("classification level, smoothed labels", {**only("cls"), **CONSTANT, "answers": "smoothed"}, None),
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
    whole: bool = False  # whether it is the whole method, and not a part of it
    teacher_row: str = None  # title of its teacher's row, where it is the whole method
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
            Row(title, DISTILLED, changes=taught, folder="tar", whole=True, teacher_row=f"teacher {args.teacher}"),
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
            row.whole, row.teacher_row = True, titles.get(row.changes.get("teacher"))
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
    whole = [row for row in distilled if row.whole] or distilled  # what equal cost is equal to
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
