"""NF4 with double quantization, as bitsandbytes stores it: a weight is a code of 4 bits, each block of codes has a
scale in 8 bits, and each block of scales has a scale of its own.

Source: QLoRA, Dettmers et al. 2023, arXiv 2305.14314.
"""

import torch

NF4_BLOCK, SCALES_BLOCK = 64, 256  # codes that share a scale, and scales that share one of their own


def nf4_table(code: torch.Tensor) -> torch.Tensor:
    """Returns what `gemv_nf4` looks a byte up in: [256] int32. `code` [16] float32 has NF4's values, for bitsandbytes'
    codes.

    An entry is read in two ways. As a float32, it is the value of the code in the byte's upper half. Its lower 16 bits
    as a bf16 are the value of the other code. Both are as precise as in bf16.
    """
    second = code.bfloat16().view(torch.int16).int().repeat(16) & 0xFFFF
    first = code.repeat_interleave(16)
    upper = first.view(torch.int32) >> 16 & 0xFFFF
    candidates = torch.stack(((upper - 1).clamp(min=0), upper, upper + 1)) << 16 | second  # one of them is the nearest
    return candidates.gather(0, (candidates.view(torch.float32) - first).abs().argmin(0, keepdim=True))[0]


def dequantized_nf4(weight, absmax, absmax2, code2, offset, table) -> torch.Tensor:
    """Returns a weight as float32 [O, K]. The arguments are those of `gemv_nf4` (single_row.py)."""
    entries = table[weight.flatten().int()]
    values = torch.stack((entries, entries << 16), 1).view(torch.float32).view(-1, NF4_BLOCK)
    scales = code2[absmax.int()] * absmax2.repeat_interleave(SCALES_BLOCK)[:len(absmax)]
    return (values * (scales + offset.repeat_interleave(len(scales) // len(offset)))[:, None]).view(len(offset), -1)
