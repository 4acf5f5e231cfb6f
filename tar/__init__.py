"""tar: task adaptive regularization for detector distillation (arXiv:2006.13108)."""

import os
import sys


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback."""

    code = 2  # the program's exit code
    once = False  # whether all processes of a run raise it, and one says so

    def for_all(self):
        """The same error, said by one process though all raise it."""
        self.once = True
        return self


def one_line(error):
    """An exception's text on one line, its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def fail(program, error):
    """Prints a UserError as one line and ends with its code; one of a loader process arrives inside a traceback."""
    reason = str(error).strip().splitlines()[-1].removeprefix("tar.UserError: ")
    if not error.once or os.environ.get("RANK", "0") == "0":
        print(f"{program}: error: {reason}", file=sys.stderr)
    sys.exit(error.code)
