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

import torch
from torch import Tensor

from kernels import launch
from kernels.flash import TritonAttention
from kernels.mask import Mask, check_shapes, dense, visible

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

    There the plain interval goes block by block, other masks through the obvious version.
    """
    if q.is_cuda:
        return attend_triton(q, k, v, mask, scale)
    check_shapes(q, k, v, mask)
    if not mask.plain:
        return attend_obvious(q, k, v, mask, scale)
    return BlockedAttention.apply(q, k, v, mask, scale)


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

    With P = softmax(scale·Q Kᵀ) and O = P V (FlashAttention-2, section 2.1):
    dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ∘ (dP − rowsum(dO ∘ O)),  dQ = scale·dS K,  dK = scale·dSᵀ Q.
    Query heads that share a key-value head are laid side by side as more rows: (B K, G·t, D).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for rows, keys, hidden, blind in blocks(mask, k.shape[2]):
            weights = block_weights(q[:, :, rows], k[:, :, keys], hidden, scale)
            o = ungroup(weights @ merge(v[:, :, keys]), q[:, :, rows].shape)
            out[:, :, rows] = o if blind is None else o.masked_fill(blind, 0)
        ctx.save_for_backward(q, k, v, out, mask.lo, mask.hi)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lo, hi = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        B, K, _, D = k.shape
        for rows, keys, hidden, blind in blocks(Mask(lo, hi), k.shape[2]):
            do = grad[:, :, rows]
            do = group(do if blind is None else do.masked_fill(blind, 0), K)
            q_block, k_block = group(q[:, :, rows], K), merge(k[:, :, keys])
            p = block_weights(q[:, :, rows], k[:, :, keys], hidden, ctx.scale)
            dv[:, :, keys] += (p.transpose(1, 2) @ do).view(B, K, -1, D)
            ds = do @ merge(v[:, :, keys]).transpose(1, 2)
            ds -= (do * group(out[:, :, rows], K)).sum(-1, keepdim=True)
            ds *= p
            ds *= ctx.scale
            dq[:, :, rows] = ungroup(ds @ k_block, q[:, :, rows].shape)
            dk[:, :, keys] += (ds.transpose(1, 2) @ q_block).view(B, K, -1, D)
        return dq, dk, dv, None, None


def blocks(mask: Mask, S: int):
    """For each block of queries: its rows, the keys that any of them sees, and what stays hidden.

    Yields (rows, keys, hidden, blind): two slices; hidden (B 1 t s), true where a key in reach is
    not seen, or None; blind (B 1 t 1), true for queries that see nothing, or None. A blind query is
    let look at one key, so that no row of the softmax is empty, and its result is cleared.
    """
    lo, hi = mask.lo.clamp(min=0), mask.hi.clamp(max=S - 1)
    blind = (lo > hi)[:, None, :, None]
    lo = lo.clamp(max=S - 1)
    hi = torch.maximum(lo, hi)
    for start in range(0, lo.shape[1], BLOCK):
        rows = slice(start, min(start + BLOCK, lo.shape[1]))
        first, last = int(lo[:, rows].min()), int(hi[:, rows].max())
        hidden = ~visible(Mask(lo[:, rows] - first, hi[:, rows] - first), last - first + 1)
        yield (
            rows,
            slice(first, last + 1),
            hidden if hidden.any() else None,
            blind[:, :, rows] if blind[:, :, rows].any() else None,
        )


def block_weights(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) over the visible keys, one block of queries: (B K, G·t, s)."""
    (B, H, t, _), (_, K, s, _) = q.shape, k.shape
    scores = group(q * scale, K) @ merge(k).transpose(1, 2)
    if hidden is not None:
        scores.view(B, H, t, s).masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1)


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
