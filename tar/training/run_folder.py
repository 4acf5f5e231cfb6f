"""A run's folder: config.json, log.jsonl, last.pth and result.json, and what tells one run from another."""

import hashlib
import json
from argparse import Namespace
from pathlib import Path

from tar import UserError
from tar.training import checkpoint
from tar.training.flags import DISTILLATION

# Flags that do not change what a run computes.
INCIDENTAL = {
    *("output", "device", "threads", "deterministic", "compile", "workers", "download", "log_every", "save_every"),
    *("max_bad_steps", "check_data", "no_backbone", "no_cls", "no_reg", "recipe", "table", "seeds"),
}
# Flags that mean nothing to some runs.
TEACHING = {"teacher", "teacher_weights", *DISTILLATION}
FILES = {  # flags of each data set
    "shapes": set(),
    "voc": {"data_path", "voc_years"},
    "coco": {"data_path", "train_json", "train_images", "val_json", "val_images", "keep_empty"},
}


def changed(args, **changes):
    """A copy of the flags with some of them changed."""
    return Namespace(**{**vars(args), **changes})


def teacher_of(args):
    """The flags of the run that trains the teacher of a run first."""
    none = {"teacher": None, "teacher_weights": None, "student_weights": None, "inherit": False, "output": None}
    return changed(args, **none, student=args.teacher, epochs=args.teacher_epochs or args.epochs)


def settings_of(args, process):
    """Everything that decides what a run computes: {flag: plain value}."""
    left_out = INCIDENTAL | (set() if args.teacher else TEACHING)
    left_out |= set().union(*FILES.values()) - FILES[args.dataset]
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in left_out}
    return {**settings, "amp": process.amp, "images_per_step": args.batch_size * process.world}


def run_name(args, process):
    """A folder's name made of the settings: readable in front, a digest of all of them behind."""
    where = Path(args.train_json).parent if args.dataset == "coco" and args.train_json else Path(args.data_path)
    data = args.dataset if args.dataset == "shapes" else where.resolve().name
    model = f"{args.student}-tar-{args.teacher}" if args.teacher else args.student
    digest = hashlib.sha256(json.dumps(settings_of(args, process), sort_keys=True).encode()).hexdigest()[:6]
    return f"{data}-{args.detector}-{model}-{args.epochs}e-seed{args.seed}-{digest}"


def finished_result(output, settings):
    """The result of a run that has ended; writes nothing.

    Args:
        output: the folder.
        settings: of the run that is to be done.

    Returns:
        result.json's dict if the run has ended, else None.

    Raises:
        UserError: the folder holds a run of other settings.
    """
    config = output / "config.json"
    if not config.is_file():
        return None
    before = read_json(config)
    if not isinstance(before, dict):
        raise UserError(f"{config}: holds no settings of a run; give another --output, or remove it")
    other = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
    if other:
        shown = ", ".join(f"{k} {before.get(k)} (now {settings.get(k)})" for k in other[:3])
        raise UserError(f"{config}: a run of other settings is there: {shown}; give another --output, or remove it")
    return read_json(output / "result.json") if (output / "result.json").is_file() else None


def checkpoint_to_resume(output, settings, say):
    """The checkpoint that a run goes on from; None for a new run."""
    saved = checkpoint.load_latest(output, say)
    if saved and saved["settings"] != settings:
        raise UserError(f"{output / 'last.pth'}: of a run of other settings; give another --output, or remove it")
    return saved


def begin_run(output, settings, step, measured):
    """Makes the folder of a run that starts, or goes on after some steps, and its config.json."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    checkpoint.save_json(output / "config.json", settings)
    trim_log(output / "log.jsonl", step, measured)


def read_json(path):
    """A JSON file's value; UserError names the file if it is broken or missing."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def read_log(path):
    """The lines of a run's log.jsonl as dicts; UserError names the file and the line that is broken."""
    lines = []
    try:
        for text in Path(path).read_text().splitlines():
            line = json.loads(text)
            if "step" not in line:
                raise ValueError("it has no step")
            lines.append(line)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: line {len(lines) + 1} is none of a run's log ({error})") from None
    return lines


def append_line(path, value):
    """Adds one value to a file of JSON lines."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the run's checkpoint is kept") from None


def trim_log(path, step, measured):
    """Takes off a log what came after the given step: the run goes on from there and writes it again.

    Args:
        measured: whether the figures that were measured after that very step are kept.
    """
    if not path.is_file():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that was being written when the run was killed
            continue
        if line["step"] < step or (line["step"] == step and (measured or "metrics" not in line)):
            kept.append(text + "\n")
    checkpoint.save_text(path, "".join(kept))
