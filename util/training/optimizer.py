"""The optimizer, and its step over the gradients of all ranks."""

import math
from collections.abc import Callable

import torch

from lavin.fast.captured_models import free_graphs
from lavin.fast.cuda_graphs import CapturedFunction
from lavin.fast.flat_parameters import FlatParameters
from lavin.runtime import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW's state
INITIAL_SCALE = 1024.0  # of the loss; it doubles after every 2,000 steps without an overflow


class FlatAdamW(torch.optim.AdamW):
    """AdamW over groups of flat parameters. Its state is saved and loaded as that of AdamW over the parameters
    themselves."""

    def __init__(self, flat: list[FlatParameters], groups: list[dict], captured: bool = False, **options):
        """groups: the options of each of the `flat` parameters; options: of all. captured: whether steps are captured
        in a CUDA graph."""
        self.flat, self.captured = flat, captured
        self.captured_steps: dict[object, CapturedFunction] = {}
        # the groups' rates, where a captured step reads them; the same numbers count in a step that is not captured
        self.rates = [torch.zeros((), device=f.flat.device) for f in flat]
        super().__init__([{**group, "params": [f.flat]} for f, group in zip(flat, groups, strict=True)], **options)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The flat parameters."""
        return [f.flat for f in self.flat]

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)

    def step(self, closure=None):
        capturing = self.rates[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self.begin_step()
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group.update(lr=rate, capturable=capturing)
        result = super().step(closure)
        for group, number in zip(self.param_groups, rates, strict=True):
            group.update(lr=number, capturable=False)
        self.end_step()
        return result

    def begin_step(self) -> None:
        for f, rate, group in zip(self.flat, self.rates, self.param_groups, strict=True):
            f.check_gradients()
            rate.fill_(group["lr"])

    def end_step(self) -> None:
        for f in self.flat:
            f.count_write()

    def replay(self, make_step: Callable[[torch.Tensor], torch.Tensor], numbers: torch.Tensor, clip_grad: float | None
               ) -> torch.Tensor:
        """Returns `make_step(numbers)`, which clips by `clip_grad` and calls `step`, captured from the second step on:
        the first makes the state."""
        if not self.state:
            return make_step(numbers)
        if clip_grad not in self.captured_steps:
            self.captured_steps[clip_grad] = CapturedFunction(make_step, numbers)
        self.begin_step()
        result = self.captured_steps[clip_grad](numbers)
        self.end_step()
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
                state[i] = {"step": of_parameters[0]["step"].clone(),
                            **{name: f.join([part[name] for part in of_parameters]) for name in MOMENTS}}
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        self.captured_steps.clear()  # they use the state that was replaced


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
