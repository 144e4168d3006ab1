"""Laws of performer.py: unbiased features, one function however it is summed, no look ahead."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

import performer as file
from kernels.mask import Mask
from performer import (
    Performer,
    Running,
    causal,
    causal_fused,
    directions,
    key_exponents,
    nothing,
    performer_obvious,
    whole_documents,
)

FORMS = ["causal", "documents", "padded", "bidirectional", "past"]
size = st.integers(1, 4)


def interval(form: str, rng: np.random.Generator, B: int, T: int, P: int) -> Mask:
    """A mask that a Performer can do, for T queries behind P keys."""
    t = torch.arange(P, P + T)[None].expand(B, T)
    pads = torch.from_numpy(rng.integers(0, P + T, (B, 1))).expand(B, T)
    breaks = torch.from_numpy(rng.random((B, T)) < 0.2)
    starts = torch.where(breaks, t, 0).cummax(1).values
    if form == "bidirectional":
        lengths = torch.from_numpy(rng.integers(0, P + T + 1, (B, 1))).expand(B, T)
        return Mask(0 * t, lengths - 1, at=t)
    return Mask({"documents": starts, "padded": pads, "past": starts}.get(form, 0 * t), t, at=t)


@st.composite
def problems(draw):
    """w, q, k, v in float64 and a mask; also a chunk and a segment, small enough to be several."""
    B, K, G, D, M = draw(size), draw(size), draw(size), draw(st.integers(1, 5)), draw(size) * 3
    T, form, rng = draw(st.integers(1, 20)), draw(st.sampled_from(FORMS)), draw(seeds)
    rng = np.random.default_rng(rng)
    P = int(rng.integers(0, 12)) if form in ("past", "bidirectional") else 0
    w, q, k, v = normals(
        int(rng.integers(2**31)), (M, D), (B, K * G, T, D), (B, K, P + T, D), (B, K, P + T, D)
    )
    mask = interval(form, rng, draw(st.sampled_from([1, B])), T, P)
    chunk = draw(st.integers(1, 7))
    return w.detach(), q, k, v, mask, float(rng.uniform(0.1, 2)), chunk, chunk * draw(size)


def attended(w, q, k, v, mask, scale):
    """What a Performer with these directions gives."""
    layer = Performer(SimpleNamespace(features=1, head_dim=1))
    layer.directions = w
    return layer(q, k, v, whole_documents(mask, k.shape[2], None), scale)


@contextmanager
def in_pieces(chunk: int, segment: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "CHUNK", chunk)
        patch.setattr(file, "SEGMENT", segment)
        yield


# --- one function, however it is summed -----------------------------------------------------------


@given(problems())
def test_it_is_the_sum_over_keys_and_features(problem):
    w, q, k, v, mask, scale, chunk, segment = problem
    lo, hi = (array(x.expand(len(q), -1)) for x in (mask.lo, mask.hi))
    want = reference.performer(*map(array, (q, k, v)), lo, hi, array(w), scale)
    assert_close(performer_obvious(w, q, k, v, mask, scale), want)
    with in_pieces(chunk, segment):
        assert_close(attended(w, q, k, v, mask, scale), want)


@given(problems())
def test_gradients_are_those_of_the_quadratic_form(problem):
    w, q, k, v, mask, scale, chunk, segment = problem
    results = []
    with in_pieces(chunk, segment):
        for function in (attended, performer_obvious):
            out = function(w, q, k, v, mask, scale)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 1e-11)


@given(seeds, st.integers(2, 40), st.sampled_from(["causal", "padded", "documents"]))
def test_cached_decoding_gives_the_rows_of_the_whole(seed, T, form):
    """The first part at once, then token by token: each with all keys, also those not yet written,
    as a GPU's cache has them."""
    rng = np.random.default_rng(seed)
    w, q, k, v = (x.detach() for x in normals(seed, (6, 3), *[(2, 2, T, 3)] * 3))
    mask, first = interval(form, rng, 2, T, 0), int(rng.integers(1, T))
    parts = [(0, first), *((t, t + 1) for t in range(first, T))]
    got = []
    for start, stop in parts:
        shown = [x.clone() for x in (k, v)]
        for x in shown:
            x[:, :, stop:] = 1e3  # not yet written
        rows = slice(start, stop)
        part = Mask(mask.lo[:, rows], mask.hi[:, rows], at=mask.at[:, rows])
        got.append(attended(w, q[:, :, rows], *shown, part, 0.5))
    assert_close(torch.cat(got, 2), attended(w, q, k, v, mask, 0.5))


@given(seeds, st.integers(1, 60), st.integers(1, 60))
def test_a_text_can_go_on_from_its_state(seed, T, more):
    """Instead of keys and values a cache may hold the running sums."""
    w, q, k, v = (
        x.detach()
        for x in normals(seed, (6, 3), (2, 2, 2, T + more, 3), *[(2, 2, T + more, 3)] * 2)
    )
    starts = torch.zeros(1, T + more, dtype=torch.long)
    whole, end = causal(w, q, k, v, starts, 0, nothing(k, w))
    out, state = causal(
        w, q[:, :, :, :T], k[:, :, :T], v[:, :, :T], starts[:, :T], 0, nothing(k, w)
    )
    rest, state = causal(w, q[:, :, :, T:], k[:, :, T:], v[:, :, T:], starts[:, T:], T, state)
    assert_close(torch.cat((out, rest), 3), whole)
    assert_close(state.sums, end.sums)


@pytest.mark.parametrize("whole", [False, True])
@given(seeds, st.integers(2, 60), st.sampled_from(["causal", "padded"]))
def test_so_it_can_where_only_the_sums_are_kept(whole, seed, T, form):
    """In parts of any size, causal or each seen whole, texts with pads; what a cache held before
    its first token does not matter."""
    rng = np.random.default_rng(seed)
    w, q, k, v = (x.detach() for x in normals(seed, (6, 3), (2, 4, T, 3), *[(2, 2, T, 3)] * 2))
    mask, cuts = interval(form, rng, 2, T, 0), sorted({0, T, *rng.integers(1, T, 4).tolist()})
    ends = torch.tensor([stop - 1 for start, stop in pairwise(cuts) for _ in range(start, stop)])
    hi = ends.expand(2, T) if whole else mask.hi
    want = performer_obvious(w, q, k, v, replace(mask, hi=hi), 0.5)
    layer, state = Performer(SimpleNamespace(features=1, head_dim=1)), torch.full((2, 2, 6, 5), 3.0)
    layer.directions, state = w, state.double()
    for start, stop in pairwise(cuts):
        rows = slice(start, stop)
        part = Mask(mask.lo[:, rows], hi[:, rows], at=mask.at[:1, rows])
        past = Running(state, mask.at[0, rows], stop)
        shown = past.append(k[:, :, rows], v[:, :, rows])
        seen = whole_documents(part, past.places(stop - start)[1], None)
        out = past.attend(layer, q[:, :, rows], *shown, seen, 0.5)
        assert_close(out, want[:, :, rows])


@given(seeds, st.integers(1, 300), st.integers(1, 3), st.booleans())
def test_the_way_of_the_gpu_is_the_same_for_ordinary_norms(seed, T, G, documents):
    """In fp32, as there; that Triton computes what torch does has tests of its own."""
    rng = np.random.default_rng(seed)
    w = directions(64, 32, torch.Generator().manual_seed(seed)).float()
    shapes = (2, 2, G, T, 32), (2, 2, T, 32), (2, 2, T, 32)
    q, k, v = normals(seed, *shapes, dtype=torch.float32)
    x, y = (part * 32**-0.25 for part in (q, k))
    starts = interval("documents" if documents else "causal", rng, 2, T, 0).lo
    results = []
    for out in (causal_fused(w, x, y, v, starts), causal(w, x, y, v, starts, 0, nothing(k, w))[0]):
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v), retain_graph=True)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want, 3e-5 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("apart", [0, 280])
def test_the_way_of_the_gpu_has_room_above_and_below(apart):
    """A key that is a direction has the largest weight there is; one 290 from it still has some."""
    w, q, v = (
        x.detach()
        for x in normals(0, (1, 8), (1, 1, 1, 300, 8), (1, 1, 300, 8), dtype=torch.float32)
    )
    y = w + apart**0.5 * torch.eye(8)[0]
    out = causal_fused(w, q, y.expand(1, 1, 300, 8), v, torch.zeros(1, 300, dtype=torch.long))
    assert_close(out[0, 0, 0], v[0, 0].cumsum(0) / torch.arange(1, 301)[:, None], 1e-5)


# --- nobody looks ahead, whatever the norms -------------------------------------------------------


@given(seeds, st.integers(2, 600), st.sampled_from(["causal", "documents"]), st.floats(0.1, 300))
def test_a_later_token_changes_no_bit(seed, T, form, norm):
    """The changed token's key becomes short, so that it outweighs all others if these are long."""
    rng = np.random.default_rng(seed)
    w = directions(16, 8, torch.Generator().manual_seed(seed)).float()
    q, k, v = (x.detach() for x in normals(seed, *[(2, 2, T, 8)] * 3, dtype=torch.float32))
    mask, t = interval(form, rng, 2, T, 0), int(rng.integers(1, T))
    before = attended(w, q * norm, k * norm, v, mask, 0.5)
    for x in (q, k, v):
        x[:, :, t] *= -0.01
    after = attended(w, q * norm, k * norm, v, mask, 0.5)
    assert torch.equal(before[:, :, :t], after[:, :, :t])
    assert not torch.equal(before[:, :, t:], after[:, :, t:])


@given(seeds, st.integers(2, 100), st.sampled_from(FORMS), st.floats(0, 12), st.floats(0, 12))
def test_no_norm_is_too_large_for_fp32(seed, T, form, first, second):
    """Norms from 1 to e¹², growing or shrinking along the text: finite, and the weights still sum
    to 1: a token that sees any key gets the value that all keys have."""
    rng = np.random.default_rng(seed)
    w = directions(16, 8, torch.Generator().manual_seed(seed)).float()
    P = 5 if form == "past" else 0
    q, k, v = normals(seed, (2, 2, T, 8), *[(2, 2, P + T, 8)] * 2, dtype=torch.float32)
    grows = torch.linspace(first, second, P + T).exp()[:, None]
    mask = interval(form, rng, 2, T, P)
    out = attended(w, q * grows[P:], k * grows, v, mask, 0.5)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *grads))
    sees = (mask.lo <= mask.hi)[:, None, :, None]
    ones = attended(w, q * grows[P:], k * grows, torch.ones_like(v), mask, 0.5)
    assert_close(ones, sees.float().expand_as(ones), 1e-5)
    wide = [x.detach().double() for x in (w, q, k, v)]
    wide[1:3] = wide[1] * grows[P:].double(), wide[2] * grows.double()
    exact = performer_obvious(*wide, mask, 0.5)
    if max(first, second) < 4:  # beyond, fp32 has no digits left behind the point of an exponent
        assert_close(out, exact, 0.02)


# --- features -------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9), st.integers(1, 40))
def test_directions_are_orthogonal_within_each_block(seed, D, M):
    w = directions(M, D, torch.Generator().manual_seed(seed))
    assert w.shape == (M, D)
    for block in w.split(D):
        gram = block @ block.T
        assert_close(gram, gram.diagonal().diag(), 1e-12 * max(1, float(gram.max())))


def kernel_estimates(M, draws, stream, independent=False):
    """exp(x·y) as M features see it, for one pair x, y: (draws), and the truth."""
    D = 8
    x, y = (torch.linspace(*ends, D, dtype=torch.float64) for ends in ((-0.3, 0.4), (-0.1, 0.3)))
    found = []
    for _ in range(draws):
        if independent:
            w = torch.randn(M, D, generator=stream, dtype=torch.float64)
        else:
            w = directions(M, D, stream)
        found.append((key_exponents(x, w) + key_exponents(y, w)).exp().mean())
    return torch.stack(found), (x @ y).exp()


def test_features_are_unbiased():
    found, truth = kernel_estimates(8, 3000, torch.Generator().manual_seed(0))
    assert abs(found.mean() - truth) < 4 * found.std() / len(found) ** 0.5


def test_orthogonal_features_are_less_spread_out_than_independent_ones():
    """Theorem 2 of the paper."""
    stream = torch.Generator().manual_seed(1)
    ours, truth = kernel_estimates(8, 2000, stream)
    theirs, _ = kernel_estimates(8, 2000, stream, independent=True)
    assert ((ours - truth) ** 2).mean() < 0.9 * ((theirs - truth) ** 2).mean()


def test_directions_have_the_lengths_and_the_axes_of_normal_vectors():
    """|w|² has mean D and variance 2D; each coordinate mean 0 and variance 1."""
    D, stream = 6, torch.Generator().manual_seed(2)
    w = torch.cat([directions(D, D, stream) for _ in range(2000)])
    lengths = w.square().sum(1)
    assert abs(lengths.mean() - D) < 5 * (2 * D / len(w)) ** 0.5
    assert abs(lengths.var() / (2 * D) - 1) < 0.15
    assert (w.mean(0).abs() < 5 / len(w) ** 0.5).all()
    assert ((w.var(0) - 1).abs() < 0.1).all()


def test_the_error_falls_as_one_over_the_square_root_of_the_features():
    """Slope of log error over log M, of the kernel and of attention's output: −1/2 ± 0.1."""
    sizes, stream = (16, 64, 256), torch.Generator().manual_seed(3)
    q, k, v = (x.detach() for x in normals(0, *[(1, 1, 24, 8)] * 3))
    t = torch.arange(24)[None]
    mask = Mask(0 * t, t, at=t)
    exact = torch.from_numpy(reference.attend(*map(array, (q, k, v)), array(0 * t), array(t), 0.02))
    errors = []
    for M in sizes:
        found, truth = kernel_estimates(M, 300, stream)
        of_kernel = ((found - truth) ** 2).mean() ** 0.5
        outs = [performer_obvious(directions(M, 8, stream), q, k, v, mask, 0.02) for _ in range(60)]
        of_output = torch.stack([(out - exact).square().mean() for out in outs]).mean() ** 0.5
        errors.append((of_kernel.item(), of_output.item()))
    slopes = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert (np.abs(slopes + 0.5) < 0.1).all(), slopes


def test_every_layer_and_process_draws_the_same_directions():
    """A model that is built without memory, too; so no file needs to hold them."""
    config = SimpleNamespace(features=20, head_dim=8)
    one, other = Performer(config), Performer(config)
    with torch.device("meta"):
        third = Performer(config)
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(one.directions, third.directions) and not one.state_dict()


# --- what it cannot do ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["window", "pairs", "prefix", "future", "shifted", "beyond", "other keys"]
)
def test_other_intervals_are_refused(what):
    t = torch.arange(6)[None]
    lo, hi = {
        "window": (t - 2, t),
        "pairs": (t - 1, t),
        "prefix": (0 * t, t.clamp(min=3)),
        "future": (t, torch.full_like(t, 5)),
        "shifted": (0 * t, t - 1),
        "beyond": (0 * t, t + 1),
        "other keys": (torch.tensor([[0, 0, 0, 3, 3, 3]]), torch.tensor([[2, 2, 2, 5, 5, 5]])),
    }[what]
    with pytest.raises(ValueError, match=r"^performer: tokens must see"):
        whole_documents(Mask(lo, hi, at=t), 6, None)


@pytest.mark.parametrize("field", ["slopes", "bias", "layout"])
def test_what_is_added_to_scores_is_refused(field):
    t, x = torch.arange(4)[None], torch.zeros(1, 1, 4, 8)
    extra = {
        "slopes": torch.ones(1),
        "bias": torch.zeros(1, 1, 4, 4),
        "layout": torch.ones(1, 1, 1, dtype=torch.bool),
    }
    mask = replace(Mask(0 * t, t, at=t), **{field: extra[field]})
    with pytest.raises(ValueError, match=r"^performer: nothing can be added"):
        Performer(SimpleNamespace(features=8, head_dim=8))(x, x, x, mask, 1.0)


def test_low_precision_in_and_out():
    t, config = torch.arange(30)[None], SimpleNamespace(features=16, head_dim=8)
    x = normals(0, *[(1, 2, 30, 8)] * 3, dtype=torch.bfloat16)
    mask = Mask(0 * t, t, at=t)
    out = Performer(config)(*x, mask, 0.3)
    assert out.dtype == torch.bfloat16
    assert_close(out, Performer(config)(*(y.double() for y in x), mask, 0.3), 0.01)
