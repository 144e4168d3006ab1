"""RoPE's rotation of queries and keys, with its gradient by hand.

`rotate_obvious` is the equation and the oracle. `rotate` writes each half once, and its gradient is
the rotation back: rotations are orthogonal, so the transpose is the inverse.

Papers: Su et al. 2021 (arXiv 2104.09864, eq. 34).
"""

import torch
from torch import Tensor


def rotate_obvious(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x₁, x₂) ↦ (x₁ cos − x₂ sin, x₂ cos + x₁ sin), x (B T H D) in two halves along D.

    cos, sin: (B T D/2), or (1 T D/2) when all rows are alike.
    """
    x1, x2 = x.chunk(2, -1)
    cos, sin = (part[:, :, None].to(x.dtype) for part in (cos, sin))  # B T 1 D/2
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same function and gradient as `rotate_obvious`."""
    return RotateFunction.apply(x, cos, sin)


class RotateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_obvious` without intermediate results."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x1, x2), (y1, y2) = x.chunk(2, -1), out.chunk(2, -1)
    cos, sin = (part[:, :, None].to(x.dtype) for part in (cos, sin))
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return out
