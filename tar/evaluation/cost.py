"""What a detector and a distillation cost: milliseconds an image, a distillation step's time in plain steps, FLOP."""

import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from tar.data.loader import to_device


@torch.inference_mode()
def latency(model, source, device, autocast):
    """Milliseconds from one image's pixels to its boxes, at batch size 1: the median over some images of a source."""
    model.eval()
    seconds = []
    for index in range(min(23, len(source))):
        batch, _ = to_device([source.load(0, index)[0]], [], device)
        started = time.perf_counter()
        with autocast:
            model(batch)[0]["scores"].cpu()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[3:] or seconds)  # the first are warm-up


def cost_of_distillation(step, teacher, loader, optimizer, process):
    """The time of a distillation step over the time of a plain step: a ratio of medians over the loader's batches.

    step: a DistillationStep whose run is over: the learning rate is set to 0, and gradients are not averaged over
    processes. optimizer: that of its parameters.
    """

    def train_on(images, targets, teacher):
        with process.autocast():
            detection, distillation, _ = step(images, targets, teacher)
        optimizer.zero_grad()
        sum([*detection.values(), *distillation.values()]).backward()
        optimizer.step()

    distilled, plain = [], []
    step.train()
    step.adapters.requires_grad_(True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for batch in loader:
        batch = to_device(*batch, process.device)
        distilled.append(timed(process, train_on, *batch, teacher))
        plain.append(timed(process, train_on, *batch, None))
    return median(distilled) / median(plain)


def timed(process, call, *args):
    """Seconds of a call, to the end of what it gave a GPU to do."""
    process.wait()
    started = time.perf_counter()
    call(*args)
    process.wait()
    return time.perf_counter() - started


def flops(call, *args):
    """FLOP of a call: of convolutions and matrix products, two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()
