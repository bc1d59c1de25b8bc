"""Shape and tensors of a GGUF file: its metadata as the entries of a config.json, its tensors under Meta's names.

llama.cpp stores query and key of the architecture `llama` (LLaMA, Mistral, SmolLM2, ...) in Meta's rotary order, those
of qwen2 and qwen3 in Hugging Face's. `output.weight` is missing where it is tied to the embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.schema import Epsilon, Layers, Positive, Size, declared, validate
from lavin.weights.gguf.file import GGUFFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")
META_ORDER = ("llama",)  # architectures with Meta's rotary order
# llama.cpp's part of a tensor's name -> ours, which is Meta's
NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "blk": "layers", "attn_norm": "attention_norm",
         "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
         "attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm", "ffn_gate": "feed_forward.w1",
         "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, as the numbers that divide the frequencies

One = Annotated[float, Field(ge=1, le=1)]
# metadata `ARCHITECTURE.key`, with the only values of its other features that lavin.llama has
Shape = TypedDict("Shape", {
    "embedding_length": Size, "block_count": Layers, "feed_forward_length": Size,
    "attention.head_count": Size, "attention.head_count_kv": NotRequired[Size],
    "attention.key_length": NotRequired[Size], "attention.value_length": NotRequired[Size],
    "attention.layer_norm_rms_epsilon": Epsilon,
    "attention.sliding_window": NotRequired[Size], "context_length": Size,
    "expert_count": NotRequired[Literal[0]],
    "rope.dimension_count": NotRequired[Size], "rope.freq_base": NotRequired[Positive],
    "rope.scale_linear": NotRequired[One], "rope.scaling.type": NotRequired[Literal["none", "linear"]],
    "rope.scaling.factor": NotRequired[Positive]})
declared(Shape)


def read_architecture(file: GGUFFile) -> str:
    architecture = file.entries("general.").get("architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(f"{file.path} is of the architecture {architecture}, and LaVIN reads GGUF files of "
                        f"{', '.join(ARCHITECTURES)}: name another --llm_model")
    return architecture


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The entries of Hugging Face's config.json. Raises UserError for metadata that are missing or not supported."""
    architecture = read_architecture(file)
    shape: Any = validate(file.entries(f"{architecture}."), Shape, f"{file.path}: {architecture}",
                          "name another --llm_model, or fetch it again")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks token_embd.weight: fetch it again")
    heads, window = shape["attention.head_count"], shape.get("attention.sliding_window")
    head_dim = shape.get("attention.key_length", shape["embedding_length"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if shape.get(key, head_dim) != head_dim:
            raise UserError(f"{file.path}: {architecture}.{key} is {shape[key]} where its heads are {head_dim} wide, "
                            "which is not supported: name another --llm_model")
    return {
        "model_type": architecture, "hidden_size": shape["embedding_length"], "num_hidden_layers": shape["block_count"],
        "num_attention_heads": heads, "num_key_value_heads": shape.get("attention.head_count_kv", heads),
        "head_dim": head_dim, "intermediate_size": shape["feed_forward_length"],
        "vocab_size": int(file.tensors["token_embd.weight"].shape[-1]),  # llama.cpp names the width of rows first
        "rms_norm_eps": shape["attention.layer_norm_rms_epsilon"], "rope_theta": shape.get("rope.freq_base", 10000.0),
        "rope_scaling": read_linear_scaling(shape), "max_position_embeddings": shape["context_length"],
        "sliding_window": window, "use_sliding_window": bool(window),
        "attention_bias": any(f"blk.0.attn_{part}.bias" in file.tensors for part in ("q", "output")),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors, "tie_word_embeddings": "output.weight" not in file.tensors}


def read_linear_scaling(shape: dict[str, Any]) -> dict[str, Any] | None:
    linear = shape.get("rope.scaling.type") == "linear"
    return {"rope_type": "linear", "factor": shape.get("rope.scaling.factor", 1.0)} if linear else None


class GGUFTensors(Mapping):
    """Our name -> tensor in float32, dequantized on access."""

    def __init__(self, file: GGUFFile):
        self.path = file.path
        self.tensors = {".".join(NAMES.get(part, part) for part in name.split(".")): tensor
                        for name, tensor in file.tensors.items() if name != ROPE_FACTORS}

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, name):
        return dequantize(self.tensors[name], self.path)


def dequantize(tensor: Any, path: Path) -> torch.Tensor:
    from gguf.quants import dequantize
    try:
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise UserError(f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the package gguf cannot "
                        "dequantize: take a file with another quantization") from error
