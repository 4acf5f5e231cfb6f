"""How far a run is: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time

INTERVAL = 60.0  # seconds between two plain lines
TIMED = 10  # steps, after which the demonstration's length is said


class Progress:
    """Shows the steps of a run, on rank 0 only; epochs, steps: of the whole run; images: of a step of all processes."""

    def __init__(self, process, title, epochs, steps, images):
        self.process, self.title, self.epochs, self.steps, self.images = process, title, epochs, steps, images
        self.said = time.monotonic()

    def epoch(self, loader, number, done):
        """An epoch's batches, number from 1, with a bar where there is a terminal; so many batches are done already."""
        self.rate = 0.0  # images per second, as last logged in this epoch
        self.began = self.since = time.perf_counter()
        self.first = self.logged = done
        self.bar = self.process.progress(f"{self.title} {number}/{self.epochs}")(loader)
        return self.bar

    def announce(self, batch):
        """After some batches of the demonstration's first run: how long all of its runs will take here."""
        if self.process.runs_ahead and batch == self.first + TIMED:
            seconds = (time.perf_counter() - self.began) / TIMED * self.steps * self.process.runs_ahead
            self.process.say(f"All runs of the demonstration will take about {duration(seconds)} on this machine.")
            self.process.runs_ahead = 0.0

    def rate_until(self, batch):
        """Images per second of the epoch's batches since the last call, up to this one."""
        now = time.perf_counter()
        self.rate = (batch - self.logged) * self.images / (now - self.since)
        self.since, self.logged = now, batch
        return self.rate

    def show(self, epoch, step, means, rate):
        """What was logged after so many steps of the run: {term: mean}, images a second."""
        left = duration((self.steps - step) * self.images / rate)
        terms = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in means.items() if name != "loss")
        text = f"loss {means['loss']:.3f} ({terms})  {rate:.0f} images/s  {left} left"
        self.bar.set_postfix_str(text, refresh=False)
        if not sys.stderr.isatty() and time.monotonic() - self.said >= INTERVAL:
            self.said = time.monotonic()
            self.process.say(f"{self.title} {epoch}/{self.epochs}  step {step} of {self.steps}  {text}")


def duration(seconds):
    """Seconds in the words of a clock: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
