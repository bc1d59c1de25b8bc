"""LLaMA from the files of others: Meta's shards, Hugging Face's folders, Vicuna's differences.

Each format is a mapping from our names to tensors that are read, joined and turned one at a time, when asked for.
A base model is a folder: `--llama_model_path`/`--llm_model`, or `--llm_model` itself where that is a folder's path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lavin.errors import UserError
from lavin.llama import LlamaConfig, RopeScaling
from lavin.tensor_files import hf_weight_files, read_hf_folder, read_json, read_torch

# dimension on which the shards of Meta's files join; the norms are copies
SHARD_DIMS = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
COMPUTED = ("rope.freqs", "rotary_emb.inv_freq")  # in some files; here they follow from the configuration
BY_TOKEN = ("tok_embeddings.weight", "output.weight")  # a row for each piece of the tokenizer

HF_NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
            "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")  # in config.json


@dataclass(frozen=True)
class BaseWeights:
    """A LLaMA on disk. where: what errors call its files."""

    config: LlamaConfig
    tensors: Mapping[str, torch.Tensor]
    where: str


def base_folder(llama_model_path: str, llm_model: str) -> Path:
    folder = Path(llama_model_path, llm_model)
    return Path(llm_model) if not folder.is_dir() and Path(llm_model).is_dir() else folder


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "params.json").is_file()


def find_tokenizer(llama_model_path: str, llm_model: str) -> Path:
    """The tokenizer beside the weights, where a model brings its own, or LLaMA's above them."""
    folder = base_folder(llama_model_path, llm_model)
    own = [path for path in (folder / "tokenizer.model", folder / "tokenizer.json") if path.is_file()]
    return own[0] if own else Path(llama_model_path, "tokenizer.model")


def find_delta(folder: Path, use_vicuna: bool) -> Path | None:
    """The folder of Vicuna's differences, which stands beside LLaMA's as `vicuna_NAME`.

    None without --use_vicuna, and where `folder` holds Vicuna's full weights, in Hugging Face's format. Raises
    UserError where there is neither.
    """
    delta = folder.with_name(f"vicuna_{folder.name}")
    if not use_vicuna or (is_hugging_face(folder) and not delta.is_dir()):
        return None
    if not delta.is_dir():
        raise UserError(f"--use_vicuna: no folder {delta}: put Vicuna's v0 delta there, or name a folder of Vicuna's "
                        "full weights with --llm_model")
    return delta


def require_base(llama_model_path: str, llm_model: str, tokenizer_path: str | None = None,
                 use_vicuna: bool = False) -> None:
    """Raises UserError that names the first missing file of a base model, before anything slow begins."""
    folder = base_folder(llama_model_path, llm_model)
    needed = [Path(tokenizer_path or find_tokenizer(llama_model_path, llm_model))]
    if is_hugging_face(folder):
        hf_weight_files(folder)
    else:
        needed = [folder / "params.json", folder / "consolidated.00.pth", *needed]
    for path in needed:
        if not path.is_file():
            raise UserError(f"missing {path}: put LLaMA's {path.name} there, "
                            "or name another place with --llama_model_path and --llm_model")
    delta = find_delta(folder, use_vicuna)
    if delta:
        hf_weight_files(delta)


def open_base(folder: Path, vocab_size: int, use_vicuna: bool = False) -> BaseWeights:
    """vocab_size: the tokenizer's, where Meta's params.json says -1. Raises UserError for faulty files."""
    base = open_hugging_face(folder) if is_hugging_face(folder) else open_meta(folder, vocab_size)
    delta = find_delta(folder, use_vicuna)
    return add_delta(base, open_hugging_face(delta)) if delta else base


# --- Meta ---

def shard_dim(name: str) -> int | None:
    """Dimension along which a tensor is split over processes; None: every one has it all."""
    return next((SHARD_DIMS[part] for part in name.split(".") if part in SHARD_DIMS), None)


class MetaShards(Mapping):
    """consolidated.*.pth: every shard holds each tensor's part, along one dimension."""

    def __init__(self, shards: list[dict[str, torch.Tensor]], dim: int):
        self.shards, self.dim = shards, dim

    def __iter__(self):
        return (name for name in self.shards[0] if not name.endswith(COMPUTED))

    def __len__(self):
        return sum(1 for _ in self)

    def joined_on(self, name: str) -> int | None:
        if name == "tok_embeddings.weight" and self.shards[0][name].shape[1] == self.dim:
            return 0  # Llama 3 splits the vocabulary
        return shard_dim(name)

    def __getitem__(self, name):
        parts, joined = [shard[name] for shard in self.shards], self.joined_on(name)
        return parts[0] if len(parts) == 1 or joined is None else torch.cat(parts, joined)


def open_meta(folder: Path, vocab_size: int) -> BaseWeights:
    params = folder / "params.json"
    try:
        config = LlamaConfig.from_params(read_json(params), vocab_size)
    except (ValueError, TypeError) as error:
        raise UserError(f"{params} does not describe a LLaMA ({error}): fetch or copy it again") from error
    paths = sorted(folder.glob("consolidated.*.pth"))
    shards = [read_torch(path) for path in paths]
    for path, shard in zip(paths, shards):
        if shard.keys() != shards[0].keys():
            raise UserError(f"{path} does not hold the same tensors as {paths[0].name}: fetch or copy it again")
    return BaseWeights(config, MetaShards(shards, config.dim), f"{folder}/consolidated.*.pth ({len(paths)} files)")


# --- Hugging Face ---

def adjacent_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection from Hugging Face's rotary layout, which pairs a head's halves, to ours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class HuggingFaceLlama(Mapping):
    """The tensors of a LlamaForCausalLM. tied: the output projection is the embedding."""

    def __init__(self, tensors: dict[str, torch.Tensor], config: LlamaConfig, tied: bool):
        self.heads = {"wq": config.n_heads, "wk": config.kv_heads}
        self.head_dim = config.head_dim
        self.tensors = {self.our_name(name): tensor for name, tensor in tensors.items() if not name.endswith(COMPUTED)}
        if tied and "tok_embeddings.weight" in self.tensors:  # frozen, so one may be split or quantized, and one not
            self.tensors["output.weight"] = self.tensors["tok_embeddings.weight"]

    @staticmethod
    def our_name(name: str) -> str:
        for theirs, ours in HF_NAMES.items():
            name = name.replace(theirs, ours)
        return name.removeprefix("model.")

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, name):
        tensor, heads = self.tensors[name], self.heads.get(name.split(".")[-2])
        # rows of another number are of another model, which whoever knows the shapes will say
        return adjacent_pairs(tensor, heads) if heads and len(tensor) == heads * self.head_dim else tensor


def read_rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, as written before transformers 5 (rope_theta, rope_scaling) and since (rope_parameters).

    Raises ValueError for kinds of scaling other than Llama 3's.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope scaling of type {kind!r}; 'llama3' alone is known here")
    return theta, RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                              rope["original_max_position_embeddings"])


def llama_config(config: dict) -> LlamaConfig:
    """config.json of a LlamaForCausalLM. Raises ValueError on what this decoder does not compute, KeyError on gaps."""
    if config.get("model_type") != "llama":
        raise ValueError(f"model_type {config.get('model_type')!r}; 'llama' alone is known here")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            raise ValueError(f"{name} is set, which this decoder does not have")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r}; 'silu' alone is known here")
    sizes = [config[name] for name in SIZES]
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"{', '.join(SIZES)} are {sizes}")
    theta, scaling = read_rope(config)
    *shape, d_ff = sizes
    return LlamaConfig(*shape, config.get("num_key_value_heads"), norm_eps=config.get("rms_norm_eps", 1e-6),
                       rope_theta=theta, rope_scaling=scaling, d_head=config.get("head_dim"), d_ff=d_ff)


def open_hugging_face(folder: Path) -> BaseWeights:
    path = folder / "config.json"
    content = read_json(path)
    try:
        config = llama_config(content)
    except KeyError as error:
        raise UserError(f"{path} has no entry {error}: fetch or copy it again") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} describes no LLaMA that loads here ({error}): name another --llm_model") from error
    tied = bool(content.get("tie_word_embeddings", False))
    return BaseWeights(config, HuggingFaceLlama(read_hf_folder(folder), config, tied), str(folder))


# --- Vicuna v0 ---

class SummedWeights(Mapping):
    """Weights and their differences, added in float32; without v0's row for [PAD], a piece that LLaMA lacks."""

    def __init__(self, base: BaseWeights, delta: BaseWeights):
        self.base, self.delta = base, delta

    def __iter__(self):
        return iter(self.base.tensors)

    def __len__(self):
        return len(self.base.tensors)

    def __getitem__(self, name):
        weight, difference = self.base.tensors[name], self.delta.tensors[name]
        if name in BY_TOKEN:
            difference = difference[:len(weight)]
        if weight.shape != difference.shape:
            raise UserError(f"{self.delta.where}: {name} is {list(difference.shape)} and {self.base.where} has "
                            f"{list(weight.shape)}: it is the delta of another model")
        return weight.float() + difference.float()


def add_delta(base: BaseWeights, delta: BaseWeights) -> BaseWeights:
    different = sorted(base.tensors.keys() ^ delta.tensors.keys())
    if different:
        raise UserError(f"{delta.where} and {base.where} do not hold the same tensors ({different[0]}): "
                        "it is the delta of another model")
    if delta.tensors["norm.weight"].float().mean() > base.tensors["norm.weight"].float().mean() / 2:
        raise UserError(f"--use_vicuna: {delta.where} holds full weights, not differences: name it with --llm_model "
                        "and leave the flag out")
    return BaseWeights(base.config, SummedWeights(base, delta), f"{base.where} + {delta.where}")
