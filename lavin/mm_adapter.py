"""Mixture-of-Modality Adaptation: the adapters, their router, and how both enter a decoder and a ViT.

Notable:
- Parameters are stored as the 1x1 convolutions of the published checkpoints, but applied as two matrix products: down
  to z [N, r], then both experts, their mixture, biases and residual at once as `x + u U^T`, with u [N, 2r + 2].
- The decoder's router reads the two modality tokens, rows 0 and 1 of the packed row. So each layer's mixture depends
  only on the modality and the parameters, and can be cached for generation (lavin/routing_cache.py).

LaVIN: Luo et al. 2023, arXiv 2305.15023; RepAdapter: Luo et al. 2023, arXiv 2302.08106.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lavin.llama import Block, Llama
from lavin.runtime.flags import FlagGroup, Role, flag
from lavin.runtime.schema import Factor, Positive, Probability, Width

GROUPS = 2  # of the up-projections
MODALITIES = 2  # text, image
INIT_DEVICE = "cpu"  # adapters are initialised here even while the frozen model is built on the meta device


@dataclass(frozen=True)
class AdapterShape(FlagGroup):
    """The shapes of the trained parameters, and the numbers that change how they are used.

    A checkpoint without one of these fields was trained with the field's default.
    """

    title: ClassVar[str] = "adapters"
    adapter_type: str = flag("attn", "adapters in LLaMA: before attention, or also before the feed-forward layer",
                             Role.MODEL, choices=("attn", "block"))
    visual_adapter_type: str = flag("router", "adapters in the ViT", Role.MODEL,
                                    choices=("normal", "router", "router_block"))
    adapter_dim: Width = flag(8, "rank of the adapters", Role.MODEL)
    adapter_scale: Factor = flag(1.0, "scale of the adapters' output", Role.MODEL, reloadable=True)
    temperature: Factor = flag(10.0, "router temperature: 10 for 7B, 5 for 13B", Role.MODEL, reloadable=True)
    hidden_proj: Width = flag(128, "hidden width of the image projection", Role.MODEL)
    n_prompt: Width = flag(6, "number of image features; must divide the ViT's depth", Role.MODEL)


@dataclass(frozen=True)
class AdapterConfig(AdapterShape):
    """The settings with which adapters are trained: AdapterShape, and the dropout of each layer (`dropout_schedule`).
    """

    dropout_prob: Probability = flag(0.1, "adapter dropout of the first layer", Role.RECIPE, named=False)
    dropout_var: Positive = flag(1.0, "factor of the dropout from each layer to the next", Role.RECIPE, named=False)
    dropout_lim: Probability = flag(0.2, "limit at which the dropout stops growing or falling", Role.RECIPE,
                                    named=False)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=INIT_DEVICE)


def dropout_schedule(n_layers: int, prob: float, var: float, lim: float) -> list[float]:
    """Returns the dropout probability of each layer, first layer first.

    p_1 = prob; p_i = p_(i-1) * var, clipped at lim. With var 1 the schedule is constant and lim is unused. Raises
    ValueError for a probability outside [0, 1), a var that is not positive and finite, and a lim below prob with var >
    1 or above it with var < 1.
    """
    if n_layers < 1:
        raise ValueError(f"a schedule needs at least one layer, not {n_layers}")
    if not (0 <= prob < 1 and 0 <= lim < 1):
        raise ValueError(f"--dropout_prob {prob} and --dropout_lim {lim} must lie in [0, 1)")
    if not 0 < var < float("inf"):
        raise ValueError(f"--dropout_var {var} must be positive and finite")
    if (var > 1 and lim < prob) or (var < 1 and lim > prob):
        side = "at or above" if var > 1 else "at or below"
        raise ValueError(f"--dropout_lim {lim} must lie {side} --dropout_prob {prob} where --dropout_var is {var}")
    if var == 1:
        return [prob] * n_layers
    bound = min if var > 1 else max
    schedule = [prob]
    for _ in range(n_layers - 1):
        schedule.append(bound(schedule[-1] * var, lim))
    return schedule


class RepAdapter(nn.Module):
    """Computes `x + s (B z + b)` with `z = dropout(A x + a)`. A maps D to r, and B maps r to D in two groups.

    It is initialised to the identity.
    """

    def __init__(self, dim: int, config: AdapterConfig, dropout: float):
        super().__init__()
        rank = config.adapter_dim
        if dim % GROUPS or rank % GROUPS:
            raise ValueError(f"--adapter_dim {rank} and the width {dim} must be multiples of {GROUPS}")
        # they are tensors, so that layers with different numbers share one compiled program, and captured passes see a
        # change
        self.register_buffer("dropout", number(dropout), persistent=False)
        self.register_buffer("scale", number(config.adapter_scale), persistent=False)
        self.conv_A = nn.Conv1d(dim, rank, 1, device=INIT_DEVICE)
        self.conv_B = nn.Conv1d(rank, dim, 1, groups=GROUPS, device=INIT_DEVICE)
        nn.init.xavier_uniform_(self.conv_A.weight)
        for parameter in (self.conv_A.bias, self.conv_B.weight, self.conv_B.bias):
            nn.init.zeros_(parameter)

    def up_columns(self) -> list:
        """Returns the columns of U: the weights [D, r], then the biases [D, 1]."""
        return [dense_weight(self.conv_B), self.conv_B.bias[:, None]]

    def projections(self, dtype) -> tuple:
        """Returns A [r, D], a [r] and s U [D, .]. The columns of U are padded to a multiple of 8, which tensor cores
        require.
        """
        up = torch.cat(self.up_columns(), 1) * self.scale
        return (self.conv_A.weight[..., 0].to(dtype), self.conv_A.bias.to(dtype),
                F.pad(up.to(dtype), (0, -up.shape[1] % 8)))

    def down_project(self, x, weight, bias):
        """Returns z [N, r] for x [N, D], with dropout."""
        z = F.linear(x, weight, bias)
        if self.training:
            z = z * ((torch.rand_like(z, dtype=torch.float32) >= self.dropout) / (1 - self.dropout)).to(z.dtype)
        return z

    @staticmethod
    def add_up_projection(x, u_columns: list, up):
        """Returns x + s u U^T. `u_columns` are the columns of u [N, 2r + 2], and `up` is s U [D, .]."""
        u = torch.cat(u_columns, 1)
        return x + F.linear(F.pad(u, (0, up.shape[1] - u.shape[1])), up)

    def forward(self, x):
        """Adapts x [N, D]; the result has its shape."""
        *down, up = self.projections(x.dtype)
        z = self.down_project(x, *down)
        return self.add_up_projection(x, [z, torch.ones_like(z[:, :1])], up)


def linear_of_few_rows(x, weight, bias):
    """Computes x W^T + b by sums, which the compiler fuses with what is around them, where a product of matrices takes
    kernels of its own.
    """
    return (x[:, None] * weight).sum(-1) + bias


def dense_weight(conv: nn.Conv1d):
    """Returns the weight of a grouped 1x1 convolution as a block-diagonal matrix [D, r]."""
    return torch.block_diag(*conv.weight[..., 0].chunk(GROUPS))


class RepAdapterRouter(RepAdapter):
    """Computes `x + s w0 (B z + b) + s w1 (E z + e)` with the mixture `(w0, w1) = softmax((W h + c) / t)`. E is
    `conv_D`.
    """

    def __init__(self, dim: int, config: AdapterConfig, dropout: float):
        super().__init__(dim, config, dropout)
        self.register_buffer("temperature", number(config.temperature), persistent=False)
        self.conv_D = nn.Conv1d(config.adapter_dim, dim, 1, groups=GROUPS, device=INIT_DEVICE)
        nn.init.zeros_(self.conv_D.weight)
        nn.init.zeros_(self.conv_D.bias)
        self.expert_weights = nn.Linear(dim, 2, device=INIT_DEVICE)

    def mixture(self, h, linear=F.linear):
        """Returns the mixture of the experts [M, 2] float32 for the router input h [M, D]."""
        scores = linear(h.float(), self.expert_weights.weight, self.expert_weights.bias)
        return (scores / self.temperature).softmax(-1)

    def routed(self, h) -> tuple:
        """Returns the part of a forward pass that depends on the router input h [M, D] and the parameters alone.

        These are the mixtures [M, 2], and the projections in the dtype of h. M is small.
        """
        return self.mixture(h, linear_of_few_rows), *self.projections(h.dtype)

    def up_columns(self) -> list:
        return [dense_weight(self.conv_B), dense_weight(self.conv_D), self.conv_B.bias[:, None],
                self.conv_D.bias[:, None]]

    def forward(self, x, mixture, projections=None):  # type: ignore[override]
        """Adapts x [N, D] by the mixture [N, 2]; the result has the shape of x.

        `projections` is `self.projections(x.dtype)` where that has been computed already.
        """
        *down, up = projections or self.projections(x.dtype)
        z, w = self.down_project(x, *down), mixture.to(x.dtype)
        return self.add_up_projection(x, [z * w[:, :1], z * w[:, 1:], w], up)


# --- In the decoder ---

# a layer's part of a RoutingCache: the adapter's name -> (mixtures [2, 2], *projections), see RepAdapterRouter.routed
LayerEntries = dict[str, tuple]


@dataclass
class LayerRouting:
    """The part of a Routing that one layer needs."""

    one_hot: torch.Tensor
    cache: LayerEntries | None

    def adapter_inputs(self, name: str, adapter: RepAdapterRouter, x) -> tuple:
        """Returns the arguments of an adapter's forward besides x [N, D]: its mixture [N, 2] and its projections."""
        mixtures, *projections = adapter.routed(x[:MODALITIES]) if self.cache is None else self.cache[name]
        return (self.one_hot[..., None] * mixtures).sum(1), projections  # a product, fused with what it is for


@dataclass
class Routing:
    """The expert mixture of every row of a pass, by modality. It is the `routing` of lavin.llama.Llama.

    `one_hot` [N, 2] float32 is each row's modality: a matrix product with it selects mixtures, and its gradient is
    deterministic, unlike that of indexing. `cache` is a RoutingCache's `layers`. Without one, every layer computes its
    entries from rows 0 and 1, which must then be the two modality tokens (training).
    """

    one_hot: torch.Tensor
    cache: list[LayerEntries] | None = None

    @classmethod
    def from_modality(cls, modality: torch.Tensor, cache: list[LayerEntries] | None = None) -> "Routing":
        """Makes the routing of rows from their modality [N]: 0 for text, 1 for an image."""
        return cls(F.one_hot(modality, MODALITIES).float(), cache)

    def for_layer(self, layer: int) -> LayerRouting:
        return LayerRouting(self.one_hot, None if self.cache is None else self.cache[layer])


class AdaptedBlock(Block):
    """A decoder layer with an adapter before attention and, with --adapter_type block, before the feed-forward."""

    adapter_attn: RepAdapterRouter  # with every --adapter_type, as published
    adapter_mlp: RepAdapterRouter | None

    def attach(self, adapter: AdapterConfig, dropout: float) -> None:
        """Makes fresh adapters, in the place of those that are there."""
        dim = len(self.attention_norm.weight)
        self.adapter_attn = RepAdapterRouter(dim, adapter, dropout)
        self.adapter_mlp = RepAdapterRouter(dim, adapter, dropout) if adapter.adapter_type == "block" else None

    def norm_and_adapter(self, norm: nn.Module, name: str, x, routing):
        x, adapter = norm(x), getattr(self, name)
        return x if adapter is None else adapter(x, *routing.adapter_inputs(name, adapter, x))

    def attention_input(self, x, routing):
        return self.norm_and_adapter(self.attention_norm, "adapter_attn", x, routing)

    def feed_forward_input(self, x, routing):
        return self.norm_and_adapter(self.ffn_norm, "adapter_mlp", x, routing)

    def route_modality_tokens(self, x, one_hot, rotary, attn_metadata) -> tuple:
        """Runs this layer on the modality tokens x [2, D], whose modalities are `one_hot` [2, 2].

        Returns them behind this layer, and the layer's entries in a RoutingCache.
        """
        routed = {"adapter_attn": self.adapter_attn.routed(self.attention_norm(x))}
        x = self.add_attention(x, rotary, attn_metadata, LayerRouting(one_hot, routed))
        if self.adapter_mlp is not None:
            routed["adapter_mlp"] = self.adapter_mlp.routed(self.ffn_norm(x))
        return self.add_feed_forward(x, attn_metadata, LayerRouting(one_hot, routed)), routed


def adapt_llama(llama: Llama, adapter: AdapterConfig, drop_path: float = 0.0) -> None:
    """Puts fresh adapters, whose dropout follows the depth schedule, into the AdaptedBlocks of a decoder."""
    dropout = dropout_schedule(len(llama.layers), adapter.dropout_prob, adapter.dropout_var, adapter.dropout_lim)
    for block, p in zip(llama.layers, dropout, strict=True):
        block.attach(adapter, p)
        block.drop_path = drop_path


# --- In the ViT ---

class AdaptedNorm(nn.Module):
    """The norm of a ViT block, followed by an adapter. Each position of each image is its own router input."""

    def __init__(self, norm: nn.Module, adapter: RepAdapter):
        super().__init__()
        self.norm, self.adapter = norm, adapter

    def forward(self, x):
        """Normalises and adapts x [I, T, D]; the result has its shape."""
        x = self.norm(x)
        rows = x.flatten(0, 1)
        mixture = (self.adapter.mixture(rows),) if isinstance(self.adapter, RepAdapterRouter) else ()
        return self.adapter(rows, *mixture).view_as(x)


def adapt_vit(vit: nn.Module, adapter: AdapterConfig) -> None:
    """Puts a fresh adapter before attention (and, `router_block`, before the MLP) of every block of a timm ViT, in the
    place of those that are there."""
    adapter_class = RepAdapter if adapter.visual_adapter_type == "normal" else RepAdapterRouter
    dropout = dropout_schedule(len(vit.blocks), adapter.dropout_prob, adapter.dropout_var, adapter.dropout_lim)
    for block, p in zip(vit.blocks, dropout, strict=True):
        block.norm1 = AdaptedNorm(frozen_norm(block.norm1), adapter_class(vit.embed_dim, adapter, p))
        block.norm2 = frozen_norm(block.norm2)
        if adapter.visual_adapter_type == "router_block":
            block.norm2 = AdaptedNorm(block.norm2, adapter_class(vit.embed_dim, adapter, p))


def frozen_norm(norm: nn.Module) -> nn.Module:
    return norm.norm if isinstance(norm, AdaptedNorm) else norm


class VisualProjection(nn.Module):
    """Maps CLS features [..., width] to token embeddings [..., D], through SiLU (`adapter_proj` of checkpoints)."""

    def __init__(self, width: int, hidden: int, dim: int):
        super().__init__()
        self.conv_A = nn.Linear(width, hidden, device=INIT_DEVICE)
        self.conv_B = nn.Linear(hidden, dim, device=INIT_DEVICE)
        for layer in (self.conv_A, self.conv_B):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features):
        return self.conv_B(F.silu(self.conv_A(features)))
