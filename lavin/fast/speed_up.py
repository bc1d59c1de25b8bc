"""The one place that chooses, by hardware, which parts of a model are replaced by faster ones."""

from functools import partial

import torch

from lavin.attention import flash_varlen_attention, select_attention
from lavin.fast import fused_linear
from lavin.fast.captured_models import capture_training
from lavin.loss import answer_loss, cross_entropy
from lavin.model import LaVIN


def fuse(model: LaVIN, fp8: bool = False) -> None:
    """In place: the matrices of LLaMA's layers become fused ones. The output matrix and the ViT stay as they are."""
    for block in model.llama.layers:
        fused_linear.FusedAttention.convert(block.attention, fp8)
        fused_linear.FusedFeedForward.convert(block.feed_forward, fp8)


def compile_model(model: LaVIN) -> None:
    """In place: the layers of LLaMA and the ViT, and the loss, are compiled with dynamic shapes."""
    # torch 2.11 cannot trace into these autograd functions with dynamic shapes; AOTAutograd can handle what they call
    for function in (fused_linear.frozen_linear, fused_linear.swiglu_mlp, fused_linear.qkv_rope):
        torch.compiler.allow_in_graph(function)
    torch.fx.experimental._config.use_duck_shape = False  # two sizes that are equal at first may differ later
    torch._dynamo.config.recompile_limit = 32  # one graph each for training, prefill, decoding, a single sequence
    for module in (model.llama, model.vision):
        module.run_blocks = torch.compile(module.run_blocks, dynamic=True)
    model.answer_loss = partial(answer_loss, cross_entropy=torch.compile(cross_entropy, dynamic=True))


def speed_up(model: LaVIN, bits: str = "16bit") -> LaVIN:
    """In place; returns the model. bits: `fp8` for fp8 matrices.

    Fused kernels need Ampere (8.0) or newer. Training passes are captured in CUDA graphs only with flash attention:
    with other attention this was never tried. Quantized and tensor-parallel models stay as they are.
    """
    if not isinstance(model.llama.layers[0].attention.wq, torch.nn.Linear):
        return model
    cuda = model.device.type == "cuda"
    if bits == "fp8" or cuda and torch.cuda.get_device_capability(model.device) >= (8, 0):
        fuse(model, bits == "fp8")
    if cuda:
        compile_model(model)
        model.use_cuda_graphs = True
    if select_attention(model.device, model.dtype, model.llama.config.head_dim) is flash_varlen_attention:
        capture_training(model)
    return model
