"""Charts of training logs as SVG inside of HTML."""

import html
import math
from itertools import chain, cycle

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 240, 52, 10, 24  # pixels of the lines' area, and of its margins
COLOURS = ("#3b62b5", "#d4761c", "#2b8a4b", "#b0306a", "#6d4fb8", "#0f8aa0", "#8a6d1d", "#777777")
CHARTS = {  # of a run: title, and how the names of its lines begin in the log
    "losses": ("loss", "classification", "bbox_regression"),
    "learning rate": "lr",
    "distillation losses, before their weights": "distill_",
    "positives whose gate is open": "gate_open",
}


def training_charts(runs):
    """Charts of the logs of some runs, as HTML: the AP of all, then CHARTS of each run."""
    curves, charts = {}, ""
    for run in runs:
        curves[run.name] = [(line["epoch"], line["metrics"]["AP"]) for line in run.log if "metrics" in line]
        for title, start in CHARTS.items():
            wanted = dict.fromkeys(name for name in chain(*run.log) if name.startswith(start))  # in order
            lines = {name: [(line["step"], line[name]) for line in run.log if name in line] for name in wanted}
            charts += chart(f"{run.name}: {title}, over steps", lines)
    return chart("AP, percent, over epochs", curves) + charts


def chart(title, lines):
    """A chart with its title and key as HTML; "" where there is nothing to draw.

    lines: {name: list of (x, y)}; points without a finite y are left out.
    """
    lines = {name: [(x, y) for x, y in line if y is not None and math.isfinite(y)] for name, line in lines.items()}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return ""
    xs, ys = zip(*chain(*lines.values()), strict=True)
    low_x, low_y = min(xs), min(0.0, *ys)
    across, up = WIDTH / ((max(xs) - low_x) or 1), HEIGHT / ((max(ys) - low_y) or 1)

    def place(x, y):
        return LEFT + (x - low_x) * across, TOP + HEIGHT - (y - low_y) * up

    marks, key = "", ""
    for value in ticks(low_y, max(ys)):
        x, y = place(low_x, value)
        marks += f'<path d="M{x} {y:.1f}h{WIDTH}" stroke="#ddd"/>'
        marks += f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value in ticks(low_x, max(xs)):
        x, y = place(value, low_y)
        marks += f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{value:g}</text>'
    for colour, (name, line) in zip(cycle(COLOURS), lines.items(), strict=False):
        points = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in [line[0], *line])  # one point: a dot
        marks += f'<polyline points="{points}" stroke="{colour}" stroke-width="3" stroke-linecap="round" fill="none"/>'
        key += f'<span style="color:{colour}">&#9632; {html.escape(name)}</span> '
    svg = f'<svg viewBox="0 0 {LEFT + WIDTH + 24} {TOP + HEIGHT + BOTTOM}" fill="#333">{marks}</svg>'
    return f"<figure><h3>{html.escape(title)}</h3>{svg}<figcaption>{key}</figcaption></figure>"


def ticks(low, high):
    """Round numbers from low to high, six at most."""
    least = (high - low) / 5 or 1.0
    size = 10 ** math.floor(math.log10(least))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= least * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
