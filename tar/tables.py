"""Result tables as Markdown."""


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


def run_table(results):
    """The table of some runs: {name: result.json's dict} -> Markdown."""
    voc = any("voc07" in r for r in results.values())
    header = ["run", "AP", "AP50", "AP75", *(["VOC07 mAP", "VOC area mAP"] if voc else [])]
    header += ["parameters (M)", "epochs", "training minutes", "ms an image"]
    rows = []
    for name, r in results.items():
        row = [name, r["AP"], r["AP50"], r["AP75"], *([r["voc07"], r["voc_area"]] if voc else [])]
        rows.append([*row, r["parameters"] / 1e6, r["epochs"], r["seconds"] / 60, r["ms_per_image"]])
    return markdown(header, rows)


def class_table(per_class):
    """Figures by class: {class: {figure: percent or None}} -> Markdown."""
    header = ["class", *next(iter(per_class.values()))]
    return markdown(header, [[name, *row.values()] for name, row in per_class.items()])
