"""LLaMA of transformers with random weights: its `generate` answers prompts beside ours, on text only.

A static cache makes `generate` compile and capture the decoding step on a GPU; the prefill runs uncompiled.
"""

import time

import torch

from benchmarks.random_lavin import SIZES
from lavin.tokenizer import IMAGE_SLOT, Example


def transformers_llama(size: str, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"):
    """Returns a LlamaForCausalLM of the given size. attention: a name of transformers' attention functions."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config, _ = SIZES[size]
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, max_position_embeddings=2048, attn_implementation=attention))
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None  # random weights may write it, and would end an answer
    return model.requires_grad_(False)


class TokenTimes:
    """A streamer of `generate`. times: when the prompt, and then each new token, has reached the host, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        """Notes the time. `generate` has copied the ids to the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """`generate` calls this after the last token, when nothing is left to do."""


def generate(model, examples: list[Example], n_tokens: int, streamer: TokenTimes | None = None) -> torch.Tensor:
    """Returns the greedy answers [B, n_tokens] to prompts, which are padded on the left. Image tokens become text."""
    longest = max(len(example.ids) for example in examples)
    padded = [[0] * (longest - len(example.ids)) + [0 if i == IMAGE_SLOT else i for i in example.ids]
              for example in examples]
    ids = torch.tensor(padded, device=model.device)
    mask = torch.tensor([[0] * (longest - len(example.ids)) + [1] * len(example.ids) for example in examples],
                        device=model.device)
    answers = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False,
                             pad_token_id=0, cache_implementation="static", streamer=streamer)
    return answers[:, longest:]
