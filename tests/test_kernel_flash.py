"""Attention in Triton: for every mask, shape, stride and dtype it is as good as torch's own."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    CUDA,
    DEVICE,
    LAYOUTS,
    LOW,
    assert_as_good_as_torch,
    assert_close,
    far,
    layouts,
    normals,
    on_device,
    poisoned,
    results,
    seeds,
    strided,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from kernels import flash, launch
from kernels.attention import (
    Mask,
    attend,
    attend_obvious,
    attend_triton,
    attend_with_lse_obvious,
    attend_with_lse_triton,
)


def intervals(seed: int, B: int, T: int, S: int, kind: str) -> Mask:
    """An interval mask of some kind; `any` has rows that see nothing, and ends beyond the keys."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(S - T, S)[None].expand(B, T)
    one = torch.randint(S + 1, (B, 1), generator=rng)
    every_second = torch.arange(T) // 16 % 2 == 0  # tile of queries
    lo, hi = {
        "causal": (0 * t, t),
        "window": (t - one, t),
        "both ways": (t - one, t + one),
        "all": (torch.zeros(1, T).long(), torch.full((1, T), S)),
        "documents": (torch.where(t >= one, one, 0), t),
        "now and then all": [torch.where(every_second, *x) for x in ((0, t - one), (S, t))],
        "any": (torch.randint(S + 3, (B, T), generator=rng) - 2 for _ in range(2)),
    }[kind]
    return Mask(strided(lo.to(DEVICE), seed % LAYOUTS), strided(hi.to(DEVICE), seed // 4 % LAYOUTS))


def attention(function):
    """A function of q, k, v and perhaps a bias: the result and the log-sum-exp."""
    return lambda q, k, v, bias, mask, scale: function(q, k, v, replace(mask, bias=bias), scale)


KINDS = ["causal", "window", "both ways", "all", "documents", "now and then all", "any"]
LENGTHS = st.integers(1, 70)
WIDTHS = st.sampled_from([16, 17, 24, 40, 64])
EXTRAS = [(), ("slopes",), ("bias",), ("layout",), ("slopes", "bias", "layout")]


def with_extras(extras, seed, mask, B, H, T, S, bias_shape, dtype):
    """The mask with slopes or a layout, and a bias or None, all in some layout in memory."""
    rng = torch.Generator().manual_seed(seed)
    bias, how = None, seed % LAYOUTS
    if "slopes" in extras:
        at = torch.randint(S, (B if seed % 3 else 1, T), generator=rng).to(DEVICE)
        slopes = strided(torch.rand(H, generator=rng).to(DEVICE), how)
        mask = replace(mask, slopes=slopes, at=strided(at, how))
    if "layout" in extras:
        block = (32, 64)[seed // 2 % 2]
        shape = (1 + seed % 2 * (H - 1), launch.ceil_div(T, block), launch.ceil_div(S, block))
        layout = torch.rand(shape, generator=rng) > 0.4
        mask = replace(mask, layout=strided(layout.to(DEVICE), how), block=block)
    if "bias" in extras:
        (bias,) = normals(seed, (*bias_shape, T, S), dtype=dtype)
        bias = strided(bias.to(DEVICE), how).detach().requires_grad_()
    return mask, bias


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_interval_at_full_length(kind):
    """Long enough for whole blocks between masked ones; each sample has its own window."""
    inputs = normals(0, *[(2, 1, 80, 16)] * 3, dtype=torch.float32)
    functions = (attention(f) for f in (attend_with_lse_triton, attend_with_lse_obvious))
    mask = intervals(2, 2, 80, 80, kind)
    assert_as_good_as_torch(*functions, [*(x.to(DEVICE) for x in inputs), None], mask, 0.25)


@pytest.mark.parametrize("extras", EXTRAS[1:])
@pytest.mark.parametrize("seed", [1, 6])
def test_every_extra_for_each_head_or_for_all(extras, seed):
    """Odd seeds: fields for each sample and head; even ones: shared."""
    own = seed % 2 == 1
    inputs = normals(0, (2, 2, 40, 24), *[(2, 1, 50, 24)] * 2, dtype=torch.float32)
    mask = intervals(seed, 2, 40, 50, "causal")
    mask, bias = with_extras(extras, seed, mask, 2, 2, 40, 50, (2, 2) if own else (1, 1), LOW[0])
    functions = (attention(f) for f in (attend_with_lse_triton, attend_with_lse_obvious))
    assert_as_good_as_torch(*functions, [*(x.to(DEVICE) for x in inputs), bias], mask, 0.2)


def test_one_key_has_all_the_weight():
    q, k, v = normals(0, *[(1, 1, 1, 16)] * 3, dtype=torch.float32, device=DEVICE)
    one = Mask(*[torch.zeros(1, 1, device=DEVICE).long()] * 2)
    ulps = 0 if DEVICE == "cpu" else 2  # a GPU fuses x · log₂e − max, which then is not quite 0
    torch.testing.assert_close(attend_triton(q, k, v, one, 1.0), v, rtol=ulps * 2**-23, atol=0)


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
    shapes = [(1, 2, 50, 16)] * 3
    inputs = normals(0, *shapes, (1, 1, 50, 50), dtype=torch.float16, device=DEVICE)
    mask = intervals(0, 1, 50, 50, "causal")
    f = attention(attend_with_lse_triton)
    first, second = (results(f, inputs, mask, 0.25) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("B, T, S", [(1, 0, 5), (1, 5, 0), (0, 5, 5)])
def test_nothing_to_look_at_gives_zeros(B, T, S):
    shapes = (B, 2, T, 16), (B, 2, S, 16), (B, 2, S, 16), (1, 1, T, S)
    inputs = normals(0, *shapes, dtype=torch.float32, device=DEVICE)
    mask = Mask(*(torch.full((1, T), end, device=DEVICE) for end in (0, 9)))
    with poisoned():
        out, lse = attention(attend_with_lse_triton)(*inputs, mask, 1.0)
        grads = torch.autograd.grad(out.sum(), inputs)
    assert not out.any() and (lse == -torch.inf).all() and not any(g.any() for g in grads)


@pytest.mark.parametrize("extras", [(), ("slopes",), ("bias",), ("layout",)])
def test_on_a_cpu_torch_computes_it(extras):
    q, k, v = normals(0, (2, 4, 40, 16), (2, 2, 50, 16), (2, 2, 50, 16))
    mask = intervals(0, 2, 40, 50, "any")
    mask, bias = with_extras(extras, 1, mask, 2, 4, 40, 50, (2, 4), torch.float64)
    inputs = [q, k, v] if bias is None else [q, k, v, bias]

    def function(attention):
        return lambda q, k, v, bias=None: attention(q, k, v, replace(mask, bias=bias), 0.2)

    pairs = (results(function(f), inputs) for f in (attend, attend_obvious))
    for got, want in zip(*pairs, strict=True):
        assert_close(got, want)


def test_a_block_of_the_layout_may_be_larger_than_all_there_is():
    inputs = normals(0, (1, 2, 20, 16), *[(1, 1, 40, 16)] * 2, dtype=torch.float32, device=DEVICE)
    mask = intervals(0, 1, 20, 40, "causal")
    mask = replace(mask, layout=torch.ones(1, 1, 1, dtype=torch.bool, device=DEVICE), block=256)
    assert_as_good_as_torch(attend_triton, attend_obvious, inputs, mask, 0.25)


def test_the_widest_head():
    inputs = normals(0, *[(1, 1, 20, 256)] * 3, dtype=torch.float16, device=DEVICE)
    mask = intervals(0, 1, 20, 20, "causal")
    assert_as_good_as_torch(attend_triton, attend_obvious, inputs, mask, 1 / 16)


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_heads_more_than_two_billion_numbers_apart():
    """Offsets beyond 2³¹ elements: the third and fourth of four heads."""
    q, k, v = normals(0, *[(1, 4, 1, 16)] * 3, dtype=torch.float16)
    rows, _ = far(torch.float16, 4, 16)
    rows.copy_(k.detach()[0, :, 0])
    apart = rows[None, :, None]
    mask = intervals(0, 1, 1, 1, "all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "has_tma", lambda device: False)
        for inputs, near in (((q, apart, v), (q, k, v)), ((q, v, apart), (q, v, k))):
            got, want = (attend_with_lse_triton(*x, mask, 0.25) for x in (inputs, near))
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


AT = {"at": torch.zeros(1, 5).long()}
BAD = {
    "D = 8 must be": {"D": 8},
    "D = 257 must be": {"D": 257},
    "k is torch.float64": {"k": torch.float64},
    "one dtype": {"v": torch.float16},
    "k .* and v": {"of_v": 4},
    "scale = 0": {"scale": 0.0},
    "no gradient": {"slopes": torch.ones(2, requires_grad=True), **AT},
    "slopes need mask.at": {"slopes": torch.ones(2)},
    "mask.slopes": {"slopes": torch.ones(1), **AT},
    "mask.at": {"slopes": torch.ones(2), "at": torch.zeros(1, 1).long()},
    "mask.hi": {"B": 2, "hi": torch.zeros(2, 5).long()},
    "mask.bias": {"bias": torch.zeros(1, 1, 5, 4)},
    "supported are 32 and 16": {"bias": torch.zeros(1, 1, 5, 5).double()},
    "mask.bias is on meta": {"bias": torch.zeros(1, 1, 5, 5, device="meta")},
    "mask.layout": {"layout": torch.ones(1, 2, 2, dtype=torch.bool)},
    "block = 48 must be": {"layout": torch.ones(1, 1, 1, dtype=torch.bool), "block": 48},
    "block = 8 must be": {"layout": torch.ones(1, 1, 1, dtype=torch.bool), "block": 8},
    "query heads": {"H": 3},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence(words):
    bad = dict(BAD[words])
    B, D, H, scale = bad.pop("B", 1), bad.pop("D", 16), bad.pop("H", 2), bad.pop("scale", 1.0)
    shapes = {"q": (B, H, 5, D), "k": (B, 2, 5, D), "v": (B, 2, bad.pop("of_v", 5), D)}
    x = {n: on_device(torch.zeros(shapes[n], dtype=bad.pop(n, torch.float32))) for n in shapes}
    bad = {"lo": torch.zeros(1, 5).long(), "hi": torch.zeros(1, 5).long(), **bad}
    mask = Mask(**{name: on_device(x) for name, x in bad.items()})
    with pytest.raises(ValueError, match=words):
        attend_triton(**x, mask=mask, scale=scale)


@given(
    seeds, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), LENGTHS, LENGTHS, WIDTHS,
    st.sampled_from(KINDS), st.sampled_from(EXTRAS), st.sampled_from(LOW), layouts,
    st.booleans(), st.booleans(), st.booleans(), st.integers(1, 4),
)  # fmt: skip
def test_attention_is_as_good_as_torch(
    seed, B, K, group, T, S, D, kind, extras, dtype, layout, own_b, own_h, tma, cached
):
    """Value, log-sum-exp and every gradient; tiles by hardware copies and by pointers.

    `cached` key-value heads have room in the cache: programs go through the heads in sections.
    """
    H = K * group
    q, k, v = normals(seed, (B, H, T, D), (B, K, S, D), (B, K, S, D), dtype=dtype)
    mask, bias = with_extras(
        extras, seed, intervals(seed, B, T, S, kind), B, H, T, S,
        (B if own_b else 1, H if own_h else 1), dtype,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(launch, "has_tma", lambda device: tma)
        patch.setattr(flash, "L2_BYTES", cached * 2 * S * D * q.element_size())
        assert_as_good_as_torch(
            attention(attend_with_lse_triton),
            attention(attend_with_lse_obvious),
            [*(strided(x, layout).to(DEVICE) for x in (q, k, v)), bias],
            mask,
            D**-0.5,
        )


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
