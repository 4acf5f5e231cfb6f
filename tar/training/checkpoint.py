"""Checkpoints: written whole or not at all, read without running code, enough to rebuild the detector."""

import contextlib
import hashlib
import json
import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from tar import UserError, one_line
from tar.detectors.build import build_detector

FORMAT = 3
PREVIOUS = "previous.pth"


def save(path, state):
    """Writes a checkpoint; keeps the one before it as previous.pth. UserError: it cannot be written.

    state: tensors and plain values; with model (a state dict), build (arguments of build_detector), classes, settings.
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
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); what was there is kept") from error


def digest(path):
    """What tells a checkpoint's content from another's, made of its zip's checksums; None where there is none."""
    try:
        with zipfile.ZipFile(path) as file:
            sums = sorted(entry.CRC for entry in file.infolist())
            return hashlib.sha256(str(sums).encode()).hexdigest()[:12]
    except (OSError, zipfile.BadZipFile):
        return None


def load(path):
    """Reads a checkpoint onto the CPU; code inside a file never runs. UserError: no such file, or none of ours."""
    try:
        with zipfile.ZipFile(path) as file:
            if any(name.endswith("/constants.pkl") for name in file.namelist()):
                raise ValueError("a TorchScript file; give the last.pth of a run")
            if file.testzip():  # torch does not look at the checksums
                raise ValueError("damaged, its content does not fit its checksums")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        known = {
            IsADirectoryError: "a folder; give the last.pth in it",
            UnpicklingError: "it holds more than tensors and plain values",
            zipfile.BadZipFile: "no zip file, or cut short",
        }
        what = known.get(type(error), one_line(error))
        raise UserError(f"{path}: cannot be read as a checkpoint ({what})") from error
    if not isinstance(state, dict) or not {"format", "model", "build", "classes", "settings"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of train.py: it has no settings and classes")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written in format {state['format']}, this code reads format {FORMAT}")
    return state


def load_detector(path):
    """The detector of a checkpoint, in evaluation mode on the CPU, and the whole checkpoint; UserError as load()."""
    state = load(path)
    try:
        model = build_detector(**{**state["build"], "backbone_weights": "none"})
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError, UserError, ValueError) as error:
        raise UserError(f"{path}: its weights do not fit its settings ({one_line(error)})") from error
    return model.eval(), state
