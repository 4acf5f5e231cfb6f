"""What eval.py shows of trained detectors: pictures of the method, detections on any image, a report on a page."""

import contextlib
from argparse import Namespace
from pathlib import Path

from torch import nn

from tar import UserError, checkpoint
from tar.compare import errors_picture, errors_text
from tar.data import load_test_set
from tar.distill import Levels, Step
from tar.errors import cost_of_errors
from tar.evaluation import detect, recall_curves
from tar.images import read_image
from tar.models import build_coco_teacher
from tar.options import COCO_FILES, levels_of, parse
from tar.pictures import WIDE, Tile, detection_row, detections, few_colours, labelled, look, panel, sheet
from tar.report import class_table, curves, page, picture, preformatted, recall_plot, results_table, settings_table
from tar.tables import command_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PANELS = 2  # pictures of a run in a report


def flags_of(settings, **given):
    """A checkpoint's settings as flags of train.py; the given ones, those that are not None, count more."""
    return Namespace(**{**vars(parse([])), **settings, **{k: v for k, v in given.items() if v is not None}})


def test_set_of(args, classes):
    """The test source of some flags."""
    where = {"data_path": args.data_path, "years": args.voc_years}
    where |= {"files": [getattr(args, name) for name in COCO_FILES]}
    return load_test_set(args.dataset, classes, **where, limit=args.limit_test, split=args.split)


class Trio:
    """A student with what belongs to it: its teacher, and the plain student it is to be compared with.

    Args:
        weights: the student's checkpoint.
        teacher, plain: checkpoints of the others; default: the teacher of the student's settings, and the run `plain`
            beside the student's, if there is one.

    Raises:
        UserError: a file that is not there, or models that do not belong together.
    """

    def __init__(self, weights, machine, teacher=None, plain=None):
        self.weights, self.device = Path(weights), machine.device
        self.student, self.saved = checkpoint.load_detector(weights)
        settings, self.classes = self.saved["settings"], tuple(self.saved["classes"])
        self.distilled = bool(settings.get("teacher"))
        self.levels = levels_of(flags_of(settings)) if self.distilled else Levels()
        self.teacher = self._teacher(teacher or settings.get("teacher_weights"), settings)
        beside = self.weights.resolve().parent.parent / "plain/last.pth"
        self.plain = self._other(plain) if plain else None
        if plain is None and beside.is_file() and beside != self.weights.resolve():
            with contextlib.suppress(UserError):  # a run called so by chance
                self.plain = self._other(beside)
        self.step = Step(self.student, self.levels, self.teacher.backbone.out_channels if self.teacher else 1)
        if self.teacher and self.saved["adapters"]:
            try:
                self.step.adapters.load_state_dict(self.saved["adapters"])
            except RuntimeError:
                raise UserError(f"{weights}: its adapters do not lead to this teacher's features") from None
        else:
            self.step.adapters = nn.ModuleList()
        for model in (self.step, self.teacher, self.plain):
            if model is not None:
                machine.place(model).eval()

    def _teacher(self, path, settings):
        if path == "coco":
            return build_coco_teacher(settings["detector"], self.classes, *settings["size"])[0]
        if path and not Path(path).is_file():
            raise UserError(f"{path}: the teacher of {self.weights} is not there; give --teacher-weights FILE")
        return self._other(path) if path else None

    def _other(self, path):
        model, saved = checkpoint.load_detector(path)
        mine = self.saved["build"]["detector"], self.classes
        its = saved["build"]["detector"], tuple(saved["classes"])
        for what, one, other in zip(("detector", "classes"), mine, its, strict=True):
            if one != other:
                raise UserError(f"{path}: its {what}, {other}, are not those of {self.weights}, {one}")
        return model

    def panel(self, image, target, threshold, title, level=None):
        """All that tar.pictures shows of an image uint8 [3, H, W]; without target only its detections."""
        student = "TAR student" if self.distilled else "student"
        named = {"plain student": self.plain, student: self.student, "teacher": self.teacher}
        found = {n: detections(m, image, self.device, threshold) for n, m in named.items() if m is not None}
        if target is not None and self.teacher is not None:
            view = look(self.step, self.teacher, image, target, self.device)
            strides, gate = self.student.strides, self.levels.reg_gate
            return panel(view, self.classes, strides, found, threshold, title, gate, level)
        row = detection_row(image, found, self.classes, threshold)
        if target is not None:
            row.insert(0, labelled(Tile(image, "ground truth", WIDE), target["boxes"], target["labels"], self.classes))
        return sheet([row], title)


def samples_to_show(wanted, args, classes, say):
    """What --show names: (name, image, target or None) one by one.

    Args:
        wanted: words: a number of test images, or files; a file of the test set comes with its ground truth.
    """
    if len(wanted) == 1 and wanted[0].isdigit():
        source = test_set_of(args, classes)
        yield from (sample_of(source, index) for index in range(min(int(wanted[0]), len(source))))
        return
    source, known = None, {}
    if args.dataset == "shapes":
        say("Note: shapes are drawn, and files have no ground truth: detections only")
    else:
        try:
            source = test_set_of(args, classes)
            known = {Path(source.name(0, i)).resolve(): i for i in range(len(source))}
        except UserError as error:
            say(f"Note: no ground truth, and so detections only: {error}")
    for path in images_at(wanted):
        index = known.get(path.resolve())
        if index is None and source is not None:
            say(f"{path}: not in the {args.split} set; without ground truth there are detections only")
        yield (path.stem, read_image(path), None) if index is None else sample_of(source, index)


def sample_of(source, index):
    """(name, image, target) of a source's image; ignored boxes are left out, as in training."""
    image, boxes, labels, ignored = source.load(0, index)
    file = Path(source.name(0, index))
    name = file.stem if file.suffix.lower() in SUFFIXES else f"image-{index}"  # shapes have no files
    return name, image, {"boxes": boxes[~ignored], "labels": labels[~ignored]}


def save_pictures(trio, samples, threshold, folder, level=None):
    """Writes a panel for each sample, in few colours. Returns the files."""
    folder, files = made(folder), []
    for name, image, target in samples:
        files.append(folder / f"{name}.png")
        few_colours(trio.panel(image, target, threshold, name, level)).save(files[-1], optimize=True)
    return files


def images_at(paths):
    """The image files that some paths name; a folder stands for those in it."""
    files = []
    for path in map(Path, paths):
        inside = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: holds no image ({', '.join(SUFFIXES)})")
        files += inside
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such image")
    return files


def predict(model, classes, files, machine, threshold, folder):
    """Detections on any images: each drawn into the folder, and all as detections.json in COCO's format.

    A file that cannot be read is left out, with a line that names it; if none can, that is a UserError.

    Returns:
        the number of images, and of detections.
    """
    folder = made(folder)
    rows, images, width = [], [], len(str(len(files)))
    machine.place(model)
    for number, file in enumerate(machine.progress("detecting")(files), 1):
        try:
            image = read_image(file)
        except UserError as error:
            machine.say(f"Left out: {error}")
            continue
        with machine.autocast():
            boxes, labels, scores = detections(model, image, machine.device, threshold)
        tile = Tile(image, "", min(max(max(image.shape[1:]), WIDE), 1600))
        labelled(tile, boxes, labels, classes, scores).picture.save(folder / f"{number:0{width}d}-{file.stem}.png")
        images.append({"id": number, "file_name": str(file), "width": image.shape[2], "height": image.shape[1]})
        for (x0, y0, x1, y1), label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            about = {"id": len(rows) + 1, "image_id": number, "category_id": int(label), "score": score}
            rows.append({**about, **box})
    if not images:
        raise UserError(f"{files[0]}: none of {len(files)} files can be read as an image")
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    found = {"images": images, "annotations": rows, "categories": categories}
    checkpoint.save_json(folder / "detections.json", found)
    return len(images), len(rows)


def report(runs, machine, args, threshold):
    """Some runs as the text of an HTML page.

    Args:
        runs: of tar.compare.
        args: flags given to eval.py, where the data are.
    """
    sections = [("Results", results_table(runs) + "<h3>By class</h3>" + class_table(runs))]
    sections.append(("Training", curves(runs)))
    try:
        source = test_set_of(flags_of(runs[0].settings, **args), tuple(runs[0].result["per_class"]))
        results = {run.name: results_of(run, source, machine) for run in runs}
    except UserError as error:
        sections.append(("Detections", f'<p class="note">Left out, for the data cannot be read: {error}</p>'))
        results = {}
    if results:
        own = source if hasattr(source, "dataset") else None
        rows = {name: recall_curves(found, source.classes, own) for name, found in results.items()}
        sections.append(("Precision and recall", recall_plot(rows)))
    if len(results) == 2:
        split = {name: cost_of_errors(found, source.classes) for name, found in results.items()}
        shown = picture(errors_picture(split), "What each kind of error costs") + preformatted(errors_text(split))
        sections.append(("Where the difference comes from", shown))
    for run in runs if results else []:
        trio = Trio(run.weights, machine, args.get("teacher_weights"))
        panels = []
        for index in range(min(PANELS, len(source))):
            name, image, target = sample_of(source, index)
            panels.append(picture(trio.panel(image, target, threshold, name), f"{run.name}: {name}"))
        sections.append((f"Pictures of {run.name}", "".join(panels)))
    sections.append(("Settings", settings_table(runs)))
    commands = "\n\n".join(
        f"{run.name}:\n{command_of(flags_of(run.settings), '--seed', run.settings['seed'], '--output', run.folder)}"
        for run in runs
    )
    sections.append(("Commands", preformatted(commands)))
    return page(", ".join(run.name for run in runs), sections)


def results_of(run, source, machine):
    """A run's detections on a test source."""
    model = machine.place(checkpoint.load_detector(run.weights)[0])
    with machine.autocast():
        return detect(model, source, machine.device, 8, progress=machine.progress(run.name))


def made(folder):
    """A folder, made if it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --output") from None
    return Path(folder)
