"""Laws of kernels/linear_attention.py: the equation, its gradients, states, documents."""

import pytest
import torch
from helpers import (
    DEVICE,
    LOW,
    assert_as_good_as_torch,
    assert_close,
    far,
    layouts,
    on_device,
    results,
    seeds,
    strided,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_attention as file
from kernels.linear_attention import (
    linear_attention,
    linear_attention_chunked,
    linear_attention_obvious,
    linear_attention_triton,
)

FAST = [linear_attention_chunked, linear_attention_triton]


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """As in the interpreter, so that a text of 50 tokens has several, in torch too."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(file, "CHUNK", 16)
        yield


def draw_inputs(seed, B, H, K, T, M, D, dtype, how=(0, 0, 0)):
    """Features from [0.1, 1.1) with some rows of zeros, values, each with a gradient.

    Sums of features near 0 are left out: dk then is a small difference of large numbers, which one
    order of sums gets right by luck and another does not.
    """
    rng = torch.Generator().manual_seed(seed)
    q = torch.rand(B, H, T, M, generator=rng) + 0.1
    k = torch.rand(B, K, T, M, generator=rng) + 0.1
    v = torch.randn(B, K, T, D, generator=rng)
    q[torch.rand(B, H, T, generator=rng) < 0.1] = 0
    k[torch.rand(B, K, T, generator=rng) < 0.1] = 0
    return [
        strided(x.to(dtype), layout).to(DEVICE).detach().requires_grad_()
        for x, layout in zip((q, k, v), how, strict=True)
    ]


def documents(seed, B, T, share):
    """Where each token's document begins, if a token begins one with probability `share`."""
    new = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share
    new[:, :1] = True
    return torch.where(new, torch.arange(T), -1).cummax(1).values.to(DEVICE)


@st.composite
def problems(draw):
    K, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    B, T = draw(st.integers(1, 2)), draw(st.integers(0, 50))
    dtype = draw(st.sampled_from(LOW))
    least = 1 if dtype == torch.float32 else 8  # in fewer 16-bit numbers torch is right by luck
    M, D = draw(st.integers(least, 24)), draw(st.integers(least, 24))
    seed, how = draw(seeds), [draw(layouts) for _ in range(3)]
    inputs = draw_inputs(seed, B, K * group, K, T, M, D, dtype, how)
    kind = draw(st.sampled_from(["", "starts", "past"]))
    starts = documents(seed, draw(st.sampled_from([1, B])), T, draw(st.sampled_from([0.03, 0.3])))
    starts = strided(starts, draw(layouts))
    past = torch.rand(B, K, M, D + 1, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return inputs, starts if kind == "starts" else None, past if kind == "past" else None


@settings(max_examples=20)
@given(problems())
@pytest.mark.parametrize("function", FAST)
def test_chunks_are_as_good_as_the_equation(function, problem):
    inputs, starts, past = problem
    assert_as_good_as_torch(function, linear_attention_obvious, inputs, starts, past)


@given(seeds, st.integers(1, 40))
def test_the_equation_is_that_of_the_paper(seed, T):
    """A loop over tokens that carries the two sums (Performer, section 2.4)."""
    q, k, v = (x.detach().double() for x in draw_inputs(seed, 1, 2, 1, T, 5, 3, torch.float32))
    sums, norm = torch.zeros(5, 3).double().to(DEVICE), torch.zeros(5).double().to(DEVICE)
    out, state = linear_attention_obvious(q, k, v)
    for t in range(T):
        sums += torch.outer(k[0, 0, t], v[0, 0, t])
        norm += k[0, 0, t]
        for h in range(2):
            total = (q[0, h, t] @ norm).item()
            assert_close(out[0, h, t].cpu(), (q[0, h, t] @ sums).cpu() / (total or 1), 1e-10)
    assert_close(state[0, 0].cpu(), torch.cat((sums, norm[:, None]), 1).cpu(), 1e-10)


@given(seeds, st.integers(1, 40), st.integers(1, 40))
@pytest.mark.parametrize("function", [linear_attention_obvious, *FAST])
def test_a_text_in_two_parts_is_the_text(function, seed, m, n):
    inputs = [x.detach() for x in draw_inputs(seed, 2, 2, 1, m + n, 5, 7, torch.float32)]
    out, state = function(*inputs)
    first, past = function(*(x[:, :, :m] for x in inputs))
    second, end = function(*(x[:, :, m:] for x in inputs), past=past)
    torch.testing.assert_close(torch.cat((first, second), 2), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-5)


@given(seeds, st.integers(1, 40), st.integers(1, 40))
@pytest.mark.parametrize("function", FAST)
def test_documents_do_not_see_each_other(function, seed, m, n):
    """Bit for bit where both begin a chunk, else but for the order of sums."""
    inputs = [x.detach() for x in draw_inputs(seed, 1, 2, 1, m + n, 5, 7, torch.float32)]
    starts = torch.tensor([[0] * m + [m] * n], device=DEVICE)
    out, state = function(*inputs, starts)
    alone, end = function(*(x[:, :, m:] for x in inputs))
    torch.testing.assert_close(out[:, :, m:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-5)
    other = [x.clone() for x in inputs]
    for x in other:
        x[:, :, :m] += 1
    assert torch.equal(function(*other, starts)[0][:, :, m:], out[:, :, m:])


@pytest.mark.parametrize("begin", [15, 16, 17])
@pytest.mark.parametrize("function", FAST)
def test_a_document_may_begin_anywhere_in_a_chunk(function, begin):
    """Before, with and after the first token of a chunk of 16, and reaching into the next two."""
    inputs = draw_inputs(begin, 2, 2, 1, 50, 5, 7, torch.float32)
    starts = torch.tensor([[0] * begin + [begin] * (50 - begin)], device=DEVICE)
    assert_as_good_as_torch(function, linear_attention_obvious, inputs, starts)


@pytest.mark.parametrize("function", [linear_attention_obvious, *FAST])
def test_who_sees_nothing_gives_zeros_and_gets_no_gradient(function):
    q, k, v = draw_inputs(3, 1, 2, 1, 40, 5, 7, torch.float32)
    q.data[:, :, 20:25] = 0
    k.data[:, :, :10] = 0
    out, dq, *_ = results(lambda *x: function(*x)[0], [q, k, v])
    for x in (out, dq):
        assert not x[:, :, :10].any() and not x[:, :, 20:25].any()
        assert x.isfinite().all() and x[:, :, 30:].any()


def test_large_sums_do_not_overflow_half_precision():
    """The state reaches 10⁵, beyond fp16; each output is an average of values."""
    q, k, v = draw_inputs(0, 1, 1, 1, 60, 16, 16, torch.float16)
    with torch.no_grad():
        k += 1500
        v += 3
    out, state = linear_attention_triton(q, k, v)
    assert state.max() > 65504
    true, _ = linear_attention_obvious(*(x.detach().double() for x in (q, k, v)))
    assert (out - true).abs().max() < 0.02


def test_twice_the_same_bits():
    inputs = draw_inputs(1, 1, 2, 1, 40, 20, 24, torch.float16)
    first, second = (results(linear_attention_triton, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_dispatch_takes_what_the_device_has():
    inputs = [x.detach() for x in draw_inputs(1, 1, 2, 1, 20, 3, 4, torch.float32)]
    fast = linear_attention_triton if DEVICE == "cuda" else linear_attention_chunked
    assert torch.equal(linear_attention(*inputs)[0], fast(*inputs)[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory of this machine is only promised")
def test_rows_beyond_two_to_the_31():
    """Rows 2³⁰ numbers apart: an offset in 32 bits would wrap."""
    q, k, v = (x.detach() for x in draw_inputs(1, 1, 1, 1, 5, 3, 4, torch.float16))
    near, _ = linear_attention_triton(q, k, v)
    states, _ = file.states_of(0, k, v, 1, None, None, None)
    for name, x in (("q", q), ("k", k), ("v", v)):
        y, den = torch.empty_like(near), torch.empty(1, 1, 5)
        rows, first = far(x.dtype, 5, x.shape[3])
        rows.copy_(x[0, 0])
        strides = [2**30 if name == n else s.stride(2) for n, s in (("q", q), ("k", k), ("v", v))]
        inputs = {"q": q, "k": k, "v": v, name: first}.values()
        ends = [n for s in strides for n in (0, 0, s)]
        file.chunk_kernel[(1, 1, 1)](
            *inputs, states, den, None, None, None, y, *ends, 0, 0, 4, 0,
            8, 1, 8, 4, 24, 5, 1, 1, 1, INNER=3, OUTER=4, KIND=0, N=16,
        )  # fmt: skip
        assert torch.equal(y, near), name


BAD = {
    "M, the width": {"M": 257},
    "D, the width": {"D": 257},
    "one dtype": {"dtype": torch.float16},
    "no multiple": {"H": 3},
    "starts is": {"starts": torch.zeros(1, 4).long()},
    "past is": {"past": torch.zeros(1, 2, 3, 4)},
    "past wants": {"past": torch.zeros(1, 2, 3, 5, requires_grad=True)},
    "past cannot": {"past": torch.zeros(1, 2, 3, 5), "starts": torch.zeros(1, 5).long()},
    "starts is on meta": {"starts": torch.zeros(1, 5, device="meta").long()},
    "q is torch.float64": {"double": True},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_sentence(words):
    bad = dict(BAD[words])
    H, M, D = bad.pop("H", 2), bad.pop("M", 3), bad.pop("D", 4)
    q, k = (torch.zeros(1, heads, 5, M, device=DEVICE) for heads in (H, 2))
    v = torch.zeros(1, 2, 5, D, dtype=bad.pop("dtype", torch.float32), device=DEVICE)
    inputs = [x.double() if bad.get("double") else x for x in (q, k, v)]
    bad.pop("double", None)
    with pytest.raises(ValueError, match=words):
        linear_attention_triton(*inputs, **{name: on_device(x) for name, x in bad.items()})
    with pytest.raises(ValueError, match="must be"):
        linear_attention_triton(q, k, v[:, :, :4])


# --- without a GPU: what the compiler makes of it -------------------------------------------------


def launches(M: int, D: int, dtype: torch.dtype, starts: bool = False, K: int = 8):
    """Forward and backward for the compiler, at a size people use."""

    def call():
        B, H, T = 4, 16, 2048
        q = torch.empty(B, T, H, M, dtype=dtype).transpose(1, 2).requires_grad_()
        k = torch.empty(B, T, K, M, dtype=dtype).transpose(1, 2).requires_grad_()
        v = torch.empty(B, T, K, D, dtype=dtype).transpose(1, 2).requires_grad_()
        out, _ = linear_attention_triton(q, k, v, torch.zeros(B, T).long() if starts else None)
        out.backward(torch.empty_like(out))

    return call


COMPILE = {
    "bf16 M64 D64": launches(64, 64, torch.bfloat16, K=16),
    "bf16 M256 D128": launches(256, 128, torch.bfloat16),
    "fp16 M128 D64 starts": launches(128, 64, torch.float16, starts=True),
    "fp32 M64 D64": launches(64, 64, torch.float32),
}
WGMMA = {"state_kernel", "chunk_kernel"}
