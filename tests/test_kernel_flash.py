"""Attention in Triton: for every mask, shape, stride and dtype it is as good as torch's own."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    DEVICE,
    LOW,
    assert_as_good_as_torch,
    layouts,
    normals,
    poisoned,
    results,
    seeds,
    strided,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from kernels import launch
from kernels.attention import Mask, attend_triton, attend_with_lse_obvious, attend_with_lse_triton


def intervals(seed: int, B: int, T: int, S: int, kind: str) -> Mask:
    """An interval mask of some kind; `any` has rows that see nothing, and ends beyond the keys."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(S - T, S)[None].expand(B, T)
    one = torch.randint(S + 1, (B, 1), generator=rng)
    lo, hi = {
        "causal": (0 * t, t),
        "window": (t - one, t),
        "both ways": (t - one, t + one),
        "all": (torch.zeros(1, T).long(), torch.full((1, T), S)),
        "documents": (torch.where(t >= one, one, 0), t),
        "any": (torch.randint(S + 3, (B, T), generator=rng) - 2 for _ in range(2)),
    }[kind]
    return Mask(lo.contiguous().to(DEVICE), hi.contiguous().to(DEVICE))


def attention(function):
    """A function of q, k, v and perhaps a bias: the result and the log-sum-exp."""
    return lambda q, k, v, bias, mask, scale: function(q, k, v, replace(mask, bias=bias), scale)


KINDS = st.sampled_from(["causal", "window", "both ways", "all", "documents", "any"])
LENGTHS = st.integers(1, 70)
WIDTHS = st.sampled_from([16, 17, 24, 40, 64])
EXTRAS = st.sampled_from([(), ("slopes",), ("bias",), ("layout",), ("slopes", "bias", "layout")])


def with_extras(extras, seed, mask, H, T, S, bias_shape, dtype):
    """The mask with slopes or a layout, and a bias or None."""
    rng = torch.Generator().manual_seed(seed)
    bias = None
    if "slopes" in extras:
        at = torch.randint(S, (1, T), generator=rng).to(DEVICE)
        mask = replace(mask, slopes=torch.rand(H, generator=rng).to(DEVICE), at=at)
    if "layout" in extras:
        shape = (1 + seed % 2 * (H - 1), launch.ceil_div(T, 32), launch.ceil_div(S, 32))
        layout = torch.rand(shape, generator=rng) > 0.4
        mask = replace(mask, layout=layout.to(DEVICE), block=32)
    if "bias" in extras:
        (bias,) = normals(seed, (*bias_shape, T, S), dtype=dtype)
    return mask, bias


@given(
    seeds, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), LENGTHS, LENGTHS, WIDTHS,
    KINDS, EXTRAS, st.sampled_from(LOW), layouts, st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_attention_is_as_good_as_torch(
    seed, B, K, group, T, S, D, kind, extras, dtype, layout, own_b, own_h, tma
):
    """Value, log-sum-exp and every gradient; tiles by hardware copies and by pointers."""
    H = K * group
    q, k, v = normals(seed, (B, H, T, D), (B, K, S, D), (B, K, S, D), dtype=dtype)
    mask, bias = with_extras(
        extras, seed, intervals(seed, B, T, S, kind), H, T, S,
        (B if own_b else 1, H if own_h else 1), dtype,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(launch, "has_tma", lambda device: tma)
        assert_as_good_as_torch(
            attention(attend_with_lse_triton),
            attention(attend_with_lse_obvious),
            [strided(x, layout).to(DEVICE) for x in (q, k, v)]
            + [bias if bias is None else bias.to(DEVICE)],
            mask,
            D**-0.5,
        )


def test_one_key_has_all_the_weight():
    q, k, v = normals(0, *[(1, 1, 1, 16)] * 3, dtype=torch.float32)
    one = Mask(torch.zeros(1, 1).long(), torch.zeros(1, 1).long())
    assert torch.equal(attend_triton(q, k, v, one, 1.0), v)


@pytest.mark.parametrize("dtype", LOW)
def test_large_scores(dtype):
    """Scores of ±80 neither overflow nor vanish.

    In fp32 the value only: gradients then hang on the last bits of q·k, which the interpreter
    rounds in another way for k qᵀ (backward) than for q kᵀ (forward).
    """
    inputs = normals(1, *[(1, 2, 40, 16)] * 3, dtype=dtype)
    if dtype == torch.float32:
        inputs = [x.detach() for x in inputs]
    functions = (attention(f) for f in (attend_with_lse_triton, attend_with_lse_obvious))
    mask = intervals(0, 1, 40, 40, "causal")
    assert_as_good_as_torch(*functions, [*(x.to(DEVICE) for x in inputs), None], mask, 5.0)


def test_two_runs_give_the_same_bits():
    q, k, v, bias = normals(0, *[(1, 2, 50, 16)] * 3, (1, 1, 50, 50), dtype=torch.float16)
    mask = intervals(0, 1, 50, 50, "causal")
    f = attention(attend_with_lse_triton)
    first, second = (results(f, [q, k, v, bias], mask, 0.25) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("T, S", [(0, 5), (5, 0)])
def test_nothing_to_look_at_gives_zeros(T, S):
    q, k, v = normals(0, (1, 2, T, 16), (1, 2, S, 16), (1, 2, S, 16), dtype=torch.float32)
    mask = Mask(torch.zeros(1, T).long(), torch.full((1, T), 9))
    with poisoned():
        out, lse = attend_with_lse_triton(q, k, v, mask, 1.0)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out.any() and (lse == -torch.inf).all() and not any(g.any() for g in grads)


def test_heads_more_than_two_billion_numbers_apart():
    """Offsets beyond 2³¹ elements: the third of three heads, in memory that is never filled."""
    far = torch.empty((3 << 31) // 2 + 4096, dtype=torch.float16)
    far = far.as_strided((1, 3, 4, 16), (0, 1 << 30, 16, 1))
    q, k, v = normals(0, *[(1, 3, 4, 16)] * 3, dtype=torch.float16)
    far.copy_(k.detach())
    mask = intervals(0, 1, 4, 4, "causal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "has_tma", lambda device: False)
        got = attend_triton(q, far, v, mask, 0.25)
    assert torch.equal(got, attend_triton(q, k, v, mask, 0.25))


BAD = {
    "D = 8 must be": {"D": 8},
    "D = 257 must be": {"D": 257},
    "k is torch.float64": {"k": torch.float64},
    "one dtype": {"v": torch.float16},
    "scale = 0": {"scale": 0.0},
    "no gradient": {"slopes": torch.ones(2, requires_grad=True), "at": torch.zeros(1, 5).long()},
    "belong together": {"slopes": torch.ones(2)},
    "mask.slopes": {"slopes": torch.ones(3), "at": torch.zeros(1, 5).long()},
    "mask.bias": {"bias": torch.zeros(1, 1, 5, 4)},
    "mask.layout": {"layout": torch.ones(1, 2, 2, dtype=torch.bool)},
    "power of 2": {"layout": torch.ones(1, 1, 1, dtype=torch.bool), "block": 48},
    "query heads": {"H": 3},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence(words):
    bad = dict(BAD[words])
    D, H, scale = bad.pop("D", 16), bad.pop("H", 2), bad.pop("scale", 1.0)
    heads = {"q": H, "k": 2, "v": 2}
    x = {n: torch.zeros(1, heads[n], 5, D, dtype=bad.pop(n, torch.float32)) for n in heads}
    mask = Mask(torch.zeros(1, 5).long(), torch.zeros(1, 5).long(), **bad)
    with pytest.raises(ValueError, match=words):
        attend_triton(**x, mask=mask, scale=scale)


# --- without a GPU: what the compiler makes of it -------------------------------------------------


def launches(D: int, dtype: torch.dtype, kind: str = "", H: int = 8, K: int = 8, T: int = 4096):
    """A call for the compiler: forward and backward of one mask, at a size people use."""

    def call():
        shapes = ((2, T, n, D) for n in (H, K, K))
        q, k, v = (torch.empty(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes)
        hi = torch.arange(T)[None]
        fields = {
            "": {},
            "slopes": {"slopes": torch.rand(H), "at": hi},
            "bias": {"bias": torch.empty(1, H, T, T, dtype=dtype, requires_grad=True)},
            "layout": {"layout": torch.ones(1, T // 128, T // 128, dtype=bool), "block": 128},
        }
        out = attend_triton(q, k, v, Mask(0 * hi, hi, **fields[kind]), D**-0.5)
        out.backward(torch.empty_like(out))

    return call


EVERY = {
    f"bf16 D{D} {kind}": launches(D, torch.bfloat16, kind)
    for D in (64, 128, 256)
    for kind in ("", "slopes", "bias", "layout")
} | {"fp16 grouped": launches(128, torch.float16, K=2), "fp32": launches(64, torch.float32)}
USUAL = ("bf16 D64 ", "bf16 D128 slopes", "bf16 D128 bias", "fp16 grouped")
COMPILE = {label: EVERY[label] for label in USUAL}
COMPILE_MORE = {label: call for label, call in EVERY.items() if label not in USUAL}
WGMMA = {"forward_kernel", "key_kernel", "query_kernel", "bias_kernel"}
