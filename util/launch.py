"""torchrun with one line in place of its summary: `python -m util.launch --nproc_per_node 4 train.py ...`, flags as
torchrun's.

The line stands last in the log, and says what ended the processes. Exit status 75 means, as that of a single process,
that they were stopped and the same command goes on.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import signal
import socket
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from lavin.runtime.signals import UNFINISHED, finish


def launch() -> int:
    """Returns the exit status, which no later signal changes: Python ends with its own handlers, at which it would die.
    """
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))  # from srun; torchrun would end at it
    try:
        main()
        return 0
    except SignalException:
        return UNFINISHED
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status != UNFINISHED:
            print(describe(error), file=sys.stderr)
        return status if status > 0 else 1
    finally:
        finish(signal.SIG_IGN)


def describe(error: ChildFailedError) -> str:
    """The process of this node that failed first and what it said, or the signal that ended it."""
    rank, failure = error.get_first_failure()
    if isinstance(failure.message, dict):  # of report_to_torchrun (lavin/runtime/errors.py)
        said = failure.message["message"]
    elif failure.exitcode < 0:
        said = failure.message
    else:
        said = f"exit status {failure.exitcode}, for the reason above"
    return f"rank {rank} on {socket.gethostname()} failed first: {said}"


if __name__ == "__main__":
    sys.exit(launch())
