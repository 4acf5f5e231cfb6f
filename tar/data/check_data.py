"""What a data set holds: a line or two before each training; every image, read and counted, for --check-data."""

from collections import Counter
from functools import partial
from statistics import median

import torch
from torch.utils.data import DataLoader

from tar import UserError
from tar.data.loader import processes
from tar.data.source import counted


def _facts(source, index):
    """An image's (width, height) and its boxes' labels, ignored flags and shorter sides; or why it cannot be read."""
    try:
        image, boxes, labels, ignored = source.load(0, index)
    except UserError as error:
        return str(error)
    return image.shape[:0:-1], labels.tolist(), ignored.tolist(), (boxes[:, 2:] - boxes[:, :2]).amin(1).tolist()


def check_data(source, title, process, workers=0):
    """Reads every image of a Source and prints what it holds; returns the number of images that cannot be read."""
    loader = DataLoader(range(len(source)), None, collate_fn=partial(_facts, source), **processes(workers))
    rows = list(process.progress(f"reading {title}")(loader))
    errors, facts = [r for r in rows if isinstance(r, str)], [r for r in rows if not isinstance(r, str)]
    boxes = Counter(label for _, labels, *_ in facts for label in labels)
    images = Counter(label for _, labels, *_ in facts for label in {*labels})
    ignored, sides = sum(sum(f[2]) for f in facts), sorted(side for f in facts for side in f[3])
    process.say(f"\n{title}: {len(rows)} images, {len(sides)} boxes, {ignored} of them ignored")
    if facts:
        widths, heights = zip(*(size for size, *_ in facts), strict=True)
        process.say(f"  pixels: {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high")
    if sides:
        process.say(f"  shorter side of a box: {sides[0]:.1f} to {sides[-1]:.1f}, median {median(sides):.1f} pixels")
    for note in counted("images without a box", [source.name(0, i) for i, row in enumerate(rows) if row[1] == []]):
        process.say(f"  {note}")
    width = max(map(len, ("class", *source.classes)))
    process.say(f"\n  {'class':<{width}}    boxes   images")
    for label, name in enumerate(source.classes, 1):
        process.say(f"  {name:<{width}} {boxes[label]:>8} {images[label]:>8}")
    process.say("")
    for text in errors:
        process.say(f"  cannot be used: {text}")
    return len(errors)


def describe(data, process):
    """Prints the sizes of the training and the test source, where they run, and what is unusual about them."""
    train_set, test_set = data
    threads = f"{torch.get_num_threads()} threads" if process.device.type == "cpu" else process.device
    process.say(
        f"{len(train_set)} training and {len(test_set)} test images, {len(train_set.classes)} classes; "
        f"{process.world} x {process.device.type} ({threads}), {process.amp} autocast, torch {torch.__version__}"
    )
    for name, source in (("training", train_set), ("test", test_set)):
        for note in dict.fromkeys(source.notes):
            process.say(f"{name}: {note}")
