"""Charts of training logs as SVG inside of HTML."""

import html
import math

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 240, 52, 10, 24  # pixels of the lines' area, and of its margins
MOST = 120  # points of a line
COLOURS = ("#3b62b5", "#d4761c", "#2b8a4b", "#b0306a", "#6d4fb8", "#0f8aa0", "#8a6d1d", "#777777")
LOSSES = ("loss", "classification", "bbox_regression")  # how their names begin, in the log
CHARTS = {"losses": LOSSES, "learning rate": "lr"}
DISTILLATION_CHARTS = {
    "distillation losses, before their weights": "distill_",
    "decay of the distillation, positives whose gate is open": ("decay", "gate_open"),
}


def training_charts(runs):
    """Charts of the logs of some runs, as HTML: the AP of all; of each run losses, learning rate, decay and gate."""
    curves = {
        run.name: [(line["epoch"], line["metrics"]["AP"]) for line in run.log if "metrics" in line] for run in runs
    }
    charts = [chart("AP, percent, over epochs", curves)]
    for run in runs:
        logged = {}
        for line in run.log:
            for name, value in line.items():
                logged.setdefault(name, []).append((line["step"], value))
        wanted = CHARTS | (DISTILLATION_CHARTS if run.settings.get("teacher") else {})
        for title, start in wanted.items():
            lines = {name: line for name, line in logged.items() if name.startswith(start)}
            charts.append(chart(f"{run.name}: {title}, over steps", lines))
    return "".join(charts)


def chart(title, lines):
    """A chart with its title and key as HTML; "" where there is nothing to draw.

    Args:
        lines: {name: list of (x, y)}; points without a finite y are left out, and some of a long line.
    """
    lines = {name: [(x, y) for x, y in line if y is not None and math.isfinite(y)] for name, line in lines.items()}
    lines = {name: line[:: -(len(line) // MOST + 1)] for name, line in lines.items() if line}  # from the last one on
    if not lines:
        return ""
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    low_x, low_y = min(xs), min(0.0, *ys)
    across, up = WIDTH / ((max(xs) - low_x) or 1), HEIGHT / ((max(ys) - low_y) or 1)
    marks, key = "", ""
    for y in ticks(low_y, max(ys)):
        down = TOP + HEIGHT - (y - low_y) * up
        marks += f'<path d="M{LEFT} {down:.1f}h{WIDTH}" stroke="#ddd"/>'
        marks += f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{y:g}</text>'
    for x in ticks(low_x, max(xs)):
        marks += (
            f'<text x="{LEFT + (x - low_x) * across:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{x:g}</text>'
        )
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [f"{LEFT + (x - low_x) * across:.1f},{TOP + HEIGHT - (y - low_y) * up:.1f}" for x, y in line]
        points = " ".join(points[:1] + points)  # a single point twice is a round dot
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
