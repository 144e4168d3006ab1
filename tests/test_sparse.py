"""Laws of sparse.py, and of layouts, slopes and biases taken block by block on a CPU."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, results, seeds
from hypothesis import given
from hypothesis import strategies as st

import kernels.attention as blocked
from attention import full
from kernels.attention import attend, attend_obvious
from kernels.mask import Mask, visible
from model import ModelConfig
from run import UserError
from sparse import COLORS, PATTERNS, Settings, bigbird, kinds, longformer, measure, reach, show

size = st.integers(1, 4)
names = st.sampled_from(sorted(PATTERNS))
configs = st.builds(
    SimpleNamespace,
    window=st.integers(1, 80),
    block=st.sampled_from([16, 32]),
    global_blocks=st.integers(0, 2),
    random_blocks=st.integers(0, 3),
)


def causal(T: int, past: int = 0) -> Mask:
    at = torch.arange(past, past + T)[None]
    return Mask(torch.zeros_like(at), at, at=at)


def seen_by(pattern: str, mask: Mask, S: int, config) -> np.ndarray:
    """Who sees whom: (T S)."""
    return array(visible(PATTERNS[pattern](mask, S, config), S)[0, 0])


def both_ways(T: int) -> Mask:
    """Everybody sees everybody, so that the pattern alone is left."""
    return replace(causal(T), hi=torch.full((1, T), T - 1))


# --- patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("near", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["strided", "fixed", "longformer"])
def test_patterns_are_the_sets_of_the_papers(name, near, special):
    """Block by block, and the same for all tokens of a block; the last block is not full."""
    n, block = 13, 16
    for window in (near * block - 15, near * block):
        config = SimpleNamespace(window=window, block=block, global_blocks=special)
        sets = [reference.blocks_seen(name, i, n, near, special) for i in range(n)]
        blocks = [[j in seen for j in range(n)] for seen in sets]
        want = np.kron(blocks, np.ones((block, block)))[: n * block - 5, : n * block - 5]
        assert (seen_by(name, both_ways(len(want)), len(want), config) == want).all()


@given(configs, st.integers(1, 40))
def test_bigbird_is_longformer_and_random_pairs(config, n):
    """Each block draws as many earlier ones as it should, nothing else; no pair has a direction."""
    i = torch.arange(n)
    base, all_ = (f(i[:, None], i, config) for f in (longformer, bigbird))
    assert (all_ | ~base).all() and torch.equal(all_, all_.T)
    drawn = (all_ & ~base).tril().sum(1)
    free = (~base).tril().sum(1)
    assert torch.equal(drawn, free.clamp(max=config.random_blocks))


def test_random_blocks_are_uniform():
    """Each earlier block that is free to be drawn is drawn equally often: χ² over many blocks."""
    config = SimpleNamespace(window=1, block=16, global_blocks=1, random_blocks=2)
    i = torch.arange(600)
    drawn = (bigbird(i[:, None], i, config) & ~longformer(i[:, None], i, config)).tril()
    where = [(j - 1) / (i - 2) for i, j in drawn.nonzero().tolist() if i > 100]
    counts, _ = np.histogram(where, 10, (0, 1))
    assert (
        (counts - len(where) / 10) ** 2 / (len(where) / 10)
    ).sum() < 27.9  # 9 degrees, p = 0.001


@given(names, configs, st.integers(1, 300))
def test_every_token_nearer_than_the_window_is_seen(name, config, T):
    """So a block-sparse kind never sees less than `sliding` with the same window, but for `fixed`,
    which cuts the text into spans."""
    t = np.arange(T)
    near = np.abs(t[:, None] - t) < config.window
    if name == "fixed":
        span = reach(config) * config.block
        near &= t[:, None] // span == t // span
    assert (seen_by(name, both_ways(T), T, config) | ~near).all()


@pytest.mark.parametrize("name", sorted(PATTERNS))
@pytest.mark.parametrize("window", [1, 16, 40])
def test_the_pattern_does_not_depend_on_the_length(name, window):
    config = SimpleNamespace(window=window, block=16, global_blocks=1, random_blocks=2)
    whole = seen_by(name, both_ways(500), 500, config)
    for T in (1, 16, 17, 100, 250, 499):
        assert (seen_by(name, both_ways(T), T, config) == whole[:T, :T]).all()


# --- cached decoding ------------------------------------------------------------------------------


@given(names, configs, st.integers(2, 150), seeds)
def test_a_text_behind_a_past_sees_the_rows_of_the_whole(name, config, T, seed):
    """A prompt, another behind it wherever that begins, and single tokens; and with keys that do
    not exist yet, as a GPU's cache shows them."""
    rng = np.random.default_rng(seed)
    whole = seen_by(name, causal(T), T, config)
    first, second = sorted(rng.integers(1, T, 2))
    parts = [(0, first), (first, second), *((t, t + 1) for t in range(second, T))]
    for start, stop in parts:
        if start < stop:
            for S in (stop, T + 40):
                rows = seen_by(name, causal(stop - start, start), S, config)
                assert (rows[:, :stop] == whole[start:stop, :stop]).all()
                assert not rows[:, stop:].any()


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_wherever_a_part_begins_and_ends_it_sees_the_rows_of_the_whole(name):
    """Also where it begins in a block and ends with the first token of the next."""
    config = SimpleNamespace(window=20, block=16, global_blocks=1, random_blocks=1)
    whole = seen_by(name, causal(80), 80, config)
    for start in (0, 1, 15, 16, 17, 31):
        for stop in range(start + 1, 81):
            rows = seen_by(name, causal(stop - start, start), stop, config)
            assert (rows == whole[start:stop, :stop]).all(), (start, stop)


@given(names, configs, st.integers(2, 100), seeds)
def test_cached_attention_equals_the_whole(name, config, T, seed):
    q, k, v = (x.detach() for x in normals(seed, (1, 4, T, 6), *[(1, 2, T, 6)] * 2))
    narrow, first = PATTERNS[name], int(np.random.default_rng(seed).integers(1, T))
    want = attend_obvious(q, k, v, narrow(causal(T), T, config), 0.4)
    with torch.no_grad():
        got = [
            full(q[:, :, a:b], k[:, :, :b], v[:, :, :b], narrow(causal(b - a, a), b, config), 0.4)
            for a, b in [(0, first), (first, T), *((t, t + 1) for t in range(max(0, T - 3), T))]
        ]
    assert_close(torch.cat(got[:2], 2), want)
    assert_close(torch.cat(got[2:], 2), want[:, :, -len(got[2:]) :])


# --- attention ------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """q, k, v, a bias or none, and a mask with any interval, layout for each head, slopes."""
    B, K, G, half = draw(size), draw(size), draw(size), draw(size)
    T, S, block = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 17))
    seed = draw(seeds)
    rng, stream = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    H, D = K * G, 2 * half
    q, k, v = normals(seed, (B, H, T, D), (B, K, S, D), (B, K, S, D))
    rows = draw(st.sampled_from([1, B]))
    lo, hi = (torch.from_numpy(rng.integers(-2, S + 2, (rows, T))) for _ in range(2))
    mask = (
        Mask(torch.minimum(lo, hi), torch.maximum(lo, hi)) if rng.random() < 0.7 else Mask(lo, hi)
    )
    if draw(st.booleans()):
        shape = draw(st.sampled_from([1, H])), -(-T // block), -(-S // block)
        layout = torch.rand(shape, generator=stream) < rng.random()
        mask = replace(mask, layout=layout, block=block)
    if draw(st.booleans()):
        at = torch.from_numpy(rng.integers(0, S, (draw(st.sampled_from([1, B])), T)))
        mask = replace(mask, slopes=torch.rand(H, generator=stream), at=at)
    bias = None
    if draw(st.booleans()):
        shape = draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), T, S
        (bias,) = normals(seed, shape)
        never = torch.rand(shape, generator=stream) < 0.2
        bias = bias.detach().masked_fill(never, -torch.inf).requires_grad_()
    return [q, k, v, bias], mask, float(rng.uniform(0.1, 2)), draw(st.integers(1, 20))


@given(problems())
def test_blocks_change_nothing_whatever_the_mask(problem):
    """Layouts, slopes and biases, the gradient of the bias too, for any block size."""
    inputs, mask, scale, block = problem

    def through(function):
        return lambda q, k, v, bias: function(q, k, v, replace(mask, bias=bias), scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK", block)
        got = results(through(attend), inputs)
    for one, want in zip(got, results(through(attend_obvious), inputs), strict=True):
        assert_close(one, want, 1e-11)


@given(names, configs, st.integers(1, 200), seeds, st.booleans())
def test_sparse_attention_is_full_attention_with_its_mask(name, config, T, seed, documents):
    """Values and gradients; the mask written out as numbers to add; documents stay apart."""
    q, k, v = normals(seed, (2, 2, T, 4), *[(2, 1, T, 4)] * 2)
    mask = causal(T)
    if documents:
        breaks = torch.rand((2, T), generator=torch.Generator().manual_seed(seed)) < 0.05
        starts = torch.where(breaks, mask.at, 0).cummax(1).values
        mask = Mask(starts, mask.hi.expand(2, T), at=mask.at)
    narrow = PATTERNS[name](mask, T, config)
    seen = visible(mask, T) & visible(replace(narrow, lo=0 * mask.at, hi=0 * mask.at + T), T)
    out_in_full = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    everything = both_ways(T)
    got = results(lambda q, k, v: attend(q, k, v, narrow, 0.5), [q, k, v])
    want = results(
        lambda q, k, v: attend_obvious(q, k, v, replace(everything, bias=out_in_full), 0.5),
        [q, k, v],
    )
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, 1e-11)


@given(names, configs, st.integers(2, 200), seeds)
def test_a_later_token_changes_no_bit(name, config, T, seed):
    q, k, v = (x.detach() for x in normals(seed, *[(1, 2, T, 8)] * 3, dtype=torch.float32))
    mask, t = PATTERNS[name](causal(T), T, config), int(np.random.default_rng(seed).integers(1, T))
    before = attend(q, k, v, mask, 0.5)
    for x in (q, k, v):
        x[:, :, t] += 100
    after = attend(q, k, v, mask, 0.5)
    assert torch.equal(before[:, :, :t], after[:, :, :t])
    assert not torch.equal(before[:, :, t], after[:, :, t])


@given(names, configs, st.integers(100, 300), seeds)
def test_empty_blocks_are_not_even_looked_at(name, config, T, seed):
    """The scores computed, forward and again backward, are those of keys that someone sees."""
    q, k, v = normals(seed, *[(1, 1, T, 4)] * 3)
    mask, computed = PATTERNS[name](causal(T), T, config), []
    inner = blocked.block_weights

    def counted(q, k, *rest):
        computed.append(q.shape[2] * k.shape[2])
        return inner(q, k, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "block_weights", counted)
        patch.setattr(blocked, "BLOCK", config.block)
        attend(q, k, v, mask, 0.5).sum().backward()
    tiles = visible(mask, T)[0, 0].split(config.block)
    assert sum(computed) == 2 * sum(len(tile) * int(tile.any(0).sum()) for tile in tiles)


def test_the_costs_are_those_of_the_kinds_that_they_are_said_to_be_of():
    q, k, v = (x.detach() for x in normals(0, *[(1, 2, 100, 8)] * 3))
    config = Settings(heads=2, head_dim=8, window=10, block=16, features=4)
    out = {name: function(q, k, v) for name, function in kinds(100, config).items()}
    exact = {"full, obvious": causal(100), "full": causal(100), "SDPA of torch": causal(100)}
    exact["sliding"] = replace(causal(100), lo=causal(100).at - 9)
    exact["strided"] = PATTERNS["strided"](causal(100), 100, replace(config, window=32))
    exact["bigbird"] = PATTERNS["bigbird"](causal(100), 100, config)
    assert {*out} == {*exact, "performer"} == {*COLORS}
    for name, mask in exact.items():
        assert_close(out[name], attend_obvious(q, k, v, mask, 8**-0.5))


def test_a_text_shorter_than_a_block_has_costs_and_unknown_memory_is_left_out(monkeypatch, capsys):
    """Outside Linux no memory is known."""
    few = Settings(heads=1, head_dim=4, features=4, shortest=8, longest=16, rounds=1)
    show(measure(few))
    monkeypatch.setattr("sparse.resident", lambda what: 0)
    capsys.readouterr()
    show(measure(few))
    *_, said = capsys.readouterr().out.splitlines()
    assert said.strip().startswith("SDPA of torch  time") and "memory" not in said


# --- what it cannot do ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Settings, ModelConfig])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"block": 8}, "block 8 must be a power of 2"),
        ({"block": 48}, "block 48 must be a power of 2"),
        ({"window": 0}, "window.* at least 1"),
        ({"features": 0}, "features"),
        ({"random_blocks": -1}, "random-blocks"),
    ],
)
def test_bad_settings_get_one_sentence(kind, change, words):
    with pytest.raises(UserError, match=words):
        kind(**change)


def test_all_samples_must_stand_at_the_same_places():
    at = torch.arange(5).expand(2, 5)
    with pytest.raises(ValueError, match=r"mask.at \(2, 5\) must be \(1 T\)"):
        PATTERNS["bigbird"](Mask(0 * at, at, at=at), 5, Settings())
