"""How a program ends: one process says what went wrong, a user's mistake in one line, and none waits for another."""

import contextlib
import errno
import os
import sys
import traceback

import torch
import torch.distributed as dist

from tar import UserError, one_line
from tar.training.stop_signals import Stopped

STORES = []  # the store of torchrun's processes, once this process has joined them


@contextlib.contextmanager
def program(name):
    """The body of a program. Where it fails, the first process that fails says why, and ends at once."""
    # Where it fails, it does not destroy the process group: under NCCL that would wait for the other processes, which
    # wait for this one. torchrun ends the others.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the terminal's encoding lacks
    try:
        yield
    except BaseException as error:
        line, code = in_one_line(error)
        if isinstance(error, SystemExit) or (line is None and not STORES):  # an end as meant; a fault of our own
            raise
        with contextlib.suppress(OSError):  # a full disk, a closed pipe
            if is_first():
                print(f"{name}: error: {line}" if line else traceback.format_exc(), file=sys.stderr, flush=True)
            sys.stdout.flush()
        if STORES:
            os._exit(code)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def in_one_line(error):
    """What a user reads of an error, None for a fault of the program's own; and the exit code."""
    text = one_line(error)
    if isinstance(error, UserError | Stopped):  # one of a loader process arrives at the end of a traceback
        return str(error).strip().splitlines()[-1].removeprefix("tar.UserError: "), error.code
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return f"{text.split(' Tried to allocate')[0]} Give a smaller --batch-size or --size; what was saved is kept", 2
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"a loader process has ended: {text} If memory ran out, give fewer --workers; what was saved is kept", 2
    return None, 1


def is_first():
    """Whether no other process has failed before this one."""
    try:
        return STORES[0].add("failures", 1) == 1 if STORES else os.environ.get("RANK", "0") == "0"
    except RuntimeError:  # the process that held the store has ended
        return False
