"""Decoding in Triton: one query against a cache is as good as torch's attention, however shared."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    CUDA,
    DEVICE,
    LAYOUTS,
    LOW,
    assert_as_good_as_torch,
    far,
    layouts,
    normals,
    on_device,
    seeds,
    strided,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from kernels import decode as module
from kernels.decode import decode, decode_obvious, decode_triton
from kernels.mask import Mask


@pytest.fixture(autouse=True)
def short_shares(monkeypatch):
    """A few keys are enough to be shared out, and a few heads to fill more than one tile."""
    monkeypatch.setattr(module, "LEAST", 8)
    monkeypatch.setattr(module, "HEADS", 16)


def interval(*pairs) -> Mask:
    lo, hi = torch.tensor(pairs, dtype=torch.int64).T[..., None].to(DEVICE)
    return Mask(lo, hi)


def drawn(seed: int, B: int, H: int, S: int, extras, whole_bias: bool, dtype) -> Mask:
    """An interval for each sample, some empty and some beyond the keys, and further fields."""
    rng = torch.Generator().manual_seed(seed)
    ends = torch.randint(-2, S + 3, (2, B, 1), generator=rng).to(DEVICE)
    mask = Mask(*(ends if seed % 3 == 0 else ends.sort(0).values))
    if "slopes" in extras:
        at = torch.randint(S, (B, 1), generator=rng).to(DEVICE)
        slopes = strided(torch.rand(H, generator=rng).to(DEVICE), 2 * (seed % 2))
        mask = replace(mask, slopes=slopes, at=at)
    if "bias" in extras:
        shape = (B, H, 1, S) if whole_bias else (1, 1, 1, S)
        (bias,) = normals(seed, shape, dtype=dtype)
        hidden = torch.rand(shape, generator=rng) < 0.2
        bias = bias.detach().masked_fill(hidden, -torch.inf).to(DEVICE)
        mask = replace(mask, bias=strided(bias, seed % LAYOUTS))
    return mask


EXTRAS = st.sampled_from([(), (), ("slopes",), ("bias",), ("slopes", "bias")])


@pytest.mark.parametrize("group", [1, 3, 40])
@given(
    seeds, st.integers(1, 3), st.integers(1, 2),
    st.integers(1, 150), st.sampled_from([16, 17, 24, 40, 64]), EXTRAS, st.booleans(),
    st.sampled_from(LOW), st.tuples(layouts, layouts, layouts),
)  # fmt: skip
def test_decode_is_as_good_as_torch(group, seed, B, K, S, D, extras, whole_bias, dtype, layout):
    shapes = (B, K * group, 1, D), (B, K, S, D), (B, K, S, D)
    inputs = zip(normals(seed, *shapes, dtype=dtype), layout, strict=True)
    q, k, v = (strided(x.detach(), how).to(DEVICE) for x, how in inputs)
    mask = drawn(seed, B, K * group, S, extras, whole_bias, dtype)
    assert_as_good_as_torch(decode_triton, decode_obvious, [q, k, v], mask, D**-0.5)


def half(seed: int, *shapes) -> list[torch.Tensor]:
    return [x.detach().to(DEVICE) for x in normals(seed, *shapes, dtype=torch.float16)]


@pytest.mark.parametrize("programs", [1, 3, 25, 60])
def test_the_number_of_shares_does_not_matter(programs, monkeypatch):
    """One, a few, more than are merged at a time, and more than there are blocks of keys."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    inputs = half(0, (1, 3, 1, 16), (1, 3, 400, 16), (1, 3, 400, 16))
    assert_as_good_as_torch(decode_triton, decode_obvious, inputs, interval((5, 390)), 0.25)


def test_keys_outside_the_interval_are_not_looked_at():
    """A static cache holds anything, even NaN, where nothing has been written yet."""
    ends = [(3, 49), (40, 40)]
    q, k, v = half(0, (2, 2, 1, 16), (2, 1, 90, 16), (2, 1, 90, 16))
    want = decode_triton(q, k, v, interval(*ends), 0.25)
    for b, (lo, hi) in enumerate(ends):
        for x in (k, v):
            x[b, :, :lo] = x[b, :, hi + 1 :] = torch.nan
    assert torch.equal(decode_triton(q, k, v, interval(*ends), 0.25), want)


def test_who_sees_nothing_gets_zeros():
    q, k, v = half(0, (3, 2, 1, 16), (3, 1, 40, 16), (3, 1, 40, 16))
    out = decode_triton(q, k, v, interval((5, 4), (40, 50), (0, -1)), 0.25)
    assert not out.any()
    assert not decode_triton(q, k[:, :, :0], v[:, :, :0], interval((0, 9)), 0.25).any()
    assert decode_triton(q[:0], k[:0], v[:0], interval((0, 9)), 0.25).shape == (0, 2, 1, 16)


@pytest.mark.parametrize("hidden", [slice(0, 40), slice(0, 60), slice(20, 60)])
def test_keys_hidden_by_the_bias_alone(hidden):
    """A share, its first blocks or all there is may hold no key that is seen."""
    inputs = half(0, (1, 2, 1, 16), (1, 1, 60, 16), (1, 1, 60, 16))
    bias = torch.zeros(1, 1, 1, 60, device=DEVICE)
    bias[..., hidden] = -torch.inf
    mask = replace(interval((0, 59)), bias=bias)
    assert_as_good_as_torch(decode_triton, decode_obvious, inputs, mask, 0.25)


def test_two_runs_give_the_same_bits():
    inputs = half(0, (1, 4, 1, 16), (1, 2, 90, 16), (1, 2, 90, 16))
    first, second = (decode_triton(*inputs, interval((0, 80)), 0.25) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_keys_more_than_two_billion_numbers_apart():
    q, k, v = half(0, (1, 1, 1, 16), (1, 1, 4, 16), (1, 1, 4, 16))
    rows, _ = far(torch.float16, 4, 16)
    want = decode_triton(q, k, v, interval((0, 3)), 0.25)
    apart = rows[None, None]
    assert torch.equal(decode_triton(q, apart.copy_(k), v, interval((0, 3)), 0.25), want)
    assert torch.equal(decode_triton(q, k, apart.copy_(v), interval((0, 3)), 0.25), want)


def test_on_a_cpu_torch_computes_it():
    q, k, v = normals(0, (1, 2, 1, 16), (1, 1, 40, 16), (1, 1, 40, 16), dtype=torch.float32)
    mask = Mask(*torch.tensor([[[3]], [[33]]]))
    with torch.no_grad():
        torch.testing.assert_close(decode(q, k, v, mask, 0.25), decode_obvious(q, k, v, mask, 0.25))
    with pytest.raises(ValueError, match="use attend"):
        decode(q, k, v, mask, 0.25)


BAD = {
    "T = 2 queries": {"T": 2},
    "mask.layout": {"layout": torch.ones(1, 1, 1, dtype=torch.bool)},
    "a gradient is wanted": {"bias": torch.zeros(1, 1, 1, 5, requires_grad=True)},
    "D = 8 must be": {"D": 8},
    "one dtype": {"dtype": torch.float16},
    "mask.bias": {"bias": torch.zeros(1, 1, 1, 4)},
    "query heads": {"H": 3},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence(words):
    bad = dict(BAD[words])
    T, H, D = bad.pop("T", 1), bad.pop("H", 2), bad.pop("D", 16)
    q = on_device(torch.zeros(1, H, T, D, dtype=bad.pop("dtype", torch.float32)))
    k = on_device(torch.zeros(1, 2, 5, D))
    bad = {"lo": torch.zeros(1, T).long(), "hi": torch.zeros(1, T).long(), **bad}
    mask = Mask(**{name: on_device(x) for name, x in bad.items()})
    with pytest.raises(ValueError, match=words):
        decode_triton(q, k, k, mask, 1.0)


# --- without a GPU: what the compiler makes of it -------------------------------------------------


def launches(D: int, dtype: torch.dtype, kind: str = "", H: int = 32, K: int = 8, B: int = 2):
    """A call for the compiler, at a size people use."""

    def call():
        S = 65536 // B
        q = torch.empty(B, H, 1, D, dtype=dtype)
        k, v = (torch.empty(B, S, K, D, dtype=dtype).transpose(1, 2) for _ in range(2))
        ends = torch.zeros(B, 1).long(), torch.full((B, 1), S - 1)
        fields = {
            "": {},
            "slopes": {"slopes": torch.rand(H), "at": ends[1]},
            "bias": {"bias": torch.empty(B, H, 1, S, dtype=dtype)},
        }
        decode_triton(q, k, v, Mask(*ends, **fields[kind]), D**-0.5)

    return call


COMPILE = {
    "bf16 D128": launches(128, torch.bfloat16),
    "bf16 D128 slopes": launches(128, torch.bfloat16, "slopes"),
    "bf16 D128 bias": launches(128, torch.bfloat16, "bias"),
    "bf16 D64 all heads": launches(64, torch.bfloat16, K=32),
    "bf16 D96": launches(96, torch.bfloat16),
    "bf16 D256 one head": launches(256, torch.bfloat16, H=64, K=1),
    "bf16 whole": launches(64, torch.bfloat16, K=32, B=256),
    "fp32 D128": launches(128, torch.float32),
    "fp32 D64": launches(64, torch.float32),
}
