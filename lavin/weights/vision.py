"""ViT weights: OpenAI's CLIP archives, Hugging Face's CLIP folders, and timm's folders, files and hub.

Each opener returns a timm VisionTransformer on the meta device, and a mapping from its parameters' names to tensors.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import constants
from pydantic import Field
from torch import nn
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.console import counted, print_rank0
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.schema import (
    Layers,
    NonBlankText,
    Positive,
    Size,
    Text,
    Width,
    declared,
    read_validated,
    validate,
)
from lavin.timm_compat import timm
from lavin.vision import IMAGENET
from lavin.weights.hub import is_offline, model_path, offline, require_cached
from lavin.weights.tensor_files import hf_weight_files, read_hf_folder, read_tensors

OpenedViT = tuple[nn.Module, Mapping[str, torch.Tensor]]  # model on meta, tensors under its names

CLIP = {"quick_gelu": "vit_large_patch14_clip_quickgelu_224", "gelu": "vit_large_patch14_clip_224"}  # by activation
# files of a model on the hub; timm takes the first that is there
HUB_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
OPENAI_HEAD_DIM = 64  # in all of OpenAI's ViTs
DOWNLOAD_HINT = ("fetch CLIP ViT-L/14 by python -m tools.download clip, or OpenAI's ViT-L-14.pt "
                 "(https://github.com/openai/CLIP)")

# Hugging Face's part of a parameter's name -> timm's
HF_CLIP_NAMES = {"embeddings.patch_embedding": "patch_embed.proj", "embeddings.class_embedding": "cls_token",
                 "embeddings.position_embedding.weight": "pos_embed", "pre_layrnorm": "norm_pre",
                 "post_layernorm": "norm", "encoder.layers": "blocks", "layer_norm1": "norm1", "layer_norm2": "norm2",
                 "self_attn.out_proj": "attn.proj"}
# tensors whose shapes determine the sizes of the ViT, with their numbers of dimensions
HF_CLIP_SIZES = {"embeddings.patch_embedding.weight": 4, "embeddings.position_embedding.weight": 2,
                 "encoder.layers.0.mlp.fc1.weight": 2}
TIMM_CLIP_SIZES = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
OPENAI_SIZES = {"visual.conv1.weight": 4, "visual.positional_embedding": 2,
                "visual.transformer.resblocks.0.mlp.c_fc.weight": 2}
NO_INIT = {"weight_init": "skip"}  # for timm's VisionTransformer: drawing values takes time even on the meta device
RESAMPLED = ("pos_embed", "patch_embed.proj.weight")  # timm would resample them to other image and patch sizes


@declared
class ModelArgs(TypedDict, total=False):
    """The arguments of a timm model. Those that set the size of a ViT have bounds, so that a wrong one ends early."""

    patch_size: Annotated[int, Field(ge=1, le=1024)]
    embed_dim: Width
    depth: Layers
    num_heads: Width


@declared
class PretrainedConfig(TypedDict, total=False):
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    tag: Text | None
    hf_hub_id: Text | None


@declared
class TimmConfig(TypedDict):
    architecture: NonBlankText
    model_args: NotRequired[ModelArgs]
    pretrained_cfg: NotRequired[PretrainedConfig]


@declared
class ClipVisionConfig(TypedDict, total=False):
    num_attention_heads: Width
    hidden_act: Text
    image_size: Size
    num_hidden_layers: Width
    layer_norm_eps: Positive


def open_vit(vision_model: str) -> OpenedViT:
    """Opens --vision_model: OpenAI's ViT-*.pt, a Hugging Face or timm folder, a timm file, or a name on timm's hub.

    Raises UserError if it is missing, broken, or not a ViT with a class token.
    """
    path = model_path(vision_model, "--vision_model")
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
    return vit, tensors


def vit_files(vision_model: str) -> list[Path]:
    """Every file that --vision_model is read from; none where timm's hub has not been asked for it yet."""
    path = model_path(vision_model, "--vision_model")
    if path.is_dir():
        return [path / "config.json", *hf_weight_files(path)]
    if path.is_file():
        config = path.parent / "config.json"
        return [path, config] if path.suffix != ".pt" and config.is_file() else [path]
    return hub_files(vision_model)


def check_vit(vit: nn.Module) -> None:
    """Raises UserError for models without what lavin.vision needs."""
    if not isinstance(vit, timm.models.VisionTransformer) or vit.cls_token is None:
        raise UserError("it is no ViT with a class token: name another")
    size, channels = vit.patch_embed.img_size, vit.patch_embed.proj.in_channels
    if size is None or size[0] != size[1] or channels != 3:
        raise UserError(f"its images are of size {size} and {counted(channels, 'channel')}, not square and RGB: name "
                        "another")


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drops the classifier or CLIP's projection into the space shared with text, neither of which is used."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def open_folder(folder: Path) -> OpenedViT:
    path = folder / "config.json"
    config = read_validated(path, dict[str, Any])
    if str(config.get("model_type", "")).startswith("clip"):
        return open_hf_clip(folder, validate(config.get("vision_config", config), ClipVisionConfig, str(path)))
    if "model_type" in config and "architecture" not in config:
        raise UserError(f"{path} is of a {config['model_type']} of Hugging Face's, of which only clip loads: name "
                        "timm's copy of it, if that has a class token")
    return open_timm_folder(folder, read_hf_folder(folder))


def create_on_meta(name: str, source: str, **kwargs: Any) -> nn.Module:
    """Creates a timm model on the meta device. `source` says, in the error message, what the arguments were read from.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0, **kwargs)
    except Exception as error:  # timm raises many types of exception: unknown architecture, sizes that do not fit
        line = first_line(error)
        raise UserError(f"cannot make a timm model of {source} ({line}): fetch or copy it again") from error


# --- timm ---

def native_variant(architecture: str, tag: str) -> str:
    """Returns the architecture that weights called `tag` were trained as.

    Weights of OpenAI and others with QuickGELU are listed under the plain architecture too, where their outputs are
    wrong.
    """
    quick = architecture.replace("_clip_", "_clip_quickgelu_")
    return quick if timm.models.is_model_pretrained(f"{quick}.{tag}") else architecture


def normalization(vit: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the std of each channel by which the pixels of a ViT are normalised.

    LaVIN normalises CLIP's pictures by ImageNet's constants, as published, which are not CLIP's own. Any other ViT gets
    the constants that it was trained with.
    """
    own = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
    return IMAGENET if own == (timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD) else own


def hub_files(name: str) -> list[Path]:
    """The file in the hub's cache that timm reads a model from; none where it is not there."""
    config = timm.models.get_pretrained_cfg(name)
    if not config or not config.hf_hub_id:
        return []
    try:
        folder = require_cached(config.hf_hub_id)
    except OSError:
        return []
    return [path for file in (config.hf_hub_filename, *HUB_WEIGHTS) if file and (path := folder / file).is_file()][:1]


def create_pretrained(name: str) -> nn.Module:
    """The model with its weights: those in the hub's cache where there is no network, or where fetching breaks off."""
    config = timm.models.get_pretrained_cfg(name)  # None for timm's old names, which stand for a new one
    native = f"{native_variant(config.architecture, config.tag)}.{config.tag}" if config else name
    with offline(is_offline()):
        if constants.HF_HUB_OFFLINE and config and config.hf_hub_id:
            require_cached(config.hf_hub_id)  # at once; timm would build the model first
        try:
            return timm.create_model(native, pretrained=True, num_classes=0)
        except Exception as error:
            if constants.HF_HUB_OFFLINE or not hub_files(name):
                raise
            print_rank0(f"{name} cannot be fetched ({first_line(error)}): the file in the hub's cache is used")
    with offline():
        return timm.create_model(native, pretrained=True, num_classes=0)


def open_timm_hub(name: str) -> OpenedViT:
    try:
        vit = create_pretrained(name)
    except Exception as error:  # timm and its hub raise many types of exception: no network, no such model
        raise UserError(f"timm cannot fetch it ({first_line(error)}): correct the name, or, without a network, "
                        f"{DOWNLOAD_HINT}") from error
    check_vit(vit)
    vit.normalization = normalization(vit)
    tensors = vit.state_dict()
    return vit.to("meta"), tensors


def open_timm_folder(folder: Path, tensors: dict[str, torch.Tensor]) -> OpenedViT:
    """Opens a folder with timm's config.json. `tensors` are the ViT's, already read."""
    path = folder / "config.json"
    config = read_validated(path, TimmConfig)
    is_vit = timm.models.is_model_in_modules(config["architecture"], ["vision_transformer"])
    vit = create_on_meta(f"local-dir:{folder}", str(path), **native_activation(config), **(NO_INIT if is_vit else {}))
    check_vit(vit)
    vit.normalization = normalization(vit)
    parameters = vit.state_dict()
    for name in RESAMPLED:
        if name in tensors.keys() & parameters.keys() and tensors[name].shape != parameters[name].shape:
            raise UserError(f"{path} asks for {name} of {list(parameters[name].shape)}, and the weights were trained "
                            f"with {list(tensors[name].shape)}: correct its img_size and patch_size")
    return vit, to_timm(tensors, vit)


def native_activation(config: TimmConfig) -> dict[str, str]:
    """Returns the argument for timm where config.json names the plain architecture for weights with QuickGELU."""
    weights = config.get("pretrained_cfg", {})
    tag = weights.get("tag") or (weights.get("hf_hub_id") or "").rpartition(".")[2]
    is_native = native_variant(config["architecture"], tag) == config["architecture"]
    return {} if is_native or "act_layer" in config.get("model_args", {}) else {"act_layer": "quick_gelu"}


def to_timm(tensors: dict[str, torch.Tensor], vit: nn.Module) -> dict[str, torch.Tensor]:
    """Renames the tensors that several programs write to timm's names."""
    try:
        return without_head(timm.models.vision_transformer.checkpoint_filter_fn(tensors, vit))
    except Exception as error:  # timm guesses the program by a name, and then takes the others for granted
        raise UserError(f"its weights are not of a ViT ({first_line(error)}): {DOWNLOAD_HINT}") from error


def open_timm_file(path: Path) -> OpenedViT:
    """Opens a weight file that a config.json in its folder describes; without that, it must be a CLIP of OpenAI's."""
    tensors = read_tensors(path)
    if (path.parent / "config.json").is_file():
        return open_timm_folder(path.parent, tensors)
    if "norm_pre.weight" not in tensors:
        raise UserError(f"without timm's config.json in the folder of {path.name} only CLIP's ViTs can be loaded: "
                        "copy it there")
    patch_embed, positions, fc1 = sizing_tensors(tensors, TIMM_CLIP_SIZES)
    return describe_clip(patch_embed, positions.shape[1], depth_of(tensors, "blocks"), fc1), without_head(tensors)


# --- CLIP ---

def sizing_tensors(tensors: Mapping[str, torch.Tensor], n_dims: dict[str, int]) -> list[torch.Tensor]:
    """Returns the tensors that determine a CLIP's sizes. `n_dims` has their names, with their numbers of dimensions."""
    for name, n in n_dims.items():
        if name not in tensors or tensors[name].ndim != n or not tensors[name].numel():
            raise UserError(f"its weights lack {name}, or it has not {counted(n, 'dimension')}, so it is no CLIP: "
                            f"{DOWNLOAD_HINT}")
    return [tensors[name] for name in n_dims]


def describe_clip(patch_embed: torch.Tensor, n_positions: int, depth: int, fc1: torch.Tensor, heads: int | None = None,
                  activation: str = "quick_gelu", eps: float = 1e-5) -> nn.Module:
    """Returns CLIP's ViT on the meta device, with sizes taken from its weights.

    `patch_embed` [D, 3, P, P] is the patch embedding, and `fc1` [hidden, D] the first matrix of an MLP. The number of
    `heads` is OpenAI's where it is left out.
    """
    width, patch_size = patch_embed.shape[0], patch_embed.shape[-1]
    if activation not in CLIP:
        raise UserError(f"hidden_act {activation!r}; only {' and '.join(CLIP)} are supported")
    patches_per_side = math.isqrt(n_positions - 1)
    if patches_per_side ** 2 != n_positions - 1:
        raise UserError(f"its {n_positions} position embeddings are not a class token and a square: {DOWNLOAD_HINT}")
    return create_on_meta(CLIP[activation], "its weights", img_size=patch_size * patches_per_side,
                          patch_size=patch_size, embed_dim=width, depth=depth, mlp_ratio=fc1.shape[0] / width,
                          num_heads=heads or width // OPENAI_HEAD_DIM,
                          norm_layer=partial(timm.layers.LayerNorm, eps=eps), **NO_INIT)


def depth_of(tensors: Mapping[str, torch.Tensor], blocks: str) -> int:
    """Returns the number of blocks. `blocks` is the prefix of their names, before the index."""
    return len({name.split(".")[blocks.count(".") + 1] for name in tensors if name.startswith(f"{blocks}.")})


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a TorchScript archive, the format of OpenAI's ViT-L-14.pt.

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
    patch_embed, positions, fc1 = sizing_tensors(tensors, OPENAI_SIZES)
    vit = describe_clip(patch_embed, len(positions), depth_of(tensors, "visual.transformer.resblocks"), fc1)
    return vit, to_timm(tensors, vit)


class HuggingFaceClip(Mapping):
    """A mapping from timm's names to the tensors of a CLIPModel's vision tower. Query, key and value are concatenated,
    as in timm.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.parts = {self.to_timm_name(name): [tensor] for name, tensor in tensors.items()
                      if not re.search(r"position_ids$|\.[qkv]_proj\.", name)}
        for name in tensors:
            qkv_names = [name.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
            if ".q_proj." in name and len({tensors[n].shape if n in tensors else None for n in qkv_names}) == 1:
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


def open_hf_clip(folder: Path, config: ClipVisionConfig) -> OpenedViT:
    """Opens a Hugging Face CLIP. `config` is that of the vision tower; entries that are left out have transformers'
    defaults.
    """
    tensors = read_hf_folder(folder)
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()
                   if name.startswith("vision_model.")}
    patch_embed, positions, fc1 = sizing_tensors(tensors, HF_CLIP_SIZES)
    vit = describe_clip(patch_embed, len(positions), depth_of(tensors, "encoder.layers"), fc1,
                        config.get("num_attention_heads", 12), config.get("hidden_act", "quick_gelu"),
                        config.get("layer_norm_eps", 1e-5))
    weights = {"image_size": vit.patch_embed.img_size[0], "num_hidden_layers": len(vit.blocks)}
    for name, value in config.items():
        if value != weights.get(name, value):
            raise UserError(f"{folder / 'config.json'}: {name} {value}, but the weights have {weights[name]}: fetch or "
                            "copy both again")
    return vit, HuggingFaceClip(tensors)
