"""LLaMA and the ViT with captured passes: their static inputs, buckets and padding (cuda_graphs.py).

Whether a pass is captured is decided in CapturedModule.__call__ (cuda_graphs.py), and for a whole model in speed_up.py.
"""

from functools import partial

import torch
import torch.nn.functional as F

from lavin.attention import VarlenMetadata
from lavin.fast.cuda_graphs import CapturedModule, CapturedPass, copy_and_zero_pad, pad_to_bucket
from lavin.mm_adapter import Routing
from lavin.model import MODALITIES, LaVIN


class CapturedVisionPass(CapturedPass):
    """bucket: the shape of the images, which need no gradient."""

    def __init__(self, owner, bucket, dtype):
        vision = owner.module
        self.images = owner.buffers.take("images", bucket, dtype)
        n_features = len(vision.vit.blocks) // vision.blocks_per_feature
        self.capture_graphs(owner, (bucket[0], n_features, vision.width), vision.vit.patch_embed.proj.weight.dtype)

    def run(self):
        return self.owner.uncaptured(self.images)

    def load(self, images):
        self.images.copy_(images)


class CapturedVision(CapturedModule):
    """Training passes have an even number of images, the last one blank where needed: half as many graphs, and none
    for a single image, for which torch.compile would make a program of its own."""

    pass_class = CapturedVisionPass

    def __call__(self, images):
        blank = len(images) % 2 if self.module.training else 0
        return super().__call__(F.pad(images, (0, 0) * (images.ndim - 1) + (0, blank)))[:len(images)]

    def bucket(self, images):
        return images.shape


class CapturedLlamaPass(CapturedPass):
    """bucket: (rows, documents, max_seqlen). Unused rows form one trailing dummy document, whose output is dropped."""

    def __init__(self, owner, bucket, dtype):
        (rows, num_docs, max_seqlen), dim = bucket, owner.module.config.dim
        # any documents of these numbers: `load` overwrites every tensor
        self.attn_metadata = VarlenMetadata([max_seqlen] + [1] * (num_docs - 1), owner.device)
        zeros = partial(torch.zeros, rows, dtype=torch.long, device=owner.device)
        self.attn_metadata.document_ids, self.attn_metadata.doc_positions = zeros(), zeros()
        self.attn_metadata.position_ids = zeros()
        self.routing = Routing(torch.zeros(rows, MODALITIES, device=owner.device))
        self.inputs = [owner.buffers.take("x", [rows, dim], dtype).detach().requires_grad_(torch.is_grad_enabled())]
        self.capture_graphs(owner, (rows, dim), dtype)

    def run(self):
        # a copy, since the compiled graph was specialized on an input that is no view of a larger buffer
        return self.owner.uncaptured(self.inputs[0].clone(), self.attn_metadata, self.routing)

    def load(self, x, attn_metadata, routing):
        n, static = len(x), self.attn_metadata
        rows, num_docs = len(static.document_ids), attn_metadata.num_docs
        static.document_ids[:n].copy_(attn_metadata.document_ids)
        static.document_ids[n:] = num_docs  # the dummy document
        for name in ("doc_positions", "position_ids"):
            getattr(static, name)[:n].copy_(getattr(attn_metadata, name))
            torch.arange(rows - n, out=getattr(static, name)[n:])
        static.cu_seqlens[:num_docs + 1].copy_(attn_metadata.cu_seqlens)
        static.cu_seqlens[num_docs + 1:] = rows  # further documents are empty
        copy_and_zero_pad(self.routing.one_hot, routing.one_hot)


class CapturedLlama(CapturedModule):
    pass_class = CapturedLlamaPass

    def bucket(self, x, attn_metadata, routing):
        """Rows, documents (with the dummy one) and the longest document's tokens, each rounded up; the last to at most
        all rows, as memory-efficient attention requires."""
        rows, num_docs = pad_to_bucket(len(x)), attn_metadata.num_docs + 1
        max_seqlen = max(attn_metadata.max_seqlen, rows - len(x))
        return rows, num_docs + -num_docs % 4, min(max_seqlen + -max_seqlen % 256, rows)

    def captures_inference(self, x, attn_metadata, routing):
        """Passes that leave nothing behind, in a KV cache or a routing cache."""
        return type(attn_metadata) is VarlenMetadata and routing.cache is None


def capture_passes(model: LaVIN) -> None:
    """In place: training passes of LLaMA and the ViT, and LLaMA's that score options, are captured and replayed."""
    CapturedLlama(model.llama, model.device)
    CapturedVision(model.vision, model.device)


def free_graphs(model: LaVIN) -> None:
    """Drops all captured passes and the memory they hold, where there are any."""
    for module in (model.llama, model.vision):
        if isinstance(module.forward, CapturedModule):
            module.forward.free()
