"""Writes a run as a plain Hugging Face LLaMA: the adapters folded into the frozen weights, for one modality.

    python tools/export_hf.py --adapter_path RUN --out FOLDER [--precision fp16]
    python tools/export_hf.py --adapter_path RUN --out FOLDER --modality image [--pictures FILE ...]

In each layer the router's mixture (w0, w1) depends on the modality alone, so for one modality an adapter is the affine
map `y = x + s U (A x + a) + s (w0 b + w1 e)`, U = w0 B + w1 E, and what reads it, `W y`, is `(W + s W U A) x` + a bias.
So the answers are the same up to rounding. The modality token is left out: it stands at position 0, and nothing attends
to it; what follows then begins at 0 in place of 1, and rotary attention sees differences of positions only.

Prompts are those of training: `[BOS] Image: N/A` and the prompt; or, embedded, a picture's NAME.inputs_embeds.safetensors
(`inputs_embeds` [tokens, D]: `[BOS] Image: ` and the picture's features) and the prompt.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from eval import load_model  # noqa: E402
from lavin.base_weights import HF_NAMES, find_tokenizer  # noqa: E402
from lavin.errors import UserError, one_line_errors  # noqa: E402
from lavin.llama import LlamaConfig  # noqa: E402
from lavin.mm_adapter import RepAdapterRouter  # noqa: E402
from lavin.model import LaVIN, pack  # noqa: E402
from lavin.tokenizer import Example, Tokenizer  # noqa: E402
from util.datasets import PICTURE_ERRORS, load_picture  # noqa: E402
from util.files import write_json  # noqa: E402
from util.flags import shared_flags  # noqa: E402
from util.logging import progress, say  # noqa: E402

MODALITIES = ("text", "image")
SHARD_BYTES = 4 * 2**30
TORCH_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def get_args_parser() -> argparse.ArgumentParser:
    shared = shared_flags()
    parser = argparse.ArgumentParser("export_hf.py", description=__doc__.splitlines()[0], parents=[shared], epilog=(
        "Flags of model and data that are left out are those of the training run."))
    parser.set_defaults(**{**dict.fromkeys(vars(shared.parse_args([]))), "precision": "fp16", "device": "cpu",
                           "bits": "16bit"})
    add = parser.add_argument
    add("--adapter_path", required=True, help="a checkpoint, or a run's folder")
    add("--tokenizer_path", help="tokenizer.model or tokenizer.json (the base model's)")
    add("--out", required=True, type=Path, help="the folder to write")
    add("--modality", default="text", choices=MODALITIES, help="questions without a picture, or with one (text)")
    add("--pictures", nargs="+", default=[], type=Path, help="pictures to be written as inputs_embeds beside the model")
    return parser


# --- folding ---

def fold(adapter: RepAdapterRouter, mixture: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What reads an adapter's output, weight [O, D], made to read its input: weight [O, D] and bias [O], float32."""
    down, a, up = adapter.matrices(torch.float32)
    first, second, biases = up[:, :2 * len(a) + 2].split([len(a), len(a), 2], dim=1)
    up = mixture[0] * first + mixture[1] * second
    offset = up @ a + biases @ mixture
    weight = weight.float()
    return weight + (weight @ up) @ down, weight @ offset


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection from adjacent rotary pairs to Hugging Face's halves of a head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def hf_name(name: str) -> str:
    """Our name -> that of a LlamaForCausalLM."""
    for theirs, ours in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


@torch.no_grad()
def folded_tensors(model: LaVIN, modality: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a LlamaForCausalLM, one at a time."""
    config, table = model.llama.config, model.routing_table()
    heads = {"wq": config.n_heads, "wk": config.kv_heads}
    readers = {"wq": "adapter_attn", "wk": "adapter_attn", "wv": "adapter_attn"}
    if model.adapter.adapter_type == "block":
        readers |= {"w1": "adapter_mlp", "w3": "adapter_mlp"}
    biased = {*readers, "wo", *({"w2"} if "w1" in readers else ())}  # Hugging Face's flags put a bias on these too
    for name, parameter in model.llama.named_parameters():
        if "adapter" in name:
            continue
        kind, weight, bias = name.split(".")[-2], parameter, torch.zeros(len(parameter))
        if kind in readers:
            layer = int(name.split(".")[1])
            adapter = getattr(model.llama.layers[layer], readers[kind])
            mixture, *_ = table[layer][readers[kind]]
            weight, bias = fold(adapter, mixture[modality], weight)
        if kind in heads:
            weight, bias = halves(weight, heads[kind]), halves(bias, heads[kind])
        yield hf_name(name), weight
        if kind in biased:
            yield hf_name(name).replace(".weight", ".bias"), bias


# --- the folder ---

def hf_config(config: LlamaConfig, tokenizer: Tokenizer, block: bool, dtype: torch.dtype) -> dict:
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": TORCH_NAMES[dtype],
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_context},
        "max_position_embeddings": int(scaling.factor * scaling.original_context) if scaling else 2048,
        "attention_bias": True, "mlp_bias": block, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def write_weights(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, shard_bytes: int
                  ) -> None:
    """model.safetensors, or several files of about shard_bytes and their index."""
    parts, pending, size, places, total = [], {}, 0, {}, 0

    def flush():
        parts.append(folder / f"model-{len(parts)}.safetensors.part")
        save_file(pending, parts[-1], metadata={"format": "pt"})
        places.update(dict.fromkeys(pending, len(parts) - 1))

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
    for part, name in zip(parts, names):
        os.replace(part, folder / name)
    if len(parts) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in places.items()}})


def write_tokenizer(folder: Path, path: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's file, and what Hugging Face's classes need beside it."""
    shutil.copy(path, folder / path.name)
    if path.suffix == ".json":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if path.with_name(name).is_file():
                shutil.copy(path.with_name(name), folder)
        return
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False})


@torch.no_grad()
def picture_embeddings(model: LaVIN, tokenizer: Tokenizer, path: Path) -> torch.Tensor:
    """`[BOS] Image: ` and the picture's projected features [tokens, D]."""
    try:
        image = load_picture(path, model.vision.image_size)
    except PICTURE_ERRORS as error:
        raise UserError(f"--pictures {path} is missing or does not decode ({error}): name another") from error
    prefix = tokenizer.prefix(model.adapter.n_prompt)
    return model.embed(pack([Example(prefix, len(prefix), image)]))


def main(args) -> None:
    if args.pictures and args.modality != "image":
        raise UserError("--pictures needs --modality image")
    if len({picture.stem for picture in args.pictures}) < len(args.pictures):
        raise UserError("--pictures: two have the same name, and so would their files: rename one")
    if args.bits != "16bit" or (args.model_parallel_size or 1) > 1:
        raise UserError("the folder holds whole weights in 16 or 32 bits: leave --bits and --model_parallel_size out")
    if (args.out / "config.json").exists():
        raise UserError(f"--out {args.out} holds a model: name another folder")
    model, tokenizer, path = load_model(args, fast=False)
    args.out.mkdir(parents=True, exist_ok=True)
    for picture in args.pictures:
        save_file({"inputs_embeds": picture_embeddings(model, tokenizer, picture)},
                  args.out / f"{picture.stem}.inputs_embeds.safetensors")
    tensors = progress(folded_tensors(model, MODALITIES.index(args.modality)), "tensors", unit="tensor")
    write_weights(args.out, tensors, model.dtype, SHARD_BYTES)
    source = Path(args.tokenizer_path or find_tokenizer(args.llama_model_path, args.llm_model))
    write_tokenizer(args.out, source, tokenizer)
    block = model.adapter.adapter_type == "block"
    write_json(args.out / "config.json", hf_config(model.llama.config, tokenizer, block, model.dtype))
    say(f"{args.out}: {path.name} for questions {'with' if args.modality == 'image' else 'without'} a picture, "
        f"{TORCH_NAMES[model.dtype]}")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
