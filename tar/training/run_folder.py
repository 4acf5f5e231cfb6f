"""A run's folder: config.json, log.jsonl, last.pth and result.json, and what tells one run from another."""

import contextlib
import errno
import hashlib
import json
from argparse import Namespace
from pathlib import Path

from tar import UserError
from tar.training import checkpoint
from tar.training.flags import COCO_FILES, DISTILLATION, ONLY_OF

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCKS = []  # open files, which hold the locks of this process
# Flags that do not change what a run computes, and flags that mean nothing to a plain student.
INCIDENTAL = {
    *("output", "device", "threads", "deterministic", "workers", "download", "log_every", "save_every"),
    *("max_bad_steps", "check_data", "no_backbone", "no_cls", "no_reg", "recipe", "table", "seeds"),
}
TEACHING = {"teacher", "teacher_weights", *DISTILLATION}
PATHS = ("data_path", *COCO_FILES, "backbone_weights", "student_weights", "teacher_weights")


def changed(args, **changes):
    """A copy of the flags with some of them changed."""
    return Namespace(**{**vars(args), **changes})


def teacher_of(args):
    """The flags of the run that trains the teacher of a run first."""
    none = {"teacher": None, "teacher_weights": None, "student_weights": None, "output": None}
    return changed(args, **none, student=args.teacher, epochs=args.teacher_epochs or args.epochs)


def settings_of(args, process):
    """Everything that decides what a run computes: {flag: plain value}; teacher_digest: see checkpoint.digest()."""
    left_out = INCIDENTAL.union(*(names for dataset, names in ONLY_OF.items() if dataset != args.dataset))
    left_out = left_out.union(() if args.teacher else TEACHING, ["data_path"] if args.dataset == "shapes" else ())
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    settings |= {k: str(Path(settings[k])) for k in PATHS if settings.get(k)}  # data/ is data
    if args.teacher and args.teacher_weights:
        settings["teacher_digest"] = process.shared(process.on_main(checkpoint.digest, args.teacher_weights))
    return {**settings, "amp": process.amp, "images_per_step": args.batch_size * process.world}


def identity(settings):
    """The settings that tell runs apart: the teacher counts by its content, not by its path."""
    return {k: v for k, v in settings.items() if k != "teacher_weights" or v == "coco"}


def run_name(args, process):
    """A folder's name made of the settings: readable in front, a digest of all of them behind."""
    where = Path(args.train_json).parent if args.train_json else Path(args.data_path)
    data = args.dataset if args.dataset == "shapes" else where.resolve().name
    model = (f"{args.student}-tar-{args.teacher}" if args.teacher else args.student).replace("timm/", "")
    settings = json.dumps(identity(settings_of(args, process)), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
    return f"{data}-{args.detector}-{model}-{args.epochs}e-seed{args.seed}-{digest}"


def finished_result(output, settings):
    """What result.json holds if the run of a folder has ended, else None; UserError if it is of other settings."""
    config = output / "config.json"
    if not config.is_file():
        return None
    before = read_json(config)
    before, now = identity(before if isinstance(before, dict) else {}), identity(settings)
    other = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if other:
        shown = ", ".join(f"{k} {before.get(k)} (now {now.get(k)})" for k in other[:3])
        raise UserError(f"{config}: a run of other settings is there: {shown}; give another --output, or remove it")
    try:
        return read_json(output / "result.json") if (output / "result.json").is_file() else None
    except UserError as error:
        raise UserError(f"{error}; remove it: the run goes on from its checkpoint") from None


def checkpoint_to_resume(output, settings, say):
    """The newest sound checkpoint of a folder, or None; `say` prints a line if last.pth is broken.

    UserError: all are broken, or the newest is of other settings.
    """
    files = [file for file in (output / "last.pth", output / checkpoint.PREVIOUS) if file.is_file()]
    if not files:
        return None
    try:
        saved = checkpoint.load(files[0])
    except UserError as error:
        if len(files) == 1:
            raise UserError(f"{error}; remove it to start the run anew") from error
        saved = checkpoint.load(files[1])
        say(f"{error}: going on from {files[1]}")
    if identity(saved["settings"]) != identity(settings):
        raise UserError(f"{files[0]}: of a run of other settings; give another --output, or remove it")
    return saved


def begin_run(output, settings, step, measured):
    """Makes the folder of a run that starts, or goes on after some steps: config.json, and the log up to that step.

    measured: whether the figures that were measured after that very step stay in the log.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115  (held until this process ends)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None
    hold(lock, output)
    checkpoint.save_json(output / "config.json", settings)
    log, kept = output / "log.jsonl", []
    if not log.is_file():
        return
    for text in log.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the line that was being written when the run was killed
            line = json.loads(text)
            if line["step"] < step or (line["step"] == step and (measured or "metrics" not in line)):
                kept.append(text + "\n")
    checkpoint.save_text(log, "".join(kept))


def hold(lock, output):
    """Locks a run's folder by an open file until this process ends; UserError if another process trains the run."""
    LOCKS.append(lock)
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else the disk knows no locks
            text = "another process trains this run; wait for it, or give another --output"
            raise UserError(f"{output}: {text}") from None


def read_json(path):
    """A JSON file's value; UserError names the file if it is broken or missing."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def read_log(path):
    """The lines of a run's log.jsonl as dicts; UserError names the file and the line that is broken."""
    try:  # as one list, so that an error tells the line
        lines = json.loads("[" + ",\n".join(Path(path).read_text().splitlines()) + "]")
        if not all("step" in line for line in lines):
            raise ValueError("a line has no step")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as the log of a run ({error})") from None
    return lines


def append_line(path, value):
    """Adds one value to a file of JSON lines."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the run's checkpoint is kept") from None
