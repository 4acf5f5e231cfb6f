"""The rooms of the package: which may import which, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tar"
BASE = ("method", "detectors", "data")  # they import no other room
ABOVE = ("training", "evaluation", "tables", "pictures", "bench")
BELOW = {**dict.fromkeys(BASE, ()), **{room: BASE + ABOVE[:i] for i, room in enumerate(ABOVE)}}  # what each may import
OTHERS = {"method": {"torch", "torchvision"}, "detectors": {"torch", "torchvision", "timm"}}  # packages


def imported(source):
    """The full names of all that a module imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def faults(room, source):
    """What a module of a room imports and must not."""
    wrong = []
    for name in imported(source):
        top, second, *_ = [*name.split("."), ""]
        if top == "tar" and (PACKAGE / second).is_dir() and second:
            allowed = second in (room, *BELOW[room])
        elif top == "tar":  # UserError and its like
            allowed = room != "method"
        else:
            known = room not in OTHERS or top in OTHERS[room] or top in sys.stdlib_module_names
            allowed = known and top not in ("train", "eval")
        if not allowed:
            wrong.append(name)
    return wrong


def test_the_package_is_its_rooms_and_nothing_beside_them():
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == set(BELOW)
    assert not list(PACKAGE.glob("*/*/*.py"))


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_the_rooms_below_it(room):
    found = {path.name: faults(room, path.read_text()) for path in (PACKAGE / room).glob("*.py")}
    assert found and {name: wrong for name, wrong in found.items() if wrong} == {}


def test_an_arrow_upward_is_seen():
    assert faults("method", "import numpy as np") == ["numpy"]
    assert faults("detectors", "def f():\n    from tar.training.flags import parse") == ["tar.training.flags.parse"]
    assert faults("training", "from tar import evaluation") == ["tar.evaluation"]
    assert faults("pictures", "from eval import main") == ["eval.main"]
