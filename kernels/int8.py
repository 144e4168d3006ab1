"""x Wᵀ in 8-bit integers, but for the few input features whose values are too large for that.

Idea: a row of x and a row of W each get one scale, the largest magnitude / 127. Both scales factor
out of the sum over the input features, so the product itself is one of integers, exact in 32 bits
and twice as fast as one of 16-bit numbers; the scales come in at the end. A feature with outliers
would coarsen the steps of its whole row of x, so such columns are left out of the integers and go
through a thin 16-bit product of their own. In Triton: one pass over x makes its integers and
gathers the outlier columns; one kernel has both products.

Which columns: those found earlier on calibration data (nothing waits), or those of this x,
`outlier_columns(x)` (the host then waits for the GPU once per call, to know how many there are).
Their weights: the 16-bit originals, as in the paper, or those that the integers stand for.

Papers: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339, sections 2.1, 3 and eq. 8).

Letters: M rows of x · N output features · K input features · k outlier columns · m n: where a tile
begins.
"""

import torch
from torch import Tensor

from kernels import launch
from kernels.launch import TensorDescriptor, tl, triton

THRESHOLD = 6.0  # the paper's: magnitude from which a value makes its column an outlier
MOST = 65536  # input features: 127² · K stays within 32 bits, a row (nearly) within registers
TINY = 2.0**-119  # a row without a larger magnitude counts as zero: 127 / magnitude stays finite


def outlier_columns(x: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The columns (k) of x (… K) in which a magnitude reaches the threshold, in ascending order."""
    largest = torch.linalg.vector_norm(x.flatten(0, -2), torch.inf, 0)  # K
    return (largest >= threshold).nonzero()[:, 0]


def quantize_rows_obvious(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """round(x / s) with s = max |x| / 127 of each row: int8 (M K) in −127 … 127, and s (M).

    The given columns become 0 and do not count for s. A row of zeros has s = 0; one with ∞ or NaN
    has s = ∞ or NaN, so that nothing finite comes out of it. Halves are rounded to even.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if columns is not None:
        x = x.index_fill(1, columns, 0)
    largest = x.abs().amax(1)
    largest = largest.where(~(largest < TINY), 0)
    inverse = torch.full_like(largest, 127) / largest  # 127 / tensor would round twice
    inverse = inverse.where(largest > 0, 0)
    return (x * inverse[:, None]).nan_to_num(0).round().to(torch.int8), largest / 127


def quantize_columns_obvious(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one scale for each column of x (M K): int8 (M K) and s (K)."""
    q, scale = quantize_rows_obvious(x.T)
    return q.T.contiguous(), scale


def int8_linear_obvious(
    x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    columns: Tensor | None = None, weight_outlier: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """s_x s_w (x_q w_qᵀ) + x[:, columns] Wᵀ[columns] + bias  (Dettmers et al. 2022, eq. 8).

    x (… K), weight_q int8 (N K), weight_scale (N), bias (N), columns int64 (k), all different.
    weight_outlier (N k): 16-bit W[:, columns]; if None, what the integers stand for.
    """
    rows = x.reshape(-1, x.shape[-1])
    q, scale = quantize_rows_obvious(rows, columns)
    y = (q.double() @ weight_q.double().T).to(scale.dtype)  # exact: integers below 2⁵³
    y = y * scale[:, None] * weight_scale
    if columns is not None:
        weight = outlier_weight(x, weight_q, weight_scale, columns, weight_outlier)
        y = y + (rows[:, columns] @ weight.T).to(y.dtype)
    y = y if bias is None else y + bias
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def int8_linear(
    x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    columns: Tensor | None = None, weight_outlier: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same function as `int8_linear_obvious`, without gradients; in Triton on CUDA."""
    function = int8_linear_triton if x.is_cuda else int8_linear_obvious
    verify(x, weight_q, weight_scale, bias, columns, weight_outlier)
    return function(x, weight_q, weight_scale, bias, columns, weight_outlier)


def quantize_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same function as `quantize_rows_obvious`; in Triton on CUDA."""
    return (quantize_rows_triton if x.is_cuda else quantize_rows_obvious)(x, columns)


def quantize_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same function as `quantize_columns_obvious`; in Triton on CUDA."""
    return (quantize_columns_triton if x.is_cuda else quantize_columns_obvious)(x)


def outlier_weight(x, weight_q, weight_scale, columns, weight_outlier) -> Tensor:
    """W[:, columns] (N k) in x's dtype: the given one, or from the integers."""
    if weight_outlier is not None:
        return weight_outlier
    return (weight_q[:, columns] * weight_scale[:, None]).to(x.dtype)


def verify(x, weight_q, weight_scale, bias, columns, weight_outlier) -> None:
    """ValueError, one sentence, unless the arguments belong together."""
    N, K = weight_q.shape if weight_q.dim() == 2 else (-1, -1)
    if x.dim() < 1 or x.shape[-1] != K or not 1 <= K <= MOST or weight_q.dtype != torch.int8:
        raise ValueError(
            f"int8_linear: x (… K) and weight_q (N K) are {tuple(x.shape)} and "
            f"{tuple(weight_q.shape)} of {weight_q.dtype}; supported is int8 with the same K, "
            f"1 to {MOST}"
        )
    if weight_outlier is not None and columns is None:
        raise ValueError("int8_linear: weight_outlier needs columns, which say what it holds")
    k = 0 if columns is None else columns.numel()
    wanted = {"weight_q": (weight_q, (N, K)), "weight_scale": (weight_scale, (N,)),
              "bias": (bias, (N,)), "columns": (columns, (k,)),
              "weight_outlier": (weight_outlier, (N, k))}  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != x.device):
            raise ValueError(
                f"int8_linear: {name} is {tuple(tensor.shape)} on {tensor.device}; it must be "
                f"{shape} on {x.device}"
            )
    if columns is not None and columns.dtype != torch.int64:
        raise ValueError(f"int8_linear: columns are {columns.dtype}; supported is torch.int64")
    if weight_outlier is not None and weight_outlier.dtype != x.dtype:
        raise ValueError(
            f"int8_linear: weight_outlier is {weight_outlier.dtype}, but x {x.dtype}; they must "
            "have the same dtype"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "int8_linear: x asks for a gradient, and rounding has none; use torch.no_grad()"
        )


# --- Triton: quantization -------------------------------------------------------------------------


@triton.jit
def magnitude_bits(x):
    """|x| as an integer of the same order, in which NaN is the largest: a maximum then keeps it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def steps(bits, TINY: tl.constexpr):
    """A row's scale and its inverse from the largest magnitude's bits; divided as torch divides."""
    largest = bits.to(tl.float32, bitcast=True)
    largest = tl.where(largest < TINY, 0.0, largest)
    counted = largest > 0
    inverse = tl.div_rn(tl.full(bits.shape, 127.0, tl.float32), tl.where(counted, largest, 1.0))
    scale = tl.div_rn(largest, tl.full(bits.shape, 127.0, tl.float32))
    return scale, tl.where(counted, inverse, 0.0)


@triton.jit
def rounded(v):
    """v to the nearest integer, halves to even, NaN to 0; |v| < 2²².

    Beside 1.5 · 2²³ a float has no place for a fraction. A multiplication that were fused into this
    sum would round once instead of twice, so these kernels are compiled without fusion.
    """
    v = (v + 12582912.0) - 12582912.0
    return tl.where(v == v, v, 0.0).to(tl.int8)


@triton.jit
def rows_kernel(
    X, Q, Scale, Keep, Columns, Outliers, K, k, padded, x_row, x_column, q_row,
    WIDTH: tl.constexpr, THIN: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """One row: its integers and scale, and its outliers, padded with zeros.

    The row waits in registers for its maximum: 2 bytes of x are read and 1 written.
    """
    row = tl.program_id(0).to(tl.int64)
    X += row * x_row
    col = tl.arange(0, WIDTH)
    there = col < K
    x = tl.load(X + col.to(tl.int64) * x_column, there, other=0.0).to(tl.float32)
    if Keep is not None:
        x = tl.where(tl.load(Keep + col, there, other=0) != 0, x, 0.0)
        o = tl.arange(0, THIN)
        column = tl.load(Columns + o, o < k, other=0)
        column = tl.where(column < 0, column + K, column)
        outliers = tl.load(X + column * x_column, o < k, other=0.0)
        tl.store(Outliers + row * padded + o, outliers, o < padded)
    scale, inverse = steps(tl.max(magnitude_bits(x), 0), TINY)
    tl.store(Scale + row, scale)
    tl.store(Q + row * q_row + col, rounded(x * inverse), there)


@triton.jit
def columns_kernel(
    X, Q, Scale, M, K, x_row, x_column, TINY: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """C columns, R rows at a time, twice: for the maximum and for the integers."""
    row = tl.arange(0, R)[:, None]
    col = (tl.program_id(0) * C + tl.arange(0, C))[None, :]
    X += col.to(tl.int64) * x_column
    bits = tl.zeros([R, C], tl.int32)
    for start in range(0, M, R):
        at = (start + row).to(tl.int64)
        x = tl.load(X + at * x_row, (at < M) & (col < K), other=0.0).to(tl.float32)
        bits = tl.maximum(bits, magnitude_bits(x))
    scale, inverse = steps(tl.max(bits, 0)[None, :], TINY)
    tl.store(Scale + col, scale, col < K)
    for start in range(0, M, R):
        at = (start + row).to(tl.int64)
        x = tl.load(X + at * x_row, (at < M) & (col < K), other=0.0).to(tl.float32)
        tl.store(Q + at * K + col, rounded(x * inverse), (at < M) & (col < K))


def quantize_rows_triton(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows_obvious` in one pass over x, to the same bits."""
    return quantized(matrix("quantize_rows_triton", x), columns)[:2]


def quantize_columns_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_columns_obvious` in two passes over x, to the same bits."""
    M, K = matrix("quantize_columns_triton", x).shape
    q, scale = x.new_empty(M, K, dtype=torch.int8), x.new_empty(K, dtype=torch.float32)
    R, C = (8, 4) if launch.INTERPRETED else (64, 32)
    columns_kernel[(launch.ceil_div(K, C),)](
        x, q, scale, M, K, *x.stride(), TINY=TINY, R=R, C=C, enable_fp_fusion=False
    )
    return q, scale


def matrix(function: str, x: Tensor) -> Tensor:
    """x itself, or ValueError unless it is a matrix that the kernels can take."""
    launch.check(function, x=x)
    if x.dim() != 2 or not 1 <= x.shape[1] <= MOST:
        raise ValueError(
            f"{function}: x is {tuple(x.shape)}; supported is (M K) with K from 1 to {MOST}"
        )
    return x


def quantized(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers (M K), rows starting at multiples of 16 bytes; scales (M); outliers (M padded)."""
    M, K = x.shape
    k = 0 if columns is None else len(columns)
    padded = launch.ceil_div(k, 16) * 16
    q = x.new_empty(M, launch.ceil_div(K, 16) * 16, dtype=torch.int8)[:, :K]
    scale = x.new_empty(M, dtype=torch.float32)
    keep = outliers = None
    if k:
        keep = torch.ones(K, dtype=torch.int8, device=x.device).index_fill_(0, columns, 0)
        columns, outliers = columns.contiguous(), x.new_empty(M, padded)
    if M:
        width = launch.power_of_2(K)
        rows_kernel[(M,)](
            x, q, scale, keep, columns, outliers, K, k, padded, *x.stride(), q.stride(0),
            WIDTH=width, THIN=launch.power_of_2(padded), TINY=TINY, enable_fp_fusion=False,
            num_warps=min(32, max(1, width // 512)),
        )  # fmt: skip
    return q, scale, outliers


# --- Triton: product ------------------------------------------------------------------------------


@triton.jit
def tile(X, first, k, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Rows first … and columns k … of X, zeros beyond its edges: (R C).

    X is a tensor descriptor, which the hardware copies from (TMA), or a tuple (pointer, stride of
    rows, rows, columns).
    """
    if TMA:
        return X.load([first, k])
    else:
        row, col = first + tl.arange(0, R)[:, None], k + tl.arange(0, C)[None, :]
        at = X[0] + row.to(tl.int64) * X[1] + col
        return tl.load(at, (row < X[2]) & (col < X[3]), other=0)


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """This program's tile: eight tiles of rows share each tile of W while it is in the L2 cache."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    first = pid // (8 * across) * 8
    height = tl.minimum(down - first, 8)
    rest = pid % (8 * across)
    return (first + rest % height) * BM, rest // height * BN


def cut(args: dict) -> None:
    """Before each launch: the tiles that descriptors copy, from the configuration."""
    if args["TMA"]:
        args["X"].block_shape = [args["BM"], args["BK"]]
        args["W"].block_shape = [args["BN"], args["BK"]]


def configurations(*entries: tuple) -> list:
    """Entries are (BM, BN, BK, warps, stages)."""
    return [
        triton.Config({"BM": m, "BN": n, "BK": k}, num_warps=w, num_stages=s, pre_hook=cut)
        for m, n, k, w, s in entries
    ]


# Few rows: time is the bytes of W, of which many must be under way: narrow tiles, so that there are
# as many programs as multiprocessors, and several stages of them. Many rows: the largest tiles that
# registers hold, and rows of 128 bytes or more. Integer sums make Triton wait for the matrix unit
# after each block of K: long blocks, or two programs side by side, make that rare.
FEW = configurations((16, 16, 512, 4, 4), (16, 32, 256, 4, 4), (16, 64, 256, 4, 3))
SOME = configurations((64, 32, 256, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 4, 3))
MANY = configurations(
    (128, 256, 128, 8, 4), (128, 256, 256, 8, 2), (128, 128, 128, 4, 3), (128, 128, 256, 8, 3)
)  # fmt: skip
POINTERS = configurations((128, 128, 64, 8, 4), (128, 128, 128, 8, 3))
WIDE = configurations((64, 32, 128, 8, 3))  # fp32, whose thin product is not for the matrix unit


def fitting(configs: list, args: dict, **options) -> list:
    """The configurations for this size."""
    options = {**args, **options}
    if options["Xo"] is not None and options["Xo"].dtype == torch.float32:
        return WIDE
    few = FEW if options["M"] <= 16 else SOME if options["M"] <= 64 else None
    return few or (MANY if options["TMA"] else POINTERS)


@launch.autotune(
    FEW + SOME + MANY + POINTERS + WIDE, key=["N", "K", "size"],
    interpreted={"BM": 16, "BN": 16, "BK": 32},
    prune_configs_by={"early_config_prune": fitting},
)  # fmt: skip
@triton.jit
def product_kernel(
    X, W, X_scale, W_scale, Bias, Xo, Wo, Y, M, N, K, k, padded, wo_row, wo_column, size,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of Y = s_x s_w (X Wᵀ) + bias + Xo Woᵀ, the first product in integers."""
    m, n = place(M, N, BM, BN)
    acc = tl.zeros([BM, BN], tl.int32)
    for at in range(0, K, BK):
        x = tile(X, m, at, BM, BK, TMA)
        w = tile(W, n, at, BN, BK, TMA)
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    row, col = m + tl.arange(0, BM), n + tl.arange(0, BN)
    x_scale = tl.load(X_scale + row, row < M, other=0.0)
    w_scale = tl.load(W_scale + col, col < N, other=0.0).to(tl.float32)
    y = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if Bias is not None:
        y += tl.load(Bias + col, col < N, other=0.0).to(tl.float32)[None, :]
    if Xo is not None:
        for first in range(0, padded, 16):
            o = first + tl.arange(0, 16)[None, :]
            xo = tl.load(Xo + row[:, None].to(tl.int64) * padded + o, row[:, None] < M, other=0.0)
            wo = tl.load(
                Wo + col[:, None].to(tl.int64) * wo_row + o * wo_column,
                (col[:, None] < N) & (o < k), other=0.0,
            )  # fmt: skip
            y = tl.dot(xo, wo.T, y, input_precision="ieee")
    Y += row[:, None].to(tl.int64) * N + col[None, :]
    tl.store(Y, y.to(Y.dtype.element_ty), (row[:, None] < M) & (col[None, :] < N))


def int8_linear_triton(
    x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    columns: Tensor | None = None, weight_outlier: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`int8_linear_obvious` in two launches; with columns a few tiny ones more."""
    launch.check("int8_linear_triton", x=x, weight_scale=weight_scale)
    verify(x, weight_q, weight_scale, bias, columns, weight_outlier)
    rows = x.reshape(-1, x.shape[-1])
    (M, K), N = rows.shape, len(weight_q)
    y = x.new_empty(M, N)
    if not y.numel():
        return y.unflatten(0, x.shape[:-1])
    q, scale, Xo = quantized(rows, columns)
    Wo = None if Xo is None else outlier_weight(x, weight_q, weight_scale, columns, weight_outlier)
    W = weight_q if weight_q.stride(1) == 1 else weight_q.contiguous()
    aligned = W.stride(0) % 16 == 0 and W.data_ptr() % 16 == 0
    tma = launch.has_tma(x.device) and M > 16 and aligned
    product_kernel[lambda meta: (launch.ceil_div(M, meta["BM"]) * launch.ceil_div(N, meta["BN"]),)](
        described(q, tma), described(W, tma), scale, weight_scale.contiguous(),
        None if bias is None else bias.contiguous(), Xo, Wo, y, M, N, K,
        0 if Xo is None else len(columns), 0 if Xo is None else Xo.shape[1],
        *((0, 0) if Wo is None else Wo.stride()), size=launch.power_of_2(min(M, 4096)), TMA=tma,
    )  # fmt: skip
    return y.unflatten(0, x.shape[:-1])


def described(x: Tensor, tma: bool) -> TensorDescriptor | tuple:
    """x (rows columns) as `tile` takes it; the autotuner sets the tile."""
    if not tma:
        return x, x.stride(0), *x.shape
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [16, 32])
