"""Small weight files in the formats of Meta and Hugging Face."""

import base64
import re
import shutil

import torch

from lavin.tokenizer_formats import byte_characters

LLAMA_3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}
HF_VARIANTS = {"plain": {}, "grouped": {"num_key_value_heads": 2}, "tied": {"tie_word_embeddings": True},
               "wide heads": {"head_dim": 12}, "theta": {"rope_theta": 500.0},
               "llama3": {"rope_scaling": {**LLAMA_3, "rope_theta": 10000.0}, "head_dim": 32,
                          "num_key_value_heads": 1}}


def write_hugging_face(folder, tokenizer_file, seed: int = 0, max_shard_size="1GB", **changes):
    """Save a random LlamaForCausalLM with transformers; returns the model."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    torch.manual_seed(seed)
    model = LlamaForCausalLM(HFConfig(**{
        "vocab_size": 480, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "rms_norm_eps": 1e-5, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, **changes})).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
        elif "q_proj" in name or "k_proj" in name:
            p.data *= 2
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    return model


def write_shards(tensors: dict, folder, count: int, embedding_dim: int) -> None:
    """Split the tensors as Meta's model parallel layers do, one file a shard; norms are replicated."""
    column_parallel = re.compile(r"w[qkv13]\.|output")  # split by output features, dim 0
    row_parallel = re.compile(r"wo\.|w2\.")  # split by input features, dim 1
    for rank in range(count):
        shard = {}
        for name, tensor in tensors.items():
            dim = 0 if column_parallel.search(name) else 1 if row_parallel.search(name) else None
            dim = embedding_dim if "tok_embeddings" in name else dim
            shard[name] = tensor if dim is None else tensor.chunk(count, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.0{rank}.pth")


def write_tiktoken(path, trained, more: tuple[bytes, ...] = ()):
    """The tokens of a byte-level tokenizer, and more, in the format of Llama 3's tokenizer.model; returns the path."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    tokens = [bytes(byte_of[character] for character in trained.id_to_token(i))
              for i in range(trained.get_vocab_size())]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate([*tokens, *more])))
    return path
