"""Detections on image files, drawn and in COCO's format (--predict)."""

import os
from pathlib import Path

import torch

from tar import UserError
from tar.data.image_files import files_in, read_image, suffixes
from tar.data.loader import to_device
from tar.data.source import counted
from tar.evaluation.average_precision import coco_annotations
from tar.pictures.tiles import WIDE, with_objects
from tar.training import checkpoint


@torch.inference_mode()
def detect_one(model, image, threshold, device="cpu"):
    """Boxes [D, 4], labels [D] and scores [D] not below a threshold, of an image uint8 [3, H, W]; on the CPU."""
    found = model(to_device([image], [], device)[0])[0]
    kept = (found["scores"] >= threshold) & (found["labels"] > 0)
    return found["boxes"][kept].float().cpu(), found["labels"][kept].cpu(), found["scores"][kept].float().cpu()


def predict(model, classes, paths, process, threshold, folder):
    """Detections on image files: each image drawn into a folder, and all as detections.json in COCO's format.

    A file that cannot be read is left out, with a line that names it; if none can, it is a UserError.
    Returns the number of images and the number of detections.
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
            boxes, labels, scores = detect_one(model, image, threshold, process.device)
        side = min(max(*image.shape[1:], WIDE), 1600)
        picture = with_objects(image, boxes, labels, classes, scores, side)
        picture.save(folder / f"{number:06d}-{Path(file).stem[:60]}.png")
        images.append({"id": number, "file_name": file, "width": image.shape[2], "height": image.shape[1]})
        annotations += coco_annotations(number, boxes, labels, "score", scores)
    if not images:
        raise UserError(f"{files[0]}: none of {len(files)} files can be read as an image")
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
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
