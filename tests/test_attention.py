"""Laws of attention and positions: attention.py and kernels/attention.py."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

import kernels.attention as blocked
from attention import (
    Attention,
    causal_mask,
    document_mask,
    full_mask,
    prefix_mask,
    sliding,
)
from kernels.attention import Mask, attend, attend_obvious
from kernels.mask import visible
from model import ModelConfig
from positions import Rope

size = st.integers(1, 9)


@st.composite
def problems(draw):
    """q, k, v of any shape, strided or not, and any interval mask, empty ones included."""
    B, K, G, T, S, half = (draw(size) for _ in range(6))
    rng = np.random.default_rng(draw(seeds))
    D = 2 * half
    q, k, v = normals(int(rng.integers(2**31)), (B, T, K * G, D), (B, S, K, D), (B, S, K, D))
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
    batch = draw(st.sampled_from([1, B]))
    lo, hi = (torch.from_numpy(rng.integers(-2, S + 2, (batch, T))) for _ in range(2))
    return q, k, v, Mask(lo, hi), float(rng.uniform(0.1, 2)), draw(st.integers(1, 5))


@given(problems())
def test_attend_is_the_paper(problem):
    q, k, v, mask, scale, _ = problem
    lo, hi = (array(x.expand(len(q), -1)) for x in (mask.lo, mask.hi))
    want = reference.attend(*map(array, (q, k, v)), lo, hi, scale)
    assert_close(attend_obvious(q, k, v, mask, scale), want)
    assert_close(attend(q, k, v, mask, scale), want)


@given(problems())
def test_blocks_change_nothing(problem):
    """The blocked version equals the obvious one, gradients included, for any block size."""
    q, k, v, mask, scale, block = problem
    default, blocked.BLOCK = blocked.BLOCK, block
    try:
        results = []
        for function in (attend, attend_obvious):
            out = function(q, k, v, mask, scale)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    finally:
        blocked.BLOCK = default
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-11)


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v = normals(0, (1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    mask = Mask(torch.tensor([[0, 3, 7]]), torch.tensor([[4, 2, 9]]))
    out = attend(q, k, v, mask, 0.5)
    assert (out[:, :, 1:] == 0).all() and (out[:, :, 0] != 0).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[:, :, 1:] == 0).all()
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))


@given(st.integers(1, 200), st.integers(0, 70), seeds)
def test_long_rows_take_several_blocks(T, past, seed):
    q, k, v = normals(seed, (1, 2, T, 4), (1, 2, past + T, 4), (1, 2, past + T, 4))
    mask = causal_mask(T, past)
    assert_close(attend(q, k, v, mask, 0.5), attend_obvious(q, k, v, mask, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_torch_s_own(dtype):
    """Error against float64 at most twice that of torch's attention in the same dtype."""
    q, k, v = normals(1, (2, 4, 130, 32), (2, 2, 130, 32), (2, 2, 130, 32), dtype=dtype)
    (g,) = normals(2, (2, 4, 130, 32), dtype=dtype)

    def results(function, *tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, g.to(out.dtype))]

    def ours(q, k, v):
        return attend(q, k, v, causal_mask(130), 32**-0.5)

    def torch_s(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * 32**-0.5
        future = torch.ones(130, 130, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    exact = results(ours, *(x.double() for x in (q, k, v)))
    for got, low, want in zip(
        results(ours, q, k, v), results(torch_s, q, k, v), exact, strict=True
    ):
        allowed = 2 * (low.double() - want).abs().max() + 1e-5
        assert (got.double() - want).abs().max() <= allowed


@given(st.integers(1, 12), st.integers(0, 5))
def test_causal_mask_is_the_lower_triangle(T, past):
    assert (array(visible(causal_mask(T, past), past + T)[0, 0]) == np.tri(T, past + T, past)).all()


@given(seeds, st.integers(1, 12))
def test_document_mask_sees_its_own_document_and_no_other(seed, T):
    document = np.random.default_rng(seed).integers(0, 2, (3, T)).cumsum(1)
    starts = np.array([[int(np.argmax(row == d)) for d in row] for row in document])
    seen = array(visible(document_mask(torch.from_numpy(starts)), T))
    for b, t, s in np.ndindex(3, T, T):
        assert seen[b, 0, t, s] == (s <= t and document[b, s] == document[b, t])


@given(st.integers(1, 9), st.integers(0, 6), st.integers(1, 20))
def test_a_window_sees_what_is_nearer_than_its_width(T, past, window):
    """On either side, and inside what the mask allows; a wide one is full attention."""
    config, S = ModelConfig(attention="sliding", window=window), past + T
    place = past + torch.arange(T)[None]
    for mask in (causal_mask(T, past), full_mask(T, S)):
        before = array(visible(mask, S))
        seen = array(visible(sliding(replace(mask, at=place), S, config), S))
        for t, s in np.ndindex(T, S):
            near = abs(past + t - s) < window
            assert seen[0, 0, t, s] == (before[0, 0, t, s] and near)
        assert window < S or (seen == before).all()


@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_tokens_of_a_prefix_see_each_other(T, prefixes):
    seen = array(visible(prefix_mask(torch.tensor(prefixes), T), T))
    for b, t, s in np.ndindex(len(prefixes), T, T):
        assert seen[b, 0, t, s] == (s <= t or max(s, t) < prefixes[b])


@given(seeds, st.sampled_from([0.0, 0.7]), st.booleans(), st.booleans(), st.integers(1, 6))
def test_a_layer_is_the_paper(seed, scale, qk_norm, bias, T):
    """Heads of their own projections, of mean square 1 if wished, and the output's matrix."""
    config = ModelConfig(
        dim=8, heads=2, vocab_size=1, score_scale=scale, qk_norm=qk_norm, bias=bias
    )
    layer = Attention(config).double()
    for p, x in zip(
        layer.parameters(), normals(seed, *(p.shape for p in layer.parameters())), strict=True
    ):
        p.data.copy_(x.detach())
    (x,) = normals(seed, (1, T, 8))

    def linear(f, x):
        return x @ array(f.weight).T + (array(f.bias) if bias else 0)

    q, k, v = (linear(f, array(x)[0]) for f in (layer.query, layer.key, layer.value))
    q, k, v = (part.reshape(1, T, 2, 4).transpose(0, 2, 1, 3) for part in (q, k, v))
    if qk_norm:
        q, k = (part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6) for part in (q, k))
    hi = np.arange(T)[None]
    out = reference.attend(q, k, v, 0 * hi, hi, scale or 0.5)
    want = linear(layer.output, out.transpose(0, 2, 1, 3).reshape(T, 8))
    assert_close(layer(x, causal_mask(T))[0][0], want)


@given(seeds, st.integers(1, 8), st.integers(0, 8))
def test_a_layer_fed_in_two_parts_gives_the_same(seed, T, more):
    """Cached and uncached attention agree, with grouped heads and RoPE."""
    config = ModelConfig(dim=16, heads=4, kv_heads=2, vocab_size=1)
    torch.manual_seed(seed)
    layer = Attention(config).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    (x,) = normals(seed, (2, T + more, 16))
    places = torch.arange(T + more)[None]
    rotate = Rope(4, 100.0).rotation
    whole, _ = layer(x, causal_mask(T + more), rotate(places))
    parts = [rotate(places[:, :T]), rotate(places[:, T:])]
    first, past = layer(x[:, :T], causal_mask(T), parts[0])
    second, _ = layer(x[:, T:], causal_mask(more, T), parts[1], past)
    assert_close(torch.cat((first, second), 1), whole)


@pytest.mark.parametrize(
    "q, k, rows, named",
    [
        ((1, 3, 4, 8), (1, 2, 4, 8), (1, 4), "3 query heads"),
        ((1, 2, 4, 8), (1, 2, 4, 6), (1, 4), "k .* and v"),
        ((2, 2, 4, 8), (2, 2, 4, 8), (2, 3), "mask.lo"),
    ],
)
def test_shapes_that_do_not_fit_are_named(q, k, rows, named):
    mask = Mask(torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long))
    with pytest.raises(ValueError, match=named):
        attend(torch.zeros(q), torch.zeros(k), torch.zeros(k), mask, 1.0)
