"""A function in processes of its own, forked from this one: Python and torch need not be started again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from lavin.runtime import distributed

SECONDS = 30  # after which a child is killed, and the test fails


class Ended(NamedTuple):
    status: int  # negative: the signal that killed it
    out: str
    errors: str


def in_child(function: Callable[[], object], **environment: str) -> Ended:
    """Calls the function in a forked child; returns what the child prints, and how it ends. environment: variables that
    are added to this process's."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        status = Child(function, out.fileno(), errors.fileno(), environment).wait()
        said = [file.seek(0) or file.read().decode() for file in (out, errors)]
    return Ended(status, *said)


def in_processes(function: Callable[[], object], n: int) -> list:
    """Calls the function in n forked children with the environment of torchrun's; returns what it returned in each."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        children = [Child(lambda rank=rank: torch.save(function(), f"{folder}/{rank}"), said.fileno(), said.fileno(), {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port)}) for rank in range(n)]
        try:
            statuses = [child.wait(180) for child in children]
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
        said.seek(0)
        assert not any(statuses), said.read().decode()
        return [torch.load(f"{folder}/{rank}") for rank in range(n)]


@contextmanager
def joined(parallel_size: int = 1) -> Iterator[tuple[int, int]]:
    """Joins the processes' group, which several commands then have in common. Returns the rank and their number."""
    distributed.init(parallel_size)
    close, distributed.close = distributed.close, lambda: None
    yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.barrier()  # a process that ends earlier would break the connections of the other
    close()


class Child:
    """A forked child that calls the function, with what subprocess.Popen has of a process."""

    def __init__(self, function: Callable[[], object], out: int, errors: int, environment: dict[str, str]):
        self.args, self.returncode = "a forked child", None
        self.pid = os.fork()
        if not self.pid:
            call_and_end(function, out, errors, environment)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, after SECONDS that of SIGKILL; with a timeout, as subprocess.Popen gives it."""
        deadline = time.monotonic() + (SECONDS if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                if timeout is not None:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                self.kill()
            time.sleep(0.005)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def call_and_end(function: Callable[[], object], out: int, errors: int, environment: dict[str, str]) -> None:
    """Calls the function in the child. No code of pytest is run there, whatever the function raises."""
    status: object = 1
    try:
        os.dup2(out, 1)
        os.dup2(errors, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = ["/somewhere/main.py"]
        os.environ.update(environment)
        function()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
