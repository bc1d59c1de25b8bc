"""Small GGUF files, written by llama.cpp's package from models of transformers as its converter does."""

import gguf
import numpy as np
import sentencepiece
import torch

Q = gguf.GGMLQuantizationType


def write_gguf(path, model, vocabulary: dict, architecture: str = "llama",
               dtype: gguf.GGMLQuantizationType = Q.F32, **changes):
    """Writes a model as a GGUF file, and returns its path. vocabulary: the metadata below `tokenizer.ggml`. dtype: the
    type of matrices. changes: other metadata below the architecture; `tensor_NAME` adds a tensor."""
    config = model.config
    shape = {"block_count": config.num_hidden_layers, "context_length": 128, "embedding_length": config.hidden_size,
             "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
             "attention.head_count_kv": config.num_key_value_heads, "vocab_size": config.vocab_size,
             "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
             "rope.freq_base": config.rope_parameters["rope_theta"], **changes}
    writer = gguf.GGUFWriter(path, architecture)
    add(writer, "general.name", "tiny")
    for prefix, entries in ((architecture, shape), ("tokenizer.ggml", vocabulary)):
        for key, value in entries.items():
            if not key.startswith("tensor_"):
                add(writer, f"{prefix}.{key}", value)
    for name, data in converted_tensors(model, architecture):
        stored = Q.F32 if data.ndim == 1 else dtype
        writer.add_tensor(name, gguf.quants.quantize(data, stored), raw_dtype=stored)
    for key, data in changes.items():
        if key.startswith("tensor_"):
            writer.add_tensor(key.removeprefix("tensor_") + ".weight", np.asarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key: str, value) -> None:
    """Adds an entry of the metadata; None leaves it out."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}
    if value is not None:
        kinds[type(value)](key, value)


def converted_tensors(model, architecture: str):
    """Names by the package's own table; query and key of `llama` in pairs, as Meta's files have them."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            tensor = torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in tensor.chunk(heads[part])])
        if not (part == "lm_head" and config.tie_word_embeddings):
            yield names.get_name(name, (".weight", ".bias")), tensor.float().numpy()


def sentencepiece_vocabulary(path) -> dict:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())
    kinds = [2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i) else 1 for i in ids]
    return {"model": "llama", "pre": "default", "tokens": [model.IdToPiece(i) for i in ids], "token_type": kinds,
            "scores": [model.GetScore(i) for i in ids], "bos_token_id": 1, "eos_token_id": 2}
