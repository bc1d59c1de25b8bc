"""Random weights, and random samples of real lengths, for the benchmarks."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.timm_compat import timm
from lavin.tokenizer import IMAGE_SLOT, Example
from lavin.weights.load import frozen_parameters, load_frozen_tensor, quantize_model

SIZES: dict[str, tuple[LlamaConfig, dict[str, Any]]] = {  # LLaMA, arguments of timm.create_model
    "7B": (LlamaConfig(4096, 32, 32, 32000, norm_eps=1e-6), {"model_name": "vit_large_patch14_clip_quickgelu_224"}),
    "13B": (LlamaConfig(5120, 40, 40, 32000, norm_eps=1e-6), {"model_name": "vit_large_patch14_clip_quickgelu_224"}),
    "SmolLM2": (LlamaConfig(576, 30, 9, 49152, n_kv_heads=3, d_ff=1536, rope_theta=1e5),
                {"model_name": "vit_tiny_patch16_224", "img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 6,
                 "num_heads": 4, "mlp_ratio": 3.0}),  # the ViT of scripts/quickstart_smollm2.sh
    "tiny": (LlamaConfig(64, 2, 4, 320, multiple_of=32),
             {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6,
              "num_heads": 4}),
}
TEXT_PREFIX, IMAGE_PREFIX = 5, 3  # tokens of "Image: N/A" and "Image: " in LLaMA's vocabulary


def random_lavin(size: str, device, dtype, dropout: float = 0.1, bits: str = "16bit") -> LaVIN:
    """LaVIN with random weights, loaded one at a time as those of files; the adapters' up-projections are not zero.

    bits: `4bit` and `8bit` need bitsandbytes.
    """
    config, vit = SIZES[size]
    with torch.device("meta"):
        model = LaVIN(config, timm.create_model(num_classes=0, **vit), AdapterConfig(dropout_prob=dropout))
    frozen = frozen_parameters(model)
    if bits in ("4bit", "8bit"):
        quantize_model(model, bits)
    for name, shape in frozen.values():
        owner, _, leaf = name.rpartition(".")
        weight = torch.empty(shape, device=device, dtype=dtype).normal_(float("norm" in name), 0.02)
        load_frozen_tensor(model.get_submodule(owner), leaf, weight, device, dtype)
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            nn.init.normal_(parameter, 0, 0.02)
    return model.to(device)


@cache
def length_rows() -> list[tuple[int, int, int]]:
    """Returns the lengths of 150 real problems: [prompt tokens with BOS, all tokens with BOS and EOS, has an image]."""
    return json.loads(Path(__file__).with_name("token_lengths.json").read_text())["rows"]


def image_generator(model: LaVIN, seed: int) -> Callable[[], torch.Tensor]:
    """Returns a new random image at each call, from its own generator, so that dropout does not change the images."""
    generator, size = torch.Generator().manual_seed(seed), model.vision.image_size
    return lambda: torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)


def redrawn(model: LaVIN, examples: list[Example], seed: int) -> list[Example]:
    """Examples of the same lengths and image positions, with new random tokens and pixels."""
    rng, vocab, random_image = random.Random(seed), model.llama.config.vocab_size, image_generator(model, seed)
    return [Example([i if i == IMAGE_SLOT else rng.randrange(3, vocab) for i in example.ids], example.answer_start,
                    None if example.image is None else random_image()) for example in examples]


def random_examples(model: LaVIN, n: int, seed: int, max_seq_len: int = 512, full: bool = False, answers: bool = True,
                    images: bool = True) -> list[Example]:
    """n random samples of real lengths; with `full`, each has max_seq_len tokens and an image. images: whether samples
    of problems with an image have one."""
    rng, vocab, random_image = random.Random(seed), model.llama.config.vocab_size, image_generator(model, seed)
    examples = []
    for prompt, total, has_image in rng.choices(length_rows(), k=n):
        if full:
            total, has_image = max_seq_len, 1
        has_image *= images
        n_prefix = IMAGE_PREFIX if has_image else TEXT_PREFIX
        token = lambda count: [rng.randrange(3, vocab) for _ in range(count)]  # noqa: E731
        ids = token(1 + n_prefix) + [IMAGE_SLOT] * (model.adapter.n_prompt * has_image)
        start = len(ids) + prompt - 1
        ids += token((total if answers else prompt) - 1)
        image = random_image() if has_image else None
        examples.append(Example(ids[:max_seq_len - 1], min(start, max_seq_len - 1), image))
    return examples
