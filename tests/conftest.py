"""What every test has: one thread, and the runs that several tests look at."""

import pytest
import torch
from beside import begun  # noqa: F401  (a fixture, as those of the next line)
from tiny_runs import plain, two_processes, voc  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums come out the same on every machine, and the tests do not fight over the cores."""
    torch.set_num_threads(1)
