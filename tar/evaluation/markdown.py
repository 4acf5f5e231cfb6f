"""Tables in Markdown: of any cells, of the figures of runs, of figures by class; a mean with its deviation."""

from statistics import mean, stdev


def figures_table(results):
    """A table of the figures of some runs: {title: result.json's dict} -> Markdown."""
    figures = [f for f in ("AP", "AP50", "AP75", "voc07", "voc_area") if any(f in r for r in results.values())]
    rows = [[title, *(r[f] for f in figures), r["epochs"], r["seconds"] / 60] for title, r in results.items()]
    return markdown(["run", *figures, "epochs", "training minutes"], rows)


def spread(values):
    """Figures of several seeds as text: the mean, and the standard deviation of two or more; None if one is missing."""
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
    """A cell's text: floats with one digit, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def class_table(per_class):
    """A table of figures by class: {class: {figure: percent or None}} -> Markdown."""
    header = ["class", *next(iter(per_class.values()))]
    return markdown(header, [[name, *row.values()] for name, row in per_class.items()])
