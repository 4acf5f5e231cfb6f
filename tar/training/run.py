"""What belongs to one run: settings, data, models, optimizer, guard and state."""

import math
from argparse import Namespace
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from tar.data.loader import make_loader, to_device
from tar.method.decay import decay
from tar.method.step import DistillationStep
from tar.training import checkpoint
from tar.training.guard import Guard
from tar.training.process import Process
from tar.training.progress import Progress
from tar.training.run_folder import append_line


@dataclass
class RunState:
    """Where a run is, and what its next log line will say: in every checkpoint, so that the run goes on exactly."""

    epoch: int = 0  # the epoch, from 0, that the run is in
    batch: int = 0  # its batches that are done
    seconds: float = 0.0  # of the host in steps: without waits for the loader, and what a GPU computes meanwhile
    metrics: dict = field(default_factory=dict)  # of the last evaluation
    sums: dict = field(default_factory=dict)  # {term: sum since the last log line}
    counts: dict = field(default_factory=dict)  # {term: steps that had it}
    loss: float = math.nan  # the mean of the last log line
    bad_steps: int = 0
    streak: int = 0  # bad steps in a row

    def add(self, terms):
        """Adds a step's terms, {name: scalar tensor}; nothing waits for the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take_means(self, process):
        """The means of the terms over their steps and over all processes, {name: float}; empties the sums."""
        values = torch.stack([self.sums[name].float() / self.counts[name] for name in self.sums])
        means = dict(zip(self.sums, (round(v, 5) for v in process.average(values).tolist()), strict=True))
        self.sums, self.counts, self.loss = {}, {}, means["loss"]
        return means


@dataclass
class Run:
    """What belongs to one run."""

    args: Namespace
    process: Process
    title: str
    output: Path  # its folder
    about: dict  # build (the arguments of build_detector), classes, settings: what every checkpoint says
    train_set: object
    test_set: object
    teacher: object  # None for a plain student
    module: DistillationStep  # the student and the adapters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    state: RunState
    order: dict  # of the images, see train_batches
    steps_per_epoch: int
    total_steps: int
    end_step: int  # where the distillation's weight reaches 0

    def __post_init__(self):
        self.distils = self.teacher is not None  # until end_step
        self.wrapped = self.process.parallel(self.module)
        # On a GPU bad steps are seen at the next line of the log: until then the last finite step is kept.
        self.history = deque(maxlen=self.args.log_every + self.args.max_bad_steps + 1)
        images = self.args.batch_size * self.process.world
        self.progress = Progress(self.process, self.title, self.args.epochs, self.total_steps, images)

    def end_distillation(self):
        """From here on nothing of the teacher is computed."""
        self.distils = False
        self.module.adapters.requires_grad_(False)
        self.wrapped = self.process.parallel(self.module)

    def save(self):
        """Writes last.pth, by rank 0: all that the run needs to go on exactly, and to rebuild the detector."""
        state, module = self.state, self.module
        state.bad_steps, state.streak = int(self.guard.total), int(self.guard.streak)
        state.sums = {name: self.process.average(value.float()) for name, value in state.sums.items()}
        saved = {**self.about, **vars(state), "optimizer": self.optimizer.state_dict()}
        saved |= {"model": module.student.state_dict(), "adapters": module.adapters.state_dict()}
        self.process.on_main(checkpoint.save, self.output / "last.pth", {**saved, "scaler": self.scaler.state_dict()})

    def log(self, line):
        self.process.on_main(append_line, self.output / "log.jsonl", line)

    def lambda_(self, step):
        """lambda(t), the weight of the distillation."""
        return decay(step, self.end_step, self.args.decay) if step < self.end_step else 0.0

    def gradient_norms(self, done):
        """{term: norm of its weighted gradient} on a done step's images of all processes, with the weights after it."""
        weight = self.lambda_(done.step - 1)
        weights = {name: weight * w for name, w in self.module.settings.weights().items()} if weight else {}
        batch = next(iter(make_loader(self.train_set, True, [done.keys], self.args.seed)))
        self.seed_regions(done.step - 1)
        with self.process.autocast():
            images, targets = to_device(*batch, self.process.device)
            detection, distillation, _ = self.module(images, targets, self.teacher if weight else None)
        parameters, norms = [p for p in self.module.parameters() if p.requires_grad], {}
        for name, value in {**detection, **distillation}.items():
            loss = weights.get(name, 1.0) * value
            each = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            norms[name] = self.process.average(torch.cat([g.flatten() for g in each])).double().norm().item()
        return norms

    def seed_regions(self, step):
        """Region sampling draws from a generator seeded by the step: a resumed run needs no generator's state."""
        torch.manual_seed((self.args.seed * 1_000_003 + step) * self.process.world + self.process.rank)


def restore(saved, module, optimizer, scaler, device):
    """Puts a checkpoint of Run.save() back into what was built anew; returns its RunState."""
    module.student.load_state_dict(saved["model"])
    module.adapters.load_state_dict(saved["adapters"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    state = RunState(**{f.name: saved[f.name] for f in fields(RunState)})
    state.sums = {name: value.to(device) for name, value in state.sums.items()}
    return state
