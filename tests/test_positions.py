"""Laws of positions.py: each scheme is its paper's formula, and knows what it promises to know."""

import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from attention import causal_mask
from kernels.mask import dense
from model import ModelConfig
from positions import (
    POSITIONS,
    SCALINGS,
    Rope,
    Shaw,
    Sinusoidal,
    alibi_slopes,
    t5_bucket,
)

# --- added to what goes in ------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 5000))
def test_sinusoidal_is_the_paper(C, position):
    got = Sinusoidal().embed(torch.zeros(1, 1, C).double(), torch.tensor([[position]]))[0, 0]
    want = [
        (math.cos if i % 2 else math.sin)(position / 10_000 ** ((i - i % 2) / C)) for i in range(C)
    ]
    assert_close(got, np.array(want), 1e-6 * (position + 1))  # the angle is computed in fp32


@given(seeds, st.integers(1, 20))
def test_learned_is_a_row_of_a_table(seed, n):
    config = ModelConfig(dim=4, heads=1, context=20, position="learned")
    scheme = POSITIONS["learned"](config, True).double()
    (table, x) = normals(seed, (20, 4), (2, n, 4))
    scheme.table.data.copy_(table)
    positions = torch.from_numpy(np.random.default_rng(seed).integers(0, 20, (2, n)))
    got = array(scheme.embed(x, positions))
    for b, t in np.ndindex(2, n):
        assert_close(got[b, t], array(x)[b, t] + array(table)[positions[b, t]], 0)
    positions[1, n - 1] = 20
    with pytest.raises(ValueError, match="position 20 lies beyond the 20 learned positions"):
        scheme.embed(x, positions)


# --- turned into queries and keys -----------------------------------------------------------------

scalings = st.builds(
    ModelConfig,
    rope_scaling=st.sampled_from(sorted(SCALINGS.keys() - {"ntk"})),  # which has its own test
    rope_base=st.floats(10, 1e6),
    rope_factor=st.floats(1, 40),
    rope_context=st.integers(1, 20_000),
    rope_low=st.floats(0.1, 4),
    rope_high=st.floats(4.5, 50),
)


def scaled(config):
    """What the oracle makes of one frequency."""
    c = config
    return {
        "none": lambda theta: theta,
        "linear": lambda theta: theta / c.rope_factor,
        "llama3": lambda theta: reference.llama3(
            theta, c.rope_factor, c.rope_context, c.rope_low, c.rope_high
        ),
    }[c.rope_scaling]


@given(scalings, st.lists(st.floats(0.01, 60), min_size=9, max_size=9))
def test_scalings_are_their_formulas(config, turns):
    """For frequencies that turned so often in the context: rarely, often, and between."""
    theta = np.array(turns) * 2 * np.pi / config.rope_context
    got = SCALINGS[config.rope_scaling](torch.from_numpy(theta), config)
    assert_close(array(got) / theta, [scaled(config)(x) / x for x in theta])


@given(seeds, st.integers(1, 6), st.integers(0, 3000), scalings)
def test_rope_is_the_paper(seed, half, position, config):
    (x,) = normals(seed, (1, 1, 1, 2 * half))
    config = replace(config, dim=2 * half, heads=1)
    turn = POSITIONS["rope"](config, True).rotation(torch.tensor([[position]]))
    got = turn(x, x)[0][0, 0, 0]
    want = reference.rope(array(x[0, 0, 0]), position, config.rope_base, scaled(config))
    # the angle is computed in fp32, as in every checkpoint trained so far
    assert_close(got, want, 3e-7 * (position + 10))


@given(seeds, st.integers(2, 6), st.integers(0, 3000), st.floats(10, 1e6), st.floats(1, 40))
def test_ntk_is_a_larger_base(seed, half, position, base, factor):
    """base · factor^(D/(D−2)): the fastest angle stays, the slowest is divided by the factor."""
    D = 2 * half
    (x,) = normals(seed, (1, 1, 1, D))
    config = ModelConfig(dim=D, heads=1, rope_base=base, rope_factor=factor, rope_scaling="ntk")
    got = POSITIONS["rope"](config, True).rotation(torch.tensor([[position]]))(x, x)[0][0, 0, 0]
    want = reference.rope(array(x[0, 0, 0]), position, base * factor ** (D / (D - 2)))
    assert_close(got, want, 3e-7 * (position + 10))


@given(scalings, st.integers(1, 64))
def test_rotation_is_that_of_transformers_bit_for_bit(config, half):
    """Also 130,000 tokens into a text, where the last bit of a frequency is a different angle."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = replace(config, dim=2 * half, heads=1)
    rope = {
        "rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling,
        "rope_theta": config.rope_base,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_context,
        "low_freq_factor": config.rope_low,
        "high_freq_factor": config.rope_high,
    }
    theirs = llama.LlamaRotaryEmbedding(
        llama.LlamaConfig(hidden_size=2 * half, num_attention_heads=1, rope_parameters=rope)
    )
    positions = torch.tensor([[0, 1, 77, 8191, 8192, 50_000, 131_071]])
    angles = POSITIONS["rope"](config, True).angles(positions)
    cos, sin = theirs(torch.ones(1), positions)
    assert torch.equal(angles.cos(), cos[..., :half])
    assert torch.equal(angles.sin(), sin[..., :half])


@given(seeds, st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_rope_scores_depend_on_the_distance_only(seed, m, n, shift):
    q, k = normals(seed, (1, 1, 1, 8), (1, 1, 1, 8))

    def score(m, n):
        rope = Rope(8, 10_000.0)
        turned = [rope.rotation(torch.tensor([[p]]))(x, x)[0] for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(m, n), score(m + shift, n + shift), 1e-3)


@given(seeds, st.integers(1, 4), st.integers(0, 1000))
def test_interleaved_channels_are_the_same_rotation(seed, half, position):
    """The paper's pairs (2i, 2i + 1) are ours (i, i + D/2) in another order."""
    (x,) = normals(seed, (1, 1, 1, 2 * half))
    at = torch.tensor([[position]])
    order = torch.arange(2 * half).view(2, half).T.flatten()  # ours -> theirs: 0, h, 1, h + 1, …
    config = ModelConfig(dim=2 * half, heads=1, rope_base=100.0)
    ours, theirs = (
        POSITIONS["rope"](replace(config, rope_interleaved=how), True).rotation(at)(y, y)[how]
        for how, y in enumerate((x, x[..., order]))
    )
    assert_close(ours[..., order], theirs, 0)


# --- added to the scores --------------------------------------------------------------------------


def test_alibi_slopes_are_the_papers():
    """Section 3: 1/2, 1/4 … 1/256 for 8 heads; 1/√2, 1/2 … for 16. For others their code's rule."""
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert_close(alibi_slopes(16).double(), [2 ** (-h / 2) for h in range(1, 17)], 1e-7)
    assert_close(alibi_slopes(6).double(), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], 1e-7)
    for heads in range(1, 40):
        assert len(alibi_slopes(heads)) == heads


def at_places(T: int, past: int = 0):
    mask = causal_mask(T, past)
    return replace(mask, at=mask.hi)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 5))
def test_alibi_takes_slope_times_distance_from_the_scores(heads, T, past):
    config = ModelConfig(heads=heads, dim=2 * heads, position="alibi")
    mask = POSITIONS["alibi"](config, True).scored(at_places(T, past), T + past)
    added = array(dense(mask, T + past, torch.float64))
    for h, t, s in np.ndindex(heads, T, T + past):
        want = -float(alibi_slopes(heads)[h]) * (past + t - s) if s <= past + t else -np.inf
        assert added[0, h, t, s] == want


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (6, 9), (4, 4)])
def test_t5_s_buckets_are_those_of_transformers(causal, buckets, furthest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distance = torch.arange(-3 * furthest, 3 * furthest)
    theirs = t5._relative_position_bucket(distance, not causal, buckets, furthest)
    assert t5_bucket(distance, buckets, furthest, causal).tolist() == theirs.tolist()


@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.booleans())
def test_t5_adds_a_number_for_head_and_bucket(seed, heads, T, past, causal):
    config = ModelConfig(dim=heads, heads=heads, position="t5", buckets=6, reach=9)
    scheme = POSITIONS["t5"](config, causal).double()
    scheme.table.data.copy_(normals(seed, (6, heads))[0])
    bias = scheme.scored(at_places(T, past), T + past).bias
    for h, t, s in np.ndindex(heads, T, T + past):
        bucket = t5_bucket(torch.tensor(s - past - t), 6, 9, causal)
        assert bias[0, h, t, s] == scheme.table[bucket, h]


@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.floats(0.1, 2))
def test_shaw_adds_the_query_s_product_with_the_distance_s_key(seed, reach, T, past, scale):
    """Eq. 4: q·(k + a) · scale, a of the distance cut to −R … R."""
    scheme = Shaw(reach, 4).double()
    table, q = normals(seed, (2 * reach + 1, 4), (2, 3, T, 4))
    scheme.table.data.copy_(table)
    bias = array(scheme(q, at_places(T, past), T + past, scale).bias)
    for b, h, t, s in np.ndindex(2, 3, T, T + past):
        key = array(table)[max(-reach, min(reach, s - past - t)) + reach]
        assert_close(bias[b, h, t, s], scale * array(q)[b, h, t] @ key)
