"""LLaMA and its relatives in Hugging Face's format: config.json and safetensors or pytorch_model.bin files.

A relative is a few fields of LlamaConfig: Qwen2 has biases of query, key and value, Qwen3 a norm of each query and key
head, SmolLM3 layers without rotary embeddings, and Mistral's first versions a sliding window.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lavin.llama import LinearScaling, Llama3Scaling, LlamaConfig, RopeScaling, YarnScaling
from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.schema import Epsilon, Layers, Positive, Size, Width, declared, read_validated
from lavin.weights.meta import check_heads
from lavin.weights.tensor_files import COMPUTED_BUFFERS, read_hf_folder

# Hugging Face's part of a parameter's name -> ours, which is Meta's
HF_NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
            "self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm",
            "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
# what transformers takes where config.json of a model_type has no such entry
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True,
                             "max_position_embeddings": 131_072},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128, "max_position_embeddings": 32_768},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4,
                "max_position_embeddings": 32_768}}
ROPE_SCALINGS: dict[str, type[RopeScaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
WholeHead = Annotated[float, Field(ge=1, le=1)]


@declared
class Rope(TypedDict, total=False):
    """The entry `rope_scaling` or `rope_parameters` of config.json."""

    rope_type: RopeType
    type: RopeType  # rope_type's earlier name
    rope_theta: Positive
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size
    attention_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    mscale: Annotated[float, Field(ge=0)] | None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None
    truncate: bool
    partial_rotary_factor: WholeHead
    full_attention: None  # transformers nests an entry for each type of layer; only other models have several
    sliding_attention: None


@declared
class Config(TypedDict):
    """The content of config.json. Other features of LLaMA's relatives may only have the value that lavin.llama has."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"]
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
    partial_rotary_factor: NotRequired[WholeHead]
    max_position_embeddings: NotRequired[Size]
    original_max_position_embeddings: NotRequired[Size]
    sliding_window: NotRequired[Size | None]
    use_sliding_window: NotRequired[bool]
    no_rope_layers: NotRequired[list[Literal[0, 1]] | None]  # 0: the layer has no rotary embeddings
    no_rope_layer_interval: NotRequired[Layers]
    tie_word_embeddings: NotRequired[bool]
    hidden_act: NotRequired[Literal["silu"]]
    attention_bias: NotRequired[bool | None]
    mlp_bias: NotRequired[bool | None]
    quantization_config: NotRequired[None]


def to_interleaved_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Permutes the rows of a query or key projection [heads * head_dim, D], or of its bias, to Meta's rotary layout.

    Hugging Face rotates dimension i of a head together with i + head_dim / 2; Meta rotates 2i with 2i + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class HuggingFaceLlama(Mapping):
    """A mapping from our names to the tensors of a LlamaForCausalLM, which are read on access.

    `tied` says that the output projection shares the embedding's weights, and `meta_order` that query and key are
    already in Meta's rotary layout.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: LlamaConfig, tied: bool, meta_order: bool = False):
        self.heads = {} if meta_order else {"wq": config.n_heads, "wk": config.kv_heads, "q_norm": 1, "k_norm": 1}
        self.head_dim, self.tensors = config.head_dim, tensors
        self.names = {self.from_hf_name(name): name for name in tensors if not name.endswith(COMPUTED_BUFFERS)}
        if tied and "tok_embeddings.weight" in self.names:
            # loaded as two frozen parameters, which may be sharded or quantized differently
            self.names["output.weight"] = self.names["tok_embeddings.weight"]

    @staticmethod
    def from_hf_name(name: str) -> str:
        for hf_part, part in HF_NAMES.items():
            name = name.replace(hf_part, part)
        return name.removeprefix("model.")

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, name):
        tensor, heads = self.tensors[self.names[name]], self.heads.get(name.split(".")[-2])
        # a tensor with the wrong number of rows is returned unchanged, so that the caller's check_shape reports it
        return to_interleaved_rope(tensor, heads) if heads and tensor.shape[:1] == (heads * self.head_dim,) else tensor


def read_rope(config: dict[str, Any]) -> tuple[float, str, RopeScaling | None]:
    """Returns theta, type and scaling of the rotary embeddings. Raises KeyError where a number of the scaling is
    missing.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_SCALINGS:
        return theta, rope_type, None
    # transformers takes the entry of config.json itself first, and the model's context last
    context = (config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
               or config.get("max_position_embeddings"))
    rope = {name: value for name, value in {**rope, "original_max_position_embeddings": context}.items()
            if value is not None}
    if rope_type == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError("low_freq_factor must lie below high_freq_factor")
    if rope_type == "yarn":
        if theta <= 1:
            raise ValueError(f"YaRN needs a rope_theta above 1, not {theta}")
        rope = {"attention_factor": yarn_attention_factor(rope), **rope}
    return theta, rope_type, make_scaling(ROPE_SCALINGS[rope_type], rope)


def make_scaling(cls: Any, rope: dict[str, Any]) -> RopeScaling:
    """Makes a rope scaling from its entries. Raises KeyError where one without a default is missing."""
    values = {field.name: rope[field.name] for field in fields(cls) if field.name in rope}
    missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
    if missing:
        raise KeyError(missing[0])
    return cls(**values)


def yarn_attention_factor(rope: dict[str, Any]) -> float:
    """Returns the attention factor of a YaRN scaling that gives none: the paper's, or DeepSeek's ratio."""
    def of(scale: float) -> float:
        return 0.1 * scale * math.log(max(rope["factor"], 1)) + 1
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1)


def rope_entry(scaling: Any) -> dict[str, Any]:
    """Returns the entry of config.json for one of ROPE_SCALINGS: the inverse of `read_rope`."""
    rope_type = next(name for name, cls in ROPE_SCALINGS.items() if type(scaling) is cls)
    return {"rope_type": rope_type, **asdict(scaling)}


def read_biases(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the linear layers of a block that have a bias."""
    if config["model_type"] == "qwen2":
        return "wq", "wk", "wv"
    return (*(("wq", "wk", "wv", "wo") if config.get("attention_bias") else ()),
            *(("w1", "w2", "w3") if config.get("mlp_bias") else ()))


def read_nope_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Returns the layers without rotary embeddings. Raises ValueError where the list is too short."""
    if config["model_type"] != "smollm3":
        return ()
    n, has_rope = config["num_hidden_layers"], config.get("no_rope_layers")
    if has_rope is None:
        has_rope = [(layer + 1) % config["no_rope_layer_interval"] for layer in range(n)]
    if len(has_rope) < n:
        raise ValueError(f"no_rope_layers lists {len(has_rope)} of its {counted(n, 'layer')}")
    return tuple(layer for layer in range(n) if not has_rope[layer])


def llama_config(content: Config) -> LlamaConfig:
    """Converts config.json. Raises ValueError for sizes that contradict each other, and KeyError for missing entries.
    """
    config: dict[str, Any] = {**DEFAULTS[content["model_type"]], **content}
    theta, rope_type, scaling = read_rope(config)
    # within the window, or the context of "dynamic", the decoder does the same without these two
    limits = [config["max_position_embeddings"]] if rope_type == "dynamic" else []
    limits += [config["sliding_window"]] if config.get("use_sliding_window") and config.get("sliding_window") else []
    converted = LlamaConfig(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
                            config["vocab_size"], config.get("num_key_value_heads"),
                            norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling,
                            d_head=config.get("head_dim"), d_ff=config["intermediate_size"],
                            biases=read_biases(config), qk_norm=config["model_type"] == "qwen3",
                            nope_layers=read_nope_layers(config), max_context=min(limits, default=None),
                            max_position_embeddings=config.get("max_position_embeddings", 2048))
    check_heads(converted)
    return converted


def no_llama(path: Path, error: ValueError) -> UserError:
    """Returns the error of a file from which `llama_config` makes no configuration."""
    return UserError(f"{path} describes no LLaMA that can be loaded ({error}): name another --llm_model")


def open_hugging_face(folder: Path) -> tuple[LlamaConfig, HuggingFaceLlama, str]:
    """Returns the configuration, the tensors, and what error messages call the files. Raises UserError for broken
    files.
    """
    path = folder / "config.json"
    content = read_validated(path, Config, fix="name another --llm_model, or fetch it again")
    try:
        config = llama_config(content)
    except KeyError as error:
        raise UserError(f"{path} has no entry {error}: fetch or copy it again") from error
    except ValueError as error:
        raise no_llama(path, error) from error
    tied = {**DEFAULTS[content["model_type"]], **content}.get("tie_word_embeddings", False)
    tensors = read_hf_folder(folder)
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if tied and head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"{path} says tie_word_embeddings, and lm_head.weight is not model.embed_tokens.weight: fetch "
                        "both again, or set it to false where the model was trained so")
    return config, HuggingFaceLlama(tensors, config, tied), str(folder)
