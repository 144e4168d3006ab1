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

PRECISION = tl.constexpr("ieee")  # of fp32 products; those of 16-bit numbers are exact
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
def tile(X, b, h, first, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Rows first … first + N − 1 of head h of sample b, zeros beyond the edges: (N D).

    X is a tensor descriptor, which the hardware copies from (TMA), or where that does not exist a
    tuple (pointer, three strides, rows, width).
    """
    if TMA:
        return X.load([b, h, first, 0]).reshape(N, D)
    else:
        at, there = addresses(X, b, h, first, N, D)
        return tl.load(at, there, other=0.0)


@triton.jit
def put(X, b, h, first, x, N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Store a tile where `tile` would load it."""
    if TMA:
        X.store([b, h, first, 0], x.to(X.dtype).reshape(1, 1, N, D))
    else:
        at, there = addresses(X, b, h, first, N, D)
        tl.store(at, x.to(at.dtype.element_ty), there)


@triton.jit
def addresses(X, b, h, first, N: tl.constexpr, D: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    start = (
        tl.cast(b, tl.int64) * X[1] + tl.cast(h, tl.int64) * X[2] + tl.cast(first, tl.int64) * X[3]
    )
    return X[0] + start + (row * X[3] + column), (first + row < X[4]) & (column < X[5])


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
    number, head = place(tiles, tl.num_programs(0) // tiles, section)
    b, h = head // H, head % H
    m = (tiles - 1 - number) * M
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
    N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax (FlashAttention-2, algorithm 1, lines 8 to 10)."""
    k = tile(K, b, kh, n, N, D, TMA)
    s = tl.dot(q, k.T, input_precision=PRECISION)
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
    v = tile(V, b, kh, n, N, D, TMA)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total * shrink + tl.sum(p, 1), new


def cut(args: dict) -> None:
    """Before each launch: the tiles that descriptors copy, from the configuration's M and N."""
    for name, x in args.items():
        if isinstance(x, TensorDescriptor):
            rows = args["N"] if name in ("K", "V", "dK", "dV") else args["M"]
            x.block_shape = [1, 1, rows, args["D"]]


def tuned(names: tuple[str, ...], table: dict, interpreted: dict):
    """Autotune over (tile sizes by these names, warps, stages), all of which fit into registers.

    table maps (whether tiles are copied by hardware, D up to …) to them, for 16-bit numbers. With a
    bias, which takes many registers, only the last one of a row is sure to fit.
    """

    def configuration(entry: tuple) -> triton.Config:
        *sizes, warps, stages = entry
        sizes = dict(zip(names, sizes, strict=True))
        return triton.Config(sizes, num_warps=warps, num_stages=stages, pre_hook=cut)

    def fitting(configs: list, args: dict, **options) -> list:
        options = {**args, **options}
        if options["wide"]:
            return [configuration((16,) * len(names) + (8, 2))]
        row = table[options["TMA"], max(64, options["D"])]
        row = row if options["Bias"] is None else row[-1:]
        if options.get("Blocks") is not None:  # no tile may be larger than the layout's
            most = options["TILE"]
            row = [e for e in row if max(e[:-2]) <= most] or [(most,) * len(names) + (4, 2)]
        return [configuration(entry) for entry in row]

    entries = dict.fromkeys(entry for row in table.values() for entry in row)
    return launch.autotune(
        [configuration(entry) for entry in entries], ["D", "kind"], interpreted,
        prune_configs_by={"early_config_prune": fitting},
    )  # fmt: skip


@tuned(
    ("M", "N"),
    {
        (True, 64): [(128, 128, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3)],
        (True, 128): [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
        (True, 256): [(128, 32, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2)],
        (False, 64): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)],
        (False, 128): [(128, 64, 8, 2), (64, 32, 4, 2)],
        (False, 256): [(64, 32, 8, 2)],
    },
    {"M": 32, "N": 16},
)
@triton.jit
def forward_kernel(
    Q, K, V, Out, Lse, Lse2, Lo, Hi, Slopes, At, Bias, Blocks, Counts,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, blocks_h, blocks_t, counts_h,
    H, group, T, S, section, c, wide, kind,
    TILE: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
    q = tile(Q, b, h, m, M, D, TMA)
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], -float("inf"), tl.float32)
    for n in range(full, full_end, N):
        n = tl.multiple_of(n, N)
        acc, total, top = look(
            acc, total, top, q, K, V, b, kh, n, c, row[:, None], lo[:, None], hi[:, None],
            slope, at, Bias, bias_t, bias_s, T, S, N, D, TMA, False,
        )  # fmt: skip
    for i in range(masked):
        n = block_at(i, left, first, full_end, Blocks, TILE, N)
        acc, total, top = look(
            acc, total, top, q, K, V, b, kh, n, c, row[:, None], lo[:, None], hi[:, None],
            slope, at, Bias, bias_t, bias_s, T, S, N, D, TMA, True,
        )  # fmt: skip

    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    put(Out, b, h, m, acc, M, D, TMA)
    lse = tl.where(blind, -float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    row = m + tl.arange(0, M)
    at = (b * H + h).to(tl.int64) * T + row
    tl.store(Lse + at, lse / LOG2E, row < T)
    tl.store(Lse2 + at, lse, row < T)  # what the backward pass needs, before it is rounded again


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
def rows_kernel(
    Out, Grad, Lse2, GradLse, Sums, Seen, Bounds, Lo, Hi,
    lo_b, seen_b, bounds_b, H, T, S, padded,
    D: tl.constexpr, TMA: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """What the backward pass needs of each query, in memory padded to whole tiles.

    Sums: lse in base 2, +∞ for a query that gives nothing, and Delta = rowsum(dO ∘ O) − dlse.
    Seen: its interval, cut to the keys there are. Bounds: of each tile of queries the smallest and
    largest key that any sees, and the smallest and largest that all see.
    """
    number, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    m = number * M
    row = m + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    lse = tl.load(Lse2 + head * T + row, row < T, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    out = tile(Out, b, h, m, M, D, TMA)
    delta = tl.sum(out.to(tl.float32) * tile(Grad, b, h, m, M, D, TMA).to(tl.float32), 1)
    if GradLse is not None:
        delta -= tl.load(GradLse + head * T + row, row < T, other=0.0)
    Sums += head * 2 * padded + row
    tl.store(Sums, lse)
    tl.store(Sums + padded, delta)
    if h == 0:
        last = tl.minimum(row, T - 1)  # rows beyond T repeat the last
        lo, hi = clamped(Lo + b * lo_b, Hi + b * lo_b, last, S)
        seen = Seen + b * seen_b + row
        tl.store(seen, lo)
        tl.store(seen + padded, hi)
        bounds = Bounds + b * bounds_b + number
        count = padded // M
        tl.store(bounds, tl.min(lo))
        tl.store(bounds + count, tl.max(hi))
        tl.store(bounds + 2 * count, tl.max(lo))
        tl.store(bounds + 3 * count, tl.min(hi))


@triton.jit
def key_gradients(
    dk, dv, k, v, Q, Grad, Sums, Seen, At, padded, b, h, m, c, col, slope, Bias,
    bias_t, bias_s, T, S, M: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds: dV += Pᵀ dO, dK += dSᵀ Q; all tables are transposed."""
    q = tile(Q, b, h, m, M, D, TMA)
    do = tile(Grad, b, h, m, M, D, TMA)
    row = m + tl.arange(0, M)
    s = tl.dot(k, q.T, input_precision=PRECISION)
    lse = tl.load(Sums + row)[None, :]
    lo, hi, at = None, None, None
    if MASKED:
        lo = tl.load(Seen + row)[None, :]
        hi = tl.load(Seen + padded + row)[None, :]
    if slope is not None:
        at = tl.load(At + tl.minimum(row, T - 1)).to(tl.int32)[None, :]
    p = weights(s, c, lse, row[None, :], col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, do.T, input_precision=PRECISION)
    delta = tl.load(Sums + padded + row)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@tuned(
    ("N",),
    {
        (True, 64): [(64, 4, 3), (64, 4, 2), (128, 8, 2)],
        (True, 128): [(128, 8, 2), (64, 4, 2), (64, 8, 2)],
        (True, 256): [(64, 8, 2)],
        (False, 64): [(128, 8, 2)],
        (False, 128): [(64, 8, 2)],
        (False, 256): [(64, 8, 2)],
    },
    {"N": 16},
)
@triton.jit
def key_kernel(
    Q, K, V, Grad, dK, dV, Sums, Seen, Bounds, Slopes, At, Bias, Blocks, Counts,
    at_b, bias_b, bias_h, bias_t, bias_s, blocks_h, blocks_t, counts_h,
    H, group, T, S, padded, section, seen_b, bounds_b, c, scale, wide, kind,
    TILE: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, COUNT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over all queries that see it, in a fixed order."""
    number, head = place(tl.cdiv(S, N), tl.num_programs(0) // tl.cdiv(S, N), section)
    heads = H // group
    b, kh = head // heads, head % heads
    n = number * N
    col = n + tl.arange(0, N)[:, None]
    Seen += b * seen_b
    if At is not None:
        At += b * at_b

    # which tiles of queries see some of these keys, and which all of them
    queries = tl.cdiv(T, M)
    index = tl.arange(0, COUNT)
    there = index < queries
    Bounds += b * bounds_b + index
    count = padded // M
    lowest = tl.load(Bounds, there, other=S)
    highest = tl.load(Bounds + count, there, other=-1)
    seen = (lowest < n + N) & (highest >= n)
    first = tl.min(tl.where(seen, index, queries))
    end = tl.max(tl.where(seen, index + 1, 0))
    lo_max = tl.load(Bounds + 2 * count, there, other=S)
    hi_min = tl.load(Bounds + 3 * count, there, other=-1)
    whole = (lo_max <= n) & (hi_min >= n + N - 1)
    full = tl.min(tl.where(whole, index, queries))
    full_end = tl.min(tl.where(~whole & (index > full), index, queries))
    full, full_end, left, masked = reach(first * M, full * M, full_end * M, end * M, M)

    k = tile(K, b, kh, n, N, D, TMA)
    v = tile(V, b, kh, n, N, D, TMA)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    for g in range(group):
        h = kh * group + g
        sums = Sums + (b * H + h).to(tl.int64) * 2 * padded
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
                dk, dv, k, v, Q, Grad, sums, Seen, At, padded, b, h, tl.multiple_of(m, M), c,
                col, slope, bias, bias_t, bias_s, T, S, M, D, TMA, False,
            )  # fmt: skip
        for i in range(masked):
            m = block_at(i, left, first * M, full_end, blocks, TILE, M)
            dk, dv = key_gradients(
                dk, dv, k, v, Q, Grad, sums, Seen, At, padded, b, h, m, c,
                col, slope, bias, bias_t, bias_s, T, S, M, D, TMA, True,
            )  # fmt: skip
    put(dK, b, kh, n, dk * scale, N, D, TMA)
    put(dV, b, kh, n, dv, N, D, TMA)


@triton.jit
def query_gradient(
    dq, q, do, lse, delta, K, V, b, kh, n, c, row, lo, hi, slope, at, Bias, bias_t, bias_s, T, S,
    N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds: dQ += dS K."""
    k = tile(K, b, kh, n, N, D, TMA)
    v = tile(V, b, kh, n, N, D, TMA)
    col = n + tl.arange(0, N)[None, :]
    s = tl.dot(q, k.T, input_precision=PRECISION)
    p = weights(s, c, lse, row, col, lo, hi, slope, at, Bias, bias_t, bias_s, T, S, MASKED)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@tuned(
    ("M", "N"),
    {
        (True, 64): [(128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
        (True, 128): [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3)],
        (True, 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
        (False, 64): [(64, 64, 4, 2), (64, 32, 4, 2)],
        (False, 128): [(64, 32, 4, 2), (64, 64, 8, 2)],
        (False, 256): [(64, 32, 8, 2)],
    },
    {"M": 32, "N": 16},
)
@triton.jit
def query_kernel(
    Q, K, V, Grad, dQ, Sums, Lo, Hi, Slopes, At, Bias, Blocks, Counts,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, blocks_h, blocks_t, counts_h,
    H, group, T, S, padded, section, c, scale, wide, kind,
    TILE: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
    q = tile(Q, b, h, m, M, D, TMA)
    do = tile(Grad, b, h, m, M, D, TMA)
    Sums += (b * H + h).to(tl.int64) * 2 * padded + m + tl.arange(0, M)
    lse, delta = tl.load(Sums)[:, None], tl.load(Sums + padded)
    dq = tl.zeros([M, D], tl.float32)
    for n in range(full, full_end, N):
        dq = query_gradient(
            dq, q, do, lse, delta, K, V, b, kh, tl.multiple_of(n, N), c, row[:, None], lo[:, None],
            hi[:, None], slope, at, Bias, bias_t, bias_s, T, S, N, D, TMA, False,
        )  # fmt: skip
    for i in range(masked):
        n = block_at(i, left, first, full_end, Blocks, TILE, N)
        dq = query_gradient(
            dq, q, do, lse, delta, K, V, b, kh, n, c, row[:, None], lo[:, None],
            hi[:, None], slope, at, Bias, bias_t, bias_s, T, S, N, D, TMA, True,
        )  # fmt: skip
    put(dQ, b, h, m, dq * scale, M, D, TMA)


@tuned(
    ("M", "N"),
    {
        (True, 64): [(64, 64, 8, 2)],
        (True, 128): [(64, 64, 8, 2)],
        (True, 256): [(64, 32, 8, 2)],
        (False, 64): [(64, 32, 8, 2)],
        (False, 128): [(64, 32, 8, 2)],
        (False, 256): [(32, 16, 8, 2)],
    },
    {"M": 32, "N": 16},
)
@triton.jit
def bias_kernel(
    Q, K, V, Grad, dBias, Sums, Lo, Hi, Slopes, At, Bias, Layout,
    lo_b, at_b, bias_b, bias_h, bias_t, bias_s, layout_h, layout_t,
    B, H, group, T, S, padded, c, wide, kind, own_b, own_h,
    TILE: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
                q = tile(Q, b, h, m, M, D, TMA)
                do = tile(Grad, b, h, m, M, D, TMA)
                k = tile(K, b, h // group, n, N, D, TMA)
                v = tile(V, b, h // group, n, N, D, TMA)
                sums = Sums + tl.cast(b * H + h, tl.int64) * 2 * padded + m + tl.arange(0, M)
                lse, delta = tl.load(sums)[:, None], tl.load(sums + padded)
                s = tl.dot(q, k.T, input_precision=PRECISION)
                p = weights(
                    s, c, lse, row[:, None], col, lo[:, None], hi[:, None], slope, at,
                    bias, bias_t, bias_s, T, S, True,
                )  # fmt: skip
                if Layout is not None:
                    open = tl.load(Layout + h * layout_h + m // TILE * layout_t + n // TILE)
                    p = tl.where(open, p, 0.0)
                dp = tl.dot(do, v.T, input_precision=PRECISION)
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
        out, (lse, lse2) = room_like(q), q.new_empty(2, *q.shape[:3], dtype=torch.float32)
        if 0 in (*q.shape, k.shape[2]):
            out.zero_(), lse.fill_(-torch.inf)
        else:
            T, heads, common = shared_arguments(q, k, v, bias, ctx.mask, scale)
            forward_kernel[lambda meta: (launch.ceil_div(T, meta["M"]) * heads,)](
                **common,
                **layout_arguments(mask.layout),
                Out=describe(out, common["TMA"]),
                Lse=lse,
                Lse2=lse2,
            )
        ctx.save_for_backward(q, k, v, bias, out, lse2)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        q, k, v, bias, out, lse2 = ctx.saved_tensors
        need_bias = bias is not None and ctx.needs_input_grad[3]
        dq, dk, dv = room_like(q), room_like(k), room_like(v)
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device) if need_bias else None
        if 0 in (*q.shape, k.shape[2]):
            dbias = dbias.zero_() if need_bias else None
            return dq.zero_(), dk.zero_(), dv.zero_(), dbias, None, None
        grad = torch.zeros_like(out) if grad is None else aligned(grad)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        mask, (B, H, T, D), (K, S) = ctx.mask, q.shape, k.shape[1:3]
        tma = by_hardware(q)
        M, whole = queries_at_once(D, q.dtype, mask, tma), 128
        if mask.layout is not None:  # the key kernel walks over whole blocks of it
            whole = max(whole, mask.block)
        padded = launch.ceil_div(T, whole) * whole
        sums = lse2.new_empty(B, H, 2, padded)
        seen = lse2.new_empty(len(mask.lo), 2, padded, dtype=torch.int32)
        bounds = lse2.new_empty(len(mask.lo), 4, padded // M, dtype=torch.int32)
        T, heads, common = shared_arguments(q, k, v, bias, mask, ctx.scale)
        strides = {"seen_b": own_stride(seen, 0), "bounds_b": own_stride(bounds, 0)}
        rows_kernel[(padded // M, B * H)](
            describe(out, tma, M), describe(grad, tma, M), lse2, grad_lse, sums, seen, bounds,
            common["Lo"], common["Hi"], common["lo_b"], **strides, H=H, T=T, S=S, padded=padded,
            D=common["D"], TMA=tma, M=M,
        )  # fmt: skip
        common |= {"Grad": describe(grad, tma), "Sums": sums, "padded": padded}
        query_kernel[lambda meta: (launch.ceil_div(T, meta["M"]) * heads,)](
            **common, **layout_arguments(mask.layout), dQ=describe(dq, tma), scale=ctx.scale
        )
        of_queries = {"Lo", "Hi", "lo_b"}
        common_keys = {name: x for name, x in common.items() if name not in of_queries}
        transposed = None if mask.layout is None else mask.layout.mT
        key_kernel[lambda meta: (launch.ceil_div(S, meta["N"]) * B * K,)](
            **{**common_keys, "section": max(1, common["section"] * K // H)},
            **layout_arguments(transposed), **strides, dK=describe(dk, tma), dV=describe(dv, tma),
            Seen=seen, Bounds=bounds, scale=ctx.scale, COUNT=launch.power_of_2(padded // M), M=M,
        )  # fmt: skip
        if need_bias:
            launch_bias_kernel(common, dbias, mask, B)
        return dq, dk, dv, dbias, None, None


def by_hardware(q: Tensor) -> bool:
    """Whether the hardware copies the tiles: in fp32 their products spill beside such copies."""
    return launch.has_tma(q.device) and q.dtype.itemsize == 2


def queries_at_once(D: int, dtype: torch.dtype, mask: Mask, tma: bool) -> int:
    """Rows of a tile of queries in the key kernel, as many as registers hold."""
    rows = 16 if launch.INTERPRETED or dtype.itemsize == 4 or D > 128 else 64 if tma else 32
    return rows if mask.layout is None else min(rows, mask.block)


def launch_bias_kernel(common: dict, dbias: Tensor, mask: Mask, B: int) -> None:
    drop = {"section"}
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
    tma = by_hardware(q)
    own = max(1, L2_BYTES // (2 * S * D * q.element_size()))  # key-value heads in the cache
    at = None if mask.at is None else mask.at.contiguous()
    lo, hi = mask.lo.contiguous(), mask.hi.contiguous()
    return T, B * H, {
        "Q": describe(q, tma), "K": describe(k, tma), "V": describe(v, tma), "Lo": lo, "Hi": hi,
        "Slopes": None if mask.slopes is None else mask.slopes.contiguous(), "At": at, "Bias": bias,
        "lo_b": own_stride(lo, 0), "at_b": own_stride(at, 0), "bias_b": own_stride(bias, 0),
        "bias_h": own_stride(bias, 1), "bias_t": 0 if bias is None else bias.stride(2),
        "bias_s": 0 if bias is None else bias.stride(3), "H": H, "group": H // K, "T": T, "S": S,
        "section": min(B * H, own * H // K), "c": scale * LOG2E.value,
        "wide": int(q.dtype.itemsize == 4), "kind": kind(q, k, bias), "TILE": mask.block,
        "D": launch.power_of_2(D), "TMA": tma,
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


def kind(q: Tensor, k: Tensor, bias: Tensor | None) -> int:
    """A number for what the autotuner tells apart: about how long, how wide, with a bias or not."""
    lengths = q.shape[2].bit_length() * 64 + k.shape[2].bit_length()
    return (lengths * 8 + q.dtype.itemsize) * 4 + 2 * (bias is not None) + 1


def own_stride(x: Tensor | None, axis: int) -> int:
    """The stride of an axis, or 0 where all share one entry or x is not there."""
    return 0 if x is None or x.shape[axis] == 1 else x.stride(axis)


def describe(x: Tensor, tma: bool, rows: int = 16) -> TensorDescriptor | tuple:
    """x (B H T D) as `tile` takes it; the autotuner sets the number of rows."""
    if not tma:
        return x, *x.stride()[:3], *x.shape[2:]
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
