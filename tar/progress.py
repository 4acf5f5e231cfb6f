"""How far a run is: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time

INTERVAL = 60.0  # seconds between two plain lines


class Progress:
    """Shows the steps of a run, on rank 0 only.

    Args:
        machine: a tar.machine.Machine.
        title: of the run.
        epochs, steps: those of the whole run.
        images: of a step of all processes.
    """

    def __init__(self, machine, title, epochs, steps, images):
        self.machine, self.title, self.epochs, self.steps, self.images = machine, title, epochs, steps, images
        self.bar, self.said = None, time.monotonic()

    def epoch(self, loader, number):
        """An epoch's batches, number from 1, with a bar where there is a terminal."""
        self.bar = self.machine.progress(f"{self.title} {number}/{self.epochs}")(loader)
        return self.bar

    def show(self, epoch, step, means, rate):
        """What was logged after so many steps of the run: {term: mean}, images a second."""
        left = duration((self.steps - step) * self.images / rate)
        terms = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in means.items() if name != "loss")
        self.bar.set_postfix_str(f"loss {means['loss']:.3f} ({terms}) {rate:.0f} images/s, {left} left", refresh=False)
        if not sys.stderr.isatty() and time.monotonic() - self.said >= INTERVAL:
            self.said = time.monotonic()
            where = f"{self.title} {epoch}/{self.epochs}  step {step} of {self.steps}"
            self.machine.say(f"{where}  loss {means['loss']:.3f} ({terms})  {rate:.0f} images/s  {left} left")


def duration(seconds):
    """Seconds in the words of a clock: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
