"""tar: task adaptive regularization for detector distillation (arXiv:2006.13108)."""


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback."""

    code = 2  # the program's exit code


def one_line(error):
    """An exception's text on one line, its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
