"""The command lines of train.py and eval.py, from flags to files, on a handful of small images."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_runs import DETECTION, SMALL, STEPS, call, read_log, read_result, weights_of

import eval as evaluation
import train
from tar.data.shapes import CLASSES
from tar.detectors.backbones import build_classifier

ONE_STEP = [*SMALL, "--student", "r10", "--epochs", 1, "--limit-train", 4, "--limit-test", 1]


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_a_run_leaves_its_files_and_says_what_was_measured(plain):
    files = {".lock", "config.json", "log.jsonl", "last.pth", "previous.pth", "result.json"}
    assert {p.name for p in plain.run.iterdir()} == files
    config, result = config_of(plain.run), read_result(plain.run)
    assert (config["student"], config["lr"], config["size"], config["epochs"]) == ("r10", 0.004, [64, 64], 2)
    assert "mask" not in config and "output" not in config
    assert [result[k] for k in ("dataset", "split", "test_images", "train_images")] == ["shapes", "test", 6, 12]
    assert set(result["per_class"]) == set(CLASSES) and {"AP", "AP50", "AP75"} <= result.keys()
    assert result["seconds"] > 0 and result["ms_per_image"] > 0 and result["cost"] == 1
    trained = {k: v for k, v in weights_of(plain.run).items() if "running" not in k and "num_batches" not in k}
    assert result["parameters"] == sum(v.numel() for v in trained.values())


def test_every_step_is_logged_with_its_rate_and_losses(plain):
    steps, epochs = read_log(plain.run)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [1, 1, 1, 2, 2, 2]
    for done, line in enumerate(steps):
        assert set(line) == {"epoch", "step", "lr", "decay", "images_per_second", "bad_steps", "loss"} | DETECTION
        assert line["images_per_second"] > 0
        assert line["loss"] == pytest.approx(sum(line[k] for k in DETECTION), abs=1e-4)
        if done >= 1:  # after the warm-up: 0.004 for 16 images, here 4
            assert line["lr"] == pytest.approx(0.001 * (1 + math.cos(math.pi * done / STEPS)) / 2)
    assert steps[0]["lr"] == pytest.approx(0.001 / 1000)
    assert [line["epoch"] for line in epochs] == [1, 2]
    result = read_result(plain.run)
    assert epochs[-1]["metrics"]["AP"] == result["AP"] and epochs[-1]["seconds"] == result["seconds"]


@pytest.mark.parametrize("more", ["", "--teacher r18 --no-backbone --no-cls --no-reg"], ids=["again", "all levels off"])
def test_a_run_that_has_ended_is_not_done_again(plain, capsys, more):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in plain.run.iterdir()}
    call(train.main, *plain.flags, *more.split())
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in plain.run.iterdir()} == before
    assert f"AP {read_result(plain.run)['AP']:.1f}" in capsys.readouterr().out


def test_a_run_stopped_before_its_result_only_writes_that(plain, tmp_path):
    run = shutil.copytree(plain.run, tmp_path / "run")
    (run / "result.json").unlink()
    call(train.main, *plain.flags, "--output", run)
    one, other = read_result(plain.run), read_result(run)
    assert {k: one[k] for k in one if k != "ms_per_image"} == {k: other[k] for k in other if k != "ms_per_image"}
    assert all((run / name).read_bytes() == (plain.run / name).read_bytes() for name in ("last.pth", "log.jsonl"))


def test_the_default_folder_is_named_by_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(train.main, *ONE_STEP)
    call(train.main, *ONE_STEP, "--log-every", 5)  # changes nothing: the same run
    [first] = (tmp_path / "runs").iterdir()
    call(train.main, *ONE_STEP, "--seed", 1)
    [second] = set((tmp_path / "runs").iterdir()) - {first}
    for run, seed in ((first, 0), (second, 1)):
        assert all(word in run.name for word in ("shapes", "r10", f"seed{seed}"))
    assert not torch.equal(*(weights_of(run)["backbone.body.conv1.weight"] for run in (first, second)))


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_a_backbone_from_a_file_keeps_its_batch_norm_and_first_layers(tmp_path, detector):
    start = build_classifier("r10", "none", "batch").state_dict()
    torch.save(start, tmp_path / "r10.pth")
    flags = ["--backbone-weights", tmp_path / "r10.pth", "--detector", detector, "--output", tmp_path / "run"]
    call(train.main, *ONE_STEP, *flags, "--warmup", 0)
    trained = weights_of(tmp_path / "run")
    kept = {name for name in start if torch.equal(trained.get(f"backbone.body.{name}", torch.empty(0)), start[name])}
    assert {name for name in start if "running" in name or name.startswith("conv1")} <= kept
    assert "layer4.0.conv1.weight" not in kept


def test_the_teacher_is_trained_first_into_its_own_folder(voc):
    teacher, student = config_of(voc.teacher), config_of(voc.run)
    assert teacher["student"] == "r18" and "teacher" not in teacher
    assert (student["student"], student["teacher"]) == ("r10", "r18")
    assert Path(student["teacher_weights"]) == voc.teacher / "last.pth"
    assert f"Teacher {voc.teacher}/last.pth: AP {read_result(voc.teacher)['AP']:.1f}" in voc.out
    assert (voc.teacher / "last.pth").stat().st_mtime_ns < (voc.run / "log.jsonl").stat().st_mtime_ns
    table = [line for line in voc.out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and "teacher r18" in table[2] and "TAR r10 from r18" in table[3]
    assert set(read_result(voc.run)["per_class"]) == {"disc", "square"}


def test_the_distillation_terms_are_logged_and_weighted(voc):
    steps, _ = read_log(voc.run)
    assert len(steps) == STEPS
    for done, line in enumerate(steps):
        assert {"distill_backbone", "distill_cls", "distill_reg", "positives", "gate_open"} <= line.keys()
        assert line["decay"] == pytest.approx(1 - done / STEPS)
        terms = 0.05 * line["distill_backbone"] + 0.5 * line["distill_cls"] + 0.25 * line["distill_reg"]
        detection = sum(line[k] for k in DETECTION)
        assert terms > 0.01
        assert line["loss"] == pytest.approx(detection + line["decay"] * terms, abs=2e-4)
    assert not any("distill" in name for line in read_log(voc.teacher)[0] for name in line)
    saved = torch.load(voc.run / "last.pth", weights_only=True)
    assert not any("adapter" in name for name in saved["model"]) and saved["classes"] == ["disc", "square"]
    assert len(saved["adapters"]) == 10  # five convolutions' weights and biases, for going on


def test_another_student_uses_the_teacher_that_is_there(voc, tmp_path, capsys):
    before = (voc.teacher / "last.pth").stat().st_mtime_ns
    other = voc.run.parent / "other"
    flags = ["--no-cls", "--mask", "box", "--no-decay", "--epochs", 1, "--teacher-epochs", 2, "--output", other]
    call(train.main, *voc.flags, *flags)
    assert f"{voc.teacher} has ended, AP" in capsys.readouterr().out
    assert (voc.teacher / "last.pth").stat().st_mtime_ns == before
    steps, _ = read_log(other)
    assert all("distill_cls" not in line and "distill_reg" in line and line["decay"] == 1 for line in steps)
    assert [p for p in voc.run.parent.iterdir() if "r18" in p.name] == [voc.teacher]


def test_the_teacher_runs_until_the_decay_ends_and_the_result_tells_its_cost(voc, tmp_path, monkeypatch):
    """By a clock on which a step with a teacher takes three seconds, and a step without takes two."""
    steps, original = [], train.DistillationStep.forward

    def forward(self, images, targets, teacher):
        steps.append(teacher is not None)
        return original(self, images, targets, teacher)

    monkeypatch.setattr(train.DistillationStep, "forward", forward)
    clock = Namespace(perf_counter=lambda: sum(2 + taught for taught in steps))
    monkeypatch.setattr("tar.evaluation.cost.time", clock)
    flags = ["--teacher-weights", voc.teacher / "last.pth", "--decay-end", 0.5, "--output", tmp_path / "run"]
    call(train.main, *voc.flags, *flags)
    assert steps == [True] * 3 + [False] * 3 + [True, False] * 3  # the run; then both kinds in turns on 3 batches
    assert read_result(tmp_path / "run")["cost"] == pytest.approx(1 + 0.5 / 2)
    lines, _ = read_log(tmp_path / "run")
    assert [line["decay"] for line in lines] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0], abs=1e-6)
    assert ["distill_cls" in line for line in lines] == steps[:STEPS]


def test_eval_measures_what_training_measured(voc, tmp_path, capsys):
    flags = ["--weights", voc.run / "last.pth", "--json", tmp_path / "figures.json", "--threads", 1, "--workers", 0]
    call(evaluation.main, *flags)
    out = capsys.readouterr().out
    figures, result = json.loads((tmp_path / "figures.json").read_text()), read_result(voc.run)
    assert f"{result['AP']:.1f}" in out and "square" in out
    sizes = {"AP_small", "AP_medium", "AP_large"}
    names = {"AP", "AP50", "AP75", "voc07", "voc_area", "per_class", "dataset", "split", "test_images"} | sizes
    assert {name: figures[name] for name in names} == {name: result[name] for name in names}


def test_the_demonstration_says_its_length_once_and_prints_four_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tar.training.progress.TIMED", 2)
    call(train.main, *SMALL, "--epochs", 1, "--limit-train", 8, "--limit-test", 2, "--output", tmp_path)
    out = capsys.readouterr().out
    assert out.count("All runs of the demonstration will take about") == 1
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows[:5] == ["run", "teacher r18", "plain r10", "TAR r10 from r18", "plain r10, equal cost"]
