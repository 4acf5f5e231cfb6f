"""Data sets, and the order in which their images are visited.

A source is anything with `classes` (names, label 1 first), `__len__` and `load(epoch, index)`, which returns
image uint8 [3, H, W], boxes float [N, 4] xyxy in pixels, labels int64 [N] from 1 and ignored bool [N] (VOC's
difficult boxes, COCO's crowds: no training on them, no penalty in evaluation). It may have `wide` (which images are
wider than high, to group them), `dropped` (images with boxes that could not be used), `unused` (classes without a
box) and `dataset` (COCO's own annotations).
"""

import atexit
import multiprocessing
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from tar import UserError
from tar.coco import Coco, coco_files
from tar.shapes import Shapes
from tar.voc import Voc, download_voc, tested_folders, voc_classes, voc_folders

DATASETS = ("shapes", "voc", "coco")
SHAPES_IMAGES = {"train": 700, "test": 400}  # an epoch of fresh images; the fixed test images


def load_dataset(
    name,
    data_path="data",
    years=("2007",),
    files=(None,) * 4,
    limit_train=0,
    limit_test=0,
    seed=0,
    download=False,
    split="test",
    keep_empty=False,
):
    """The training and the test source of a data set.

    Args:
        name: one of DATASETS.
        data_path: folder of the data (unused by shapes).
        years: of VOC; trained on the trainval lists of all, tested on those that have a test list.
        files: of COCO: training JSON and images, test JSON and images; None for those under data_path.
        limit_train, limit_test: first images only; 0 for all.
        seed: of the shapes that are drawn for training.
        download: fetch VOC first.
        split: "test", or "val" to tune on: voc then trains on the train list instead of trainval and tests on the val
            list, shapes tests on other images. COCO has one, val2017, which is "test" here.
        keep_empty: train on COCO's images without boxes too.

    Returns:
        train, test: two sources of the same classes.
    """
    if name == "shapes":
        train = Shapes("train", limit_train or SHAPES_IMAGES["train"], seed)
        return train, Shapes(split, limit_test or SHAPES_IMAGES["test"])
    if name == "coco":
        trained, tested = coco_files(data_path, files)
        train = Coco(*trained, keep_empty, limit_train)
        return train, _same_classes(Coco(*tested, True, limit_test), tested[0], train.classes)
    if download:
        download_voc(data_path, years)
    folders = voc_folders(data_path, years)
    trained, tested = "trainval" if split == "test" else "train", tested_folders(folders, split)
    classes = voc_classes([(f, trained) for f in folders] + [(f, split) for f in tested])
    return Voc(folders, trained, classes, limit_train), Voc(tested, split, classes, limit_test)


def load_test_set(name, classes, data_path="data", years=("2007",), files=(None,) * 4, limit=0, split="test"):
    """The test source alone, for a detector that knows the given classes; arguments as load_dataset."""
    if name == "shapes":
        return Shapes(split, limit or SHAPES_IMAGES["test"])
    if name == "coco":
        _, tested = coco_files(data_path, files)
        return _same_classes(Coco(*tested, True, limit), tested[0], classes)
    return Voc(tested_folders(voc_folders(data_path, years), split), split, classes, limit)


def _same_classes(test, file, classes):
    if test.classes != tuple(classes):
        raise UserError(f"{file}: its categories are not those trained on: {difference(classes, test.classes)}")
    return test


def difference(one, other):
    """In words, what two lists of classes do not share."""
    lacks, more = [c for c in one if c not in other], [c for c in other if c not in one]
    parts = [f"{what} {', '.join(map(str, names))}" for what, names in (("without", lacks), ("besides", more)) if names]
    return "; ".join(parts) or "the same names in another order"


class Samples(Dataset):
    """A source as torch's loader wants it; its keys are (epoch, index), so that an item is a function of its key.

    In training half of the images are flipped, as decided by (seed, epoch, index), and ignored boxes are left out.
    """

    def __init__(self, source, train, seed=0):
        self.source, self.train, self.seed = source, train, seed

    def __getitem__(self, key):
        """image uint8 [3, H, W]; target: boxes float [N, 4], labels int64 [N], ignored bool [N], image_id int."""
        epoch, index = key
        image, boxes, labels, ignored = self.source.load(epoch, index)
        if self.train:
            boxes, labels, ignored = boxes[~ignored], labels[~ignored], ignored[~ignored]
            if np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
                boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
                image, boxes = v2.horizontal_flip(image), v2.horizontal_flip(boxes).as_subclass(torch.Tensor)
        return image, {"boxes": boxes, "labels": labels, "ignored": ignored, "image_id": index}


def train_batches(length, batch_size, seed, epoch, rank=0, world=1, wide=None):
    """The keys of one process's batches in one epoch.

    Batch k of all processes together is the k-th slice of one order of the images, whatever the processes' number;
    the end is filled up from the start, so that every process has the same number of batches.

    Args:
        wide: list of bool, a flag an image; images of equal flags then come in the same batch, as far as they go,
            which spares padding. None: the order is a plain permutation.

    Returns:
        list of lists of (epoch, index).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(length, generator=generator).tolist()
    if wide is not None:
        together, whole, rest = batch_size * world, [], []
        for flag in (True, False):
            group = [i for i in order if wide[i] == flag]
            cut = len(group) // together * together
            whole += [group[k : k + together] for k in range(0, cut, together)]
            rest += group[cut:]
        order = [i for k in torch.randperm(len(whole), generator=generator).tolist() for i in whole[k]] + rest
    order = (order * world)[: -(-length // world) * world]
    keys = [(epoch, index) for index in order[rank::world]]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


def test_batches(length, batch_size, rank=0, world=1):
    """The keys of one process's share of the test batches: each image once, the same batches for any world."""
    batches = [[(0, i) for i in range(k, min(k + batch_size, length))] for k in range(0, length, batch_size)]
    return batches[rank::world]


def make_loader(source, train, batches, seed=0, workers=0, pin_memory=False):
    """Batches as (list of images uint8, list of targets), in the order of the keys given."""
    return DataLoader(
        Samples(source, train, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_lists,
        pin_memory=pin_memory,
        worker_init_fn=_deaf,
    )


def _deaf(_):
    """A loader process leaves signals to the training: torchrun and Ctrl-C send them to all, and a step is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """At the program's end: loader processes left behind by an error are deaf to the signal that would end them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _lists(batch):
    return tuple(list(column) for column in zip(*batch, strict=True))


def to_device(images, targets, device):
    """A batch on the device: images float [3, H, W] in 0..1, targets without what only evaluation needs."""
    images = [image.to(device, non_blocking=True).float() / 255 for image in images]
    targets = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
    return images, targets
