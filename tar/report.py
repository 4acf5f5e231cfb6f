"""A run, or several, on one page: an HTML file that needs nothing else and opens from disk."""

import base64
import html
import io
import math
from statistics import fmean, stdev

from tar.compare import FIGURES
from tar.pictures import few_colours
from tar.tabulation import cell

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 300, 56, 36, 10  # pixels of a plot
NOT_LOSSES = ("lr", "decay", "images_per_second", "epoch", "step", "bad_steps", "positives", "gate_open")
COLOURS = """
:root { --paper: #fff; --ink: #1c1c1c; --pale: #767676; --line: #d8d8d8;
  --c0: #3b62b5; --c1: #d4761c; --c2: #2b8a4b; --c3: #b0306a; --c4: #6d4fb8; --c5: #0f8aa0; --c6: #8a6d1d; --c7: #777; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e6e6; --pale: #9a9a9a; --line: #3a3d44;
  --c0: #86a8f0; --c1: #f0a45c; --c2: #6fcf92; --c3: #f08cb8; --c4: #b49cf0; --c5: #6ccbdd; --c6: #d8bd6a; --c7: #aaa; }
}
"""
STYLE = """
@media print { :root { --paper: #fff; --ink: #000; --pale: #555; --line: #ccc; }
  figure, table { break-inside: avoid; } h2, h3 { break-after: avoid; } .plots { grid-template-columns: 1fr 1fr; }
  .wide, pre { overflow: visible !important; } pre { white-space: pre-wrap !important; font-size: .7rem; }
  table { font-size: .7rem !important; } td, th { padding: .1rem .3rem !important; } }
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1240px; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .15rem .5rem; text-align: right;
  border-bottom: 1px solid var(--line); white-space: nowrap; } th { white-space: normal; }
td:first-child, th:first-child { text-align: left; }
pre { background: color-mix(in srgb, var(--ink) 7%, var(--paper)); padding: .6rem; overflow-x: auto; }
svg { width: 100%; max-width: 640px; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { color: var(--pale); font-size: .85rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.key i { display: inline-block; width: 1.1em; height: .25em; vertical-align: middle; margin-right: .3em; }
img { max-width: 100%; height: auto; background: #fff; } .note { color: var(--pale); }
"""


def page(title, sections):
    """The HTML text. sections: list of (heading, HTML)."""
    body = "".join(f"<section><h2>{html.escape(head)}</h2>{text}</section>\n" for head, text in sections)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<link rel="icon" href="data:,">'
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{COLOURS}{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def table(header, rows):
    """A table as HTML; cells as tar.tabulation.cell writes them."""
    head = "".join(f"<th>{html.escape(str(h))}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def ticks(low, high, count=5, whole=False):
    """Round numbers from low to high, about count of them; whole ones only, if so wished."""
    raw = (high - low) / count or 1.0
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(title, series, x_name, y_name, y_from_0=True):
    """Lines as inline SVG, with their key.

    Args:
        series: {name: list of (x, y)}; values that are not finite are left out.
    """
    series = {name: [(x, y) for x, y in row if y is not None and math.isfinite(y)] for name, row in series.items()}
    series = {name: row for name, row in series.items() if row}
    if not series:
        return ""
    key = "".join(
        f'<span><i style="background: var(--c{i % 8})"></i>{html.escape(n)}</span>' for i, n in enumerate(series)
    )
    marks = axes_and_lines(series, x_name, y_name, y_from_0)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{marks}</svg>'
    return f'<figure><h3>{html.escape(title)}</h3>{svg}<div class="key">{key}</div></figure>'


def curves_picture(title, y_name, curves):
    """The curves of a table's rows as an SVG file's text: the means, and a standard deviation to either side.

    Args:
        curves: {title of a row: {epoch: figures of its seeds, percent}}, as tar.tabulation.curves_of() returns them.
    """
    lines, bands = {}, {}
    for row, curve in curves.items():
        sides = [(x, fmean(v), stdev(v) if len(v) > 1 else 0.0) for x, v in sorted(curve.items())]
        lines[row] = [(x, y) for x, y, _ in sides]
        bands[row] = [(x, y - s) for x, y, s in sides] + [(x, y + s) for x, y, s in reversed(sides)]
    marks, y = axes_and_lines(lines, "epoch", y_name, bands=bands), HEIGHT
    for i, row in enumerate(lines):
        y = HEIGHT + 14 + 18 * i
        marks += f'<rect x="{LEFT}" y="{y - 6}" width="18" height="4" fill="var(--c{i % 8})"/>'
        marks += f'<text x="{LEFT + 26}" y="{y}">{html.escape(row)}</text>'
    style = (
        f"{COLOURS}svg {{ background: var(--paper); }} text {{ fill: var(--ink); font: 12px system-ui, sans-serif; }}"
    )
    head = f"<title>{html.escape(title)}</title><style>{style}</style>"
    size = f'viewBox="0 0 {WIDTH} {y + 12}" width="{WIDTH}" height="{y + 12}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{head}{marks}</svg>\n'


def axes_and_lines(series, x_name, y_name, y_from_0=True, bands=None):
    """What is inside of a plot's <svg>.

    Args:
        series: {name: list of (x, y)}, finite, none empty.
        bands: {name: corners of the area to shade in its colour}.
    """
    bands = bands or {}
    xs, ys = ([p[axis] for row in (*series.values(), *bands.values()) for p in row] for axis in (0, 1))
    low_x, high_x, high_y = min(xs), max(xs), max(ys)
    low_y = min(0.0, *ys) if y_from_0 else min(ys)
    high_x, high_y = (high if high > low else low + 1.0 for low, high in ((low_x, high_x), (low_y, high_y)))

    def at(x, y):
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - 12)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - BOTTOM - TOP):.1f}"

    marks = []
    for y in ticks(low_y, high_y):
        (x0, y0), x1 = at(low_x, y).split(","), at(high_x, y).split(",")[0]
        marks.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}" stroke="var(--line)"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{float(y0) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(low_x, high_x, whole=x_name in ("epoch", "step")):
        across = at(x, low_y).split(",")[0]
        marks.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    marks.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_name)}</text>')
    middle = (HEIGHT - BOTTOM) / 2
    place = f'x="12" y="{middle}" transform="rotate(-90 12 {middle})" text-anchor="middle"'
    marks.append(f"<text {place}>{html.escape(y_name)}</text>")
    for i, (name, row) in enumerate(series.items()):
        points = " ".join(at(x, y) for x, y in row)
        if name in bands:
            area = " ".join(at(x, y) for x, y in bands[name])
            marks.append(f'<polygon points="{area}" fill="var(--c{i % 8})" opacity="0.2"/>')
        marks.append(f'<polyline points="{points}" fill="none" stroke="var(--c{i % 8})" stroke-width="1.7"/>')
        for point in row if len(row) <= 24 else ():
            x, y = at(*point).split(",")
            marks.append(f'<circle cx="{x}" cy="{y}" r="3" fill="var(--c{i % 8})"/>')
    return "".join(marks)


def smooth(row, most=120):
    """A long line's means of neighbours, no more than `most` points."""
    width = -(-len(row) // most)
    groups = [row[i : i + width] for i in range(0, len(row), width)]
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]


def curves(runs):
    """Plots of what the runs logged: loss terms, learning rate and decay of each; their AP together."""
    plots = []
    for run in runs:
        steps = [line for line in run.log if "lr" in line]
        terms = {name: None for line in steps for name in line if name not in NOT_LOSSES}
        rows = {name: smooth([(line["step"], line[name]) for line in steps if name in line]) for name in terms}
        for title, taught in (("loss terms", False), ("distillation terms, before their weights", True)):
            some = {name: row for name, row in rows.items() if name.startswith("distill_") == taught}
            plots.append(plot(f"{run.name}: {title}", some, "step", "mean of the steps since the last line"))
        top = max(line["lr"] for line in steps) if steps else 0
        if top:
            rate = {f"learning rate / {top:.2g}": [(line["step"], line["lr"] / top) for line in steps]}
            if any("decay" in line and line["decay"] for line in steps):
                rate["decay of the distillation"] = [(line["step"], line["decay"]) for line in steps]
            gates = [(line["step"], line["gate_open"]) for line in steps if "gate_open" in line]
            if gates:
                rate["positives whose gate is open"] = smooth(gates)
            plots.append(plot(f"{run.name}: learning rate, decay, gate", rate, "step", "share"))
    measured = {run.name: [(x["epoch"], x["metrics"]["AP"]) for x in run.log if "metrics" in x] for run in runs}
    plots.insert(0, plot(f"AP on the {runs[0].result['split']} split", measured, "epoch", "AP, percent"))
    return f'<div class="plots">{"".join(filter(None, plots))}</div>'


def recall_plot(curves_of_runs):
    """Precision over recall. curves_of_runs: {run: {IoU: list of 101 precisions in 0..1, the mean of the classes}}."""
    series = {}
    for name, rows in curves_of_runs.items():
        series |= {f"{name}, IoU {iou:g}": [(i / 100, p) for i, p in enumerate(row)] for iou, row in rows.items()}
    return plot("Precision over recall, mean of the classes", series, "recall", "precision")


def results_table(runs):
    names = [name for name in FIGURES if any(name in run.result for run in runs)]
    rows = []
    for run in runs:
        r = run.result
        row = [run.name, *(r.get(name) for name in names), r["parameters"] / 1e6, r["epochs"], r["seconds"] / 60]
        rows.append([*row, r["ms_per_image"]])
    return table(["run", *names, "parameters (M)", "epochs", "training minutes", "ms an image"], rows)


def class_table(runs):
    """AP of each class."""
    classes = {name: None for run in runs for name in run.result["per_class"]}
    rows = [[name, *(run.result["per_class"].get(name, {}).get("AP") for run in runs)] for name in classes]
    return table(["class (AP)", *(run.name for run in runs)], rows)


def settings_table(runs):
    """Settings and environment, those that are equal in all runs once."""
    each = [{**run.settings, **run.result.get("environment", {})} for run in runs]
    names = {name: None for one in each for name in one}
    shown = [[name, *(_word(one.get(name)) for one in each)] for name in names]
    return table(["setting", *(run.name for run in runs)], shown)


def _word(value):
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def picture(image, caption):
    """A picture of PIL inside the page."""
    file = io.BytesIO()
    few_colours(image).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def preformatted(text):
    return f'<div class="wide"><pre>{html.escape(text)}</pre></div>'
