"""Laws of step.py and of kernels/cross_entropy.py."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

import kernels.cross_entropy as ce
from bench import PlainTransformer
from kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_obvious
from model import PRESETS, ModelConfig, Transformer
from objectives import Batch
from optim import OPTIMIZERS, OptimConfig
from run import UserError
from step import (
    accumulate,
    clip_by_norm,
    cpu_flags,
    evaluate,
    loss_sum,
    matmul_peak,
    pick_device,
    pick_dtype,
    update,
)  # fmt: skip

size = st.integers(1, 9)
SMALL = ModelConfig(dim=16, layers=2, heads=4, context=12, vocab_size=11)


def targets_for(seed, N, V, ignored=0.3):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, V, N)
    targets[rng.random(N) < ignored] = IGNORE
    return torch.from_numpy(targets)


def batch_for(seed, B, T=7):
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 11, (B, T)))
    starts = torch.from_numpy(np.minimum(np.arange(T), rng.integers(0, T, (B, 1))))
    return Batch(ids, targets_for(seed, B * T, 11).view(B, T), starts)


def double_model(seed=0, config=SMALL):
    model = Transformer(config, seed).double()
    for p, x in zip(
        model.parameters(), normals(seed, *(p.shape for p in model.parameters())), strict=True
    ):
        p.data.copy_(0.3 * x.detach() + (p.dim() == 1))
    return model


# --- the loss -------------------------------------------------------------------------------------


@given(seeds, size, size, size, st.floats(0, 1), st.integers(1, 400))
def test_cross_entropy_is_the_sum_of_minus_log_p(seed, N, C, V, ignored, chunk_bytes):
    """Value and gradients, in chunks of any size, ignored targets included."""
    hidden, weight = normals(seed, (N, C), (V, C))
    targets = targets_for(seed, N, V, ignored)
    want = reference.cross_entropy(array(hidden), array(weight), array(targets), IGNORE)
    default, ce.CHUNK_BYTES = ce.CHUNK_BYTES, chunk_bytes
    try:
        results = []
        for function in (cross_entropy, cross_entropy_obvious):
            loss = function(hidden, weight, targets)
            assert_close(loss, want, 1e-11)
            results.append(torch.autograd.grad(3 * loss, (hidden, weight)))
    finally:
        ce.CHUNK_BYTES = default
    for got, obvious in zip(*results, strict=True):
        assert_close(got, obvious, 1e-11)


@given(seeds, size)
def test_ignored_targets_have_no_loss_and_no_gradient(seed, N):
    hidden, weight = normals(seed, (N, 5), (7, 5))
    loss = cross_entropy(hidden, weight, torch.full((N,), IGNORE))
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_cross_entropy_survives_large_logits():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = cross_entropy(hidden, weight, torch.tensor([0, 0]))
    assert loss == 2000
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


# --- the update -----------------------------------------------------------------------------------


@given(seeds, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_accumulation_is_the_mean_over_all_tokens(seed, sizes):
    """However rows are cut into micro-batches, the loss and the gradient are those of one batch."""
    whole = batch_for(seed, sum(sizes))
    parts = [Batch(*fields) for fields in zip(*(f.split(sizes) for f in whole), strict=True)]
    results = []
    for batches in ([whole], parts):
        model = double_model(seed)
        loss, tokens = accumulate(model, batches)
        results.append((loss, tokens, [p.grad for p in model.parameters()]))
    (one, n, grads), (two, m, others) = results
    assert n == m and one == pytest.approx(two, rel=1e-12)
    for got, want in zip(others, grads, strict=True):
        assert_close(got, want, 1e-12)


def test_a_micro_batch_without_targets_changes_nothing():
    model, twin = double_model(), double_model()
    full, empty = batch_for(0, 2), batch_for(1, 2)
    empty = replace(empty, targets=torch.full_like(empty.targets, IGNORE))
    assert accumulate(model, [full, empty])[0] == accumulate(twin, [full])[0]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    loss, tokens = accumulate(model, [empty])
    assert (loss, tokens) == (0, 0)


@given(seeds, st.floats(0.01, 100))
def test_clipping_keeps_the_direction_and_bounds_the_length(seed, largest):
    params = normals(seed, (3, 4), (5,), (2, 2))
    for p in params[:2]:  # the third has no gradient
        p.grad = p.detach() * 3
    before = torch.cat([p.grad.flatten() for p in params[:2]])
    norm = clip_by_norm(params, largest)
    after = torch.cat([p.grad.flatten() for p in params[:2]])
    assert norm == pytest.approx(before.norm().item())
    assert_close(after, before * min(1, largest / norm), 1e-12)


def test_clipping_is_torch_s():
    params, twins = normals(0, (3, 4), (5,)), normals(0, (3, 4), (5,))
    for p in (*params, *twins):
        p.grad = p.detach().clone()
    clip_by_norm(params, 1.0)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    for p, q in zip(params, twins, strict=True):
        assert_close(p.grad, q.grad, 1e-6)  # torch adds 1e-6 to the norm


def test_clipping_by_zero_is_no_clipping():
    (p,) = normals(0, (100,))
    p.grad = p.detach() * 100
    assert clip_by_norm([p], 0.0) > 100 and torch.equal(p.grad, p.detach() * 100)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_learn_a_row_by_heart(name):
    model, batch = Transformer(SMALL), batch_for(0, 1)
    optimizer = OPTIMIZERS[name](model.named_parameters(), OptimConfig(name), torch.float32)
    losses = [update(model, [batch], optimizer, 0.01, 1.0)[0] for _ in range(60)]
    assert losses[0] == pytest.approx(np.log(11), rel=0.2) and losses[-1] < 0.05


@given(seeds, st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_evaluation_is_a_sum_over_batches_and_leaves_no_gradient(seed, sizes):
    model, batches = double_model(seed), [batch_for(seed + i, B) for i, B in enumerate(sizes)]
    nats, tokens = evaluate(model, batches)
    assert nats == pytest.approx(sum(loss_sum(model, b).item() for b in batches), rel=1e-12)
    assert tokens == sum((b.targets != IGNORE).sum() for b in batches)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_gradients_are_near_those_of_fp32():
    """Relative error of the whole gradient below 2 %: bf16 keeps 8 bits, 2⁻⁸ = 0.4 % each."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = double_model(3).float()
        accumulate(model, [batch_for(0, 8)], dtype)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()


SMALL_GPT2 = replace(PRESETS["gpt2"], dim=16, layers=2, heads=4, context=12, vocab_size=11)
SMALL_LLAMA = replace(SMALL, kv_heads=2, tied=False, qk_norm=False, rope_scaling="linear")


@pytest.mark.parametrize(
    "config", [SMALL, SMALL_GPT2, SMALL_LLAMA, replace(SMALL_GPT2, bias=False)]
)
def test_plain_torch_computes_the_same_loss(config):
    """The network that the bench compares with is the same network."""
    model = double_model(1, config).float()
    batch = replace(batch_for(0, 3), lo=torch.zeros(3, 7, dtype=torch.long))
    want = loss_sum(model, batch) / (batch.targets != IGNORE).sum()
    assert_close(PlainTransformer(model)(batch.inputs, batch.targets), want, 1e-5)


# --- the machine ----------------------------------------------------------------------------------


def test_the_dtype_follows_the_processor_s_flags():
    cpu = torch.device("cpu")
    pays = {"avx512_bf16", "amx_bf16"} & cpu_flags()
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if pays else torch.float32)
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_device("cpu") == cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--device cuda"):
        pick_device("cuda")


def test_the_peak_is_a_plausible_number():
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32, 0.05) < 1e15
