"""The adapters' equations, their initialization, and the dropout schedule."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavin.attention import VarlenMetadata
from lavin.llama import Llama
from lavin.mm_adapter import AdapterConfig, RepAdapter, RepAdapterRouter, Routing, dropout_schedule
from lavin.model import pack
from reference import adapter, router
from tiny import VARIANTS, mixed_examples, tiny_config, tiny_model, tiny_vit

CONFIG = AdapterConfig(adapter_dim=6, adapter_scale=0.6, temperature=3.0)


def random_adapter(adapter_class, dropout=0.0):
    """An adapter of width 10 with random parameters, its named parameters, and an input [7, 10]."""
    torch.manual_seed(0)
    module = adapter_class(10, CONFIG, dropout).eval()
    for parameter in module.parameters():
        parameter.data.normal_()
    return module, {f"a.{name}": p for name, p in module.named_parameters()}, torch.randn(7, 10)


def test_adapter_equation():
    module, p, x = random_adapter(RepAdapter)
    torch.testing.assert_close(module(x), adapter(p, "a", x, CONFIG))


def test_router_equations():
    module, p, x = random_adapter(RepAdapterRouter)
    h = torch.randn(7, 10)
    mixture = router(p, "a", h, CONFIG)
    torch.testing.assert_close(module.mixture(h), mixture)
    torch.testing.assert_close(module(x, mixture), adapter(p, "a", x, CONFIG, mixture))


def test_parameters_equal_the_published_convolutions():
    """F.conv1d is the oracle: conv_A, conv_B and conv_D are 1x1 convolutions, the latter two in two groups."""
    module, _, x = random_adapter(RepAdapterRouter)
    channels_first = x.t()[None]  # [1, D, N]
    z = F.conv1d(channels_first, module.conv_A.weight, module.conv_A.bias)
    b, e = (F.conv1d(z, conv.weight, conv.bias, groups=2)[0].t() for conv in (module.conv_B, module.conv_D))
    mixture = torch.tensor([[0.3, 0.7]]).expand(7, 2)
    torch.testing.assert_close(module(x, mixture), x + 0.6 * (0.3 * b + 0.7 * e))
    assert module.conv_B.weight.shape == module.conv_D.weight.shape == (10, 3, 1)
    assert module.conv_A.weight.shape == (6, 10, 1)


def test_dropout_applies_to_z_in_training_only():
    """The branch outputs z where B is the identity for each group: 0 where dropped, else scaled by 1 / (1 - p)."""
    module, p, _ = random_adapter(RepAdapter, dropout=0.25)
    x = torch.randn(4000, 10)
    module.conv_B.weight.data.zero_()
    module.conv_B.bias.data.zero_()
    for i in range(6):
        module.conv_B.weight.data[i if i < 3 else i + 2, i % 3] = 1
    z = F.linear(x, p["a.conv_A.weight"][..., 0], p["a.conv_A.bias"])
    columns = [0, 1, 2, 5, 6, 7]  # where B puts the 6 entries of z
    torch.testing.assert_close(((module(x) - x) / 0.6)[:, columns], z, atol=1e-4, rtol=1e-4)
    ratio = ((module.train()(x) - x) / 0.6)[:, columns] / z
    kept = ratio > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75), atol=1e-2, rtol=0)
    assert ratio[~kept].abs().max() < 1e-2
    assert abs(kept.float().mean() - 0.75) < 0.01


def test_rank_must_be_divisible_by_two_groups():
    with pytest.raises(ValueError, match="--adapter_dim 5"):
        RepAdapter(10, AdapterConfig(adapter_dim=5), 0.0)


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_initialization_is_as_published(adapter_type, visual_type):
    model = tiny_model(trained=False, adapter_type=adapter_type, visual_adapter_type=visual_type)
    num_zero = num_random = 0
    for name, p in model.named_parameters():
        if "adapter" not in name or "expert_weights" in name or "embedding" in name:
            continue
        if "adapter_proj" not in name and (".conv_B" in name or ".conv_D" in name) or name.endswith("bias"):
            assert not p.any(), name
            num_zero += 1
        else:
            bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))  # Xavier uniform
            assert 0.6 * bound < p.abs().max() <= bound, name
            num_random += 1
    per_layer = {"attn": 1, "block": 2}[adapter_type]
    per_block = 2 if visual_type == "router_block" else 1
    assert num_random == 3 * per_layer + 6 * per_block + 2
    assert num_zero == 3 * per_layer * 5 + 6 * per_block * (3 if visual_type == "normal" else 5) + 2


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_fresh_adapters_are_the_identity(adapter_type, visual_type):
    """The model equals LLaMA without adapters on embeddings of images from the ViT without adapters."""
    model = tiny_model(trained=False, adapter_type=adapter_type, visual_adapter_type=visual_type)
    plain = Llama(tiny_config()).eval()
    plain.load_state_dict({name: w for name, w in model.llama.state_dict().items() if "adapter" not in name})
    vit = tiny_vit()
    vit.load_state_dict({name.replace("norm1.norm", "norm1").replace("norm2.norm", "norm2"): w
                         for name, w in model.vision.vit.state_dict().items() if "adapter" not in name})
    batch = pack(mixed_examples())
    with torch.no_grad():
        logits = model.llama.output(model.hidden_states(batch))
        x = plain.tok_embeddings(batch.ids)
        images = (batch.images / 255 - model.vision.pixel_mean) / model.vision.pixel_std
        layers = vit.eval().forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
        x[batch.image_slots] = model.adapter_proj(torch.stack([cls[:, 0] for _, cls in layers], 1)).flatten(0, 1)
        expected = plain.output(plain(x, VarlenMetadata(batch.lengths, "cpu")))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_routing_reads_the_modality_tokens_or_a_cache():
    module, p, x = random_adapter(RepAdapterRouter)
    modality = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    expected = router(p, "a", x[:2], CONFIG)[modality]
    cache = [{}, {"a": module.routed(x[:2])}]  # of two layers
    for layer_caches in (None, cache):
        mixture, projections = Routing.from_modality(modality, layer_caches).for_layer(1).adapter_inputs("a", module, x)
        torch.testing.assert_close(mixture, expected)
        torch.testing.assert_close(module(x, mixture, projections), adapter(p, "a", x, CONFIG, expected))
    torch.testing.assert_close(cache[1]["a"][0], router(p, "a", x[:2], CONFIG))
    module.expert_weights.weight.data.zero_()  # cached mixtures depend on neither parameters nor hidden states
    cached, _ = Routing.from_modality(modality, cache).for_layer(1).adapter_inputs("a", module, torch.randn(7, 10))
    torch.testing.assert_close(cached, expected)
    with pytest.raises(KeyError):  # a pass never fills a cache
        Routing.from_modality(modality, cache).for_layer(0).adapter_inputs("a", module, x)


@pytest.mark.parametrize("n, prob, var, lim, expected", [
    (4, 0.1, 1.0, 0.2, [0.1] * 4),
    (3, 0.3, 1.0, 0.2, [0.3] * 3),  # var 1 is constant and ignores the limit
    (4, 0.1, 2.0, 0.4, [0.1, 0.2, 0.4, 0.4]),  # reaches the limit exactly
    (4, 0.1, 2.0, 0.3, [0.1, 0.2, 0.3, 0.3]),
    (4, 0.4, 0.5, 0.1, [0.4, 0.2, 0.1, 0.1]),
    (4, 0.4, 0.5, 0.15, [0.4, 0.2, 0.15, 0.15]),
    (3, 0.2, 1.5, 0.2, [0.2] * 3),
    (3, 0.0, 2.0, 0.5, [0.0] * 3),
    (1, 0.1, 2.0, 0.9, [0.1]),
])
def test_dropout_schedule(n, prob, var, lim, expected):
    assert dropout_schedule(n, prob, var, lim) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("values", [
    (0, 0.1, 1.0, 0.2), (3, -0.1, 1.0, 0.2), (3, 1.0, 1.0, 0.2), (3, 0.1, 1.0, 1.0), (3, 0.1, 0.0, 0.05),
    (3, 0.1, -1.0, 0.2), (3, 0.1, math.inf, 0.2), (3, math.nan, 1.0, 0.2), (3, 0.1, math.nan, 0.2),
    (3, 0.1, 1.0, math.nan), (3, 0.3, 2.0, 0.2), (3, 0.1, 0.5, 0.2)])
def test_invalid_dropout_schedules(values):
    with pytest.raises(ValueError):
        dropout_schedule(*values)


@given(n=st.integers(1, 50), prob=st.floats(0, 0.99), var=st.floats(0.5, 2), lim=st.floats(0, 0.99))
def test_dropout_schedule_never_exceeds_its_limit(n, prob, var, lim):
    if var != 1 and (lim < prob if var > 1 else lim > prob):
        return
    schedule = dropout_schedule(n, prob, var, lim)
    assert schedule[0] == prob and len(schedule) == n
    for p, p_next in itertools.pairwise(schedule):
        assert p_next == (p if var == 1 else min(p * var, lim) if var > 1 else max(p * var, lim))


def test_dropout_schedules_of_llama_and_vit():
    """LLaMA's 3 layers and the ViT's 6 blocks each follow the schedule from its start."""
    model = tiny_model(adapter_type="block", visual_adapter_type="router_block", dropout_prob=0.1, dropout_var=1.5,
                       dropout_lim=0.3)
    schedule = [0.1, 0.15, 0.225, 0.3, 0.3, 0.3]
    for layer, p in zip(model.llama.layers, schedule[:3], strict=True):
        assert layer.adapter_attn.dropout.item() == layer.adapter_mlp.dropout.item() == pytest.approx(p)
    for block, p in zip(model.vision.vit.blocks, schedule, strict=True):
        assert block.norm1.adapter.dropout.item() == block.norm2.adapter.dropout.item() == pytest.approx(p)
