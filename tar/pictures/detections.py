"""Detections on image files, drawn and in COCO's format (--predict)."""

import os
from pathlib import Path

from tar import UserError
from tar.data.image_files import files_in, read_image, suffixes
from tar.data.source import counted
from tar.evaluation.average_precision import coco_annotations
from tar.evaluation.detect import detections
from tar.pictures.tiles import WIDE, with_objects
from tar.training import checkpoint


def predict(model, classes, paths, process, threshold, folder):
    """Detections on image files: each image drawn into a folder, and all as detections.json in COCO's format.

    A file that cannot be read is named and left out; UserError if none can. Returns how many images and detections.
    """
    files, others = image_files(paths)
    for note in counted("Left out, no images by their names", others):
        process.say(note)
    folder, images, annotations = make_folder(folder), [], []
    process.place(model)
    for number, file in enumerate(process.progress("detecting")(files), 1):
        try:
            image = read_image(file)
        except UserError as error:
            process.say(f"Left out: {error}")
            continue
        with process.autocast():
            [found] = detections(model, [image], process.device, threshold)
        picture = with_objects(image, found, classes, side=min(max(*image.shape[1:], WIDE), 1600))
        picture.save(folder / f"{number:06d}-{Path(file).stem[:60]}.png")
        images.append({"id": number, "file_name": file, "width": image.shape[2], "height": image.shape[1]})
        annotations += coco_annotations(number, found["boxes"], found["labels"], "score", found["scores"])
    if not images:
        raise UserError(f"{files[0]}: none of {len(files)} files can be read as an image")
    coco = {"images": images, "annotations": [{"id": i, **each} for i, each in enumerate(annotations, 1)]}
    coco["categories"] = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    checkpoint.save_json(folder / "detections.json", coco)
    return len(images), len(annotations)


def image_files(paths):
    """The image files that paths name, where a folder stands for all images in it; and what else is in the folders."""
    files, others, kinds = [], [], tuple(suffixes())
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such image")
        inside = sorted(files_in(path)) if os.path.isdir(path) else [path]
        images = [file for file in inside if file == path or file.lower().endswith(kinds)]
        if not images:
            raise UserError(f"{path}: holds no image, but {len(inside)} other files")
        others += sorted({*inside} - {*images})
        files += images
    return files, others


def make_folder(folder):
    """A folder, made if it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --output") from None
    return Path(folder)
