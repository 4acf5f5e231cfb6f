"""The optimizer of a run, and torch.compile for its backbones."""

import os
import shutil

import torch

from tar import UserError


def build_optimizer(args, module, lr):
    """SGD with momentum or AdamW over the parameters of a module that train; fused kernels.

    Args:
        args: flags optimizer, momentum (of SGD) and weight_decay.
        lr: the learning rate after the warm-up.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    return torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay, fused=True)


def compile_backbones(student, teacher=None):
    """Compiles the backbones in place; UserError where there is no C++ compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("--compile: torch.compile needs a C++ compiler; install g++, or leave it out").for_all()
    for model in (student, teacher) if teacher else (student,):
        model.backbone.compile()
