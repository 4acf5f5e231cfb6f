"""What is in a data set: a line or two before each training; all of it, image by image, for --check-data."""

from collections import Counter
from statistics import median

import torch
from torch.utils.data import DataLoader, Dataset

from tar import UserError
from tar.images import oddities
from tar.tabulation import markdown

SHOWN = 5  # names of each kind


class _Facts(Dataset):
    """What is to be known of each image: a dict, or the text of the error that reading it gives."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            image, boxes, labels, ignored = self.source.load(0, index)
        except UserError as error:
            return str(error)
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(1).tolist()
        return {
            "name": self.source.name(0, index),
            "size": (image.shape[2], image.shape[1]),
            "odd": oddities(self.source.name(0, index), self.source.sizes[index]),
            "labels": labels.tolist(),
            "ignored": int(ignored.sum()),
            "sides": sides,
        }


def check(source, title, machine, workers=0):
    """Reads every image of a source and prints what is in it.

    Args:
        source: of tar.data, with `sizes`.
        title: what it is, for the headline.
        workers: loader processes.

    Returns:
        the number of images that cannot be read.
    """
    loader = DataLoader(_Facts(source), batch_size=None, num_workers=workers)
    rows = list(machine.progress(f"reading {title}")(loader))
    facts, broken = [r for r in rows if isinstance(r, dict)], [r for r in rows if isinstance(r, str)]
    boxes, images, odd = Counter(), Counter(), {}
    for fact in facts:
        boxes.update(fact["labels"])
        images.update(set(fact["labels"]))
        for word in fact["odd"]:
            odd.setdefault(word, []).append(fact["name"])
    empty = [fact["name"] for fact in facts if not fact["labels"]]
    sides = sorted(side for fact in facts for side in fact["sides"])
    widths, heights = (sorted(fact["size"][k] for fact in facts) for k in (0, 1))
    machine.say(
        f"\n{title}: {len(rows)} images, {len(sides)} boxes, {sum(f['ignored'] for f in facts)} of them ignored"
    )
    if facts:
        machine.say(f"  pixels: {widths[0]} to {widths[-1]} wide, {heights[0]} to {heights[-1]} high")
    if sides:
        machine.say(f"  shorter side of a box: {sides[0]:.1f} to {sides[-1]:.1f}, median {median(sides):.1f} pixels")
    for what, names in (
        ("images without a box", empty),
        ("images with boxes of no area, which are dropped", source.dropped),
        *(((f"images: {word}", names)) for word, names in sorted(odd.items())),
    ):
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            machine.say(f"  {len(names)} {what}: {', '.join(names[:SHOWN])}{more}")
    classes = [[name, boxes[k], images[k]] for k, name in enumerate(source.classes, 1)]
    machine.say("\n" + markdown(["class", "boxes", "images"], classes))
    for text in broken:
        machine.say(f"  cannot be used: {text}")
    return len(broken)


def report(data, machine):
    """One line on the data, and one on what was left out of it."""
    train_set, test_set = data
    threads = f"{torch.get_num_threads()} threads" if machine.device.type == "cpu" else machine.device
    machine.say(
        f"{len(train_set)} training and {len(test_set)} test images, {len(train_set.classes)} classes; "
        f"{machine.world} x {machine.device.type} ({threads}), {machine.amp} autocast, torch {torch.__version__}"
    )
    for name, source in (("training", train_set), ("test", test_set)):
        dropped = getattr(source, "dropped", [])
        if dropped:
            machine.say(
                f"Boxes of no area or outside were dropped in {len(dropped)} {name} images: {', '.join(dropped[:5])}"
            )
        unused = getattr(source, "unused", [])
        if unused:
            machine.say(f"Classes without a box among the {name} images: {', '.join(unused)}")
