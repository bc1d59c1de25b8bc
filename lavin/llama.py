"""LLaMA: one decoder for training, prefill and decoding.

Notable:
- The documents of a batch are concatenated into one packed row of tokens [N, D]; nothing is padded.
- The decoder does not know what a token attends to: every layer passes its query, key and value to the batch's
  attention metadata, which holds the document boundaries (lavin/attention.py) or a KV cache
  (lavin/generation/kv_cache.py).
- Names and layouts are Meta's: `wq wk wv wo`, `w1 w2 w3`, rotary embeddings on adjacent pairs.
- Qwen2, Qwen3, Mistral and SmolLM3 are this decoder with other values of LlamaConfig (lavin/weights/hugging_face.py).

Touvron et al. 2023, arXiv 2302.13971; rotary embeddings: Su et al. 2021, arXiv 2104.09864.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavin.runtime.arithmetic import round_up

# --- Rotary embeddings ---

class RopeScaling:
    """A way to use a model on a longer context than it was pretrained on. Fields have their names in config.json."""

    attention_factor = 1.0  # of query and key, applied with their rotation

    def scale(self, frequencies: torch.Tensor, theta: float) -> torch.Tensor:
        """Returns the scaled frequencies [head_dim / 2] for unscaled ones of the same shape, in radians a position."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    def scale(self, frequencies, theta):
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """The rope scaling of Llama 3.1 (Dubey et al. 2024, arXiv 2407.21783).

    Frequencies with fewer than `low_freq_factor` periods in the original context are divided by `factor`. Those with
    more than `high_freq_factor` periods stay, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def scale(self, frequencies, theta):
        periods = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        unscaled = (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return frequencies / self.factor + unscaled.clamp(0, 1) * (frequencies - frequencies / self.factor)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071).

    It interpolates as Llama 3.1 does, but between the pairs of a head at which `beta_slow` and `beta_fast` periods fill
    the original context. With `truncate`, these pairs are rounded to whole numbers.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def scale(self, frequencies, theta):
        n = len(frequencies)

        def pair(periods: float) -> float:
            return n * math.log(self.original_max_position_embeddings / (2 * math.pi * periods)) / math.log(theta)

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * n - 1)  # 2 n - 1: so published
        scaled = (torch.arange(n, device=frequencies.device) - low) / (high - low or 0.001)
        return torch.lerp(frequencies, frequencies / self.factor, scaled.clamp(0, 1))


# rope_theta -> context, which params.json does not tell: Llama 3, Code Llama. Llama 2 (4096) looks like LLaMA (2048)
META_CONTEXTS = {500_000: 8192, 1_000_000: 16_384}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA, under the names of Meta's params.json. The fields from `rope_scaling` on come from other
    formats.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    d_head: int | None = None  # width of a head; None: dim / n_heads
    d_ff: int | None = None  # width of the feed-forward layer; None: computed from multiple_of
    biases: tuple[str, ...] = ()  # linear layers of a block that have one; of wq, wk, wv and of w1, w3 all or none
    qk_norm: bool = False  # a norm of each head of query and key
    nope_layers: tuple[int, ...] = ()  # layers without rotary embeddings
    max_context: int | None = None  # with more tokens, the model would need a feature that this decoder lacks
    max_position_embeddings: int = 2048  # tokens that it was trained to read

    @classmethod
    def from_params(cls, params: dict, vocab_size: int) -> "LlamaConfig":
        """Makes a configuration from the contents of params.json.

        `vocab_size` is the tokenizer's, and is used where params.json says -1. Raises ValueError on unknown entries,
        since ignoring one would change the model.
        """
        names = [field.name for field in fields(cls)]
        known = set(names[:names.index("rope_scaling")])
        unknown = set(params) - known - {"use_scaled_rope", "rope_scaling_factor"}
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        shape = {name: value for name, value in params.items() if name in known}
        if shape.get("vocab_size", -1) < 0:
            shape["vocab_size"] = vocab_size
        if params.get("use_scaled_rope"):
            # Meta's files leave the factor to the code: 8 for Llama 3.1 and 3.3, 32 for the small models of 3.2
            factor = params.get("rope_scaling_factor", 8 if shape.get("dim", 0) >= 4096 else 32)
            shape["rope_scaling"] = Llama3Scaling(factor)
        context = 131_072 if "rope_scaling" in shape else META_CONTEXTS.get(shape.get("rope_theta", 0), 2048)
        return cls(**shape, max_position_embeddings=context)

    @property
    def head_dim(self) -> int:
        return self.d_head or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """The width of the feed-forward layer: `d_ff` where it is given, else 2/3 * 4 * dim rounded up to
        `multiple_of`.
        """
        if self.d_ff is not None:
            return self.d_ff
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return round_up(hidden, self.multiple_of)


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang & Sennrich 2019, arXiv 1910.07467) of x [..., dim], in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rotary_frequencies(config: LlamaConfig, device=None) -> torch.Tensor:
    """Returns the angle in radians by which each adjacent pair of a head turns a position: [head_dim / 2], float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta ** -exponents
    return config.rope_scaling.scale(frequencies, config.rope_theta) if config.rope_scaling else frequencies


def rotary_angles(positions: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and signed sin, both [N, 1, head_dim] float32, for integer positions [N].

    Entry i of a rotated head is x[i] * cos[i] + x[pair of i] * sin[i]; the sign of sin alternates within a pair.
    """
    angles = positions.float()[:, None, None] * frequencies
    sin = scale * angles.sin()
    return (scale * angles.cos()).repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def rotary_by_layer(config: LlamaConfig, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns `rotary_angles` for every layer. A layer without rotary embeddings is rotated by 0, so that fused layers
    need not know.
    """
    frequencies = rotary_frequencies(config, positions.device)
    rotary = rotary_angles(positions, frequencies, config.rope_scaling.attention_factor if config.rope_scaling else 1.0)
    unrotated = rotary_angles(positions, 0 * frequencies) if config.nope_layers else rotary
    return [unrotated if layer in config.nope_layers else rotary for layer in range(config.n_layers)]


def apply_rotary(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the adjacent pairs of x [N, heads, head_dim], in float32."""
    cos, sin = rotary
    x32 = x.float()
    return (x32 * cos + x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin).to(x.dtype)


# --- Layers ---

def add_bias(x, bias):
    return x if bias is None else x + bias


class Attention(nn.Module):
    """Multi-head attention with rotary embeddings, from x [N, D] to [N, D].

    Where there are fewer heads H_kv of key and value than heads H of query, each is shared by H / H_kv of these
    (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245).
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias="wq" in config.biases)
        self.wk = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias="wk" in config.biases)
        self.wv = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias="wv" in config.biases)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias="wo" in config.biases)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None for _ in "qk")

    def project(self, x):
        """Returns query [N, H, d], key and value [N, H_kv, d] of x [N, D]."""
        return (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))

    def query_key_value(self, x, rotary):
        """Returns query [N, H, d], key and value [N, H_kv, d] for attention, from x [N, D]."""
        query, key, value = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return apply_rotary(query, rotary), apply_rotary(key, rotary), value

    def forward(self, x, rotary, attn_metadata):
        return self.wo(attn_metadata.attend(*self.query_key_value(x, rotary)).flatten(1))


class FeedForward(nn.Module):
    """Computes SwiGLU, w2 (silu(w1 x) * w3 x), of x [N, D] (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias="w1" in config.biases)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias="w2" in config.biases)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias="w3" in config.biases)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder layer. Subclasses may change the inputs of attention and feed-forward (lavin/mm_adapter.py).

    `drop_path` is the probability of dropping a residual branch for a whole document in training (stochastic depth,
    Huang et al. 2016, arXiv 1603.09382). `routing` is passed through to the subclass, and unused here.
    """

    def __init__(self, config: LlamaConfig, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def attention_input(self, x, routing):
        return self.attention_norm(x)

    def feed_forward_input(self, x, routing):
        return self.ffn_norm(x)

    def residual(self, x, branch, attn_metadata):
        if self.training and self.drop_path > 0:
            keep = torch.rand(attn_metadata.num_docs, 1, device=x.device) >= self.drop_path
            branch = branch * (keep / (1 - self.drop_path)).to(x.dtype)[attn_metadata.document_ids]
        return x + branch

    def add_attention(self, x, rotary, attn_metadata, routing):
        return self.residual(x, self.attention(self.attention_input(x, routing), rotary, attn_metadata), attn_metadata)

    def add_feed_forward(self, x, attn_metadata, routing):
        return self.residual(x, self.feed_forward(self.feed_forward_input(x, routing)), attn_metadata)

    def forward(self, x, rotary, attn_metadata, routing=None):
        x = self.add_attention(x, rotary, attn_metadata, routing)
        return self.add_feed_forward(x, attn_metadata, routing)


def run_block(block, *inputs):
    """Runs one layer. This function is compiled once for all layers, and is the unit of gradient checkpointing."""
    return block(*inputs)


class Llama(nn.Module):
    """The decoder. `make_block(config, layer)` builds its layers."""

    def __init__(self, config: LlamaConfig, make_block=lambda config, layer: Block(config)):
        super().__init__()
        self.config = config
        self.run_block = run_block  # replaced by a compiled version in lavin/fast/speed_up.py
        self.gradient_checkpointing = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(make_block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x, attn_metadata, routing=None):
        """Turns embedded tokens [N, D] into normalised last hidden states [N, D], of which `output` makes logits.

        `attn_metadata` is a VarlenMetadata, or an object with the same methods and `position_ids`. `routing` is what
        Block describes; layer i gets `routing.for_layer(i)`.
        """
        rotary = rotary_by_layer(self.config, attn_metadata.position_ids)
        for i, layer in enumerate(self.layers):
            inputs = layer, x, rotary[i], attn_metadata.for_layer(i), routing and routing.for_layer(i)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(self.run_block, *inputs, use_reentrant=False)
            else:
                x = self.run_block(*inputs)
        return self.norm(x)
