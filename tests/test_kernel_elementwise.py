"""SwiGLU, GELU and RoPE: fast versions equal the obvious ones, gradients included."""

import pytest
import torch
from helpers import (
    CUDA,
    DEVICE,
    LOW,
    assert_as_good_as_torch,
    assert_close,
    far,
    layouts,
    normals,
    results,
    seeds,
    strided,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import elementwise as e

size = st.integers(1, 9)
dtypes = st.sampled_from(LOW)


@given(seeds, size, size, size, size, st.booleans())
def test_rotate(seed, B, T, H, half, shared):
    (x,) = normals(seed, (B, T, H, 2 * half))
    angles = normals(seed + 1, (1 if shared else B, T, half))[0].detach()
    pairs = (results(f, (x,), angles.cos(), angles.sin()) for f in (e.rotate, e.rotate_obvious))
    for got, want in zip(*pairs, strict=True):
        assert_close(got, want, 1e-12)


@given(seeds, st.integers(0, 9), size, dtypes, layouts, layouts)
def test_swiglu_is_as_good_as_torch(seed, rows, columns, dtype, one, other):
    up, gate = (
        strided(x, how).to(DEVICE).detach().requires_grad_()
        for x, how in zip(
            normals(seed, *[(rows, columns)] * 2, dtype=dtype), (one, other), strict=True
        )
    )
    assert_as_good_as_torch(e.swiglu_triton, e.swiglu_obvious, (up, gate))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
@given(seeds, st.integers(0, 9), size, dtypes, layouts, st.sampled_from([1.0, 6.0]))
def test_gelu_is_as_good_as_torch(name, seed, rows, columns, dtype, layout, wide):
    (x,) = normals(seed, (rows, columns), dtype=dtype)
    x = strided((x.detach() * wide).requires_grad_(), layout).to(DEVICE).detach().requires_grad_()
    functions = (getattr(e, f"{name}_{kind}") for kind in ("triton", "obvious"))
    assert_as_good_as_torch(*functions, (x,))


@settings(max_examples=40)
@given(
    seeds, st.integers(0, 3), size, size, size, size, st.booleans(), dtypes, st.booleans(),
    layouts, layouts,
)  # fmt: skip
def test_rotate_pair_is_as_good_as_torch(
    seed, B, T, H, K, half, shared, dtype, fused, layout, other
):
    """Queries and keys on their own, or as views into one fused projection."""
    if fused:
        (both,) = normals(seed, (B, T, H + K, 2 * half), dtype=dtype)
        q, k = both.to(DEVICE).split((H, K), 2)
        q, k = (x.detach().requires_grad_() for x in (q, k))
    else:
        q, k = normals(seed, (B, T, H, 2 * half), (B, T, K, 2 * half), dtype=dtype)
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE) for x in (q, k))
        q, k = (strided(x.detach(), layout).requires_grad_() for x in (q, k))
    angles = normals(seed + 1, (1 if shared else B, T, half), dtype=torch.float32)[0]
    angles = angles.detach().to(DEVICE)
    cos, sin = strided(angles.cos(), other), strided(angles.sin(), other)
    assert_as_good_as_torch(e.rotate_pair_triton, e.rotate_pair_obvious, (q, k), cos, sin)


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_numbers_more_than_two_billion_apart():
    q, k = normals(0, (1, 4, 1, 16), (1, 4, 1, 16), dtype=torch.float16)
    rows, _ = far(torch.float16, 4, 16)
    rows.copy_(q.detach()[0, :, 0])
    angles = torch.rand(1, 4, 8)
    both = ((rows[None, :, None], k), (q, k), (k, rows[None, :, None]), (k, q))
    (a, _), (b, _), (_, c), (_, d) = (
        e.rotate_pair_triton(*x, angles.cos(), angles.sin()) for x in both
    )
    assert torch.equal(a, b) and torch.equal(c, d)


def test_bad_input_gets_one_sentence():
    x, y = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="gate"):
        e.swiglu_triton(x, y)
    with pytest.raises(ValueError, match="gate"):
        e.swiglu_triton(x, x.half())
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        e.gelu_triton(x.long())
    q = torch.zeros(1, 2, 1, 6, device=DEVICE)
    with pytest.raises(ValueError, match="cos"):
        e.rotate_pair_triton(q, q, x, x)
    with pytest.raises(ValueError, match="even D"):
        e.rotate_pair_triton(q[..., :5], q[..., :5], x, x)
    angles = torch.zeros(1, 2, 3, device=DEVICE)
    for k in (torch.zeros(1, 3, 1, 6, device=DEVICE), q[..., :4], q.half()):
        with pytest.raises(ValueError, match="of one dtype"):
            e.rotate_pair_triton(q, k, angles, angles)
    with pytest.raises(ValueError, match="sin"):  # one for each sample, and one for all
        e.rotate_pair_triton(*[q.repeat(2, 1, 1, 1)] * 2, angles.repeat(2, 1, 1), angles)


def test_two_runs_give_the_same_bits():
    up, gate = normals(0, (7, 9), (7, 9), dtype=torch.float16, device=DEVICE)
    first, second = (results(e.swiglu_triton, (up, gate)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def launches(dtype: torch.dtype):
    """A call for the compiler: each function forward and backward."""

    def call():
        up, gate = (torch.empty(4096, 4096, dtype=dtype, requires_grad=True) for _ in range(2))
        for y in (e.swiglu_triton(up, gate), e.gelu_triton(up), e.gelu_tanh_triton(up)):
            y.backward(torch.empty_like(y))
        q = torch.empty(2, 1024, 16, 128, dtype=dtype, requires_grad=True)
        angles = torch.empty(1, 1024, 64)
        q1, k1 = e.rotate_pair_triton(q, q[:, :, :4], angles, angles)
        (q1.sum() + k1.sum()).backward()

    return call


COMPILE = {"bf16": launches(torch.bfloat16), "fp32": launches(torch.float32)}
