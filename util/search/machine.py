"""A worker of a search finds out what its machine can do, before it takes a trial.

A process of its own asks a GPU. The worker must not hold any of the GPU's memory, and many clusters let one process use
a GPU at a time (compute mode EXCLUSIVE_PROCESS): this must be the trial's process.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from lavin.kernels.fp8 import check_fp8
from lavin.runtime.console import counted
from lavin.runtime.device import choose_device, choose_dtype, precision_name
from lavin.runtime.errors import UserError


def is_cpu(device: str | None) -> bool:
    """Returns whether --device means the CPU on this machine."""
    return device == "cpu" or not torch.cuda.is_available()


def resolve_precision(precision: str, device: str | None, bits: str, gpus: int = 1) -> str:
    """Returns the precision that --precision means on this machine: bf16, fp16 or fp32. Raises UserError if the machine
    cannot do this precision, --bits or --gpus."""
    if is_cpu(device):
        return ask(precision, device, bits, gpus)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ask, precision, device, bits, gpus).result()


def ask(precision: str, device: str | None, bits: str, gpus: int) -> str:
    chosen = choose_device(device, local_rank=0)
    if chosen.type == "cuda" and gpus > torch.cuda.device_count():
        raise UserError(f"--gpus {gpus} is more than the {counted(torch.cuda.device_count(), 'GPU')} that can be seen "
                        "here: give at most that many")
    dtype = choose_dtype(precision, chosen)
    if bits == "fp8":
        check_fp8(chosen, dtype)
    return precision_name(dtype)
