"""Laws of kernels/int4.py: packing loses nothing, quantizing half a step, the product nothing."""

import pytest
import torch
from helpers import (
    CUDA,
    DEVICE,
    LOW,
    assert_as_good_as_torch,
    far,
    layouts,
    normals,
    seeds,
    strided,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import int4, launch
from kernels.int4 import (
    dequantize_int4,
    int4_linear,
    int4_linear_obvious,
    int4_linear_triton,
    pack_int4,
    quantize_int4_obvious,
    unpack_int4,
)

dtypes = st.sampled_from(LOW)
groups = st.sampled_from([32, 64, 128, 256, 1024])


def normal(seed, *shape, dtype=torch.float32):
    return normals(seed, shape, dtype=dtype)[0].detach().to(DEVICE)


def random_words(seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=rng).to(torch.int32).to(DEVICE)


# --- packing and quantizing -----------------------------------------------------------------------


@given(seeds, st.integers(0, 4), st.integers(1, 300))
def test_packing_is_a_bijection(seed, N, K):
    blocks = launch.ceil_div(K, 128)
    words = random_words(seed, N, 16 * blocks)
    codes = unpack_int4(words, 128 * blocks)
    assert torch.equal(pack_int4(codes), words)
    codes = codes[:, :K]
    packed = pack_int4(codes)
    assert packed.shape == words.shape and packed.dtype == torch.int32
    assert torch.equal(unpack_int4(packed, K), codes) and codes.dtype == torch.uint8
    assert (unpack_int4(packed, 128 * blocks)[:, K:] == 0).all()


def test_a_code_lies_where_the_layout_says():
    """Feature 128 b + 32 j + 2 i + half: word 16 b + i, bits 4 j + 16 half."""
    for b, j, i, half in [(0, 0, 0, 0), (0, 3, 15, 1), (1, 2, 5, 0), (1, 1, 7, 1)]:
        codes = torch.zeros(1, 256, dtype=torch.uint8)
        codes[0, 128 * b + 32 * j + 2 * i + half] = 5
        want = torch.zeros(1, 32, dtype=torch.int64)
        want[0, 16 * b + i] = 5 << (4 * j + 16 * half)
        assert torch.equal(pack_int4(codes), want.to(torch.int32))


@given(
    seeds, st.integers(1, 4), st.integers(1, 300), groups,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([-9.0, -1.0, 0.0, 1.0, 9.0]),
)  # fmt: skip
def test_a_weight_is_within_half_a_step(seed, N, K, group, dtype, shift):
    weight = (normal(seed, N, K) + shift).to(dtype)
    weight[0, : K // 2] = 0
    packed, scales, zeros = quantize_int4_obvious(weight, group)
    assert scales.shape == zeros.shape == (N, launch.ceil_div(K, group))
    assert scales.dtype == dtype and (zeros <= 15).all()
    got = dequantize_int4(packed, scales.double(), zeros, K, group)
    step = scales.double().repeat_interleave(group, 1)[:, :K]
    assert ((got - weight.double()).abs() <= step * (0.5 + 1e-6)).all()
    assert (got[weight == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_ends_of_a_group_are_within_half_a_step(dtype):
    """Ends ±7.5 steps from 0, of which one comes to lie beyond code 15 if the step is too small."""
    end = torch.linspace(1, 2, 100, device=DEVICE).to(dtype)
    weight = torch.stack((-end, end), 1)
    packed, scales, zeros = quantize_int4_obvious(weight, 32)
    got = dequantize_int4(packed, scales.double(), zeros, 2, 32)
    assert ((got - weight.double()).abs() <= scales.double() * (0.5 + 1e-6)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_a_member_of_a_group_without_it(sign):
    weight = sign * (torch.linspace(5, 6, 32, device=DEVICE))[None]
    packed, scales, zeros = quantize_int4_obvious(weight, 32)
    assert zeros.item() == (0 if sign == 1 else 15)
    error = (dequantize_int4(packed, scales, zeros, 32, 32) - weight).abs()
    assert (error <= scales * (0.5 + 1e-5)).all()


def test_a_group_of_zeros_or_of_tiny_numbers_is_no_special_case():
    weight = torch.zeros(2, 64)
    weight[1] = 1e-44
    packed, scales, zeros = quantize_int4_obvious(weight, 32)
    assert (scales > 0).all() and scales.isfinite().all()
    assert (dequantize_int4(packed, scales, zeros, 64, 32) == 0).all()


def test_codes_of_the_grid_s_own_points_come_back():
    """All 16 codes, in groups whose ends are codes 0 and 15."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 8)
    zeros = torch.tensor([[0], [7], [15]])
    weight = 0.5 * (codes.double() - zeros)
    packed, scales, got = quantize_int4_obvious(weight, 128)
    assert torch.equal(unpack_int4(packed, 128), codes) and torch.equal(got.long(), zeros)
    torch.testing.assert_close(scales, torch.full_like(scales, 0.5))


# --- product --------------------------------------------------------------------------------------


@st.composite
def problems(draw, most=35):
    """x, random words with scales and zero points, a bias or none, and the group."""
    M, N, K = draw(st.integers(0, most)), draw(st.integers(1, 35)), draw(st.integers(1, 700))
    seed, dtype, group = draw(seeds), draw(dtypes), draw(groups)
    shape = draw(st.sampled_from([(M, K), (M, 1, K)]))
    x = strided(normal(seed, *shape, dtype=dtype), draw(layouts))
    words, G = random_words(seed, N, launch.ceil_div(K, 128) * 16), launch.ceil_div(K, group)
    scales = strided(normal(seed + 1, N, G, dtype=dtype).abs() / 10, draw(layouts))
    rng = torch.Generator().manual_seed(seed)
    zeros = torch.randint(0, 16, (N, G), generator=rng, dtype=torch.uint8).to(DEVICE)
    zeros = zeros.T.contiguous().T if draw(st.booleans()) else zeros
    bias = strided(normal(seed + 2, N, dtype=dtype), draw(layouts)) if draw(st.booleans()) else None
    return x, strided(words, draw(layouts)), scales, zeros, bias, group


def check_problem(problem):
    x, words, scales, zeros, bias, group = problem
    assert_as_good_as_torch(
        lambda x, scales, bias: int4_linear_triton(x, words, scales, zeros, bias, group),
        lambda x, scales, bias: int4_linear_obvious(x, words, scales, zeros, bias, group),
        [x, scales, bias],
    )


@settings(max_examples=25)
@given(problems(), st.booleans())
def test_several_rows_are_as_good_as_torch(problem, tma):
    had = launch.has_tma
    launch.has_tma = had if tma else lambda device: False
    try:
        check_problem(problem)
    finally:
        launch.has_tma = had


@settings(max_examples=25)
@given(problems(most=1))
def test_one_row_is_as_good_as_torch(problem):
    check_problem(problem)


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_features_in_parts_are_as_good_as_torch(M, parts, monkeypatch):
    """Three parts of the seven blocks, of which the last holds one block, cut short."""
    monkeypatch.setattr(
        int4, "split", lambda M, N, blocks, device: (parts, 7 // parts + parts // 2)
    )
    x, bias = normal(0, M, 800), normal(1, 19)
    words, scales = random_words(0, 19, 7 * 16), normal(2, 19, 7)
    zeros = torch.full((19, 7), 9, dtype=torch.uint8, device=DEVICE)
    check_problem((x, words, scales, zeros, bias, 128))


@pytest.mark.parametrize("M", [1, 3, 40, 4096])
@pytest.mark.parametrize("N", [1, 64, 1000, 8192, 100_000])
@pytest.mark.parametrize("blocks", [1, 5, 32, 100])
def test_parts_cover_all_blocks(M, N, blocks):
    parts, span = int4.split(M, N, blocks, torch.device(DEVICE))
    assert parts >= 1 and (parts - 1) * span < blocks <= parts * span


@pytest.mark.parametrize("M", [1, 5])
def test_two_runs_give_the_same_bits(M):
    x, words = normal(0, M, 1500, dtype=torch.float16), random_words(0, 20, 12 * 16)
    scales = normal(1, 20, 12, dtype=torch.float16)
    zeros = torch.full((20, 12), 8, dtype=torch.uint8, device=DEVICE)
    runs = [int4_linear_triton(x, words, scales, zeros) for _ in range(2)]
    assert torch.equal(*runs)


def test_the_dispatch_is_the_same_function():
    x, weight = normal(0, 3, 200), normal(1, 6, 200)
    quantized = quantize_int4_obvious(weight, 64)
    want = x @ dequantize_int4(*quantized, 200, 64).T
    torch.testing.assert_close(int4_linear(x, *quantized, group=64), want)


# --- far and wrong --------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_rows_beyond_two_to_the_31():
    """Words, scales, zero points and y with 2³⁰ numbers from row to row; of K, the first block."""
    blocks, G, N = 2**26, 2**30, 4
    words, words_first = far(torch.int32, N, 16, 16 * blocks)
    scales, scales_first = far(torch.float16, N, 1, G)
    zeros, zeros_first = far(torch.uint8, N, 1, G)
    words.copy_(random_words(0, N, 16)), scales.copy_(normal(1, N, 1).half()), zeros.fill_(6)
    x = normal(2, 3, 128, dtype=torch.float16)
    near = [t.clone().contiguous() for t in (words, scales, zeros)]
    want = int4_linear_triton(x, *near)
    y = torch.empty(N, dtype=torch.float16)
    rest = N, 128, G, blocks, 1
    many = words_first, scales_first, zeros_first, None
    int4.vector_kernel[(2, 1)](x[0], *many, y, *rest, 150 << 23, GROUP=128)
    assert torch.equal(y, int4_linear_triton(x[0], *near))
    y, y_first = far(torch.float16, 3, N, 2**30)
    x_tuple = x, 128, 3, 128
    int4.product_kernel[(1, 1)](
        x_tuple, *near, None, y_first, 3, 2**30, 128, 1, 1, 1, size=4, wide=0,
        DTYPE=int4.TYPES[x.dtype], GROUP=128, TMA=False,
    )  # fmt: skip
    assert torch.equal(y, want)
    y = torch.empty(3, N, dtype=torch.float16)
    int4.product_kernel[(1, 1)](
        x_tuple, *many, y, 3, *rest, size=4, wide=0, DTYPE=int4.TYPES[x.dtype], GROUP=128,
        TMA=False,
    )  # fmt: skip
    assert torch.equal(y, want)
    part, part_first = far(torch.float32, 4, 16, 2**30)
    part.copy_(normal(3, 4, 16))
    total = torch.empty(16)
    int4.sum_kernel[(1,)](part_first, None, total, 4, 16, 2**30, BLOCK=16)
    torch.testing.assert_close(total, part.sum(0))


def test_bad_input_is_refused():
    x = torch.zeros(3, 200, device=DEVICE)
    words, scales, zeros = (t.to(DEVICE) for t in quantize_int4_obvious(torch.zeros(5, 200)))

    def refused(message, *arguments):
        for function in (int4_linear, int4_linear_triton):
            with pytest.raises(ValueError, match=message):
                function(*arguments)

    for group in (0, -128, 16, 48, 96, 200):
        refused("group is", x, words, scales, zeros, None, group)
    refused("packed is", x, words[:, :16], scales, zeros)
    refused("packed is", x[:, :0], words, scales, zeros)
    refused("packed is", x[:, :0], words[:, :0], scales[:, :0], zeros[:, :0])
    refused("packed is torch.int64", x, words.long(), scales, zeros)
    refused("scales is", x, words, scales, zeros, None, 64)
    refused("scales is torch.float16", x, words, scales.half(), zeros)
    refused("zeros is", x, words, scales, zeros[:4])
    refused("zeros is torch.int32", x, words, scales, zeros.int())
    refused("bias is", x, words, scales, zeros, scales[:, 0][:4])
    refused("bias is on meta|bias is", x, words, scales, zeros, scales[:, 0].to("meta"))
    refused("use torch.no_grad", x.requires_grad_(), words, scales, zeros)
    with torch.no_grad():
        assert int4_linear_triton(x, words, scales, zeros).shape == (3, 5)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        int4_linear_triton(x.detach().double(), words, scales, zeros)
    with pytest.raises(ValueError, match="scales is on meta"):
        int4_linear_triton(x.detach(), words, scales.to("meta"), zeros)


def launched(dtype, M=4096, N=8192, K=8192, group=128, bias=False):
    x, G = torch.zeros(M, K, dtype=dtype), launch.ceil_div(K, group)
    words = torch.zeros(N, launch.ceil_div(K, 128) * 16, dtype=torch.int32)
    scales, zeros = torch.zeros(N, G, dtype=dtype), torch.zeros(N, G, dtype=torch.uint8)
    int4_linear_triton(x, words, scales, zeros, torch.zeros(N) if bias else None, group)


COMPILE = {
    "bf16": lambda: launched(torch.bfloat16),
    "bf16, 1 row": lambda: launched(torch.bfloat16, M=1, bias=True),
    "bf16, 16 rows": lambda: launched(torch.bfloat16, M=16),
    "bf16, 1 row, groups of 32": lambda: launched(torch.bfloat16, M=1, group=32, K=1000),
    "fp16, 60 rows, groups of 64": lambda: launched(torch.float16, M=60, group=64, bias=True),
    "fp16, 1 row": lambda: launched(torch.float16, M=1),
    "fp32": lambda: launched(torch.float32),
    "fp32, 1 row": lambda: launched(torch.float32, M=1),
}
WGMMA = {"product_kernel"}
