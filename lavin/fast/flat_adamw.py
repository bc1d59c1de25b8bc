"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over flat parameters, in a few kernels that can be captured.

The arithmetic is that of torch.optim.AdamW, and so is the form in which the state is saved: that of AdamW over the
single parameters, which runs of all versions have.
"""

from collections.abc import Callable

import torch

from lavin.fast.cuda_graphs import CapturedFunction
from lavin.fast.flat_parameters import FlatParameters

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW's state


class FlatAdamW(torch.optim.AdamW):
    """AdamW over groups of flat parameters. `captured` says whether its steps are captured in a CUDA graph."""

    def __init__(self, flat: list[FlatParameters], groups: list[dict], captured: bool = False, **options):
        """Each of the flat parameters is a group with the options at its place in `groups`. `options` are of all."""
        self.flat, self.captured = flat, captured
        self.captured_steps: dict[object, CapturedFunction] = {}
        # a captured step reads the groups' rates here; so does any other step, so that both round them alike
        self.rates = [torch.zeros((), device=f.flat.device) for f in flat]
        super().__init__([{**group, "params": [f.flat]} for f, group in zip(flat, groups, strict=True)], **options)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The flat parameters."""
        return [f.flat for f in self.flat]

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)

    def step(self, closure=None):
        """Makes a step. The groups' rates and `capturable` are other ones only while AdamW reads them, so that a saved
        state has numbers.
        """
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
        """Does what precedes a step and cannot be captured."""
        for f, rate, group in zip(self.flat, self.rates, self.param_groups, strict=True):
            f.check_gradients()
            rate.fill_(group["lr"])

    def end_step(self) -> None:
        """Does what follows a step and cannot be captured."""
        for f in self.flat:
            f.count_write()

    def replay(self, make_step: Callable[[torch.Tensor], torch.Tensor], numbers: torch.Tensor, clip_grad: float | None
               ) -> torch.Tensor:
        """Returns `make_step(numbers)`, which clips by `clip_grad` and calls `step`.

        It is captured from the second step on, since the first one makes the state.
        """
        if not self.state:
            return make_step(numbers)
        if clip_grad not in self.captured_steps:
            self.captured_steps[clip_grad] = CapturedFunction(make_step, numbers)
        self.begin_step()
        result = self.captured_steps[clip_grad](numbers)
        self.end_step()
        return result

    def state_dict(self) -> dict:
        """Returns the state that AdamW over the single parameters has."""
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
        """Loads what `state_dict` returns."""
        state, groups = {}, []
        for i, (f, group) in enumerate(zip(self.flat, state_dict["param_groups"], strict=True)):
            groups.append({**group, "params": [i]})
            if of_parameters := [state_dict["state"][index] for index in group["params"] if state_dict["state"]]:
                state[i] = {"step": of_parameters[0]["step"].clone(),
                            **{name: f.join([part[name] for part in of_parameters]) for name in MOMENTS}}
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        self.captured_steps.clear()  # they use the state that was replaced
