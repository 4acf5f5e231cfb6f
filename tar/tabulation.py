"""How tables are printed: means and deviations, gains of runs of the same seed, the verdict, curves and gates."""

import math
from pathlib import Path
from statistics import fmean, mean, stdev

from tar import UserError
from tar.runs import read_json, read_log

PLAIN, TEACHER, DISTILLED, EQUAL = "plain", "teacher", "distilled", "equal cost"  # kinds of rows


def main_figure(dataset):
    """The figure in which gains are counted, and what it is called."""
    return ("voc07", "VOC07 mAP") if dataset == "voc" else ("AP", "AP")


def table_text(index, parent):
    """A table as Markdown; under it what it says of teacher and student, each row's curve, gate and command.

    Gains are differences of runs of the same seed. One over equal cost is shown of rows that are no dearer than that.

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
    results = results_of(index, parent)
    plain = _of_kind(PLAIN, rows, results)
    header = ["run", *figures.values(), "gain", "over equal cost", *(["paper"] if papers else [])]
    header += ["cost", "parameters (M)", "epochs", "training minutes", "ms an image"]
    lines = []
    for row in rows:
        runs = results[row["title"]]
        line = [row["title"], *(spread([r[f] for r in runs.values()]) for f in figures)]
        line.append(None if row["kind"] == PLAIN else gain(runs, plain, main))
        line.append(gain(runs, _equal_to(runs, rows, results), main) if row["kind"] == DISTILLED else None)
        line += [row["paper"]] if papers else []
        if runs:
            line += [f"{_cost(runs):.2f}" if row["kind"] == DISTILLED else None]
            line += [_first(runs)["parameters"] / 1e6, _first(runs)["epochs"]]
            line += [mean(r["seconds"] for r in runs.values()) / 60, mean(r["ms_per_image"] for r in runs.values())]
        lines.append(line + [None] * (len(header) - len(line)))
    counts = {len(runs) for runs in results.values() if runs}
    about = f"{index['test_images']} test images of {index['dataset']}, {index['detector']}; "
    if max(counts, default=0) > 1:
        about += f"mean ± standard deviation of {'up to ' * (len(counts) > 1)}{max(counts)} seeds"
    else:
        about += "one seed" if counts else "no run has ended"
    about += f"; gains are in {main_title}, seed by seed, over the plain student of the same epochs "
    about += "and over that of equal cost; cost: of a plain training of the same epochs."
    parts = [about, markdown(header, lines)]
    for row in rows:
        runs = results[row["title"]]
        if row.get("whole") and runs:
            text = [verdict(runs, results.get(row["teacher_row"], {}), index["dataset"], row["teacher_row"])]
            for which, others in (("the same epochs", plain), ("equal cost", _equal_to(runs, rows, results))):
                gains = [f"{gain(runs, others, f)} {figures[f]}" for f in (main, "AP50") if gain(runs, others, f)]
                text += [f"Over the plain student of {which}: {', '.join(gains)}."] if gains else []
            parts.append(" ".join(filter(None, text)))
    try:
        logs = logs_of(index, parent)
        parts += [text for text in (curves_text(curves_of(logs, main), main_title), gates_text(logs)) if text]
    except UserError as error:  # the figures do not hang on a log
        parts.append(f"Curves and gates are left out: {error}")
    parts.append("\n".join(f"{row['title']}:\n    {row['command']}" for row in rows if row["command"]))
    return "\n\n".join(filter(None, parts))


def classes_text(index, parent):
    """A table's figures class by class as Markdown, and what the whole method gains there; None before any run.

    Args: as table_text()'s.
    """
    figures = {"AP": "AP", "AP50": "AP50"} | ({"voc07": "VOC07 AP"} if index["dataset"] == "voc" else {})
    results = results_of(index, parent)
    rows = [row for row in index["rows"] if results[row["title"]]]
    tables = [f"{title} of each class:\n\n{_classes_table(figure, rows, results)}" for figure, title in figures.items()]
    return "\n\n".join(tables) if rows else None


def _classes_table(figure, rows, results):
    header, lines = ["class", *(row["title"] for row in rows)], {}
    for row in rows:
        runs = results[row["title"]]
        versus = {"teacher": results.get(row.get("teacher_row"), {}), "plain": _of_kind(PLAIN, rows, results)}
        versus = {**versus, "equal cost": _equal_to(runs, rows, results)} if row.get("whole") else {}
        header += [f"{row['title']}: over {name}" for name in versus]
        for name in _first(runs)["per_class"]:
            line = lines.setdefault(name, ([], []))
            line[0].append(spread([r[figure] for r in _of_class(runs, name).values()]))
            line[1].extend(gain(_of_class(runs, name), _of_class(others, name), figure) for others in versus.values())
    return markdown(header, [[name, *figures, *gains] for name, (figures, gains) in lines.items()])


def results_of(index, parent):
    """{title of a row: {number of the seed: result.json's dict}}; arguments as table_text()."""
    results = {}
    for row in index["rows"]:
        files = {seed: Path(parent) / run / "result.json" for seed, run in enumerate(row["runs"])}
        results[row["title"]] = {seed: read_json(file) for seed, file in files.items() if file.is_file()}
    return results


def logs_of(index, parent):
    """{title of a row: log.jsonl's lines of each seed}; arguments as table_text()."""
    files = {row["title"]: [Path(parent) / run / "log.jsonl" for run in row["runs"]] for row in index["rows"]}
    return {title: [read_log(file) for file in of_row if file.is_file()] for title, of_row in files.items()}


def _first(runs):
    return next(iter(runs.values()))


def _cost(runs):
    return mean(r["cost"] for r in runs.values())


def _of_kind(kind, rows, results):
    return next((results[row["title"]] for row in rows if row["kind"] == kind), {})


def _of_class(runs, name):
    return {seed: run["per_class"][name] for seed, run in runs.items()}


def _equal_to(runs, rows, results):
    """The plain runs that cost as much as these, or more; none if there are none, or if they are plain's own."""
    plain, equal = _of_kind(PLAIN, rows, results), _of_kind(EQUAL, rows, results)
    if not plain or not equal or not runs:
        return {}
    epochs, longest = _first(plain)["epochs"], _first(equal)["epochs"]
    return equal if epochs < longest >= math.ceil(epochs * _cost(runs) - 1e-9) else {}


def _pairs(runs, others, figure):
    """A figure of runs and of others of the same seeds, where both have it."""
    pairs = [(runs[seed][figure], others[seed][figure]) for seed in runs if seed in others]
    return [pair for pair in pairs if None not in pair]


def gain(runs, others, figure):
    """How much higher runs end than others of the same seeds, in words, or None. runs, others: {seed: result}."""
    apart = [one - other for one, other in _pairs(runs, others, figure)]
    return f"{mean(apart):+.1f}" + (f" ± {stdev(apart):.1f}" if len(apart) > 1 else "") if apart else None


def verdict(students, teachers, dataset, teacher):
    """Whether a student passes its teacher, in words, or None if no seed has both.

    Args:
        students, teachers: {seed: result}.
        teacher: title of its row, "teacher" and perhaps which.
    """
    figure, title = main_figure(dataset)
    pairs = _pairs(students, teachers, figure)
    if not pairs:
        return None
    student, other = (mean(column) for column in zip(*pairs, strict=True))
    text = f"{student:.1f} {title} against {other:.1f}"
    if len(pairs) > 1:
        above = sum(s > t for s, t in pairs)
        text += f", {gain(students, teachers, figure)}, above in {above} of {len(pairs)} seeds"
    said = "equals" if abs(student - other) < 0.05 else "passes" if student > other else "does not pass"
    return f"The student {said} its {teacher}: {text}."


def curves_of(logs, figure):
    """A figure at each evaluation: {title of a row: {epoch: figures of its seeds}}; logs as logs_of() returns them."""
    measured = {}
    for row, runs in logs.items():
        for log in runs:
            for line in log:
                if line.get("metrics", {}).get(figure) is not None:  # no ground truth, no figure
                    measured.setdefault(row, {}).setdefault(line["epoch"], []).append(line["metrics"][figure])
    return measured


def curves_text(measured, title):
    """Curves as Markdown, or None where no run has two evaluations.

    Args:
        measured: as curves_of() returns it.
        title: of the figure.
    """
    epochs = sorted({epoch for curve in measured.values() for epoch in curve})
    if all(len(curve) < 2 for curve in measured.values()):
        return None
    rows = [[row, *(spread(curve.get(epoch)) for epoch in epochs)] for row, curve in measured.items()]
    return f"{title} after so many epochs:\n\n" + markdown(["run", *map(str, epochs)], rows)


def gates_text(logs):
    """How much the gate of the regression level lets through in each quarter of a run, as Markdown, or None."""
    rows = []
    for row, runs in logs.items():
        quarters = [[] for _ in range(4)]
        for log in runs:
            steps = [line for line in log if "metrics" not in line]
            before, each = 0, [[] for _ in range(4)]  # a line is the mean of the steps since the line before
            for line in steps:
                if "gate_open" in line:
                    each[4 * before // steps[-1]["step"]].append((100 * line["gate_open"], line["step"] - before))
                before = line["step"]
            for values, mine in zip(quarters, each, strict=True):
                values += [fmean(*zip(*mine, strict=True))] if mine else []  # weighted with the steps
        if any(quarters):
            rows.append([row, *map(spread, quarters)])
    text = (
        "Positives that the regression gate lets through, percent, in each quarter of a run (-: no teacher asked):\n\n"
    )
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
