"""The paper's tables: their rows, the flags of each row, and the command that trains it."""

import shlex
from dataclasses import dataclass, field

from tar.tables.print_table import DISTILLED, EQUAL, PLAIN, TEACHER
from tar.training.flags import DISTILLATION, LEVELS, parse
from tar.training.run_folder import changed, teacher_of

CONSTANT = {"decay": "none", "decay_end": 1.0}  # flags of a row without decay


def only(*kept):
    """Flags of a row that keeps some of the three levels."""
    off = [name for name in LEVELS if name not in kept]
    return {f"no_{name}": True for name in off} | {f"weight_{name}": 0.0 for name in off}


def variants(title, flag, values, others):
    """A distilled row for each value of a flag."""
    return [(title.format(value), DISTILLED, {**others, flag: value}) for value in values]


def with_teacher(backbone, paper=None, teachers_paper=None):
    """A row of the whole method with another teacher, and this teacher's row."""
    flags = {"teacher": backbone}
    return [(f"TAR from {backbone}", DISTILLED, flags, paper), (f"teacher {backbone}", TEACHER, flags, teachers_paper)]


# Rows are (title, kind, flags that are not the table's, the paper's figure); a missing end: no such flags, no figure.
PLAIN_ROW, TEACHER_ROW = ("student, no distillation", PLAIN), ("teacher", TEACHER)
LEVEL_ROWS = [
    (*PLAIN_ROW, {}, 70.0),
    ("+ backbone level (Gaussian mask)", DISTILLED, {**only("backbone"), **CONSTANT}, 72.4),
    ("+ classification level", DISTILLED, {**only("cls"), **CONSTANT}, 73.2),
    ("+ regression level", DISTILLED, {**only("reg"), **CONSTANT}, 73.4),
    ("all three levels, no decay", DISTILLED, CONSTANT, 73.8),
    ("all three levels, decay", DISTILLED, {}, 74.5),
    (*TEACHER_ROW, {}, 74.3),
]
COCO_ROWS = [(*PLAIN_ROW, {}, 36.3), *with_teacher("r101", 39.0, 38.5), *with_teacher("r152", 39.9)]
LARGER_TEACHERS = [row for backbone in ("r18", "r34", "r50", "r101") for row in with_teacher(backbone)]
BETWEEN = {  # rows between the plain student's and the teacher's
    "retinanet": [("TAR", DISTILLED, {}, "+2.3")],
    "claim": [("TAR", DISTILLED)],
    "masks": variants("backbone level, {} mask", "mask", ("gaussian", "box", "full", "fine-grained"), only("backbone")),
    "decay": variants("all three levels, decay {}", "decay", ("linear", "cosine", "step", "none"), {"decay_end": 1.0}),
    "gates": [
        *variants("regression level, gate {}", "reg_gate", ("proposal", "student", "none"), only("reg")),
        *variants("classification level, gate {}", "cls_gate", ("none", "better"), only("cls")),
        ("classification level, all regions", DISTILLED, {**only("cls"), "soft_labels": "all"}),
    ],
    "proposals": [
        *variants("both heads' levels, {} proposals", "proposals", ("student", "teacher", "both"), only("cls", "reg")),
        ("both heads' levels, no sharing", DISTILLED, {**only("cls", "reg"), "no_sharing": True}),
    ],
}
ROWS = {name: [PLAIN_ROW, *rows, TEACHER_ROW] for name, rows in BETWEEN.items()}
ROWS |= {"shapes": LEVEL_ROWS, "voc": LEVEL_ROWS, "coco": COCO_ROWS, "teachers": [PLAIN_ROW, *LARGER_TEACHERS]}


@dataclass
class Row:
    """A row of a table: what it trains, and its runs."""

    title: str
    kind: str
    changes: dict = field(default_factory=dict)  # flags that are not the table's
    paper: object = None  # its figure in the paper, or the gain
    folder: str = None  # of its run, where it is not named by its settings
    whole: bool = False  # the whole method, and not a part of it
    teacher_row: str = None  # title of the teacher's row, of a row of the whole method
    command: str = ""
    runs: list = field(default_factory=list)  # one a seed, as run_table.summary_of() returns them

    def flags(self, args):
        """The flags of the row's runs, but for the seed, and the epochs of a row of equal cost."""
        args = changed(args, **self.changes)
        args = teacher_of(args) if self.kind == TEACHER else args
        return args if self.kind == DISTILLED else changed(args, teacher=None, teacher_weights=None)


def rows_of(args, parent):
    """The rows of the table that the flags name, in its order; without --table those of the demonstration."""
    if args.table:
        rows = [*(Row(*row) for row in ROWS[args.table]), Row("student, equal cost", EQUAL)]
        if args.teacher_weights:  # trained elsewhere
            rows = [row for row in rows if row.kind != TEACHER]
    else:
        plain, trained = f"plain {args.student}", {"teacher_weights": parent / "teacher/last.pth", "teacher_epochs": 0}
        rows = [
            Row(f"teacher {args.teacher}", TEACHER, folder="teacher"),
            Row(plain, PLAIN, folder="plain"),
            Row(f"TAR {args.student} from {args.teacher}", DISTILLED, trained, folder="tar"),
            Row(f"{plain}, equal cost", EQUAL, folder="plain-equal-cost"),
        ]
    titles = {row.changes.get("teacher"): row.title for row in rows if row.kind == TEACHER}
    for row in rows:
        if row.kind == DISTILLED and row.changes.keys() <= {"teacher", "teacher_weights", "teacher_epochs"}:
            row.whole, row.teacher_row = True, titles.get(row.changes.get("teacher"))
    return rows


def command_of(args):
    """The command line that gives these flags, but for seed and output: what differs from their recipe's defaults."""
    words = ["--student", args.student]
    for name, default in (("dataset", "shapes"), ("detector", "faster-rcnn"), ("recipe", None)):
        words += [f"--{name}", getattr(args, name)] * (getattr(args, name) != default)
    before = vars(parse(words))
    first = ["backbone_weights", "optimizer", *(("backbone_norm", "decay") if args.teacher else ())]
    for name in first:  # other flags' defaults hang on these
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))] * (getattr(args, name) != before[name])
    words += ["--teacher", args.teacher] if args.teacher else []
    apart = {*first, "teacher", "table", "seeds", "seed", "recipe", "output", "dataset", "detector", "student"}
    apart |= {f"weight_{level}" for level in LEVELS if getattr(args, f"no_{level}")}  # --no-LEVEL says it
    apart |= set() if args.teacher else {*DISTILLATION, *(f"no_{level}" for level in LEVELS)}
    for name, usual in vars(parse(words)).items():
        value = getattr(args, name)
        if name not in apart and value not in (None, usual):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return "python train.py " + shlex.join(words)
