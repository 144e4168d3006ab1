"""Grids: the nearest of the numbers that there are, 0 among them, in exactly as many bits."""

import pytest
import torch
from helpers import assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from grids import (
    NF4,
    NF4_BLOCK,
    SCALE_BLOCK,
    Grid,
    absmax,
    beside,
    double_quantize,
    nf4,
    of_rows,
    pack,
    spread,
    unpack,
    zero_point,
)  # fmt: skip
from kernels.int4 import dequantize_int4, pack_int4, quantize_int4_obvious
from kernels.int8 import quantize_columns_obvious, quantize_rows_obvious
from run import UserError

PUBLISHED = [  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip

uniform = st.sampled_from([absmax, zero_point])
bits = st.integers(2, 8)
sizes = st.integers(1, 9)
pers = st.sampled_from(["tensor", "row", "column", "group"])
kinds = st.sampled_from([torch.float64, torch.float32, torch.float16])


def drawn(seed: int, N: int, K: int, dtype=torch.float64) -> torch.Tensor:
    """Rows of very different sizes and means, with zeros among them."""
    W, size, mean, gone = (x.detach() for x in normals(seed, (N, K), (N, 1), (N, 1), (N, K)))
    return ((W + mean) * 10 ** (size / 2) * (gone > -1)).to(dtype)


def fits(fit, W, b, per, g, dtype=torch.float64) -> Grid:
    """`group`: g features of each row share a step."""
    return fit(W, b, g if per == "group" else per, dtype)


# --- uniform grids --------------------------------------------------------------------------------


@given(uniform, bits, pers, sizes, sizes, sizes, seeds, kinds)
def test_every_weight_is_within_half_a_step_and_no_step_is_wasted(fit, b, per, N, G, g, seed, kind):
    W = drawn(seed, N, G * g)
    grid = fits(fit, W, b, per, g, kind)
    codes = grid.codes(W)
    assert grid.low <= codes.min() and codes.max() <= grid.high <= grid.low + 2**b - 1
    assert grid.scale.dtype == kind and codes.dtype == grid.zero.dtype
    s = spread(grid.scale, grid.group).double()
    assert ((W - grid.values(codes, torch.float64)).abs() <= s * (0.5 + 1e-13)).all()
    assert not grid.values(grid.codes(0 * W)).any(), "0 is not 0 any more"
    if per == "row" and kind != torch.float16:
        low, high = (end.int() for end in codes.aminmax(dim=1))
        used = torch.maximum(-low, high) if fit is absmax else high.clamp(min=grid.zero[:, 0]) - low
        alive = (W != 0).any(1)
        assert (used[alive] >= grid.high - (fit is zero_point)).all()


@given(uniform, bits, pers, sizes, sizes, sizes, seeds)
def test_a_code_is_the_nearest_even_where_the_grid_ends(fit, b, per, N, G, g, seed):
    W = drawn(seed, N, G * g)
    grid = fits(fit, W, b, per, g)
    far = 2 * W
    every = torch.arange(grid.low, grid.high + 1)[:, None, None].expand(-1, N, G * g)
    values = torch.stack([grid.values(code, torch.float64) for code in every])
    error = (far - grid.values(grid.codes(far), torch.float64)).abs()
    assert_close(error, (far - values).abs().amin(0), 1e-13)


def test_halves_go_to_even_numbers():
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8), -127, 127, 7)
    halves = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 300.0]])
    assert grid.codes(halves).tolist() == [[-2, -2, 0, 0, 2, 2, 127]]


@given(uniform, bits, sizes, sizes, sizes, seeds)
def test_who_shares_a_step(fit, b, N, G, g, seed):
    """Tensor, columns and groups are the rows of another matrix."""
    W = drawn(seed, N, G * g)
    for per, rows, back in (
        ("tensor", W.view(1, -1), lambda x: x.view(N, G * g)),
        ("column", W.T, lambda x: x.T),
        (g, W.view(N * G, g), lambda x: x.view(N, G * g)),
    ):
        got, want = fit(W, b, per), fit(rows, b, "row")
        assert torch.equal(got.codes(W), back(want.codes(rows)))
        assert torch.equal(got.values(got.codes(W)), back(want.values(want.codes(rows))))


@given(st.sampled_from([absmax, zero_point, nf4]), pers, sizes, sizes, sizes, seeds)
def test_parts_of_a_grid(fit, per, N, G, g, seed):
    W = drawn(seed, N, G * g)
    grid = nf4(W, g) if fit is nf4 else fits(fit, W, 3, per, g)
    codes = grid.codes(W)
    values = grid.values(codes)
    for k in range(G * g):
        one = grid.at(k)
        assert torch.equal(one.codes(W[:, k, None]), codes[:, k, None])
        assert torch.equal(one.values(codes[:, k, None]), values[:, k, None])
    some = of_rows(grid, slice(N // 2, N))
    assert torch.equal(some.codes(W[N // 2 :]), codes[N // 2 :])
    if fit is nf4 or per == "group":
        parts = [W[:, i : i + g] for i in range(0, G * g, g)]
        whole = beside([nf4(x, g) if fit is nf4 else fits(fit, x, 3, per, g) for x in parts])
        assert torch.equal(whole.codes(W), codes) and whole.group == grid.group


@given(bits, pers, st.sampled_from([0.0, 1e-44, 1e-30, 1e30]), seeds)
def test_rows_of_zeros_and_of_extreme_numbers(b, per, size, seed):
    W = drawn(seed, 4, 6, torch.float32)
    W[:2] = size * torch.ones(6)
    W[1, ::2] *= -1
    for grid in (
        *(fits(fit, W, b, per, 3, torch.float32) for fit in (absmax, zero_point)),
        nf4(W, 3),
    ):
        back = grid.values(grid.codes(W))
        assert back.isfinite().all() and grid.scale.isfinite().all()
        if not size and per in ("row", "group"):
            assert not back[:2].any() and not grid.scale[:2].any()
            assert not isinstance(grid, Grid) or not grid.codes(W)[:2].any()


@given(bits, sizes, seeds)
def test_weights_on_one_side_of_0_have_it_beside_them(b, N, seed):
    """0 is the first code of those above it, and the last of those below."""
    W = drawn(seed, N, 5).abs() + 0.1
    assert not zero_point(W, b).zero.any()
    assert (zero_point(-W, b).zero == 2**b - 1).all()


@given(bits, seeds)
def test_where_a_step_is_0_all_codes_are_that_of_0(b, seed):
    """Whatever has become of weights since it was fitted."""
    W = drawn(seed, 4, 6)
    for grid, of_0 in ((absmax(0 * W, b), 0), (zero_point(0 * W, b), 0), (nf4(0 * W, 3), 7)):
        assert (grid.codes(W) == of_0).all()


# --- with the kernels -----------------------------------------------------------------------------


@given(sizes, st.integers(1, 3), st.sampled_from([32, 64, 128]), seeds)
def test_four_bits_are_those_of_the_int4_kernel(N, G, g, seed):
    W = drawn(seed, N, G * g, torch.float32)
    grid = zero_point(W, 4, g)
    packed, scales, zeros = quantize_int4_obvious(W, g)
    alive = grid.scale > 0  # the kernel's own quantizer gives a group of zeros a tiny step
    assert torch.equal(grid.scale[alive], scales[alive])
    assert torch.equal(grid.zero, zeros) and torch.equal(pack_int4(grid.codes(W)), packed)
    for own in (grid, absmax(W, 4, g)):
        codes, zeros = own.codes(W).short() - own.low, (own.zero - own.low).byte()
        got = dequantize_int4(pack_int4(codes), own.scale, zeros, G * g, g)
        assert torch.equal(got, own.values(own.codes(W)))


@given(st.sampled_from(["row", "column"]), sizes, sizes, seeds)
def test_eight_bits_are_those_of_the_int8_kernel(per, N, K, seed):
    W = drawn(seed, N, K, torch.float32)
    grid = absmax(W, 8, per)
    obvious = quantize_rows_obvious if per == "row" else quantize_columns_obvious
    codes, scale = obvious(W)
    assert torch.equal(grid.scale.flatten(), scale)
    # The kernel multiplies by 127 / max: a hair from a half it may round otherwise.
    half = ((W / grid.scale.where(grid.scale > 0, 1)).frac().abs() - 0.5).abs() < 1e-4
    assert torch.equal(grid.codes(W)[~half], codes[~half])


# --- normal floats --------------------------------------------------------------------------------


def test_levels_are_the_published_ones():
    assert_close(NF4, torch.tensor(PUBLISHED, dtype=torch.float64), 2e-7)
    assert NF4[7] == 0 and NF4[0] == -1 and NF4[15] == 1


@given(sizes, sizes, sizes, seeds)
def test_a_normal_float_is_the_nearest_level(N, G, g, seed):
    W = drawn(seed, N, G * g)
    grid = nf4(W, g, torch.float64)
    assert torch.equal(grid.scale, W.view(N, G, g).abs().amax(2))
    far = 2 * W
    values = spread(grid.scale, g)[..., None] * NF4.double()
    error = (far - grid.values(grid.codes(far), torch.float64)).abs()
    assert_close(error, (far[..., None] - values).abs().amin(2), 1e-13)


def test_normal_weights_err_less_on_these_levels_than_on_even_steps():
    """At the same number of bits; with a zero point for each block, steps are as good."""
    W = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    error = [
        (W - grid.values(grid.codes(W))).square().mean()
        for grid in (nf4(W), absmax(W, 4, NF4_BLOCK), zero_point(W, 4, NF4_BLOCK))
    ]
    assert error[0] < 0.75 * error[1] and error[0] < 1.05 * error[2]


@given(sizes, st.integers(1, 700), seeds)
def test_scales_are_quantized_once_more(N, G, seed):
    scale = drawn(seed, N, G, torch.float32).abs()
    small = double_quantize(scale)
    assert small.codes.dtype == torch.int8 and len(small.codes) == N * G
    assert len(small.scale) == -(-N * G // SCALE_BLOCK)
    half = small.scale.repeat_interleave(SCALE_BLOCK)[: N * G].view(N, G) / 2
    error = (small.restored(scale.shape) - scale).abs()
    assert (error <= half + 1e-6 * scale.max()).all()
    block = torch.nn.functional.pad(scale.flatten() - small.mean, (0, -N * G % SCALE_BLOCK))
    assert_close(small.scale * 127, block.view(-1, SCALE_BLOCK).abs().amax(1), 1e-6)


# --- bits -----------------------------------------------------------------------------------------


@given(bits, sizes, st.integers(1, 70), st.booleans(), seeds)
def test_packed_codes_come_back_and_take_no_bit_more(b, N, K, signed, seed):
    low = -(2 ** (b - 1)) if signed else 0
    codes = torch.randint(low, low + 2**b, (N, K), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int8 if signed else torch.uint8)
    stream = pack(codes, b, low)
    assert stream.dtype == torch.uint8 and stream.shape == (N, (b * K + 7) // 8)
    back = unpack(stream, b, K, low)
    assert torch.equal(back, codes) and back.dtype == codes.dtype
    for row, numbers in zip(stream.tolist(), (codes.long() - low).tolist(), strict=True):
        want = sum(code << b * k for k, code in enumerate(numbers))
        assert int.from_bytes(bytes(row), "little") == want


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda W: absmax(W, 1), lambda W: zero_point(W, 9), lambda W: absmax(W, 4, 5),
        lambda W: zero_point(W, 4, 0), lambda W: nf4(W, 64), lambda W: absmax(W, 4, "rows"),
        lambda W: absmax(W[0]), lambda W: absmax(W[:0]), lambda W: nf4(W / 0),
        lambda W: zero_point(W * torch.nan), lambda W: absmax(W * 1e9, 8, dtype=torch.float16),
        lambda W: pack(torch.full((1, 3), 8), 3), lambda W: pack(torch.full((1, 3), -1), 3),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused(call):
    with pytest.raises(UserError) as error:
        call(torch.ones(4, 6))
    assert "\n" not in str(error.value)


# --- bitsandbytes ---------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), seeds)
def test_normal_floats_and_int8_are_those_of_bitsandbytes(N, G, seed):
    theirs = pytest.importorskip("bitsandbytes").functional
    W = drawn(seed, N, 64 * G, torch.float32)
    packed, state = theirs.quantize_4bit(W, blocksize=64, quant_type="nf4")
    grid = nf4(W)
    codes = grid.codes(W)
    assert torch.equal(state.absmax.view(N, G).where(grid.scale > 0, 0), grid.scale)
    flat = packed.flatten()
    other = torch.stack([flat >> 4, flat & 15], 1).view(N, 64 * G)
    share = W / spread(grid.scale.where(grid.scale > 0, 1), 64)
    bounds = (NF4[1:] + NF4[:-1]) / 2
    clear = ((share[..., None] - bounds).abs() > 1e-6).all(2)  # of where two levels are as near
    assert torch.equal(codes[clear], other[clear]) and clear.float().mean() > 0.99
    back = theirs.dequantize_4bit(packed, state)
    assert_close(grid.values(codes)[clear] / W.abs().max(), back[clear] / W.abs().max(), 1e-6)

    integers, largest, _ = theirs.int8_vectorwise_quant(W[W.any(1)])
    codes, scale = quantize_rows_obvious(W[W.any(1)])
    assert torch.equal(codes, integers)
    assert_close(scale * 127 / largest, torch.ones_like(largest), 1e-6)
