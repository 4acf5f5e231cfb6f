"""The command lines, from flags to files: train.py and eval.py on a handful of small images."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import eval as evaluation
import train
from tar import options
from tar.machine import set_up
from tar.shapes import CLASSES

ROOT = Path(__file__).resolve().parents[1]
FLAGS = """
    --size 64 64 --fpn-channels 16 --head-channels 32 --rois 16 --rpn-top-n 50 20 --anchor-scale 4 --roi-samples 1
    --epochs 2 --batch-size 4 --limit-train 12 --limit-test 6 --optimizer adamw --lr 0.004 --weight-decay 0.05
    --schedule cosine --warmup 1 --clip-grad 0 --backbone-weights none --workers 0 --threads 1 --amp none
    --device cpu --log-every 1
    """
SMALL = FLAGS.split()
WEIGHTS = ["--weight-backbone", 0.05, "--weight-cls", 0.5, "--weight-reg", 0.25]
DETECTION = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
STEPS = 6  # 2 epochs of 3 batches


def command(script, *flags):
    """Runs a script of the repository as a user does."""
    words = [sys.executable, ROOT / script, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=150, env=environment)


def call(main, *flags):
    main([str(flag) for flag in flags])


def read_log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line], [line for line in lines if "metrics" in line]


def read_result(run):
    return json.loads((run / "result.json").read_text())


def weights_of(run):
    return torch.load(run / "last.pth", weights_only=True)["model"]


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def write_voc(folder, classes, lists):
    """Images with a disc and a square each, in VOC's layout; the last object of every other image is difficult."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    number = 0
    for split, count in lists.items():
        names = [f"{number + i:06d}" for i in range(count)]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            rng, image, objects = np.random.default_rng(number), Image.new("RGB", (96, 72), (70, 70, 70)), ""
            for k, kind in enumerate(classes):
                x, y = int(rng.integers(2, 14)) + 46 * k, int(rng.integers(2, 40))
                draw = (ImageDraw.Draw(image).ellipse, ImageDraw.Draw(image).rectangle)[k]
                draw((x, y, x + 27, y + 27), fill=((220, 30, 30), (30, 30, 220))[k])
                ends = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 28}</xmax><ymax>{y + 28}</ymax>"
                difficult = int(k == 1 and number % 2)
                objects += (
                    f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox>{ends}</bndbox></object>"
                )
            image.save(folder / "JPEGImages" / f"{name}.jpg")
            size = "<size><width>96</width><height>72</height><depth>3</depth></size>"
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
            number += 1
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def plain(work):
    """A plain student on drawn shapes: its flags, its folder and what was printed."""
    flags = [*SMALL, "--student", "r10", "--output", work / "plain"]
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    return Namespace(flags=flags, run=work / "plain", out=done.stdout)


@pytest.fixture(scope="module")
def voc(work):
    """A student and its teacher on a folder in VOC's layout."""
    data = write_voc(work / "discs", ("disc", "square"), {"trainval": 12, "test": 6})
    common = [*SMALL, "--dataset", "voc", "--data-path", data]
    flags = [*common, *WEIGHTS, "--student", "r10", "--teacher", "r18", "--output", work / "voc/student"]
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    teacher = next(p for p in (work / "voc").iterdir() if p.name != "student")
    return Namespace(flags=flags, common=common, data=data, run=work / "voc/student", teacher=teacher, out=done.stdout)


# A plain run


def test_a_run_leaves_its_four_files(plain):
    assert {p.name for p in plain.run.iterdir()} == {"config.json", "log.jsonl", "last.pth", "result.json"}
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
        assert set(line) == {"epoch", "step", "lr", "decay", "images_per_second", "loss"} | DETECTION
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
    timed = {"seconds", "ms_per_image"}
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


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
    assert "going on after epoch 1" in capsys.readouterr().out
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


def wrong(capsys, main, *flags):
    """The one line that a wrong command prints."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *flags)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and errors[0] == lines[-1]
    assert not any("Traceback" in line for line in lines)
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--mask blob", "--mask"),
        ("--student r11", "r11"),
        ("--epochs 0", "--epochs"),
        ("--epochs two", "two"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr"),
        ("--reg-gate maybe", "--reg-gate"),
        ("--decay never", "--decay"),
        ("--size 100 50", "--size"),
        ("--size 64", "--size"),
        ("--no-such-flag", "--no-such-flag"),
        ("--dataset voc", "--student"),
        ("--teacher r18", "--student"),
        ("--student r10 --teacher-weights x.pth", "--teacher"),
    ],
)
def test_wrong_flags(capsys, flags, says):
    assert says in wrong(capsys, options.parse, *flags.split())


def test_a_missing_data_folder_as_a_user_sees_it(tmp_path):
    done = command("train.py", *SMALL, "--dataset", "voc", "--student", "r10", "--data-path", tmp_path / "none")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error:" in line] == done.stderr.splitlines()
    assert f"{tmp_path}/none" in done.stderr and "--data-path" in done.stderr


def test_a_teacher_of_other_classes(capsys, plain, voc, tmp_path):
    flags = ["--teacher", "r10", "--student", "r10", "--teacher-weights", plain.run / "last.pth"]
    line = wrong(capsys, train.main, *voc.common, *flags, "--output", tmp_path / "run")
    assert "classes" in line and str(plain.run / "last.pth") in line


def test_a_teacher_of_another_backbone_than_named(capsys, voc, tmp_path):
    flags = ["--teacher", "r34", "--student", "r10", "--teacher-weights", voc.teacher / "last.pth"]
    line = wrong(capsys, train.main, *voc.common, *flags, "--output", tmp_path / "run")
    assert "r34" in line and "r18" in line


def test_a_missing_checkpoint(capsys, tmp_path):
    missing = tmp_path / "none.pth"
    assert "no such checkpoint" in wrong(capsys, evaluation.main, "--weights", missing)
    flags = ["--student", "r10", "--teacher", "r18", "--teacher-weights", missing, "--output", tmp_path / "run"]
    assert str(missing) in wrong(capsys, train.main, *SMALL, *flags)


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_code_in_a_checkpoint_does_not_run(capsys, tmp_path, kind):
    trap, file = tmp_path / "trap", tmp_path / "last.pth"
    state = {"format": 1, "model": {}, "build": {}, "classes": [], "code": Code(str(trap))}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file)
    line = wrong(capsys, evaluation.main, "--weights", file)
    assert str(file) in line and "weights_only" not in line  # torch's advice to switch that off is bad advice here
    flags = ["--student", "r10", "--teacher", "r18", "--teacher-weights", file, "--output", tmp_path / "run"]
    assert str(file) in wrong(capsys, train.main, *SMALL, *flags)
    assert not trap.exists()
    pickle.loads(pickle.dumps(state))["code"].close()
    assert trap.exists()  # the trap does work


def test_a_cut_checkpoint(capsys, plain, tmp_path):
    (tmp_path / "last.pth").write_bytes((plain.run / "last.pth").read_bytes()[:5000])
    assert str(tmp_path / "last.pth") in wrong(capsys, evaluation.main, "--weights", tmp_path / "last.pth")


def test_a_run_folder_of_other_settings(capsys, plain):
    line = wrong(capsys, train.main, *plain.flags, "--lr", 0.5)
    assert str(plain.run) in line and "0.004" in line and "0.5" in line and "--output" in line


def test_an_output_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = wrong(capsys, train.main, *SMALL, "--student", "r10", "--output", tmp_path / "file/run")
    assert "cannot be written" in line and "--output" in line


def test_imagenet_weights_for_a_backbone_that_has_none(capsys, tmp_path):
    flags = ["--student", "r10", "--backbone-weights", "imagenet", "--output", tmp_path / "run"]
    line = wrong(capsys, train.main, *SMALL, *flags)
    assert "r10" in line and "--backbone-weights" in line


def test_evaluation_on_data_of_other_classes(capsys, voc, tmp_path):
    other = write_voc(tmp_path / "other", ("ball", "box"), {"trainval": 1, "test": 1})
    line = wrong(capsys, evaluation.main, "--weights", voc.run / "last.pth", "--data-path", other)
    assert "disc" in line and "ball" in line


def test_a_loss_that_is_not_finite_stops_the_run(capsys, tmp_path):
    flags = ["--student", "r10", "--optimizer", "sgd", "--lr", "2e9", "--output", tmp_path / "run"]
    line = wrong(capsys, train.main, *SMALL, *flags)
    assert "not finite" in line and "--lr" in line
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("device", ["toaster", "cuda"])
def test_a_device_that_is_not_there(capsys, tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    flags = ["--student", "r10", "--device", device, "--output", tmp_path / "run"]
    assert device in wrong(capsys, train.main, *SMALL, *flags)


def test_figures_into_a_folder_that_is_not_there(capsys, plain, tmp_path):
    flags = ["--weights", plain.run / "last.pth", "--workers", 0, "--json", tmp_path / "none/figures.json"]
    assert str(tmp_path / "none") in wrong(capsys, evaluation.main, *flags)


def test_a_wrong_flag_does_not_occupy_the_run_folder(capsys, tmp_path):
    flags = [*SMALL, "--epochs", 1, "--student", "r10", "--output", tmp_path / "run"]
    wrong(capsys, train.main, *flags, "--backbone-weights", tmp_path / "none.pth")
    call(train.main, *flags)
    assert (tmp_path / "run/result.json").is_file()


# Settings that must work


def test_no_warm_up(tmp_path):
    call(train.main, *SMALL, "--student", "r10", "--warmup", 0, "--epochs", 1, "--output", tmp_path / "run")
    steps, _ = read_log(tmp_path / "run")
    assert steps[0]["lr"] == pytest.approx(0.001)


def test_a_single_graphics_card_is_chosen_without_an_index(monkeypatch):
    chosen = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for device in ("cuda", "auto"):
        machine = set_up(device, "none")
        assert machine.device.type == "cuda" and (machine.rank, machine.world) == (0, 1)
    assert set(chosen) <= {0}


def test_the_default_folder_is_named_by_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--student", "r10", "--epochs", 1, "--limit-train", 4, "--limit-test", 1]
    call(train.main, *flags)
    call(train.main, *flags, "--log-every", 5)  # changes nothing: the same run
    assert len(list((tmp_path / "runs").iterdir())) == 1
    call(train.main, *flags, "--lr", 0.002)
    names = [p.name for p in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all("shapes" in n and "r10" in n and "seed0" in n for n in names)
