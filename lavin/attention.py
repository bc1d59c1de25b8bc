"""Causal attention within each document of a packed row: implementations that agree, and the choice among them.

All take query [N, H, d], key and value [N, H_kv, d] and the pass's VarlenMetadata, and return [N, H, d].
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from lavin.kernels.flash_attention import flash_attention
from lavin.runtime.device import compute_capability, to_device

HAS_TRITON = find_spec("triton") is not None  # torch's GPU builds bring it
CAUSAL = 1  # custom_mask_type of _efficient_attention_forward


class VarlenMetadata:
    """The document boundaries of a packed row. Each token attends to its own document's tokens up to itself.

    `lengths` are the tokens of each document. `position_offsets` are the rotary positions of each document's first
    token (default: 0). `use_triton` says whether attention may use our Triton kernels, where the hardware allows them
    (LaVIN.use_triton).
    """

    def __init__(self, lengths: list[int], device, position_offsets: list[int] | None = None,
                 use_triton: bool = HAS_TRITON):
        self.use_triton = use_triton
        self.lengths, self.num_docs, self.max_seqlen = lengths, len(lengths), max(lengths)
        counts = torch.tensor(lengths)
        document_ids = torch.arange(len(lengths)).repeat_interleave(counts)
        ends = counts.cumsum(0)
        doc_positions = torch.arange(len(document_ids)) - (ends - counts)[document_ids]
        offsets = torch.tensor(position_offsets or [0] * len(lengths))
        # [N]: index of each token's document, index of each token within it, and its rotary position; [documents + 1]:
        # where each document begins
        self.document_ids, self.doc_positions, self.position_ids, self.cu_seqlens = to_device(
            [document_ids, doc_positions, doc_positions + offsets[document_ids], F.pad(ends, (1, 0)).int()], device)

    def for_layer(self, layer: int):
        """Returns the metadata for one layer. It is the same for all layers here; with a KV cache, it is the layer's
        part of it.
        """
        return self

    def attend(self, query, key, value):
        """Attends with query [N, H, d], key and value [N, H_kv, d]; returns [N, H, d]."""
        return select_attention(query.device, query.dtype, query.shape[-1], self.use_triton)(query, key, value, self)


def uses_triton(device: torch.device, dtype: torch.dtype, head_dim: int, use_triton: bool) -> bool:
    """Says whether attention takes our own kernels: from Ampere (8.0) on, in 16 bits, where `use_triton` allows it."""
    return (device.type == "cuda" and use_triton and compute_capability(device) >= (8, 0) and dtype != torch.float32
            and head_dim in (16, 32, 64, 128))


def select_attention(device: torch.device, dtype: torch.dtype, head_dim: int, use_triton: bool):
    """Returns the attention function for a device.

    A GPU takes flash attention, or memory-efficient attention where our kernels do not work; a CPU takes padded
    attention.
    """
    if device.type != "cuda":
        return padded_attention
    return flash_varlen_attention if uses_triton(device, dtype, head_dim, use_triton) else efficient_varlen_attention


def grouped_sdpa(query, key, value, **options):
    """Attends with query [B, H, T, d], key and value [B, H_kv, S, d], by PyTorch's choice of a kernel. Returns
    [B, H, T, d].
    """
    if query.shape[1] == key.shape[1]:  # two calls, since Dynamo of torch 2.7 takes no symbolic enable_gqa
        return F.scaled_dot_product_attention(query, key, value, **options)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def reference_attention(query, key, value, attn_metadata: VarlenMetadata):
    """Attends one document at a time; the other implementations are tested against it."""
    documents = zip(*(x.split(attn_metadata.lengths) for x in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in documents:  # [T, H, d], [T, H_kv, d]
        if len(q) == 1:  # the softmax over a single key is 1
            outputs.append(v.repeat_interleave(q.shape[1] // v.shape[1], 1))
        else:
            batch = (x.transpose(0, 1)[None] for x in (q, k, v))
            outputs.append(grouped_sdpa(*batch, is_causal=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def padded_attention(query, key, value, attn_metadata: VarlenMetadata):
    """Attends to documents as a padded batch [documents, max_seqlen, ...]. The causal mask hides the padding at their
    ends.
    """
    index = attn_metadata.document_ids, attn_metadata.doc_positions
    batch = [x.new_zeros(attn_metadata.num_docs, attn_metadata.max_seqlen, *x.shape[1:]).index_put(index, x)
             for x in (query, key, value)]
    return grouped_sdpa(*(x.transpose(1, 2) for x in batch), is_causal=True).transpose(1, 2)[index]


def efficient_varlen_attention(query, key, value, attn_metadata: VarlenMetadata):
    """Attends on the packed row itself, without padding, by memory-efficient attention (Rabe and Staats 2021, arXiv
    2112.05682).

    It calls PyTorch's kernel, which works on all GPUs from Maxwell on, as PyTorch does for nested tensors.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    cu_seqlens, max_seqlen = attn_metadata.cu_seqlens, attn_metadata.max_seqlen
    return torch.ops.aten._efficient_attention_forward(
        query[None], key[None], value[None], None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, CAUSAL,
        compute_log_sumexp=True)[0][0]


def flash_varlen_attention(query, key, value, attn_metadata: VarlenMetadata):
    """Attends on the packed row itself, without padding, by flash attention (lavin/kernels/flash_attention.py)."""
    return flash_attention(query.contiguous(), key.contiguous(), value.contiguous(), attn_metadata.cu_seqlens,
                           attn_metadata.max_seqlen)[0]
