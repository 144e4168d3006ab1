"""Attention in Triton: FlashAttention-2 by hand, forward and backward, for every `Mask`.

Idea: a program keeps a tile of queries and walks over blocks of keys with an online softmax, so the
table of scores never leaves the chip. Blocks of which every query sees every key run in a loop
without a mask, the others in a second one: a comparison costs as much as half the softmax. All
exponentials are powers of 2, with scale · log₂e folded into one multiply-add. Tiles are copied by
the hardware (tensor descriptors), which fills with zeros beyond the edge.

`attend_triton` in kernels/attention.py is the function; this file is what stands behind it.

Papers: Dao 2023, FlashAttention-2 (arXiv 2307.08691); Milakov and Gimelshein 2018, online softmax
(arXiv 1805.02867); Press et al. 2022, ALiBi (arXiv 2108.12409).

Letters: B samples · H query heads · K key-value heads · T queries · S keys · D head width (a power
of 2 in the kernels) · M queries and N keys of a tile · b h kh m n: where a tile begins.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels import launch
from kernels.launch import LOG2E, TensorDescriptor, tl, triton
from kernels.mask import Mask

# --- Triton: parts that forward and backward share ------------------------------------------------

L2_BYTES = 32 << 20  # of keys and values that many programs may look at together


@triton.jit
def place(tiles, heads, section):
    """This program's tile and head: longest tiles first, over as many heads as the L2 cache holds.

    Programs start in the order of their numbers; all tiles of one section of heads come before the
    next section, and within it the last tile of every head comes first.
    """
    pid = tl.program_id(0)
    first = pid // (tiles * section) * section
    size = tl.minimum(section, heads - first)
    rest = pid % (tiles * section)
    return rest // size, first + rest % size


@triton.jit
def clamped(Lo, Hi, row, S):
    """The interval of some queries, cut to the keys there are."""
    lo = tl.maximum(tl.load(Lo + row), 0).to(tl.int32)
    hi = tl.minimum(tl.load(Hi + row), S - 1).to(tl.int32)
    return lo, hi


@triton.jit
def exponents(s, c, row, col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED: tl.constexpr):
    """Raw products q·k to the exponents of 2: c·s + log₂e·(ALiBi + bias), −∞ where hidden.

    row, lo, hi, at lie along one axis of s, col along the other. Without ALiBi and bias the factor
    c is left to the caller, who then needs one fused multiply-add for c·s − m.
    """
    if slope is not None:
        s = s * c - slope * tl.abs(at - col).to(tl.float32)
    elif Bias is not None:
        s = s * c
    if Bias is not None:
        there = (row < T) & (col < S)
        bias = tl.load(Bias + row.to(tl.int64) * bias_t + col * bias_s, there, other=0.0)
        s += bias.to(tl.float32) * LOG2E
    if MASKED:
        s = tl.where((lo <= col) & (col <= hi), s, -float("inf"))
    return s


@triton.jit
def block_at(i, left, first, after, Blocks, TILE: tl.constexpr, N: tl.constexpr):
    """Where the i-th masked block starts: i-th of the layout's list, or left or right of the full.

    The interval's masked blocks are `left` blocks from `first` on, and then those from `after` on.
    """
    if Blocks is not None:
        return tl.load(Blocks + i // (TILE // N)) * TILE + i % (TILE // N) * N
    return tl.where(i < left, first + i * N, after + (i - left) * N)


@triton.jit
def reach(first, full, full_end, end, N: tl.constexpr):
    """Cut [first, end) into masked blocks, full ones [full, full_end) and masked ones again.

    Returns the full range, the number of masked blocks left of it, and of all masked blocks.
    """
    empty = full_end <= full
    full = tl.where(empty, first, full)
    full_end = tl.where(empty, first, full_end)
    left = (full - first) // N
    return full, full_end, left, left + tl.maximum(tl.cdiv(end - full_end, N), 0)


@triton.jit
def my_queries(Lo, Hi, lo_b, H, T, S, section, M: tl.constexpr, N: tl.constexpr):
    """This program's sample, head and tile of M queries, their intervals, and blocks of N keys."""
    tiles = tl.cdiv(T, M)
    tile, head = place(tiles, tl.num_programs(0) // tiles, section)
    b, h = head // H, head % H
    m = (tiles - 1 - tile) * M
    row = tl.minimum(m + tl.arange(0, M), T - 1)  # rows beyond T repeat the last
    lo, hi = clamped(Lo + b * lo_b, Hi + b * lo_b, row, S)
    first = tl.min(lo) // N * N
    full = tl.cdiv(tl.max(lo), N) * N
    full_end = (tl.min(hi) + 1) // N * N
    full, full_end, left, masked = reach(first, full, full_end, tl.max(hi) + 1, N)
    return b, h, m, row, lo, hi, first, full, full_end, left, masked


# --- Triton: forward ------------------------------------------------------------------------------


@triton.jit
def look(
    acc, total, top, q, K, V, b, kh, n, c, row, lo, hi, slope, at, Bias, bias_t, bias_s, T, S,
    N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax (FlashAttention-2, algorithm 1, lines 8 to 10)."""
    k = K.load([b, kh, n, 0]).reshape(N, D)
    s = tl.dot(q, k.T, input_precision="ieee")
    col = n + tl.arange(0, N)[None, :]
    PLAIN: tl.constexpr = slope is None and Bias is None
    s = exponents(s, c, row, col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED)
    unit = c if PLAIN else 1.0
    new = tl.maximum(top, tl.max(s, 1) * unit)
    safe = new
    if MASKED or Bias is not None:  # nothing seen yet: −∞ − −∞ must not become NaN
        safe = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(s * unit - safe[:, None])
    shrink = tl.exp2(top - safe)
    v = V.load([b, kh, n, 0]).reshape(N, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new


def forward_blocks(args):
    """Before each launch: the shapes that Q, K, V and Out are cut into, from the configuration."""
    for name, rows in (("Q", "M"), ("K", "N"), ("V", "N"), ("Out", "M")):
        args[name].block_shape = [1, 1, args[rows], args["D"]]


def tiles(hook, *table):
    """Configurations (M, N, warps, stages) for the autotuner."""
    return [
        triton.Config({"M": m, "N": n}, num_warps=w, num_stages=s, pre_hook=hook)
        for m, n, w, s in table
    ]


def fitting(table, configs, args, **options):
    """Those configurations that hold their numbers in registers and shared memory, by `table`.

    table(D, bytes of an element, Hopper or newer) → the (M, N, warps, stages) that fit. With a
    layout, a block must not be larger than the layout's.
    """
    options = {**args, **options}
    target = triton.runtime.driver.active.get_current_target()
    good = table(options["D"], options["Q"].base.element_size(), target.arch >= 90)
    limit = options["TILE"] if options["Blocks"] is not None else 1 << 30
    found = [
        config for config in configs
        if (config.kwargs["M"], config.kwargs["N"], config.num_warps, config.num_stages) in good
        and max(config.kwargs.values()) <= limit
    ]  # fmt: skip
    return found or [min(configs, key=lambda c: c.kwargs["M"] * c.kwargs["N"] * c.num_stages)]


@launch.autotune(
    tiles(
        forward_blocks,
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 32, 4, 2),
        (32, 32, 4, 2),
    ),
    ["D", "T_CLASS", "S_CLASS"],
    {"M": 32, "N": 16},
)
@triton.jit
def forward_kernel(
    Q, K, V, Out, Lse, Lo, Hi, Slopes, At, Bias, Blocks, Counts,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, blocks_h, blocks_t, counts_h,
    H, group, T, S, section, c, T_CLASS, S_CLASS,
    TILE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b, h, m, row, lo, hi, first, full, full_end, left, masked = my_queries(
        Lo, Hi, lo_b, H, T, S, section, M, N
    )
    kh = h // group
    slope = Slopes
    at = At
    if Slopes is not None:
        slope = tl.load(Slopes + h).to(tl.float32) * LOG2E
        at = tl.load(At + b * at_b + row).to(tl.int32)[:, None]
    if Bias is not None:
        Bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    if Blocks is not None:  # the layout's list says where to look
        Blocks += h * blocks_h + m // TILE * blocks_t
        masked = tl.load(Counts + h * counts_h + m // TILE) * (TILE // N)
        full_end = full
    q = Q.load([b, h, m, 0]).reshape(M, D)
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    for n in range(full, full_end, N):
        n = tl.multiple_of(n, N)
        acc, total, top = look(
            acc, total, top, q, K, V, b, kh, n, c, row[:, None], lo[:, None], hi[:, None],
            slope, at, Bias, bias_t, bias_s, T, S, N, D, False,
        )  # fmt: skip
    for i in range(masked):
        n = block_at(i, left, first, full_end, Blocks, TILE, N)
        acc, total, top = look(
            acc, total, top, q, K, V, b, kh, n, c, row[:, None], lo[:, None], hi[:, None],
            slope, at, Bias, bias_t, bias_s, T, S, N, D, True,
        )  # fmt: skip

    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    Out.store([b, h, m, 0], acc.to(Out.dtype).reshape(1, 1, M, D))
    lse = tl.where(blind, -float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    row = m + tl.arange(0, M)
    tl.store(Lse + (b * H + h).to(tl.int64) * T + row, lse / LOG2E, row < T)


# --- Triton: backward -----------------------------------------------------------------------------


@triton.jit
def weights(
    s, c, lse, row, col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED: tl.constexpr
):
    """P = exp(scores − lse), computed again; lse in base 2, +∞ where a row gives nothing."""
    PLAIN: tl.constexpr = slope is None and Bias is None
    s = exponents(s, c, row, col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED)
    return tl.exp2(s * (c if PLAIN else 1.0) - lse)


@triton.jit
def row_sums(Lse, Delta, at, row, T):
    """Log-sum-exp in base 2 and rowsum(dO ∘ O) of some queries; a blind row gets +∞, so P = 0."""
    lse = tl.load(Lse + at + row, row < T, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    return lse, tl.load(Delta + at + row, row < T, other=0.0)


@triton.jit
def delta_kernel(
    Out, Grad, GradLse, Delta, Lo, Hi, Bounds, lo_b, H, T, S,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(dO ∘ O) − dlse; and what a tile of queries sees at least and at most."""
    tile, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    m = tile * M
    out = Out.load([b, h, m, 0]).reshape(M, D).to(tl.float32)
    grad = Grad.load([b, h, m, 0]).reshape(M, D).to(tl.float32)
    delta = tl.sum(out * grad, 1)
    row = m + tl.arange(0, M)
    at = tl.program_id(1).to(tl.int64) * T + row
    if GradLse is not None:
        delta -= tl.load(GradLse + at, row < T, other=0.0)
    tl.store(Delta + at, delta, row < T)
    if h == 0:
        row = tl.minimum(row, T - 1)
        lo, hi = clamped(Lo + b * lo_b, Hi + b * lo_b, row, S)
        count = tl.num_programs(0)
        Bounds += b * 4 * count + tile
        tl.store(Bounds, tl.min(lo))
        tl.store(Bounds + count, tl.max(hi))
        tl.store(Bounds + 2 * count, tl.max(lo))
        tl.store(Bounds + 3 * count, tl.min(hi))


@triton.jit
def key_gradients(
    dk, dv, k, v, Q, Grad, Lse, Delta, Lo, Hi, At, b, h, H, m, c, col, slope,
    Bias, bias_t, bias_s, T, S, M: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds: dV += Pᵀ dO, dK += dSᵀ Q; all tables are transposed."""
    q = Q.load([b, h, m, 0]).reshape(M, D)
    do = Grad.load([b, h, m, 0]).reshape(M, D)
    row = m + tl.arange(0, M)
    lse, delta = row_sums(Lse, Delta, (b * H + h).to(tl.int64) * T, row, T)
    row = tl.minimum(row, T - 1)
    lo, hi, at = None, None, None
    if MASKED:
        lo, hi = clamped(Lo, Hi, row, S)
        lo = lo[None, :]
        hi = hi[None, :]
    if slope is not None:
        at = tl.load(At + row).to(tl.int32)[None, :]
    s = tl.dot(k, q.T, input_precision="ieee")
    p = weights(
        s, c, lse[None, :], row[None, :], col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED
    )
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, do.T, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


def key_blocks(args):
    for name, rows in (("Q", "M"), ("Grad", "M"), ("K", "N"), ("V", "N"), ("dK", "N"), ("dV", "N")):
        args[name].block_shape = [1, 1, args[rows], args["D"]]


@launch.autotune(
    tiles(key_blocks, (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2)),
    ["D", "T_CLASS", "S_CLASS"],
    {"N": 16},
)
@triton.jit
def key_kernel(
    Q, K, V, Grad, dK, dV, Lse, Delta, Bounds, Lo, Hi, Slopes, At, Bias, Blocks, Counts,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, blocks_h, blocks_t, counts_h,
    H, group, T, S, section, bounds_b, c, scale, T_CLASS, S_CLASS,
    TILE: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over all queries that see it, in a fixed order."""
    tile, head = place(tl.cdiv(S, N), tl.num_programs(0) // tl.cdiv(S, N), section)
    heads = H // group
    b, kh = head // heads, head % heads
    n = tile * N
    col = n + tl.arange(0, N)[:, None]
    Lo += b * lo_b
    Hi += b * lo_b
    if At is not None:
        At += b * at_b

    # which tiles of queries see some of these keys, and which all of them
    queries = tl.cdiv(T, M)
    index = tl.arange(0, COUNT)
    Bounds += b * bounds_b + index
    there = index < queries
    lowest = tl.load(Bounds, there, other=S)
    highest = tl.load(Bounds + queries, there, other=-1)
    seen = (lowest < n + N) & (highest >= n)
    first = tl.min(tl.where(seen, index, queries))
    end = tl.max(tl.where(seen, index + 1, 0))
    lo_max = tl.load(Bounds + 2 * queries, there, other=S)
    hi_min = tl.load(Bounds + 3 * queries, there, other=-1)
    whole = (lo_max <= n) & (hi_min >= n + N - 1)
    full = tl.min(tl.where(whole, index, queries))
    full_end = tl.min(tl.where(~whole & (index > full), index, queries))
    full, full_end, left, masked = reach(first * M, full * M, full_end * M, end * M, M)

    k = K.load([b, kh, n, 0]).reshape(N, D)
    v = V.load([b, kh, n, 0]).reshape(N, D)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    for g in range(group):
        h = kh * group + g
        slope = Slopes
        bias = Bias
        blocks = Blocks
        if Slopes is not None:
            slope = tl.load(Slopes + h).to(tl.float32) * LOG2E
        if Bias is not None:
            bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
        if Blocks is not None:  # the layout's list says who looks
            blocks += h * blocks_h + n // TILE * blocks_t
            masked = tl.load(Counts + h * counts_h + n // TILE) * (TILE // M)
            full_end = full
        for m in range(full, full_end, M):
            dk, dv = key_gradients(
                dk, dv, k, v, Q, Grad, Lse, Delta, Lo, Hi, At, b, h, H, tl.multiple_of(m, M), c,
                col, slope, bias, bias_t, bias_s, T, S, M, D, False,
            )  # fmt: skip
        for i in range(masked):
            m = block_at(i, left, first * M, full_end, blocks, TILE, M)
            dk, dv = key_gradients(
                dk, dv, k, v, Q, Grad, Lse, Delta, Lo, Hi, At, b, h, H, m, c,
                col, slope, bias, bias_t, bias_s, T, S, M, D, True,
            )  # fmt: skip
    dK.store([b, kh, n, 0], (dk * scale).to(dK.dtype).reshape(1, 1, N, D))
    dV.store([b, kh, n, 0], dv.to(dV.dtype).reshape(1, 1, N, D))


@triton.jit
def query_gradient(
    dq, q, do, lse, delta, K, V, b, kh, n, c, row, lo, hi, slope, at, Bias, bias_t, bias_s, T, S,
    N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds: dQ += dS K."""
    k = K.load([b, kh, n, 0]).reshape(N, D)
    v = V.load([b, kh, n, 0]).reshape(N, D)
    col = n + tl.arange(0, N)[None, :]
    s = tl.dot(q, k.T, input_precision="ieee")
    p = weights(s, c, lse[:, None], row, col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED)
    dp = tl.dot(do, v.T, input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


def query_blocks(args):
    for name, rows in (("Q", "M"), ("Grad", "M"), ("dQ", "M"), ("K", "N"), ("V", "N")):
        args[name].block_shape = [1, 1, args[rows], args["D"]]


@launch.autotune(
    tiles(query_blocks, (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
    ["D", "T_CLASS", "S_CLASS"],
    {"M": 32, "N": 16},
)
@triton.jit
def query_kernel(
    Q, K, V, Grad, dQ, Lse, Delta, Lo, Hi, Slopes, At, Bias, Blocks, Counts,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, blocks_h, blocks_t, counts_h,
    H, group, T, S, section, c, scale, T_CLASS, S_CLASS,
    TILE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, summed over the keys that they see."""
    b, h, m, row, lo, hi, first, full, full_end, left, masked = my_queries(
        Lo, Hi, lo_b, H, T, S, section, M, N
    )
    kh = h // group
    slope = Slopes
    at = At
    if Slopes is not None:
        slope = tl.load(Slopes + h).to(tl.float32) * LOG2E
        at = tl.load(At + b * at_b + row).to(tl.int32)[:, None]
    if Bias is not None:
        Bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    if Blocks is not None:  # the layout's list says where to look
        Blocks += h * blocks_h + m // TILE * blocks_t
        masked = tl.load(Counts + h * counts_h + m // TILE) * (TILE // N)
        full_end = full
    q = Q.load([b, h, m, 0]).reshape(M, D)
    do = Grad.load([b, h, m, 0]).reshape(M, D)
    lse, delta = row_sums(Lse, Delta, (b * H + h).to(tl.int64) * T, m + tl.arange(0, M), T)
    dq = tl.zeros([M, D], tl.float32)
    for n in range(full, full_end, N):
        dq = query_gradient(
            dq, q, do, lse, delta, K, V, b, kh, tl.multiple_of(n, N), c, row[:, None], lo[:, None],
            hi[:, None], slope, at, Bias, bias_t, bias_s, T, S, N, D, False,
        )  # fmt: skip
    for i in range(masked):
        n = block_at(i, left, first, full_end, Blocks, TILE, N)
        dq = query_gradient(
            dq, q, do, lse, delta, K, V, b, kh, n, c, row[:, None], lo[:, None],
            hi[:, None], slope, at, Bias, bias_t, bias_s, T, S, N, D, True,
        )  # fmt: skip
    dQ.store([b, h, m, 0], (dq * scale).to(dQ.dtype).reshape(1, 1, M, D))


def bias_blocks(args):
    for name, rows in (("Q", "M"), ("Grad", "M"), ("K", "N"), ("V", "N")):
        args[name].block_shape = [1, 1, args[rows], args["D"]]


@launch.autotune(tiles(bias_blocks, (64, 64, 4, 2), (64, 64, 8, 2)), ["D"], {"M": 32, "N": 16})
@triton.jit
def bias_kernel(
    Q, K, V, Grad, dBias, Lse, Delta, Lo, Hi, Slopes, At, Bias, Layout,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, layout_h, layout_t,
    B, H, group, T, S, c, own_b, own_h,
    TILE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One tile of dBias = dS, summed over the samples and heads that share this bias."""
    m, n = tl.program_id(0) * M, tl.program_id(1) * N
    row, col = tl.minimum(m + tl.arange(0, M), T - 1), n + tl.arange(0, N)[None, :]
    total = tl.zeros([M, N], tl.float32)
    # own_b, own_h: how many biases there are along each axis: B or 1, H or 1
    first_b, first_h = tl.program_id(2) // own_h, tl.program_id(2) % own_h
    for b in range(first_b, B, own_b):
        lo, hi = clamped(Lo + b * lo_b, Hi + b * lo_b, row, S)
        if (tl.min(lo) < n + N) & (tl.max(hi) >= n):
            for h in range(first_h, H, own_h):
                slope = Slopes
                at = At
                if Slopes is not None:
                    slope = tl.load(Slopes + h).to(tl.float32) * LOG2E
                    at = tl.load(At + b * at_b + row).to(tl.int32)[:, None]
                bias = Bias + tl.cast(b, tl.int64) * bias_b + tl.cast(h, tl.int64) * bias_h
                q = Q.load([b, h, m, 0]).reshape(M, D)
                do = Grad.load([b, h, m, 0]).reshape(M, D)
                k = K.load([b, h // group, n, 0]).reshape(N, D)
                v = V.load([b, h // group, n, 0]).reshape(N, D)
                there = tl.cast(b * H + h, tl.int64) * T
                lse, delta = row_sums(Lse, Delta, there, m + tl.arange(0, M), T)
                s = tl.dot(q, k.T, input_precision="ieee")
                p = weights(
                    s, c, lse[:, None], row[:, None], col, lo[:, None], hi[:, None], slope, at,
                    bias, bias_t, bias_s, T, S, True,
                )  # fmt: skip
                if Layout is not None:
                    open = tl.load(Layout + h * layout_h + m // TILE * layout_t + n // TILE)
                    p = tl.where(open, p, 0.0)
                dp = tl.dot(do, v.T, input_precision="ieee")
                total += p * (dp - delta[:, None])
    row = m + tl.arange(0, M)[:, None]
    dBias += tl.program_id(2).to(tl.int64) * T * S + row.to(tl.int64) * S + col
    tl.store(dBias, total.to(dBias.dtype.element_ty), (row < T) & (col < S))


# --- Triton: launches -----------------------------------------------------------------------------


class TritonAttention(torch.autograd.Function):
    """FlashAttention-2, algorithms 1 and 2; the backward pass in two kernels without atomics.

    One sums dK and dV over queries, the other dQ over keys: seven products instead of five, but the
    same bits every time. The bias costs a third, since each of its elements is its own sum.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, scale):
        ctx.set_materialize_grads(False)
        ctx.mask, ctx.scale = replace(mask, bias=None), scale
        q, k, v = aligned(q), aligned(k), aligned(v)
        out, lse = room_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        if 0 in (*q.shape, k.shape[2]):
            out.zero_(), lse.fill_(-torch.inf)
        else:
            T, heads, common = shared_arguments(q, k, v, bias, ctx.mask, scale)
            forward_kernel[lambda meta: (launch.ceil_div(T, meta["M"]) * heads,)](
                **common, **layout_arguments(mask.layout), Out=describe(out), Lse=lse
            )
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, bias, out, lse = ctx.saved_tensors
        need_bias = bias is not None and ctx.needs_input_grad[3]
        dq, dk, dv = room_like(q), room_like(k), room_like(v)
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device) if need_bias else None
        if 0 in (*q.shape, k.shape[2]):
            dbias = dbias.zero_() if need_bias else None
            return dq.zero_(), dk.zero_(), dv.zero_(), dbias, None, None
        grad = torch.zeros_like(out) if grad is None else aligned(grad)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        mask, (B, H, T, D), (K, S) = ctx.mask, q.shape, k.shape[1:3]
        M = queries_at_once(D, q.dtype, mask)
        queries = launch.ceil_div(T, M)
        delta = torch.empty_like(lse)
        bounds = lse.new_empty(len(mask.lo), 4, queries, dtype=torch.int32)
        T, heads, common = shared_arguments(q, k, v, bias, mask, ctx.scale)
        delta_kernel[(queries, B * H)](
            describe(out, M), describe(grad, M), grad_lse, delta, common["Lo"], common["Hi"],
            bounds, common["lo_b"], H, T, S, D=common["D"], M=M,
        )  # fmt: skip
        common |= {"Grad": describe(grad), "Lse": lse, "Delta": delta}
        query_kernel[lambda meta: (launch.ceil_div(T, meta["M"]) * heads,)](
            **common, **layout_arguments(mask.layout), dQ=describe(dq), scale=ctx.scale
        )
        transposed = None if mask.layout is None else mask.layout.mT
        key_kernel[lambda meta: (launch.ceil_div(S, meta["N"]) * B * K,)](
            **{**common, "section": max(1, common["section"] * K // H)},
            **layout_arguments(transposed), dK=describe(dk), dV=describe(dv), Bounds=bounds,
            bounds_b=0 if len(bounds) == 1 else bounds.stride(0), scale=ctx.scale,
            COUNT=launch.power_of_2(queries), M=M,
        )  # fmt: skip
        if need_bias:
            launch_bias_kernel(common, dbias, mask, B)
        return dq, dk, dv, dbias, None, None


def queries_at_once(D: int, dtype: torch.dtype, mask: Mask) -> int:
    """Rows of a tile of queries in the key kernel, as many as registers hold."""
    rows = 16 if launch.INTERPRETED else 64 if dtype.itemsize == 2 and D <= 128 else 32
    return rows if mask.layout is None else min(rows, mask.block)


def launch_bias_kernel(common: dict, dbias: Tensor, mask: Mask, B: int) -> None:
    drop = {"section", "T_CLASS", "S_CLASS"}
    layout = None if mask.layout is None else mask.layout.contiguous()
    strides = {"layout_h": 0, "layout_t": 0}
    if layout is not None:
        strides = {"layout_h": own_stride(layout, 0), "layout_t": layout.stride(1)}
    T, S = dbias.shape[2:]
    bias_kernel[
        lambda meta: (
            launch.ceil_div(T, meta["M"]), launch.ceil_div(S, meta["N"]), dbias.shape[:2].numel()
        )
    ](
        **{name: x for name, x in common.items() if name not in drop}, dBias=dbias, Layout=layout,
        **strides, B=B, own_b=dbias.shape[0], own_h=dbias.shape[1],
    )  # fmt: skip


def shared_arguments(q, k, v, bias, mask, scale) -> tuple[int, int, dict]:
    """T, the number of heads of all samples, and what forward and backward kernels all get."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    own = max(1, L2_BYTES // (2 * S * D * q.element_size()))  # key-value heads in the cache
    at = None if mask.at is None else mask.at.contiguous()
    lo, hi = mask.lo.contiguous(), mask.hi.contiguous()
    return T, B * H, {
        "Q": describe(q), "K": describe(k), "V": describe(v), "Lo": lo, "Hi": hi,
        "Slopes": None if mask.slopes is None else mask.slopes.contiguous(), "At": at, "Bias": bias,
        "lo_b": own_stride(lo, 0), "at_b": own_stride(at, 0), "bias_b": own_stride(bias, 0),
        "bias_h": own_stride(bias, 1), "bias_t": 0 if bias is None else bias.stride(2),
        "bias_s": 0 if bias is None else bias.stride(3), "H": H, "group": H // K, "T": T, "S": S,
        "section": min(B * H, own * H // K), "c": scale * LOG2E.value,
        "T_CLASS": launch.power_of_2(T), "S_CLASS": launch.power_of_2(S), "TILE": mask.block,
        "D": launch.power_of_2(D),
    }  # fmt: skip


def layout_arguments(layout: Tensor | None) -> dict:
    """Per row of blocks, where to look: the list of its true blocks, and how many they are."""
    if layout is None:
        names = ("Blocks", "Counts", "blocks_h", "blocks_t", "counts_h")
        return dict.fromkeys(names[:2]) | dict.fromkeys(names[2:], 0)
    counts = layout.sum(-1, dtype=torch.int32)
    blocks = (
        layout.to(torch.int8)
        .contiguous()
        .argsort(stable=True, dim=-1, descending=True)
        .to(torch.int32)
    )
    return {
        "Blocks": blocks, "Counts": counts, "blocks_h": own_stride(blocks, 0),
        "blocks_t": blocks.stride(1), "counts_h": own_stride(counts, 0),
    }  # fmt: skip


def own_stride(x: Tensor | None, axis: int) -> int:
    """The stride of an axis, or 0 where all share one entry or x is not there."""
    return 0 if x is None or x.shape[axis] == 1 else x.stride(axis)


def describe(x: Tensor, rows: int = 16) -> TensorDescriptor:
    """x (B H T D) as the hardware's tile copies know it; the autotuner sets the tile's size."""
    block = [1, 1, rows, launch.power_of_2(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def addressable(x: Tensor) -> bool:
    """Whether the hardware's tile copies can address x (B H T D).

    They want the last axis contiguous, and everything else at multiples of 16 bytes.
    """
    step = 16 // x.element_size()
    strides = x.stride()
    whole = all(stride > 0 and stride % step == 0 for stride in strides[:-1])
    return whole and strides[-1] == 1 and x.data_ptr() % 16 == 0


def aligned(x: Tensor) -> Tensor:
    """x itself if tile copies can address it, else a copy that they can."""
    return x if addressable(x) else room_like(x).copy_(x)


def room_like(x: Tensor) -> Tensor:
    """Memory for a result like x, in x's order of axes if tile copies can address that."""
    room = torch.empty_like(x)
    if addressable(room):
        return room
    step = 16 // x.element_size()
    width = launch.ceil_div(x.shape[-1], step) * step
    return x.new_empty(*x.shape[:-1], width)[..., : x.shape[-1]]
