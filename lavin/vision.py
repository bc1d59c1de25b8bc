"""A timm ViT turned into CLS features: the class token after evenly spaced blocks (every fourth of ViT-L's 24)."""

import sys

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def import_timm():
    """timm, also where torchvision was built for another torch than the one installed.

    timm imports torchvision, whose compiled part then fails to load; its Python part stops at the fake kernels of two
    operators that nobody declared. Only Python parts are used, so a declaration is all that is missing.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library._torchvision_declarations = library  # they live as long as the library object
    import timm
    return timm


timm = import_timm()
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402


def run_blocks(blocks, x):
    """Some layers of a ViT behind one another."""
    for block in blocks:
        x = block(x)
    return x


class VisionEncoder(nn.Module):
    """Images -> `n_features` CLS features, without final norm or projection.

    vit: a timm VisionTransformer with a class token. run_blocks: may be replaced by a faster function that does the
    same (lavin/fast.py). Raises ValueError where the ViT's depth is no multiple of n_features.
    """

    def __init__(self, vit: nn.Module, n_features: int):
        super().__init__()
        if n_features < 1 or len(vit.blocks) % n_features:
            raise ValueError(f"--n_prompt {n_features} must divide the ViT's {len(vit.blocks)} blocks")
        self.vit = vit
        self.run_blocks = run_blocks
        self.every = len(vit.blocks) // n_features
        self.width = vit.embed_dim
        self.image_size = vit.patch_embed.img_size[0]
        self.gradient_checkpointing = False
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD, device="cpu").view(3, 1, 1), persistent=False)

    def forward(self, images):
        """uint8 images [I, 3, S, S] -> CLS features [I, n_features, width]."""
        x = ((images / 255 - self.mean) / self.std).to(self.vit.patch_embed.proj.weight.dtype)
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(x)))
        features = []
        for first in range(0, len(self.vit.blocks), self.every):
            part = [self.vit.blocks[i] for i in range(first, first + self.every)], x
            if self.gradient_checkpointing and self.training:
                x = checkpoint(self.run_blocks, *part, use_reentrant=False)
            else:
                x = self.run_blocks(*part)
            features.append(x[:, 0])
        return torch.stack(features, 1)
