"""Many processes, one step (torchrun): data parallel, with one all-reduce of all gradients a step.

Where `--model_parallel_size` neighbouring processes share one model (lavin/tensor_parallel.py), they see the same
samples and hold the same adapters: together they are one data-parallel process.
"""

import os
from contextlib import redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from lavin.errors import UserError

model_size = 1  # processes that share a model, as told to `init`


def init(model_parallel_size: int = 1) -> tuple[int, int, int]:
    """Joins the processes that torchrun started. Returns data-parallel rank and size, and the rank on this machine.

    Called again, it only tells these. Raises UserError where the processes cannot be grouped so.
    """
    global model_size
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if model_parallel_size < 1 or world % model_parallel_size:
        raise UserError(f"--model_parallel_size {model_parallel_size} does not divide the number of processes, "
                        f"{world}: start others with torchrun --nproc_per_node")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    if model_parallel_size > 1 and model_size == 1:
        from fairscale.nn.model_parallel.initialize import initialize_model_parallel  # here, since few runs need it
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # it tells all sizes
            initialize_model_parallel(model_parallel_size)
        model_size = model_parallel_size
    return rank // model_size, world // model_size, int(os.environ.get("LOCAL_RANK", 0))


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def of_all(thing) -> list:
    """Every process's thing, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def gather(thing) -> list:
    """Every data-parallel process's thing, in their order, on every process."""
    return of_all(thing)[::model_size]


def least(number: float) -> float:
    """The least of all processes' numbers where some share a model, so that these act alike; else the number itself."""
    return number if model_size == 1 else min(of_all(number))


def sum_gradients(parameters: list[torch.nn.Parameter], number: torch.Tensor) -> torch.Tensor:
    """Sums gradients, in place, and one number over all data-parallel processes: one message. Returns that sum.

    What has no gradient, as the ViT's adapters in a step without pictures, gets one of zeros.
    Processes that share a model bring the same gradients, and each a part of them, so that they stay the same to the
    last bit.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [number[None]])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= model_size
    *gradients, number = flat.split([p.numel() for p in parameters] + [1])
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient.view_as(p)
    return number[0]
