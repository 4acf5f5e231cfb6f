"""Ended runs side by side: opening their folders, and tables of their figures, latencies and APs by class."""

from pathlib import Path
from types import SimpleNamespace

import torch

from tar import UserError
from tar.data.source import listed
from tar.evaluation import average_precision
from tar.evaluation.cost import flops, latency
from tar.evaluation.markdown import markdown, rows_table
from tar.training import checkpoint
from tar.training.run_folder import read_json, read_log

FIGURES = (*average_precision.FIGURES, "voc07", "voc_area")


def open_runs(folders):
    """The ended runs of some folders: name, folder, settings, result, log, weights (a file).

    Runs of one name get the parent folder's name before it. UserError for a folder without an ended run, one that is
    named twice, or runs that were not measured on the same images and classes.
    """
    runs, tests, names = [], [], [Path(folder).name for folder in folders]
    for folder in map(Path, folders):
        if any(folder.resolve() == run.folder.resolve() for run in runs):
            raise UserError(f"{folder}: named twice")
        if not (folder / "result.json").is_file():
            raise UserError(f"{folder}: has no result.json: no folder of a run, or the run has not ended")
        run = SimpleNamespace(name=folder.name, folder=folder, weights=folder / "last.pth")
        if names.count(run.name) > 1:
            run.name = f"{folder.resolve().parent.name}/{run.name}"
        run.settings, run.result = read_json(folder / "config.json"), read_json(folder / "result.json")
        run.log = read_log(folder / "log.jsonl")
        runs.append(run)
        tests.append([*(run.result[key] for key in ("dataset", "split", "test_images")), *run.result["per_class"]])
    if any(test != tests[0] for test in tests):
        shown = "; ".join(f"{run.name}: {listed(test, 8)}" for run, test in zip(runs, tests, strict=True))
        raise UserError(f"these runs cannot be compared, their test images or classes are not the same: {shown}")
    return runs


@torch.inference_mode()
def figures(runs, test_set, process):
    """{run: {figure: value}}; latencies are measured here, one run after the other."""
    image, columns = test_set.load(0, 0)[0].float() / 255, {}
    for run in runs:
        model, saved = checkpoint.load_detector(run.weights)
        column = {name: run.result[name] for name in FIGURES if name in run.result}
        column |= {"backbone": saved["build"]["backbone"], "epochs": run.result["epochs"]}
        column |= {"parameters (M)": run.result["parameters"] / 1e6, "GFLOP an image": flops(model, [image]) / 1e9}
        column["ms an image"] = latency(process.place(model), test_set, process.device, process.autocast())
        columns[run.name] = column
    return columns


def figures_text(columns):
    """A table of {run: {figure: value}}, a column a run."""
    names = {name: None for column in columns.values() for name in column}  # in order
    return markdown(["", *columns], [[name, *(column.get(name) for column in columns.values())] for name in names])


def class_text(runs):
    """A table of the AP of each class, a column a run; of two runs also the difference."""
    rows = []
    for name in runs[0].result["per_class"]:
        row = {run.name: run.result["per_class"][name]["AP"] for run in runs}
        if len(runs) == 2:
            first, second = row.values()
            row["difference"] = None if None in (first, second) else f"{second - first:+.1f}"
        rows.append({"class (AP)": name, **row})
    return rows_table(rows)
