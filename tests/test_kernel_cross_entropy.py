"""Laws of kernels/cross_entropy.py; those of the plain loss on a CPU stand in test_step.py too."""

import mmap

import numpy as np
import pytest
import torch
from helpers import (
    CUDA,
    DEVICE,
    LOW,
    assert_as_good_as_torch,
    assert_close,
    layouts,
    normals,
    results,
    seeds,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st

import kernels.cross_entropy as ce
from kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_obvious, cross_entropy_triton

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
OPTIONS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1), (0.05, 1.0), (1e-2, 0.4)]  # z-loss, smoothing
options = st.sampled_from(OPTIONS)


@st.composite
def problems(draw, dtypes=LOW):
    """hidden, weight, either or none of which may ask for a gradient, targets, and chunk bytes."""
    N, C, V = draw(st.integers(0, 7)), draw(st.integers(1, 20)), draw(st.integers(1, 70))
    seed, dtype = draw(seeds), draw(st.sampled_from(dtypes))
    hidden, weight = normals(seed, (N, C), (V, C), dtype=dtype)
    if draw(st.booleans()):
        weight = weight.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    hidden, weight = (
        x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in (hidden, weight)
    )
    hidden, weight = (strided(x, draw(layouts)) for x in (hidden, weight))
    asks = draw(st.sampled_from([(True, True), (True, False), (False, True), (False, False)]))
    for x, asked in zip((hidden, weight), asks, strict=True):
        x.requires_grad_(asked)
    targets = targets_for(seed, N, V, draw(st.sampled_from([0, 0.3, 1])))
    return hidden, weight, targets, draw(st.sampled_from([1, 1000, 2**28]))


def targets_for(seed, N, V, ignored):
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random(N) < ignored, IGNORE, rng.integers(0, V, N))
    kind = [torch.int64, torch.int32][seed % 2]
    return torch.from_numpy(targets).to(DEVICE, torch.int64).repeat_interleave(2)[::2].to(kind)


def tensors(*shapes, dtype=torch.float32):
    """Normal tensors on the test's device, each with a gradient."""
    return [x.detach().to(DEVICE).requires_grad_() for x in normals(0, *shapes, dtype=dtype)]


def with_chunks_of(size, function, *arguments):
    before = ce.CHUNK_BYTES, ce.GPU_CHUNK_BYTES
    ce.CHUNK_BYTES, ce.GPU_CHUNK_BYTES = size, (size, size)
    try:
        return function(*arguments)
    finally:
        ce.CHUNK_BYTES, ce.GPU_CHUNK_BYTES = before


def obvious(hidden, weight, targets, z_loss=0.0, smoothing=0.0):
    """Ids of 32 bits are beyond torch's own cross-entropy."""
    return cross_entropy_obvious(hidden, weight, targets.long(), z_loss, smoothing)


@given(problems(), options)
def test_triton_is_as_good_as_torch(problem, options):
    hidden, weight, targets, size = problem
    with_chunks_of(
        size, assert_as_good_as_torch,
        cross_entropy_triton, obvious, [hidden, weight], targets, *options,
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", LOW)
def test_every_option_s_value_and_gradients(dtype, options):
    inputs = tensors((7, 24), (50, 24), dtype=dtype)
    targets = torch.tensor([0, 49, IGNORE, 7, 48, IGNORE, 31], device=DEVICE)
    for size in (2**28, 300):  # one chunk, and several of one or two rows
        with_chunks_of(
            size, assert_as_good_as_torch,
            cross_entropy_triton, obvious, inputs, targets, *options,
        )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_in_torch_s_chunks(options):
    inputs = normals(0, (7, 24), (50, 24))
    targets = torch.tensor([0, 49, IGNORE, 7, 48, IGNORE, 31])
    for size in (2**28, 300):
        got = with_chunks_of(size, results, cross_entropy, inputs, targets, *options)
        for g, want in zip(got, results(obvious, inputs, targets, *options), strict=True):
            assert_close(g, want, 1e-11)


@given(problems([torch.float64]), options)
def test_torch_s_chunks_are_the_obvious_loss(problem, options):
    hidden, weight, targets, size = (x.cpu() if isinstance(x, torch.Tensor) else x for x in problem)
    hidden, weight = (x.detach().requires_grad_(x.requires_grad) for x in (hidden, weight))
    got = with_chunks_of(size, results, cross_entropy, [hidden, weight], targets, *options)
    want = results(obvious, [hidden, weight], targets, *options)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 1e-11)


@given(seeds, options)
def test_the_obvious_loss_is_the_papers(seed, options):
    """Token by token: (1−e)·nll + e·mean over V of −log p + z·(log Σ exp)²."""
    hidden, weight = normals(seed, (6, 4), (9, 4))
    targets = targets_for(seed, 6, 9, 0.3)
    z, e = options
    want = 0.0
    for h, target in zip(hidden.detach().numpy(), targets.tolist(), strict=True):
        if target != IGNORE:
            s = weight.detach().numpy() @ h
            lse = np.log(np.exp(s).sum())
            want += (1 - e) * (lse - s[target]) + e * (lse - s).mean() + z * lse**2
    assert_close(obvious(hidden, weight, targets, z, e), want)


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_triton])
def test_all_ignored_is_zero_and_so_is_its_gradient(function):
    inputs = tensors((5, 8), (40, 8))
    targets = torch.full((5,), IGNORE, device=DEVICE)
    assert all((x == 0).all() for x in results(function, inputs, targets, 0.1, 0.1))


@pytest.mark.parametrize("dtype", LOW)
def test_large_logits_of_either_sign_survive(dtype):
    for sign in (1, -1):
        hidden = torch.tensor([[100.0], [-100.0]], dtype=dtype, device=DEVICE, requires_grad=True)
        weight = sign * torch.arange(1.0, 20.0, dtype=dtype, device=DEVICE)[:, None]
        weight.requires_grad_()
        targets = torch.tensor([0, 18], device=DEVICE)
        assert_as_good_as_torch(cross_entropy_triton, obvious, [hidden, weight], targets)


def test_two_runs_give_the_same_bits():
    inputs = tensors((9, 8), (70, 8), dtype=torch.float16)
    targets = targets_for(0, 9, 70, 0.2)
    runs = [results(cross_entropy_triton, inputs, targets, 0.1, 0.1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Recorder:
    """A kernel that notes whether it was asked for gradients."""

    def __init__(self, kernel):
        self.kernel, self.asked = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **settings):
            self.asked.append(settings["GRADIENT"])
            self.kernel[grid](*arguments, **settings)

        return launch


def test_gradients_nobody_asks_for_are_not_computed(monkeypatch):
    monkeypatch.setattr(ce, "rows_kernel", Recorder(ce.rows_kernel))
    hidden, weight = (x.detach() for x in tensors((3, 4), (5, 4)))
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    cross_entropy_triton(hidden, weight, targets)
    weight.requires_grad_()
    with torch.no_grad():
        cross_entropy_triton(hidden, weight, targets)
    cross_entropy_triton(hidden, weight, targets).backward()
    assert ce.rows_kernel.asked == [False, False, True]
    assert hidden.grad is None and weight.grad is not None


def test_chunks_are_alike_and_within_their_bytes():
    V, C = 50257, 768
    rows = ce.chunk_rows(32768, V, C, 2 * 50304)
    assert 200 << 20 < rows * 2 * 50304 <= 256 << 20
    assert 500 << 20 < ce.chunk_rows(32768, 131072, 4096, 2 * 131072) * 2 * 131072 <= 512 << 20
    assert ce.chunk_rows(10, V, C, 2 * 50304) == 10
    size = ce.chunk_rows(6000, V, C, 2 * 50304)  # three chunks, the last as good as full
    assert size == 2000


@pytest.mark.parametrize("dtype", LOW)
def test_the_incoming_gradient_is_not_rounded_to_16_bits(dtype):
    hidden, weight = tensors((3, 4), (5, 4), dtype=dtype)
    targets, third = torch.tensor([1, 2, 3], device=DEVICE), torch.tensor(1 / 3, device=DEVICE)
    one, scaled = (
        torch.autograd.grad(cross_entropy_triton(hidden, weight, targets), hidden, gradient)[0]
        for gradient in (torch.ones_like(third), third)
    )
    assert torch.equal(scaled, (one.float() * third).to(dtype))


def test_a_second_backward_pass_is_refused():
    hidden, weight = tensors((3, 4), (5, 4))
    loss = cross_entropy_triton(hidden, weight, torch.tensor([1, 2, 3], device=DEVICE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def launch_rows(logits, targets, losses, stride, V, width):
    ce.rows_kernel[(len(losses),)](
        logits, targets, losses, stride, V, width, 0.0, 0.0,
        IGNORED=IGNORE, SMOOTHED=False, GRADIENT=True,
    )  # fmt: skip


@pytest.mark.parametrize("target", [5, 2**40, -1, -101])
def test_a_target_that_is_no_id_makes_a_gpu_s_loss_nan(target):
    """The kernel reads nothing outside its row, and its neighbours' losses stay."""
    logits = torch.zeros(2, 64, device=DEVICE)
    losses = torch.empty(2, device=DEVICE)
    launch_rows(logits, torch.tensor([target, 0], device=DEVICE), losses, 64, 5, 64)
    assert losses[0].isnan() and losses[1].item() == pytest.approx(np.log(5))


@pytest.mark.parametrize("V, width", [(33, 64), (32, 32), (17, 24), (5, 8)])
def test_what_lies_behind_the_vocabulary_does_not_count(V, width):
    """NaN up to a row's end is not seen, and nothing behind the row's end is written."""
    rows = torch.full((3, width + 16), float("nan"), device=DEVICE)
    rows[:, :V] = normals(0, (3, V), dtype=torch.float32)[0].detach()
    rows[:, width:] = 7
    logits = rows[:, :V].clone().requires_grad_()
    targets, losses = torch.tensor([0, V - 1, IGNORE], device=DEVICE), rows.new_empty(3)
    launch_rows(rows, targets, losses, width + 16, V, width)
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    want.sum().backward()
    torch.testing.assert_close(losses, want.detach())
    torch.testing.assert_close(rows[:, :V], logits.grad)
    assert (rows[:, width:] == 7).all()


@pytest.mark.skipif(CUDA, reason="the memory of this machine is only promised")
def test_rows_beyond_two_to_the_31():
    """The same loss for rows 2³⁰ numbers apart; should an offset wrap, it still falls inside.

    Of the memory only the pages under the rows come to exist: the tensor that the interpreter is
    given holds the first row's start.
    """
    far, V = 2**30, 40
    promised = mmap.mmap(-1, 24 * 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    memory = np.frombuffer(promised, dtype=np.float32)[2 * far :]
    near = normals(1, (4, 64), dtype=torch.float32)[0].detach()
    for row in range(4):
        memory[row * far :][:64] = near[row]
    targets = torch.tensor([3, 39, 0, 17])
    losses, want = torch.empty(4), torch.empty(4)
    launch_rows(torch.from_numpy(memory[:64]), targets, losses, far, V, 64)
    launch_rows(near, targets, want, 64, V, 64)
    assert torch.equal(losses, want)
    for row in range(4):
        assert torch.equal(torch.from_numpy(memory[row * far :][:V].copy()), near[row, :V])


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_triton])
def test_bad_input_is_refused(function):
    hidden, weight = torch.zeros(3, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message):
            function(*arguments)

    refused("C must be the same", hidden, weight[:, :3], targets)
    refused("C must be the same", hidden[0], weight, targets)
    refused("targets are", hidden, weight, targets[:2])
    refused("of torch.float32", hidden, weight, targets.float())
    refused("smoothing is 1.5", hidden, weight, targets, 0.0, 1.5)
    if not CUDA:
        for wrong in (5, -1, -101):
            refused(f"targets hold {wrong}", hidden, weight, torch.tensor([0, wrong, IGNORE]))


def test_triton_refuses_what_it_cannot_do():
    hidden, weight = torch.zeros(3, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"hidden is torch\.float64"):
        cross_entropy_triton(hidden.double(), weight, targets)
    with pytest.raises(ValueError, match="weight is on meta"):
        cross_entropy_triton(hidden, weight.to("meta"), targets)
    with pytest.raises(ValueError, match="targets are on meta"):
        cross_entropy_triton(hidden, weight, targets.to("meta"))


def launched(dtype, z_loss=0.0, smoothing=0.0, grad=True, V=50257):
    """GPT-2's vocabulary, or Llama 3's, on the machine that only compiles."""
    hidden = torch.zeros(2, 16, dtype=dtype)
    weight = torch.zeros(V, 16, requires_grad=grad)
    cross_entropy_triton(hidden, weight, torch.zeros(2, dtype=torch.int64), z_loss, smoothing)


COMPILE = {
    "bf16": lambda: launched(torch.bfloat16),
    "bf16, z-loss and smoothing": lambda: launched(torch.bfloat16, 1e-4, 0.1),
    "bf16, loss only": lambda: launched(torch.bfloat16, grad=False),
    "bf16, V = 128256": lambda: launched(torch.bfloat16, V=128256),
    "fp16": lambda: launched(torch.float16),
    "fp32": lambda: launched(torch.float32, 1e-4, 0.1),
}
