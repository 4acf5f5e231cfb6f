"""Long runs of processes of their own: they are made on the second core while the tests go on."""

from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest

RUNS = {}


def beside(function):
    """A session fixture: what the function gives, of an empty folder and of the runs that its arguments name.

    It waits in a queue from before the first test; tests must not change what belongs to the whole process meanwhile.
    """
    name = function.__name__
    assert name not in RUNS, name
    RUNS[name] = function

    @pytest.fixture(scope="session", name=name)
    def result(begun):
        return begun[name].result()

    return result


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """{name: future} of the runs that the chosen tests ask for, one after another in the order of the tests."""
    pool, futures = ThreadPoolExecutor(1), {}

    def begin(name):
        if name not in futures:
            first = [begin(other) for other in list(signature(RUNS[name]).parameters)[1:]]
            folder = tmp_path_factory.mktemp(name)
            futures[name] = pool.submit(lambda: RUNS[name](folder, *[future.result() for future in first]))
        return futures[name]

    for item in request.session.items:
        for name in item.fixturenames:
            if name in RUNS:
                begin(name)
    yield futures
    pool.shutdown(cancel_futures=True)
