"""What a data set holds: a line or two before each training; every image, read and counted, for --check-data."""

from collections import Counter
from statistics import median

import torch
from torch.utils.data import DataLoader, Dataset

from tar import UserError
from tar.data.image_files import oddities

NAMES_SHOWN = 5  # images that a line names


class _Facts(Dataset):
    """The facts about each image of a source: a dict, or the text of the error that reading the image raises."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            image, boxes, labels, ignored = self.source.load(0, index)
        except UserError as error:
            return str(error)
        name = self.source.name(0, index)
        return {
            "name": name,
            "size": (image.shape[2], image.shape[1]),
            "oddities": oddities(name, self.source.sizes[index]),
            "labels": labels.tolist(),
            "ignored": int(ignored.sum()),
            "shorter sides": (boxes[:, 2:] - boxes[:, :2]).amin(1).tolist(),
        }


def check_data(source, title, process, workers=0):
    """Reads every image of a source and prints what the source holds.

    Args:
        source: of tar.data, with `sizes` and `dropped`.
        title: the source's name in the headline.
        workers: number of loader processes.

    Returns:
        the number of images that cannot be read.
    """
    loader = DataLoader(_Facts(source), batch_size=None, num_workers=workers)
    rows = list(process.progress(f"reading {title}")(loader))
    facts, errors = [r for r in rows if isinstance(r, dict)], [r for r in rows if isinstance(r, str)]
    boxes, images, odd = Counter(), Counter(), {}
    for fact in facts:
        boxes.update(fact["labels"])
        images.update(set(fact["labels"]))
        for word in fact["oddities"]:
            odd.setdefault(f"images: {word}", []).append(fact["name"])
    ignored, sides = sum(f["ignored"] for f in facts), sorted(side for f in facts for side in f["shorter sides"])
    process.say(f"\n{title}: {len(rows)} images, {len(sides)} boxes, {ignored} of them ignored")
    if facts:
        widths, heights = (sorted(column) for column in zip(*(f["size"] for f in facts), strict=True))
        process.say(f"  pixels: {widths[0]} to {widths[-1]} wide, {heights[0]} to {heights[-1]} high")
    if sides:
        process.say(f"  shorter side of a box: {sides[0]:.1f} to {sides[-1]:.1f}, median {median(sides):.1f} pixels")
    lists = {"images without a box": [f["name"] for f in facts if not f["labels"]]}
    lists |= {"images with boxes of no area, which are dropped": source.dropped, **dict(sorted(odd.items()))}
    for what, names in lists.items():
        if names:
            process.say(f"  {len(names)} {what}: {_first(names)}")
    width = max(map(len, ("class", *source.classes)))
    process.say(f"\n  {'class':<{width}}    boxes   images")
    for label, name in enumerate(source.classes, 1):
        process.say(f"  {name:<{width}} {boxes[label]:>8} {images[label]:>8}")
    process.say("")
    for text in errors:
        process.say(f"  cannot be used: {text}")
    return len(errors)


def describe(data, process):
    """Prints the sizes of the training and the test source and where they run, and what was left out of them."""
    train_set, test_set = data
    threads = f"{torch.get_num_threads()} threads" if process.device.type == "cpu" else process.device
    process.say(
        f"{len(train_set)} training and {len(test_set)} test images, {len(train_set.classes)} classes; "
        f"{process.world} x {process.device.type} ({threads}), {process.amp} autocast, torch {torch.__version__}"
    )
    for name, source in (("training", train_set), ("test", test_set)):
        if dropped := getattr(source, "dropped", []):
            process.say(f"Boxes of no area or outside were dropped in {len(dropped)} {name} images: {_first(dropped)}")
        if unused := getattr(source, "unused", []):
            process.say(f"Classes without a box among the {name} images: {', '.join(unused)}")


def _first(names):
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
