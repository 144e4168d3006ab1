"""OBQ, GPTQ, pruning: losses that add up, and the same codes from every way to compute them."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_close, normals, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

import gptq as module
from gptq import Hessian, gptq, inverse_factor, loss, obq, prune, round_to_nearest
from grids import NF4, absmax, nf4, of_rows, zero_point
from run import UserError

counts = st.integers(1, 5)
widths = st.integers(1, 20)
bits = st.integers(2, 5)
uniform = st.sampled_from([absmax, zero_point])
orders = st.sampled_from(["plain", "act"])
kinds = st.sampled_from(["tensor", "row", "column", "group", "nf4"])


def layer(seed: int, N: int, K: int, n: int = 0):
    """Weights (N K), correlated inputs (n K) with some large features, and their H."""
    W, x, A, size, rows = (
        t.detach() for t in normals(seed, (N, K), (n or 4 * K + 4, K), (K, K), (K,), (N, 1))
    )
    x = (x @ (0.5 * A / K**0.5 + torch.eye(K).double())) * (size / 2).exp()
    return W * (rows / 2).exp(), x, seen(x)


def seen(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return hessian.value()


def damped(H: torch.Tensor, share: float) -> torch.Tensor:
    return H + share * H.diagonal().mean() * torch.eye(len(H)).to(H)


def change(W, rounded) -> torch.Tensor:
    return W - rounded.grid.values(rounded.codes, torch.float64)


def drawn_fit(fit, kind: str, b: int, g: int):
    if kind == "nf4":
        return partial(nf4, per=g)
    return partial(fit, bits=b, per=g if kind == "group" else kind)


# --- the quadratic form ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), widths, counts, seeds)
def test_H_is_what_a_change_of_weights_does_to_outputs(batches, K, N, seed):
    """However the inputs come in batches."""
    x, delta = (t.detach() for t in normals(seed, (sum(batches) + 1, K), (N, K)))
    hessian = Hessian(K)
    for part in x.split([*batches, 1]):
        hessian.add(part[None])
    assert_close(hessian.value(), 2 * x.T @ x / len(x))
    total = loss(delta, hessian.value()).sum()
    assert_close(total / total, (delta @ x.T).square().sum() / len(x) / total)


@given(widths, seeds)
def test_the_triangle_is_the_cholesky_factor_of_the_inverse(K, seed):
    H = layer(seed, 1, K)[2]
    want = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    assert_close(inverse_factor(H) / want.diagonal(), want / want.diagonal(), 1e-10)


@given(counts, st.integers(1, 4), st.integers(1, 5), kinds, uniform, bits, st.booleans(),
       st.sampled_from(["rtn", "obq", "obq without outliers", "plain", "act"]), seeds)  # fmt: skip
def test_losses_add_up_to_what_happened(N, G, g, kind, fit, b, damp, how, seed):
    W, _, H = layer(seed, N, G * g)
    share = 0.01 * damp
    method = {
        "rtn": round_to_nearest,
        "obq": partial(obq, damp=share),
        "obq without outliers": partial(obq, damp=share, outliers=False),
    }.get(how, partial(gptq, order=how, damp=share))
    got = method(W, H, drawn_fit(fit, kind, b, g))
    assert got.damping == (0 if how == "rtn" else share)
    want = loss(change(W, got), damped(H, got.damping)).sum()
    assume(want > 1e-9 * loss(W, H).sum())  # else the grid has these weights, but for noise
    assert abs(got.losses.sum() - want) <= 1e-12 * want
    assert how == "rtn" or (got.losses >= 0).all()


# --- GPTQ -----------------------------------------------------------------------------------------


def by_loops(W, H, fit, order):
    """GPTQ as the paper's Algorithm 1 has it, without blocks; H is damped before."""
    K = len(H)
    places = np.argsort(-H.diagonal().numpy(), kind="stable") if order == "act" else np.arange(K)
    W, static = W.clone()[:, places], fit(W)
    U = np.linalg.cholesky(np.linalg.inv(H.numpy()[places][:, places])).T
    codes, losses = torch.zeros(W.shape), torch.zeros_like(W)
    for i in range(K):
        if order == "plain" and i % static.group == 0:
            group = fit(W[:, i : i + static.group])
        one = group.at(i % static.group) if order == "plain" else static.at(places[i])
        code = one.codes(W[:, i : i + 1])
        value = one.values(code, torch.float64)[:, 0]
        for r in range(len(W)):
            error = (W[r, i] - value[r]).item() / U[i, i]
            codes[r, places[i]], losses[r, places[i]] = code[r, 0], error**2 / 2
            for j in range(i, K):
                W[r, j] -= error * U[i, j]
    return codes, losses


@given(counts, st.integers(1, 4), st.integers(1, 5), kinds, uniform, bits, orders,
       st.integers(1, 25), seeds)  # fmt: skip
def test_gptq_is_the_papers_algorithm_with_any_block(N, G, g, kind, fit, b, order, block, seed):
    W, _, H = layer(seed, N, G * g)
    fit = drawn_fit(fit, kind, b, g)
    got = gptq(W, H, fit, order, block)
    codes, losses = by_loops(W, damped(H, 0.01), fit, order)
    assert torch.equal(got.codes.float(), codes)
    assert_close(got.losses, losses, 1e-9)
    assert got.grid.scale.shape == fit(W).scale.shape and got.grid.group == fit(W).group


@given(counts, widths, uniform, bits, seeds)
def test_gptq_is_obq_in_a_fixed_order(N, K, fit, b, seed):
    """With the inverse of all weights that are still free, made anew by elimination."""
    W, _, H = layer(seed, N, K)
    grid = fit(W, b)
    got = gptq(W, H, grid, damp=0.0)
    inverse = np.linalg.inv(H.numpy())
    w = W.numpy().copy()
    for q in range(K):
        code = grid.at(q).codes(torch.from_numpy(w[:, q, None]))
        assert torch.equal(code, got.codes[:, q, None])
        error = w[:, q] - grid.at(q).values(code, torch.float64)[:, 0].numpy()
        assert_close(got.losses[:, q], error**2 / inverse[q, q] / 2, 1e-9)
        w -= np.outer(error, inverse[q]) / inverse[q, q]
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]


@given(counts, widths, uniform, bits, seeds)
def test_gptq_is_babais_nearest_plane(N, K, fit, b, seed):
    """In the lattice of what codes do to outputs, from the last basis vector of a reversed basis.

    No inverse, no update of weights: only a QR decomposition (arXiv 2507.18553, theorem 4).
    """
    W, x, H = layer(seed, N, K)
    grid = fit(W, b)
    codes = gptq(W, H, grid, damp=0.0).codes
    for r in range(N):
        s, z = grid.scale[r].double().item(), int(grid.zero[r])
        R = np.linalg.qr(s * x.numpy()[:, ::-1])[1]
        target = R @ (W[r].numpy() / s)[::-1]
        steps = np.zeros(K)
        for i in reversed(range(K)):
            exact = (target[i] - R[i, i + 1 :] @ steps[i + 1 :]) / R[i, i]
            steps[i] = np.clip(np.round(exact), grid.low - z, grid.high - z)
        assert (steps[::-1] + z).tolist() == codes[r].tolist()


@given(counts, widths, uniform, bits, st.integers(1, 25), seeds)
def test_act_order_is_another_order_of_the_features(N, K, fit, b, block, seed):
    W, _, H = layer(seed, N, K)
    first = H.diagonal().argsort(descending=True)
    want = gptq(W[:, first], H[first][:, first], fit(W, b), "plain", block)
    got = gptq(W, H, partial(fit, bits=b), "act")
    assert torch.equal(got.codes[:, first], want.codes)
    assert_close(got.losses[:, first], want.losses, 1e-10)


@given(counts, st.integers(2, 4), st.integers(2, 5), uniform, bits, seeds)
def test_when_a_group_gets_its_step(N, G, g, fit, b, seed):
    """In plain order from what its weights have become; before all, in another order."""
    W, _, H = layer(seed, N, G * g)
    grouped = partial(fit, bits=b, per=g)
    before = grouped(W).scale
    assert torch.equal(gptq(W, H, grouped, "act").grid.scale, before)
    late = gptq(W, H, grouped).grid.scale
    assert torch.equal(late[:, 0], before[:, 0]) and not torch.equal(late[:, -1], before[:, -1])


@given(counts, widths, uniform, bits, st.sampled_from(["plain", "act", "obq"]), seeds)
def test_what_is_on_the_grid_stays(N, K, fit, b, how, seed):
    W, _, H = layer(seed, N, K)
    grid = fit(W, b)
    codes = grid.codes(W)
    W = grid.values(codes, torch.float64)
    got = obq(W, H, grid) if how == "obq" else gptq(W, H, grid, how)
    assert torch.equal(got.codes, codes) and not got.losses.any()
    assert got.grid is grid


# --- OBQ and pruning ------------------------------------------------------------------------------


def by_least_squares(w, x, candidates, outliers, steps):
    """Settle weights of one row one by one; for each choice, the others are solved for anew.

    candidates(w) → the values that weights would settle at, and which of them are too far away.
    """
    settled = {k: 0.0 for k in np.flatnonzero(w == 0)}
    target, now, losses = x @ w, w.copy(), np.zeros(len(w))

    def solved(settled):
        free = [k for k in range(len(w)) if k not in settled]
        new = np.array([settled.get(k, 0.0) for k in range(len(w))])
        new[free] = np.linalg.lstsq(x[:, free], target - x @ new, rcond=None)[0]
        return new, ((x @ new - target) ** 2).sum() / len(x)

    spent = 0.0
    for _ in range(min(steps, len(w)) - len(settled)):
        values, error = candidates(now)
        free = [k for k in range(len(w)) if k not in settled]
        tries = {k: solved({**settled, k: values[k]}) for k in free}
        best = min(free, key=lambda k: tries[k][1])
        worst = max(free, key=lambda k: error[k])
        best = worst if outliers and error[worst] > 0.25 else best
        settled[best] = values[best]
        now, losses[best] = tries[best][0], tries[best][1] - spent
        spent = tries[best][1]
    return now, losses


@given(st.integers(1, 3), st.integers(1, 7), st.sampled_from([absmax, zero_point, nf4]),
       st.integers(2, 4), st.booleans(), seeds)  # fmt: skip
def test_each_step_of_obq_is_the_best_that_least_squares_finds(N, K, fit, b, outliers, seed):
    W, x, H = layer(seed, N, K)
    W *= normals(seed + 1, (N, K))[0] > -1
    grid = nf4(0.7 * W, K) if fit is nf4 else fit(0.7 * W, b)  # too narrow: there are outliers
    widest = (NF4[1:] - NF4[:-1]).max().item() if fit is nf4 else 1.0  # step
    got = obq(W, H, grid, outliers, damp=0.0)
    assert not grid.values(got.codes)[W == 0].any()
    for r in range(N):
        row = of_rows(grid, slice(r, r + 1))

        def candidates(w, row=row):
            values = row.values(row.codes(torch.from_numpy(w)[None]), torch.float64)[0].numpy()
            step = max(widest * row.scale.double().item(), 1e-30)
            return values, ((w - values) / step) ** 2

        values, losses = by_least_squares(W[r].numpy(), x.numpy(), candidates, outliers, K)
        assert_close(row.values(got.codes[r, None], torch.float64)[0], values, 1e-9)
        assert_close(got.losses[r], losses, 1e-9)


@given(st.integers(1, 3), st.integers(1, 7), st.floats(0, 1), seeds)
def test_each_step_of_pruning_is_the_best_that_least_squares_finds(N, K, share, seed):
    W, x, H = layer(seed, N, K)
    W *= normals(seed + 1, (N, K))[0] > -1
    got = prune(W, H, share, damp=0.0)
    wanted = round(share * K)
    assert ((got.weights == 0).sum(1) == (W == 0).sum(1).clamp(min=wanted)).all()
    for r in range(N):
        want = by_least_squares(
            W[r].numpy(), x.numpy(), lambda w: (0 * w, 0 * w), False, max(wanted, 0)
        )
        assert_close(got.weights[r], want[0], 1e-9)
        assert_close(got.losses[r], want[1], 1e-9)
    total = loss(W - got.weights, H).sum()
    assert abs(got.losses.sum() - total) <= 1e-12 * max(1, total)


@given(counts, st.integers(2, 12), uniform, bits, st.integers(1, 3), seeds)
def test_rows_do_not_know_of_each_other(N, K, fit, b, together, seed):
    W, _, H = layer(seed, N, K)
    W *= normals(seed + 1, (N, K))[0] > -1
    grid = fit(W, b)
    whole, pruned = obq(W, H, grid), prune(W, H, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", together * K**2)
        assert torch.equal(obq(W, H, grid).codes, whole.codes)
        assert_close(prune(W, H, 0.5).weights, pruned.weights)


@given(counts, st.integers(1, 12), st.floats(0, 1), uniform, bits, seeds)
def test_a_pruned_matrix_stays_pruned(N, K, share, fit, b, seed):
    W, _, H = layer(seed, N, K)
    sparse = prune(W, H, share).weights
    got = obq(sparse, H, partial(fit, bits=b))
    assert not got.grid.values(got.codes)[sparse == 0].any()


# --- edges ----------------------------------------------------------------------------------------


def quantize(W, H, fit, count=0, method=gptq, **options):
    return method(W, H, fit, **options)


def drop(W, H, fit, count=None, **options):
    """Prune `count` weights of a row, or half of them."""
    return prune(W, H, 0.5 if count is None else count / W.shape[1], **options)


METHODS = {
    "gptq": quantize, "act": partial(quantize, order="act"), "obq": partial(quantize, method=obq),
    "prune": drop,
}  # fmt: skip
methods = st.sampled_from(list(METHODS))


def outcome(got) -> torch.Tensor:
    return got.weights if hasattr(got, "weights") else got.grid.values(got.codes, torch.float64)


@given(methods, counts, st.integers(1, 10), st.integers(1, 4), uniform, bits,
       st.sampled_from([1e-7, 1.0, 1e7]), seeds)  # fmt: skip
def test_features_that_are_always_0_change_nothing_for_the_others(
    how, N, K, dead, fit, b, size, seed
):
    """Their own weights become 0; and how large inputs are counts for losses only."""
    W, x, _ = layer(seed, N, K + dead)
    gone = torch.randperm(K + dead, generator=torch.Generator().manual_seed(seed))[:dead]
    x[:, gone] = 0
    alive = torch.ones(K + dead, dtype=torch.bool)
    alive[gone] = False
    got = METHODS[how](W, seen(size * x), partial(fit, bits=b), count=K // 2 + dead)
    assert not outcome(got)[:, gone].any() and not got.losses[:, gone].any()
    less = METHODS[how](W[:, alive], seen(x[:, alive]), partial(fit, bits=b), count=K // 2)
    assert got.damping == less.damping == 0.01
    assert_close(outcome(got)[:, alive], outcome(less), 1e-9)
    assert_close(got.losses[:, alive] / size**2, less.losses, 1e-9)


@given(methods, counts, st.integers(2, 12), uniform, bits, seeds)
def test_too_few_inputs_are_made_up_for_by_damping(how, N, K, fit, b, seed):
    """And the result says by how much."""
    W, x, H = layer(seed, N, K, n=K // 2)
    got = METHODS[how](W, H, partial(fit, bits=b), damp=0.0)
    assert got.damping == 0.01
    want = loss(W - outcome(got), damped(H, 0.01)).sum()
    assert abs(got.losses.sum() - want) <= 1e-10 * want
    bent = H - 0.015 * H.diagonal().mean() * torch.eye(K).double()
    assert METHODS[how](W, bent, partial(fit, bits=b), damp=0.0).damping == 0.02
    x = layer(seed, N, K)[1]
    x[:, 0] = x[:, 1] + 1e-7 * x[:, 0]
    assert METHODS[how](W, seen(x), partial(fit, bits=b), damp=0.0).damping == 0.01


@given(methods, st.sampled_from([(1, 1), (1, 7), (7, 1), (3, 4)]), uniform, bits, seeds)
def test_rows_of_zeros_single_rows_and_single_columns(how, shape, fit, b, seed):
    W, _, H = layer(seed, *shape)
    W[-1] = 0
    got = METHODS[how](W, H, partial(fit, bits=b))
    assert outcome(got).isfinite().all() and got.losses.isfinite().all()
    assert not outcome(got)[-1].any() and not got.losses[-1].any()


@pytest.mark.parametrize("how", METHODS)
def test_what_cannot_be_solved_is_refused(how):
    W, _, H = layer(0, 3, 4)
    bent, hole = H.clone(), W.clone()
    bent[0, 0], hole[0, 0] = torch.inf, torch.nan
    for weights, form in ((W, bent), (W, H * torch.nan), (W, 0 * H), (W, -H), (W, H[:3, :3]),
                          (hole, H), (W[:0], H)):  # fmt: skip
        with pytest.raises(UserError) as error:
            METHODS[how](weights, form, absmax)
        assert "\n" not in str(error.value)
    for damp in (-1.0, 2.0, torch.nan):
        with pytest.raises(UserError, match=r"damping .* must be from 0 to 1"):
            METHODS[how](W, H, absmax, damp=damp)
    with pytest.raises(UserError):
        Hessian(4).value()
    for call in (lambda: gptq(W, H, absmax, "random"), lambda: gptq(W, H, absmax, block=0),
                 lambda: prune(W, H, 1.5), lambda: gptq(W, H, partial(absmax, per=3))):  # fmt: skip
        with pytest.raises(UserError):
            call()


# --- what it is for -------------------------------------------------------------------------------


def realistic(seed: int, N: int, K: int, large: float = 1.0):
    """Inputs as trained layers get them: variances fall as k^-1.5, in directions of their own.

    Two features are `large` times as large.
    """
    W, x, A = (t.detach() for t in normals(seed, (N, K), (6 * K, K), (K, K)))
    x = x * torch.arange(1, K + 1) ** -0.75 @ torch.linalg.qr(A)[0]
    x[:, [1, K // 2]] *= large
    return W, seen(x)


def error(W, H, got) -> float:
    return loss(change(W, got), H).sum().item()


@pytest.mark.parametrize("large", [1.0, 10.0])
@pytest.mark.parametrize("fit", [absmax, zero_point])
@pytest.mark.parametrize("b", [3, 4])
def test_outputs_change_less_than_by_rounding_to_nearest(fit, b, large):
    """GPTQ ≤ 0.6 × rounding to nearest in each layer, and OBQ ≤ GPTQ on average.

    Not if a few features are much larger: these cost most, so that the greedy choice leaves them
    for the end, when no weight is left to make up for them. Act-order does the opposite.
    """
    shares = {"gptq": [], "act": [], "obq": []}
    for seed in range(4):
        W, H = realistic(seed, 24, 64, large)
        nearest = error(W, H, round_to_nearest(W, H, how := partial(fit, bits=b)))
        for name in shares:
            shares[name].append(error(W, H, METHODS[name](W, H, how)) / nearest)
    assert max(*shares["gptq"], *shares["act"]) <= 0.6
    gptq, act, obq = (np.mean(x) for x in shares.values())
    assert act <= gptq and (obq <= gptq if large == 1 else obq > gptq)


def test_groups_and_normal_floats_gain_as_well():
    W, H = realistic(0, 24, 128)
    for fit in (absmax, zero_point):
        rows, groups = (gptq(W, H, partial(fit, bits=3, per=per)) for per in ("row", 32))
        assert error(W, H, groups) < error(W, H, rows)
    assert error(W, H, gptq(W, H, nf4)) < 0.6 * error(W, H, round_to_nearest(W, H, nf4))


def test_pruning_costs_less_than_dropping_the_smallest():
    W, H = realistic(0, 24, 64)
    got = prune(W, H, 0.5).weights
    small = W.where(W.abs() >= W.abs().median(1, keepdim=True).values, 0)
    assert loss(W - got, H).sum() < 0.4 * loss(W - small, H).sum()
