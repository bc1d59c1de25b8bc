"""Signals that ask a process to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP, and SIGUSR1, Slurm's warning of the time limit.

A signal raises Stopped in the main thread. Inside `deferred()`, as training is, it only sets `requested`:
`Trainer.save_if_due` (util/training/trainer.py) saves after the step and raises Stopped, of which `one_line_errors`
(errors.py) makes exit status 75. A process that is still there after its grace period, because its main thread
waits for the GPU or for a dead process, is ended by a thread. errors.py says which process speaks, and lists the exit
statuses.

Signal handlers get no object, so what they note is kept in this module's globals.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lavin.runtime.console import by_program, is_main_process

UNFINISHED = 75  # exit status: stopped, and the same command goes on (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE_SECONDS, DEFERRED_GRACE_SECONDS = 5, 25  # torchrun kills its processes 30 s after it has sent SIGTERM

requested: str | None = None  # name of the first stop signal
_deferred = _ending = False


class Stopped(BaseException):
    """The process was asked to stop. The message says what was saved. No `except Exception` may hold it up."""


@contextmanager
def deferred() -> Iterator[None]:
    """Stop signals only set `requested` in here. Raises Stopped at the start where one has come already."""
    global _deferred
    if requested:
        raise Stopped(f"stopped by {requested}")
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def install(numbers: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
    """Handles stop signals. Only in the main thread. SIGHUP and SIGINT stay ignored where nohup, or a shell for
    background commands, ignores them."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # of startup.py, up to here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written even while the main thread does not run Python
    threading.Thread(target=end_after_grace_period, args=(reader, numbers), daemon=True).start()
    for number in numbers:
        if number not in (signal.SIGHUP, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def finish(action: signal.Handlers) -> None:
    """Lets stop signals be ignored, or end the process silently, from now on: it is about to end by itself."""
    global _ending
    _ending = True
    for number in STOP_SIGNALS:
        signal.signal(number, action)


def handle(number: int, _frame) -> None:
    global requested
    first, requested = requested is None, requested or signal.Signals(number).name
    if first and not _deferred:  # a launcher may send the same signal again
        raise Stopped(f"stopped by {requested}")


def end_after_grace_period(reader: int, numbers: tuple[signal.Signals, ...]) -> None:
    while os.read(reader, 1)[0] not in numbers:
        pass
    seconds = DEFERRED_GRACE_SECONDS if _deferred else GRACE_SECONDS
    threading.Event().wait(seconds)
    if is_main_process() and not _ending:
        message = by_program(f"ended {seconds} s after the stop signal, without saving: the same command goes on from "
                             "the last checkpoint")
        print(f"\n{message}", file=sys.stderr, flush=True)  # tqdm's lock may be held by the main thread, which waits
    os._exit(UNFINISHED)
