"""Damage to a checkpoint's file."""

import pytest
import torch

from tar import UserError
from tar.training import checkpoint
from tar.training.run_folder import checkpoint_to_resume

STATE = {"model": {"w": torch.zeros(200_000)}, "build": {}, "classes": [], "settings": {"lr": 1}}


def flip(content, at=400_000):  # inside the tensor
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "bit": flip,
    "pickle": lambda content: flip(content, content.index(b"settings") - 5),  # the opcode of a text
    "cut": lambda content: content[:-1000],
    "empty": lambda _: b"",
}


def resumed(folder, lr=1):
    """The step of the checkpoint that a run goes on from, and what is said."""
    said = []
    saved = checkpoint_to_resume(folder, {"lr": lr}, said.append)
    return saved and saved["step"], "".join(said)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_the_checkpoint_before_it_used(tmp_path, damage):
    last = tmp_path / "last.pth"
    assert resumed(tmp_path) == (None, "")
    for step in (1, 2):
        checkpoint.save(last, {**STATE, "step": step})
    assert resumed(tmp_path) == (2, "")
    with pytest.raises(UserError, match="other settings"):
        resumed(tmp_path, lr=2)
    last.write_bytes(damage(last.read_bytes()))
    step, said = resumed(tmp_path)
    assert step == 1 and said.startswith(f"{last}: ") and f"going on from {tmp_path / 'previous.pth'}" in said
    (tmp_path / "previous.pth").unlink()
    with pytest.raises(UserError, match="remove it to start the run anew"):
        resumed(tmp_path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda file: file.write_text("hello"), "no zip file"),
        (lambda file: torch.save(torch.nn.Linear(1, 1), file), "more than tensors"),
        (lambda file: torch.jit.save(torch.jit.script(torch.nn.ReLU()), file), r"\(a TorchScript file;[^(]{,40}\)$"),
        (lambda file: torch.save({"model": {}}, file), "no settings"),
        (lambda file: torch.save({"format": 2, **STATE}, file), "format 2"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_file_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path, write, says):
    write(tmp_path / "a.pth")
    with pytest.raises(UserError, match=says):
        checkpoint.load(tmp_path / "a.pth")
