"""Cross-entropy of the answers under a frozen output matrix, without ever holding all logits.

The output matrix needs no gradient, so that of the hidden states is known as soon as the logits are: both are computed
in the forward pass, a few hundred tokens at a time.
"""

import torch
import torch.nn.functional as F

ROWS = 1024  # tokens whose logits exist at once


class AnswerLoss(torch.autograd.Function):
    """Sum of factor * cross-entropy, float32. hidden [M, D], weight [V, D], target [M], factor [M] float32."""

    @staticmethod
    def forward(ctx, hidden, weight, target, factor):
        factor = factor.float()
        loss = torch.zeros_like(factor[:1]).sum()
        pieces = torch.arange(len(weight), device=weight.device)
        slopes = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            logs = F.linear(hidden[rows], weight).float().log_softmax(-1)
            index = target[rows, None]
            loss -= (logs.gather(1, index)[:, 0] * factor[rows]).sum()
            if slopes is not None:
                # no scatter, which waits for the GPU where it must repeat itself
                errors = logs.exp_().add_(pieces == index, alpha=-1)
                slopes[rows] = errors.to(hidden.dtype) @ weight
        ctx.save_for_backward(slopes, factor)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        slopes, factor = ctx.saved_tensors
        return (slopes * (factor * gradient)[:, None]).to(slopes.dtype), None, None, None


answer_loss = AnswerLoss.apply
