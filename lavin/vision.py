"""A timm ViT turned into CLS features: the class token after evenly spaced blocks (every fourth of ViT-L's 24)."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavin.llama import run_block
from lavin.runtime.console import counted

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of each channel


def channels(values: tuple[float, ...]) -> torch.Tensor:
    """Returns the values of the three channels as [3, 1, 1], on the CPU even while the model is built on the meta
    device.
    """
    return torch.tensor(values, device="cpu").view(3, 1, 1)


class VisionEncoder(nn.Module):
    """Turns images into `n_features` CLS features, without final norm or projection.

    `vit` is a timm VisionTransformer with a class token. Its pixels are normalised by `vit.normalization` (mean and std
    of each channel), which open_vit (lavin/weights/vision.py) sets, and by ImageNet's constants where it is not set.
    LaVIN normalises CLIP's pictures by ImageNet's constants, as published; they are not CLIP's own. Raises ValueError
    where `n_features` does not divide the number of blocks.
    """

    def __init__(self, vit: nn.Module, n_features: int):
        super().__init__()
        self.vit = vit
        self.set_features(n_features)
        self.run_block = run_block  # replaced by a compiled version in lavin/fast/speed_up.py
        self.width = vit.embed_dim
        self.image_size = vit.patch_embed.img_size[0]
        self.gradient_checkpointing = False
        self.mean, self.std = getattr(vit, "normalization", IMAGENET)
        self.register_buffer("pixel_mean", channels(self.mean), persistent=False)
        self.register_buffer("pixel_std", channels(self.std), persistent=False)

    def set_features(self, n_features: int) -> None:
        """Raises ValueError where `n_features` does not divide the number of blocks."""
        if n_features < 1 or len(self.vit.blocks) % n_features:
            raise ValueError(f"--n_prompt {n_features} must divide the ViT's {counted(len(self.vit.blocks), 'block')}")
        self.blocks_per_feature = len(self.vit.blocks) // n_features

    def forward(self, images):
        """Returns the CLS features [I, n_features, width] of uint8 images [I, 3, S, S]."""
        x = ((images / 255 - self.pixel_mean) / self.pixel_std).to(self.vit.patch_embed.proj.weight.dtype)
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(x)))  # [I, 1 + patches, width]
        if self.training:
            x.requires_grad_()  # as the next blocks' inputs do: torch.compile makes a graph for each kind
        features = []
        for i, block in enumerate(self.vit.blocks, 1):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(self.run_block, block, x, use_reentrant=False)
            else:
                x = self.run_block(block, x)
            if i % self.blocks_per_feature == 0:
                features.append(x[:, 0])
        return torch.stack(features, 1)
