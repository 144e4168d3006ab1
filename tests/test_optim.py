"""Laws of optim.py."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

import optim
from optim import OPTIMIZERS, SCHEDULES, OptimConfig, learning_rate, orthogonalize

rates = st.floats(1e-4, 0.3)


def named(seed):
    """Parameters as a model names them: two matrices inside a block, an embedding, a norm."""
    shapes = {"layers.0.up.weight": (5, 3), "layers.0.down.weight": (3, 5),
              "embedding": (7, 3), "layers.0.norm.weight": (3,)}  # fmt: skip
    return dict(zip(shapes, normals(seed, *shapes.values()), strict=True))


def train(optimizer, params, gradients, lr):
    for gradient in gradients:
        for name, p in params.items():
            p.grad = torch.from_numpy(gradient[name]).clone()
        optimizer.step(lr)


def gradients_for(params, seed, steps):
    rng = np.random.default_rng(seed)
    return [{n: rng.standard_normal(p.shape) for n, p in params.items()} for _ in range(steps)]


@given(seeds, st.integers(1, 6), rates, st.floats(0, 0.99), st.floats(0, 0.999), st.floats(0, 0.5))
def test_adamw_is_the_paper(seed, steps, lr, beta1, beta2, decay):
    params = named(seed)
    before = {n: array(p).copy() for n, p in params.items()}
    config = OptimConfig("adamw", beta1=beta1, beta2=beta2, eps=1e-8, weight_decay=decay)
    grads = gradients_for(params, seed, steps)
    train(OPTIMIZERS["adamw"](params.items(), config, torch.float64), params, grads, lr)
    for name, p in params.items():
        own = decay if name in ("layers.0.up.weight", "layers.0.down.weight") else 0.0
        want = reference.adamw(before[name], [g[name] for g in grads], lr, beta1, beta2, 1e-8, own)
        assert_close(p, want, 1e-9)


@given(seeds, st.integers(1, 5), rates)
def test_adamw_is_torch_s(seed, steps, lr):
    params, twins = named(seed), named(seed)
    config = OptimConfig("adamw", eps=1e-8)
    grads = gradients_for(params, seed, steps)
    train(OPTIMIZERS["adamw"](params.items(), config, torch.float64), params, grads, lr)
    groups = [
        {"params": [p for n, p in twins.items() if ("weight" in n and p.dim() == 2) == decays],
         "weight_decay": config.weight_decay * decays}
        for decays in (True, False)
    ]  # fmt: skip
    other = torch.optim.AdamW(groups, lr, (config.beta1, config.beta2), config.eps)
    for gradient in grads:
        for name, p in twins.items():
            p.grad = torch.from_numpy(gradient[name])
        other.step()
    for name in params:
        assert_close(params[name], twins[name], 1e-12)


@given(seeds, st.integers(1, 40))
def test_adamw_in_chunks_changes_no_bit(seed, chunk):
    results, default = [], optim.CHUNK
    for optim.CHUNK in (chunk, default):
        params = named(seed)
        train(OPTIMIZERS["adamw"](params.items(), OptimConfig(), None), params,
              gradients_for(params, seed, 2), 0.01)  # fmt: skip
        results.append(params)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_orthogonalize_keeps_the_directions_and_levels_the_sizes(seed, rows, columns):
    """Same singular vectors as G; singular values that were not tiny become about 1."""
    G = normals(seed, (rows, columns))[0].detach()
    X = array(orthogonalize(G))
    U, S, Vt = np.linalg.svd(array(G), full_matrices=False)
    inner = U.T @ X @ Vt.T
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-9
    large = 0.1 * np.linalg.norm(S) < S
    assert (np.diag(inner)[large] > 0.6).all() and (np.diag(inner) < 1.3).all()
    assert_close(
        inner - np.diag(np.diag(inner)), U.T @ (X - U @ np.diag(np.diag(inner)) @ Vt) @ Vt.T, 1e-9
    )


def test_orthogonalize_is_close_to_the_exact_factor():
    G = normals(3, (6, 40))[0].detach()
    error = array(orthogonalize(G, 5)) - reference.orthogonal_factor(array(G))
    assert np.linalg.norm(error, 2) < 0.35  # 0.7 … 1.2 for singular values of 1: Jordan et al. 2024


@given(seeds, st.integers(1, 4))
def test_muon_s_update_has_the_size_of_adamw_s_and_spares_the_rest(seed, steps):
    params, twins = named(seed), named(seed)
    config = OptimConfig("muon", weight_decay=0.0)
    grads = gradients_for(params, seed, steps)
    before = {n: p.detach().clone() for n, p in params.items()}
    muon = OPTIMIZERS["muon"](params.items(), config, torch.float64)
    train(muon, params, grads[:1], 0.01)
    for name in ("layers.0.up.weight", "layers.0.down.weight"):
        moved = (params[name] - before[name]).square().mean().sqrt().item()
        assert 0.5 < moved / (0.01 * optim.MUON_RMS) < 1.3
    train(muon, params, grads[1:], 0.01)
    train(OPTIMIZERS["adamw"](twins.items(), config, None), twins, grads, 0.01)
    for name in ("embedding", "layers.0.norm.weight"):
        assert torch.equal(params[name], twins[name])


@given(seeds)
def test_muon_stacks_matrices_of_one_shape_without_mixing_them(seed):
    """Three matrices of one shape, stepped together, move as each does alone."""
    names = [f"layers.{i}.weight" for i in range(3)]
    together = dict(zip(names, normals(seed, *[(4, 6)] * 3), strict=True))
    alone = dict(zip(names, normals(seed, *[(4, 6)] * 3), strict=True))
    grads = gradients_for(together, seed, 3)
    config = OptimConfig("muon")
    train(OPTIMIZERS["muon"](together.items(), config, torch.float64), together, grads, 0.02)
    for name in names:
        one = {name: alone[name]}
        train(OPTIMIZERS["muon"](one.items(), config, torch.float64), one, grads, 0.02)
        assert_close(together[name], alone[name], 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_bit_for_bit(name):
    params, config = named(0), OptimConfig(name)
    grads = gradients_for(params, 0, 6)
    optimizer = OPTIMIZERS[name](params.items(), config, torch.float32)
    train(optimizer, params, grads[:3], 0.01)
    copies = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    state = {n: x.clone() for n, x in optimizer.state().items()}
    train(optimizer, params, grads[3:], 0.01)
    second = OPTIMIZERS[name](copies.items(), config, torch.float32)
    second.load(state)
    train(second, copies, grads[3:], 0.01)
    assert all(torch.equal(params[n], copies[n]) for n in params)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300), st.floats(0, 0.9), st.floats(0, 1))
def test_the_rate_rises_to_its_top_and_falls_to_its_end(schedule, steps, warmup, final):
    config = replace(OptimConfig(), schedule=schedule, warmup=warmup, final=final, lr=2.0)
    rates = [learning_rate(config, step, steps) for step in range(steps + 1)]
    warm = round(warmup * steps)
    assume(warm < steps)
    assert all(a <= b for a, b in pairwise(rates[:warm]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warm:]))
    assert max(rates[: max(1, steps)]) == pytest.approx(2.0)
    assert all(0 < rate <= 2.0 + 1e-12 for rate in rates[:steps] if final > 0)
    assert rates[steps] == pytest.approx(2.0 if schedule == "constant" else 2.0 * final)


def test_cosine_is_the_paper():
    config = OptimConfig(schedule="cosine", warmup=0.0, final=0.1, lr=1.0)
    for step in range(11):
        want = 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * step / 10))
        assert learning_rate(config, step, 10) == pytest.approx(want)
