"""Flat parameters against the parameters one by one: values, gradients, AdamW, its saved state, captured passes."""

import copy
import math

import pytest
import torch

from lavin.fast.captured_models import capture_passes
from lavin.fast.flat_parameters import FlatParameters
from lavin.model import pack
from lavin.runtime.device import ALIGNMENT
from tiny import BATCHES, mixed_examples, randomise_adapters, tiny_model
from util.training.accumulation import accumulate_gradients, accumulate_with_oom_retry
from util.training.optimizer import make_optimizer, make_scaler, optimizer_step

WEIGHT_DECAY = 0.3


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_adamw(model) -> torch.optim.AdamW:
    """The optimizer over single parameters, as make_optimizer made it before there were flat ones."""
    groups = [{"params": [p for p in trained(model).values() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
              {"params": [p for p in trained(model).values() if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def flat_adamw(model):
    return make_optimizer(model, WEIGHT_DECAY)


def captured_adamw(model):
    capture_passes(model)
    return make_optimizer(model, WEIGHT_DECAY)


def take_steps(model, optimizer, batches, clip_grad: float | None = 0.5, nan_at: int | None = None) -> list[list]:
    """The numbers of a step for each batch, at rates that differ. The loss of step `nan_at` is not a number."""
    scaler, numbers = make_scaler(model), []
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, examples in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * sum(len(example.ids) for example in examples) ** 0.5
        weights = [math.nan if i == nan_at else 0.1] * len(examples)
        loss = accumulate_gradients(model, list(zip(examples, weights, strict=True)), 150, scaler)
        numbers.append(optimizer_step(optimizer, scaler, parameters, loss, clip_grad).tolist())
    return numbers


def assert_equal_models(model, expected, tolerance: float = 1e-6) -> None:
    for (name, p), q in zip(trained(model).items(), trained(expected).values(), strict=True):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance, msg=name)


def test_a_models_parameters_and_gradients_become_parts_of_long_ones():
    model, before = tiny_model(), trained(tiny_model())
    parameters = trained(model)
    flat = FlatParameters(list(parameters.values()))
    assert trained(model).keys() == before.keys()
    for name, p in trained(model).items():
        assert p is parameters[name] and torch.equal(p, before[name]) and not p.grad.any(), name
        # torch.compile makes other programs for tensors that begin elsewhere
        assert p.storage_offset() == 0 and p.is_leaf and not p.data_ptr() % ALIGNMENT, name
    with torch.no_grad():
        flat.flat.fill_(2)
        flat.flat.grad.fill_(3)
    assert all((p == 2).all() and (p.grad == 3).all() for p in parameters.values())


def test_join_undoes_split():
    parameters = list(trained(tiny_model()).values())
    expected = [p.detach().clone() for p in parameters]
    flat = FlatParameters(parameters)
    joined = flat.join(expected)
    assert torch.equal(joined, flat.flat) and not joined.requires_grad
    assert all(torch.equal(part, p) for part, p in zip(flat.split(joined), expected, strict=True))


@pytest.mark.parametrize("make", [flat_adamw, captured_adamw])
def test_steps_equal_those_of_single_parameters(make):
    """The steps have several passes, clipping and weight decay; one has no pictures, and one is skipped."""
    model, single = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    numbers = take_steps(model, make(model), BATCHES, nan_at=2)
    expected = take_steps(single, plain_adamw(single), BATCHES, nan_at=2)
    for step, (row, expected_row) in enumerate(zip(numbers, expected, strict=True)):
        assert row == pytest.approx(expected_row, rel=1e-5, nan_ok=True), step
        assert row[1] == (step != 2)
    assert_equal_models(model, single, 2e-5)
    untrained = tiny_model()
    assert all((p != q).any() for p, q in zip(trained(model).values(), trained(untrained).values(), strict=True))


def test_saved_state_is_that_of_single_parameters():
    model, single = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    optimizer, plain = flat_adamw(model), plain_adamw(single)
    assert optimizer.state_dict() == plain.state_dict()  # which has no moments yet
    take_steps(model, optimizer, BATCHES[:2]), take_steps(single, plain, BATCHES[:2])
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert str(saved["param_groups"]) == str(expected["param_groups"])  # the rates are numbers, no tensors
    assert saved["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert saved["state"][index].keys() == state.keys()
        for name, tensor in state.items():
            found = saved["state"][index][name]
            torch.testing.assert_close(found, tensor, atol=1e-6, rtol=1e-5)
            assert found.stride() == tensor.stride() and found.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("make, make_next", [(plain_adamw, flat_adamw), (flat_adamw, plain_adamw),
                                             (flat_adamw, captured_adamw), (captured_adamw, flat_adamw)])
def test_training_goes_on_from_the_state_of_either_optimizer(make, make_next, steps_before):
    single = tiny_model(dropout_prob=0.0).train()
    plain = plain_adamw(single)
    expected = take_steps(single, plain, BATCHES[:steps_before] + BATCHES[2:4])
    first = tiny_model(dropout_prob=0.0).train()
    optimizer = make(first)
    take_steps(first, optimizer, BATCHES[:steps_before])
    state = copy.deepcopy(optimizer.state_dict())
    model = tiny_model(dropout_prob=0.0).train()
    with torch.no_grad():
        for p, q in zip(trained(model).values(), trained(first).values(), strict=True):
            p.copy_(q)
    optimizer = make_next(model)
    optimizer.load_state_dict(state)
    numbers = take_steps(model, optimizer, BATCHES[2:4])
    for row, expected_row in zip(numbers, expected[steps_before:], strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5)
    assert_equal_models(model, single, 2e-5)


def test_an_optimizer_can_go_back_to_an_earlier_state():
    """Its captured steps do not go on with the state that was replaced."""
    model = tiny_model(dropout_prob=0.0).train()
    optimizer, parameters = captured_adamw(model), trained(model)
    take_steps(model, optimizer, BATCHES[:2])
    state = copy.deepcopy(optimizer.state_dict())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    results = []
    for _ in range(2):
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
        optimizer.load_state_dict(state)
        assert not optimizer.captured_steps
        take_steps(model, optimizer, BATCHES[2:4])
        assert len(optimizer.captured_steps) == 1
        results.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    assert torch.equal(*results)


def test_a_state_of_another_model_is_refused():
    state = flat_adamw(tiny_model()).state_dict()
    state["param_groups"].pop()
    with pytest.raises(ValueError):
        flat_adamw(tiny_model()).load_state_dict(state)
    model = tiny_model().train()
    optimizer = flat_adamw(model)
    take_steps(model, optimizer, BATCHES[:1])
    with pytest.raises((ValueError, RuntimeError)):
        flat_adamw(tiny_model(adapter_type="block")).load_state_dict(optimizer.state_dict())


def test_a_gradient_that_is_no_part_of_the_flat_one_is_noticed():
    """The optimizer would take a step without it otherwise."""
    model = tiny_model().train()
    optimizer = flat_adamw(model)
    take_steps(model, optimizer, BATCHES[:1])
    model.zero_grad()
    with pytest.raises(RuntimeError, match="set to zero in place"):
        take_steps(model, optimizer, BATCHES[:1])


def test_a_pass_that_runs_out_of_memory_leaves_no_gradient(monkeypatch):
    model, expected = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    optimizer = flat_adamw(model)
    pairs, scaler = [(example, 0.5) for example in mixed_examples()], make_scaler(model)
    passes, forward = [], type(model).forward

    def run_out_in_the_second_pass(model, batch):
        passes.append(len(batch.lengths))
        if len(passes) == 2:
            raise torch.OutOfMemoryError("none left")
        return forward(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", run_out_in_the_second_pass)
        accumulate_with_oom_retry(model, pairs, 40, scaler)
    accumulate_gradients(expected, pairs, math.inf, scaler)
    assert len(passes) > 3
    gradients = {id(p): grad for flat in optimizer.flat
                 for p, grad in zip(flat.parameters, flat.split(flat.flat.grad), strict=True)}
    for (name, p), q in zip(trained(model).items(), trained(expected).values(), strict=True):
        torch.testing.assert_close(gradients[id(p)], q.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_routing_is_computed_again_after_a_step():
    model = tiny_model(dropout_prob=0.0).train()
    optimizer = flat_adamw(model)
    before = copy.deepcopy(model.routing_cache.refresh(model))
    take_steps(model, optimizer, BATCHES[:1])
    after = model.routing_cache.refresh(model)
    assert not torch.equal(before[0]["adapter_attn"][1], after[0]["adapter_attn"][1])


def test_passes_captured_before_are_dropped():
    """They read and write the memory that the parameters had."""
    model, eager = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_passes(model)
    for _ in range(3):
        model(pack(mixed_examples())).backward()
    assert model.llama.forward.graphs
    for _ in range(2):
        randomise_adapters(model)
        with torch.no_grad():
            for p, q in zip(trained(model).values(), trained(eager).values(), strict=True):
                q.copy_(p)
        optimizer, plain = flat_adamw(model), plain_adamw(eager)
        assert not model.llama.forward.graphs and not model.vision.forward.graphs
        take_steps(model, optimizer, BATCHES[:1] * 2), take_steps(eager, plain, BATCHES[:1] * 2)
        assert_equal_models(model, eager, 2e-5)
