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
from tar.training.stop_signals import Stopped

STATE = {"model": {"w": torch.zeros(200_000)}, "build": {}, "classes": [], "settings": {}}


def flip(content):
    middle = len(content) // 2  # inside the tensor
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip, lambda content: content[:-1000], lambda _: b""], ids=["a bit", "cut", "empty"]
)
def test_damage_is_noticed_and_the_checkpoint_before_it_used(tmp_path, damage):
    last, said = tmp_path / "last.pth", []
    for step in (1, 2):
        checkpoint.save(last, {**STATE, "step": step})
    assert checkpoint.load_latest(tmp_path, said.append)["step"] == 2 and not said
    damaged = damage(last.read_bytes())
    last.write_bytes(damaged)
    with pytest.raises(UserError, match=str(last)):
        checkpoint.load(last)
    assert checkpoint.load_latest(tmp_path, said.append)["step"] == 1
    assert len(said) == 1 and (tmp_path / "last.pth.damaged").read_bytes() == damaged


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
