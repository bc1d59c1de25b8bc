"""The errors of a search. An error of a trial ends the trial; an error of its worker leaves the trial to be resumed."""

import errno
import os

from lavin.runtime.errors import OUT_OF_MEMORY, UserError
from util.data.checksums import CHANGES

# a message with one of these words says that a machine lacks memory, or that its disk takes no more
SHORTAGES = (*OUT_OF_MEMORY, "not enough GPU memory",
             *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)))


class CommandFailed(UserError):
    """A trial's command has failed, and the message is the command's own error line."""


class WorkerError(UserError):
    """An error that says nothing about a trial's flags: the worker ends, and its trial is left to be resumed."""


def is_of_machine(line: str) -> bool:
    """Returns whether this error line of a command says that the machine is short of memory or disk space, or that a
    file changed while the command read it."""
    return any(words in line for words in (*SHORTAGES, CHANGES))
