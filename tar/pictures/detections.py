"""Detections on single images: as tiles, and as files (--predict)."""

import torch

from tar import UserError
from tar.data.image_files import read_image
from tar.data.loader import to_device
from tar.pictures.images_to_show import make_folder
from tar.pictures.tiles import WIDE, Tile
from tar.training import checkpoint


@torch.inference_mode()
def detect_one(model, image, device, threshold):
    """Boxes [D, 4], labels [D] and scores [D] not below a threshold, of an image uint8 [3, H, W]; on the CPU."""
    found = model(to_device([image], [], device)[0])[0]
    kept = (found["scores"] >= threshold) & (found["labels"] > 0)
    return tuple(found[key][kept].float().cpu() for key in ("boxes", "labels", "scores"))


def detection_row(models, image, classes, device, threshold):
    """Tiles: the detections of {title: detector}."""
    tiles = []
    for title, model in models.items():
        boxes, labels, scores = detect_one(model, image, device, threshold)
        tile = Tile(image, f"{title}: {len(boxes)} at {threshold:g} or more", WIDE)
        tiles.append(tile.objects(boxes, labels, classes, scores))
    return tiles


def predict(model, classes, files, process, threshold, folder):
    """Detections on image files: each image drawn into the folder, and all as detections.json in COCO's format.

    A file that cannot be read is left out, with a line that names it; if none can, that is a UserError.
    Returns the number of images and the number of detections.
    """
    folder, digits = make_folder(folder), len(str(len(files)))
    images, annotations = [], []
    process.place(model)
    for number, file in enumerate(process.progress("detecting")(files), 1):
        try:
            image = read_image(file)
        except UserError as error:
            process.say(f"Left out: {error}")
            continue
        with process.autocast():
            boxes, labels, scores = detect_one(model, image, process.device, threshold)
        tile = Tile(image, "", side=min(max(max(image.shape[1:]), WIDE), 1600)).objects(boxes, labels, classes, scores)
        tile.picture.save(folder / f"{number:0{digits}d}-{file.stem}.png")
        images.append({"id": number, "file_name": str(file), "width": image.shape[2], "height": image.shape[1]})
        sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()  # x, y, width, height
        for box, label, score in zip(sizes, labels.int().tolist(), scores.tolist(), strict=True):
            about = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "score": score}
            annotations.append({**about, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    if not images:
        raise UserError(f"{files[0]}: none of {len(files)} files can be read as an image")
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, 1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    checkpoint.save_json(folder / "detections.json", coco)
    return len(images), len(annotations)
