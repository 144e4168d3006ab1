"""RMSNorm and LayerNorm: fast versions equal the obvious ones, gradients included."""

import pytest
import torch
from helpers import (  # fmt: skip
    CUDA,
    DEVICE,
    LOW,
    assert_as_good_as_torch,
    assert_close,
    far,
    layouts,
    normals,
    on_device,
    results,
    seeds,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st

from kernels import norm

size = st.integers(1, 9)


@given(seeds, size, size, size, st.floats(1e-8, 1), layouts)
def test_torch_versions(seed, B, T, C, eps, layout):
    x, branch, w, b = normals(seed, (B, T, C), (B, T, C), (C,), (C,))
    x = strided(x, layout)
    for fast, obvious, inputs in (
        (norm.rmsnorm, norm.rmsnorm_obvious, (x, w)),
        (norm.layernorm, norm.layernorm_obvious, (x, w, b)),
        (norm.add_rmsnorm, norm.add_rmsnorm_obvious, (x, branch, w)),
        (norm.add_layernorm, norm.add_layernorm_obvious, (x, branch, w, b)),
    ):
        pairs = zip(results(fast, inputs, eps), results(obvious, inputs, eps), strict=True)
        for got, want in pairs:
            assert_close(got, want, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_in_low_precision_is_as_good_as_the_obvious_one(dtype):
    x, w = normals(0, (64, 96), (96,), dtype=dtype)
    assert_as_good_as_torch(norm.rmsnorm, norm.rmsnorm_obvious, (x, w), 1e-5)


def test_squares_beyond_fp16_do_not_overflow():
    x = 100 * normals(0, (4, 96))[0].detach().half()
    assert x.float().norm(dim=-1).min() > 65504**0.5
    ones = torch.ones(96, dtype=torch.float16)
    for fast in (norm.rmsnorm, norm.rmsnorm_obvious):
        want = norm.rmsnorm_obvious(x.double(), ones.double(), 1e-5)
        assert_close(fast(x, ones, 1e-5).double(), want, 5e-3)


@pytest.mark.parametrize(
    "name, bias",
    [
        ("rmsnorm", False),
        ("add_rmsnorm", False),
        ("layernorm", False),
        ("layernorm", True),
        ("add_layernorm", False),
        ("add_layernorm", True),
    ],
)
@given(
    seeds, st.integers(0, 5), st.integers(1, 9), st.integers(1, 70), st.floats(1e-8, 1),
    st.sampled_from(LOW), layouts, layouts, layouts, st.booleans(), st.sampled_from([1, 1000]),
)  # fmt: skip
def test_triton_is_as_good_as_torch(
    name, bias, seed, B, T, C, eps, dtype, layout, other, third, fp32_weight, magnitude
):
    """Any rows, widths and strides; weights in fp32 beside a stream in 16 bits too.

    The squares of numbers around 1000 are beyond fp16.
    """
    shapes = (B, T, C), (B, T, C), (C,), (C,)
    x, branch, w, b = (x.to(DEVICE).detach().requires_grad_() for x in normals(seed, *shapes))
    x, branch = ((t.detach() * magnitude).to(dtype).requires_grad_() for t in (x, branch))
    x, branch = strided(x, layout), strided(branch, other)
    w, b = (t.detach().to(torch.float32 if fp32_weight else dtype).requires_grad_() for t in (w, b))
    w, b = strided(w, third), strided(b, third)
    inputs = [x, *([branch] if "add" in name else []), w]
    inputs += [b if bias else None] if "layernorm" in name else []
    functions = (getattr(norm, f"{name}_{kind}") for kind in ("triton", "obvious"))
    assert_as_good_as_torch(*functions, inputs, eps)


def test_only_the_sum_is_used():
    x, branch, w = normals(0, (3, 5), (3, 5), (5,), dtype=torch.float32, device=DEVICE)
    total, _ = norm.add_rmsnorm_triton(x, branch, w, 1e-5)
    dx, dbranch = torch.autograd.grad(total.sum(), (x, branch))
    assert (dx == 1).all() and (dbranch == 1).all()


def test_two_runs_give_the_same_bits():
    x, w, b = normals(0, (50, 33), (33,), (33,), dtype=torch.float16, device=DEVICE)
    first, second = (results(norm.layernorm_triton, (x, w, b), 1e-5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_rows_more_than_two_billion_numbers_apart():
    x, w, branch = normals(0, (4, 64), (64,), (4, 64), dtype=torch.float16)
    rows, _ = far(torch.float16, 4, 64)
    rows.copy_(x.detach())
    assert torch.equal(norm.rmsnorm_triton(rows, w, 1e-5), norm.rmsnorm_triton(x, w, 1e-5))
    want = norm.add_rmsnorm_triton(branch, x, w, 1e-5)
    for got, near in zip(norm.add_rmsnorm_triton(branch, rows, w, 1e-5), want, strict=True):
        assert torch.equal(got, near)


@pytest.mark.parametrize(
    "words, x, branch, w, b",
    [
        ("at most 16384", torch.zeros(2, 20000), None, torch.zeros(20000), None),
        ("at most 16384", torch.zeros(2, 0), None, torch.zeros(0), None),
        ("weight is", torch.zeros(2, 4), None, torch.zeros(5), None),
        ("bias is", torch.zeros(2, 4), None, torch.zeros(4), torch.zeros(5)),
        ("branch", torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(4), None),
        ("of torch.float16", torch.zeros(2, 4), torch.zeros(2, 4).half(), torch.zeros(4), None),
        ("x is torch.float64", torch.zeros(2, 4).double(), None, torch.zeros(4), None),
    ],
)
def test_bad_input_gets_one_sentence(words, x, branch, w, b):
    x, branch, w, b = map(on_device, (x, branch, w, b))
    with pytest.raises(ValueError, match=words):
        if branch is None:
            norm.layernorm_triton(x, w, b, 1e-5)
        else:
            norm.add_layernorm_triton(x, branch, w, b, 1e-5)


def test_the_widest_row():
    inputs = normals(0, (2, norm.WIDEST), (norm.WIDEST,), dtype=torch.float32, device=DEVICE)
    assert_as_good_as_torch(norm.rmsnorm_triton, norm.rmsnorm_obvious, inputs, 1e-5)


def launches(rows: int, C: int, dtype: torch.dtype, centre: bool):
    """A call for the compiler: the fused addition and norm, forward and backward."""

    def call():
        x, branch = (torch.empty(rows, C, dtype=dtype, requires_grad=True) for _ in range(2))
        w, b = (torch.empty(C, requires_grad=True) for _ in range(2))
        if centre:
            total, y = norm.add_layernorm_triton(x, branch, w, b, 1e-5)
        else:
            total, y = norm.add_rmsnorm_triton(x, branch, w, 1e-5)
        torch.autograd.grad((total, y), (x, w), (torch.empty_like(x), torch.empty_like(x)))

    return call


SIZES = [
    ("bf16", 64, False), ("bf16", 768, True), ("bf16", 4096, False), ("bf16", 8192, True),
    ("fp32", 768, True),
]  # fmt: skip
COMPILE = {
    f"{kind} {C} {'layernorm' if centre else 'rmsnorm'}": launches(
        4096, C, torch.bfloat16 if kind == "bf16" else torch.float32, centre
    )
    for kind, C, centre in SIZES
}
