"""Long runs of processes of their own: they are made on the second core while the tests go on."""

from concurrent.futures import ThreadPoolExecutor

import pytest

RUNS = {}


def beside(function):
    """A session fixture: what the function of an empty folder gives. It was begun before the first test."""
    name = function.__name__
    RUNS[name] = function

    @pytest.fixture(scope="session", name=name)
    def result(begun):
        return begun[name].result()

    return result


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """{name: future} of the runs that the chosen tests ask for, one after another in the order of the tests."""
    names = dict.fromkeys(name for item in request.session.items for name in item.fixturenames if name in RUNS)
    pool = ThreadPoolExecutor(1)
    yield {name: pool.submit(RUNS[name], tmp_path_factory.mktemp(name)) for name in names}
    pool.shutdown(cancel_futures=True)
