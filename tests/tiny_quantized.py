"""A tiny model in 4 or 8 bits, and an unquantized one with the weights that the first one multiplies with."""

import torch
from torch import nn

from lavin.kernels.nf4 import nf4_table
from lavin.model import LaVIN
from lavin.weights.load import quantize_model
from tiny import cast_frozen, tiny_model

NF4 = torch.tensor([  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def random_nf4(rows: int, K: int) -> list[torch.Tensor]:
    """Returns the arguments of `gemv_nf4` after x, for a weight [rows, K] of random codes and scales."""
    scales = rows * K // 64
    return [torch.randint(256, (rows * K // 2, 1), dtype=torch.uint8), torch.randint(256, (scales,), dtype=torch.uint8),
            torch.rand(-(-scales // 256)), torch.rand(256), torch.rand(rows), nf4_table(NF4)]


def dequantized_weight(linear: nn.Module, in_features: int, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """The weight [O, K] that a quantized layer multiplies with."""
    with torch.no_grad():
        return linear(torch.eye(in_features, device=device, dtype=dtype)).t().float().cpu().contiguous()


def quantized_and_dequantized_model(bits: str, device="cpu", dtype=torch.float32, **model) -> tuple[LaVIN, LaVIN]:
    """A quantized model on `device`, and an unquantized one on the CPU. model: the arguments of tiny_model."""
    quantized, dequantized = tiny_model(**model), tiny_model(**model)
    exact = dict(quantized.llama.named_parameters())
    quantize_model(quantized, bits)
    cast_frozen(quantized, device, dtype)
    for name, module in quantized.llama.layers.named_modules():
        if hasattr(module, "load"):
            weight = exact[f"layers.{name}.weight"]
            module.load(weight.detach(), device, dtype)
            bias, module.bias = module.bias, None
            dequantized.llama.layers.get_submodule(name).weight.data = dequantized_weight(
                module, weight.shape[1], device, dtype)
            module.bias = bias
    return quantized, dequantized


def stored_tensors(linear: nn.Module) -> list[torch.Tensor]:
    """All tensors that a quantized layer keeps of its weight."""
    state = linear.state
    if hasattr(state, "CB"):  # 8 bits
        return [state.CB, state.SCB]
    return [linear.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def weight_bytes(model: nn.Module) -> int:
    """The bytes of all weights and buffers of a model, quantized or not. The number is exact on `meta` too."""
    quantized = [tensor for module in model.modules() if hasattr(module, "load")
                 for tensor in stored_tensors(module)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *quantized))
