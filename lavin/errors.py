"""The one kind of error that a user can mend: a line that names the file or the flag, and what to do."""

import os
import sys
import time
from contextlib import contextmanager

import torch


class UserError(Exception):
    """A mistake in files or flags. The message is all that the user sees."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def one_line_errors():
    """Ends the program with one line on stderr, and no traceback, for what a user can mend."""
    try:
        yield
        return
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        message = (f"not enough GPU memory ({str(error).split('. ')[0]}): train with --gradient_checkpointing or fewer "
                   "--bits, answer with a lower --max_batch_size")
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(3)  # what every rank has to say, rank 0 says first; torchrun then ends the others
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {message}")
