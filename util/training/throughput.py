"""Work and speed of training: FLOPs, model FLOPs utilization (MFU; Chowdhery et al. 2022, arXiv 2204.02311), memory."""

import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

# dense matmuls in float16 or bfloat16 with sums in float32, TFLOP/s by NVIDIA's data sheets; first match counts
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 150, "A10": 125,
               "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65}


@dataclass(frozen=True)
class FrozenWeights:
    """Numbers of frozen matrix parameters: LLaMA's layers, its head, the ViT's blocks; and the ViT's positions."""

    layers: int
    head: int
    vit: int
    positions: int

    def flops(self, tokens: int, answer_tokens: int, images: int) -> float:
        """FLOPs that no implementation can avoid in a training step: forward pass and input gradient of the frozen
        matrices, 4 x parameters x tokens. LLaMA's head at answer tokens only, the ViT at all positions of each image.
        """
        return 4 * (self.layers * tokens + self.head * answer_tokens + self.vit * self.positions * images)


def frozen_weights(model) -> FrozenWeights:
    """Counts the weights by the model's configuration, since quantized matrices do not tell their shapes."""
    c = model.llama.config
    layer = 2 * c.dim * c.head_dim * (c.n_heads + c.kv_heads) + 3 * c.dim * c.hidden_dim
    vit = sum(p.numel() for name, p in model.vision.vit.blocks.named_parameters()
              if p.ndim > 1 and "adapter" not in name)
    return FrozenWeights(c.n_layers * layer, c.dim * c.vocab_size, vit, model.vision.vit.pos_embed.shape[1])


def step_flops(weights: FrozenWeights, examples: list) -> float:
    return weights.flops(sum(len(example.ids) for example in examples),
                         sum(len(example.ids) - example.answer_start for example in examples),
                         sum(example.image is not None for example in examples))


def peak_flops(device: torch.device, dtype: torch.dtype, n_gpus: int) -> float | None:
    """FLOP/s of the GPUs' matmuls together; None where it is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((n_gpus * 1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def restart_peak_memory() -> None:
    """From here on, `peak_memory_gib` is that of the run that begins now, and not of those before it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # no Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
