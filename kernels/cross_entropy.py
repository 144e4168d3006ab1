"""Output projection and cross-entropy in one: −log softmax(h Wᵀ)[target], a chunk at a time.

`cross_entropy_obvious` writes the whole (N V) table of logits and is the oracle. `cross_entropy`
works through the tokens in chunks: a chunk's logits become its loss and, in the same pass, its
gradients, and are then forgotten. For a vocabulary of 50,000 the logits would otherwise be the
largest tensor of the whole training step.

Papers: Wijmans et al. 2024, Cut Your Losses (arXiv 2411.09009) on why the logits must not be kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that asks for nothing: no loss, no gradient
CHUNK_BYTES = 32 << 20  # of fp32 logits at a time


def cross_entropy_obvious(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ over tokens of −log softmax(h Wᵀ)[target], in nats, in fp32 or wider.

    hidden (N C), weight (V C), targets (N) in 0 … V−1 or IGNORE. A sum, not a mean: who accumulates
    over micro-batches or ranks divides by all their tokens (a mean of means is not the mean).
    """
    logits = (hidden @ weight.to(hidden.dtype).T).to(wide(hidden.dtype))  # N V
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same value and gradients as `cross_entropy_obvious`, chunk by chunk."""
    return ChunkedCrossEntropy.apply(hidden, weight, targets)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and softmax: fp32, or float64 where that is what comes in."""
    return torch.promote_types(dtype, torch.float32)


class ChunkedCrossEntropy(torch.autograd.Function):
    """With p = softmax(h Wᵀ) and y = onehot(target): dh = (p − y) W and dW = (p − y)ᵀ h."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        W = weight.to(hidden.dtype)
        need = hidden.requires_grad or weight.requires_grad
        loss = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        dh = torch.empty_like(hidden) if need else None
        dW = torch.zeros_like(weight, dtype=wide(weight.dtype)) if need else None
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], targets[rows]
            asked = target != IGNORE
            index = target.where(asked, 0)[:, None]
            logp = (h @ W.T).to(loss.dtype).log_softmax(-1)  # n V
            loss -= (logp.gather(1, index)[:, 0] * asked).sum()
            if need:
                p = logp.exp_()
                p.scatter_add_(1, index, torch.full_like(p[:, :1], -1))
                dlogits = p.mul_(asked[:, None]).to(h.dtype)
                dh[rows] = dlogits @ W
                dW += dlogits.T @ h
        ctx.save_for_backward(dh, dW)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dW * grad.to(dW.dtype), None
