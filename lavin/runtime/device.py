"""The device, its compute dtype, the number of threads and the launches of kernels by hardware, and copies between
host and device that do not block the host."""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from lavin.runtime.arithmetic import round_up
from lavin.runtime.console import counted
from lavin.runtime.errors import UserError

ALIGNMENT = 16  # bytes, of tensors that are copied together
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

NVIDIA_DEVICES = Path("/dev")  # nvidia0, ...: the GPUs that this process may open
VISIBLE = r"\d.*|GPU-.*|MIG-.*"  # CUDA_VISIBLE_DEVICES that names a GPU; Slurm's NoDevFiles and -1 name none


def compute_capability(device) -> tuple[int, int]:
    """(major, minor) of a GPU: V100 (7, 0), T4 (7, 5), A100 (8, 0), L40 (8, 9), H100 (9, 0)."""
    return torch.cuda.get_device_capability(device)


@cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Arguments for Triton kernels that may be launched while the kernel before them still runs (programmatic dependent
    launch). What such a kernel reads before it waits must be older than that kernel; it writes, and lets the next one
    be launched, only after the wait, so that at most two run at a time.

    Used where it was measured: on Hopper (9.0) with CUDA 13, whose drivers can capture it, and which torch brings
    together with Triton 3.5 or newer (older ones cannot compile the wait).
    """
    cuda = int((torch.version.cuda or "0").split(".")[0])
    if compute_capability(device) != (9, 0) or cuda < 13:
        return {"USE_PDL": False}
    return {"USE_PDL": True, "launch_pdl": True}


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Says whether a GPU of this capability runs code of an architecture in torch.cuda.get_arch_list(): sm_75 is
    machine code for 7.5 and later 7.x, and compute_75 is compiled by the driver for 7.5 and anything newer."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if not found:
        return False
    built_for = int(found[2]), int(found[3])
    if found[4] == "a":
        return built_for == capability
    return built_for <= capability and (found[1] == "compute" or built_for[0] == capability[0])


def unsupported_gpu(device) -> str | None:
    """A line where this torch has no kernels for the GPU. ROCm's builds are not checked."""
    capability, architectures = compute_capability(device), torch.cuda.get_arch_list()
    if torch.version.hip or any(runs_on(architecture, capability) for architecture in architectures):
        return None
    fix = "pip install --upgrade torch" if capability >= (7, 5) else \
        "pip install -r requirements.txt -c requirements/constraints/v100.txt" if capability >= (5, 0) else \
        "take --device cpu"
    return (f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}; it has {', '.join(architectures)}): {fix}")


def unusable_gpu() -> str | None:
    """A line where this process may use NVIDIA GPUs, and this torch cannot."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    gpus = [path for path in NVIDIA_DEVICES.glob("nvidia[0-9]*") if os.access(path, os.R_OK | os.W_OK)]
    if torch.cuda.is_available() or not gpus or not re.fullmatch(VISIBLE, visible):
        return None
    if torch.version.cuda is None:
        return (f"this machine has a GPU, and torch {torch.__version__} is built for CPUs only: pip install "
                "--force-reinstall torch, or leave the GPU alone with --device cpu")
    return (f"this machine has a GPU that torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use: "
            "for drivers before 580, pip install -r requirements.txt -c requirements/constraints/cuda12.txt "
            "(before 525: requirements/constraints/cuda11.txt); to leave the GPU alone, --device cpu")


def limit_threads(device: torch.device) -> None:
    """Gives torch one thread for each core that this process may use and, on the host of a GPU, whose work there is
    small, one thread. The processes of a node share its cores. OMP_NUM_THREADS wins, the user's own or torchrun's."""
    if "OMP_NUM_THREADS" not in os.environ:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = 1 if device.type == "cuda" else max(1, len(os.sched_getaffinity(0)) // processes)
        torch.set_num_threads(min(torch.get_num_threads(), cores))


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """--device, or this process's GPU where there is one. Raises UserError where it cannot be used."""
    if name is None and (problem := unusable_gpu()):
        raise UserError(problem)
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: choose cuda or cpu") from error
    if device.type == "cpu":
        device = torch.device("cpu")
        limit_threads(device)
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: choose cuda or cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU is visible here; leave the flag out to run on the CPU")
    if device.index is None:
        device = torch.device("cuda", local_rank)
    if device.index >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} needs a GPU of its own, and "
                        f"{counted(torch.cuda.device_count(), 'GPU')} can be seen: start fewer processes "
                        "(torchrun --nproc_per_node)")
    if problem := unsupported_gpu(device):
        raise UserError(problem)
    torch.cuda.set_device(device)
    limit_threads(device)
    # partial sums of a matmul stay in float32; in fp16, LLaMA's largest activations would cost precision or overflow
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device


def precision_name(dtype: torch.dtype) -> str:
    """Returns the name of a precision, as --precision has it: bf16, fp16 or fp32."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """--precision. `auto`: float32 on a CPU, bfloat16 on GPUs that support it (Ampere, 8.0), float16 on older ones.

    Raises UserError for bfloat16 on these.
    """
    if precision == "bf16" and device.type == "cuda" and compute_capability(device) < (8, 0):
        raise UserError("--precision bf16 needs a GPU of compute capability 8.0 (Ampere) or newer: take fp16")
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if compute_capability(device) >= (8, 0) else torch.float16


def to_device(tensors: list[torch.Tensor], device) -> list[torch.Tensor]:
    """Host to device; to a GPU in one copy, through pinned memory, so that the host does not wait."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [round_up(tensor.nbytes, ALIGNMENT) for tensor in tensors]
    pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)

    def parts(memory: torch.Tensor) -> list[torch.Tensor]:
        return [part[:tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                for part, tensor in zip(memory.split(sizes), tensors, strict=True)]

    for part, tensor in zip(parts(pinned), tensors, strict=True):
        part.copy_(tensor)
    # each in memory of its own: torch.compile makes another program for views
    return [part.clone() for part in parts(pinned.to(device, non_blocking=True))]


def stack_on_device(tensors: list[torch.Tensor], device) -> torch.Tensor:
    """torch.stack of tensors on the host, as `to_device`. Pinned memory is used again and again: to write to memory
    that is new takes the host longer than the copy."""
    stacked = tensors[0].new_empty(len(tensors), *tensors[0].shape, pin_memory=torch.device(device).type == "cuda")
    return torch.stack(tensors, out=stacked).to(device, non_blocking=True)


def copy_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Starts a device-to-host copy, ahead of kernels launched later. Call the result to wait for the copy and get
    it."""
    host = tensor.to("cpu", non_blocking=True)
    if tensor.device.type != "cuda":
        return lambda: host
    copied = torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host


def set_determinism(on: bool, warn_only: bool = False) -> None:
    """Makes torch choose algorithms that give the same bits every time, or undoes that.

    warn_only: whether torch warns where it has no such algorithm, rather than raising an error.
    """
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = not on
