"""Rounding a layer's weights so that its outputs change least: OBQ, GPTQ, and pruning by OBC.

Idea: what rounding W (by δ) does to the outputs on n calibration inputs x is a quadratic form,

    ½ tr(δ H δᵀ) = Σ |δ x|² / n,    H = 2 Σ x xᵀ / n,

in which errors of one weight can be mended by others. Settle weight q of a row at the value v; the
others, still free, then best move by

    −(w_q − v) / [H⁻¹]_qq · H⁻¹_:q,    which costs  ½ (w_q − v)² / [H⁻¹]_qq,

and the inverse for those that stay free follows by one step of Gaussian elimination. OBQ settles
the cheapest weight first, row by row. GPTQ lets all rows settle their weights in the same order:
then all need the same inverses, and these are rows of one triangle U, H⁻¹ = Uᵀ U.

    hessian = Hessian(K); hessian.add(x) …; H = hessian.value()
    round_to_nearest(W, H, fit)     the baseline
    obq(W, H, fit)                  K³ for each row: small layers
    gptq(W, H, fit, order)          K³ for all rows
    prune(W, H, share)              v = 0: weights go, the others make up for it

`fit` says what numbers there are: `partial(absmax, bits=4, per=64)`, `zero_point`, `nf4`, or a grid
that stays as it is.

Run: python -m pytest tests/test_gptq.py

Papers: Frantar & Alistarh 2022, Optimal Brain Compression (arXiv 2208.11580); Frantar et al. 2022,
GPTQ (arXiv 2210.17323); Chen et al. 2025 on GPTQ as Babai's algorithm (arXiv 2507.18553).

Letters: N output features (rows) · K input features · n calibration inputs, or rows at a time ·
g input features of a group.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from grids import Grid, NormalFloat, beside, finite, of_rows, spread
from run import UserError

AnyGrid = Grid | NormalFloat
Fit = AnyGrid | Callable[[Tensor], AnyGrid]  # a grid, or what fits one to weights
DAMP = 0.01  # of H's mean diagonal, added to its diagonal
AT_ONCE = 2**24  # numbers of the inverses that OBQ holds: 128 MB


class Rounded(NamedTuple):
    codes: Tensor  # (N K)
    grid: AnyGrid
    losses: Tensor  # (N K), what each weight added to ½ tr(δ H δᵀ), H with its damping
    damping: float  # the share of H's mean diagonal that was added to its diagonal


class Pruned(NamedTuple):
    weights: Tensor  # (N K)
    losses: Tensor  # as above
    damping: float


# --- the quadratic form ---------------------------------------------------------------------------


class Hessian:
    """H = 2 Σ x xᵀ / n over the inputs that were added, summed in float64."""

    def __init__(self, K: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(K, K, dtype=torch.float64, device=device)
        self.inputs = 0

    def add(self, x: Tensor) -> None:
        """x (… K)"""
        x = x.detach().double().flatten(0, -2)
        self.sum += x.T @ x
        self.inputs += len(x)

    def value(self) -> Tensor:
        """H (K K)"""
        if not self.inputs:
            raise UserError("no calibration input has reached this layer")
        return 2 / self.inputs * self.sum


def loss(delta: Tensor, H: Tensor) -> Tensor:
    """½ tr(δ H δᵀ) = ½ Σ δ ∘ δ H, as its terms (N K)."""
    return delta * (delta @ H) / 2


def solvable(W: Tensor, H: Tensor, damp: float) -> tuple[Tensor, Tensor, float]:
    """Copies of W and H in float64, H positive definite, and the share of damping this took.

    An input feature that was always 0 is dead: its weights become 0, its part of H that of a mean
    feature. Damping is doubled until H has a Cholesky factor without tiny pivots.
    """
    finite(W)
    if H.shape != (W.shape[1],) * 2:
        raise UserError(f"W {tuple(W.shape)} and H {tuple(H.shape)} do not belong together")
    if not H.isfinite().all():
        raise UserError("calibration inputs were infinite or NaN, or too large: so is H")
    if not 0 <= damp <= 1:
        raise UserError(f"damping {damp} must be from 0 to 1")
    W, H = W.detach().double().clone(), H.double().clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    if dead.all():
        raise UserError("all calibration inputs of this layer were 0")
    mean = diagonal[~dead].mean()
    diagonal[dead] = mean
    W[:, dead] = 0
    tiny = 1e-10 * diagonal.max()
    while damp <= 1:
        damped = H + damp * mean * torch.eye(len(H)).to(H)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed and L.diagonal().min() ** 2 > tiny:
            return W, damped, damp
        damp = max(2 * damp, DAMP)
    raise UserError("H has negative curvature: it cannot be one of calibration inputs")


def inverse_factor(H: Tensor) -> Tensor:
    """U, upper triangular, with Uᵀ U = H⁻¹: the inverse of R in H = R Rᵀ, found from below."""
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(R, torch.eye(len(H)).to(H), upper=True)


def fitted(W: Tensor, fit: Fit) -> AnyGrid:
    return fit if isinstance(fit, tuple) else fit(W)


def round_to_nearest(W: Tensor, H: Tensor, fit: Fit) -> Rounded:
    """Each weight (N K) to its nearest value; the losses, of which some are gains, for H (K K)."""
    grid = fitted(W, fit)
    codes = grid.codes(W)
    return Rounded(codes, grid, loss(W.double() - grid.values(codes, torch.float64), H.double()), 0)


# --- one weight at a time -------------------------------------------------------------------------


def obq(W: Tensor, H: Tensor, fit: Fit, outliers: bool = True, damp: float = DAMP) -> Rounded:
    """Each row of W (N K) settles the weight that costs least, again and again (OBC, section 5).

    outliers: a weight that others have pushed further than half a step from the grid, or half of
    NF4's widest, goes first.
    Weights that are 0 stay 0, so that a pruned matrix stays pruned. Those of features much larger
    than others cost most and come last, when nothing can mend them: there GPTQ's order is better.
    """
    W, H, damp = solvable(W, H, damp)
    whole = fitted(W, fit)
    codes, losses = whole.codes(W), torch.zeros_like(W)
    for rows in chunks(W):
        grid, w = of_rows(whole, rows), W[rows]
        at = torch.arange(len(w), device=w.device)
        inverse = inverses(H, w != 0)
        most = (spread(grid.scale, grid.group).double() * grid.reach) ** 2
        for _ in range(int((w != 0).sum(1).max())):
            free = inverse.diagonal(dim1=1, dim2=2) > 0
            nearest = grid.codes(w)
            values = grid.values(nearest, w.dtype)
            j = cheapest((w - values) ** 2, inverse, free, most if outliers else None)
            chosen = free[at, j]  # not in rows that are settled
            codes[rows][at[chosen], j[chosen]] = nearest[at, j][chosen]
            losses[rows][at, j] += settle(w, inverse, j, values[at, j])
    return Rounded(codes, whole, losses, damp)


def cheapest(error: Tensor, inverse: Tensor, free: Tensor, most: Tensor | None) -> Tensor:
    """In each row argmin error / [H⁻¹]_qq, or, where some are above `most`, the worst of these."""
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    j = (error / diagonal).where(free, torch.inf).argmin(1)
    if most is None:
        return j
    worst = (error / most).where(free, 0).max(1)
    return worst.indices.where(worst.values > 1, j)


def settle(w: Tensor, inverse: Tensor, j: Tensor, value: Tensor) -> Tensor:
    """In each row of w (n K), weight j (n) becomes value (n): in place; the losses (n).

    inverse (n K K): of H for the free weights, 0 for settled ones, for which nothing happens.
    """
    at = torch.arange(len(w), device=w.device)
    column = inverse[at, :, j]
    pivot = column[at, j]
    pivot = pivot.where(pivot > 0, 1)
    error = w[at, j] - value
    w -= (error / pivot)[:, None] * column
    w[at, j] = value
    inverse.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None], alpha=-1)
    inverse[at, j] = 0
    inverse[at, :, j] = 0
    return error**2 / pivot / 2


def inverses(H: Tensor, free: Tensor) -> Tensor:
    """For each row of free (n K), the inverse of H's free rows and columns, 0 elsewhere."""
    if free.all():
        return torch.cholesky_inverse(torch.linalg.cholesky(H)).repeat(len(free), 1, 1)
    both = free[:, :, None] & free[:, None]
    parts = torch.where(both, H, torch.eye(len(H)).to(H))
    return torch.cholesky_inverse(torch.linalg.cholesky(parts)) * both


def chunks(W: Tensor) -> list[slice]:
    """Rows whose inverses are held at the same time."""
    N, K = W.shape
    size = max(1, AT_ONCE // K**2)
    return [slice(i, i + size) for i in range(0, N, size)]


def prune(W: Tensor, H: Tensor, share: float, damp: float = DAMP) -> Pruned:
    """A share of each row of W (N K) becomes 0, the cheapest weights first (OBC, section 4).

    Weights that are 0 count, and stay 0. The paper prunes a share of all rows together, of which
    some then lose more than others; here each loses as many.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share of weights to prune, {share}, must be from 0 to 1")
    kind = W.dtype
    W, H, damp = solvable(W, H, damp)
    losses = torch.zeros_like(W)
    for rows in chunks(W):
        w = W[rows]
        at = torch.arange(len(w), device=w.device)
        inverse = inverses(H, w != 0)
        left = round(share * W.shape[1]) - (w == 0).sum(1)
        for _ in range(int(left.max())):
            j = cheapest(w**2, inverse, inverse.diagonal(dim1=1, dim2=2) > 0, None)
            losses[rows][at, j] += settle(w, inverse, j, w[at, j].where(left <= 0, 0))
            left -= 1
    return Pruned(W.to(kind), losses, damp)


# --- all rows in one order ------------------------------------------------------------------------


def gptq(
    W: Tensor, H: Tensor, fit: Fit, order: Literal["plain", "act"] = "plain", block: int = 128,
    damp: float = DAMP,
) -> Rounded:  # fmt: skip
    """All rows of W (N K) settle feature after feature, the rest moving along (GPTQ, section 3).

    order "act": features with the largest H_kk first. A function `fit` sees a group's weights when
    it begins, after the moves so far; with "act", whose groups do not begin together, all before.
    block: features whose moves wait for each other; the rest moves after each block, all at once.
    """
    if block < 1 or order not in ("plain", "act"):
        raise UserError(f'block {block} must be at least 1, and the order "plain" or "act"')
    W, H, damp = solvable(W, H, damp)
    K = len(H)
    grid, late = fitted(W, fit), order == "plain" and not isinstance(fit, tuple)
    places = torch.arange(K, device=W.device)
    if order == "act":
        places = H.diagonal().argsort(descending=True, stable=True)
    W, U = W[:, places], inverse_factor(H[places][:, places])
    groups, codes, errors = [], torch.zeros_like(W), torch.zeros_like(W)
    begins = sorted({*range(0, K, block), *(range(0, K, grid.group) if late else ())})
    for begin, end in zip(begins, [*begins[1:], K], strict=True):
        if late and begin % grid.group == 0:
            groups.append(fit(W[:, begin : begin + grid.group]))
        for k in range(begin, end):
            one = groups[-1].at(k % grid.group) if late else grid.at(int(places[k]))
            code = one.codes(W[:, k, None])
            errors[:, k, None] = (W[:, k, None] - one.values(code, W.dtype)) / U[k, k]
            codes[:, k, None] = code.to(W)
            W[:, k:end] -= errors[:, k, None] * U[k, k:end]
        W[:, end:] -= errors[:, begin:end] @ U[begin:end, end:]
    back = places.argsort()
    grid = beside(groups) if late else grid
    return Rounded(codes[:, back].to(code.dtype), grid, errors[:, back] ** 2 / 2, damp)
