"""Mixture-of-Modality Adaptation: the adapters, their router, and how both enter a decoder and a ViT.

Notable:
- Parameters are stored as the 1x1 convolutions of the published checkpoints and applied as one matrix product:
  both experts, their mixture, their biases and the residual together are `x + u U`, with u [N, 2r + 2].
- The decoder's router reads the two modality tokens, rows 0 and 1 of the packed row, so each layer's mixture depends
  on the modality and the parameters alone and can be kept for generation (`Routing`).

LaVIN: Luo et al. 2023, arXiv 2305.15023; RepAdapter: Luo et al. 2023, arXiv 2302.08106.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lavin.llama import Block

GROUPS = 2  # of the up-projections
# Adapters are made on the CPU, so that they are initialised even where the frozen model is only described (meta).
HOME = "cpu"


@dataclass(frozen=True)
class AdapterConfig:
    """What decides the trained parameters and their use, under the names of train.py's flags."""

    adapter_type: str = "attn"
    visual_adapter_type: str = "router"
    adapter_dim: int = 8
    adapter_scale: float = 1.0
    temperature: float = 10.0
    hidden_proj: int = 128
    n_prompt: int = 6
    dropout_prob: float = 0.1
    dropout_var: float = 1.0
    dropout_lim: float = 0.2


def dropout_schedule(n_layers: int, prob: float, var: float, lim: float) -> list[float]:
    """Dropout probability of each layer, first layer first.

    p_1 = prob; p_i = p_(i-1) * var, or lim where that product would pass it. var 1 is constant, whatever lim.
    Raises ValueError where the values make no schedule: a probability outside [0, 1), var not positive, or a limit on
    the wrong side of prob.
    """
    if n_layers < 1:
        raise ValueError(f"a schedule needs at least one layer, not {n_layers}")
    if not (0 <= prob < 1 and 0 <= lim < 1):
        raise ValueError(f"dropout_prob {prob} and dropout_lim {lim} must lie in [0, 1)")
    if not 0 < var < float("inf"):
        raise ValueError(f"dropout_var {var} must be positive and finite")
    if (var > 1 and lim < prob) or (var < 1 and lim > prob):
        side = "at or above" if var > 1 else "at or below"
        raise ValueError(f"dropout_lim {lim} must lie {side} dropout_prob {prob} when dropout_var is {var}")
    if var == 1:
        return [prob] * n_layers
    bound = min if var > 1 else max
    schedule = [prob]
    for _ in range(n_layers - 1):
        schedule.append(bound(schedule[-1] * var, lim))
    return schedule


class RepAdapter(nn.Module):
    """`x + s (B z + b)`, `z = dropout(A x + a)`: A D->r, B r->D in two groups; starts as the identity."""

    def __init__(self, dim: int, config: AdapterConfig, dropout: float):
        super().__init__()
        rank = config.adapter_dim
        if dim % GROUPS or rank % GROUPS:
            raise ValueError(f"--adapter_dim {rank} and the width {dim} must be multiples of {GROUPS}")
        self.scale = config.adapter_scale
        # a tensor, so that layers of different dropout share one compiled program
        self.register_buffer("dropout", torch.tensor(dropout, device=HOME), persistent=False)
        self.conv_A = nn.Conv1d(dim, rank, 1, device=HOME)
        self.conv_B = nn.Conv1d(rank, dim, 1, groups=GROUPS, device=HOME)
        nn.init.xavier_uniform_(self.conv_A.weight)
        for parameter in (self.conv_A.bias, self.conv_B.weight, self.conv_B.bias):
            nn.init.zeros_(parameter)

    def up(self) -> list:
        """The columns of U."""
        return [grouped(self.conv_B), self.conv_B.bias[:, None]]

    def matrices(self, dtype) -> tuple:
        """A [r, D], a [r] and s U [D, .], whose columns are filled up with zeros to a multiple of 8, which matrix
        units ask for."""
        up = torch.cat(self.up(), 1) * self.scale
        return (self.conv_A.weight[..., 0].to(dtype), self.conv_A.bias.to(dtype),
                F.pad(up.to(dtype), (0, -up.shape[1] % 8)))

    def down(self, x, weight, bias):
        """x [N, D] -> z [N, r]."""
        z = F.linear(x, weight, bias)
        if self.training:
            z = z * ((torch.rand_like(z, dtype=torch.float32) >= self.dropout) / (1 - self.dropout)).to(z.dtype)
        return z

    @staticmethod
    def add(x, u: list, up):
        """x + s u U."""
        u = torch.cat(u, 1)
        return x + F.linear(F.pad(u, (0, up.shape[1] - u.shape[1])), up)

    def forward(self, x):
        """x [N, D] -> [N, D]."""
        *down, up = self.matrices(x.dtype)
        z = self.down(x, *down)
        return self.add(x, [z, torch.ones_like(z[:, :1])], up)


def grouped(conv):
    """The grouped convolution as a block-diagonal matrix [D, r]."""
    return torch.block_diag(*conv.weight[..., 0].chunk(GROUPS))


class RepAdapterRouter(RepAdapter):
    """`x + s w0 (B z + b) + s w1 (E z + e)`, with `(w0, w1) = softmax((W h + c) / t)` given as a mixture."""

    def __init__(self, dim: int, config: AdapterConfig, dropout: float):
        super().__init__(dim, config, dropout)
        self.temperature = config.temperature
        self.conv_D = nn.Conv1d(config.adapter_dim, dim, 1, groups=GROUPS, device=HOME)
        nn.init.zeros_(self.conv_D.weight)
        nn.init.zeros_(self.conv_D.bias)
        self.expert_weights = nn.Linear(dim, 2, device=HOME)

    def mixture(self, h):
        """Router input h [M, D] -> expert mixture [M, 2], float32."""
        return (self.expert_weights(h.float()) / self.temperature).softmax(-1)

    def up(self):
        return [grouped(self.conv_B), grouped(self.conv_D), self.conv_B.bias[:, None], self.conv_D.bias[:, None]]

    def forward(self, x, mixture, matrices=None):
        """x [N, D], mixture [N, 2] -> [N, D]. matrices: of this adapter in x's type, where they are known."""
        *down, up = matrices or self.matrices(x.dtype)
        z, w = self.down(x, *down), mixture.to(x.dtype)
        return self.add(x, [z * w[:, :1], z * w[:, 1:], w], up)


@dataclass
class Routing:
    """Gives every row of a pass its expert mixture, by modality.

    rows [N, 2] float32: each row's modality, one-hot: a product with it picks mixtures, and its gradient repeats itself.
    table: for every layer, by the adapter's name, mixtures [2, 2] and the adapter's matrices; what it lacks is computed
    from rows 0 and 1, which must then be the two modality tokens, and kept in it. Without a table nothing is kept.
    """

    rows: torch.Tensor
    table: list[dict] | None = None

    @classmethod
    def of_rows(cls, modality: torch.Tensor, table: list[dict] | None = None) -> "Routing":
        """modality [N]: 0 text, 1 image, for each row."""
        return cls(F.one_hot(modality, 2).float(), table)

    def of(self, layer: int):
        return LayerRouting(self.rows, self.table and self.table[layer])


@dataclass
class LayerRouting:
    """One layer's part of Routing."""

    rows: torch.Tensor
    known: dict[str, tuple] | None

    def beside(self, name: str, adapter: RepAdapterRouter, x) -> tuple:
        """What an adapter takes beside x: its mixture and matrices."""
        known = {} if self.known is None else self.known
        if name not in known:
            known[name] = adapter.mixture(x[:2]), *adapter.matrices(x.dtype)
        mixture, *matrices = known[name]
        return self.rows @ mixture, matrices


class AdaptedBlock(Block):
    """A decoder layer whose attention (`attn`), and feed-forward too (`block`), read through an adapter."""

    def __init__(self, config, drop_path: float, adapter: AdapterConfig, dropout: float):
        super().__init__(config, drop_path)
        self.adapter_attn = RepAdapterRouter(config.dim, adapter, dropout)
        self.adapter_mlp = RepAdapterRouter(config.dim, adapter, dropout) if adapter.adapter_type == "block" else None

    def adapt(self, name: str, x, routing):
        adapter = getattr(self, name)
        return x if adapter is None else adapter(x, *routing.beside(name, adapter, x))

    def attention_input(self, x, routing):
        return self.adapt("adapter_attn", super().attention_input(x, routing), routing)

    def feed_forward_input(self, x, routing):
        return self.adapt("adapter_mlp", super().feed_forward_input(x, routing), routing)


def adapted_block(adapter: AdapterConfig, n_layers: int, drop_path: float = 0.0):
    """`make_block` for lavin.llama.Llama: every layer with its adapters, dropout by the depth schedule."""
    dropout = dropout_schedule(n_layers, adapter.dropout_prob, adapter.dropout_var, adapter.dropout_lim)
    return lambda config, layer: AdaptedBlock(config, drop_path, adapter, dropout[layer])


class AdaptedNorm(nn.Module):
    """A ViT block's norm followed by an adapter; each position of each image is routed by its own state."""

    def __init__(self, norm: nn.Module, adapter: RepAdapter):
        super().__init__()
        self.norm, self.adapter = norm, adapter

    def forward(self, x):
        """x [I, T, D] -> [I, T, D]."""
        x = self.norm(x)
        rows = x.flatten(0, 1)
        mixture = (self.adapter.mixture(rows),) if isinstance(self.adapter, RepAdapterRouter) else ()
        return self.adapter(rows, *mixture).view_as(x)


def adapt_vit(vit: nn.Module, adapter: AdapterConfig) -> None:
    """Puts an adapter before attention (and, `router_block`, before the MLP) of every block of a timm ViT."""
    kind = RepAdapter if adapter.visual_adapter_type == "normal" else RepAdapterRouter
    dropout = dropout_schedule(len(vit.blocks), adapter.dropout_prob, adapter.dropout_var, adapter.dropout_lim)
    for block, p in zip(vit.blocks, dropout):
        block.norm1 = AdaptedNorm(block.norm1, kind(vit.embed_dim, adapter, p))
        if adapter.visual_adapter_type == "router_block":
            block.norm2 = AdaptedNorm(block.norm2, kind(vit.embed_dim, adapter, p))


class VisualProjection(nn.Module):
    """`adapter_proj`: CLS features [..., width] -> token embeddings [..., D], through SiLU."""

    def __init__(self, width: int, hidden: int, dim: int):
        super().__init__()
        self.conv_A = nn.Linear(width, hidden, device=HOME)
        self.conv_B = nn.Linear(hidden, dim, device=HOME)
        for layer in (self.conv_A, self.conv_B):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features):
        return self.conv_B(F.silu(self.conv_A(features)))
