"""Checkpoints: written whole or not at all, read without running code, enough to rebuild the detector."""

import contextlib
import json
import os
import zipfile
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError

import torch

from tar import UserError, one_line
from tar.detectors.build import build_detector
from tar.training.run_state import RunState

FORMAT = 3
PREVIOUS = "previous.pth"


def save(path, state):
    """Writes a checkpoint through a temporary file, so that a crash leaves the old one in place.

    The one that was there is kept beside it as previous.pth.

    Args:
        path: file to write.
        state: dict of tensors and plain values; "model" (a state dict), "build" (the arguments of build_detector)
            and "classes" (names) and "settings" (flags) make it one that load_detector understands.

    Raises:
        UserError: it cannot be written.
    """
    _write(path, lambda file: torch.save({"format": FORMAT, **state}, file), "wb", keep=Path(path).with_name(PREVIOUS))


def save_json(path, value):
    """Writes a value as JSON, through a temporary file as save does."""
    save_text(path, json.dumps(value, indent=1) + "\n")


def save_text(path, text):
    """Writes a text, through a temporary file as save does."""
    _write(path, lambda file: file.write(text), "w")


def _write(path, write, mode, keep=None):
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, mode) as file:
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
    """Reads a checkpoint onto the CPU; weights_only, so that code inside a file never runs.

    Raises:
        UserError: no such file, or none of ours.
    """
    try:
        sound = not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip() is None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values, or is cut short; not loaded") from None
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise UserError(f"{path}: cannot be read as a checkpoint ({one_line(error)})") from error
    if not sound:
        raise UserError(f"{path}: damaged, its content does not fit its checksums; not loaded")
    if not isinstance(state, dict) or not {"format", "model", "build", "classes", "settings"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of train.py (it lacks the model's settings or classes)")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written in format {state['format']}, this code reads format {FORMAT}")
    return state


def load_latest(folder, say):
    """The newest sound checkpoint of a run's folder: last.pth, or the one before it; None if there is none.

    Args:
        say: told in a line, if last.pth could not be used.
    """
    last, previous = Path(folder) / "last.pth", Path(folder) / PREVIOUS
    if last.is_file():
        try:
            return load(last)
        except UserError as error:
            if not previous.is_file():
                raise UserError(f"{error}; remove it to start the run anew") from error
            state = load(previous)
            say(f"{error}: going on from {previous}; the damaged file is kept as {last}.damaged")
            with contextlib.suppress(FileNotFoundError):  # another process has done so
                os.replace(last, f"{last}.damaged")
            return state
    return load(previous) if previous.is_file() else None


def save_run(output, about, state, module, optimizer, scaler, guard, process):
    """Writes a run's last.pth, by rank 0: all that the run needs to go on exactly, and to rebuild the detector.

    Args:
        output: the run's folder.
        about: build, classes and settings, see save().
        state: RunState; module: DistillationStep.
    """
    state.bad_steps, state.streak = int(guard.total), int(guard.streak)
    state.sums = {name: process.average(value.float()) for name, value in state.sums.items()}
    saved = {**about, **vars(state), "model": module.student.state_dict(), "adapters": module.adapters.state_dict()}
    saved |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    process.alone(save, output / "last.pth", saved)


def restore(saved, module, optimizer, scaler, device):
    """Puts a checkpoint of save_run() back into what was built anew; returns its RunState."""
    module.student.load_state_dict(saved["model"])
    module.adapters.load_state_dict(saved["adapters"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    state = RunState(**{field.name: saved[field.name] for field in fields(RunState)})
    state.sums = {name: value.to(device) for name, value in state.sums.items()}
    return state


def load_detector(path):
    """The detector of a checkpoint, in evaluation mode on the CPU, and the whole checkpoint.

    Raises:
        UserError: as load, or weights that do not fit their own settings.
    """
    state = load(path)
    try:
        model = build_detector(**{**state["build"], "backbone_weights": "none"})
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError, UserError, ValueError) as error:
        raise UserError(f"{path}: its weights do not fit its settings ({one_line(error)})") from error
    return model.eval(), state
