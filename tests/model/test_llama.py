"""The decoder without adapters against Hugging Face's LLaMA, and the configuration read from params.json."""

import pytest
import torch

from lavin.attention import VarlenMetadata, efficient_varlen_attention, padded_attention, reference_attention
from lavin.llama import Block, Llama, LlamaConfig, rotary_frequencies
from tiny import VOCAB_SIZE, perturb_weights, tiny_config


def to_half_split_rope(weight, heads):
    """Permute the rows of wq or wk from Meta's adjacent rotary pairs to Hugging Face's half-split layout."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_hugging_face(ours: Llama):
    """The same weights in transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    c = ours.config
    theirs = LlamaForCausalLM(HFConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=False, attn_implementation="eager")).eval()
    names = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
             "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
             "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "tok_embeddings": "model.embed_tokens", "output": "lm_head"}
    weights = {}
    for name, weight in ours.state_dict().items():
        if "wq" in name or "wk" in name:
            weight = to_half_split_rope(weight, c.n_heads if "wq" in name else c.kv_heads)
        for meta_name, hf_name in names.items():
            name = name.replace(meta_name, hf_name)
        weights["model." + name if name.startswith(("layers", "norm")) else name] = weight
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.parametrize("attention", [reference_attention, padded_attention])
@pytest.mark.parametrize("changes", [{"n_kv_heads": None}, {"n_kv_heads": 2}, {"n_kv_heads": 1, "rope_theta": 500.0},
                                     {"norm_eps": 0.5, "ffn_dim_multiplier": 1.3}])
def test_logits_equal_hugging_face(changes, attention, monkeypatch):
    monkeypatch.setattr("lavin.attention.select_attention", lambda *_: attention)
    torch.manual_seed(0)
    ours = Llama(tiny_config(**changes))
    perturb_weights(ours)
    theirs = to_hugging_face(ours)
    lengths = [7, 1, 12, 4]
    ids = torch.randint(VOCAB_SIZE, (sum(lengths),))
    with torch.no_grad():
        packed = ours.output(ours(ours.tok_embeddings(ids), VarlenMetadata(lengths, "cpu")))
        expected = torch.cat([theirs(document[None]).logits[0] for document in ids.split(lengths)])
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)


def test_memory_efficient_attention_has_an_operator_with_gradients():
    """PyTorch checks the operator's arguments and infers shapes even without a GPU, of grouped heads too."""
    attn_metadata = VarlenMetadata([4, 9, 6], "cpu")
    attn_metadata.cu_seqlens = attn_metadata.cu_seqlens.to("meta")
    inputs = [torch.empty(19, heads, 16, device="meta", dtype=torch.float16, requires_grad=True) for heads in (4, 2, 2)]
    out = efficient_varlen_attention(*inputs, attn_metadata)
    assert out.shape == (19, 4, 16)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_gradient_checkpointing_keeps_gradients():
    torch.manual_seed(0)
    llama = Llama(tiny_config()).train()
    x = torch.randn(9, 32)
    gradients = []
    for llama.gradient_checkpointing in (False, True):
        llama.zero_grad()
        llama(x, VarlenMetadata([4, 5], "cpu")).square().sum().backward()
        gradients.append([p.grad.clone() for p in llama.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_drops_whole_documents():
    torch.manual_seed(0)
    block = Block(tiny_config(), drop_path=0.5).train()
    attn_metadata = VarlenMetadata([3] * 400, "cpu")
    out = block.residual(torch.zeros(1200, 32), torch.ones(1200, 32), attn_metadata).view(400, 96)
    assert set(out.unique().tolist()) == {0.0, 2.0}  # dropped, or scaled by 1 / (1 - p) to keep the mean
    assert (out == out[:, :1]).all()
    assert 0.8 < out.mean() < 1.2
    assert (block.eval().residual(torch.zeros(1200, 32), torch.ones(1200, 32), attn_metadata) == 1).all()


@pytest.mark.parametrize("dim, multiple_of, multiplier, hidden", [
    (4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672)])  # 7B, 13B, LLaMA 2 70B
def test_feed_forward_hidden_dim(dim, multiple_of, multiplier, hidden):
    config = LlamaConfig(dim, 1, 1, 1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    assert config.hidden_dim == hidden


@pytest.mark.parametrize("params, context", [
    ({}, 2048), ({"rope_theta": 5e5}, 8192), ({"rope_theta": 500000, "use_scaled_rope": False}, 8192),
    ({"rope_theta": 5e5, "use_scaled_rope": True}, 131_072), ({"rope_theta": 1e6}, 16_384)])
def test_contexts_of_metas_models(params, context):
    """LLaMA, Llama 3 and 3.1, and Code Llama, as published; their params.json does not say it."""
    config = LlamaConfig.from_params({"dim": 4096, "n_layers": 32, "n_heads": 32, **params}, 321)
    assert config.max_position_embeddings == context


def test_config_from_params_json():
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-6, "vocab_size": -1}
    config = LlamaConfig.from_params(params, 321)
    assert (config.vocab_size, config.norm_eps, config.rope_theta, config.kv_heads) == (321, 1e-6, 10000.0, 4)
    config = LlamaConfig.from_params({**params, "vocab_size": 99, "rope_theta": 5e5, "n_kv_heads": 2}, 321)
    assert (config.vocab_size, config.rope_theta, config.kv_heads) == (99, 5e5, 2)
    with pytest.raises(ValueError, match="vision_chunk_size"):
        LlamaConfig.from_params({**params, "vision_chunk_size": 448}, 321)


@pytest.mark.parametrize("dim, entries, factor", [(4096, {}, 8), (2048, {}, 32),
                                                  (2048, {"rope_scaling_factor": 16}, 16)])
def test_use_scaled_rope_of_meta_params_json(dim, entries, factor):
    """Llama 3.1 8B and 3.2 1B: same frequencies as transformers computes from the published Hugging Face configs."""
    from transformers import LlamaConfig as HFConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = {"rope_type": "llama3", "factor": float(factor), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](HFConfig(hidden_size=dim, num_attention_heads=32, rope_parameters=rope),
                                                "cpu")
    params = {"dim": dim, "n_layers": 1, "n_heads": 32, "rope_theta": 5e5, "use_scaled_rope": True, **entries}
    config = LlamaConfig.from_params(params, 321)
    torch.testing.assert_close(rotary_frequencies(config), expected, rtol=1e-5, atol=0)
    assert rotary_frequencies(LlamaConfig.from_params({**params, "use_scaled_rope": False}, 321))[-1] > 2 * expected[-1]
