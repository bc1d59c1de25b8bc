"""A LLaMA in a GGUF file: its metadata (gguf/) are read as the entries of a config.json (hugging_face.py).

The folder gguf/ does not import the model: the tokenizer reads GGUF files too, and the model imports the tokenizer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lavin.llama import Llama3Scaling, LlamaConfig
from lavin.weights.gguf.file import open_file
from lavin.weights.gguf.weights import META_ORDER, ROPE_FACTORS, GGUFTensors, dequantize, read_config
from lavin.weights.hugging_face import HuggingFaceLlama, llama_config, no_llama


def open_gguf(path: Path) -> tuple[LlamaConfig, HuggingFaceLlama, str]:
    """Returns configuration, tensors, which are dequantized on access, and what error messages call the file. Raises
    UserError for broken files."""
    file = open_file(path)
    content: Any = read_config(file)
    try:
        config = llama_config(content)
        if ROPE_FACTORS in file.tensors:
            config = replace(config, rope_scaling=llama3_scaling(dequantize(file.tensors[ROPE_FACTORS], path), config))
    except ValueError as error:
        raise no_llama(path, error) from error
    meta_order = content["model_type"] in META_ORDER
    return config, HuggingFaceLlama(GGUFTensors(file), config, content["tie_word_embeddings"], meta_order), str(path)


def llama3_scaling(factors: torch.Tensor, config: LlamaConfig) -> Llama3Scaling:
    """The scaling of Llama 3.1, 3.2 or 3.3 whose frequencies are the unscaled ones divided by factors [head_dim / 2].

    Raises ValueError where it is none of these models'.
    """
    n = config.head_dim // 2
    scaling = Llama3Scaling(round(float(factors.max())))
    frequencies = config.rope_theta ** -(torch.arange(n) / n)
    expected = frequencies / scaling.scale(frequencies, config.rope_theta)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
        raise ValueError(f"its {ROPE_FACTORS} is not Llama 3's, and no other rope scaling is supported")
    return scaling
