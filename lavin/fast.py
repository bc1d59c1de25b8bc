"""Swaps on an unchanged model that make it fast, chosen here by hardware: fused products, fp8, compiled layers and loss,
recorded passes."""

from functools import partial

import torch

from lavin import frozen
from lavin.attention import flash, packed_attention
from lavin.loss import answer_loss, cross_entropy
from lavin.model import LaVIN
from lavin.recording import record_training


def fuse(model: LaVIN, fp8: bool = False) -> None:
    """LLaMA's frozen matrices, layer by layer, as lavin.frozen's; the output matrix and the ViT stay as they are."""
    for block in model.llama.layers:
        frozen.FusedAttention.replace(block.attention, fp8)
        frozen.FusedFeedForward.replace(block.feed_forward, fp8)


def compile_parts(model: LaVIN) -> None:
    # torch 2.11's compiler cannot look into these at varying sizes; what follows it can
    for function in (frozen.frozen_product, frozen.swiglu_products, frozen.turned_product):
        torch.compiler.allow_in_graph(function)
    torch.fx.experimental._config.use_duck_shape = False  # two sizes that are equal once need not stay so
    torch._dynamo.config.recompile_limit = 32  # training, prefill, decoding, one sequence: each its own program
    for stack in (model.llama, model.vision):
        stack.run_blocks = torch.compile(stack.run_blocks, dynamic=True)
    model.answer_loss = partial(answer_loss, cross_entropy=torch.compile(cross_entropy, dynamic=True))


def speed_up(model: LaVIN, bits: str = "16bit") -> LaVIN:
    """In place. bits: `fp8` for frozen matrices in fp8.

    The fused kernels need Ampere (8.0) or newer. Training is recorded where flash attention serves it: with other
    attention that was never tried.
    """
    if not isinstance(model.llama.layers[0].attention.wq, torch.nn.Linear):
        return model  # quantized, or divided among processes: as it is
    cuda = model.device.type == "cuda"
    if bits == "fp8" or cuda and torch.cuda.get_device_capability(model.device) >= (8, 0):
        fuse(model, bits == "fp8")
    if cuda:
        compile_parts(model)
        model.records_graphs = True
    if packed_attention(model.device, model.dtype, model.llama.config.head_dim) is flash:
        record_training(model)
    return model
