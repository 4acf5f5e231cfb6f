"""Steps that are not finite: kept away from the weights, counted, and after too many the end of the run."""

import math
from collections import namedtuple
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

from tar import UserError


class Diverged(UserError):
    """Too many steps in a row were not finite; exit code 3."""

    code = 3


class Guard:
    """Keeps steps whose gradient is not finite away from the weights, and counts them; nothing waits for the device.

    The optimizer's fused kernel leaves weights and its own state alone where a flag on the device is set. An enabled
    scaler (fp16) leaves out steps that overflow itself: they count as bad only where its scale can fall no further.
    total, streak: bad steps of the run so far, and those in a row at its end.
    """

    def __init__(self, module, optimizer, scaler, device, total=0, streak=0):
        self.optimizer, self.scaler = optimizer, scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.buffers = [b for norm in norms for b in norm.buffers()]  # they are put back after a bad step
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
        """Applies the gradients of poisoned(loss), unless they are not finite; clip_grad: their largest norm, 0: any.

        Returns, as scalar tensors, the same on all processes: whether the step was bad, the norm before the clip.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
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


# A step that is done: whether it was bad, its number from 1, its images' keys, its terms and its gradient's norm.
Done = namedtuple("Done", "bad step keys terms norm")


def diverged(run):
    """The end of a run whose steps are not finite: an error that says where it began, what grew, and what to do."""
    history, process = list(run.history), run.process
    streaks = list(accumulate((int(done.bad) for done in history), lambda streak, bad: (streak + 1) * bad))
    first = streaks.index(max(streaks)) + 1 - max(streaks)  # of the longest row of bad steps
    terms = history[first].terms
    names = sorted(terms, key=lambda name: name == "loss")  # the sum last
    wrong = next((name for name in names if not torch.isfinite(terms[name])), None)
    images = ", ".join(run.train_set.name(*key) for key in history[first].keys)
    found = process.gathered((wrong, images))
    wrong, images = next((pair for pair in found if pair[0]), ("the gradient alone", "; ".join(i for _, i in found)))
    before = ""
    if first:
        done = history[first - 1]
        means = {name: process.average(value.clone().float()).item() for name, value in done.terms.items()}
        each = ", ".join(f"{name} {means[name]:.3g} ({norm:.3g})" for name, norm in run.gradient_norms(done).items())
        before = f"; the last finite step was {done.step}, with a gradient of norm {done.norm.item():.3g} and the terms"
        before += f" (in brackets the norms of their weighted gradients, measured again after it) {each}"
    saved = (run.output / "last.pth").is_file()
    kept = f"the checkpoint in {run.output} is sound" if saved else f"{run.output} has no checkpoint yet"
    text = f"stopped at step {history[-1].step}: too many steps in a row were not finite, first {wrong}, on {images}; "
    text += f"none was applied{before}. Try a lower --lr, --clip-grad 10 or --amp none in a new --output, and look at "
    return Diverged(f"{text}these images; {kept}")
