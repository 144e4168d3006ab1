"""Laws of kernels/int8.py: integers to the same bits as torch, products exact, outliers apart."""

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
    poisoned,
    seeds,
    strided,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import int8, launch
from kernels.int8 import (
    int8_linear,
    int8_linear_obvious,
    int8_linear_triton,
    outlier_columns,
    quantize_columns,
    quantize_columns_obvious,
    quantize_columns_triton,
    quantize_rows,
    quantize_rows_obvious,
    quantize_rows_triton,
)

dtypes = st.sampled_from(LOW)


def normal(seed, *shape, dtype=torch.float32):
    return normals(seed, shape, dtype=dtype)[0].detach().to(DEVICE)


def some_columns(seed, K, k):
    """k different columns, in no order."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randperm(K, generator=rng)[:k].to(DEVICE)


# --- quantization ---------------------------------------------------------------------------------


@given(seeds, st.integers(0, 5), st.integers(1, 70), dtypes, layouts, st.integers(0, 5))
def test_rows_are_quantized_to_torch_s_bits(seed, M, K, dtype, layout, k):
    x = normal(seed, M, K, dtype=dtype) * 3
    x[: M // 3] = 0
    columns = some_columns(seed, K, min(k, K)) if k else None
    with poisoned():
        got = quantize_rows_triton(strided(x, layout), columns)
    for g, want in zip(got, quantize_rows_obvious(x, columns), strict=True):
        assert g.dtype == want.dtype and torch.equal(g, want)


@given(seeds, st.integers(0, 20), st.integers(1, 11), dtypes, layouts)
def test_columns_are_quantized_to_torch_s_bits(seed, M, K, dtype, layout):
    x = normal(seed, M, K, dtype=dtype)
    x[:, : K // 3] = 0
    if M:
        want = quantize_columns_obvious(x)
    else:
        want = x.to(torch.int8), x.new_zeros(K, dtype=torch.float32)
    with poisoned():
        got = quantize_columns_triton(strided(x, layout))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


@pytest.mark.parametrize("function", [quantize_rows_obvious, quantize_rows_triton])
@pytest.mark.parametrize("dtype", LOW)
def test_an_integer_is_within_half_a_step(function, dtype):
    x = normal(0, 5, 50, dtype=dtype)
    x[1] = 0
    q, scale = function(x)
    error = (q.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()
    assert torch.equal(q.abs().amax(1), torch.tensor([127, 0, 127, 127, 127], device=DEVICE))
    assert scale[1] == 0 and (q != -128).all()


@pytest.mark.parametrize("function", [quantize_rows_obvious, quantize_rows_triton])
def test_halves_go_to_the_even_neighbour(function):
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=DEVICE)
    q, scale = function(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]] and scale.item() == 1


@pytest.mark.parametrize("function", [quantize_rows_obvious, quantize_rows_triton])
def test_tiny_rows_are_zero_and_infinite_ones_are_seen(function):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [[1e-37, 0], [2.0**-119, -(2.0**-120)], [inf, 1], [-inf, nan], [2, nan], [3e38, -1e38]]
    ).to(DEVICE)
    q, scale = function(x)
    assert q.tolist() == [[0, 0], [127, -64], [0, 0], [0, 0], [0, 0], [127, -42]]
    want = torch.tensor([0, 2.0**-119 / 127, inf, nan, nan, 3e38 / 127])
    torch.testing.assert_close(scale.cpu(), want, equal_nan=True, rtol=0, atol=0)
    weight, ones = torch.ones(1, 2, dtype=torch.int8, device=DEVICE), torch.ones(1, device=DEVICE)
    y = int8_linear_triton(x, weight, ones)
    assert y.isfinite()[:, 0].tolist() == [True, True, False, False, False, True]


def test_outlier_columns_are_those_that_reach_the_threshold():
    x = torch.zeros(2, 3, 5, device=DEVICE)
    x[0, 1, 3], x[1, 2, 0], x[1, 0, 4] = -6.0, 7.0, 5.9
    assert outlier_columns(x).tolist() == [0, 3]
    assert outlier_columns(x, 5.0).tolist() == [0, 3, 4]
    assert outlier_columns(x.half(), 8.0).tolist() == []


# --- product --------------------------------------------------------------------------------------


def padded(q):
    """The same integers in rows that start at multiples of 16 bytes, whatever their length."""
    rows = torch.full((len(q), launch.ceil_div(q.shape[1], 16) * 16), 99, dtype=torch.int8)
    rows[:, : q.shape[1]] = q
    return rows.to(DEVICE)[:, : q.shape[1]]


@st.composite
def problems(draw):
    """x, a quantized weight, a bias or none, outlier columns or none, their weights or none."""
    M, N, K = draw(st.integers(0, 35)), draw(st.integers(1, 35)), draw(st.integers(1, 70))
    seed, dtype = draw(seeds), draw(dtypes)
    shape = draw(st.sampled_from([(M, K), (2, M // 2, K)]))
    x = strided(normal(seed, *shape, dtype=dtype), draw(layouts))
    weight = normal(seed + 1, N, K, dtype=dtype)
    q, scale = quantize_rows_obvious(weight)
    q = padded(q) if draw(st.booleans()) else strided(q, draw(layouts))
    scale = strided(scale, draw(layouts))
    bias = strided(normal(seed + 2, N, dtype=dtype), draw(layouts)) if draw(st.booleans()) else None
    columns = kept = None
    if draw(st.booleans()):
        columns = some_columns(seed, K, draw(st.integers(0, min(K, 20))))
        x[..., columns] *= 50
        kept = strided(weight[:, columns], draw(layouts)) if draw(st.booleans()) else None
    return x, q, scale, bias, columns, kept


@settings(max_examples=40)
@given(problems(), st.booleans())
def test_triton_is_as_good_as_torch(problem, tma):
    had = launch.has_tma
    launch.has_tma = had if tma else lambda device: False
    try:
        x, q, scale, bias, columns, kept = problem
        assert_as_good_as_torch(
            lambda x, scale, bias, kept: int8_linear_triton(x, q, scale, bias, columns, kept),
            lambda x, scale, bias, kept: int8_linear_obvious(x, q, scale, bias, columns, kept),
            [x, scale, bias, kept],
        )
    finally:
        launch.has_tma = had


def integers(seed, *shape):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=rng).to(DEVICE)


@given(seeds, st.integers(1, 35), st.integers(1, 35), st.sampled_from([1, 32, 48, 100]))
def test_the_sum_of_integers_is_exact(seed, M, N, K):
    """Rows that hold 127 have scale 1, and sums below 2²⁴ are fp32 numbers: nothing is rounded."""
    x, weight = integers(seed, M, K), integers(seed + 1, N, K)
    x[:, 0] = 127
    got = int8_linear_triton(x.float(), weight.to(torch.int8), torch.ones(N, device=DEVICE))
    assert torch.equal(got.long(), (x[:, None] * weight).sum(2))


def test_the_longest_row_does_not_overflow():
    x = torch.full((1, int8.MOST), 127.0, device=DEVICE)
    weight = torch.full((1, int8.MOST), -127, dtype=torch.int8, device=DEVICE)
    y = int8_linear_triton(x, weight, torch.ones(1, device=DEVICE))
    assert y.item() == -127 * 127 * int8.MOST


def test_more_than_eight_tiles_of_rows():
    """They take turns eight at a time."""
    x, weight = integers(0, 150, 8), integers(1, 40, 8)
    x[:, 0] = 127
    with poisoned():
        got = int8_linear_triton(x.float(), weight.to(torch.int8), torch.ones(40, device=DEVICE))
    assert torch.equal(got.long(), (x[:, None] * weight).sum(2))


@given(seeds, st.integers(1, 20), layouts, layouts)
def test_outliers_are_gathered_from_any_layout(seed, k, layout, other):
    x, columns = strided(normal(seed, 4, 20), layout), strided(some_columns(seed, 20, k), other)
    with poisoned():
        _, _, outliers = int8.quantized(x, columns)
    assert torch.equal(outliers[:, :k], x[:, columns]) and (outliers[:, k:] == 0).all()


@pytest.mark.parametrize("function", [int8_linear_obvious, int8_linear_triton])
@pytest.mark.parametrize("given_weight", [False, True])
def test_outliers_apart_save_the_rest(function, given_weight):
    """Six features sixty times as large: plain int8 loses the others, outliers apart do not."""
    x, weight = normal(0, 20, 128, dtype=torch.float16), normal(1, 24, 128, dtype=torch.float16)
    x[:, 5:125:20] *= 60
    q, scale = quantize_rows_obvious(weight)
    columns = outlier_columns(x)
    assert columns.tolist() == list(range(5, 125, 20))
    kept = weight[:, columns] if given_weight else None
    true = x.double() @ (q.double() * scale.double()[:, None]).T
    if given_weight:
        true = x.double() @ torch.where(
            torch.isin(torch.arange(128, device=DEVICE), columns),
            weight.double(), q.double() * scale.double()[:, None],
        ).T  # fmt: skip

    def error(y):
        return ((y.double() - true).norm() / true.norm()).item()

    plain = error(function(x, q, scale))
    apart = error(function(x, q, scale, None, columns, kept))
    assert apart < 2e-3 < 6e-3 < plain


@pytest.mark.parametrize("function", [int8_linear_obvious, int8_linear_triton])
def test_all_columns_or_none_may_be_outliers(function):
    x, weight = normal(0, 3, 20, dtype=torch.float32), normal(1, 4, 20, dtype=torch.float32)
    q, scale = quantize_rows_obvious(weight)
    every = torch.arange(20, device=DEVICE)
    torch.testing.assert_close(function(x, q, scale, None, every, weight), x @ weight.T)
    assert torch.equal(function(x, q, scale, None, every[:0]), function(x, q, scale))


def test_a_negative_column_counts_from_the_end():
    x, weight = normal(0, 3, 20), normal(1, 4, 20)
    q, scale = quantize_rows_obvious(weight)
    got = int8_linear_triton(x, q, scale, None, torch.tensor([-1, 2], device=DEVICE))
    want = int8_linear_triton(x, q, scale, None, torch.tensor([19, 2], device=DEVICE))
    assert torch.equal(got, want)


def test_two_runs_give_the_same_bits():
    x, weight = normal(0, 20, 100, dtype=torch.float16), normal(1, 24, 100)
    q, scale = quantize_rows_obvious(weight)
    runs = [int8_linear_triton(x, q, scale, None, some_columns(0, 100, 9)) for _ in range(2)]
    assert torch.equal(*runs)


def test_the_dispatch_is_the_same_function():
    x, weight = normal(0, 5, 40), normal(1, 6, 40)
    q, scale = quantize_rows(weight)
    assert torch.equal(q, quantize_rows_obvious(weight)[0])
    assert torch.equal(quantize_columns(weight)[0], quantize_columns_obvious(weight)[0])
    torch.testing.assert_close(int8_linear(x, q, scale), int8_linear_obvious(x, q, scale))


# --- far and wrong --------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_rows_beyond_two_to_the_31():
    """x and W with rows 2³⁰ numbers apart, and y with as many numbers in a row."""
    apart, K = 2**30, 40
    x, x_first = far(torch.float16, 4, K)
    q, q_first = far(torch.int8, 4, K)
    y, y_first = far(torch.float16, 4, 16)
    weight = torch.zeros(16, K, dtype=torch.int8)
    weight[:4] = integers(1, 4, K)
    x.copy_(normal(0, 4, K, dtype=torch.float16))
    scale, ones = torch.empty(4), torch.ones(16)
    int8.rows_kernel[(4,)](
        x_first, q_first, scale, None, None, None, K, 0, 0, apart, 1, apart,
        WIDTH=64, THIN=1, TINY=int8.TINY,
    )  # fmt: skip
    for got, want in zip((q, scale), quantize_rows_obvious(x), strict=True):
        assert torch.equal(got, want)
    W, W_first = far(torch.int8, 16, K)
    W.copy_(weight)
    int8.product_kernel[(1,)](
        (q_first, apart, 4, K), (W_first, apart, 16, K), scale, ones, None, None, None, y_first,
        4, apart, K, 0, 0, 0, 0, size=16, TMA=False,
    )  # fmt: skip
    assert torch.equal(y, int8_linear_obvious(x, weight, ones))


def test_bad_input_is_refused():
    x = torch.zeros(3, 4, device=DEVICE)
    q, scale = torch.zeros(5, 4, dtype=torch.int8, device=DEVICE), torch.zeros(5, device=DEVICE)
    columns = torch.tensor([1, 2], device=DEVICE)

    def refused(message, *arguments):
        for function in (int8_linear, int8_linear_triton):
            with pytest.raises(ValueError, match=message):
                function(*arguments)

    refused("same K", x[:, :3], q, scale)
    refused("of torch.float32", x, q.float(), scale)
    refused("1 to 65536", x.new_zeros(1, 70000), q.new_zeros(1, 70000), scale[:1])
    refused("weight_scale is", x, q, scale[:4])
    refused("bias is", x, q, scale, scale[:4])
    refused(r"bias is \(5,\) on meta", x, q, scale, scale.to("meta"))
    refused("columns are torch.int32", x, q, scale, None, columns.int())
    refused("columns is", x, q, scale, None, columns[None])
    refused("needs columns", x, q, scale, None, None, q.float())
    refused("weight_outlier is", x, q, scale, None, columns, q.float())
    refused("must have the same dtype", x, q, scale, None, columns, q[:, :2].half())
    refused("use torch.no_grad", x.requires_grad_(), q, scale)
    with torch.no_grad():
        assert int8_linear_triton(x, q, scale).shape == (3, 5)
    x = x.detach()
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        int8_linear_triton(x.double(), q, scale)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        quantize_rows_triton(x.double())
    with pytest.raises(ValueError, match="weight_scale is on meta"):
        int8_linear_triton(x, q, scale.to("meta"))
    for function in (quantize_rows_triton, quantize_columns_triton):
        with pytest.raises(ValueError, match="supported is"):
            function(x[0])


def launched(dtype, M=4096, N=4096, K=4096, k=0, given=False, bias=False):
    x = torch.zeros(M, K, dtype=dtype)
    weight, scale = torch.zeros(N, K, dtype=torch.int8), torch.zeros(N)
    columns = torch.arange(k) if k else None
    kept = torch.zeros(N, k, dtype=dtype) if given else None
    int8_linear_triton(x, weight, scale, torch.zeros(N, dtype=dtype) if bias else None,
                       columns, kept)  # fmt: skip


COMPILE = {
    "bf16": lambda: launched(torch.bfloat16),
    "bf16, 40 outliers, bias": lambda: launched(torch.bfloat16, k=40, given=True, bias=True),
    "fp16, 60 rows, outliers": lambda: launched(torch.float16, M=60, k=8),
    "bf16, K not a multiple of 16": lambda: launched(torch.bfloat16, K=1000, k=8),
    "fp32, few rows, bias": lambda: launched(torch.float32, M=7, bias=True),
    "fp32, outliers": lambda: launched(torch.float32, k=8),
    "bf16, columns": lambda: quantize_columns_triton(torch.zeros(64, 4096, dtype=torch.bfloat16)),
    "bf16, long row": lambda: quantize_rows_triton(torch.zeros(2, 32768, dtype=torch.bfloat16)),
}
WGMMA = {"product_kernel"}  # with few rows it is mma.sync, for which there is a case with fp32
