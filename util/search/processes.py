"""The processes in which a worker's commands run.

Where a trial has one GPU, a worker's commands run one after another in one process, which keeps their base. Where it
has several, torchrun starts the processes of each command.
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
    """A command that runs: a subprocess.Popen, or what is like it."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired where the command still runs after so many seconds."""

    def terminate(self) -> None:
        """Asks the command to stop."""


# starts a command by its words (train.py or eval.py, then flags); it writes to the log and holds the lock until it ends
Start = Callable[[list[str], BinaryIO, int], Process]


@contextmanager
def starting(study: Path, gpus: int) -> Iterator[Start]:
    """How a worker starts the commands of a study. An idle process of theirs ends with it."""
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
    """Runs commands one after another in one process (util/series/serve.py), and is the Process of the one that runs.

    The process begins with the first command, and anew with the next one after a command has ended it.
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
        with suppress(ConnectionError):  # it was ended while it was idle: `wait` says how
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
        except ConnectionError:  # it has ended before it read the command
            is_done = b""
        status = 0 if is_done else self.process.wait(timeout)
        self.is_busy = False
        return status

    def terminate(self) -> None:
        assert self.process is not None
        self.process.terminate()

    def close(self) -> None:
        """Ends the process; one that is busy ends after its command, as where its worker is killed."""
        if self.process:
            self.connection.close()
            if not self.is_busy:
                self.process.wait()
            self.process = None


def start_server(descriptor: int, log: BinaryIO, environment: dict[str, str]) -> subprocess.Popen:
    """Starts a server. descriptor: the server's end of the socket. log: the file for what the server prints before its
    first command."""
    return subprocess.Popen([sys.executable, "-m", "util.series.serve", str(descriptor), os.getcwd()], cwd=ROOT,
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[descriptor], env=environment)
