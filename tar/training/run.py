"""What belongs to one run: settings, data, models, optimizer, guard and position."""

from argparse import Namespace
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from tar.method.decay import decay
from tar.method.step import DistillationStep
from tar.training import checkpoint
from tar.training.guard import Guard
from tar.training.process import Process
from tar.training.progress import Progress
from tar.training.run_folder import append_line
from tar.training.run_state import RunState


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
        objects = self.module, self.optimizer, self.scaler, self.guard, self.process
        checkpoint.save_run(self.output, self.about, self.state, *objects)

    def log(self, line):
        self.process.alone(append_line, self.output / "log.jsonl", line)

    def lambda_(self, step):
        """lambda(t), the weight of the distillation."""
        return decay(step, self.end_step, self.args.decay) if step < self.end_step else 0.0

    def seed_regions(self, step):
        """Region sampling draws from a generator seeded by the step: a resumed run needs no generator's state."""
        torch.manual_seed((self.args.seed * 1_000_003 + step) * self.process.world + self.process.rank)
