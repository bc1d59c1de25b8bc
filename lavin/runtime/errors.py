"""Errors that a user can fix: one line that names the file or the flag and says what to do, without a traceback."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """A mistake in files or flags. The message is all that the user sees."""


def first_line(error: Exception) -> str:
    """The first line of another library's error message, to be quoted inside one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError, or GPU memory running out, into one line on stderr and exit status 1."""
    try:
        yield
        return
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        message = (f"not enough GPU memory ({str(error).split('. ')[0]}): train with --gradient_checkpointing or fewer "
                   "--bits, answer with a lower --max_batch_size")
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(3)  # rank 0 reports the same error first; torchrun then stops the other ranks
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {message}")
