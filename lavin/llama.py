"""LLaMA: one decoder for training, prefill and decoding.

Notable:
- All documents of a pass lie behind one another in one *packed row* of tokens [N, D]; nothing is padded.
- What a token attends to is not the decoder's business: every layer hands its query, key and value to its part of
  the pass's *plan*, which knows where documents begin (`PackedPlan`) or keeps a cache (lavin/session.py).
- Meta's names and layouts: rotary embeddings turn adjacent pairs, `wq wk wv wo`, `w1 w2 w3`.

Touvron et al. 2023, arXiv 2302.13971; rotary embeddings: Su et al. 2021, arXiv 2104.09864.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavin.attention import packed_attention
from lavin.precision import send

LAYERS_AT_ONCE = 2  # compiled as one program, which spares the host; recomputed as one with gradient checkpointing


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's longer rotary waves (Dubey et al. 2024, arXiv 2407.21783): those that do not turn `high_freq_factor`
    times within the first training's context become `factor` times as long, below `low_freq_factor` turns in full."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA, under the names of Meta's params.json; below those, what only other formats may say."""

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
    d_head: int | None = None  # width of a head, where it is not dim / n_heads
    d_ff: int | None = None  # width of the feed-forward layer, where multiple_of does not make it

    @classmethod
    def from_params(cls, params: dict, vocab_size: int) -> "LlamaConfig":
        """Reads the contents of params.json; `vocab_size` is the tokenizer's, used where params.json says -1.

        Raises ValueError on entries that this decoder does not know, since ignoring one would change the model.
        """
        known = {field.name for field in fields(cls)} - {"rope_scaling", "d_head", "d_ff"}
        unknown = set(params) - known - {"use_scaled_rope", "rope_scaling_factor"}
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        shape = {name: value for name, value in params.items() if name in known}
        if shape.get("vocab_size", -1) < 0:
            shape["vocab_size"] = vocab_size
        if params.get("use_scaled_rope"):
            # Meta's files leave the factor to the code: 8 in Llama 3.1 and 3.3, 32 in the small models of 3.2
            factor = params.get("rope_scaling_factor", 8 if shape.get("dim", 0) >= 4096 else 32)
            shape["rope_scaling"] = RopeScaling(factor)
        return cls(**shape)

    @property
    def head_dim(self) -> int:
        return self.d_head or self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: two thirds of 4 D, rounded up to `multiple_of`."""
        if self.d_ff is not None:
            return self.d_ff
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rotary_frequencies(config: LlamaConfig, device=None) -> torch.Tensor:
    """Radians a position by which each pair of a head turns [head_dim / 2], float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta ** -exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return frequencies / scaling.factor + kept.clamp(0, 1) * (frequencies - frequencies / scaling.factor)


def rotary_angles(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [N, 1, head_dim], float32, of each entry and of its pair's other entry, for integer positions [N]."""
    angles = positions.float()[:, None, None] * frequencies
    sin = angles.sin()
    return angles.cos().repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def apply_rotary(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns the adjacent pairs of x [N, heads, head_dim] by their angles, in float32."""
    cos, sin = rotary
    x32 = x.float()
    return (x32 * cos + x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin).to(x.dtype)


class PackedPlan:
    """Documents behind one another in a row; each token attends to its own document's past.

    lengths: tokens of each document. starts: rotary position of each document's first token (default 0).
    """

    def __init__(self, lengths: list[int], device, starts: list[int] | None = None):
        self.lengths, self.count, self.longest = lengths, len(lengths), max(lengths)
        counts = torch.tensor(lengths)
        documents = torch.arange(len(lengths)).repeat_interleave(counts)
        ends = counts.cumsum(0)
        places = torch.arange(len(documents)) - (ends - counts)[documents]
        self.documents = send(documents, device)  # [N]: whose token each is
        self.places = send(places, device)  # [N]: which of its document's tokens each is
        self.positions = self.places if starts is None else send(places + torch.tensor(starts)[documents], device)
        self.offsets = send(F.pad(ends, (1, 0)).int(), device)  # [documents + 1]: where they begin

    def of(self, layer: int):
        """What a layer needs of the plan; here that is the same for all."""
        return self

    def attend(self, query, key, value):
        """[N, H, d], [N, H_kv, d], [N, H_kv, d] -> [N, H, d]."""
        return packed_attention(query.device, query.dtype, query.shape[-1])(query, key, value, self)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def project(self, x):
        """[N, D] -> query [N, H, d], key and value [N, H_kv, d]."""
        return (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))

    def forward(self, x, rotary, plan):
        query, key, value = self.project(x)
        out = plan.attend(apply_rotary(query, rotary), apply_rotary(key, rotary), value)
        return self.wo(out.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder layer. Subclasses may change what attention and feed-forward read.

    drop_path: probability of leaving out a residual branch for a whole document in training
    (stochastic depth, Huang et al. 2016, arXiv 1603.09382).
    """

    def __init__(self, config: LlamaConfig, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def attention_input(self, x, side):
        return self.attention_norm(x)

    def feed_forward_input(self, x, side):
        return self.ffn_norm(x)

    def residual(self, x, branch, plan):
        if self.training and self.drop_path > 0:
            keep = torch.rand(plan.count, 1, device=x.device) >= self.drop_path
            branch = branch * (keep / (1 - self.drop_path)).to(x.dtype)[plan.documents]
        return x + branch

    def forward(self, x, rotary, plan, side=None):
        x = self.residual(x, self.attention(self.attention_input(x, side), rotary, plan), plan)
        return self.residual(x, self.feed_forward(self.feed_forward_input(x, side)), plan)


def run_blocks(blocks, x, rotary, plans, sides):
    """Some layers behind one another."""
    for block, plan, side in zip(blocks, plans, sides):
        x = block(x, rotary, plan, side)
    return x


class Llama(nn.Module):
    """The decoder. `make_block(config, layer)` builds its layers.

    run_blocks: may be replaced by a faster function that does the same (lavin/fast.py).
    """

    def __init__(self, config: LlamaConfig, make_block=lambda config, layer: Block(config)):
        super().__init__()
        self.config = config
        self.run_blocks = run_blocks
        self.gradient_checkpointing = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(make_block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x, plan, side=None):
        """Embedded tokens [N, D] -> normalised last hidden states [N, D]; `output` turns those into logits.

        plan: see PackedPlan. side: for subclasses of Block, handed unread to every layer. Each layer gets its own
        part of both, `.of(layer)`.
        """
        rotary = rotary_angles(plan.positions, rotary_frequencies(self.config, plan.positions.device))
        for first in range(0, len(self.layers), LAYERS_AT_ONCE):
            layers = range(first, min(first + LAYERS_AT_ONCE, len(self.layers)))
            part = ([self.layers[i] for i in layers], x, rotary, [plan.of(i) for i in layers],
                    [side and side.of(i) for i in layers])
            if self.gradient_checkpointing and self.training:
                x = checkpoint(self.run_blocks, *part, use_reentrant=False)
            else:
                x = self.run_blocks(*part)
        return self.norm(x)
