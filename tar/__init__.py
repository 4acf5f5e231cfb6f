"""tar: task adaptive regularization for detector distillation (arXiv:2006.13108)."""

import sys


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback."""


def one_line(error):
    """An exception's text on one line, its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def fail(program, error):
    """Prints a UserError as one line and ends with 2; one raised in a loader process arrives inside a traceback."""
    reason = str(error).strip().splitlines()[-1].removeprefix("tar.UserError: ")
    print(f"{program}: error: {reason}", file=sys.stderr)
    sys.exit(2)
