"""What a data set holds: a line or two before each training; every image, read and counted, for --check-data."""

from collections import Counter, defaultdict
from functools import partial
from statistics import median

import torch
from torch.utils.data import DataLoader

from tar import UserError
from tar.data.image_files import oddities
from tar.data.loader import processes
from tar.data.source import listed


def _facts(source, index):
    """The facts about one image as a dict, or the text of the error that reading it raises."""
    try:
        image, boxes, labels, ignored = source.load(0, index)
    except UserError as error:
        return str(error)
    name, sides = source.name(0, index), (boxes[:, 2:] - boxes[:, :2]).amin(1).tolist()
    odd = oddities(name, source.sizes[index].tolist(), source.exif) + ([] if len(boxes) else ["without a box"])
    facts = {"labels": labels.tolist(), "ignored": int(ignored.sum()), "shorter sides": sides}
    return {**facts, "name": name, "width": image.shape[2], "height": image.shape[1], "oddities": odd}


def check_data(source, title, process, workers=0):
    """Reads every image of a Source and prints what it holds; returns the number of images that cannot be read."""
    loader = DataLoader(range(len(source)), None, collate_fn=partial(_facts, source), **processes(workers))
    rows = list(process.progress(f"reading {title}")(loader))
    facts, errors = [r for r in rows if isinstance(r, dict)], [r for r in rows if isinstance(r, str)]
    boxes, images, lists = Counter(), Counter(), defaultdict(list)
    for fact in facts:
        boxes.update(fact["labels"])
        images.update(set(fact["labels"]))
        for what in fact["oddities"]:
            lists[f"images: {what}"].append(fact["name"])
    ignored, sides = sum(f["ignored"] for f in facts), sorted(side for f in facts for side in f["shorter sides"])
    process.say(f"\n{title}: {len(rows)} images, {len(sides)} boxes, {ignored} of them ignored")
    if facts:
        widths, heights = ([f[key] for f in facts] for key in ("width", "height"))
        process.say(f"  pixels: {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high")
    if sides:
        process.say(f"  shorter side of a box: {sides[0]:.1f} to {sides[-1]:.1f}, median {median(sides):.1f} pixels")
    for what, names in sorted(lists.items()):
        process.say(f"  {len(names)} {what}: {listed(names)}")
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
