"""LLaMA and the ViT with captured passes: their static inputs, buckets and padding (cuda_graphs.py).

Whether a pass is captured is decided in CapturedModule.__call__ (cuda_graphs.py), and for a whole model in speed_up.py.
"""

from copy import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lavin.attention import VarlenMetadata
from lavin.fast.cuda_graphs import CapturedModule, CapturedPass, copy_and_zero_pad, pad_to_bucket
from lavin.mm_adapter import MODALITIES, Routing
from lavin.model import LaVIN
from lavin.runtime.arithmetic import round_up

PREFILL_BUCKET = 64  # prefills of single prompts are padded to a multiple of this many tokens
IMAGE_BUCKET = 8  # images of a batch of prompts are padded to a multiple of this many
MAX_CAPTURED_TOKENS = 1024  # longer ones keep the GPU busy without a graph


class CapturedVisionPass(CapturedPass):
    """A captured pass of the ViT. Its bucket is the shape of the images, which need no gradient."""

    def __init__(self, owner, bucket, images):
        vision = owner.module
        self.images = owner.buffers.take("images", bucket, images.dtype)
        n_features = len(vision.vit.blocks) // vision.blocks_per_feature
        self.capture_graphs(owner, (bucket[0], n_features, vision.width), vision.vit.patch_embed.proj.weight.dtype)

    def run(self):
        return self.owner.uncaptured(self.images)

    def load(self, images):
        self.images.copy_(images)


class CapturedVision(CapturedModule):
    """A ViT with captured passes.

    Passes have an even number of images, the last one blank where needed: this halves the number of graphs, and spares
    a single image, for which torch.compile would make a program of its own. In inference, more than two images are
    padded to a multiple of IMAGE_BUCKET.
    """

    pass_class = CapturedVisionPass

    def __call__(self, images):
        multiple = 2 if self.module.training or len(images) <= 2 else IMAGE_BUCKET
        padding = (0, 0) * (images.ndim - 1) + (0, -len(images) % multiple)
        return super().__call__(F.pad(images, padding))[:len(images)]

    def bucket(self, images):
        return images.shape

    def captures_inference(self, images):
        """Says that prefills are captured: the images of prompts always pass through a graph."""
        return True


class CapturedLlamaPass(CapturedPass):
    """A captured pass of LLaMA. Its bucket is (rows, documents, max_seqlen, id of the KV cache).

    Unused rows continue the last document: since attention is causal, its own tokens do not see them. Their output is
    dropped, and its gradient is zero.
    """

    def __init__(self, owner, bucket, x, attn_metadata, routing):
        rows, num_docs, max_seqlen, *_ = bucket
        zeros = partial(torch.zeros, device=owner.device, dtype=torch.long)
        self.attn_metadata = static = copy(attn_metadata)  # with the same KV cache, if it has one
        static.lengths, static.num_docs, static.max_seqlen = [], num_docs, max_seqlen
        static.document_ids, static.doc_positions, static.position_ids = zeros(rows), zeros(rows), zeros(rows)
        static.cu_seqlens = zeros(num_docs + 1, dtype=torch.int32)
        self.routing = Routing(zeros(rows, MODALITIES, dtype=torch.float32), routing.cache)
        shape = rows, x.shape[1]
        self.inputs = [owner.buffers.take("x", shape, x.dtype).detach().requires_grad_(torch.is_grad_enabled())]
        self.capture_graphs(owner, shape, x.dtype)

    def run(self):
        # a copy, since the compiled graph was specialized on an input that is no view of a larger buffer
        return self.owner.uncaptured(self.inputs[0].clone(), self.attn_metadata, self.routing)

    def load(self, x, attn_metadata, routing):
        n, static = len(x), self.attn_metadata
        rows, num_docs, length = len(static.document_ids), attn_metadata.num_docs, attn_metadata.lengths[-1]
        for name in ("document_ids", "doc_positions", "position_ids"):
            getattr(static, name)[:n].copy_(getattr(attn_metadata, name))
        static.document_ids[n:] = num_docs - 1
        for positions in (static.doc_positions, static.position_ids):
            torch.arange(length, length + rows - n, out=positions[n:])
        static.cu_seqlens[:num_docs].copy_(attn_metadata.cu_seqlens[:-1])
        static.cu_seqlens[num_docs:] = rows  # further documents are empty
        copy_and_zero_pad(self.routing.one_hot, routing.one_hot)


class CapturedLlama(CapturedModule):
    """LLaMA with captured passes, whose inputs are those of Llama.forward."""

    pass_class = CapturedLlamaPass

    def bucket(self, x, attn_metadata, routing):
        """Returns rows, documents and the longest document's tokens, each rounded up, and the id of the KV cache that
        is filled.

        The longest document is rounded to at most all rows, as memory-efficient attention requires.
        """
        num_docs = attn_metadata.num_docs
        single = num_docs == 1  # a size of its own for torch.compile
        rows = round_up(len(x), PREFILL_BUCKET) if single else pad_to_bucket(len(x))
        max_seqlen = max(attn_metadata.max_seqlen, attn_metadata.lengths[-1] + rows - len(x))
        return (rows, 1 if single else round_up(num_docs, 4), min(round_up(max_seqlen, 256), rows),
                id(getattr(attn_metadata, "cache", None)))

    def kind(self, x, attn_metadata, routing):
        return type(attn_metadata), attn_metadata.num_docs == 1

    def captures_inference(self, x, attn_metadata, routing):
        """Says that prefills are captured here, with or without a KV cache; decoding steps are captured by their
        session.
        """
        return (isinstance(attn_metadata, VarlenMetadata) and routing.cache is not None
                and (attn_metadata.num_docs > 1 or len(x) <= MAX_CAPTURED_TOKENS))


def capture_passes(model: LaVIN) -> None:
    """Changes a model in place, so that passes of LLaMA and the ViT in training and in prefill, and decoding steps, are
    captured and replayed."""
    model.use_cuda_graphs = True
    CapturedLlama(model.llama, model.device)
    CapturedVision(model.vision, model.device)


def bind_graphs(model: LaVIN) -> None:
    """Is called where a model, captured or not, has got other adapters."""
    for module in (model.llama, model.vision):
        if isinstance(module.forward, CapturedModule):
            module.forward.bind()


def free_graphs(*modules: nn.Module) -> None:
    """Drops the captured passes of LLaMA or the ViT and the memory they hold, where there are any."""
    for module in modules:
        if isinstance(module.forward, CapturedModule):
            module.forward.free()
