"""RMSNorm and LayerNorm with their gradients by hand, alone or with the residual addition fused.

The obvious versions are the equations and the oracles. On a CPU, `rmsnorm` has its own backward in
half as many passes over memory. On a GPU one pair of kernels serves all four norms: a program takes
whole rows, as many at a time as fill its registers, so that each number is read once and written
once, which is what a norm's time consists of. The weight's gradient is summed per program and then
over programs, in a fixed order.

Papers: Zhang and Sennrich 2019, RMSNorm (arXiv 1910.07467, eq. 4); Ba et al. 2016, LayerNorm (arXiv
1607.06450, eq. 4).
"""

import torch
from torch import Tensor

from kernels import launch
from kernels.launch import tl, triton

WIDEST = 16384  # numbers of a row that a program can hold
PROGRAMS = 4  # of the backward pass, on each multiprocessor


def rmsnorm_obvious(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + ε) · w over the last axis; x (… C), w (C); the mean in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return x * inverse.to(x.dtype) * weight.to(x.dtype)


def layernorm_obvious(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean(x)) / √(var(x) + ε) · w + b over the last axis; statistics in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y.to(x.dtype) * weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def add_rmsnorm_obvious(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch, and its RMSNorm: where a residual stream meets the next block."""
    total = x + branch
    return total, rmsnorm_obvious(total, weight, eps)


def add_layernorm_obvious(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch, and its LayerNorm."""
    total = x + branch
    return total, layernorm_obvious(total, weight, bias, eps)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same function and gradients as `rmsnorm_obvious`; in Triton on CUDA."""
    return rmsnorm_triton(x, weight, eps) if x.is_cuda else RMSNormFunction.apply(x, weight, eps)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The same function and gradients as `layernorm_obvious`; in Triton on CUDA."""
    return (layernorm_triton if x.is_cuda else layernorm_obvious)(x, weight, bias, eps)


def add_rmsnorm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `add_rmsnorm_obvious`; in Triton on CUDA."""
    if x.is_cuda:
        return add_rmsnorm_triton(x, branch, weight, eps)
    total = x + branch
    return total, rmsnorm(total, weight, eps)


def add_layernorm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `add_layernorm_obvious`; in Triton on CUDA."""
    function = add_layernorm_triton if x.is_cuda else add_layernorm_obvious
    return function(x, branch, weight, bias, eps)


class RMSNormFunction(torch.autograd.Function):
    """With r = 1/√(mean(x²) + ε) and x̂ = r·x, y = x̂ ∘ w:

    dw = Σ dy ∘ x̂ over all rows,   dx = r · (dy ∘ w − x̂ · mean(dy ∘ w ∘ x̂)).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = torch.rsqrt(norm.square() / x.shape[-1] + eps).to(x.dtype)
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w, r)
        ctx.weight_dtype = weight.dtype
        return (x * r).mul_(w)

    @staticmethod
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        x_hat = x * r
        both = dy * x_hat
        dw = both.flatten(0, -2).sum(0, dtype=ctx.weight_dtype)
        mean = (both @ w / x.shape[-1])[..., None]
        dx = (dy * w).addcmul_(x_hat, mean, value=-1).mul_(r)
        return dx, dw, None


# --- Triton ---------------------------------------------------------------------------------------


def tiles(*table: tuple[int, int]) -> list:
    """Configurations: numbers in a tile of whole rows, warps."""
    return [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in table]


def fitting(configs: list, args: dict, **options) -> list:
    """A thread holds at most 32 numbers of each array (16 where it has half as many registers)."""
    width = {**args, **options}["BLOCK"]

    def fits(config: triton.Config) -> bool:
        each = max(width, config.kwargs["TILE"]) / (32 * config.num_warps)
        return 8 <= each <= (32 if config.num_warps <= 8 else 16)

    return [config for config in configs if fits(config)] or configs[-1:]


@triton.jit
def tile_of(first, N, C, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Rows and columns of a tile of whole rows, and which of its places exist."""
    R: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    row = first.to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row, column, (row < N) & (column < C)


@launch.autotune(
    tiles((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)),
    ["C", "CENTRE"], {"TILE": 32}, prune_configs_by={"early_config_prune": fitting},
)  # fmt: skip
@triton.jit
def forward_kernel(
    X, Branch, W, Bias, Y, Total, Mean, R, x_row, branch_row, N, C, eps,
    CENTRE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, there = tile_of(tl.program_id(0), N, C, BLOCK, TILE)
    x = tl.load(X + row * x_row + column, there, other=0.0)
    if Branch is not None:
        x += tl.load(Branch + row * branch_row + column, there, other=0.0)
        tl.store(Total + row * C + column, x, there)
    x = x.to(tl.float32)
    if CENTRE:
        mean = tl.sum(x, 1, keep_dims=True) / C
        x = tl.where(there, x - mean, 0.0)
        tl.store(Mean + row, mean, row < N)
    r = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / C + eps)
    tl.store(R + row, r, row < N)
    y = x * r * tl.load(W + column, column < C, other=0.0).to(tl.float32)
    if Bias is not None:
        y += tl.load(Bias + column, column < C, other=0.0).to(tl.float32)
    tl.store(Y + row * C + column, y.to(Y.dtype.element_ty), there)


@launch.autotune(
    tiles((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16)),
    ["C", "CENTRE"], {"TILE": 32}, prune_configs_by={"early_config_prune": fitting},
)  # fmt: skip
@triton.jit
def backward_kernel(
    X, W, dY, dTotal, Mean, R, dX, dW, dBias, x_row, dy_row, dtotal_row, N, C,
    CENTRE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """With x̂ = r·(x − mean) and g = dy ∘ w:  dx = r·(g − x̂·mean(g ∘ x̂) − mean(g)) + dtotal;

    dw = Σ dy ∘ x̂ and db = Σ dy over the rows of this program (no means of x and g in RMSNorm).
    """
    ROWS: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    columns = tl.arange(0, BLOCK)
    w = tl.load(W + columns, columns < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row, column, there = tile_of(tl.cast(first, tl.int64), N, C, BLOCK, TILE)
        x = tl.load(X + row * x_row + column, there, other=0.0).to(tl.float32)
        dy = tl.load(dY + row * dy_row + column, there, other=0.0).to(tl.float32)
        r = tl.load(R + row, row < N, other=0.0)
        if CENTRE:
            x -= tl.load(Mean + row, row < N, other=0.0)
        x_hat = x * r
        dw += dy * x_hat
        if dBias is not None:
            db += dy
        g = dy * w
        dx = g - x_hat * (tl.sum(g * x_hat, 1, keep_dims=True) / C)
        if CENTRE:
            dx -= tl.sum(g, 1, keep_dims=True) / C
        dx *= r
        if dTotal is not None:
            dx += tl.load(dTotal + row * dtotal_row + column, there, other=0.0).to(tl.float32)
        tl.store(dX + row * C + column, dx.to(dX.dtype.element_ty), there)
    at = tl.program_id(0) * C + columns
    tl.store(dW + at, tl.sum(dw, 0), columns < C)
    if dBias is not None:
        tl.store(dBias + at, tl.sum(db, 0), columns < C)


def rmsnorm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same function and gradients as `rmsnorm_obvious`."""
    verify("rmsnorm", x=x, weight=weight)
    return TritonNorm.apply(x, None, weight, None, eps, False)[1]


def layernorm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The same function and gradients as `layernorm_obvious`."""
    verify("layernorm", x=x, weight=weight, bias=bias)
    return TritonNorm.apply(x, None, weight, bias, eps, True)[1]


def add_rmsnorm_triton(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `add_rmsnorm_obvious`."""
    verify("add_rmsnorm", x=x, branch=branch, weight=weight)
    return TritonNorm.apply(x, branch, weight, None, eps, False)


def add_layernorm_triton(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same function and gradients as `add_layernorm_obvious`."""
    verify("add_layernorm", x=x, branch=branch, weight=weight, bias=bias)
    return TritonNorm.apply(x, branch, weight, bias, eps, True)


def verify(function: str, **tensors: Tensor | None) -> None:
    """ValueError, one sentence, unless the shapes and dtypes belong together."""
    tensors = {name: x for name, x in tensors.items() if x is not None}
    launch.check(function, **tensors)
    x = tensors["x"]
    C = x.shape[-1]
    if not 1 <= C <= WIDEST:
        raise ValueError(f"{function}: the last axis of x has {C} numbers; at most {WIDEST} can be")
    for name in ("weight", "bias"):
        if name in tensors and tensors[name].shape != (C,):
            shape = tuple(tensors[name].shape)
            raise ValueError(f"{function}: {name} is {shape}; with x {tuple(x.shape)} it is ({C},)")
    branch = tensors.get("branch", x)
    if branch.shape != x.shape or branch.dtype != x.dtype:
        raise ValueError(
            f"{function}: branch {tuple(branch.shape)} of {branch.dtype} must be like x, "
            f"{tuple(x.shape)} of {x.dtype}"
        )


def rows(x: Tensor) -> Tensor:
    """x as a table of rows (N C), each of them contiguous; a copy only if it must be."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def shape_of(x: Tensor) -> dict:
    return {"N": len(x), "C": x.shape[1], "BLOCK": launch.power_of_2(x.shape[1])}


class TritonNorm(torch.autograd.Function):
    """(x + branch, its norm), or (nothing, the norm of x) without a branch."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, centre):
        ctx.set_materialize_grads(False)
        weight, bias = (w if w is None else w.contiguous() for w in (weight, bias))
        table = rows(x)
        add = None if branch is None else rows(branch)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None if branch is None else torch.empty_like(y)
        r = torch.empty(len(table), dtype=torch.float32, device=x.device)
        mean = torch.empty_like(r) if centre else None
        if len(table):
            forward_kernel[lambda meta: (programs(table, meta),)](
                table, add, weight, bias, y, total, mean, r, table.stride(0),
                0 if add is None else add.stride(0), eps=eps, CENTRE=centre, **shape_of(table),
            )  # fmt: skip
        normed = table if branch is None else total.view(table.shape)
        ctx.save_for_backward(normed, weight, bias, mean, r)
        ctx.centre, ctx.shape = centre, x.shape
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        x, weight, bias, mean, r = ctx.saved_tensors
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None, None, None
        dy, dtotal = rows(dy), None if dtotal is None else rows(dtotal)
        dx = torch.empty(ctx.shape, dtype=x.dtype, device=x.device)
        count = PROGRAMS * launch.processors(x.device)
        sums = 1 + (bias is not None)
        parts = torch.empty(sums, count, x.shape[1], dtype=torch.float32, device=x.device)
        if not len(x):
            parts.zero_()
        else:
            backward_kernel[(count,)](
                x, weight, dy, dtotal, mean, r, dx, parts[0], None if bias is None else parts[1],
                x.stride(0), dy.stride(0), 0 if dtotal is None else dtotal.stride(0),
                CENTRE=ctx.centre, **shape_of(x),
            )  # fmt: skip
        dw, *db = parts.sum(1).unbind()  # one launch for both
        dw, db = dw.to(weight.dtype), db[0].to(bias.dtype) if db else None
        return dx, dx if ctx.needs_input_grad[1] else None, dw, db, None, None


def programs(table: Tensor, meta: dict) -> int:
    return launch.ceil_div(len(table), max(1, meta["TILE"] // meta["BLOCK"]))
