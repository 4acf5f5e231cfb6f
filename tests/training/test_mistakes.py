"""A user's mistakes on the command line: one line that says what is wrong, exit code 2, nothing lost, nothing run."""

import multiprocessing
import time

import pytest
import torch
from tiny_runs import SMALL, call, write_voc

import eval as evaluation
import train
from tar import UserError
from tar.detectors.backbones import build_classifier
from tar.pictures.images_to_show import flags_of
from tar.training import checkpoint
from tar.training.flags import parse
from tar.training.process import Process, set_up
from tar.training.run_folder import begin_run, run_name


def wrong(capsys, main, *flags):
    """The one line that a wrong command prints."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *flags)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1 and "Traceback" not in text
    return text.splitlines()[-1]


def test_a_missing_checkpoint_and_a_folder_to_evaluate(capsys, tmp_path):
    assert "no such checkpoint" in wrong(capsys, evaluation.main, "--weights", tmp_path / "none.pth")
    assert "a folder; give the last.pth in it" in wrong(capsys, evaluation.main, "--weights", tmp_path)


def test_a_run_folder_of_other_settings(capsys, plain):
    line = wrong(capsys, train.main, *plain.flags, "--lr", 0.5)
    assert str(plain.run) in line and "0.004" in line and "0.5" in line and "--output" in line


def test_evaluation_on_data_of_other_classes(capsys, voc, tmp_path):
    other = write_voc(tmp_path / "other", ("ball", "box"), {"trainval": 1, "test": 1})
    line = wrong(capsys, evaluation.main, "--weights", voc.run / "last.pth", "--data-path", other)
    assert "disc" in line and "ball" in line


def test_figures_into_a_folder_that_is_not_there(capsys, plain, tmp_path):
    flags = ["--weights", plain.run / "last.pth", "--workers", 0, "--json", tmp_path / "none/figures.json"]
    assert str(tmp_path / "none") in wrong(capsys, evaluation.main, *flags)


def test_a_wrong_flag_does_not_occupy_the_run_folder(capsys, tmp_path):
    flags = [*SMALL, "--student", "r10", "--output", tmp_path / "run"]
    assert "none.pth" in wrong(capsys, train.main, *flags, "--backbone-weights", tmp_path / "none.pth")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_built_is_said_before_another_is_trained(capsys, tmp_path):
    weights, runs = tmp_path / "weights", tmp_path / "runs"
    weights.mkdir()
    (weights / "r18.pth").write_bytes(b"")
    flags = [*SMALL, "--backbone-weights", weights, "--output"]
    line = wrong(capsys, train.main, *flags, runs / "student", "--student", "r10", "--teacher", "r18")
    assert f"{weights}/r10.pth: no such file" in line
    torch.save(build_classifier("r10").state_dict(), weights / "r10.pth")
    assert f"{weights}/r18.pth: not a state dict" in wrong(capsys, train.main, *flags, runs, "--table", "claim")
    assert not runs.exists()


def test_a_folder_spelt_in_another_way_is_the_same_run():
    process = Process(0, 1, torch.device("cpu"), "none")
    names = {
        run_name(parse(["--dataset", "voc", "--student", "r10", "--data-path", p]), process) for p in ("a", "./a/")
    }
    assert len(names) == 1


def test_a_teacher_counts_by_its_content(tmp_path):
    for name, epochs in (("a.pth", 1), ("b.pth", 1), ("c.pth", 2)):
        checkpoint.save(tmp_path / name, {"epochs": epochs, "model": {"w": torch.ones(3)}})
    flags = ["--student", "r10", "--teacher", "r18", "--teacher-weights"]
    process = Process(0, 1, torch.device("cpu"), "none")
    a, b, c = (run_name(parse([*flags, str(tmp_path / name)]), process) for name in ("a.pth", "b.pth", "c.pth"))
    assert a == b != c


def test_a_run_that_another_process_trains_is_refused(tmp_path):
    def begin():
        begin_run(tmp_path, {}, 0, measured=False)

    fork, held = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Event()
    other = fork.Process(target=lambda: (begin(), held.set(), time.sleep(60)), daemon=True)
    other.start()
    assert held.wait(30)
    with pytest.raises(UserError, match="another process trains this run"):
        begin()
    other.kill()
    other.join()
    begin()
    begin()  # one process may train it twice


def test_a_damaged_teacher_that_has_ended_can_be_trained_on(capsys, plain, tmp_path):
    (tmp_path / "last.pth").write_bytes(b"rubbish")
    flags = [*plain.flags, "--teacher", "r18", "--teacher-weights", tmp_path / "last.pth", "--output", tmp_path / "run"]
    assert "result.json" not in wrong(capsys, train.main, *flags)
    (tmp_path / "result.json").write_text("{}")
    assert f"remove {tmp_path}/result.json: the teacher then goes on" in wrong(capsys, train.main, *flags)


def test_another_data_folder_has_its_own_files():
    moved = flags_of({"val_json": "old/val.json", "val_images": "old"}, data_path="new", val_images="images")
    assert (moved.data_path, moved.val_json, moved.val_images) == ("new", None, "images")


def test_a_single_gpu_is_chosen_without_an_index(monkeypatch):
    chosen = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for device in ("cuda", "auto"):
        process = set_up(device, "none")
        assert process.device.type == "cuda" and (process.rank, process.world) == (0, 1)
    assert set(chosen) <= {0}
