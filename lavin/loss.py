"""Cross-entropy of the answer tokens under a frozen output matrix, without materialising all logits.

The output matrix needs no gradient, so the gradient of the hidden states can be computed along with the loss: the
forward pass handles CHUNK_TOKENS tokens at a time, and the backward pass only scales what it kept.

The loss is a weighted sum; `loss_weights` in util/training/accumulation.py makes it the average over a step.
"""

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 1024  # tokens whose logits exist at the same time


def cross_entropy(logits, targets):
    """Returns the losses [M] float32 of logits [M, V] and targets [M], and grad_logits [M, V] = softmax - one_hot."""
    log_probs = logits.float().log_softmax(-1)
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    # a comparison in place of scatter_add, whose deterministic version synchronizes with the GPU
    one_hot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return losses, log_probs.exp_().sub_(one_hot.float()).to(logits.dtype)


class AnswerLoss(torch.autograd.Function):
    """The loss of `answer_loss`, whose forward pass computes the gradient of the hidden states, too."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_weights, cross_entropy):
        loss_weights = loss_weights.float()
        loss = torch.zeros_like(loss_weights[:1]).sum()
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            losses, grad_logits = cross_entropy(F.linear(hidden[chunk], weight), targets[chunk])
            loss += (losses * loss_weights[chunk]).sum()
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight  # [chunk, V] @ [V, D]; not yet weighted
        ctx.save_for_backward(grad_hidden, loss_weights)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, loss_weights = ctx.saved_tensors
        return (grad_hidden * (loss_weights * grad_output)[:, None]).to(grad_hidden.dtype), None, None, None, None


def answer_loss(hidden, weight, targets, loss_weights, cross_entropy=cross_entropy):
    """Returns the sum of weighted cross-entropies, a float32 scalar.

    Shapes: hidden [M, D], weight [V, D], targets [M], loss_weights [M]. `cross_entropy` is the function above, or a
    compiled version of it (lavin/fast/speed_up.py).
    """
    return AnswerLoss.apply(hidden, weight, targets, loss_weights, cross_entropy)
