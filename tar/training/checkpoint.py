"""Checkpoints: written whole or not at all, read without running code, enough to rebuild the detector."""

import contextlib
import json
import os
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from tar import UserError, one_line
from tar.detectors.build import build_detector

FORMAT = 3
PREVIOUS = "previous.pth"
PROGRAMS = ("ultralytics", "detectron2", "mmengine", "mmcv")  # words in their checkpoints


def save(path, state):
    """Writes a checkpoint; the one that was there is kept beside it as previous.pth. UserError: it cannot be written.

    state: tensors and plain values; "model" (a state dict), "build" (the arguments of build_detector), "classes" and
    "settings" (flags) are needed to read it. A temporary file is written first: a crash leaves the old file in place.
    """
    _write(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=Path(path).with_name(PREVIOUS))


def save_json(path, value):
    """Writes a value as JSON."""
    save_text(path, json.dumps(value, indent=1) + "\n")


def save_text(path, text):
    """Writes a text."""
    _write(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def _write(path, write, keep=None):
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and Path(path).exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns an error in the middle of a file into its own
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else one_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); what was there is kept") from error


def load(path):
    """Reads a checkpoint onto the CPU; code inside a file never runs. UserError: no such file, or none of ours."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of a TorchScript file before it refuses it
            state = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as file:
            sound = file.testzip() is None  # torch does not look at the checksums
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        unsafe = "holds more than tensors and plain values, or is cut short"
        what = _what_it_is(path) or (unsafe if isinstance(error, UnpicklingError) else one_line(error))
        raise UserError(f"{path}: cannot be read as a checkpoint ({what})") from error
    if not sound:
        raise UserError(f"{path}: damaged, its content does not fit its checksums; not loaded")
    if not isinstance(state, dict) or not {"format", "model", "build", "classes", "settings"} <= state.keys():
        tensors = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
        what = _what_it_is(path) or ("a state dict" if tensors else "of another program")
        raise UserError(f"{path}: {what}, not a checkpoint of train.py: it has no settings and classes")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written in format {state['format']}, this code reads format {FORMAT}")
    return state


def _what_it_is(path):
    """What a file is that train.py has not written, in words; None if its bytes do not tell."""
    if os.path.isdir(path):
        return "a folder, give the last.pth in it"
    names, content = [], b""
    with contextlib.suppress(OSError, zipfile.BadZipFile):  # a damaged file tells nothing
        with open(path, "rb") as file:
            content = file.read(1 << 20)
        with zipfile.ZipFile(path) as file:
            names = [os.path.basename(name) for name in file.namelist()]
            content = b"".join(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))
    if "constants.pkl" in names:
        return "a TorchScript model, give the last.pth of its run"
    return next((f"a checkpoint of {name}" for name in PROGRAMS if name.encode() in content.lower()), None)


def load_detector(path):
    """The detector of a checkpoint, in evaluation mode on the CPU, and the whole checkpoint; UserError as load()."""
    state = load(path)
    try:
        model = build_detector(**{**state["build"], "backbone_weights": "none"})
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError, UserError, ValueError) as error:
        raise UserError(f"{path}: its weights do not fit its settings ({one_line(error)})") from error
    return model.eval(), state
