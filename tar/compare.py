"""Runs side by side: their figures, and for two of them where the difference comes from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from tar import UserError, checkpoint
from tar.errors import KINDS
from tar.evaluation import latency
from tar.pictures import GAP, LINE, font
from tar.runs import read_json, read_log
from tar.tabulation import cell, markdown

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "voc07", "voc_area")
COLOURS = ((90, 110, 160), (220, 120, 40))


@dataclass
class Run:
    """A run that has ended: its folder's name, and what lies there."""

    name: str
    folder: Path
    settings: dict
    result: dict
    log: list

    @property
    def weights(self):
        return self.folder / "last.pth"


def open_runs(paths):
    """Runs from their folders, or from a file in them; names that are the same get their parents' before them."""
    runs = []
    for path in map(Path, paths):
        folder = path.parent if path.is_file() else path
        if any(folder.resolve() == run.folder.resolve() for run in runs):
            raise UserError(f"{path}: named twice")
        for name in ("config.json", "result.json", "log.jsonl", "last.pth"):
            if not (folder / name).is_file():
                why = "the run has not ended" if (folder / "config.json").is_file() else "this is no folder of a run"
                raise UserError(f"{folder}: has no {name}: {why}")
        config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
        runs.append(Run(folder.name, folder, config, result, read_log(folder / "log.jsonl")))
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    return runs


def same_test(runs):
    """UserError unless all runs were measured on the same images."""
    for key in ("dataset", "split", "test_images"):
        values = {run.name: run.result[key] for run in runs}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(f"these runs cannot be compared, their {key.replace('_', ' ')} is not the same: {shown}")
    if len({tuple(run.result["per_class"]) for run in runs}) > 1:
        raise UserError("these runs cannot be compared, for their classes differ")


def flops(model, image):
    """Arithmetic of one image in evaluation: convolutions and matrix products, two a multiply-add."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model([image.float() / 255])
    return counter.get_total_flops()


def figures(runs, test_set, machine):
    """{run: {what: value}} of the table that compares them; latencies are measured now, one after the other."""
    image, columns = test_set.load(0, 0)[0], {}
    for run in runs:
        model, saved = checkpoint.load_detector(run.weights)
        own = {name: run.result[name] for name in FIGURES if name in run.result}
        own |= {"backbone": saved["build"]["backbone"], "epochs": run.result["epochs"]}
        own |= {"parameters (M)": run.result["parameters"] / 1e6, "GFLOP an image": flops(model, image) / 1e9}
        ms = latency(machine.place(model), test_set, machine.device, machine.autocast())
        columns[run.name] = own | {"ms an image": ms}
    return columns


def figures_text(columns):
    names = {name: None for column in columns.values() for name in column}  # in order
    return markdown(["", *columns], [[name, *(column.get(name) for column in columns.values())] for name in names])


def class_text(runs):
    """AP of each class, and of two runs the difference."""
    header, rows = ["class (AP)", *(run.name for run in runs)], []
    for name in runs[0].result["per_class"]:
        values = [run.result["per_class"][name]["AP"] for run in runs]
        row = [name, *values]
        if len(runs) == 2:
            row.append(None if None in values else f"{values[1] - values[0]:+.1f}")
        rows.append(row)
    return markdown(header + ["difference"] * (len(runs) == 2), rows)


def errors_text(split):
    """The split of two runs as Markdown: what AP50 each would gain without a kind of error, and what that says."""
    (first, a), (second, b) = split.items()
    rows = []
    for kind in KINDS:
        pair = a["costs"][kind], b["costs"][kind]
        rows.append([kind, *pair, f"{pair[0] - pair[1]:+.1f}", a["counts"][kind], b["counts"][kind]])
    header = ["AP50 lost by", first, second, "gained", f"errors of {first}", f"of {second}"]
    most = max(KINDS, key=lambda kind: a["costs"][kind] - b["costs"][kind])
    text = f"AP50 {cell(a['AP50'])} and {cell(b['AP50'])}. {second} gains most in: {most}."
    return f"{markdown(header, rows)}\n\n{text} How an error is sorted: tar/errors.py."


def errors_picture(split, side=420):
    """The same as bars, a picture of PIL."""
    most = max(max(run["costs"].values()) for run in split.values()) or 1.0
    left, high = 110, 2 * LINE + GAP
    page = Image.new("RGB", (left + side + 60, (len(split) + 1) * LINE + GAP * 2 + len(KINDS) * high), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), "points of AP50 lost by each kind of error", fill="black", font=font())
    for i, (name, run) in enumerate(split.items()):
        y = GAP + (i + 1) * LINE
        draw.rectangle((GAP, y + 3, GAP + 12, y + 13), fill=COLOURS[i])
        draw.text((GAP + 20, y), f"{name}: AP50 {cell(run['AP50'])}", fill="black", font=font())
    for k, kind in enumerate(KINDS):
        top = (len(split) + 1) * LINE + 2 * GAP + k * high
        draw.text((GAP, top + LINE // 2), kind, fill="black", font=font())
        for i, run in enumerate(split.values()):
            value, y = run["costs"][kind], top + i * LINE
            end = left + side * max(value, 0) / most
            draw.rectangle((left, y + 2, end, y + LINE - 2), fill=COLOURS[i])
            draw.text((end + 5, y), f"{value:.1f}", fill="black", font=font())
    return page
