"""How a table is printed: means and deviations, gains of runs of the same seed, curves and gates.

A table is what run_table() saves: {"table", "dataset", "detector", "split", "test_images", "papers", "rows"}. A row is
{"title", "kind", "command", "paper", "whole", "teacher_row", "runs"}, a run what run_table.summary_of() returns.
"""

import math
from statistics import mean

from tar import UserError
from tar.evaluation.markdown import cell, markdown, rows_table, spread
from tar.training.run_folder import read_json

PLAIN, TEACHER, DISTILLED, EQUAL = "plain", "teacher", "distilled", "equal cost"  # kinds of rows
FIGURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "voc07": "VOC07 mAP", "voc_area": "VOC area mAP"}


def read_table(file):
    """A table from its file; UserError if the file holds none."""
    table = read_json(file)
    if not isinstance(table, dict) or not {"rows", "split", "dataset", "detector", "papers"} <= table.keys():
        raise UserError(f"{file}: not a table of train.py --table")
    return table


def table_text(table):
    """A table as Markdown, with each row's curve and command. A row's gains are differences of runs of one seed."""
    rows, lines, voc = table["rows"], [], table["dataset"] == "voc"
    main = "voc07" if voc else "AP"  # the figure in which gains are counted
    runs_of = {row["title"]: row["runs"] for row in rows}
    plain = next((row["runs"] for row in rows if row["kind"] == PLAIN), [])
    for row in rows:
        runs, distilled = row["runs"], row["kind"] == DISTILLED
        line = {"run": row["title"]}
        line |= {name: spread([run[f] for run in runs]) for f, name in FIGURES.items() if voc or "voc" not in f}
        line["over plain"] = None if row["kind"] == PLAIN else gain(runs, plain, main)
        line["over equal cost"] = gain(runs, _equal_cost(runs, plain, rows), main) if distilled else None
        line["over teacher"] = gain(runs, runs_of.get(row["teacher_row"], []), main)
        line |= {"paper (r50)": row["paper"]} if table["papers"] else {}
        if runs:
            line |= {"cost": f"{_mean('cost', runs):.2f}" if distilled else None, "gate open": _gate(runs)}
            line |= {"parameters (M)": runs[0]["parameters"] / 1e6, "epochs": runs[0]["epochs"]}
            line |= {"training minutes": _mean("seconds", runs) / 60, "ms an image": _mean("ms_per_image", runs)}
        lines.append(line)
    most = max(len(row["runs"]) for row in rows)
    seeds = f"mean ± standard deviation of {most} seeds" if most > 1 else "one seed"
    about = f"""{table["test_images"]} {table["split"]} images of {table["dataset"]}, {table["detector"]}; {seeds}.
Over plain, equal cost, teacher: the gain in {FIGURES[main]} / AP50, seed by seed, over the plain student of the same
epochs, over the plain student that costs as much, over the run's own teacher.
Cost: in plain trainings of the same epochs. Gate open: percent of the positives, by quarter of the run."""
    commands = "\n".join(f"{row['title']}:\n    {row['command']}" for row in rows if row["command"])
    return "\n\n".join(filter(None, [about, table.get("note"), rows_table(lines), _curves(rows, main), commands]))


def gain(runs, others, figure):
    """How much higher runs end than others of the same seeds, in a figure and in AP50; None if no seed has both."""
    of_seed, each = {run["seed"]: run for run in others}, []
    for name in (figure, "AP50"):
        pairs = [(run[name], of_seed[run["seed"]][name]) for run in runs if run["seed"] in of_seed]
        each.append(spread([one - other for one, other in pairs if None not in (one, other)], "+"))
    return " / ".join(each) if all(each) else None


def _mean(name, runs):
    return mean(run[name] for run in runs)


def _equal_cost(runs, plain, rows):
    """The shortest plain runs that cost as much as these, or more, and are longer than the plain row's; or none."""
    if not plain or not runs:
        return []
    least = max(math.ceil(plain[0]["epochs"] * _mean("cost", runs) - 1e-9), plain[0]["epochs"] + 1)
    equal = [row["runs"] for row in rows if row["kind"] == EQUAL and row["runs"] and row["runs"][0]["epochs"] >= least]
    return min(equal, key=lambda runs: runs[0]["epochs"], default=[])


def _gate(runs):
    """The mean of the runs' gates in each quarter; a dash where the teacher was not used; None without a gate."""
    quarters = zip(*(run["gate"] for run in runs if run["gate"]), strict=True)
    return " ".join(cell(None if None in quarter else mean(quarter)) for quarter in quarters) or None


def _curves(rows, figure):
    """A figure at each evaluation, a line a row, as Markdown; None where no run has two evaluations."""
    curves = {}
    for row in rows:
        for epoch, figures in (point for run in row["runs"] for point in run["curve"]):
            curves.setdefault(row["title"], {}).setdefault(epoch, []).append(figures.get(figure))
    if all(len(curve) < 2 for curve in curves.values()):
        return None
    epochs = sorted({epoch for curve in curves.values() for epoch in curve})
    lines = [[title, *(spread(curve.get(epoch)) for epoch in epochs)] for title, curve in curves.items()]
    return f"{FIGURES[figure]} after so many epochs:\n\n" + markdown(["run", *map(str, epochs)], lines)
