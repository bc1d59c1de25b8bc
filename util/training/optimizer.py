"""The optimizer, and its step over the gradients of all ranks."""

import math

import torch

from lavin.fast.captured_models import free_graphs
from lavin.fast.flat_parameters import FlatParameters
from lavin.runtime import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW's state
INITIAL_SCALE = 1024.0  # of the loss; it doubles after every 2,000 steps without an overflow


class FlatAdamW(torch.optim.AdamW):
    """AdamW over groups of flat parameters. Its state is saved and loaded as that of AdamW over the parameters
    themselves."""

    def __init__(self, flat: list[FlatParameters], groups: list[dict], **options):
        """groups: the options of each of the `flat` parameters; options: of all."""
        self.flat = flat
        super().__init__([{**group, "params": [f.flat]} for f, group in zip(flat, groups, strict=True)], **options)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The flat parameters."""
        return [f.flat for f in self.flat]

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)

    def step(self, closure=None):
        for f in self.flat:
            f.check_gradients()
        result = super().step(closure)
        for f in self.flat:
            f.count_write()
        return result

    def state_dict(self) -> dict:
        saved = super().state_dict()
        state: dict[int, dict] = {}
        for i, (f, group) in enumerate(zip(self.flat, saved["param_groups"], strict=True)):
            first = sum(len(earlier.parameters) for earlier in self.flat[:i])
            group["params"] = list(range(first, first + len(f.parameters)))
            if of_flat := saved["state"].get(i):
                moments = (f.split(of_flat[name]) for name in MOMENTS)
                for index, parts in zip(group["params"], zip(*moments, strict=True), strict=True):
                    state[index] = {"step": of_flat["step"].clone(),
                                    **{name: part.clone() for name, part in zip(MOMENTS, parts, strict=True)}}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        state, groups = {}, []
        for i, (f, group) in enumerate(zip(self.flat, state_dict["param_groups"], strict=True)):
            groups.append({**group, "params": [i]})
            if of_parameters := [state_dict["state"][index] for index in group["params"] if state_dict["state"]]:
                state[i] = {"step": of_parameters[0]["step"],
                            **{name: f.join([part[name] for part in of_parameters]) for name in MOMENTS}}
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})


def make_optimizer(model, weight_decay: float) -> FlatAdamW:
    """AdamW over the trained parameters, with weight decay on matrices only. Its rate is set before every step.

    It moves the parameters and their gradients to other memory (FlatParameters).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = [FlatParameters([p for p in trained if (p.ndim > 1) == is_matrix]) for is_matrix in (True, False)]
    free_graphs(model.llama, model.vision)
    return FlatAdamW(flat, [{"weight_decay": weight_decay}, {"weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)


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
    loss, n_stop = distributed.all_reduce_gradients(parameters, numbers)
    scaler.unscale_(optimizer)
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
