"""A tiny base in Meta's files: LLaMA, a ViT and a tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from lavin.llama import Llama, LlamaConfig
from lavin.tokenizer import Tokenizer
from tiny import IMAGE_SIZE, perturb_weights, tiny_vit


@dataclass
class Base:
    weights: Path  # tokenizer.model, tiny/params.json, tiny/consolidated.00.pth
    vision: Path  # config.json, model.safetensors

    @property
    def flags(self) -> list[str]:
        return ["--llama_model_path", str(self.weights), "--llm_model", "tiny", "--vision_model", str(self.vision)]


def write_base(folder: Path, tokenizer_file: Path) -> Base:
    from safetensors.torch import save_file
    torch.manual_seed(0)
    base = Base(folder / "weights", folder / "vit")
    (base.weights / "tiny").mkdir(parents=True)
    (base.weights / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-6,
              "vocab_size": -1}
    (base.weights / "tiny" / "params.json").write_text(json.dumps(params))
    llama = Llama(LlamaConfig.from_params(params, Tokenizer(tokenizer_file).n_words))
    perturb_weights(llama)
    torch.save({**llama.state_dict(), "rope.freqs": torch.zeros(4)}, base.weights / "tiny" / "consolidated.00.pth")
    base.vision.mkdir()
    (base.vision / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 24,
        "model_args": {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2},
        "pretrained_cfg": {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "num_classes": 0}}))
    save_file(tiny_vit().state_dict(), base.vision / "model.safetensors")
    return base
