"""README's promises that can be checked by reading: every flag has a row, and the commands stand there as they are."""

from pathlib import Path

import pytest

import eval as evaluation
from tar import options

README = (Path(__file__).parent.parent / "README.md").read_text()
ACTIONS = options.parser()._actions + evaluation.parser()._actions
FLAGS = {flag for action in ACTIONS for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("flag", sorted(FLAGS - {"--help"}))
def test_every_flag_has_a_row(flag):
    assert any(line.startswith((f"| `{flag}`", f"| `{flag} ")) for line in README.splitlines())


def test_every_row_is_a_flag():
    rows = [line.split("`")[1].split()[0] for line in README.splitlines() if line.startswith("| `--")]
    assert set(rows) <= FLAGS


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


def test_the_papers_command_is_accepted_with_the_papers_recipe():
    args = options.parse(["--teacher", "r101", "--student", "r50", "--dataset", "voc"])
    assert (args.epochs, args.lr, args.warmup, args.size, args.batch_size) == (12, 0.02, 500, [600, 1000], 2)
    assert (args.optimizer, args.momentum, args.weight_decay, args.schedule) == ("sgd", 0.9, 1e-4, "step")
    assert args.backbone_weights == "imagenet"
