"""What a user does wrong: one line that says so, exit code 2, nothing lost and nothing run."""

import pickle

import pytest
import torch
from tiny_runs import SMALL, call, command, write_voc

import eval as evaluation
import train
from tar import options
from tar.machine import set_up


def wrong(capsys, main, *flags, code=2):
    """The one line that a wrong command prints."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *flags)
    assert stopped.value.code == code
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
    line = wrong(capsys, train.main, *SMALL, *flags, code=3)
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


def test_a_single_graphics_card_is_chosen_without_an_index(monkeypatch):
    chosen = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for device in ("cuda", "auto"):
        machine = set_up(device, "none")
        assert machine.device.type == "cuda" and (machine.rank, machine.world) == (0, 1)
    assert set(chosen) <= {0}


def test_compiling_without_a_compiler(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("train.shutil.which", lambda name: None)
    line = wrong(capsys, train.main, *SMALL, "--student", "r10", "--compile", "--output", tmp_path / "run")
    assert "--compile" in line and "g++" in line
