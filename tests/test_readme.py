"""What README names is there: its commands, flags, links and pictures."""

import re
from pathlib import Path

import pytest

import eval as evaluation
from tar.training import flags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCED = re.sub(r" *\\\n *", " ", "\n".join(re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)))
COMMANDS = re.findall(r"(?:python|\d) (train|eval)\.py((?: [\w./-]+)*)", FENCED)
ACTIONS = flags.parser()._actions + evaluation.parser()._actions
OF_TORCHRUN = {"--nproc_per_node", "--max-restarts", "--data", "--dry"}  # and of tests/gpu/check.py


@pytest.mark.parametrize(("script", "words"), COMMANDS)
def test_a_command_is_accepted(script, words):
    parse = flags.parse if script == "train" else evaluation.parser().parse_args
    parse(words.split())


def test_every_flag_is_one_of_the_programs():
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - OF_TORCHRUN
    assert len(COMMANDS) >= 2 and named
    assert named <= {flag for action in ACTIONS for flag in action.option_strings}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", README))))
def test_a_relative_link_leads_somewhere(target):
    assert (ROOT / target).exists()
