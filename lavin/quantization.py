"""LaVIN-lite: LLaMA's frozen matrices in 4 or 8 bits, by bitsandbytes (requirements-lite.txt), without which this file
does not import.

Notable:
- A swap on a model that is only described: each matrix is quantized as it is placed (lavin/checkpoint.py), so that
  neither host nor device ever holds the model in 16 bits.
- Embeddings, output matrix, norms, the ViT and the adapters stay as they are: little memory, and much to lose.
"""

import logging

import bitsandbytes
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from torch import nn

from lavin.model import LaVIN

# it would tell at every product that bfloat16 is cast
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

# bitsandbytes keeps its table of 8-bit scales on the device that asks first, which is not to be `meta`
quantize_4bit(torch.zeros(64), compress_statistics=True)

OUTLIER = 6.0  # activations beyond it are multiplied in 16 bits, with 8-bit weights


class Linear4bit(nn.Module):
    """x W^T, W in NF4: 4 bits a weight, a scale for every 64 of them, and these in 8 bits (double quantization).

    QLoRA: Dettmers et al. 2023, arXiv 2305.14314.
    """

    def load(self, weight: torch.Tensor, device, dtype) -> None:
        """Quantizes a weight [O, K]; it stays on `device`. dtype: that of the products."""
        self.weight, self.state = quantize_4bit(weight.to(device).to(dtype).contiguous(), quant_type="nf4",
                                                compress_statistics=True)

    def held(self) -> list[torch.Tensor]:
        state = self.state
        return [self.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]

    def forward(self, x):
        """[N, K] -> [N, O]."""
        return bitsandbytes.matmul_4bit(x, self.weight.t(), self.state)


class Linear8bit(nn.Module):
    """x W^T, W and x in int8 with a scale for each of their rows, but for the columns of x that hold outliers.

    LLM.int8(): Dettmers et al. 2022, arXiv 2208.07339. On CPUs x stays as it is.
    """

    def load(self, weight: torch.Tensor, device, dtype) -> None:
        """Quantizes a weight [O, K]; it stays on `device`. The products are of x's type, whatever `dtype`."""
        self.state = bitsandbytes.MatmulLtState()
        self.state.has_fp16_weights, self.state.threshold = False, OUTLIER
        self.state.CB, self.state.SCB, _ = int8_vectorwise_quant(weight.to(device).to(torch.float16).contiguous())

    def held(self) -> list[torch.Tensor]:
        return [self.state.CB, self.state.SCB]

    def forward(self, x):
        """[N, K] -> [N, O]."""
        return bitsandbytes.matmul(x, self.state.CB, state=self.state)


KINDS = {"4bit": Linear4bit, "8bit": Linear8bit}


def quantize_linears(model: LaVIN, bits: str) -> None:
    """In place: every linear of LLaMA's layers becomes one of KINDS, to be filled by its `load`."""
    for block in model.llama.layers:
        for part in (block.attention, block.feed_forward):
            for name, _ in list(part.named_children()):
                setattr(part, name, KINDS[bits]())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, buffers included, on whatever device; exact on `meta` too."""
    held = [tensor for module in model.modules() if hasattr(module, "held") for tensor in module.held()]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *held))
