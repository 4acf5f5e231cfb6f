"""Where a run is, and what its next log line will say: saved with every checkpoint, so that the run goes on exactly."""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class RunState:
    """A run's position, time and unlogged terms."""

    epoch: int = 0  # the epoch, from 0, that the run is in
    batch: int = 0  # its batches that are done
    seconds: float = 0.0  # spent in steps; waiting for the loader is left out, for the runs of a table wait unequally
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
