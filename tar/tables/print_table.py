"""How a table is printed: means and deviations, gains of runs of the same seed, the verdict, curves and gates.

A table is what run_table() saves: {"table", "dataset", "detector", "split", "test_images", "papers", "rows"}. A row is
{"title", "kind", "command", "paper", "whole", "teacher_row", "runs"}, a run what run_table.summary_of() returns.
"""

import math
from statistics import mean, stdev

from tar import UserError
from tar.evaluation.markdown import markdown, spread
from tar.training.run_folder import read_json

PLAIN, TEACHER, DISTILLED, EQUAL = "plain", "teacher", "distilled", "equal cost"  # kinds of rows
FIGURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "voc07": "VOC07 mAP", "voc_area": "VOC area mAP"}


def read_table(file):
    """A table from its file; UserError if the file holds none."""
    table = read_json(file)
    if not isinstance(table, dict) or not {"rows", "split"} <= table.keys():
        raise UserError(f"{file}: not a table of train.py --table")
    return table


def main_figure(dataset):
    """The figure in which gains are counted, and its title."""
    return ("voc07", "VOC07 mAP") if dataset == "voc" else ("AP", "AP")


def table_text(table):
    """A table as Markdown; under it whether students pass their teachers, each row's curve, gate and command.

    Gains are differences of runs of the same seed. A gain over equal cost is shown where a plain row costs as much.
    """
    rows, (main, main_title) = table["rows"], main_figure(table["dataset"])
    plain = _plain(rows)
    papers = bool(table["papers"] and any(row["paper"] for row in rows))
    figures = [figure for figure in FIGURES if table["dataset"] == "voc" or "voc" not in figure]
    header = ["run", *(FIGURES[figure] for figure in figures), "gain", "over equal cost", *["paper"] * papers]
    header += ["cost", "parameters (M)", "epochs", "training minutes", "ms an image"]
    lines, verdicts = [], []
    for row in rows:
        runs, distilled, equal = row["runs"], row["kind"] == DISTILLED, _equal_cost(row["runs"], rows)
        line = [row["title"], *(spread([run[figure] for run in runs]) for figure in figures)]
        line += [None if row["kind"] == PLAIN else gain(runs, plain, main)]
        line += [gain(runs, equal, main) if distilled else None, *[row["paper"]] * papers]
        if runs:
            line += [f"{_cost(runs):.2f}" if distilled else None, runs[0]["parameters"] / 1e6, runs[0]["epochs"]]
            line += [mean(run["seconds"] for run in runs) / 60, mean(run["ms_per_image"] for run in runs)]
        lines.append(line + [None] * (len(header) - len(line)))
        if row["whole"] and runs:
            several = [other["teacher_row"] for other in rows if other["whole"]].count(row["teacher_row"]) > 1
            text = [f"{row['title']}:"] * several
            text += [verdict(runs, _teacher(row, rows), table["dataset"], row["teacher_row"])]
            for which, others in (("the same epochs", plain), ("equal cost", equal)):
                gains = [f"{gain(runs, others, f)} {FIGURES[f]}" for f in (main, "AP50") if gain(runs, others, f)]
                text += [f"Over the plain student of {which}: {', '.join(gains)}."] if gains else []
            verdicts.append(" ".join(filter(None, text)))
    counts = {len(row["runs"]) for row in rows if row["runs"]}
    if max(counts, default=0) > 1:
        seeds = f"mean ± standard deviation of {'up to ' * (len(counts) > 1)}{max(counts)} seeds"
    else:
        seeds = "one seed" if counts else "no run has ended"
    about = f"{table['test_images']} test images of {table['dataset']}, {table['detector']}; {seeds}"
    about += f"; gains are in {main_title}, seed by seed, over the plain student of the same epochs "
    about += "and over that of equal cost; cost: of a plain training of the same epochs."
    commands = "\n".join(f"{row['title']}:\n    {row['command']}" for row in rows if row["command"])
    parts = [about, table.get("note"), markdown(header, lines), *verdicts, curves_text(table), gates_text(rows)]
    return "\n\n".join(filter(None, [*parts, commands]))


def classes_text(table):
    """A table's figures class by class as Markdown, and what the whole method gains there; None before any run."""
    figures = {"AP": "AP", "AP50": "AP50"} | ({"voc07": "VOC07 AP"} if table["dataset"] == "voc" else {})
    rows = [row for row in table["rows"] if row["runs"]]
    return "\n\n".join(f"{t} of each class:\n\n{_classes(f, rows)}" for f, t in figures.items()) if rows else None


def _classes(figure, rows):
    header, lines = ["class", *(row["title"] for row in rows)], {}
    for row in rows:
        versus = {"teacher": _teacher(row, rows), "plain": _plain(rows), "equal cost": _equal_cost(row["runs"], rows)}
        versus = versus if row["whole"] else {}
        header += [f"{row['title']}: over {name}" for name in versus]
        for name in row["runs"][0]["per_class"]:
            means, gains = lines.setdefault(name, ([], []))
            runs = _of_class(row["runs"], name)
            means.append(spread([run[figure] for run in runs]))
            gains += [gain(runs, _of_class(others, name), figure) for others in versus.values()]
    return markdown(header, [[name, *means, *gains] for name, (means, gains) in lines.items()])


def _of_class(runs, name):
    return [{"seed": run["seed"], **run["per_class"][name]} for run in runs]


def _cost(runs):
    return mean(run["cost"] for run in runs)


def _plain(rows):
    return next((row["runs"] for row in rows if row["kind"] == PLAIN), [])


def _teacher(row, rows):
    return next((other["runs"] for other in rows if other["title"] == row["teacher_row"]), [])


def _equal_cost(runs, rows):
    """The shortest plain runs that cost as much as these, or more, and are longer than the plain row; or none."""
    plain = _plain(rows)
    if not plain or not runs:
        return []
    least = max(math.ceil(plain[0]["epochs"] * _cost(runs) - 1e-9), plain[0]["epochs"] + 1)
    equal = [row["runs"] for row in rows if row["kind"] == EQUAL and row["runs"]]
    longer = [runs for runs in equal if runs[0]["epochs"] >= least]
    return min(longer, key=lambda runs: runs[0]["epochs"], default=[])


def _pairs(runs, others, figure):
    """A figure of runs and of others of the same seeds, where both have it."""
    of_seed = {run["seed"]: run[figure] for run in others}
    pairs = [(run[figure], of_seed.get(run["seed"])) for run in runs]
    return [pair for pair in pairs if None not in pair]


def gain(runs, others, figure):
    """How much higher runs end than others of the same seeds, in words; None if no seed has both."""
    gains = [one - other for one, other in _pairs(runs, others, figure)]
    return f"{mean(gains):+.1f}" + (f" ± {stdev(gains):.1f}" if len(gains) > 1 else "") if gains else None


def verdict(students, teachers, dataset, teacher):
    """Whether students pass their teachers (runs of the row titled `teacher`), in words; None if no seed has both."""
    figure, title = main_figure(dataset)
    pairs = _pairs(students, teachers, figure)
    if not pairs:
        return None
    student, other = (mean(column) for column in zip(*pairs, strict=True))
    text = f"{student:.1f} {title} against {other:.1f}"
    if len(pairs) > 1:
        above = sum(s > t for s, t in pairs)
        text += f", {gain(students, teachers, figure)}, above in {above} of {len(pairs)} seeds"
    verb = "equals" if abs(student - other) < 0.05 else "passes" if student > other else "does not pass"
    return f"The student {verb} its {teacher}: {text}."


def curves_of(table, figure):
    """A figure at each evaluation: {title of a row that has any: {epoch: figures of its seeds, percent}}."""
    curves = {}
    for row in table["rows"]:
        for run in row["runs"]:
            for epoch, figures in run["curve"]:
                if figures.get(figure) is not None:  # no ground truth, no figure
                    curves.setdefault(row["title"], {}).setdefault(epoch, []).append(figures[figure])
    return curves


def curves_text(table):
    """The curves of a table's rows as Markdown, or None where no run has two evaluations."""
    figure, title = main_figure(table["dataset"])
    curves = curves_of(table, figure)
    epochs = sorted({epoch for curve in curves.values() for epoch in curve})
    if all(len(curve) < 2 for curve in curves.values()):
        return None
    rows = [[row, *(spread(curve.get(epoch)) for epoch in epochs)] for row, curve in curves.items()]
    return f"{title} after so many epochs:\n\n" + markdown(["run", *map(str, epochs)], rows)


def gates_text(rows):
    """How much the gate of the regression level lets through in each quarter of a run, as Markdown, or None."""
    lines = []
    for row in rows:
        gates = [run["gate"] for run in row["runs"] if run["gate"]]
        if gates:
            quarters = ([v for v in quarter if v is not None] for quarter in zip(*gates, strict=True))
            lines.append([row["title"], *map(spread, quarters)])
    text = (
        "Positives that the regression gate lets through, percent, by quarter of a run (-: the teacher was not used):"
    )
    return f"{text}\n\n" + markdown(["run", "first", "second", "third", "last"], lines) if lines else None
