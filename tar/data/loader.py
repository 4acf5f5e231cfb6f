"""Batches for training and testing: the order of the images, flips, loader processes, copies to the device."""

import atexit
import multiprocessing
import signal
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset):
    """A source as a data set of torch with keys (epoch, index); a sample is a function of its key alone.

    In training half of the images are flipped, as (seed, epoch, index) decides, and ignored boxes are left out.
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
                (x0, y0, x1, y1), width = boxes.unbind(1), image.shape[-1]
                image, boxes = image.flip(-1), torch.stack([width - x1, y0, width - x0, y1], 1)
        return image, {"boxes": boxes, "labels": labels, "ignored": ignored, "image_id": index}


def train_batches(length, batch_size, seed, epoch, rank=0, world=1, wide=None):
    """The keys, lists of (epoch, index), of one process's training batches in one epoch.

    Batch k of all processes together is the k-th slice of one order of the images, whose first fill up the end. `wide`:
    whether each image is wider than high; images of one orientation then share batches, which saves padding.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(length, generator=generator).tolist()
    if wide is not None:
        global_batch, whole, rest = batch_size * world, [], []
        for flag in (True, False):
            group = [i for i in order if wide[i] == flag]
            end = len(group) // global_batch * global_batch
            whole += [group[k : k + global_batch] for k in range(0, end, global_batch)]
            rest += group[end:]
        order = [i for k in torch.randperm(len(whole), generator=generator).tolist() for i in whole[k]] + rest
    order = (order * world)[: -(-length // world) * world]
    keys = [(epoch, index) for index in order[rank::world]]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


def test_batches(length, batch_size, rank=0, world=1):
    """The keys of one process's test batches: each image is in one batch of one process, whatever their number."""
    keys = [(0, index) for index in range(length)]
    return [keys[i : i + batch_size] for i in range(0, length, batch_size)][rank::world]


def make_loader(source, train, batches, seed=0, workers=0, pin_memory=False):
    """A loader of (list of images uint8, list of targets); batches: lists of keys, as of train_batches."""
    options = {"collate_fn": _collate, "pin_memory": pin_memory, **processes(workers)}
    return DataLoader(Samples(source, train, seed), batch_sampler=batches, **options)


def processes(workers):
    """DataLoader's arguments for loader processes. On Linux they are forked: a new one would import torch again."""
    context = "fork" if workers and sys.platform == "linux" else None
    return {"num_workers": workers, "multiprocessing_context": context, "worker_init_fn": _ignore_signals}


def _ignore_signals(_):
    """torchrun and Ctrl-C signal the loader processes too; they go on, for the training finishes its step first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Ends loader processes that an error left behind: they ignore the signal that multiprocessing would send."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _collate(batch):
    return tuple(list(column) for column in zip(*batch, strict=True))


def to_device(images, targets, device):
    """A batch on the device: images float [3, H, W] in 0..1, targets with boxes and labels only."""
    images = [image.to(device, non_blocking=True).float() / 255 for image in images]
    targets = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
    return images, targets
