"""Every case of the corpus of bad input."""

import bad_input
import pytest


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return bad_input.prepare(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", bad_input.CASES)
def test_input_trains_or_is_refused_in_one_line(sound, tmp_path, name):
    good, text = bad_input.outcome(name, sound, tmp_path / "case")
    assert good, text
