"""Data parallel: the same step on 1 or N processes (torchrun), with one all-reduce of all gradients a step."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def init() -> tuple[int, int, int]:
    """Joins the processes that torchrun started. Returns rank, number of processes, rank on this machine."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    return int(os.environ.get("RANK", 0)), world, int(os.environ.get("LOCAL_RANK", 0))


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(thing) -> list:
    """Every process's thing, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def sum_gradients(parameters: list[torch.nn.Parameter], number: torch.Tensor) -> torch.Tensor:
    """Sums gradients, in place, and one number over all processes: one message. Returns the summed number."""
    flat = torch.cat([p.grad.flatten() for p in parameters] + [number[None]])
    if dist.is_initialized():
        dist.all_reduce(flat)
    *gradients, number = flat.split([p.numel() for p in parameters] + [1])
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient.view_as(p)
    return number[0]
