"""Locks of the operating system on work that several workers share: a worker that is killed leaves none behind."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavin.runtime.errors import UserError

POLL_SECONDS, MOST_POLL_SECONDS = 0.05, 1.0  # between two looks at a lock, which may lie on a network's file system
WAIT_SECONDS = 2.0  # of a worker, for the trials and runs of others, before it looks again
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def claim(path: Path) -> int | None:
    """A descriptor that holds the lock until `os.close`; None where somebody else holds it.

    A command that gets the descriptor (processes.py) holds the lock too: what a killed worker had started is not
    started a second time before it has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, which leads to somebody else's file, and no lock: remove it") from error
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        if error.errno in WITHOUT_LOCKS:
            raise UserError(f"{path.parent} is on a file system without locks, which the workers of a study need: name "
                            "another folder with --study") from error
        raise


@contextmanager
def waiting_for(path: Path) -> Iterator[int]:
    """Holds the lock, once others have released it; gives its descriptor."""
    seconds = POLL_SECONDS
    while (descriptor := claim(path)) is None:
        time.sleep(seconds)
        seconds = min(2 * seconds, MOST_POLL_SECONDS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
