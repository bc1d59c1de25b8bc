"""Exports a run as a plain Hugging Face model: merges the adapters into the frozen weights, for one modality.

    python -m tools.export_hf --adapter_path RUN --out FOLDER [--precision fp16]
    python -m tools.export_hf --adapter_path RUN --out FOLDER --modality image [--pictures FILE ...]

In each layer, the router's mixture (w0, w1) depends only on the modality. For one modality, an adapter is therefore the
affine map `y = x + s U (A x + a) + s (w0 b + w1 e)`, U = w0 B + w1 E, and the linear layer W that follows it becomes
`(W + s W U A) x` + a bias: the answers are equal up to rounding. The modality token is dropped: it is at position 0,
and no other token attends to it. The text then starts at position 0 instead of 1, which does not matter, since rotary
attention depends only on differences of positions.

The model is a LlamaForCausalLM, which has all biases that this takes; with norms of query and key a Qwen3ForCausalLM,
and where layers have no rotary embeddings a SmolLM3ForCausalLM.

Prompts are as in training: `Image: N/A`, a space and the prompt, to which the exported tokenizer adds BOS; or, as
embeddings, NAME.inputs_embeds.safetensors of an image (`inputs_embeds` [tokens, D]: `[BOS] Image: ` and the image's
features) and the prompt, to which it then adds none.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lavin.llama import LlamaConfig
from lavin.mm_adapter import RepAdapterRouter
from lavin.model import LaVIN, pack
from lavin.runtime.console import print_rank0, progress_bar, working_on
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import atomic_write, write_json
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import FileName, PathText
from lavin.tokenizer import Example, Tokenizer
from lavin.tokenizer_formats import FastTokenizer
from lavin.weights.hugging_face import HF_NAMES, rope_entry
from tools.output import make_folder, save_tensors
from util.data.images import IMAGE_ERRORS, load_image
from util.flags import INHERITED, SHARED
from util.trained_model import load_plain_model

MODALITIES = ("text", "image")
SHARD_BYTES = 4 * 2**30
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Export(FlagGroup):
    """The run that is exported, and what of it."""

    title: ClassVar[str] = "export"
    adapter_path: FileName | None = flag(None, "a checkpoint, or a run's folder", Role.MODEL, required=True,
                                         metavar="RUN")
    out: Path | None = flag(None, "the folder to write", Role.RUN, required=True, metavar="FOLDER")
    modality: str = flag("text", "questions without a picture, or with one", Role.DATA, choices=MODALITIES)
    pictures: list[Path] = flag((), "pictures to export as inputs_embeds, next to the model", Role.DATA, nargs="+",
                                type=Path)
    tokenizer_path: PathText | None = flag(
        None, "tokenizer.model or tokenizer.json (default: the base model's)", Role.MODEL)


def get_args_parser() -> Parser:
    return Parser("-m tools.export_hf", __doc__, Export, *SHARED, precision="fp16", device="cpu", epilog=INHERITED)


# --- merging ---

def merge(adapter: RepAdapterRouter, mixture: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges an adapter into the linear layer `weight` [O, D] that follows it: weight [O, D] and bias [O], float32."""
    down, a, up = adapter.projections(torch.float32)
    first, second, biases = up[:, :2 * len(a) + 2].split([len(a), len(a), 2], dim=1)
    up = mixture[0] * first + mixture[1] * second
    offset = up @ a + biases @ mixture
    weight = weight.float()
    return weight + (weight @ up) @ down, weight @ offset


def to_hf_rotary_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders a query or key projection's rows: rotary pairs from adjacent rows to the two halves of each head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def hf_name(name: str) -> str:
    """Parameter name in lavin.llama -> name in LlamaForCausalLM."""
    for hf_part, part in HF_NAMES.items():
        name = name.replace(part, hf_part)
    return name if name.startswith("lm_head") else f"model.{name}"


@torch.no_grad()
def merged_tensors(model: LaVIN, modality: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the exported model, one at a time."""
    config, routing_cache = model.llama.config, model.routing_cache.refresh(model)
    heads = {"wq": config.n_heads, "wk": config.kv_heads, "q_norm": 1, "k_norm": 1}
    adapter_of = {"wq": "adapter_attn", "wk": "adapter_attn", "wv": "adapter_attn"}
    if model.adapter.adapter_type == "block":
        adapter_of |= {"w1": "adapter_mlp", "w3": "adapter_mlp"}
    # attention_bias and mlp_bias in Hugging Face's config also give wo and w2 a bias
    biased = {"wq", "wk", "wv", "wo", *(("w1", "w2", "w3") if has_mlp_bias(model) else ())}
    for name, parameter in model.llama.named_parameters():
        if "adapter" in name or name.endswith(".bias"):
            continue
        linear, weight, bias = name.split(".")[-2], parameter, torch.zeros(len(parameter))
        if linear in adapter_of:
            layer = int(name.split(".")[1])
            adapter = getattr(model.llama.layers[layer], adapter_of[linear])
            mixture, *_ = routing_cache[layer][adapter_of[linear]]
            weight, bias = merge(adapter, mixture[modality], weight)
        if linear in config.biases:
            bias = bias + model.llama.get_parameter(name.replace(".weight", ".bias")).float()
        if linear in heads:
            weight, bias = (to_hf_rotary_order(rows, heads[linear]) for rows in (weight, bias))
        yield hf_name(name), weight
        if linear in biased:
            yield hf_name(name).replace(".weight", ".bias"), bias


# --- the folder ---

def has_mlp_bias(model: LaVIN) -> bool:
    return model.adapter.adapter_type == "block" or "w1" in model.llama.config.biases


def family(config: LlamaConfig, mlp_bias: bool) -> dict:
    """The entries of config.json that name the architecture. Raises UserError where transformers has none."""
    if config.qk_norm and mlp_bias:
        raise UserError("--adapter_type block on a base with norms of query and key (Qwen3) needs biases that no "
                        "architecture of transformers has with them: export a run with --adapter_type attn")
    if config.qk_norm:
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if config.nope_layers:
        return {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
                "no_rope_layers": [int(layer not in config.nope_layers) for layer in range(config.n_layers)]}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}


def hf_config(config: LlamaConfig, tokenizer: Tokenizer, mlp_bias: bool, dtype: torch.dtype) -> dict:
    rope = rope_entry(config.rope_scaling) if config.rope_scaling else None
    # the exported model has no window either: it ends where the base's begins to matter
    context = min(config.max_position_embeddings, config.max_context or config.max_position_embeddings)
    return {
        **family(config, mlp_bias), "torch_dtype": DTYPE_NAMES[dtype],
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": rope, "max_position_embeddings": context,
        "attention_bias": True, "mlp_bias": mlp_bias, "tie_word_embeddings": False,
        **special_ids(tokenizer)}


def write_weights(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, shard_bytes: int
                  ) -> None:
    """Writes model.safetensors, or several files of about shard_bytes and their index."""
    parts, pending, size, part_of, total = [], {}, 0, {}, 0

    def flush():
        parts.append(folder / f"model-{len(parts)}.safetensors.part")
        save_tensors(pending, parts[-1])
        part_of.update(dict.fromkeys(pending, len(parts) - 1))

    for name, tensor in tensors:
        pending[name] = tensor.detach().to(dtype).contiguous()
        size += pending[name].nbytes
        total += pending[name].nbytes
        if size >= shard_bytes:
            flush()
            pending, size = {}, 0
    if pending:
        flush()
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    names = names if len(parts) > 1 else ["model.safetensors"]
    for part, name in zip(parts, names, strict=True):
        os.replace(part, folder / name)
    if len(parts) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in part_of.items()}})


def check_tokenizer(tokenizer: Tokenizer, modality: str) -> None:
    """Raises UserError where transformers' LlamaTokenizer would give other ids than a SentencePiece model."""
    if isinstance(tokenizer.model, FastTokenizer):
        return
    model = tokenizer.model.model
    reason = ("drops repeated spaces" if model.encode("a  b") == model.encode("a b") else
              "puts no space before a text" if modality == "text" and not puts_space_before(model) else None)
    if reason:
        raise UserError(f"{tokenizer.path} has a SentencePiece model that {reason}, for which transformers would give "
                        "other ids: name the model's tokenizer.json with --tokenizer_path")


def puts_space_before(model) -> bool:
    return model.encode_as_pieces("a")[0].startswith("\u2581")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, modality: str) -> None:
    """A tokenizer of Hugging Face's classes that gives prompts the ids of training: it adds BOS, unless an image's
    inputs_embeds hold it, and reads no special token from text. Shorter texts of a batch begin with EOS in place of a
    padding token, which these models do not have, and which the attention mask hides."""
    model, is_json = tokenizer.model.model, isinstance(tokenizer.model, FastTokenizer)
    token = model.id_to_token if is_json else model.id_to_piece
    eos = token(tokenizer.eos_id)
    bos, without_image = None if tokenizer.bos_id is None else token(tokenizer.bos_id), modality == "text"
    with atomic_write(folder / ("tokenizer.json" if is_json else "tokenizer.model")) as part:
        if is_json:
            exported = copy.deepcopy(model)
            begin_with(exported, bos if without_image else None)
            if without_image:
                part_from_prefix(exported)
            exported.save(str(part))
        else:
            part.write_bytes(model.serialized_model_proto())
    write_json(folder / "tokenizer_config.json", {
        **({"tokenizer_class": "PreTrainedTokenizerFast"} if is_json else
           {"tokenizer_class": "LlamaTokenizer", "legacy": True, "unk_token": token(model.unk_id()),
            "add_prefix_space": puts_space_before(model)}),
        "bos_token": bos, "eos_token": eos, "pad_token": eos, "padding_side": "left",
        "add_bos_token": without_image and bos is not None, "add_eos_token": False, "split_special_tokens": True,
        "clean_up_tokenization_spaces": False})


def begin_with(model, bos: str | None) -> None:
    """Lets a tokenizer of Hugging Face's library add this token, and no other."""
    from tokenizers.processors import TemplateProcessing
    special = [] if bos is None else [bos]
    model.post_processor = TemplateProcessing(single=[*special, "$A"],
                                              special_tokens=[(token, model.token_to_id(token)) for token in special])


def part_from_prefix(model) -> None:
    """Lets the space between `Image: N/A` and the prompt keep them apart, as training tokenizes them, where it would
    become a part of the prompt's first token, as with byte-level BPE."""
    from tokenizers import Regex, pre_tokenizers
    prefix, prompt, both = (model.encode(text, add_special_tokens=False).ids
                            for text in ("Image: N/A", "Question:", "Image: N/A Question:"))
    if both != prefix + prompt:
        space = pre_tokenizers.Split(Regex(r"(?<=\AImage: N/A) "), "removed")
        model.pre_tokenizer = pre_tokenizers.Sequence([space, *filter(None, [model.pre_tokenizer])])


def picture_names(paths: list[Path]) -> list[str]:
    """The names of the output files: each picture's stem, behind as many of its folders as tell all apart, since
    ScienceQA's pictures are all image.png. Raises UserError where folders do not tell them apart."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    parts = [[*path.parts[1:-1], path.stem] for path in absolute]
    for depth in range(1, 1 + max(map(len, parts), default=1)):
        names = ["_".join(folders[-depth:]) for folders in parts]
        if len(set(names)) == len(names):
            return names
    path = next(path for i, path in enumerate(paths) if names[i] in names[:i])
    raise UserError(f"--pictures: the output file of {path} would be that of another: rename one, or name it once")


@torch.no_grad()
def image_embeddings(model: LaVIN, tokenizer: Tokenizer, path: Path) -> torch.Tensor:
    """`[BOS] Image: ` and the image's projected features [tokens, D]."""
    try:
        image = load_image(path, model.vision.image_size)
    except IMAGE_ERRORS as error:
        raise UserError(f"--pictures {path} is missing or does not decode ({error}): name another") from error
    prefix = tokenizer.prefix(model.adapter.n_prompt)
    return model.embed(pack([Example(prefix, len(prefix), image)]))


def main(args: Flags) -> None:
    if args.pictures and args.modality != "image":
        raise UserError("--pictures needs --modality image")
    names = picture_names(args.pictures)
    args.given.add("bits")  # else the run's would be taken: of weights in 8 bits, the 16-bit ones are exported
    if args.bits != "16bit" or args.model_parallel_size > 1:
        raise UserError("weights are exported whole, in 16 or 32 bits: leave --bits and --model_parallel_size out")
    if (args.out / "config.json").exists():
        raise UserError(f"--out {args.out} holds a model: name another folder")
    make_folder(args.out)
    model, tokenizer, path = load_plain_model(args)
    family(model.llama.config, has_mlp_bias(model))  # refuses what cannot be exported, before anything is written
    check_tokenizer(tokenizer, args.modality)
    for picture, name in zip(args.pictures, names, strict=True):
        save_tensors({"inputs_embeds": image_embeddings(model, tokenizer, picture)},
                     args.out / f"{name}.inputs_embeds.safetensors")
    tensors = progress_bar(merged_tensors(model, MODALITIES.index(args.modality)), "tensors", unit="tensor")
    write_weights(args.out, tensors, model.dtype, SHARD_BYTES)
    write_tokenizer(args.out, tokenizer, args.modality)
    write_json(args.out / "generation_config.json", special_ids(tokenizer))
    write_json(args.out / "config.json", hf_config(model.llama.config, tokenizer, has_mlp_bias(model), model.dtype))
    checkpoint = path or Path(args.adapter_path)
    print_rank0(f"{args.out}: {checkpoint.name} for questions {'with' if args.modality == 'image' else 'without'} "
                f"a picture, {DTYPE_NAMES[model.dtype]}")


if __name__ == "__main__":
    with one_line_errors():
        args = get_args_parser().parse_args()
        with working_on(args.out.name):
            main(args)
