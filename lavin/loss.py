"""Cross-entropy of the answers under a frozen output matrix, without ever holding all logits.

The output matrix needs no gradient, so that of the hidden states is known as soon as the logits are: both are computed
in the forward pass, a few hundred tokens at a time.
"""

import torch
import torch.nn.functional as F

ROWS = 1024  # tokens whose logits exist at once


def cross_entropy(logits, target):
    """Of each row of logits [M, V], float32 [M], and its gradient [M, V]: softmax less one-hot."""
    logs = logits.float().log_softmax(-1)
    losses = -logs.gather(1, target[:, None])[:, 0]
    # no scatter, which waits for the GPU where it must repeat itself
    one_hot = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return losses, logs.exp_().sub_(one_hot.float()).to(logits.dtype)


class AnswerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, factor, cross_entropy):
        factor = factor.float()
        loss = torch.zeros_like(factor[:1]).sum()
        slopes = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            losses, errors = cross_entropy(F.linear(hidden[rows], weight), target[rows])
            loss += (losses * factor[rows]).sum()
            if slopes is not None:
                slopes[rows] = errors @ weight
        ctx.save_for_backward(slopes, factor)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        slopes, factor = ctx.saved_tensors
        return (slopes * (factor * gradient)[:, None]).to(slopes.dtype), None, None, None, None


def answer_loss(hidden, weight, target, factor, cross_entropy=cross_entropy):
    """Sum of factor * cross-entropy, float32. hidden [M, D], weight [V, D], target [M], factor [M] float32.

    cross_entropy: the function above, or one that does the same (lavin/fast.py).
    """
    return AnswerLoss.apply(hidden, weight, target, factor, cross_entropy)
