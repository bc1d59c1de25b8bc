"""ViTs from the files of others: OpenAI's CLIP archives, Hugging Face's CLIP folders, timm's folders, files and hub.

Each gives a timm VisionTransformer that is only described (meta), and a mapping from its parameters' names to tensors.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lavin.errors import UserError, first_line
from lavin.tensor_files import read_hf_folder, read_json, read_tensors
from lavin.vision import timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

CLIP = {"quick_gelu": "vit_large_patch14_clip_quickgelu_224", "gelu": "vit_large_patch14_clip_224"}  # by activation
OPENAI_HEAD = 64  # width of a head in all of OpenAI's ViTs
WHERE = ("for CLIP ViT-L/14 fetch config.json and model.safetensors of https://huggingface.co/openai/"
         "clip-vit-large-patch14, or OpenAI's ViT-L-14.pt (https://github.com/openai/CLIP)")

HF_CLIP_NAMES = {"embeddings.patch_embedding": "patch_embed.proj", "embeddings.class_embedding": "cls_token",
                 "embeddings.position_embedding.weight": "pos_embed", "pre_layrnorm": "norm_pre",
                 "post_layernorm": "norm", "encoder.layers": "blocks", "layer_norm1": "norm1", "layer_norm2": "norm2",
                 "self_attn.out_proj": "attn.proj"}
HF_CLIP_SIZES = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
                 "encoder.layers.0.mlp.fc1.weight")


def open_vit(vision_model: str) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    """--vision_model: OpenAI's ViT-*.pt, a folder of Hugging Face's or timm's, a timm file, or a name on timm's hub.

    Raises UserError where it is missing, broken, or no ViT with a class token.
    """
    path = Path(vision_model)
    if not path.exists() and ("/" in vision_model or path.suffix in (".pt", ".pth", ".safetensors")):
        raise UserError(f"--vision_model {vision_model} is not there: {WHERE}, and name the folder or the file")
    try:
        if path.is_dir():
            vit, tensors = open_folder(path)
        elif path.suffix == ".pt":
            vit, tensors = open_openai(path)
        elif path.is_file():
            vit, tensors = open_file(path)
        else:
            vit, tensors = open_hub(vision_model)
    except UserError as error:
        raise UserError(f"--vision_model {vision_model}: {error}") from error
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise UserError(f"--vision_model {vision_model} is no ViT with a class token: name another")
    return vit, tensors


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What maps to classes, or into CLIP's space shared with texts, is not used."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def open_hub(name: str):
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # no network, no such model: timm and its hub raise many kinds
        raise UserError(f"timm cannot fetch it ({first_line(error)}): correct the name, or, where there is no "
                        f"network, {WHERE}") from error
    tensors = vit.state_dict()
    return vit.to("meta"), tensors


def open_folder(folder: Path):
    config = read_json(folder / "config.json")
    if str(config.get("model_type", "")).startswith("clip"):
        return open_hugging_face(folder, config.get("vision_config", config))
    return open_timm(folder, read_hf_folder(folder))


def open_timm(folder: Path, tensors: dict[str, torch.Tensor]):
    """A folder whose config.json timm wrote."""
    try:
        with torch.device("meta"):
            vit = timm.create_model(f"local-dir:{folder}", num_classes=0)
    except Exception as error:  # unknown architecture, arguments that it does not take: timm raises many kinds
        raise UserError(f"{folder / 'config.json'} describes no model of timm's ({first_line(error)}): "
                        "fetch or copy it again") from error
    return vit, without_head(checkpoint_filter_fn(tensors, vit))


def open_file(path: Path):
    """One file of a timm ViT: config.json beside it says which; without that it is taken for a CLIP of OpenAI's."""
    tensors = read_tensors(path)
    if (path.parent / "config.json").is_file():
        return open_timm(path.parent, tensors)
    if "norm_pre.weight" not in tensors:
        raise UserError(f"without timm's config.json beside {path.name} only CLIP's ViTs are known: copy it there")
    vit = describe_clip(tensors["patch_embed.proj.weight"], tensors["pos_embed"].shape[1], depth_of(tensors, "blocks"),
                        tensors["blocks.0.mlp.fc1.weight"])
    return vit, without_head(tensors)


# --- CLIP ---

def describe_clip(patches: torch.Tensor, positions: int, depth: int, fc1: torch.Tensor, heads: int | None = None,
                  activation: str = "quick_gelu") -> nn.Module:
    """CLIP's ViT, its sizes read off its weights: patch embedding [D, 3, P, P], the MLP's first matrix [hidden, D]."""
    width, patch = patches.shape[0], patches.shape[-1]
    if activation not in CLIP:
        raise UserError(f"hidden_act {activation!r}; {' and '.join(CLIP)} alone are known here")
    with torch.device("meta"):
        return timm.create_model(CLIP[activation], num_classes=0, img_size=patch * math.isqrt(positions - 1),
                                 patch_size=patch, embed_dim=width, depth=depth, mlp_ratio=fc1.shape[0] / width,
                                 num_heads=heads or width // OPENAI_HEAD)


def depth_of(tensors, blocks: str) -> int:
    return len({name.split(".")[blocks.count(".") + 1] for name in tensors if name.startswith(f"{blocks}.")})


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive, the form of OpenAI's ViT-L-14.pt.

    The one place that reads such an archive. It holds a program besides the tensors, in TorchScript, which is not
    Python and of which nothing is called here; take archives from OpenAI alone all the same.
    """
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"it cannot be read as a TorchScript archive ({first_line(error)}): {WHERE}") from error


def open_openai(path: Path):
    tensors = read_torchscript(path)
    if "visual.class_embedding" not in tensors:
        raise UserError(f"it holds no CLIP with a ViT: {WHERE}")
    vit = describe_clip(tensors["visual.conv1.weight"], len(tensors["visual.positional_embedding"]),
                        depth_of(tensors, "visual.transformer.resblocks"),
                        tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    return vit, without_head(checkpoint_filter_fn(tensors, vit))


class HuggingFaceClip(Mapping):
    """The vision tower of a CLIPModel; query, key and value are joined, as timm keeps them."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.parts = {self.our_name(name): [tensor] for name, tensor in tensors.items()
                      if not re.search(r"position_ids$|\.[qkv]_proj\.", name)}
        for name in tensors:
            joined = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
            if ".q_proj." in name and tensors.keys() >= set(joined):
                self.parts[self.our_name(name)] = [tensors[part] for part in joined]

    @staticmethod
    def our_name(name: str) -> str:
        for theirs, ours in HF_CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        return name.replace("self_attn.q_proj", "attn.qkv")

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, name):
        tensor = torch.cat(self.parts[name]) if len(self.parts[name]) > 1 else self.parts[name][0]
        return {"cls_token": tensor.view(1, 1, -1), "pos_embed": tensor[None]}.get(name, tensor)


def open_hugging_face(folder: Path, config: dict):
    tensors = read_hf_folder(folder)
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()
                   if name.startswith("vision_model.")}
    missing = [name for name in HF_CLIP_SIZES if name not in tensors]
    if missing:
        raise UserError(f"its weights lack {missing[0]}, and so are no CLIP: {WHERE}")
    patches, positions, fc1 = (tensors[name] for name in HF_CLIP_SIZES)
    vit = describe_clip(patches, len(positions), depth_of(tensors, "encoder.layers"), fc1,
                        config.get("num_attention_heads", 12), config.get("hidden_act", "quick_gelu"))
    return vit, HuggingFaceClip(tensors)
