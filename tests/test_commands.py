"""The command lines, from flags to files: train.py and eval.py on a handful of small images."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_runs import DETECTION, SMALL, STEPS, call, command, read_log, read_result, same_weights, weights_of

import eval as evaluation
import train
from tar.models import build_detector
from tar.shapes import CLASSES


def test_a_run_leaves_its_four_files(plain):
    files = {"config.json", "log.jsonl", "last.pth", "previous.pth", "result.json"}
    assert {p.name for p in plain.run.iterdir()} == files
    config = json.loads((plain.run / "config.json").read_text())
    assert (config["student"], config["lr"], config["size"], config["epochs"]) == ("r10", 0.004, [64, 64], 2)
    assert "mask" not in config and "output" not in config


def test_the_result_says_what_was_measured(plain):
    result = read_result(plain.run)
    assert {"AP", "AP50", "AP75", "per_class", "dataset", "split", "seconds"} <= result.keys()
    assert (result["dataset"], result["split"], result["test_images"], result["train_images"]) == (
        "shapes",
        "test",
        6,
        12,
    )
    assert set(result["per_class"]) == set(CLASSES) and result["seconds"] > 0 and result["ms_per_image"] > 0
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


def test_a_run_that_has_ended_is_not_done_again(plain, capsys, monkeypatch):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in plain.run.iterdir()}
    monkeypatch.setattr(train, "build_detector", None)  # nothing may be built
    call(train.main, *plain.flags)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in plain.run.iterdir()} == before
    assert f"AP {read_result(plain.run)['AP']:.1f}" in capsys.readouterr().out


def test_a_run_stopped_before_its_result_only_writes_that(plain, tmp_path):
    shutil.copytree(plain.run, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    call(train.main, *plain.flags, "--output", tmp_path / "run")
    one, other = read_result(plain.run), read_result(tmp_path / "run")
    assert {k: one[k] for k in one if k != "ms_per_image"} == {k: other[k] for k in other if k != "ms_per_image"}
    assert all((tmp_path / "run" / n).read_bytes() == (plain.run / n).read_bytes() for n in ("last.pth", "log.jsonl"))


@pytest.mark.parametrize("which", ["plain", "voc"])
def test_eval_measures_what_training_measured(which, request, tmp_path):
    run = request.getfixturevalue(which).run
    flags = ["--weights", run / "last.pth", "--json", tmp_path / "figures.json", "--threads", 1, "--workers", 0]
    if which == "plain":
        done = command("eval.py", *flags)
        assert done.returncode == 0, done.stderr
        assert f"{read_result(run)['AP']:.1f}" in done.stdout and CLASSES[-1] in done.stdout
    else:
        call(evaluation.main, *flags)
    figures, result = json.loads((tmp_path / "figures.json").read_text()), read_result(run)
    names = {"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "per_class", "dataset", "split", "test_images"}
    names |= {"voc07", "voc_area"} if which == "voc" else set()
    assert names <= figures.keys()
    assert {k: figures[k] for k in names} == {k: result[k] for k in names}


def test_loader_processes_change_nothing(plain, tmp_path):
    call(train.main, *plain.flags, "--workers", 2, "--output", tmp_path / "run")
    assert same_weights(plain.run, tmp_path / "run")
    one, other = read_result(plain.run), read_result(tmp_path / "run")
    timed = {"seconds", "cost", "ms_per_image"}
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


def test_compiled_backbones_learn_the_same(voc, tmp_path, monkeypatch):
    """With a backend that changes no arithmetic (the usual one takes minutes)."""
    compiled, compile_module = [], torch.nn.Module.compile

    def note(module):
        compiled.append(type(module))
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    words = ["--teacher-weights", voc.teacher / "last.pth", "--compile", "--output", tmp_path / "run"]
    call(train.main, *voc.flags, *words)
    assert compiled == [type(build_detector("faster-rcnn", "r10", 1).backbone)] * 2
    assert same_weights(voc.run, tmp_path / "run")


def test_another_seed_gives_another_student(plain, tmp_path):
    call(train.main, *plain.flags, "--epochs", 1, "--seed", 1, "--output", tmp_path / "run")
    assert not torch.equal(*(weights_of(r)["backbone.body.conv1.weight"] for r in (plain.run, tmp_path / "run")))


# A student and its teacher


def test_the_teacher_is_trained_first_into_its_own_folder(voc):
    teacher, student = (json.loads((run / "config.json").read_text()) for run in (voc.teacher, voc.run))
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


def test_the_students_checkpoint_is_a_detector_without_adapters(voc):
    names = weights_of(voc.run).keys()
    assert not any("adapter" in name for name in names)
    saved = torch.load(voc.run / "last.pth", weights_only=True)
    assert len(saved["adapters"]) == 10  # five convolutions' weights and biases, for going on
    assert saved["classes"] == ["disc", "square"]


def test_another_student_uses_the_teacher_that_is_there(voc, capsys):
    before = (voc.teacher / "last.pth").stat().st_mtime_ns
    other = voc.run.parent / "other"
    call(train.main, *voc.flags, "--no-cls", "--mask", "box", "--no-decay", "--epochs", 2, "--output", other)
    assert f"{voc.teacher} has ended, AP" in capsys.readouterr().out
    assert (voc.teacher / "last.pth").stat().st_mtime_ns == before
    steps, _ = read_log(other)
    assert all("distill_cls" not in line and "distill_reg" in line and line["decay"] == 1 for line in steps)
    assert [p for p in voc.run.parent.iterdir() if "r18" in p.name] == [voc.teacher]


def test_the_cost_of_a_distillation_is_that_of_training_steps_in_turns(voc, monkeypatch):
    """By a clock on which a step with a teacher takes three seconds, and one without takes two."""
    steps, original = [], train.Step.forward

    def forward(self, images, targets, teacher):
        steps.append((self.training and self.student.training, teacher is not None))
        return original(self, images, targets, teacher)

    monkeypatch.setattr(train.Step, "forward", forward)
    clock = Namespace(perf_counter=lambda: sum(2 + taught for _, taught in steps))
    monkeypatch.setattr("tar.evaluation.time", clock)
    call(train.main, *voc.flags, "--output", voc.run.parent / "timed")
    assert steps == [(True, True)] * STEPS + [(True, True), (True, False)] * 3  # 3 batches
    assert read_result(voc.run.parent / "timed")["cost"] == 1.5


def test_after_the_end_of_the_decay_the_teacher_is_not_asked(voc, monkeypatch):
    asked, original = [], train.Step.forward

    def forward(self, images, targets, teacher):
        asked.append(teacher is not None)
        return original(self, images, targets, teacher)

    monkeypatch.setattr(train.Step, "forward", forward)
    monkeypatch.setattr(train, "cost_of_distillation", lambda *_: 1.4)  # it asks the teacher, when all is over
    call(train.main, *voc.flags, "--decay-end", 0.5, "--output", voc.run.parent / "half")
    steps, _ = read_log(voc.run.parent / "half")
    assert asked == [True] * 3 + [False] * 3
    assert read_result(voc.run.parent / "half")["cost"] == pytest.approx(1.2)
    assert [line["decay"] for line in steps] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0], abs=1e-6)
    assert all(("distill_cls" in line) == with_teacher for line, with_teacher in zip(steps, asked, strict=True))


def test_an_interrupted_run_goes_on_to_the_same_weights(voc, monkeypatch, capsys):
    resumed = voc.run.parent / "resumed"

    def stop(step, *rest):
        if step == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        return train_rate(step, *rest)

    train_rate = train.learning_rate
    flags = [*voc.flags, "--output", resumed]
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            call(train.main, *flags)
    assert not (resumed / "result.json").exists()
    assert [line["step"] for line in read_log(resumed)[0]] == [1, 2, 3, 4]
    assert not same_weights(resumed, voc.run)
    call(train.main, *flags)
    assert "going on after step 3 of 6" in capsys.readouterr().out
    assert same_weights(resumed, voc.run)
    assert [line["step"] for line in read_log(resumed)[0]] == [1, 2, 3, 4, 5, 6]
    metrics = ("AP", "AP50", "AP75", "voc07", "voc_area", "per_class")
    assert all(read_result(resumed)[k] == read_result(voc.run)[k] for k in metrics)
    one, other = read_log(resumed)[0], read_log(voc.run)[0]
    for line in (*one, *other):
        del line["images_per_second"]
    assert one == other


def test_all_levels_off_is_the_plain_student_bit_for_bit(voc, tmp_path):
    call(train.main, *voc.common, "--student", "r10", "--output", tmp_path / "plain")
    teach = ["--teacher", "r18", "--teacher-weights", voc.teacher / "last.pth"]
    off = ["--no-backbone", "--no-cls", "--no-reg"]
    call(train.main, *voc.common, "--student", "r10", *teach, *off, "--output", tmp_path / "off")
    assert same_weights(tmp_path / "plain", tmp_path / "off")
    assert not same_weights(tmp_path / "plain", voc.run)  # distillation does change the student


# What a user may get wrong: exit 2, one line, no traceback


def test_no_warm_up(tmp_path):
    call(train.main, *SMALL, "--student", "r10", "--warmup", 0, "--epochs", 1, "--output", tmp_path / "run")
    steps, _ = read_log(tmp_path / "run")
    assert steps[0]["lr"] == pytest.approx(0.001)


def test_the_default_folder_is_named_by_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--student", "r10", "--epochs", 1, "--limit-train", 4, "--limit-test", 1]
    call(train.main, *flags)
    call(train.main, *flags, "--log-every", 5)  # changes nothing: the same run
    assert len(list((tmp_path / "runs").iterdir())) == 1
    call(train.main, *flags, "--lr", 0.002)
    names = [p.name for p in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all("shapes" in n and "r10" in n and "seed0" in n for n in names)
