"""LLaMA in Hugging Face's format: config.json and safetensors or pytorch_model.bin files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import NotRequired, TypedDict

from lavin.llama import LlamaConfig, RopeScaling
from lavin.runtime.errors import UserError
from lavin.runtime.schema import Positive, Size, declared, read_validated
from lavin.weights.meta import Epsilon, Layers, Width, check_heads
from lavin.weights.tensor_files import COMPUTED_BUFFERS, read_hf_folder

# Hugging Face's part of a parameter's name -> ours, which is Meta's
HF_NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}


@declared
class Rope(TypedDict, total=False):
    rope_type: Literal["default", "llama3"]
    type: Literal["default", "llama3"]  # rope_type's earlier name
    rope_theta: Positive
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size


@declared
class Config(TypedDict):
    """config.json, with the only values of its other features that lavin.llama has."""

    model_type: Literal["llama"]
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    vocab_size: Size
    intermediate_size: Size
    num_key_value_heads: NotRequired[Width | None]
    head_dim: NotRequired[Width | None]
    rms_norm_eps: NotRequired[Epsilon]
    rope_theta: NotRequired[Positive]
    rope_scaling: NotRequired[Rope | None]  # of transformers < 5
    rope_parameters: NotRequired[Rope | None]  # of transformers >= 5
    tie_word_embeddings: NotRequired[bool]
    hidden_act: NotRequired[Literal["silu"]]
    attention_bias: NotRequired[Literal[False, None]]
    mlp_bias: NotRequired[Literal[False, None]]
    quantization_config: NotRequired[None]


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
        return to_interleaved_rope(tensor, heads) if heads and tensor.shape[:1] == (heads * self.head_dim,) else tensor


def read_rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. Raises KeyError where a number of Llama 3's scaling is missing."""
    rope: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return theta, None
    if not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError("low_freq_factor must lie below high_freq_factor")
    return theta, RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                              rope["original_max_position_embeddings"])


def llama_config(config: Config) -> LlamaConfig:
    """Converts config.json. Raises ValueError for sizes that contradict each other, KeyError for missing entries."""
    theta, scaling = read_rope(config)
    converted = LlamaConfig(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
                            config["vocab_size"], config.get("num_key_value_heads"),
                            norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
                            d_head=config.get("head_dim"), d_ff=config["intermediate_size"])
    check_heads(converted)
    return converted


def open_hugging_face(folder: Path) -> tuple[LlamaConfig, HuggingFaceLlama, str]:
    """Returns configuration, tensors, and what error messages call the files. Raises UserError for broken files."""
    path = folder / "config.json"
    content = read_validated(path, Config, fix="name another --llm_model, or fetch it again")
    try:
        config = llama_config(content)
    except KeyError as error:
        raise UserError(f"{path} has no entry {error}: fetch or copy it again") from error
    except ValueError as error:
        raise UserError(f"{path} describes no LLaMA that can be loaded ({error}): name another --llm_model") from error
    tied = content.get("tie_word_embeddings", False)
    return config, HuggingFaceLlama(read_hf_folder(folder), config, tied), str(folder)
