"""Many trained parameters as one long tensor, and their gradients as another.

What treats all parameters alike (zeroing, the sum over processes, the norm, the optimizer's update) then takes a few
kernels, where hundreds of small tensors take the host longer than the GPU.
"""

import torch
from torch import nn

from lavin.runtime.arithmetic import round_up
from lavin.runtime.device import ALIGNMENT


class FlatParameters:
    """Holds some parameters of a model, behind one another.

    The parameters stay the model's own objects under their own names, but their memory lies in `flat` from now on, and
    that of their gradients in `flat.grad`. Passes that were captured before use the old memory, and must be dropped.
    Gradients must be set to zero in place.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        # every parameter begins at a multiple of what compiled kernels expect of a tensor
        self.sizes = [round_up(p.numel(), ALIGNMENT // p.element_size()) for p in parameters]
        self.flat = nn.Parameter(parameters[0].new_zeros(sum(self.sizes)))
        self.flat.grad = torch.zeros_like(self.flat)
        self.gradients = self.split(self.flat.grad)
        for p, part, gradient in zip(parameters, self.split(self.flat.detach()), self.gradients, strict=True):
            part.copy_(p.detach())
            # each in a storage of its own, as parameters are elsewhere, so that nothing compiled depends on its place
            p.data = torch.from_dlpack(part)
            p.grad = gradient

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Returns the parts of a tensor of this length as views with the parameters' shapes."""
        return [part[:p.numel()].view_as(p)
                for p, part in zip(self.parameters, flat.split(self.sizes), strict=True)]

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Returns a flat tensor whose parts are these tensors, as long as `flat` is."""
        joined = torch.zeros_like(self.flat, requires_grad=False)
        for part, tensor in zip(self.split(joined), tensors, strict=True):
            part.copy_(tensor)
        return joined

    def check_gradients(self) -> None:
        """Raises RuntimeError where a parameter got another gradient than its part of the flat one."""
        if any(p.grad is not gradient for p, gradient in zip(self.parameters, self.gradients, strict=True)):
            raise RuntimeError("a gradient was replaced: it must be set to zero in place (set_to_none=False)")

    def count_write(self) -> None:
        """Says to those who watch the parameters' versions (lavin/routing_cache.py) that `flat` was written to."""
        for p in self.parameters:
            torch.autograd.graph.increment_version(p)
