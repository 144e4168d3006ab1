"""Output projection and cross-entropy in one: −log softmax(h Wᵀ)[target], a chunk at a time.

`cross_entropy_obvious` writes the whole (N V) table of logits and is the oracle. `cross_entropy`
works through the tokens in chunks: a chunk's logits become its loss and, in the same pass, its
gradients, and are then forgotten. For a vocabulary of 50,000 the logits would otherwise be the
largest tensor of the whole training step. On a GPU the three products stay with cuBLAS, and one
Triton kernel turns a chunk's logits into their gradient in place.

Two options change the loss of every asked token: label smoothing e mixes the target with the
uniform distribution, (1−e)·nll + e·mean over V of −log p, and the z-loss adds z·(log Σ exp)², which
keeps the logits from drifting.

Papers: Wijmans et al. 2024, Cut Your Losses (arXiv 2411.09009) on why the logits must not be kept;
Szegedy et al. 2016, smoothing (arXiv 1512.00567, section 7); Chowdhery et al. 2022, PaLM's z-loss
(arXiv 2204.02311, section 5); Milakov and Gimelshein 2018, online softmax (arXiv 1805.02867).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import launch
from kernels.launch import tl, triton

IGNORE = -100  # a target that asks for nothing: no loss, no gradient
CHUNK_BYTES = 32 << 20  # of fp32 logits at a time, on a CPU
# On a GPU: as many bytes of logits as dW has, within these bounds. Each chunk reads and writes dW
# once (8 bytes per weight), so a large dW wants few chunks; and it is there anyway.
GPU_CHUNK_BYTES = (256 << 20, 512 << 20)


def cross_entropy_obvious(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Σ over asked tokens of −log softmax(h Wᵀ)[target], in nats, in fp32 or wider.

    hidden (N C), weight (V C), targets (N) in 0 … V−1 or IGNORE. A sum, not a mean: who accumulates
    over micro-batches or ranks divides by all their tokens (a mean of means is not the mean).
    """
    logits = (hidden @ weight.to(hidden.dtype).T).to(wide(hidden.dtype))  # N V
    loss = F.cross_entropy(
        logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1)[targets != IGNORE].square().sum()
    return loss


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """The same value and gradients as `cross_entropy_obvious`, chunk by chunk.

    ValueError for a target that is no id; on a GPU, which is not waited for, the loss is then NaN.
    """
    if hidden.is_cuda:
        return cross_entropy_triton(hidden, weight, targets, z_loss, smoothing)
    verify(hidden, weight, targets, smoothing)
    return ChunkedCrossEntropy.apply(*needed(hidden, weight), targets, z_loss, smoothing)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and softmax: fp32, or float64 where that is what comes in."""
    return torch.promote_types(dtype, torch.float32)


def needed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under no_grad nobody will ask for the gradients that forward computes: detached tensors."""
    return tensors if torch.is_grad_enabled() else tuple(x.detach() for x in tensors)


def verify(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> None:
    """ValueError, one sentence, unless the shapes belong together and every target is an id."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"cross_entropy: hidden (N C) and weight (V C) are {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; C must be the same"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cross_entropy: targets are {tuple(targets.shape)} of {targets.dtype}; supported are "
            f"({len(hidden)},) of torch.int64 or torch.int32"
        )
    if not 0 <= smoothing <= 1:
        raise ValueError(f"cross_entropy: smoothing is {smoothing}; it must be in 0 … 1")
    if targets.device.type == "cpu":
        wrong = (targets != IGNORE) & ((targets < 0) | (targets >= len(weight)))
        if wrong.any():
            raise ValueError(
                f"cross_entropy: targets hold {targets[wrong][0]}; ids are 0 … {len(weight) - 1}, "
                f"and {IGNORE} asks for nothing"
            )


# --- torch ----------------------------------------------------------------------------------------


class ChunkedCrossEntropy(torch.autograd.Function):
    """With p = softmax(h Wᵀ) and ℓ = log Σ exp(h Wᵀ), the gradient of an asked token's logits is

    d = (1 + 2zℓ) p − (1−e) onehot(target) − e/V,   and   dh = d W,   dW = dᵀ h.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, smoothing):
        W = weight.to(hidden.dtype)
        need = hidden.requires_grad or weight.requires_grad
        loss = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        dh = torch.empty_like(hidden) if need else None
        dW = torch.zeros_like(weight, dtype=wide(weight.dtype)) if need else None
        chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], targets[rows]
            asked = (target != IGNORE)[:, None]
            index = target[:, None].where(asked, 0).long()
            logits = (h @ W.T).to(loss.dtype)  # n V
            logp = logits.log_softmax(-1)
            nll = -logp.gather(1, index)
            lse = logits.gather(1, index) + nll
            total = (1 - smoothing) * nll + z_loss * lse.square()
            if smoothing:
                total -= smoothing * logp.mean(-1, keepdim=True)
            loss += (total * asked).sum()
            if need:
                p = logp.exp_()
                if z_loss or smoothing:
                    p.mul_(1 + 2 * z_loss * lse).sub_(smoothing / len(W))
                p.scatter_add_(1, index, torch.full_like(p[:, :1], smoothing - 1))
                dlogits = p.mul_(asked).to(h.dtype)
                dh[rows] = dlogits @ W
                dW += dlogits.T @ h
        ctx.save_for_backward(dh, dW)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dW * grad.to(dW.dtype), None, None, None


# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def columns(Row, start, V, width, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK logits from column `start` on as a tile of 8 side by side, which one thread holds.

    A maximum or sum over 8 then costs no exchange. Loaded up to `width`, the row's multiple of 16,
    so that the mask too is alike for 8: rows of V numbers would be read one by one. Returns the
    tile in fp32, −∞ from V on, and its columns.
    """
    col = start + 8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :]
    if MASKED:
        x = tl.load(Row + col, col < width, other=0.0).to(tl.float32)
        x = tl.where(col < V, x, -float("inf"))
    else:
        x = tl.load(Row + col).to(tl.float32)
    return x, col


@triton.jit
def look(
    Row, start, top, total, sum_x, V, width,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """One block of the online softmax: each 8 columns keep their own maximum and Σ exp."""
    x, col = columns(Row, start, V, width, BLOCK, MASKED)
    new = tl.maximum(top, tl.max(x, 1))
    total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new[:, None]), 1)
    if SMOOTHED:
        sum_x += tl.sum(tl.where(col < V, x, 0.0) if MASKED else x, 1)
    return new, total, sum_x


@triton.jit
def differentiate(
    Row, start, top, inverse, extra, target, smoothing, floor, V, width,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of logits becomes its gradient: p − onehot + smoothing·(onehot − 1/V) + extra·p.

    In this order, because p − 1 is exact where p is near 1.
    """
    x, col = columns(Row, start, V, width, BLOCK, MASKED)
    p = tl.exp(x - top) * inverse
    d = tl.where(col == target, p - 1 + smoothing, p) - floor + extra * p
    if MASKED:
        tl.store(Row + col, d, col < width)
    else:
        tl.store(Row + col, d)


def restored(*blocks: tuple[int, int, int]) -> dict:
    """(BLOCK, warps, loads ahead) to try; each trial must find the logits that the first found."""
    configs = [triton.Config({"BLOCK": b, "STAGES": s}, num_warps=w) for b, w, s in blocks]
    return {"configs": configs, "restore_value": ["Logits"]}


# A row that is read for the second time should still lie in the L2 cache (50 MB), so that 4 bytes
# of a 16-bit logit move and not 6: few rows at a time, with many threads or loads ahead for each.
@launch.autotune(
    **restored(
        (4096, 8, 1), (4096, 16, 1), (2048, 8, 3), (4096, 8, 3), (4096, 16, 3), (8192, 32, 3)
    ),
    key=["V", "GRADIENT"], interpreted={"BLOCK": 16, "STAGES": 1},
)  # fmt: skip
@triton.jit
def rows_kernel(
    Logits, Targets, Losses, stride, V, width, z_loss, smoothing,
    IGNORED: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The loss of one row of logits; with GRADIENT the row then holds its gradient."""
    row = tl.program_id(0).to(tl.int64)
    Row = Logits + row * stride
    target = tl.load(Targets + row)
    full = V // BLOCK * BLOCK
    if target == IGNORED:
        tl.store(Losses + row, 0.0)
        if GRADIENT:
            zero = tl.zeros([BLOCK], Logits.dtype.element_ty)
            for start in range(0, width, BLOCK):
                col = start + tl.arange(0, BLOCK)
                tl.store(Row + col, zero, col < width)
        return
    # A target that is no id makes the loss NaN: a GPU cannot raise without being waited for.
    known = (target >= 0) & (target < V)
    x_target = tl.load(Row + target, known, other=float("nan")).to(tl.float32)
    top = tl.full([BLOCK // 8], -3e38, tl.float32)  # finite: −∞ − −∞ must not become NaN
    total = tl.zeros([BLOCK // 8], tl.float32)
    sum_x = tl.zeros([BLOCK // 8], tl.float32)
    if full < V:  # the ragged end first: Triton 3.7.1 cannot compile an fp32 sum it would follow
        top, total, sum_x = look(Row, full, top, total, sum_x, V, width, BLOCK, True, SMOOTHED)
    for start in tl.range(0, full, BLOCK, num_stages=STAGES):
        top, total, sum_x = look(Row, start, top, total, sum_x, V, width, BLOCK, False, SMOOTHED)
    own, top = top, tl.max(top, 0)
    total = tl.sum(total * tl.exp(own - top), 0)
    log_total = tl.log(total)
    lse = top + log_total
    loss = (top - x_target) + log_total + z_loss * lse * lse
    if SMOOTHED:
        loss += smoothing * (x_target - tl.sum(sum_x, 0) / V)
    tl.store(Losses + row, loss)
    if GRADIENT:
        inverse, extra, floor = 1 / total, 2 * z_loss * lse, smoothing / V
        target = target.to(tl.int32)  # as the columns: a comparison in 64 bits costs double
        for start in tl.range(0, full, BLOCK, num_stages=STAGES):
            differentiate(
                Row, start, top, inverse, extra, target, smoothing, floor, V, width, BLOCK, False
            )
        if full < V:
            differentiate(
                Row, full, top, inverse, extra, target, smoothing, floor, V, width, BLOCK, True
            )


def cross_entropy_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """`cross_entropy` with the softmax in one Triton kernel; hidden and weight may differ in dtype.

    Its gradients are scaled in place, so that only one backward pass is possible.
    """
    launch.check("cross_entropy_triton", hidden=hidden, weight=weight)
    if targets.device != hidden.device:
        raise ValueError(
            f"cross_entropy_triton: targets are on {targets.device}, but hidden on {hidden.device}"
        )
    verify(hidden, weight, targets, smoothing)
    options = float(z_loss), float(smoothing)
    return TritonCrossEntropy.apply(*needed(hidden, weight), targets, *options)


def chunk_rows(N: int, V: int, C: int, row_bytes: int) -> int:
    """Rows of a chunk: as GPU_CHUNK_BYTES says, all chunks about alike."""
    low, high = GPU_CHUNK_BYTES
    most = max(1, min(max(4 * V * C, low), high) // row_bytes)
    return max(1, launch.ceil_div(N, launch.ceil_div(N, most) or 1))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's fp32 although a and b may have 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:  # cuBLAS adds in fp32 before it writes: no pass of its own
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class TritonCrossEntropy(torch.autograd.Function):
    """`ChunkedCrossEntropy` on a GPU: one buffer of logits for all chunks, in hidden's dtype."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, smoothing):
        (N, C), V = hidden.shape, len(weight)
        need_h, need_W = ctx.needs_input_grad[:2]
        W, targets = weight.to(hidden.dtype), targets.contiguous()
        width = launch.ceil_div(V, 64) * 64  # 128 bytes or more: every row starts a cache line
        size = chunk_rows(N, V, C, width * hidden.element_size())
        buffer = hidden.new_empty(min(N, size), width)
        losses = hidden.new_empty(N, dtype=torch.float32)
        dh = hidden.new_empty(N, C) if need_h else None
        dW = torch.zeros(V, C, dtype=torch.float32, device=weight.device) if need_W else None
        for start in range(0, N, size):
            rows = slice(start, start + size)
            h = hidden[rows]
            logits = torch.mm(h, W.T, out=buffer[: len(h), :V])
            rows_kernel[(len(h),)](
                logits, targets[rows], losses[rows], width, V, width, z_loss, smoothing,
                IGNORED=IGNORE, SMOOTHED=smoothing != 0, GRADIENT=need_h or need_W,
            )  # fmt: skip
            if need_h:
                torch.mm(logits, W, out=dh[rows])
            if need_W:
                add_product(dW, logits.T, h)
        ctx.grads, ctx.dtype = (dh, dW), weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError(
                "cross_entropy_triton: a second backward pass; the first one has used up the "
                "gradients, so call the loss again"
            )
        (dh, dW), ctx.grads = ctx.grads, None
        scale = grad.view(1, 1)  # not 0-d: the product is then taken in fp32, not in dh's 16 bits
        dh = None if dh is None else dh.mul_(scale)
        dW = None if dW is None else dW.mul_(scale).to(ctx.dtype)
        return dh, dW, None, None, None
