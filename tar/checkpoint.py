"""Checkpoints: written whole or not at all, read without running code, enough to rebuild the detector."""

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch

from tar import UserError, one_line
from tar.models import build_detector

FORMAT = 1


def save(path, state):
    """Writes a checkpoint through a temporary file, so that a crash leaves the old one in place.

    Args:
        path: file to write.
        state: dict of tensors and plain values; "model" (a state dict), "build" (the arguments of build_detector)
            and "classes" (names) and "settings" (flags) make it one that load_detector understands.

    Raises:
        UserError: it cannot be written.
    """
    _write(path, lambda file: torch.save({"format": FORMAT, **state}, file), "wb")


def save_json(path, value):
    """Writes a value as JSON, through a temporary file as save does."""
    _write(path, lambda file: file.write(json.dumps(value, indent=1) + "\n"), "w")


def _write(path, write, mode):
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); what was there is kept") from error


def load(path):
    """Reads a checkpoint onto the CPU; weights_only, so that code inside a file never runs.

    Raises:
        UserError: no such file, or none of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, or is cut short; not loaded") from None
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise UserError(f"{path}: cannot be read as a checkpoint ({one_line(error)})") from error
    if not isinstance(state, dict) or not {"format", "model", "build", "classes", "settings"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of train.py (it lacks the model's settings or classes)")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written in format {state['format']}, this code reads format {FORMAT}")
    return state


def load_detector(path):
    """The detector of a checkpoint, in evaluation mode on the CPU, and the whole checkpoint.

    Raises:
        UserError: as load, or weights that do not fit their own settings.
    """
    state = load(path)
    model = build_detector(**{**state["build"], "backbone_weights": "none"})
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its settings ({one_line(error)})") from error
    return model.eval(), state
