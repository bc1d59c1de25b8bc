"""Processes started by torchrun: data parallel, with one all-reduce of all gradients an optimizer step.

With --model_parallel_size N, N consecutive ranks hold the parts of one model (lavin/weights/tensor_parallel.py). They
get the same samples and hold the same adapters, so that together they are one data-parallel rank.

Their number N is, as the ranks and the world size that torch.distributed and fairscale hold, a fact of the process: it
is set when the process joins its groups, and read wherever processes must act alike.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the process group of the time of the import as a default. Imported by the compiler, after a group
# was made, they would keep it and its threads until Python ends, which those may abort.
import torch.distributed.nn.functional  # noqa: F401

from lavin.runtime import heartbeat, signals
from lavin.runtime.console import is_main_process
from lavin.runtime.errors import UserError, first_line

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

model_parallel_size = 1  # ranks that share one model; set by `init`


def init(parallel_size: int | None = None) -> tuple[int, int, int]:
    """Joins the process group. Returns the data-parallel rank, the data-parallel world size and the local rank.

    parallel_size: the value of --model_parallel_size; None: the value set before. Raises UserError where the number of
    processes is not a multiple of it.
    """
    global model_parallel_size
    rank, world, local_rank = launched_as()
    parallel_size = model_parallel_size if parallel_size is None else parallel_size
    if parallel_size < 1 or world % parallel_size:
        raise UserError(f"--model_parallel_size {parallel_size} does not divide the number of processes, "
                        f"{world}: start others with torchrun --nproc_per_node")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
        heartbeat.start(rank, world)
    if parallel_size != model_parallel_size:
        # imported here, since few runs need fairscale
        from fairscale.nn.model_parallel.initialize import destroy_model_parallel, initialize_model_parallel
        destroy_model_parallel()
        if parallel_size > 1:
            with open(os.devnull, "w") as devnull, redirect_stdout(devnull):  # it prints all group sizes
                initialize_model_parallel(parallel_size)
        model_parallel_size = parallel_size
    return rank // model_parallel_size, world // model_parallel_size, local_rank


def launched_as() -> tuple[int, int, int]:
    """Rank, world size and local rank. Raises UserError where the launcher's variables are incomplete: a RANK that was
    left in the environment would make this process wait for others, or write nothing."""
    rank, world, local_rank = (os.environ.get(name) for name in LAUNCHER_VARIABLES[:3])
    if rank is world is local_rank is None:
        return 0, 1, 0
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    try:
        ranks = int(rank or 0), int(world or 1), int(local_rank or 0)
    except ValueError:
        missing = ["whole numbers"]
    if missing or not 0 <= ranks[2] <= ranks[0] < ranks[1]:
        found = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCHER_VARIABLES[:3] if name in os.environ)
        raise UserError(f"the environment has {found}" + (f" without {', '.join(missing)}" if missing else "")
                        + ": unset RANK WORLD_SIZE LOCAL_RANK, or start with torchrun")
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port} is no port (Kubernetes gives it the address of a service named master): "
                        "set it to a number, or start with torchrun")
    return ranks


def close() -> None:
    heartbeat.stop()
    if dist.is_initialized():
        if torch.__version__ < "2.8":
            # The destructor of a gloo group, which the chat has beside NCCL, waits for its threads with the GIL held,
            # and deadlocks where one of them is still to release the last message's tensors: this gives them time.
            time.sleep(0.5)
        dist.destroy_process_group()


@contextmanager
def lost_contact() -> Iterator[None]:
    """Names what it means for the user where a message between the processes fails."""
    try:
        yield
    except RuntimeError as error:
        if signals.requested:  # torchrun has stopped the other processes too
            raise signals.Stopped(f"stopped by {signals.requested}") from error
        raise UserError(f"lost contact with another process ({first_line(error)}): the log names the one that failed "
                        "first, or torchrun's last lines do") from error


def all_gather_object(value: Any) -> list:
    """Every rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with lost_contact():
        dist.all_gather_object(values, value)
    return values


def from_rank_0(make) -> Any:
    """`make()`, called on rank 0 only, on every rank."""
    value = [make() if is_main_process() else None]
    if dist.is_initialized():
        with lost_contact():
            dist.broadcast_object_list(value, src=0)
    return value[0]


def from_each_node(make) -> dict[str, Any]:
    """`make()`, called by one process of each node, by the process's name, on every rank. Rank 0 comes first."""
    rank, _, local_rank = launched_as()
    made = None if local_rank else (f"rank {rank} on {socket.gethostname()}", make())
    return dict(filter(None, all_gather_object(made)))


def gather_data_parallel(value: Any) -> list:
    """Every data-parallel rank's value, in the order of ranks, on every rank."""
    return all_gather_object(value)[::model_parallel_size]


def all_min(number: float) -> float:
    """The minimum over all ranks where some of them share a model and so must act alike; else the number itself."""
    return number if model_parallel_size == 1 else min(all_gather_object(number))


def all_reduce_gradients(parameters: list[torch.nn.Parameter], numbers: torch.Tensor) -> torch.Tensor:
    """Sums gradients, in place, and some numbers [n] over all data-parallel ranks in one message. Returns the sums [n].

    A parameter without a gradient (the ViT's adapters, in a step without images) gets a gradient of zeros.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not dist.is_initialized():
        return numbers
    flat = torch.cat([*(p.grad.flatten() for p in parameters), numbers])  # type: ignore[union-attr]  # none is None
    with lost_contact():
        dist.all_reduce(flat)
    # Ranks that share a model contribute the same gradients. All of them take part, so that they receive identical
    # bits, and the sum is divided by their number.
    flat /= model_parallel_size
    *gradients, numbers = flat.split([p.numel() for p in parameters] + [len(numbers)])
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad.copy_(gradient.view_as(p))  # type: ignore[union-attr]
    return numbers
