"""x Wᵀ with W in 4 bits: codes 0 … 15 in groups that share a scale and a zero point.

Idea: few rows of x wait for the bytes of W, and 4 bits are a quarter of them. Only W is quantized:
w ≈ s (code − z), with s and z shared by `group` input features of one output feature (what GPTQ and
AWQ store). A program multiplies codes as soon as they are unpacked; no 16-bit W is ever written.

Layout: a block of 128 input features is 16 words of 32 bits. The lower half of word i holds, at
bits 4j, the codes of features 32 j + 2 i, the upper half those of 32 j + 2 i + 1, j = 0 … 3. One
shift and mask so gives two neighbours in the halves of a word, which are two 16-bit numbers as the
matrix unit wants them, and a tile of words becomes four tiles of weights without moving anything
between threads. Features go along memory: a row of W is one stream of 16-byte loads.

Papers: Frantar et al. 2022, GPTQ (arXiv 2210.17323); Lin et al. 2023, AWQ (arXiv 2306.00978);
Frantar et al. 2024, Marlin (arXiv 2408.11743) on layouts for unpacking and on splitting K.

Letters: M rows of x · N output features · K input features · G groups · b blocks of 128 features ·
m n: where a tile begins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import launch
from kernels.int8 import described, place, tile
from kernels.launch import tl, triton

BLOCK = 128  # input features of a block, 16 words
GROUP = 128  # input features that share a scale, unless asked otherwise


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 … 15 (N K) → int32 words (N W), W = 16 ⌈K / 128⌉; codes beyond K are 0."""
    N, K = codes.shape
    blocks = launch.ceil_div(K, BLOCK)
    codes = F.pad(codes, (0, -K % BLOCK)).view(N, blocks, 4, 16, 2).to(torch.int64)
    return (codes << places(codes.device)).sum((2, 4)).to(torch.int32).flatten(1)


def unpack_int4(packed: Tensor, K: int) -> Tensor:
    """The inverse: the first K codes of each row, uint8 (N K)."""
    words = packed.to(torch.int64).unflatten(1, (packed.shape[1] // 16, 1, 16, 1))
    return (words >> places(packed.device) & 15).to(torch.uint8).flatten(1)[:, :K]


def places(device: torch.device) -> Tensor:
    """The bit at which a code begins: 4 j + 16 half, (j 1 half)."""
    return (4 * torch.arange(4, device=device))[:, None, None] + torch.tensor(
        [0, 16], device=device
    )


def quantize_int4_obvious(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """weight (N K) → words (N W), scales (N G) in its dtype, zeros (N G) uint8, G = ⌈K / group⌉.

    code = round(w / s) + z with s = (max − min) / 15 and z = round(−min / s), where 0 counts as a
    member of each group: 0 stays 0, and every weight within s / 2. The last group may be shorter.
    """
    N, K = weight.shape
    limits = torch.finfo(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = F.pad(weight.to(wide), (0, -K % group)).view(N, launch.ceil_div(K, group), group)
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    # A scale that was rounded down would not reach the ends of its group.
    scales = ((high - low) / 15 * (1 + limits.eps)).clamp(min=limits.tiny).to(weight.dtype)
    zeros = (-low / scales.to(wide)).round()
    codes = (w / scales.to(wide)[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, 15).to(torch.uint8).flatten(1)[:, :K]
    return pack_int4(codes), scales, zeros.to(torch.uint8)


def dequantize_int4(
    packed: Tensor, scales: Tensor, zeros: Tensor, K: int, group: int = GROUP
) -> Tensor:
    """s (code − z) for each group: (N K) in scales' dtype."""
    codes = unpack_int4(packed, K).to(scales.dtype)
    scales, zeros = (x.repeat_interleave(group, 1)[:, :K] for x in (scales, zeros))
    return (codes - zeros) * scales


def int4_linear_obvious(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None,
    group: int = GROUP,
) -> Tensor:  # fmt: skip
    """x (… K) times the dequantized weight's transpose, plus bias (N): (… N) in x's dtype."""
    weight = dequantize_int4(packed, scales, zeros, x.shape[-1], group)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def int4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None,
    group: int = GROUP,
) -> Tensor:  # fmt: skip
    """The same function as `int4_linear_obvious`, without gradients; in Triton on CUDA."""
    verify(x, packed, scales, zeros, bias, group)
    function = int4_linear_triton if x.is_cuda else int4_linear_obvious
    return function(x, packed, scales, zeros, bias, group)


def verify(x, packed, scales, zeros, bias, group) -> None:
    """ValueError, one sentence, unless the arguments belong together."""
    if group not in (32, 64) and (group < 1 or group % BLOCK):
        raise ValueError(
            f"int4_linear: group is {group}; supported are 32, 64 and multiples of {BLOCK}"
        )
    K, N = x.shape[-1] if x.dim() else 0, len(packed)
    words, groups = (N, launch.ceil_div(K, BLOCK) * 16), (N, launch.ceil_div(K, group))
    wanted = {
        "packed": (packed, words, (torch.int32,)),
        "scales": (scales, groups, (x.dtype,)),
        "zeros": (zeros, groups, (torch.uint8,)),
        "bias": (bias, (N,), launch.FLOATS),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        if tensor is None:
            continue
        if K < 1 or tensor.shape != shape or tensor.device != x.device:
            raise ValueError(
                f"int4_linear: {name} is {tuple(tensor.shape)} on {tensor.device}; for x "
                f"{tuple(x.shape)} and group {group} it must be {shape} on {x.device}"
            )
        if tensor.dtype not in dtypes:
            names = " or ".join(str(d) for d in dtypes)
            raise ValueError(f"int4_linear: {name} is {tensor.dtype}; it must be {names}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "int4_linear: x asks for a gradient, which this product does not have; use "
            "torch.no_grad()"
        )


# --- Triton ---------------------------------------------------------------------------------------


@triton.jit
def unpacked(words, zero, exponent, place: tl.constexpr):
    """The code at bits place … place + 3 of each word, less the zero point, in fp32; place < 20.

    In a float's mantissa, under the exponent of 2^(23 − place), the code is 2^(23 − place) + code,
    from which 2^(23 − place) + z is subtracted exactly: two operations, and no slow conversion.
    `exponent`, that of 2²³, is an argument because with two constants the and-or would be two.
    """
    bits = (words & (15 << place)) | (exponent - (place << 23))
    return bits.to(tl.float32, bitcast=True) - (zero + (1 << (23 - place)))


@triton.jit
def group_of(b, j: tl.constexpr, G, GROUP: tl.constexpr):
    """The group of the features 128 b + 32 j …; behind the last feature: the last."""
    return tl.minimum((b * 128 + 32 * j) // GROUP, G - 1)


@launch.autotune(
    [triton.Config({"R": r, "B": b}, num_warps=w)
     for r, b, w in ((4, 8, 1), (8, 8, 1), (4, 16, 2), (4, 32, 4))],
    key=["N", "K", "GROUP"], interpreted={"R": 2, "B": 2},
)  # fmt: skip
@triton.jit
def vector_kernel(
    X, Words, Scales, Zeros, Bias, Y, N, K, G, blocks, span, exponent,
    GROUP: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """R numbers of one row of Y, or what `span` blocks of the input features add to them.

    Each thread reads 16 bytes of each of R rows before it needs the first. x is loaded once for all
    R rows, a scale once for the sum over its group.
    """
    n = tl.minimum(tl.program_id(0) * R + tl.arange(0, R), N - 1)  # rows beyond N repeat the last
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, blocks)
    i = tl.arange(0, 16)
    Words += n[:, None, None].to(tl.int64) * (blocks * 16) + i[None, None, :]
    group = n[:, None].to(tl.int64) * G
    acc = tl.zeros([R, B, 16], tl.float32)
    for start in range(first, last, B):
        b = start + tl.arange(0, B)
        words = tl.load(Words + b[None, :, None] * 16, (b < last)[None, :, None], other=0)
        upper = words >> 12  # codes from bit 4 on
        for j in tl.static_range(4):
            if 32 * j % GROUP == 0:
                at = group + group_of(b, j, G, GROUP)[None, :]
                scale, zero = tl.load(Scales + at), tl.load(Zeros + at)
                scale = scale.to(tl.float32)[:, :, None]
                zero = zero.to(tl.float32)[:, :, None]
                total = tl.zeros([R, B, 16], tl.float32)
            k = b[:, None] * 128 + 32 * j + tl.arange(0, 32)[None, :]
            x = tl.load(X + k, (k < K) & (b < last)[:, None], other=0.0).to(tl.float32)
            even, odd = x.reshape(B, 16, 2).split()
            total += unpacked(words, zero, exponent, 4 * j) * even[None, :, :]
            total += unpacked(upper, zero, exponent, 4 * j + 4) * odd[None, :, :]
            if j == 3 or 32 * (j + 1) % GROUP == 0:
                acc += total * scale
    y = tl.sum(tl.sum(acc, 2), 1)
    n = tl.program_id(0) * R + tl.arange(0, R)
    if Bias is not None:
        y += tl.load(Bias + n, n < N, other=0.0).to(tl.float32)
    tl.store(Y + tl.program_id(1).to(tl.int64) * N + n, y.to(Y.dtype.element_ty), n < N)


@triton.jit
def beside(a, b):
    """(a b), side by side: the same registers."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def weights(words, scale, zero, j: tl.constexpr, DTYPE: tl.constexpr):
    """s (code − z) of the features 32 j … 32 j + 31 of a block, words (BN 16) → (BN 32).

    The bits of a 16-bit float 2^p + code, p the width of its mantissa, are those of 2^p or code; so
    are both halves of a word at once. 2^p + z is subtracted exactly, and the product rounds once.
    """
    both = (words >> 4 * j) & 0x000F000F
    if tl.float32 == DTYPE:
        lower, upper = (both & 15).to(DTYPE), (both >> 16).to(DTYPE)
        shift: tl.constexpr = 0.0
    else:
        shift: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        both |= 0x43004300 if tl.bfloat16 == DTYPE else 0x64006400  # 2⁷ or 2¹⁰ twice
        lower = (both & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        upper = (both >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    codes = tl.join(lower, upper).reshape(words.shape[0], 32)
    return (codes - (zero + shift).to(DTYPE)) * scale


def cut(args: dict) -> None:
    """Before each launch: the tile that the descriptor copies, from the configuration."""
    if args["TMA"]:
        args["X"].block_shape = [args["BM"], BLOCK]


def configurations(*entries: tuple) -> list:
    """Entries are (BM, BN, warps, stages)."""
    return [
        triton.Config({"BM": m, "BN": n}, num_warps=w, num_stages=s, pre_hook=cut)
        for m, n, w, s in entries
    ]


FEW = configurations((16, 64, 4, 4), (16, 64, 4, 6), (16, 128, 4, 4), (16, 128, 8, 4))
SOME = configurations((64, 64, 4, 3), (64, 128, 8, 4), (64, 128, 4, 3))
MANY = configurations((256, 128, 8, 3), (128, 128, 8, 4), (128, 128, 8, 3), (128, 64, 4, 4))
POINTERS = configurations((128, 128, 8, 3), (64, 128, 8, 4))
WIDE = configurations((32, 32, 4, 2))


def fitting(configs: list, args: dict, **options) -> list:
    """The configurations for this size."""
    options = {**args, **options}
    if options["wide"]:
        return WIDE
    few = FEW if options["M"] <= 16 else SOME if options["M"] <= 64 else None
    return few or (MANY if options["TMA"] else POINTERS)


@launch.autotune(
    FEW + SOME + MANY + POINTERS + WIDE, key=["N", "K", "GROUP", "size"],
    interpreted={"BM": 16, "BN": 16}, prune_configs_by={"early_config_prune": fitting},
)  # fmt: skip
@triton.jit
def product_kernel(
    X, Words, Scales, Zeros, Bias, Y, M, N, K, G, blocks, span, size, wide,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One tile of Yᵀ = W Xᵀ, or what `span` blocks of the input features add to it.

    Transposed, because the matrix unit can take its left factor from registers: the weights go
    there as soon as they are unpacked.
    """
    m, n = place(M, N, BM, BN)
    row = tl.minimum(n + tl.arange(0, BN), N - 1).to(tl.int64)  # rows beyond N repeat the last
    first = tl.program_id(1) * span
    Words += row[:, None] * (blocks * 16) + tl.arange(0, 16)[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for b in range(first, tl.minimum(first + span, blocks)):
        words = tl.load(Words + b * 16)
        w = ()
        for j in tl.static_range(4):
            if 32 * j % GROUP == 0:
                at = row * G + group_of(b, j, G, GROUP)
                scale, zero = tl.load(Scales + at), tl.load(Zeros + at)
                scale, zero = scale[:, None], zero.to(tl.float32)[:, None]
            w += (weights(words, scale, zero, j, DTYPE),)
        w = beside(beside(w[0], w[1]), beside(w[2], w[3]))
        x = tile(X, m, b * 128, BM, 128, TMA)
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
    row, col = n + tl.arange(0, BN)[:, None], m + tl.arange(0, BM)[None, :]
    if Bias is not None:
        acc += tl.load(Bias + row, row < N, other=0.0).to(tl.float32)
    Y += (tl.program_id(1).to(tl.int64) * M + col) * N + row
    tl.store(Y, acc.to(Y.dtype.element_ty), (row < N) & (col < M))


@triton.jit
def sum_kernel(Parts, Bias, Y, parts, N, total, BLOCK: tl.constexpr):
    """The parts of Y, always added in the same order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        y += tl.load(Parts + at, at < total, other=0.0)
        Parts += total
    if Bias is not None:
        y += tl.load(Bias + at % N, at < total, other=0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), at < total)


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def int4_linear_triton(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None,
    group: int = GROUP,
) -> Tensor:  # fmt: skip
    """`int4_linear_obvious` with one kernel for one row of x and one for several."""
    launch.check("int4_linear_triton", x=x, scales=scales)
    verify(x, packed, scales, zeros, bias, group)
    rows = x.reshape(-1, x.shape[-1])
    (M, K), N = rows.shape, len(packed)
    y = x.new_empty(M, N)
    if not y.numel():
        return y.view(*x.shape[:-1], N)
    packed, scales, zeros = packed.contiguous(), scales.contiguous(), zeros.contiguous()
    bias = None if bias is None else bias.contiguous()
    blocks = launch.ceil_div(K, BLOCK)
    parts, span = split(M, N, blocks, x.device)
    out, own = (y, bias) if parts == 1 else (y.new_empty(parts, M, N, dtype=torch.float32), None)
    common = (packed, scales, zeros, own, out)
    tma = launch.has_tma(x.device)
    if M == 1:
        vector_kernel[lambda meta: (launch.ceil_div(N, meta["R"]), parts)](
            rows.contiguous(), *common, N, K, scales.shape[1], blocks, span, 150 << 23, GROUP=group
        )
    else:
        rows = aligned(rows)
        product_kernel[
            lambda meta: (
                launch.ceil_div(M, meta["BM"]) * launch.ceil_div(N, meta["BN"]), parts
            )
        ](
            described(rows, tma), *common, M, N, K, scales.shape[1], blocks, span,
            size=launch.power_of_2(min(M, 4096)), wide=int(x.dtype == torch.float32),
            DTYPE=TYPES[x.dtype], GROUP=group, TMA=tma,
        )  # fmt: skip
    if parts > 1:
        sum_kernel[(launch.ceil_div(M * N, 256),)](out, bias, y, parts, N, M * N, BLOCK=256)
    return y.view(*x.shape[:-1], N)


def aligned(x: Tensor) -> Tensor:
    """x (M K) itself if its rows start at multiples of 16 bytes, else a copy with zeros added."""
    step = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -x.shape[1] % step)).contiguous()


def split(M: int, N: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """How many parts the input features are cut into, and the blocks of each.

    One, unless too few programs would be under way: those of one row of x have one warp and 8 rows
    of W, the others four warps and 64 rows. A part costs 8 bytes for each number of y.
    """
    if M == 1:
        programs, wanted = launch.ceil_div(N, 8), 8 * launch.processors(device)
    else:
        programs = launch.ceil_div(N, 64) * launch.ceil_div(M, 64)
        wanted = 2 * launch.processors(device)
    most = max(1, blocks // (2 if launch.INTERPRETED else 16))
    parts = max(1, min(wanted // programs, most))
    span = launch.ceil_div(blocks, parts)
    return launch.ceil_div(blocks, span), span
