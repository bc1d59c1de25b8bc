"""A worker runs its commands in other processes.

If a trial has one GPU, or a CPU, all commands of a worker run in one process, one after another, and the process keeps
their base model. If a trial has several GPUs, torchrun starts new processes for each command.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from util.trackers import GROUP

ROOT = Path(__file__).parents[2]


class Process(Protocol):
    """A command that runs. It is a subprocess.Popen, or an object with the same methods."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the command and returns its exit status. Raises subprocess.TimeoutExpired if the command still runs
        after `timeout` seconds."""

    def terminate(self) -> None:
        """Asks the command to stop."""


# a function that starts a command. Its arguments are the command's words (train.py or eval.py, then flags), the file to
# which the command writes, and the descriptor of a lock, which the command holds until it ends
Start = Callable[[list[str], BinaryIO, int], Process]


@contextmanager
def starting(study: Path, gpus: int) -> Iterator[Start]:
    """Yields the function with which a worker starts the commands of a study. If their process is idle in the end, it
    ends too."""
    environment = {GROUP: study.name, **os.environ}
    if gpus > 1:
        yield partial(start_torchrun, gpus, environment)
        return
    shared = SharedProcess(environment)
    try:
        yield shared.start
    finally:
        shared.close()


def start_torchrun(gpus: int, environment: dict[str, str], words: list[str], log: BinaryIO,
                   lock: int) -> subprocess.Popen:
    program, *flags = words
    return subprocess.Popen([sys.executable, "-m", "util.launch", "--standalone", "--nproc_per_node", str(gpus),
                             str(ROOT / program), *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                            pass_fds=[lock], env=environment)


class SharedProcess:
    """Runs commands one after another in one process (util/series/serve.py), and is the `Process` of the running one.

    The first command starts the process. If a command has ended the process, the next command starts another one.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment, self.is_busy = environment, False
        self.process: subprocess.Popen | None = None

    def start(self, words: list[str], log: BinaryIO, lock: int) -> "SharedProcess":
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.connection, other = socket.socketpair()
            with other:
                self.process = start_server(other.fileno(), log, self.environment)
        self.is_busy, line = True, json.dumps(words).encode() + b"\n"
        self.connection.settimeout(None)
        with suppress(ConnectionError):  # the process was ended while it was idle, and `wait` says how
            socket.send_fds(self.connection, [line[:1]], [log.fileno(), lock])
            self.connection.sendall(line[1:])
        return self

    def wait(self, timeout: float | None = None) -> int:
        assert self.process is not None
        self.connection.settimeout(timeout)
        try:
            is_done = self.connection.recv(1)
        except TimeoutError as error:
            raise subprocess.TimeoutExpired(self.process.args, timeout or 0.0) from error
        except ConnectionError:  # the process has ended before it read the command
            is_done = b""
        status = 0 if is_done else self.process.wait(timeout)
        self.is_busy = False
        return status

    def terminate(self) -> None:
        assert self.process is not None
        self.process.terminate()

    def close(self) -> None:
        """Ends the process. A busy process ends after its command, as it does if its worker is killed."""
        if self.process:
            self.connection.close()
            if not self.is_busy:
                self.process.wait()
            self.process = None


def start_server(descriptor: int, log: BinaryIO, environment: dict[str, str]) -> subprocess.Popen:
    """Starts the process that runs commands. `descriptor` is its end of the socket. It writes to `log` until its first
    command."""
    return subprocess.Popen([sys.executable, "-m", "util.series.serve", str(descriptor), os.getcwd()], cwd=ROOT,
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[descriptor], env=environment)
