"""Workers share work by locks of the operating system, which a worker that is killed does not leave behind."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavin.runtime.errors import UserError

POLL_SECONDS, MOST_POLL_SECONDS = 0.05, 1.0  # pass between two looks at a lock, which may lie on a network's disk
WAIT_SECONDS = 2.0  # pass before a worker that waits for others looks again at their trials and runs
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def claim(path: Path) -> int | None:
    """Returns a descriptor that holds the lock until `os.close`, or None if somebody else holds the lock. Raises
    UserError if the path is a link, or lies on a file system without locks.

    A command that gets the descriptor (processes.py) holds the lock too. So a command that a killed worker has started
    is not started again before it has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, and a lock must be a file of its own: remove it") from error
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
    """Waits until others have released the lock, and holds it. Yields its descriptor."""
    seconds = POLL_SECONDS
    while (descriptor := claim(path)) is None:
        time.sleep(seconds)
        seconds = min(2 * seconds, MOST_POLL_SECONDS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
