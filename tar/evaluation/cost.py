"""What a detector and a distillation cost: milliseconds an image, and a distillation step's time in plain steps."""

import time

import numpy as np
import torch

from tar.data.loader import to_device


@torch.inference_mode()
def latency(model, source, device, autocast, images=20):
    """Milliseconds from one image's pixels to its boxes, at batch size 1: the median over some images of a source."""
    model.eval()
    seconds = []
    for index in range(min(images + 3, len(source))):
        batch, _ = to_device([source.load(0, index)[0]], [], device)
        started = time.perf_counter()
        with autocast:
            scores = model(batch)[0]["scores"]
        scores.cpu()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds[3:] or seconds))  # the first are warm-up


def cost_of_distillation(step, teacher, loader, optimizer, process):
    """The time of a distillation step over the time of a plain step: a ratio of medians.

    Each batch is timed once with each kind of step. The run is over by then: the learning rate is set to 0, and
    the gradients are not averaged over processes.

    Args:
        step: a DistillationStep.
        loader: gives the batches to time.
        optimizer: the optimizer of the step's parameters.

    Returns:
        float.
    """
    seconds = {True: [], False: []}
    step.train()
    step.adapters.requires_grad_(True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for batch in loader:
        images, targets = to_device(*batch, process.device)
        for with_teacher in (True, False):
            process.wait()
            started = time.perf_counter()
            with process.autocast():
                detection, distillation, _ = step(images, targets, teacher if with_teacher else None)
            optimizer.zero_grad()
            sum([*detection.values(), *distillation.values()]).backward()
            optimizer.step()
            process.wait()
            seconds[with_teacher].append(time.perf_counter() - started)
    return float(np.median(seconds[True]) / np.median(seconds[False]))
