"""Charts as SVG: lines over epochs, steps or recall, inside of the report's page or as a file."""

import html
import math
from statistics import fmean, stdev

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 640, 300, 56, 12, 36, 10  # pixels of a chart and of its margins
NOT_LOSSES = ("lr", "decay", "images_per_second", "epoch", "step", "bad_steps", "positives", "gate_open")
COLOURS = """
:root { --paper: #fff; --ink: #1c1c1c; --pale: #767676; --line: #d8d8d8;
  --c0: #3b62b5; --c1: #d4761c; --c2: #2b8a4b; --c3: #b0306a; --c4: #6d4fb8; --c5: #0f8aa0; --c6: #8a6d1d; --c7: #777; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e6e6; --pale: #9a9a9a; --line: #3a3d44;
  --c0: #86a8f0; --c1: #f0a45c; --c2: #6fcf92; --c3: #f08cb8; --c4: #b49cf0; --c5: #6ccbdd; --c6: #d8bd6a; --c7: #aaa; }
}
"""
STYLE = "svg { background: var(--paper); } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }"


def training_charts(runs):
    """Charts of the logs of some runs, as HTML: AP of all; of each loss terms, learning rate, decay and gate."""
    measured = {run.name: [(x["epoch"], x["metrics"]["AP"]) for x in run.log if "metrics" in x] for run in runs}
    charts = [figure(f"AP on the {runs[0].result['split']} split", measured, "epoch", "AP, percent")]
    for run in runs:
        logged = {}
        for line in (line for line in run.log if "lr" in line):
            for name, value in line.items():
                logged.setdefault(name, []).append((line["step"], value))
        terms = {name: row for name, row in logged.items() if name not in NOT_LOSSES}
        for title, distilled in (("loss terms", False), ("distillation terms, before their weights", True)):
            some = {name: row for name, row in terms.items() if name.startswith("distill_") is distilled}
            charts.append(figure(f"{run.name}: {title}", some, "step", "mean of the steps since the last line"))
        rates = logged.get("lr", [])
        highest = max((rate for _, rate in rates), default=0) or 1.0
        shares = {f"learning rate / {highest:.2g}": [(step, rate / highest) for step, rate in rates]}
        shares["decay of the distillation"] = logged.get("decay", []) if run.settings.get("teacher") else []
        shares["positives whose gate is open"] = logged.get("gate_open", [])
        charts.append(figure(f"{run.name}: learning rate, decay, gate", shares, "step", "share"))
    return f'<div class="charts">{"".join(charts)}</div>'


def recall_chart(curves):
    """Precision over recall. curves: {run: {IoU: 101 precisions in 0..1, the mean of the classes}}."""
    series = {}
    for name, rows in curves.items():
        series |= {f"{name}, IoU {iou:g}": [(i / 100, p) for i, p in enumerate(row)] for iou, row in rows.items()}
    return figure("Precision over recall, mean of the classes", series, "recall", "precision")


def curves_picture(title, y_name, curves):
    """The curves of a table's rows as the text of an SVG file: means, and a standard deviation to either side.

    Args:
        curves: {title of a row: {epoch: figures of its seeds, percent}}.
    """
    lines, bands = {}, {}
    for row, curve in curves.items():
        sides = [(x, fmean(v), stdev(v) if len(v) > 1 else 0.0) for x, v in sorted(curve.items())]
        lines[row] = [(x, y) for x, y, _ in sides]
        bands[row] = [(x, y - s) for x, y, s in sides] + [(x, y + s) for x, y, s in reversed(sides)]
    return chart(title, lines, "epoch", y_name, bands, f"<style>{COLOURS}{STYLE}</style>") + "\n"


def figure(title, *what):
    """A chart and its title as HTML; arguments as chart()."""
    svg = chart(title, *what)
    return svg and f"<figure><h3>{html.escape(title)}</h3>{svg}</figure>"


def chart(title, series, x_name, y_name, bands=None, style=""):
    """Lines with axes and a key as SVG; "" where there is nothing to draw.

    Args:
        series: {name: list of (x, y)}; values that are not finite are left out, long lines are shortened.
        bands: {name: corners of an area in the colour of the line}.
        style: an element <style>, where no page gives the colours.
    """
    series = {name: [(x, y) for x, y in row if y is not None and math.isfinite(y)] for name, row in series.items()}
    series = {name: shortened(row) for name, row in series.items() if row}
    if not series:
        return ""
    marks, y = axes_and_lines(series, x_name, y_name, bands or {}), HEIGHT
    for i, name in enumerate(series):
        y = HEIGHT + 14 + 18 * i
        marks += f'<rect x="{LEFT}" y="{y - 6}" width="18" height="4" fill="var(--c{i % 8})"/>'
        marks += f'<text x="{LEFT + 26}" y="{y}">{html.escape(name)}</text>'
    size = f'viewBox="0 0 {WIDTH} {y + 12}" width="{WIDTH}" height="{y + 12}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return f"{head}<title>{html.escape(title)}</title>{style}{marks}</svg>"


def axes_and_lines(series, x_name, y_name, bands):
    """The lines and axes of chart(); the y axis begins at 0, or at the lowest value below it."""
    xs, ys = ([p[axis] for row in (*series.values(), *bands.values()) for p in row] for axis in (0, 1))
    low_x, low_y = min(xs), min(0.0, *ys)
    high_x, high_y = (high if high > low else low + 1.0 for low, high in ((low_x, max(xs)), (low_y, max(ys))))

    def at(x, y):
        across, up = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    def points(row):
        return " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in row)

    marks, (left, bottom), (right, _) = [], at(low_x, low_y), at(high_x, low_y)
    for y, down in ((y, at(low_x, y)[1]) for y in ticks(low_y, high_y)):
        marks.append(f'<line x1="{left}" y1="{down:.1f}" x2="{right}" y2="{down:.1f}" stroke="var(--line)"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(low_x, high_x, whole=x_name in ("epoch", "step")):
        marks.append(f'<text x="{at(x, low_y)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    marks.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_name)}</text>')
    place = f'transform="translate(12 {(HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
    marks.append(f"<text {place}>{html.escape(y_name)}</text>")
    for i, (name, row) in enumerate(series.items()):
        colour, band = f"var(--c{i % 8})", points(bands.get(name, ()))
        marks += [f'<polygon points="{band}" fill="{colour}" opacity="0.2"/>'] if band else []
        marks.append(f'<polyline points="{points(row)}" fill="none" stroke="{colour}" stroke-width="1.7"/>')
        for x, y in (at(*point) for point in row if len(row) <= 24):
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    return "".join(marks)


def ticks(low, high, count=5, whole=False):
    """About `count` round numbers from low to high, or whole numbers only."""
    raw = (high - low) / count or 1.0
    size = 10 ** math.floor(math.log10(raw))
    step = max(next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999), float(whole))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def shortened(row, most=120):
    """Means of neighbouring points, so that there are no more than `most`."""
    width = -(-len(row) // most)
    groups = [row[i : i + width] for i in range(0, len(row), width)]
    return [tuple(fmean(values) for values in zip(*group, strict=True)) for group in groups]
