"""Argparse with errors of one line, kinds of numbers that flags take, and the flags that all programs have."""

import argparse
import contextlib
import os


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help text, but not those that say nothing."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def parse_args(self, args=None, namespace=None):
        given = super().parse_args(args, namespace)
        for name, value in vars(given).items():  # the shell leaves --flag=~/folder as it is
            if isinstance(value, str) and value.startswith("~"):
                setattr(given, name, os.path.expanduser(value))
        return given

    def error(self, message):
        first = os.environ.get("RANK", "0") == "0"  # of several processes
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n" if first else None)


def number(kind, least, text, most=2**31 - 1):
    """A type of argparse: int or float from least to most, `text` in its error."""

    def convert(word):
        with contextlib.suppress(ValueError):
            if least <= (value := kind(word)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{word!r} is not {text}")

    return convert


positive = number(int, 1, "a whole number from 1")
count = number(int, 0, "a whole number from 0")
weight = number(float, 0, "a number from 0")
above_0 = number(float, 1e-9, "a number above 0")
up_to_1 = number(float, 1e-9, "a number above 0 and up to 1", 1.0)


def device_flags(group, amp="auto"):
    """Adds --device, --threads and --amp, with its default, to a parser or a group of one."""
    add = group.add_argument
    add("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    add("--threads", type=count, default=0, metavar="N", help="CPU threads a process; 0: torch's choice")
    text = "precision of the convolutions; auto: bf16 where the processor has it"
    text += "" if amp else " (default: none if trained so, else auto)"
    add("--amp", choices=("auto", "bf16", "fp16", "none"), default=amp, help=text)
