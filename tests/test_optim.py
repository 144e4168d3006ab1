"""Laws of optim.py."""

import copy
import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import get_args, get_type_hints

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

import optim
from model import ModelConfig, Transformer
from optim import (
    KINDS,
    SCHEDULES,
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Muon,
    OptimConfig,
    Ramp,
    build,
    learning_rate,
    orthogonalize,
)
from run import UserError

rates = st.floats(1e-4, 0.3)


def named(seed):
    """Parameters as a model names them: two matrices inside a block, an embedding, a norm."""
    shapes = {"layers.0.up.weight": (5, 3), "layers.0.down.weight": (3, 5),
              "embedding": (7, 3), "layers.0.norm.weight": (3,)}  # fmt: skip
    return dict(zip(shapes, normals(seed, *shapes.values()), strict=True))


def train(optimizer, params, gradients, lr=None):
    for gradient in gradients:
        for name, p in params.items():
            p.grad = torch.from_numpy(gradient[name]).clone()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        optimizer.step()


def gradients_for(params, seed, steps):
    rng = np.random.default_rng(seed)
    return [{n: rng.standard_normal(p.shape) for n, p in params.items()} for _ in range(steps)]


@given(seeds, st.integers(1, 6), rates, st.floats(0, 0.99), st.floats(0, 0.999), st.floats(0, 0.5))
def test_adamw_is_the_paper(seed, steps, lr, beta1, beta2, decay):
    params = named(seed)
    before = {n: array(p).copy() for n, p in params.items()}
    config = OptimConfig("adamw", beta1=beta1, beta2=beta2, eps=1e-8, weight_decay=decay)
    grads = gradients_for(params, seed, steps)
    train(build(params.items(), config, torch.float64), params, grads, lr)
    for name, p in params.items():
        own = decay if name in ("layers.0.up.weight", "layers.0.down.weight") else 0.0
        want = reference.adamw(before[name], [g[name] for g in grads], lr, beta1, beta2, 1e-8, own)
        assert_close(p, want, 1e-9)


@given(seeds, st.integers(1, 5), rates)
def test_adamw_is_torch_s(seed, steps, lr):
    params, twins = named(seed), named(seed)
    config = OptimConfig("adamw", eps=1e-8)
    grads = gradients_for(params, seed, steps)
    train(build(params.items(), config, torch.float64), params, grads, lr)
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
        train(build(params.items(), OptimConfig("adamw"), None), params,
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


def test_gradients_that_fp16_cannot_hold_are_orthogonalized_all_the_same():
    G = normals(3, (6, 9))[0].detach().float()
    want = orthogonalize(G, dtype=torch.float16)
    assert want.dtype == torch.float16 and orthogonalize(G).dtype == torch.float32
    assert_close(orthogonalize(G * 1e-9, dtype=torch.float16).float(), want.float(), 5e-3)
    assert not orthogonalize(G * 0, dtype=torch.float16).any()


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
    muon = build(params.items(), config, torch.float64)
    train(muon, params, grads[:1], 0.01)
    for name in ("layers.0.up.weight", "layers.0.down.weight"):
        moved = (params[name] - before[name]).square().mean().sqrt().item()
        assert 0.5 < moved / (0.01 * optim.MUON_RMS) < 1.3
    train(muon, params, grads[1:], 0.01)
    adamw = replace(config, name="adamw")
    train(build(twins.items(), adamw, None), twins, grads, 0.01)
    for name in ("embedding", "layers.0.norm.weight"):
        assert torch.equal(params[name], twins[name])


def test_only_what_maps_the_stream_decays_and_goes_to_muon():
    """No table of what tokens, places or distances are, Shaw's in each block included."""
    shape = ModelConfig(layers=2, dim=16, heads=2, vocab_size=9, reach=40, segments=2, tied=False)
    for position in get_args(get_type_hints(ModelConfig)["position"]):
        model = Transformer(replace(shape, position=position))
        for group in build(model.named_parameters(), OptimConfig()).param_groups:
            for name in group["param_names"]:
                linear = re.search(r"attention\.\w+\.weight|ffn\.\w+\.weight", name)
                assert bool(linear) == group["inside"] == bool(group["weight_decay"]), name


@given(seeds)
def test_muon_stacks_matrices_of_one_shape_without_mixing_them(seed):
    """Three matrices of one shape, stepped together, move as each does alone."""
    names = [f"layers.{i}.weight" for i in range(3)]
    together = dict(zip(names, normals(seed, *[(4, 6)] * 3), strict=True))
    alone = dict(zip(names, normals(seed, *[(4, 6)] * 3), strict=True))
    grads = gradients_for(together, seed, 3)
    config = OptimConfig("muon")
    train(build(together.items(), config, torch.float64), together, grads, 0.02)
    for name in names:
        one = {name: alone[name]}
        train(build(one.items(), config, torch.float64), one, grads, 0.02)
        assert_close(together[name], alone[name], 1e-12)


@given(seeds, st.integers(1, 5), rates, st.floats(0, 0.99), st.floats(0, 0.5))
def test_sgd_is_one_number_at_a_time_and_torch_s(seed, steps, lr, momentum, decay):
    ours, theirs, alone = named(seed), named(seed), named(seed)
    grads = gradients_for(ours, seed, steps)
    train(SGD(ours.values(), lr, momentum, decay), ours, grads)
    other = torch.optim.SGD(theirs.values(), lr, momentum, weight_decay=decay)
    train(other, theirs, grads)
    for name, p in ours.items():
        gs = [g[name] for g in grads]
        assert_close(p, theirs[name], 1e-12)
        assert_close(p, reference.sgd(array(alone[name]), gs, lr, momentum, decay), 1e-12)


@given(seeds, st.integers(1, 5), rates, st.floats(0, 0.5), st.booleans())
def test_adam_is_torch_s(seed, steps, lr, decay, decoupled):
    """Decay inside the gradient or beside it, and weights that are views of others."""
    ours, theirs = named(seed), named(seed)
    for some in (ours, theirs):
        some["layers.0.up.weight"] = some["layers.0.up.weight"].detach().T.requires_grad_()
    grads = gradients_for(ours, seed, steps)
    kinds = (AdamW, torch.optim.AdamW) if decoupled else (Adam, torch.optim.Adam)
    for kind, some in zip(kinds, (ours, theirs), strict=True):
        optimizer = kind(some.values(), lr, betas=(0.8, 0.9), eps=1e-8, weight_decay=decay)
        train(optimizer, some, grads)
    for name in ours:
        assert_close(ours[name], theirs[name], 1e-12)


@given(seeds, st.integers(1, 6), rates, st.floats(0, 0.5))
def test_adafactor_is_one_number_at_a_time_and_transformers(seed, steps, lr, decay):
    transformers = pytest.importorskip("transformers")
    ours, theirs, alone = named(seed), named(seed), named(seed)
    grads = gradients_for(ours, seed, steps)
    train(Adafactor(ours.values(), lr, decay), ours, grads)
    other = transformers.Adafactor(
        theirs.values(), lr, weight_decay=decay, relative_step=False, scale_parameter=True
    )
    train(other, theirs, grads)
    for name, p in ours.items():
        gs = [g[name] for g in grads]
        assert_close(p, reference.adafactor(array(alone[name]), gs, lr, decay), 1e-10)
        # transformers decays p before it moves by α·U, and we at once: the same
        assert_close(p, theirs[name], 1e-10)


def test_adafactor_has_least_sizes_and_means_of_each_matrix():
    """ε₂ is the least size of a weight, ε₁ of a square; a gradient's own size does not matter."""
    zero, still = torch.zeros(3, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    grads = {"a": np.ones((3, 2), np.float32), "b": np.zeros((2, 2), np.float32)}
    train(Adafactor([zero, still], lr=0.5), {"a": zero, "b": still}, [grads])
    assert_close(zero, torch.full((3, 2), -0.5e-3), 1e-6)
    assert torch.equal(still, torch.ones(2, 2))
    p, g = (x.detach() for x in normals(5, (3, 4), (3, 4)))
    stack = torch.stack([p, p]).requires_grad_()
    train(Adafactor([stack]), {"s": stack}, [{"s": np.stack([array(g), 10 * array(g)])}] * 2)
    assert_close(stack[0], stack[1], 1e-12)
    assert not torch.equal(stack[0], p)


def test_adafactor_s_own_rate_is_transformers_relative_step():
    """min(10⁻², 1/√t) is what inverse_sqrt gives after a warm-up of 10⁴ steps that is not one."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = named(1), named(1)
    grads = gradients_for(ours, 1, 5)
    train(Adafactor(ours.values(), lr=1e-2), ours, grads)
    train(transformers.Adafactor(theirs.values()), theirs, grads)
    for name in ours:
        assert_close(ours[name], theirs[name], 1e-12)


@given(seeds, st.integers(1, 4))
def test_adafactor_is_exact_where_squares_have_rank_one(seed, steps):
    """There it is the same with all squares kept, as for a vector: g = r cᵀ with signs."""
    rng = np.random.default_rng(seed)
    r, c = np.exp(rng.normal(size=(4, 1))), np.exp(rng.normal(size=(1, 6)))
    p, (flat,) = rng.normal(size=(4, 6)), normals(seed, (24,))
    matrix = torch.tensor(p, requires_grad=True)
    flat.data.copy_(matrix.detach().view(-1))
    grads = [{"p": r * c * rng.choice([-1, 1], (4, 6))} for _ in range(steps)]
    train(Adafactor([matrix]), {"p": matrix}, grads)
    train(Adafactor([flat]), {"p": flat}, [{"p": g["p"].reshape(-1)} for g in grads])
    assert_close(matrix.view(-1), flat, 1e-12)


def test_adafactor_s_state_is_next_to_nothing():
    p = torch.zeros(4096, 4096, requires_grad=True)
    small, large = (
        sum(x.nbytes for n, x in kind([p]).tensors().items() if not n.startswith("t/"))
        for kind in (Adafactor, AdamW)
    )
    assert large == 2 * p.nbytes and small == 8192 * 4 and 50 * small <= large


def test_muon_is_torch_s_as_far_as_bfloat16_tells():
    ours, theirs = (dict(zip("ab", normals(3, (8, 5), (6, 6)), strict=True)) for _ in range(2))
    grads = gradients_for(ours, 3, 3)
    train(Muon(ours.values(), 0.02, weight_decay=0.1, dtype=torch.float64), ours, grads)
    other = torch.optim.Muon(theirs.values(), 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    train(other, theirs, grads)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() < 0.02 * 0.02 * 3 * ours[name].numel() ** 0.5


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"not a weight of shape \(3,\)"):
        Muon([torch.zeros(3, requires_grad=True)])


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_optimizer_goes_on_bit_for_bit(name):
    """By its named tensors, and by torch's own state_dict."""
    config = OptimConfig(name)
    params = named(0)
    grads = gradients_for(params, 0, 6)
    optimizer = build(params.items(), config)
    train(optimizer, params, grads[:3], 0.01)
    state = {n: x.clone() for n, x in optimizer.tensors().items()}
    theirs = copy.deepcopy(optimizer.state_dict())
    copies = [{n: p.detach().clone().requires_grad_() for n, p in params.items()} for _ in "ab"]
    train(optimizer, params, grads[3:], 0.01)
    second, third = (build(some.items(), config) for some in copies)
    second.load_tensors(state)
    third.load_state_dict(theirs)
    for other, some in zip((second, third), copies, strict=True):
        train(other, some, grads[3:], 0.01)
        assert all(torch.equal(params[n], some[n]) for n in params)


@pytest.mark.parametrize("name", KINDS)
def test_weights_without_a_gradient_stay(name):
    params = named(0)
    optimizer = build(params.items(), OptimConfig(name))
    params["embedding"].grad = torch.ones_like(params["embedding"])
    before = {n: p.detach().clone() for n, p in params.items()}
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss == 3.0
    assert [n for n in params if not torch.equal(params[n], before[n])] == ["embedding"]


def test_every_kind_is_a_torch_optimizer_whose_rate_a_scheduler_may_set():
    for name in KINDS:
        params = named(0)
        optimizer = build(params.items(), OptimConfig(name, lr=1.0))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        train(optimizer, params, gradients_for(params, 0, 1))
        scheduler.step()
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}


shares = st.floats(0, 1)
ENDS_HIGH = {"constant", "inverse_sqrt"}


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 300), st.floats(0.01, 0.8), shares)
def test_the_rate_rises_to_its_top_and_falls_to_its_end(schedule, steps, warmup, final):
    config = OptimConfig(schedule=schedule, warmup=warmup, final=final, lr=2.0)
    rates = [learning_rate(config, step, steps) for step in range(steps + 1)]
    warm = round(warmup * steps)
    assert all(a <= b for a, b in pairwise(rates[:warm]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warm:]))
    assert max(rates[: max(1, steps)]) == pytest.approx(2.0)
    assert all(0 < rate <= 2.0 + 1e-12 for rate in rates[:steps] if final > 0)
    if schedule not in ENDS_HIGH:
        assert rates[steps] == pytest.approx(2.0 * final)


def test_inverse_sqrt_is_the_paper_s():
    """Vaswani et al. 2017, eq. 3: lr·min(step/warm, √(warm/step)), their step being ours + 1."""
    config = OptimConfig(schedule="inverse_sqrt", warmup=0.1, lr=3.0)
    for step in range(1000):
        want = 3.0 * min((step + 1) / 100, math.sqrt(100 / max(step, 100)))
        assert learning_rate(config, step, 1000) == pytest.approx(want)


def test_wsd_stays_and_then_falls():
    config = OptimConfig(schedule="wsd", warmup=0.1, decay=0.25, final=0.2, lr=1.0)
    rates = [learning_rate(config, step, 1000) for step in range(1001)]
    assert {*rates[99:751]} == {1.0} and rates[751] < 1
    assert rates[875] == pytest.approx(0.6) and rates[1000] == pytest.approx(0.2)


@pytest.mark.parametrize("settings", [
    {"schedule": "inverse_sqrt", "warmup": 0.0}, {"schedule": "wsd", "warmup": 0.5, "decay": 0.6},
    {"warmup": 1.0}, {"decay": 1.5},
])  # fmt: skip
def test_schedules_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match="--optim"):
        OptimConfig(**settings)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 3000), st.integers(1, 200))
def test_a_ramp_counts_what_its_updates_have(first, more, over, steps):
    """Counted one update after the other; the rows never shrink, and grow in a line."""
    ramp = Ramp(first + more, first, over)
    rows = [ramp.rows(step) for step in range(steps)]
    assert [ramp.seen(step) for step in range(steps + 1)] == [0, *np.cumsum(rows)]
    assert rows == sorted(rows) and (rows[0] == first or over == 0)
    for step, n in enumerate(rows):
        seen = ramp.seen(step)
        assert n == (first + more * seen // over if seen < over else first + more)


def test_cosine_is_the_paper():
    config = OptimConfig(schedule="cosine", warmup=0.0, final=0.1, lr=1.0)
    for step in range(11):
        want = 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * step / 10))
        assert learning_rate(config, step, 10) == pytest.approx(want)
