"""Makes this GPU choose as a V100 does, when imported before the model: compute capability 7.0, its attention kernels.

Matrix products and compiled kernels remain those of this GPU.
"""

import torch

import timing  # noqa: F401, first: it extends sys.path
from lavin.runtime import device

V100 = (7, 0)
# by setattr, since a type checker would complain of an assignment
setattr(device, "compute_capability", lambda _: V100)  # noqa: B010
setattr(device, "unsupported_gpu", lambda _: None)  # noqa: B010, this GPU's kernels are there
for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
    enable(False)


def break_compiler() -> None:
    """Triton and Inductor compile for what torch answers, and fail where their ptxas does not know it."""
    torch.cuda.get_device_capability = lambda *_: V100
