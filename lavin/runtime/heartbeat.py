"""Notices a process that has stopped answering (frozen, or its machine is gone), and ends the run with its name.

A thread of every process writes a counter to torchrun's store and reads those of the others. It does not depend on the
main thread, so a slow download or a long compilation does not count as frozen. errors.py says which process speaks.
"""

import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from tqdm import tqdm

from lavin.runtime.console import by_program
from lavin.runtime.errors import report_to_torchrun

INTERVAL_SECONDS, LIMIT_SECONDS = 10, 120
GONE = b"gone"  # the beat of a process that has finished

_stopping = threading.Event()
_thread: threading.Thread | None = None


def start(rank: int, world: int) -> None:
    """Starts this process's thread, with a connection of its own to the store."""
    global _thread
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          timeout=timedelta(seconds=LIMIT_SECONDS))
    _stopping.clear()
    _thread = threading.Thread(target=beat, args=(store, rank, world), daemon=True)
    _thread.start()


def stop() -> None:
    """Tells the others that this process ends because it has finished."""
    global _thread
    if _thread:
        _stopping.set()
        _thread.join()
        _thread = None


def beat(store, rank: int, world: int) -> None:
    name = f"process {rank} (on {socket.gethostname()}, process id {os.getpid()})"
    last = {other: (b"", time.monotonic()) for other in range(world) if other != rank}  # beat, and since when
    count = 0
    try:
        while not _stopping.wait(INTERVAL_SECONDS if count else 0):
            count += 1
            store.set(f"beat/{rank}", f"{count} {name}")
            last = {other: latest_beat(store, other, *seen) for other, seen in last.items()}
            frozen = [other for other, (_, since) in last.items() if time.monotonic() - since > LIMIT_SECONDS]
            if frozen:
                report(frozen[0], last[frozen[0]][0], first=min(set(range(world)) - set(frozen)) == rank)
        store.set(f"beat/{rank}", GONE)
    except RuntimeError:  # the store is gone, and with it torchrun, which stops all processes
        return


def latest_beat(store, other: int, value: bytes, since: float) -> tuple[bytes, float]:
    """A process's beat, and since when it has it. A process that has finished needs no new one."""
    latest = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else b""
    return (value, since) if latest == value != GONE else (latest, time.monotonic())


def report(other: int, value: bytes, first: bool) -> None:
    """Ends this process; the first of those that answer says why. torchrun then ends the frozen one."""
    name = value.decode().partition(" ")[2] or f"process {other}"
    message = by_program(f"error: {name} has not answered for {LIMIT_SECONDS} s: it is frozen, or its machine or "
                         "network is down; the same command goes on from the last checkpoint")
    if not first:
        time.sleep(5)
    report_to_torchrun(message)
    tqdm.write(message, file=sys.stderr)
    os._exit(1)
