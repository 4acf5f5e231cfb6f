"""A checkpoint's file: damage to it, and a disk that fills while it is written."""

import errno
import os
import resource
from multiprocessing import get_context

import pytest
import torch

from tar import UserError
from tar.data.image_files import read_image
from tar.training import checkpoint
from tar.training.run_folder import checkpoint_to_resume
from tar.training.stop_signals import Stopped

STATE = {"model": {"w": torch.zeros(200_000)}, "build": {}, "classes": [], "settings": {"lr": 1}}


def flip(content, at=None):
    at = at or len(content) // 2  # inside the tensor
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def flip_pickle(content):
    return flip(content, content.index(b"settings") - 5)  # the opcode of a text


def cut(content):
    return content[:-1000]


def resumed(folder, lr=1):
    """The step of the checkpoint that a run goes on from, and what is said."""
    said = []
    saved = checkpoint_to_resume(folder, {"lr": lr}, said.append)
    return saved and saved["step"], "".join(said)


@pytest.mark.parametrize("damage", [flip, flip_pickle, cut, lambda _: b""], ids=["bit", "pickle", "cut", "empty"])
def test_damage_is_noticed_and_the_checkpoint_before_it_used(tmp_path, damage):
    last = tmp_path / "last.pth"
    assert resumed(tmp_path) == (None, "")
    for step in (1, 2):
        checkpoint.save(last, {**STATE, "step": step})
    assert resumed(tmp_path) == (2, "")
    with pytest.raises(UserError, match="other settings"):
        resumed(tmp_path, lr=2)
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(UserError, match=str(last)):
        checkpoint.load(last)
    step, said = resumed(tmp_path)
    assert step == 1 and f"going on from {tmp_path / 'previous.pth'}" in said
    (tmp_path / "previous.pth").unlink()
    with pytest.raises(UserError, match="remove it to start the run anew"):
        resumed(tmp_path)


def save_on_a_small_disk(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    with pytest.raises(UserError, match=f"last.pth: cannot be written .{os.strerror(errno.EFBIG)}"):
        checkpoint.save(path, STATE)


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_loses_nothing(tmp_path):
    checkpoint.save(tmp_path / "last.pth", STATE)
    before = (tmp_path / "last.pth").read_bytes()
    small = get_context("fork").Process(target=save_on_a_small_disk, args=(tmp_path / "last.pth",))
    small.start()
    small.join(60)
    assert small.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"] and (tmp_path / "last.pth").read_bytes() == before


def test_being_told_to_stop_is_not_taken_for_a_broken_image(monkeypatch, tmp_path):
    def stop(*_):
        raise Stopped("stopped", 15)

    monkeypatch.setattr("PIL.Image.open", stop)
    with pytest.raises(Stopped):
        read_image(tmp_path / "a.jpg")
