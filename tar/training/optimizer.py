"""The optimizer of a run, and its learning rate at each step."""

import math

import torch

from tar.method.decay import DROPS

SCHEDULES = ("step", "cosine")


def build_optimizer(args, module, lr):
    """SGD with momentum or AdamW over the parameters of a module that train; fused kernels."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    return torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay, fused=True)


def learning_rate(step, total_steps, base, warmup=500, kind="step"):
    """The learning rate of a step, counted from 0: a linear warm-up from base / 1000 to base, then the schedule.

    step: base, divided by ten after 8/12 and again after 11/12 of the run (epochs 8 and 11 of the paper's 12).
    cosine: half a cosine from base to 0. The warm-up takes at most a tenth of the run.
    """
    warmup = min(warmup, max(total_steps // 10, 1))
    ramp = min(1.0, 0.001 + 0.999 * step / warmup) if warmup else 1.0
    done = step / max(total_steps, 1)
    if kind == "step":
        return base * ramp * 0.1 ** sum(done >= drop for drop in DROPS)
    return base * ramp * (1 + math.cos(math.pi * min(done, 1.0))) / 2
