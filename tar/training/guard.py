"""Steps that are not finite: kept away from the weights, counted, and after too many the end of the run."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from tar import UserError, one_line


class Diverged(UserError):
    """Too many steps in a row were not finite; exit code 3."""

    code, once = 3, True


class Guard:
    """Keeps steps whose gradient is not finite away from the weights, and counts them.

    Nothing here waits for the device: the optimizer's fused kernel is given a flag that lives there and leaves the
    weights and its own state alone where the flag is set. Batch norm's running statistics are put back likewise.

    Args:
        module: what is trained.
        optimizer: a fused one of torch.
        scaler: a GradScaler; an enabled one (fp16) leaves out steps that overflow itself, which belongs to its search
            for a scale: they count as bad only where the scale can fall no further.
        device: of the module.
        total, streak: bad steps of the run so far, and those in a row at its end.
    """

    def __init__(self, module, optimizer, scaler, device, total=0, streak=0):
        self.optimizer, self.scaler = optimizer, scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for norm in norms for b in norm.buffers()]
        self.kept = [b.clone() for b in self.buffers]
        self.streak, self.longest, self.total = torch.tensor([streak, 0.0, total], device=device)
        if isinstance(optimizer, torch.optim.SGD):  # else a first step that is skipped leaves them as memory was found
            for p in self.parameters:
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    @staticmethod
    def poisoned(loss):
        """The loss itself where it is finite; else NaN with gradients of NaN, for its own gradients may be finite."""
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def step(self, loss, clip_grad=0.0):
        """Applies the gradients, unless they are not finite.

        Args:
            loss: of this step, a scalar tensor; its gradient was taken of poisoned(loss).
            clip_grad: largest norm of the gradient; 0: no limit.

        Returns:
            a bool tensor, whether the step was bad; the norm of the gradient before the clip, a scalar tensor. Both are
            the same on all processes, as the gradients are.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, clip_grad, norm)
        bad = ~torch.isfinite(norm)
        if self.scaler.is_enabled():
            spoiled = (~torch.isfinite(loss.detach())).float()
            if dist.is_initialized():  # the gradient is the same on all processes, the loss is each one's own
                dist.all_reduce(spoiled)
            bad = (spoiled > 0) | (bad & (self.scaler.scale(torch.ones_like(norm)) <= 1))
        else:
            self.optimizer.found_inf, self.optimizer.grad_scale = bad.float(), None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)
        self.streak = (self.streak + 1) * bad
        self.longest = torch.maximum(self.longest, self.streak)
        self.total = self.total + bad
        return bad, norm


def diverged(history, source, measure, output, process):
    """The end of a run whose steps are not finite: an error that says where it began, what grew, and what to do.

    Args:
        history: list of Done, the last steps; some of them in a row were bad.
        source: of the images.
        measure: {term: norm of its weighted gradient} of a Done's images, see gradient_norms(); called where there is
            a finite step before the bad ones.
        output: the run's folder, whose checkpoint is sound.
    """
    bad = [bool(done.bad) for done in history]
    first = max((i for i in range(len(bad)) if bad[i] and not (i and bad[i - 1])), key=lambda i: _streak(bad, i))
    terms = history[first].terms
    names = sorted(terms, key=lambda name: name == "loss")  # the sum last
    wrong = next((name for name in names if not torch.isfinite(terms[name])), None)
    images = ", ".join(source.name(*key) for key in history[first].keys)
    found = process.gathered((wrong, images))
    wrong, images = next((pair for pair in found if pair[0]), ("the gradient alone", "; ".join(i for _, i in found)))
    before = f"; {_sizes(history[first - 1], measure, process)}" if first else ""
    saved = (output / "last.pth").is_file()
    kept = f"the checkpoint in {output} is sound" if saved else f"{output} has no checkpoint yet"
    return Diverged(
        f"stopped at step {history[-1].step}: too many steps in a row were not finite, first {wrong}, on {images}; "
        f"none was applied{before}. Try a lower --lr, --clip-grad 10 or --amp none in a new --output, and look at "
        f"these images; {kept}"
    )


def _streak(bad, i):
    return next((k for k, one in enumerate(bad[i:]) if not one), len(bad) - i)


def _sizes(done, measure, process):
    """The terms of a step in words, each with the norm of its weighted gradient."""
    norms = measure(done)
    means = {
        name: process.average(value.detach().clone().float()).item()
        for name, value in done.terms.items()
        if name in norms
    }
    each = ", ".join(f"{name} {means[name]:.3g} ({norm:.3g})" for name, norm in norms.items())
    return (
        f"the last finite step was {done.step}, with a gradient of norm {done.norm.item():.3g} and the terms (in "
        f"brackets the norms of their weighted gradients, measured again after it) {each}"
    )


def gradient_norms(step, batch, teacher, weights, process):
    """The norm of each loss term's gradient, weighted, over the images of all processes: {name: float}.

    Args:
        step: a DistillationStep, not wrapped by DDP.
        batch: images and targets on the device.
        weights: {name of a distillation term: its weight, the decay included}; the detector's own losses have 1.
    """
    parameters = [p for p in step.parameters() if p.requires_grad]
    with process.autocast():
        detection, distillation, _ = step(*batch, teacher)
    norms = {}
    for name, value in {**detection, **distillation}.items():
        loss = weights.get(name, 1.0) * value
        each = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(each, parameters, strict=True)]
        norms[name] = process.average(torch.cat([g.flatten() for g in flat])).double().norm().item()
    return norms


@dataclass
class Done:
    """A step that is done: whether it was bad, its number from 1, the keys of its images, its terms and gradient."""

    bad: torch.Tensor
    step: int
    keys: list
    terms: dict
    norm: torch.Tensor


def out_of_memory(error):
    """A UserError for a GPU that is too small."""
    text = one_line(error).split(" Tried to allocate")[0]
    return UserError(f"{text} Give a smaller --batch-size or --size; what was saved is kept").for_all()
