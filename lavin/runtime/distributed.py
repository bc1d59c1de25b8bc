"""Processes started by torchrun: data parallel, with one all-reduce of all gradients an optimizer step.

With --model_parallel_size N, N consecutive ranks hold the parts of one model (lavin/weights/tensor_parallel.py). They
get the same samples and hold the same adapters, so that together they are one data-parallel rank.
"""

import os
from contextlib import redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lavin.runtime.errors import UserError

model_parallel_size = 1  # ranks that share one model; set by `init`


def init(parallel_size: int = 1) -> tuple[int, int, int]:
    """Joins the process group. Returns the data-parallel rank, the data-parallel world size and the local rank.

    parallel_size: --model_parallel_size. Later calls return the same again. Raises UserError where the number of
    processes is not a multiple of it.
    """
    global model_parallel_size
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if parallel_size < 1 or world % parallel_size:
        raise UserError(f"--model_parallel_size {parallel_size} does not divide the number of processes, "
                        f"{world}: start others with torchrun --nproc_per_node")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    if parallel_size > 1 and model_parallel_size == 1:
        # imported here, since few runs need fairscale
        from fairscale.nn.model_parallel.initialize import initialize_model_parallel
        with open(os.devnull, "w") as devnull, redirect_stdout(devnull):  # it prints all group sizes
            initialize_model_parallel(parallel_size)
        model_parallel_size = parallel_size
    return rank // model_parallel_size, world // model_parallel_size, int(os.environ.get("LOCAL_RANK", 0))


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather_object(value: Any) -> list:
    """Every rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_data_parallel(value: Any) -> list:
    """Every data-parallel rank's value, in the order of ranks, on every rank."""
    return all_gather_object(value)[::model_parallel_size]


def all_min(number: float) -> float:
    """The minimum over all ranks where some of them share a model and so must act alike; else the number itself."""
    return number if model_parallel_size == 1 else min(all_gather_object(number))


def all_reduce_gradients(parameters: list[torch.nn.Parameter], number: torch.Tensor) -> torch.Tensor:
    """Sums gradients, in place, and one number over all data-parallel ranks in one message. Returns the number's sum.

    A parameter without a gradient (the ViT's adapters, in a step without images) gets a gradient of zeros.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [number[None]])
    if dist.is_initialized():
        dist.all_reduce(flat)
        # Ranks that share a model contribute the same gradients. All of them take part, so that they receive identical
        # bits, and the sum is divided by their number.
        flat /= model_parallel_size
    *gradients, number = flat.split([p.numel() for p in parameters] + [1])
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.view_as(p)
    return number[0]
