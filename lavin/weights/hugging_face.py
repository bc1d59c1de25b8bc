"""LLaMA in Hugging Face's format: config.json and safetensors or pytorch_model.bin files."""

from collections.abc import Mapping
from pathlib import Path

import torch

from lavin.llama import LlamaConfig, RopeScaling
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from lavin.weights.tensor_files import COMPUTED_BUFFERS, read_hf_folder

# Hugging Face's part of a parameter's name -> ours, which is Meta's
HF_NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
# required entries of config.json, in the order of LlamaConfig's first fields; intermediate_size is its d_ff
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


def to_interleaved_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Permutes the rows of a query or key projection [heads * head_dim, D] to Meta's rotary layout.

    Hugging Face rotates dimension i of a head together with i + head_dim / 2; Meta rotates 2i with 2i + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class HuggingFaceLlama(Mapping):
    """Our name -> tensor of a LlamaForCausalLM. tied: the output projection shares the embedding's weights."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: LlamaConfig, tied: bool):
        self.heads = {"wq": config.n_heads, "wk": config.kv_heads}
        self.head_dim = config.head_dim
        self.tensors = {self.from_hf_name(hf_name): tensor for hf_name, tensor in tensors.items()
                        if not hf_name.endswith(COMPUTED_BUFFERS)}
        if tied and "tok_embeddings.weight" in self.tensors:
            # loaded as two frozen parameters, which may be sharded or quantized differently
            self.tensors["output.weight"] = self.tensors["tok_embeddings.weight"]

    @staticmethod
    def from_hf_name(name: str) -> str:
        for hf_part, part in HF_NAMES.items():
            name = name.replace(hf_part, part)
        return name.removeprefix("model.")

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, name):
        tensor, heads = self.tensors[name], self.heads.get(name.split(".")[-2])
        # a tensor with the wrong number of rows is returned unchanged, so that the caller's check_shape reports it
        return to_interleaved_rope(tensor, heads) if heads and len(tensor) == heads * self.head_dim else tensor


def read_rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from config.json of transformers < 5 (rope_theta, rope_scaling) or >= 5 (rope_parameters).

    Raises ValueError for types of scaling other than Llama 3's.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise ValueError(f"rope scaling of type {rope_type!r}; only 'llama3' is supported")
    return theta, RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                              rope["original_max_position_embeddings"])


def llama_config(config: dict) -> LlamaConfig:
    """Converts config.json. Raises ValueError for features that lavin.llama lacks, KeyError for missing entries."""
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type {config.get('model_type')!r}; only 'llama' is supported")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            raise ValueError(f"{name} is set, which is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r}; only 'silu' is supported")
    sizes = [config[name] for name in SIZES]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"{', '.join(SIZES)} must be integers, not {sizes}")
    theta, scaling = read_rope(config)
    dim, n_layers, n_heads, vocab_size, d_ff = sizes
    return LlamaConfig(dim, n_layers, n_heads, vocab_size, config.get("num_key_value_heads"),
                       norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
                       d_head=config.get("head_dim"), d_ff=d_ff)


def open_hugging_face(folder: Path) -> tuple[LlamaConfig, HuggingFaceLlama, str]:
    """Returns configuration, tensors, and what error messages call the files. Raises UserError for broken files."""
    path = folder / "config.json"
    content = read_json(path)
    try:
        config = llama_config(content)
    except KeyError as error:
        raise UserError(f"{path} has no entry {error}: fetch or copy it again") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} describes no LLaMA that can be loaded ({error}): name another --llm_model") from error
    tied = bool(content.get("tie_word_embeddings", False))
    return config, HuggingFaceLlama(read_hf_folder(folder), config, tied), str(folder)
