"""Attention of one new token to a long cache: the keys are shared out over the whole GPU.

Idea (Flash-Decoding): with T = 1 a head has one row of scores, and a program per head would leave
most processors idle. So the visible keys of each key-value head are cut into equal shares. A
program walks over one share with an online softmax, for all query heads of the group at once: every
key and value is read once. A second kernel merges the shares.

The least traffic is 2 · B·K·(hi − lo + 1)·D numbers, all else is small: what counts is to keep many
bytes on their way (deep pipelines, several programs per processor). The interval is read on the
GPU, so a CUDA graph can be replayed while a static cache fills up, and keys outside cost nothing.

Papers: Dao et al. 2023, Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html);
Milakov and Gimelshein 2018, online softmax (arXiv 1805.02867).
"""

import torch
from torch import Tensor

from kernels import launch
from kernels.attention import Mask, attend, attend_obvious, check_shapes, check_triton
from kernels.flash import own_stride
from kernels.launch import LOG2E, tl, triton

PROGRAMS = 4  # per processor: two or three fit at a time, and shorter shares end more evenly
LEAST = 128  # keys of the buffer for each share; below, merging costs more than it saves
HEADS = 32  # of a group in one tile; a larger group reads the cache once for each tile

decode_obvious = attend_obvious  # with T = 1


def decode(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for one query per head: q (B H 1 D), k and v (B K S D).

    The mask may have everything but a layout. There is no gradient.
    """
    if q.is_cuda:
        return decode_triton(q, k, v, mask, scale)
    check_decode(q, k, v, mask)
    return attend(q, k, v, mask, scale)


def check_decode(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """ValueError, one sentence, for what attention allows but decoding does not."""
    check_shapes(q, k, v, mask)
    if q.shape[2] != 1:
        raise ValueError(f"decode: q has T = {q.shape[2]} queries, not 1: use attend")
    if mask.layout is not None:
        raise ValueError("decode: mask.layout is not supported: use attend")
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, mask.bias, mask.slopes)
    ):
        raise ValueError("decode: a gradient is wanted, and there is none: use attend")


# --- Triton ---------------------------------------------------------------------------------------


def fitting(configs: list, args: dict, **options) -> list:
    """Blocks of keys such that two programs' pipelines share a processor's memory."""
    options = {**args, **options}
    size = options["D"] * options["K"].element_size()  # bytes of a key
    least = 8192 if options["K"].element_size() == 2 else 16384  # fp32 spills in smaller blocks
    return [c for c in configs if least <= c.kwargs["N"] * size <= 16384] or configs[:1]


@launch.autotune(
    [
        triton.Config({"N": n}, num_warps=4, num_stages=stages)
        for n in (16, 32, 64, 128)
        for stages in (3, 4)
    ],
    key=["D", "M"],
    interpreted={"N": 16},
    prune_configs_by={"early_config_prune": fitting},
)
@triton.jit
def share_kernel(
    Q, K, V, Parts, Tops, Totals, Lo, Hi, Slopes, At, Bias,
    q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, lo_b, hi_b, at_b, bias_b, bias_h, bias_s,
    H, heads, S, c,
    WHOLE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One share of the keys: Σ p v, the largest exponent of 2 and Σ p, for M heads of a group.

    If the share is WHOLE, the result itself. Shares differ by one block of N keys at most.
    """
    group = H // heads
    tiles = tl.cdiv(group, M)
    pid = tl.program_id(0)
    row = pid % tiles * M + tl.arange(0, M)
    real = row < group
    kh = (pid // tiles % heads).to(tl.int64)
    b = (pid // tiles // heads).to(tl.int64)
    h = kh * group + row

    lo = tl.maximum(tl.load(Lo + b * lo_b), 0).to(tl.int32)
    hi = tl.minimum(tl.load(Hi + b * hi_b), S - 1).to(tl.int32)
    split, splits = tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(tl.maximum(hi + 1 - lo, 0), N)
    share, rest = blocks // splits, blocks % splits
    begin = lo + (split * share + tl.minimum(split, rest)) * N
    end = tl.minimum(begin + (share + (split < rest)) * N, hi + 1)

    d = tl.arange(0, D)[None, :]
    q = tl.load(Q + b * q_b + h[:, None] * q_h + d, real[:, None] & (d < WIDTH), other=0.0)
    K += b * k_b + kh * k_h + d
    V += b * v_b + kh * v_h + d
    if Slopes is not None:
        slope = tl.load(Slopes + h, real, other=0.0).to(tl.float32)[:, None] * LOG2E
        at = tl.load(At + b * at_b).to(tl.int32)
    if Bias is not None:
        Bias += b * bias_b + h[:, None] * bias_h
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    for n in range(begin, end, N):
        col = n + tl.arange(0, N)
        far = col.to(tl.int64)
        there = (col < end)[:, None] & (d < WIDTH)
        k = tl.load(K + far[:, None] * k_s, there, other=0.0)
        s = tl.dot(q, k.T, input_precision="ieee") * c
        if Slopes is not None:
            s -= slope * tl.abs(at - col).to(tl.float32)[None, :]
        if Bias is not None:
            bias = tl.load(Bias + far * bias_s, real[:, None] & (col < end), other=0.0)
            s += bias.to(tl.float32) * LOG2E
        s = tl.where(col < end, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)  # a bias may hide all keys
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        v = tl.load(V + far[:, None] * v_s, there, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new

    place = (b * H + h) * splits + split
    if WHOLE:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        written = real
    else:
        tl.store(Tops + place, top, real)
        tl.store(Totals + place, total, real)
        written = real & (total > 0)  # nobody reads what an empty share leaves
    Parts += place[:, None] * WIDTH + d
    tl.store(Parts, acc.to(Parts.dtype.element_ty), written[:, None] & (d < WIDTH))


@triton.jit
def merge_kernel(
    Parts, Tops, Totals, Out, splits,
    WIDTH: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out = Σᵢ 2^(topᵢ − top) partᵢ / Σᵢ 2^(topᵢ − top) totalᵢ of one head, N shares at a time."""
    head = tl.program_id(0).to(tl.int64)
    Tops += head * splits
    each = tl.arange(0, COUNT)
    top = tl.max(tl.load(Tops + each, each < splits, other=-float("inf")))
    top = tl.where(top == -float("inf"), 0.0, top)
    d = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    total = 0.0
    for first in range(0, splits, N):
        i = first + tl.arange(0, N)
        weight = tl.exp2(tl.load(Tops + i, i < splits, other=-float("inf")) - top)
        total += tl.sum(weight * tl.load(Totals + head * splits + i, i < splits, other=0.0))
        at = (head * splits + i)[:, None] * WIDTH + d[None, :]
        there = (weight > 0)[:, None] & (d < WIDTH)[None, :]
        acc += tl.sum(weight[:, None] * tl.load(Parts + at, there, other=0.0), 0)
    out = acc / tl.where(total == 0, 1.0, total)
    tl.store(Out + head * WIDTH + d, out.to(Out.dtype.element_ty), d < WIDTH)


def decode_triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same function as `decode_obvious`, in kernels written by hand."""
    check_decode(q, k, v, mask)
    check_triton(q, k, v, mask, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, H, _, D), (K, S) = q.shape, k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    rows = min(HEADS, max(16, launch.power_of_2(H // K)))
    programs = B * K * launch.ceil_div(H // K, rows)
    enough = launch.ceil_div(PROGRAMS * launch.processors(q.device), programs)
    splits = max(1, min(enough, S // LEAST))
    tops, totals = torch.empty(2, B, H, splits, dtype=torch.float32, device=q.device)
    parts = out if splits == 1 else torch.empty(B, H, splits, D, device=q.device)
    slopes = None if mask.slopes is None else mask.slopes.contiguous()
    bias_s = 0 if mask.bias is None else mask.bias.stride(3)
    share_kernel[(programs, splits)](
        q, k, v, parts, tops, totals, mask.lo, mask.hi, slopes, mask.at, mask.bias,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *(own_stride(x, 0) for x in (mask.lo, mask.hi, mask.at, mask.bias)),
        own_stride(mask.bias, 1), bias_s, H, K, S, scale * LOG2E.value,
        WHOLE=splits == 1, WIDTH=D, D=launch.power_of_2(D), M=rows,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(B * H,)](
            parts, tops, totals, out, splits,
            WIDTH=D, D=launch.power_of_2(D), COUNT=launch.power_of_2(splits), N=16,
        )  # fmt: skip
    return out
