"""What happens to each number alone: SwiGLU, GELU, and RoPE's rotation; gradients by hand.

The obvious versions are the equations and the oracles. Such a function costs what its bytes cost,
so each kernel reads every number once and writes every result once: the backward pass of SwiGLU
computes the gate's sigmoid again instead of reading it, and one launch rotates queries and keys.
The gradient of a rotation is the rotation back: its transpose is its inverse.

Papers: Shazeer 2020, gated units (arXiv 2002.05202); Hendrycks and Gimpel 2016, GELU (arXiv
1606.08415); Su et al. 2021, RoPE (arXiv 2104.09864, eq. 34).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch
from kernels.launch import tl, triton

# --- activations ----------------------------------------------------------------------------------


def swiglu_obvious(up: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) ∘ up, silu(g) = g·σ(g)  (Shazeer 2020, eq. 6 without its matrices)."""
    return F.silu(gate) * up


def gelu_obvious(x: Tensor) -> Tensor:
    """x·Φ(x), with the normal distribution's Φ(x) = (1 + erf(x/√2))/2."""
    return F.gelu(x)


def gelu_tanh_obvious(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh(√(2/π)·(x + 0.044715 x³))): GPT-2's GELU."""
    return F.gelu(x, approximate="tanh")


def swiglu(up: Tensor, gate: Tensor) -> Tensor:
    """The same function and gradients as `swiglu_obvious`; in Triton on CUDA."""
    return (swiglu_triton if up.is_cuda else swiglu_obvious)(up, gate)


def gelu(x: Tensor) -> Tensor:
    """The same function and gradient as `gelu_obvious`; in Triton on CUDA."""
    return (gelu_triton if x.is_cuda else gelu_obvious)(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The same function and gradient as `gelu_tanh_obvious`; in Triton on CUDA."""
    return (gelu_tanh_triton if x.is_cuda else gelu_tanh_obvious)(x)


@triton.jit
def bend(x, gate, KIND: tl.constexpr):
    """One number through its activation, and the derivative by x (and by the gate)."""
    if KIND == "swiglu":
        s = tl.sigmoid(gate)
        y = x * gate * s
        dx = gate * s
        dgate = x * s * (1 + gate * (1 - s))
    elif KIND == "gelu":
        phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y = x * phi
        dx = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        dgate = dx
    else:
        u = 0.7978845608028654 * x * (1 + 0.044715 * x * x)
        half = tl.sigmoid(2 * u)  # (1 + tanh u) / 2
        y = x * half
        dx = half + 2 * x * half * (1 - half) * 0.7978845608028654 * (1 + 0.134145 * x * x)
        dgate = dx
    return y, dx, dgate


CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
]


@launch.autotune(CONFIGS, ["KIND"], {"BLOCK": 16})
@triton.jit
def forward_kernel(X, Gate, Y, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, at < n, other=0.0).to(tl.float32)
    gate = x
    if Gate is not None:
        gate = tl.load(Gate + at, at < n, other=0.0).to(tl.float32)
    tl.store(Y + at, bend(x, gate, KIND)[0].to(Y.dtype.element_ty), at < n)


@launch.autotune(CONFIGS, ["KIND"], {"BLOCK": 16})
@triton.jit
def backward_kernel(X, Gate, dY, dX, dGate, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, at < n, other=0.0).to(tl.float32)
    gate = x
    if Gate is not None:
        gate = tl.load(Gate + at, at < n, other=0.0).to(tl.float32)
    dy = tl.load(dY + at, at < n, other=0.0).to(tl.float32)
    _, dx, dgate = bend(x, gate, KIND)
    tl.store(dX + at, (dy * dx).to(dX.dtype.element_ty), at < n)
    if dGate is not None:
        tl.store(dGate + at, (dy * dgate).to(dGate.dtype.element_ty), at < n)


class TritonBend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, kind):
        x = x.contiguous()
        gate = None if gate is None else gate.contiguous()
        ctx.save_for_backward(x, gate)
        ctx.kind = kind
        y = torch.empty_like(x)
        if x.numel():
            forward_kernel[blocks(x)](x, gate, y, x.numel(), KIND=kind)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate = ctx.saved_tensors
        dx = torch.empty_like(x)
        dgate = None if gate is None else torch.empty_like(gate)
        if x.numel():
            arguments = (x, gate, dy.contiguous(), dx, dgate, x.numel())
            backward_kernel[blocks(x)](*arguments, KIND=ctx.kind)
        return dx, dgate, None


def blocks(x: Tensor):
    return lambda meta: (launch.ceil_div(x.numel(), meta["BLOCK"]),)


def swiglu_triton(up: Tensor, gate: Tensor) -> Tensor:
    """The same function and gradients as `swiglu_obvious`."""
    launch.check("swiglu", up=up, gate=gate)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu: gate {tuple(gate.shape)} of {gate.dtype} must be like up, "
            f"{tuple(up.shape)} of {up.dtype}"
        )
    return TritonBend.apply(up, gate, "swiglu")


def gelu_triton(x: Tensor) -> Tensor:
    """The same function and gradient as `gelu_obvious`."""
    launch.check("gelu", x=x)
    return TritonBend.apply(x, None, "gelu")


def gelu_tanh_triton(x: Tensor) -> Tensor:
    """The same function and gradient as `gelu_tanh_obvious`."""
    launch.check("gelu_tanh", x=x)
    return TritonBend.apply(x, None, "gelu_tanh")


# --- RoPE -----------------------------------------------------------------------------------------


def rotate_obvious(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x₁, x₂) ↦ (x₁ cos − x₂ sin, x₂ cos + x₁ sin), x (B T H D) in two halves along D.

    cos, sin: (B T D/2), or (1 T D/2) when all rows are alike.
    """
    x1, x2 = x.chunk(2, -1)
    cos, sin = (part[:, :, None].to(x.dtype) for part in (cos, sin))  # B T 1 D/2
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def rotate_pair_obvious(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B T H D) and k (B T K D), both rotated."""
    return rotate_obvious(q, cos, sin), rotate_obvious(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same function and gradient as `rotate_obvious`, in torch."""
    return RotateFunction.apply(x, cos, sin)


def rotate_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `rotate_pair_obvious`; on CUDA in one launch."""
    if q.is_cuda:
        return rotate_pair_triton(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


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


@triton.jit
def turn_part(X, Y, x_b, x_t, x_h, t, T, heads, h, column, mine, cos, sin, HALF):
    """Rotate those vectors of X whose head h is one of its own (mine) into Y (B T heads D)."""
    near = X + (t // T) * x_b + (t % T) * x_t + h * x_h + column
    x1 = tl.load(near, mine, other=0.0).to(tl.float32)
    x2 = tl.load(near + HALF, mine, other=0.0).to(tl.float32)
    to = Y + (t * heads + h) * 2 * HALF + column
    tl.store(to, (x1 * cos - x2 * sin).to(Y.dtype.element_ty), mine)
    tl.store(to + HALF, (x2 * cos + x1 * sin).to(Y.dtype.element_ty), mine)


@launch.autotune(
    [triton.Config({"ROWS": r}, num_warps=w) for r, w in ((16, 4), (32, 4), (64, 8), (128, 8))],
    ["HALF"], {"ROWS": 8},
)  # fmt: skip
@triton.jit
def rotate_kernel(
    Q, K, Cos, Sin, Qy, Ky, q_b, q_t, q_h, k_b, k_t, k_h, angle_b, B, T, H, KV, HALF, sign,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each row of a tile is one head's vector of one token: first H of queries, then KV of keys."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    t, h = row // (H + KV), row % (H + KV)
    there = (t < B * T) & (column < HALF)
    angle = (t // T) * angle_b + (t % T) * HALF + column
    cos = tl.load(Cos + angle, there, other=0.0).to(tl.float32)
    sin = tl.load(Sin + angle, there, other=0.0).to(tl.float32) * sign
    turn_part(Q, Qy, q_b, q_t, q_h, t, T, H, h, column, there & (h < H), cos, sin, HALF)
    turn_part(K, Ky, k_b, k_t, k_h, t, T, KV, h - H, column, there & (h >= H), cos, sin, HALF)


def rotate_pair_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `rotate_pair_obvious`, in one launch."""
    launch.check("rotate_pair", q=q, k=k, cos=cos, sin=sin)
    (B, T, _, D), dtype = q.shape, q.dtype
    if D % 2 or k.shape[:2] != (B, T) or k.shape[3] != D or k.dtype != dtype:
        raise ValueError(
            f"rotate_pair: q {tuple(q.shape)} of {dtype} and k {tuple(k.shape)} of {k.dtype} must "
            "be (B T H D) and (B T K D) of one dtype, with an even D"
        )
    for name, x, shapes in (
        ("cos", cos, ((B, T, D // 2), (1, T, D // 2))),
        ("sin", sin, (tuple(cos.shape),)),
    ):
        if x.shape not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"rotate_pair: {name} {tuple(x.shape)} must be {wanted}")
    return TritonRotation.apply(q, k, cos.contiguous(), sin.contiguous())


class TritonRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn_pair(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dq, dk):
        return *turn_pair(dq, dk, *ctx.saved_tensors, -1.0), None, None


def turn_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Rotate forward (sign 1) or back (−1); results lie (B T H D) in memory."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    (B, T, H, D), K = q.shape, k.shape[2]
    if q.numel() + k.numel():
        rotate_kernel[lambda meta: (launch.ceil_div(B * T * (H + K), meta["ROWS"]),)](
            q, k, cos, sin, *outs, *q.stride()[:3], *k.stride()[:3],
            0 if len(cos) == 1 else cos.stride(0), B, T, H, K, D // 2, sign,
            BLOCK=launch.power_of_2(D // 2),
        )  # fmt: skip
    return tuple(outs)
