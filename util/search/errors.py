"""Errors of a search: one of a trial ends the trial, and one of its worker leaves the trial to be resumed."""

import errno
import os

from lavin.runtime.errors import OUT_OF_MEMORY, UserError
from util.data.checksums import CHANGES

# words of the errors of a machine that lacks memory, or whose disk takes no more
SHORTAGES = (*OUT_OF_MEMORY, "not enough GPU memory",
             *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)))


class CommandFailed(UserError):
    """A command of a trial has failed. The message is the command's own line."""


class WorkerError(UserError):
    """An error that says nothing about a trial's flags: the worker ends, and its trial is left to be resumed."""


def is_of_machine(line: str) -> bool:
    """Whether a command's error is that its machine is short of memory or of space on a disk, or that somebody changed
    a file while the command read it."""
    return any(words in line for words in (*SHORTAGES, CHANGES))
