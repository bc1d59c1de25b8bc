"""LaVIN-lite: the linear layers of LLaMA's blocks in 4 or 8 bits.

Needs bitsandbytes (requirements/lite.txt); importing this file without it raises ImportError.

- Linear layers are replaced while the model is on the meta device, and each weight is quantized as it is loaded
  (lavin/weights/load.py), so that neither host nor device ever holds the whole model in 16 bits.
- Embeddings, output projection, norms, biases, the ViT and the adapters are not quantized: they take little memory and
  need the precision.
"""

import logging

import bitsandbytes
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from torch import nn

from lavin.kernels.nf4 import NF4_BLOCK, nf4_table
from lavin.kernels.single_row import gemv_nf4, is_decoded
from lavin.llama import add_bias
from lavin.model import LaVIN

# it would warn at every matmul that bfloat16 is cast to float16
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

# bitsandbytes caches its table of 8-bit scale values on the device of the first call, which must not be `meta`
quantize_4bit(torch.zeros(64), compress_statistics=True)

OUTLIER_THRESHOLD = 6.0  # columns of activations with larger values are multiplied in 16 bits, by 8-bit weights


class QuantizedLinear(nn.Module):
    """Computes x W^T + b, once `load` has filled the weight. The bias [O], which may be None, is not quantized.

    `capturable` says whether the layer can be captured in CUDA graphs: the host must not wait for the GPU.
    """

    capturable = False

    def __init__(self, bias: nn.Parameter | None = None):
        super().__init__()
        self.bias = bias

    def forward(self, x):
        """Returns x W^T + b [N, O] for x [N, K]."""
        return add_bias(self.matmul(x), self.bias)


class Linear4bit(QuantizedLinear):
    """Computes x W^T with W in NF4 and double quantization (lavin/kernels/nf4.py)."""

    capturable = True
    multiplies_rows = False  # whether our kernel multiplies single rows

    def load(self, weight: torch.Tensor, device, dtype) -> None:
        """Quantizes a weight [O, K] on `device`. `dtype` is that of the product."""
        self.weight, self.state = quantize_4bit(weight.to(device).to(dtype).contiguous(), quant_type="nf4",
                                                compress_statistics=True)

    def prepare_gemv(self) -> None:
        """Lets our kernel multiply single rows, if each row of the weight consists of whole blocks."""
        rows, columns = self.state.shape
        self.multiplies_rows = columns % NF4_BLOCK == 0
        self.table, self.offset = nf4_table(self.state.code), self.state.offset.repeat(rows)

    def matmul(self, x):
        if self.multiplies_rows and is_decoded(x):
            state = self.state
            return gemv_nf4(x, self.weight, state.absmax, state.state2.absmax, state.state2.code, self.offset,
                            self.table)
        return bitsandbytes.matmul_4bit(x, self.weight.t(), self.state)


class Linear8bit(QuantizedLinear):
    """Computes x W^T with W and x in int8, one scale per row of each; columns of x with outliers stay in 16 bits.

    Source: LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339. On CPUs, x is not quantized.
    """

    def load(self, weight: torch.Tensor, device, dtype) -> None:
        """Quantizes a weight [O, K] on `device`. `dtype` is ignored: the output has the dtype of x."""
        self.state = bitsandbytes.MatmulLtState()
        self.state.has_fp16_weights, self.state.threshold = False, OUTLIER_THRESHOLD
        self.state.CB, self.state.SCB, _ = int8_vectorwise_quant(weight.to(device).to(torch.float16).contiguous())

    def matmul(self, x):
        return bitsandbytes.matmul(x, self.state.CB, state=self.state)


QUANTIZED_LINEARS = {"4bit": Linear4bit, "8bit": Linear8bit}


def quantize_linears(model: LaVIN, bits: str) -> None:
    """Replaces every linear layer of LLaMA's blocks, in place, by an empty quantized one, which its `load` fills."""
    for block in model.llama.layers:
        for parent in (block.attention, block.feed_forward):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, QUANTIZED_LINEARS[bits](child.bias))
