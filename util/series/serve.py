"""A worker of a search runs its commands in this process: `python -m util.series.serve SOCKET FOLDER`.

util/search/processes.py starts it, and has the other end of the socket. FOLDER is the worker's working directory.

- A command arrives as a line of JSON with its words, and with two file descriptors. One is its log, to which the
  process writes from then on; the other one is the lock on its trial. The process holds both until the command is done,
  and then answers with a byte.
- A command that fails or is stopped ends the process, with the exit status and the message of a single command.
- When the worker ends, the process ends too, but not before its command: the lock keeps others from beginning it again.
- Between two commands the process holds no log and no lock, and a stop signal ends it in silence.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import ctypes
import json
import os
import socket
import sys
from contextlib import suppress

from lavin.runtime import signals
from lavin.runtime.errors import one_line_errors
from util.series.commands import run_command
from util.shared_base import SharedBase


def main(descriptor: str, folder: str) -> None:
    os.chdir(folder)
    with socket.socket(fileno=int(descriptor)) as worker:
        worker.set_inheritable(False)
        serve(worker)


def serve(worker: socket.socket) -> None:
    """Runs the worker's commands until the worker has ended, or until this process gets a stop signal in the last step
    of a command."""
    shared = SharedBase()
    while not signals.requested and (command := receive(worker)):
        words, log, lock = command
        write_to(log)
        run_command(words, shared)
        write_to(os.open(os.devnull, os.O_WRONLY))
        os.close(lock)
        if not signals.requested:  # else the end of this process is the answer
            with suppress(ConnectionError):
                worker.sendall(b"\n")


def receive(worker: socket.socket) -> tuple[list[str], int, int] | None:
    """Returns the words of the next command, its log and its lock. Returns None if the worker has ended."""
    with suppress(ConnectionError):
        first, descriptors, *_ = socket.recv_fds(worker, 1, 2)
        with worker.makefile("rb") as rest:
            line = first + rest.readline()
        if line.endswith(b"\n"):
            log, lock = descriptors
            return json.loads(line), log, lock
    return None


def write_to(descriptor: int) -> None:
    """Makes this file the output of the process, for Python and for libraries in C."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
