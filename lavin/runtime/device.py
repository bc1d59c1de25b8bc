"""Device and compute dtype by hardware, and copies between host and device that do not block the host."""

from collections.abc import Callable

import torch

from lavin.runtime.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """--device, or this process's GPU where there is one. Raises UserError where it is not available."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name}: choose cuda or cpu") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"--device {name}: choose cuda or cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU is visible here; leave the flag out to run on the CPU")
    if device.index is None:
        device = torch.device("cuda", local_rank)
    if device.index >= torch.cuda.device_count():
        raise UserError(f"{torch.cuda.device_count()} GPUs are visible, and process {local_rank} needs one of its own: "
                        "start fewer processes (torchrun --nproc_per_node)")
    torch.cuda.set_device(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """--precision. `auto`: float32 on a CPU, bfloat16 on GPUs that support it (Ampere, 8.0), float16 on older ones."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Host to device; to a GPU through pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copy_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Starts a device-to-host copy, ahead of kernels launched later. Call the result to wait for the copy and get
    it."""
    host = tensor.to("cpu", non_blocking=True)
    if tensor.device.type != "cuda":
        return lambda: host
    copied = torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host
