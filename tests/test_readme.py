"""README's promises that can be checked by reading: every flag has a row, and the commands stand there as they are."""

import re
from pathlib import Path

import pytest

import eval as evaluation
from tar import options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ACTIONS = options.parser()._actions + evaluation.parser()._actions
FLAGS = {flag for action in ACTIONS for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("flag", sorted(FLAGS - {"--help"}))
def test_every_flag_has_a_row(flag):
    assert any(line.startswith((f"| `{flag}`", f"| `{flag} ")) for line in README.splitlines())


def test_every_row_is_a_flag():
    rows = [line.split("`")[1].split()[0] for line in README.splitlines() if line.startswith("| `--")]
    assert set(rows) <= FLAGS


def test_rows_name_every_choice_of_their_flags():
    rows = set(re.findall(r"^\| `(--[\w-]+) \{([^}]*)\}`", README, re.M))
    choices = {(flag, ",".join(map(str, a.choices))) for a in ACTIONS if a.choices for flag in a.option_strings}
    assert len(rows) > 15 and rows == choices


@pytest.mark.parametrize(
    "command",
    [
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python train.py",
        "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python -m pytest",
        "torchrun --nproc_per_node=8 train.py --teacher r101 --student r50 --dataset voc",
    ],
)
def test_the_commands_stand_in_the_readme(command):
    assert command in README.splitlines()


def test_what_the_readme_points_to_is_there():
    text = re.sub(r"https?://\S+", "", README)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    files = re.findall(r"`((?:tar|tests)/\w+\.py)", text)
    assert len(pictures) >= 3 and len(files) > 10
    for name in (*pictures, *files, "train.py", "eval.py"):
        assert (ROOT / name).is_file(), name
    assert sum((ROOT / name).stat().st_size for name in pictures) < 300_000


def test_functions_that_the_readme_maps_the_paper_to_are_there():
    rows = re.findall(r"`(tar/\w+\.py|train\.py): (\w+)`", README)
    assert len(rows) >= 10
    for file, name in rows:
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.M), (file, name)


def test_docstrings_point_to_headings_of_the_readme():
    for file in (*ROOT.glob("tar/*.py"), ROOT / "train.py"):
        for heading in re.findall(r"README, ([A-Z][\w ]*?)[;,.)]", file.read_text()):
            assert f"**{heading}.**" in README, (file.name, heading)


def test_the_papers_command_is_accepted_with_the_papers_recipe():
    args = options.parse(["--teacher", "r101", "--student", "r50", "--dataset", "voc"])
    assert (args.epochs, args.lr, args.warmup, args.size, args.batch_size) == (12, 0.02, 500, [600, 1000], 2)
    assert (args.optimizer, args.momentum, args.weight_decay, args.schedule) == ("sgd", 0.9, 1e-4, "step")
    assert args.backbone_weights == "imagenet"
