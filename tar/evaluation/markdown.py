"""Tables in Markdown: of any cells, of the figures of runs; a mean with its deviation."""

from statistics import mean, stdev


def figures_table(results):
    """A table of the figures of some runs: {title: result.json's dict} -> Markdown."""
    figures = [f for f in ("AP", "AP50", "AP75", "voc07", "voc_area") if any(f in r for r in results.values())]
    rows = [[title, *(r[f] for f in figures), r["epochs"], r["seconds"] / 60] for title, r in results.items()]
    return markdown(["run", *figures, "epochs", "training minutes"], rows)


def rows_table(rows):
    """A Markdown table of {column: cell} of each row; a column that a row lacks has a dash there."""
    columns = {column: None for row in rows for column in row}  # in order
    return markdown(list(columns), [[row.get(column) for column in columns] for row in rows])


def spread(values, sign=""):
    """Figures of several seeds as text: the mean (sign "+": with its sign), and the standard deviation of two or more.

    None if there is none, or one is missing.
    """
    if not values or None in values:
        return None
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown(header, rows):
    """A Markdown table with aligned columns; rows: lists of cells."""
    cells = [header, *[list(map(cell, row)) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def cell(value):
    """A cell's text: floats with one digit, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
