"""ViT weights: OpenAI's CLIP archives, Hugging Face's CLIP folders, and timm's folders, files and hub.

Each opener returns a timm VisionTransformer on the meta device, and a mapping from its parameters' names to tensors.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import read_json
from lavin.timm_compat import timm  # before the imports from timm, which it makes possible
from lavin.weights.tensor_files import read_hf_folder, read_tensors

OpenedViT = tuple[nn.Module, Mapping[str, torch.Tensor]]  # model on meta, tensors under its names

CLIP = {"quick_gelu": "vit_large_patch14_clip_quickgelu_224", "gelu": "vit_large_patch14_clip_224"}  # by activation
OPENAI_HEAD_DIM = 64  # in all of OpenAI's ViTs
DOWNLOAD_HINT = ("for CLIP ViT-L/14 fetch config.json and model.safetensors of https://huggingface.co/openai/"
                 "clip-vit-large-patch14, or OpenAI's ViT-L-14.pt (https://github.com/openai/CLIP)")

# Hugging Face's part of a parameter's name -> timm's
HF_CLIP_NAMES = {"embeddings.patch_embedding": "patch_embed.proj", "embeddings.class_embedding": "cls_token",
                 "embeddings.position_embedding.weight": "pos_embed", "pre_layrnorm": "norm_pre",
                 "post_layernorm": "norm", "encoder.layers": "blocks", "layer_norm1": "norm1", "layer_norm2": "norm2",
                 "self_attn.out_proj": "attn.proj"}
# tensors whose shapes determine the sizes of the ViT
HF_CLIP_SIZES = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
                 "encoder.layers.0.mlp.fc1.weight")


def open_vit(vision_model: str) -> OpenedViT:
    """Opens --vision_model: OpenAI's ViT-*.pt, a Hugging Face or timm folder, a timm file, or a name on timm's hub.

    Raises UserError if it is missing, broken, or not a ViT with a class token.
    """
    path = Path(vision_model)
    if not path.exists() and ("/" in vision_model or path.suffix in (".pt", ".pth", ".safetensors")):
        raise UserError(f"--vision_model {vision_model} does not exist: {DOWNLOAD_HINT}, and name the folder or the "
                        "file")
    try:
        if path.is_dir():
            vit, tensors = open_folder(path)
        elif path.suffix == ".pt":
            vit, tensors = open_openai(path)
        elif path.is_file():
            vit, tensors = open_timm_file(path)
        else:
            vit, tensors = open_timm_hub(vision_model)
    except UserError as error:
        raise UserError(f"--vision_model {vision_model}: {error}") from error
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise UserError(f"--vision_model {vision_model} is no ViT with a class token: name another")
    return vit, tensors


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drops the classifier or CLIP's projection into the space shared with text, neither of which is used."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def open_folder(folder: Path) -> OpenedViT:
    config = read_json(folder / "config.json")
    if str(config.get("model_type", "")).startswith("clip"):
        return open_hf_clip(folder, config.get("vision_config", config))
    return open_timm_folder(folder, read_hf_folder(folder))


# --- timm ---

def open_timm_hub(name: str) -> OpenedViT:
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and its hub raise many types of exception: no network, no such model
        raise UserError(f"timm cannot fetch it ({first_line(error)}): correct the name, or, without a network, "
                        f"{DOWNLOAD_HINT}") from error
    tensors = vit.state_dict()
    return vit.to("meta"), tensors


def open_timm_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> OpenedViT:
    """A folder with timm's config.json. tensors: the ViT's, already read."""
    try:
        with torch.device("meta"):
            vit = timm.create_model(f"local-dir:{folder}", num_classes=0)
    except Exception as error:  # timm raises many types of exception: unknown architecture, unknown arguments
        raise UserError(f"{folder / 'config.json'} does not describe a timm model ({first_line(error)}): "
                        "fetch or copy it again") from error
    return vit, without_head(checkpoint_filter_fn(tensors, vit))


def open_timm_file(path: Path) -> OpenedViT:
    """A weight file, described by config.json in the same folder; without that, it must be a CLIP of OpenAI's."""
    tensors = read_tensors(path)
    if (path.parent / "config.json").is_file():
        return open_timm_folder(path.parent, tensors)
    if "norm_pre.weight" not in tensors:
        raise UserError(f"without timm's config.json in the folder of {path.name} only CLIP's ViTs can be loaded: "
                        "copy it there")
    vit = describe_clip(tensors["patch_embed.proj.weight"], tensors["pos_embed"].shape[1], depth_of(tensors, "blocks"),
                        tensors["blocks.0.mlp.fc1.weight"])
    return vit, without_head(tensors)


# --- CLIP ---

def describe_clip(patch_embed: torch.Tensor, n_positions: int, depth: int, fc1: torch.Tensor, heads: int | None = None,
                  activation: str = "quick_gelu") -> nn.Module:
    """CLIP's ViT on meta, its sizes taken from its weights.

    patch_embed [D, 3, P, P]: patch embedding. fc1 [hidden, D]: first matrix of an MLP. heads: OpenAI's if left out.
    """
    width, patch_size = patch_embed.shape[0], patch_embed.shape[-1]
    if activation not in CLIP:
        raise UserError(f"hidden_act {activation!r}; only {' and '.join(CLIP)} are supported")
    with torch.device("meta"):
        return timm.create_model(CLIP[activation], num_classes=0, img_size=patch_size * math.isqrt(n_positions - 1),
                                 patch_size=patch_size, embed_dim=width, depth=depth, mlp_ratio=fc1.shape[0] / width,
                                 num_heads=heads or width // OPENAI_HEAD_DIM)


def depth_of(tensors: Mapping[str, torch.Tensor], blocks: str) -> int:
    """Number of blocks. blocks: the prefix of their names, before the index."""
    return len({name.split(".")[blocks.count(".") + 1] for name in tensors if name.startswith(f"{blocks}.")})


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive, the format of OpenAI's ViT-L-14.pt.

    Such an archive also contains a program in TorchScript, which is not Python and is not called here. Nevertheless,
    use only archives that come from OpenAI.
    """
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"it cannot be read as a TorchScript archive ({first_line(error)}): {DOWNLOAD_HINT}") from error


def open_openai(path: Path) -> OpenedViT:
    tensors = read_torchscript(path)
    if "visual.class_embedding" not in tensors:
        raise UserError(f"it holds no CLIP with a ViT: {DOWNLOAD_HINT}")
    vit = describe_clip(tensors["visual.conv1.weight"], len(tensors["visual.positional_embedding"]),
                        depth_of(tensors, "visual.transformer.resblocks"),
                        tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    return vit, without_head(checkpoint_filter_fn(tensors, vit))


class HuggingFaceClip(Mapping):
    """timm's name -> tensor of a CLIPModel's vision tower; query, key and value are concatenated, as in timm."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.parts = {self.to_timm_name(name): [tensor] for name, tensor in tensors.items()
                      if not re.search(r"position_ids$|\.[qkv]_proj\.", name)}
        for name in tensors:
            qkv_names = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
            if ".q_proj." in name and tensors.keys() >= set(qkv_names):
                self.parts[self.to_timm_name(name)] = [tensors[qkv_name] for qkv_name in qkv_names]

    @staticmethod
    def to_timm_name(name: str) -> str:
        for hf_part, timm_part in HF_CLIP_NAMES.items():
            name = name.replace(hf_part, timm_part)
        return name.replace("self_attn.q_proj", "attn.qkv")

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, name):
        tensor = torch.cat(self.parts[name]) if len(self.parts[name]) > 1 else self.parts[name][0]
        return {"cls_token": tensor.view(1, 1, -1), "pos_embed": tensor[None]}.get(name, tensor)


def open_hf_clip(folder: Path, config: dict) -> OpenedViT:
    """config: of the vision tower; entries that are left out have transformers' defaults."""
    tensors = read_hf_folder(folder)
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()
                   if name.startswith("vision_model.")}
    missing = [name for name in HF_CLIP_SIZES if name not in tensors]
    if missing:
        raise UserError(f"its weights lack {missing[0]}, so it is no CLIP: {DOWNLOAD_HINT}")
    patch_embed, positions, fc1 = (tensors[name] for name in HF_CLIP_SIZES)
    vit = describe_clip(patch_embed, len(positions), depth_of(tensors, "encoder.layers"), fc1,
                        config.get("num_attention_heads", 12), config.get("hidden_act", "quick_gelu"))
    return vit, HuggingFaceClip(tensors)
