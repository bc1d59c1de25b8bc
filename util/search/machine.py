"""Asks what a machine can do, before a worker of a search takes a trial.

On a GPU that is asked in a process of its own: a worker must hold no memory of the GPU, and on many clusters only one
process may use a GPU at a time (compute mode EXCLUSIVE_PROCESS), which is the trial's.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from lavin.kernels.fp8 import check_fp8
from lavin.runtime.console import counted
from lavin.runtime.device import choose_device, choose_dtype, precision_name
from lavin.runtime.errors import UserError


def is_cpu(device: str | None) -> bool:
    """Whether --device means the CPU here."""
    return device == "cpu" or not torch.cuda.is_available()


def resolve_precision(precision: str, device: str | None, bits: str, gpus: int = 1) -> str:
    """The precision that --precision means here: bf16, fp16 or fp32. Raises UserError where it, --bits or --gpus fails.
    """
    if is_cpu(device):
        return ask(precision, device, bits, gpus)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ask, precision, device, bits, gpus).result()


def ask(precision: str, device: str | None, bits: str, gpus: int) -> str:
    chosen = choose_device(device, local_rank=0)
    if chosen.type == "cuda" and gpus > torch.cuda.device_count():
        raise UserError(f"--gpus {gpus}, and {counted(torch.cuda.device_count(), 'GPU')} can be seen here: give "
                        "at most that many")
    dtype = choose_dtype(precision, chosen)
    if bits == "fp8":
        check_fp8(chosen, dtype)
    return precision_name(dtype)
