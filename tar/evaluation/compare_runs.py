"""Ended runs side by side: opening their folders, and tables of their figures, latencies and APs by class."""

from pathlib import Path
from types import SimpleNamespace

import torch

from tar import UserError
from tar.evaluation.cost import flops, latency
from tar.evaluation.markdown import markdown
from tar.training import checkpoint
from tar.training.run_folder import read_json, read_log

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "voc07", "voc_area")


def open_runs(paths):
    """The ended runs of some folders, or of files in them: name, folder, settings, result, log, weights (a file).

    Runs of one name get the parent folder's name before it. UserError for a folder without an ended run.
    """
    runs = []
    for path in map(Path, paths):
        folder = path.parent if path.is_file() else path
        if any(folder.resolve() == run.folder.resolve() for run in runs):
            raise UserError(f"{path}: named twice")
        for name in ("config.json", "result.json", "log.jsonl", "last.pth"):
            if not (folder / name).is_file():
                why = "the run has not ended" if (folder / "config.json").is_file() else "this is no folder of a run"
                raise UserError(f"{folder}: has no {name}: {why}")
        run = SimpleNamespace(name=folder.name, folder=folder, weights=folder / "last.pth")
        run.settings, run.result = read_json(folder / "config.json"), read_json(folder / "result.json")
        run.log = read_log(folder / "log.jsonl")
        runs.append(run)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    return runs


def same_test(runs):
    """Raises UserError unless all runs were measured on the same images and classes."""
    for key in ("dataset", "split", "test_images"):
        values = {run.name: run.result[key] for run in runs}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(f"these runs cannot be compared, their {key.replace('_', ' ')} is not the same: {shown}")
    if len({tuple(run.result["per_class"]) for run in runs}) > 1:
        raise UserError("these runs cannot be compared, for their classes differ")


@torch.inference_mode()
def figures(runs, test_set, process):
    """{run: {figure: value}} of each run; latencies are measured here, one run after the other."""
    image, columns = test_set.load(0, 0)[0].float() / 255, {}
    for run in runs:
        model, saved = checkpoint.load_detector(run.weights)
        columns[run.name] = {
            **{name: run.result[name] for name in FIGURES if name in run.result},
            **{"backbone": saved["build"]["backbone"], "epochs": run.result["epochs"]},
            **{"parameters (M)": run.result["parameters"] / 1e6, "GFLOP an image": flops(model, [image]) / 1e9},
            "ms an image": latency(process.place(model), test_set, process.device, process.autocast()),
        }
    return columns


def figures_text(columns):
    """A table of {run: {figure: value}}, a column a run."""
    names = {name: None for column in columns.values() for name in column}  # in order
    return markdown(["", *columns], [[name, *(column.get(name) for column in columns.values())] for name in names])


def class_text(runs):
    """A table of the AP of each class, a column a run; of two runs also the difference."""
    header, rows = ["class (AP)", *(run.name for run in runs)], []
    for name in runs[0].result["per_class"]:
        row = [run.result["per_class"][name]["AP"] for run in runs]
        if len(runs) == 2:
            row.append(None if None in row else f"{row[1] - row[0]:+.1f}")
        rows.append([name, *row])
    return markdown(header + ["difference"] * (len(runs) == 2), rows)
