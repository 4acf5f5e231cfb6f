"""Argparse with errors of one line, and kinds of numbers that flags take."""

import argparse
import sys
from difflib import get_close_matches


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help text, but not those that say nothing."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that knows the nearest right name of a flag that does not exist."""

    def parse_args(self, args=None, namespace=None):
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in sys.argv[1:] if args is None else args:
            name = str(word).split("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
                near = get_close_matches(name, flags, 1)
                self.error(f"there is no {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def number(kind, least, text, most=2**31 - 1):
    def convert(word):
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{word!r} is not {text}")
        return value

    return convert


positive = number(int, 1, "a whole number from 1")
count = number(int, 0, "a whole number from 0")
weight = number(float, 0, "a number from 0")
above_0 = number(float, 1e-9, "a number above 0")
up_to_1 = number(float, 1e-9, "a number above 0 and up to 1", 1.0)
