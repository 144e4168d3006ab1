"""Each fast function of kernels/ equals its obvious version, gradients included.

Attention's laws stand in test_attention.py, those of the loss in test_step.py.
"""

import pytest
import torch
from helpers import assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from kernels.elementwise import rotate, rotate_obvious
from kernels.norm import rmsnorm, rmsnorm_obvious

size = st.integers(1, 9)


def with_gradients(function, inputs, *rest):
    """The result, and the gradients of a function of it that weighs every element differently."""
    out = function(*inputs, *rest)
    return [out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)]


@given(seeds, size, size, size, st.floats(1e-8, 1), st.booleans())
def test_rmsnorm(seed, B, T, C, eps, strided):
    x, w = normals(seed, (B, T, C), (C,))
    if strided:
        x = x.detach().transpose(0, 1).requires_grad_()
    pairs = (with_gradients(f, (x, w), eps) for f in (rmsnorm, rmsnorm_obvious))
    for got, want in zip(*pairs, strict=True):
        assert_close(got, want, 1e-11)


@given(seeds, size, size, size, size, st.booleans())
def test_rotate(seed, B, T, H, half, shared):
    (x,) = normals(seed, (B, T, H, 2 * half))
    angles = normals(seed + 1, (1 if shared else B, T, half))[0].detach()
    pairs = (with_gradients(f, (x,), angles.cos(), angles.sin()) for f in (rotate, rotate_obvious))
    for got, want in zip(*pairs, strict=True):
        assert_close(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_in_low_precision_is_as_good_as_the_obvious_one(dtype):
    x, w = normals(0, (64, 96), (96,), dtype=dtype)
    exact = with_gradients(
        rmsnorm_obvious, [t.detach().double().requires_grad_() for t in (x, w)], 1e-5
    )
    fast, slow = (with_gradients(f, (x, w), 1e-5) for f in (rmsnorm, rmsnorm_obvious))
    for got, low, want in zip(fast, slow, exact, strict=True):
        assert (got - want).abs().max() <= 2 * (low - want).abs().max() + 1e-6
