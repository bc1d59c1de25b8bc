"""The optimizer, and its step over the gradients of all ranks."""

import math

import torch

from lavin.fast.captured_models import free_graphs
from lavin.fast.flat_adamw import FlatAdamW
from lavin.fast.flat_parameters import FlatParameters
from lavin.runtime import distributed

INITIAL_SCALE = 1024.0  # of the loss; it doubles after every 2,000 steps without an overflow


def make_optimizer(model, weight_decay: float) -> FlatAdamW:
    """AdamW over the trained parameters, with weight decay on matrices only. Its rate is set before every step.

    It moves the parameters and their gradients to other memory (FlatParameters).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = [FlatParameters([p for p in trained if (p.ndim > 1) == is_matrix]) for is_matrix in (True, False)]
    free_graphs(model.llama, model.vision)
    return FlatAdamW(flat, [{"weight_decay": weight_decay}, {"weight_decay": 0.0}], model.use_cuda_graphs,
                     betas=(0.9, 0.95), fused=True)


def make_scaler(model) -> torch.amp.GradScaler:
    """Loss scaling, for fp16 only.

    PyTorch's initial scale of 65536 would overflow in the first steps of a base with large activations: each halving
    skips a step, and ten skipped steps in a row end training (epoch_record.py).
    """
    return torch.amp.GradScaler(model.device.type, init_scale=INITIAL_SCALE, enabled=model.dtype == torch.float16)


def optimizer_step(optimizer, scaler, parameters, loss: torch.Tensor, clip_grad: float | None, stop: bool = False
                   ) -> torch.Tensor:
    """Sums the gradients of all ranks and steps. `parameters` are those of the optimizer.

    Returns [loss, 1 if the step was made or 0 if it was skipped, norm of the gradient, number of ranks that stop], the
    same on every rank. A step with non-finite gradients is skipped. After the sum they are non-finite on every rank, so
    all ranks skip the same steps. The host does not wait for the GPU: the fused optimizer itself skips the update where
    `found_inf` is 1.
    """
    numbers = torch.stack((loss, torch.full_like(loss, stop)))
    numbers = distributed.all_reduce_gradients(parameters, numbers)
    scaler.unscale_(optimizer)

    def make_step(numbers: torch.Tensor) -> torch.Tensor:
        loss, n_stop = numbers
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
        finite = norm.isfinite()
        if scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = 1 - finite.float()
            optimizer.step()
        optimizer.zero_grad()
        return torch.stack((loss, finite.to(loss.dtype), norm.to(loss.dtype), n_stop))

    if isinstance(optimizer, FlatAdamW) and optimizer.captured and not scaler.is_enabled():
        return optimizer.replay(make_step, numbers, clip_grad)
    return make_step(numbers)
