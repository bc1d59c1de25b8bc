"""The adapters' equations, what they hold at the start, and the dropout schedule."""

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


def random_adapter(kind, dropout=0.0):
    torch.manual_seed(0)
    module = kind(10, CONFIG, dropout).eval()
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


def test_stored_parameters_are_the_published_convolutions():
    """conv_A, conv_B, conv_D as 1x1 convolutions, B and E in two groups: PyTorch's own convolution is the oracle."""
    module, _, x = random_adapter(RepAdapterRouter)
    columns = x.t()[None]  # [1, D, N]
    z = F.conv1d(columns, module.conv_A.weight, module.conv_A.bias)
    b, e = (F.conv1d(z, conv.weight, conv.bias, groups=2)[0].t() for conv in (module.conv_B, module.conv_D))
    mixture = torch.tensor([[0.3, 0.7]]).expand(7, 2)
    torch.testing.assert_close(module(x, mixture), x + 0.6 * (0.3 * b + 0.7 * e))
    assert module.conv_B.weight.shape == module.conv_D.weight.shape == (10, 3, 1)
    assert module.conv_A.weight.shape == (6, 10, 1)


def test_dropout_acts_on_z_in_training_only():
    """With B the identity of each half, the branch shows z itself: dropped to 0, or raised by 1 / (1 - p)."""
    module, p, _ = random_adapter(RepAdapter, dropout=0.25)
    x = torch.randn(4000, 10)
    module.conv_B.weight.data.zero_()
    module.conv_B.bias.data.zero_()
    for i in range(6):
        module.conv_B.weight.data[i if i < 3 else i + 2, i % 3] = 1
    z = F.linear(x, p["a.conv_A.weight"][..., 0], p["a.conv_A.bias"])
    shown = [0, 1, 2, 5, 6, 7]
    torch.testing.assert_close(((module(x) - x) / 0.6)[:, shown], z, atol=1e-4, rtol=1e-4)
    ratio = ((module.train()(x) - x) / 0.6)[:, shown] / z
    kept = ratio > 0.5
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75), atol=1e-2, rtol=0)
    assert ratio[~kept].abs().max() < 1e-2
    assert abs(kept.float().mean() - 0.75) < 0.01


def test_rank_and_width_must_split_into_two_groups():
    with pytest.raises(ValueError, match="--adapter_dim 5"):
        RepAdapter(10, AdapterConfig(adapter_dim=5), 0.0)


@pytest.mark.parametrize("kind, visual", VARIANTS)
def test_fresh_adapters_start_as_published(kind, visual):
    model = tiny_model(trained=False, adapter_type=kind, visual_adapter_type=visual)
    zero = random_ = 0
    for name, p in model.named_parameters():
        if "adapter" not in name or "expert_weights" in name or "embedding" in name:
            continue
        if "adapter_proj" not in name and (".conv_B" in name or ".conv_D" in name) or name.endswith("bias"):
            assert not p.any(), name
            zero += 1
        else:
            bound = math.sqrt(6 / (p.shape[0] + p.shape[1]))  # Xavier uniform
            assert 0.6 * bound < p.abs().max() <= bound, name
            random_ += 1
    per_layer = {"attn": 1, "block": 2}[kind]
    per_block = 2 if visual == "router_block" else 1
    assert random_ == 3 * per_layer + 6 * per_block + 2
    assert zero == 3 * per_layer * 5 + 6 * per_block * (3 if visual == "normal" else 5) + 2


@pytest.mark.parametrize("kind, visual", VARIANTS)
def test_fresh_adapters_change_nothing(kind, visual):
    """The whole model equals the plain LLaMA on embeddings whose pictures went through the plain ViT."""
    model = tiny_model(trained=False, adapter_type=kind, visual_adapter_type=visual)
    plain = Llama(tiny_config()).eval()
    plain.load_state_dict({name: w for name, w in model.llama.state_dict().items() if "adapter" not in name})
    vit = tiny_vit()
    vit.load_state_dict({name.replace("norm1.norm", "norm1").replace("norm2.norm", "norm2"): w
                         for name, w in model.vision.vit.state_dict().items() if "adapter" not in name})
    batch = pack(mixed_examples())
    with torch.no_grad():
        ours = model.llama.output(model.hidden_states(batch))
        x = plain.tok_embeddings(batch.ids)
        pictures = (batch.images / 255 - model.vision.mean) / model.vision.std
        layers = vit.eval().forward_intermediates(pictures, return_prefix_tokens=True, intermediates_only=True)
        x[batch.image_slots] = model.adapter_proj(torch.stack([cls[:, 0] for _, cls in layers], 1)).flatten(0, 1)
        theirs = plain.output(plain(x, VarlenMetadata(batch.lengths, "cpu")))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_routing_reads_the_modality_rows_and_keeps_their_mixtures():
    module, p, x = random_adapter(RepAdapterRouter)
    modality, table = torch.tensor([0, 1, 1, 0, 1, 0, 0]), [{}, {}]
    expected = router(p, "a", x[:2], CONFIG)[modality]
    for kept in (None, table):
        mixture, matrices = Routing.from_modality(modality, kept).for_layer(1).adapter_inputs("a", module, x)
        torch.testing.assert_close(mixture, expected)
        torch.testing.assert_close(module(x, mixture, matrices), adapter(p, "a", x, CONFIG, expected))
    torch.testing.assert_close(table[1]["a"][0], router(p, "a", x[:2], CONFIG))
    assert not table[0]
    module.expert_weights.weight.data.zero_()  # what is known is not asked again, neither parameters nor states
    later, _ = Routing.from_modality(modality, table).for_layer(1).adapter_inputs("a", module, torch.randn(7, 10))
    torch.testing.assert_close(later, expected)


@pytest.mark.parametrize("n, prob, var, lim, expected", [
    (4, 0.1, 1.0, 0.2, [0.1] * 4),
    (3, 0.3, 1.0, 0.2, [0.3] * 3),  # var 1 is constant, whatever the limit
    (4, 0.1, 2.0, 0.4, [0.1, 0.2, 0.4, 0.4]),  # the limit met exactly
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
def test_values_that_make_no_dropout_schedule(values):
    with pytest.raises(ValueError):
        dropout_schedule(*values)


@given(n=st.integers(1, 50), prob=st.floats(0, 0.99), var=st.floats(0.5, 2), lim=st.floats(0, 0.99))
def test_dropout_schedule_never_passes_its_limit(n, prob, var, lim):
    if var != 1 and (lim < prob if var > 1 else lim > prob):
        return
    schedule = dropout_schedule(n, prob, var, lim)
    assert schedule[0] == prob and len(schedule) == n
    for a, b in zip(schedule, schedule[1:]):
        assert b == (a if var == 1 else min(a * var, lim) if var > 1 else max(a * var, lim))


def test_depth_decides_the_dropout_of_both_stacks():
    """LLaMA's 3 layers and the ViT's 6 blocks run the schedule each on their own."""
    model = tiny_model(adapter_type="block", visual_adapter_type="router_block", dropout_prob=0.1, dropout_var=1.5,
                       dropout_lim=0.3)
    schedule = [0.1, 0.15, 0.225, 0.3, 0.3, 0.3]
    for layer, p in zip(model.llama.layers, schedule):
        assert layer.adapter_attn.dropout.item() == layer.adapter_mlp.dropout.item() == pytest.approx(p)
    for block, p in zip(model.vision.vit.blocks, schedule):
        assert block.norm1.adapter.dropout.item() == block.norm2.adapter.dropout.item() == pytest.approx(p)
