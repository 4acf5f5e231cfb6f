"""SIGTERM and SIGINT: a run that is told to stop finishes its step, saves and ends."""

import signal


class Stopped(BaseException):
    """The run was told to stop and has saved its state; no Exception, which what handles a broken file would catch."""

    def __init__(self, text, number):
        super().__init__(text)
        self.code = 128 + number  # as shells count


class StopSignals:
    """SIGTERM and SIGINT, as clusters and keyboards send them: they raise Stopped, which ends the program in a line.

    While `patient` is set the first is only noted: the training loop finishes its step, saves and raises itself.
    """

    def __init__(self):
        self.received, self.patient = None, False  # the number of the last signal

    def __enter__(self):
        self.before = {n: signal.signal(n, self._take) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number, _):
        again, self.received = self.received is not None, number
        if again or not self.patient:
            raise self.stopped("stopped between two steps")

    def stopped(self, text):
        """The exception that ends the run; the number is another process's where this one was not told."""
        return Stopped(f"{text}, as told; the same command goes on", self.received or signal.SIGTERM)
