"""tar: task adaptive regularization for detector distillation (arXiv:2006.13108)."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, without a traceback."""
