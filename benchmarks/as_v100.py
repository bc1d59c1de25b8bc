"""Makes this GPU choose as a V100 does, when imported before the model: compute capability 7.0, its attention kernels.

Matrix products and compiled kernels remain those of this GPU.
"""

import torch

import timing  # noqa: F401, first: it extends sys.path
from lavin.runtime import device

V100 = (7, 0)
device.compute_capability = lambda device: V100
device.unsupported_gpu = lambda device: None  # this GPU's kernels are there
for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
    enable(False)


def break_compiler() -> None:
    """Triton and Inductor compile for what torch answers, and fail where their ptxas does not know it."""
    torch.cuda.get_device_capability = lambda *_: V100
