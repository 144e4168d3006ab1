"""softmax(q kᵀ / √D + mask) v, written twice: as the paper states it, and block by block.

`attend_obvious` builds the whole (T S) table of scores and is the oracle. `attend` walks over
blocks of queries, touches only the keys that a block can see, and computes the table again in the
backward pass instead of keeping it, so that memory grows with T and not with T·S: the idea of
FlashAttention, in plain torch. Who sees whom is data, a `Mask`, so that causal, windowed, packed,
padded and bidirectional attention are one function.

Papers: Vaswani et al. 2017 (arXiv 1706.03762, eq. 1); Dao 2023, FlashAttention-2 (arXiv
2307.08691); Shazeer 2019, one key-value head for many query heads (arXiv 1911.02150); Ainslie et
al. 2023, grouped heads (arXiv 2305.13245).
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels import launch
from kernels.flash import TritonAttention
from kernels.mask import Mask, check_shapes, dense

BLOCK = 64  # queries at a time: a block of scores then stays in a core's own cache


def attend_obvious(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v  (Vaswani et al. 2017, eq. 1).

    q (B H T D) looks at k, v (B K S D); query head h uses key-value head h·K/H. A query that sees
    nothing gets zeros.
    """
    return attend_with_lse_obvious(q, k, v, mask, scale)[0]


def attend_with_lse_obvious(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attend_obvious`, and log Σ exp of each query's scores (B H T), −∞ if it sees nothing."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # B H S D
    scores = scale * q @ k.transpose(-2, -1) + dense(mask, k.shape[2], q.dtype)  # B H T S
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf
    scores = scores.masked_fill(blind, 0)  # an empty softmax has no gradient
    out = (scores.softmax(-1) @ v).masked_fill(blind, 0)  # B H T D
    wide = scores.to(torch.promote_types(q.dtype, torch.float32))
    return out, wide.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same function and gradients as `attend_obvious`: in Triton on CUDA, else in torch.

    There it goes block by block; slopes get no gradient.
    """
    if q.is_cuda:
        return attend_triton(q, k, v, mask, scale)
    check_shapes(q, k, v, mask)
    return BlockedAttention.apply(q, k, v, mask.bias, mask, scale)


def attend_triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same function and gradients as `attend_obvious`, in kernels written by hand."""
    return attend_with_lse_triton(q, k, v, mask, scale)[0]


def attend_with_lse_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor]:
    """The same functions and gradients as `attend_with_lse_obvious`."""
    check_shapes(q, k, v, mask)
    check_triton(q, k, v, mask, scale)
    return TritonAttention.apply(q, k, v, mask.bias, mask, scale)


def check_triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> None:
    """ValueError, one sentence, for what the kernels cannot do."""
    launch.check("attend", q=q, k=k, v=v)
    for name in ("lo", "hi", "slopes", "at", "bias", "layout"):
        x = getattr(mask, name)
        if x is not None and x.device != q.device:
            raise ValueError(f"attend: mask.{name} is on {x.device}, but q on {q.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attend: q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not 16 <= q.shape[3] <= 256:
        raise ValueError(f"attend: the head width D = {q.shape[3]} must be from 16 to 256")
    if not scale > 0:
        raise ValueError(f"attend: scale = {scale} must be above 0")
    if mask.slopes is not None and mask.slopes.requires_grad:
        raise ValueError("attend: mask.slopes are constants and get no gradient: detach them")
    if mask.bias is not None and mask.bias.dtype not in launch.FLOATS:
        raise ValueError(f"attend: mask.bias is {mask.bias.dtype}; supported are 32 and 16 bits")
    if mask.layout is not None and (mask.block < 16 or mask.block & (mask.block - 1)):
        raise ValueError(f"attend: mask.block = {mask.block} must be a power of 2, at least 16")


class BlockedAttention(torch.autograd.Function):
    """Attention over blocks of queries; the backward pass computes each block's weights again.

    With P = softmax(scale·Q Kᵀ + bias) and O = P V (FlashAttention-2, section 2.1): dV = Pᵀ dO,
    dP = dO Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)), dQ = scale·dS K, dK = scale·dSᵀ Q, dbias = dS.
    Query heads that share a key-value head are laid side by side as more rows: (B K, G·t, D).
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, scale):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for rows, keys, hidden, added in blocks(mask, k):
            weights = block_weights(q[:, :, rows], k[:, :, keys], hidden, added, scale)
            out[:, :, rows] = ungroup(weights @ merge(v[:, :, keys]), q[:, :, rows].shape)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.mask, ctx.scale = replace(mask, bias=None), scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        B, K, _, D = k.shape
        for rows, keys, hidden, added in blocks(replace(ctx.mask, bias=bias), k):
            do, q_block, k_block = (
                group(grad[:, :, rows], K),
                group(q[:, :, rows], K),
                k[:, :, keys],
            )
            p = block_weights(q[:, :, rows], k_block, hidden, added, ctx.scale)
            dv[:, :, keys] += (p.transpose(1, 2) @ do).view(B, K, -1, D)
            ds = do @ merge(v[:, :, keys]).transpose(1, 2)
            ds -= (do * group(out[:, :, rows], K)).sum(-1, keepdim=True)
            ds *= p
            if dbias is not None:
                each = ungroup(ds, (*q[:, :, rows].shape[:3], -1))  # B H t s
                dbias[:, :, rows, keys] += each.sum_to_size(*bias.shape[:2], *each.shape[2:])
            ds *= ctx.scale
            dq[:, :, rows] = ungroup(ds @ merge(k_block), q[:, :, rows].shape)
            dk[:, :, keys] += (ds.transpose(1, 2) @ q_block).view(B, K, -1, D)
        return dq, dk, dv, dbias, None, None


def blocks(mask: Mask, k: Tensor):
    """For each block of queries: its rows, the keys that any of them sees, and how they see them.

    Yields (rows, keys, hidden, added): a slice; a slice, or, with a layout, whose empty blocks are
    left out, the numbers of keys; hidden (B H t s), true where one of these keys is not seen, or
    None; added (B H t s) to the scores, or None. B and H may be 1.
    """
    S, wide = k.shape[2], torch.promote_types(k.dtype, torch.float32)
    for start in range(0, mask.lo.shape[1], BLOCK):
        rows = slice(start, min(start + BLOCK, mask.lo.shape[1]))
        lo, hi = mask.lo[:, rows, None], mask.hi[:, rows, None]
        first = max(0, int(lo.min()))
        keys = slice(first, max(first, min(S, int(hi.max()) + 1)))
        s = torch.arange(keys.start, keys.stop, device=lo.device)
        if mask.layout is not None:
            t = torch.arange(rows.start, rows.stop, device=lo.device)
            one_row = start // mask.block == (rows.stop - 1) // mask.block
            open_rows = mask.layout[:, t[:1] // mask.block if one_row else t // mask.block]
            keys = s = s[open_rows.flatten(0, 1).any(0)[s // mask.block]]
        hidden = ((s < lo) | (s > hi))[:, None]
        if mask.layout is not None and open_rows.shape[:2] != (1, 1):
            hidden = hidden | ~open_rows[:, :, s // mask.block]
        added = None if mask.bias is None else mask.bias[:, :, rows, keys]
        if mask.slopes is not None:
            distance = (mask.at[:, rows, None] - s).abs()
            slopes = mask.slopes.to(wide)[:, None, None] * distance[:, None]
            added = -slopes if added is None else added - slopes
        yield rows, keys, hidden if hidden.any() else None, added


def block_weights(
    q: Tensor, k: Tensor, hidden: Tensor | None, added: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ + added) over the visible keys, one block of queries: (B K, G·t, s).

    The weights of a query that sees nothing are 0, so that it gives zeros and no gradient.
    """
    (B, H, t, _), (_, K, s, _) = q.shape, k.shape
    scores = group(q * scale, K) @ merge(k).transpose(1, 2)
    each = scores.view(B, H, t, s)
    if added is not None:
        each += added
        unseen = added == -torch.inf
        hidden = unseen if hidden is None else hidden | unseen
    if hidden is None:
        return scores.softmax(-1)
    each.masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1)
    blind = hidden.all(-1, keepdim=True)
    if blind.any():
        weights.view(B, H, t, s).masked_fill_(blind, 0)
    return weights


def merge(x: Tensor) -> Tensor:
    """(B K S D) → (B·K, S, D), one matrix for each key-value head."""
    return x.flatten(0, 1)


def group(x: Tensor, K: int) -> Tensor:
    """(B H t D) → (B·K, G·t, D): the G query heads of one key-value head, one below the other."""
    B, H, t, D = x.shape
    return x.reshape(B * K, H // K * t, D)


def ungroup(x: Tensor, shape: torch.Size) -> Tensor:
    """The way back from `group`."""
    return x.view(shape)
