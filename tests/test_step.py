"""Laws of step.py and of kernels/cross_entropy.py."""

import re
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import kernels.cross_entropy as ce
from bench import PlainTransformer
from kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_obvious
from model import PRESETS, ModelConfig, Transformer
from objectives import Batch
from optim import KINDS, OptimConfig, build
from run import UserError, load_tensors
from step import (
    LossScale,
    NotFinite,
    accumulate,
    clip,
    cpu_flags,
    evaluate,
    loss_sum,
    matmul_peak,
    pick_device,
    pick_dtype,
    replay,
    update,
    write_replay,
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


@given(seeds, st.floats(0.01, 100), st.sampled_from([1.0, 2.0**-4, 2.0**10]))
def test_clipping_keeps_the_direction_and_bounds_the_length(seed, largest, scale):
    """Behind the division by the loss's scale."""
    params = normals(seed, (3, 4), (5,), (2, 2))
    for p in params[:2]:  # the third has no gradient
        p.grad = p.detach() * 3 * scale
    before = torch.cat([p.grad.flatten() / scale for p in params[:2]])
    norm = clip(params, largest, "norm", scale)
    after = torch.cat([p.grad.flatten() for p in params[:2]])
    assert norm == pytest.approx(before.norm().item())
    assert_close(after, before * min(1, largest / norm), 1e-12)


def test_clipping_is_torch_s():
    params, twins = normals(0, (3, 4), (5,)), normals(0, (3, 4), (5,))
    for p in (*params, *twins):
        p.grad = p.detach().clone()
    clip(params, 1.0)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    for p, q in zip(params, twins, strict=True):
        assert_close(p.grad, q.grad, 1e-6)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("by", ["norm", "value"])
def test_a_norm_that_is_no_number_clips_nothing_by_it(by):
    """Finite gradients whose squares are not, for whoever looks for the fault."""
    (p,) = normals(0, (4,))
    p = p.detach().float().requires_grad_()
    p.grad = torch.full((4,), -1e30)
    assert clip([p], 1.0, by) == np.inf
    assert torch.equal(p.grad, torch.full((4,), -1e30 if by == "norm" else -1.0))


def test_clipping_by_zero_is_no_clipping():
    (p,) = normals(0, (100,))
    p.grad = p.detach() * 100
    assert clip([p], 0.0) > 100 and torch.equal(p.grad, p.detach() * 100)


@given(seeds, st.floats(0.01, 3), st.sampled_from([1.0, 2.0**10]))
def test_clipping_by_value_is_of_each_number_and_torch_s(seed, largest, scale):
    params, twins = normals(seed, (3, 4), (5,)), normals(seed, (3, 4), (5,))
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = p.detach() * scale, q.detach().clone()
    whole = torch.cat([q.grad.flatten() for q in twins]).norm().item()
    assert clip(params, largest, "value", scale) == pytest.approx(whole)
    torch.nn.utils.clip_grad_value_(twins, largest)
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.grad, q.grad)


RATES = {"sgd": 0.3, "adafactor": 0.1}


@pytest.mark.parametrize("name", KINDS)
def test_updates_learn_a_row_by_heart(name):
    model, batch = Transformer(SMALL), batch_for(0, 1)
    config = OptimConfig(name)
    optimizer, lr = build(model.named_parameters(), config), RATES.get(name, 0.01)
    losses = [update(model, [batch], optimizer, lr, config).loss for _ in range(60)]
    assert losses[0] == pytest.approx(np.log(11), rel=0.2) and losses[-1] < 0.1


# --- fp16 -----------------------------------------------------------------------------------------


@given(seeds, st.integers(-3, 20))
def test_a_scaled_loss_gives_the_gradient_of_an_unscaled_one(seed, power):
    """In fp32 bit for bit: a power of 2 changes exponents only."""
    grads = []
    for scale in (1.0, 2.0**power):
        model = double_model(seed).float()
        accumulate(model, [batch_for(seed, 2), batch_for(seed + 1, 1)], None, scale)
        norm = clip(model.parameters(), 0.0, "norm", scale)
        grads.append((norm, [p.grad for p in model.parameters()]))
    assert grads[0][0] == grads[1][0]
    assert all(map(torch.equal, grads[0][1], grads[1][1]))


def test_gradients_too_small_for_fp16_are_there_with_a_scale():
    def gradient(dtype, scale):
        model = double_model(2).float()
        loss = loss_sum(model, batch_for(0, 2), dtype) * 1e-7  # as in a mean over many tokens
        (loss * scale).backward()
        return torch.cat([p.grad.flatten() / scale for p in model.parameters()])

    want, lost, kept = gradient(None, 1), gradient(torch.float16, 1), gradient(torch.float16, 2**16)
    assert (lost - want).norm() > 0.1 * want.norm()
    assert (kept - want).norm() < 0.01 * want.norm()


def test_the_scale_halves_at_an_overflow_and_doubles_after_patience():
    scale, seen = LossScale(8.0, patience=3), []
    for finite in (True, True, False, *[True] * 7, False):
        scale.after(finite)
        seen.append(scale.scale)
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 16, 16, 8]
    twin = LossScale()
    twin.load_tensors(scale.tensors())
    assert (twin.scale, twin.good) == (scale.scale, scale.good)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_overflows_moves_nothing_but_the_scale(name):
    model, config, scale = Transformer(SMALL), OptimConfig(name), LossScale(2.0**60)
    optimizer = build(model.named_parameters(), config)
    before = [x.clone() for x in (*model.state_dict().values(), *optimizer.tensors().values())]
    made = update(model, [batch_for(0, 1)], optimizer, 0.1, config, torch.float16, scale)
    after = [*model.state_dict().values(), *optimizer.tensors().values()]
    assert not made.moved and scale.scale == 2.0**59 and all(map(torch.equal, before, after))
    while not made.moved:
        made = update(model, [batch_for(0, 1)], optimizer, 0.1, config, torch.float16, scale)
    assert made.norm < np.inf and not torch.equal(before[0], next(model.parameters()))


# --- what is no number ----------------------------------------------------------------------------


def spoil(model, where):
    """Make one thing of a step no number, and say how it must be named."""
    with torch.no_grad():
        if where == "weight":
            model.layers[1].ffn.up.weight[2, 3] = np.nan
            return "the weight layers.1.ffn.up.weight is not finite"
        if where == "layer":
            model.layers[1].ffn.up.weight.fill_(3e38)
            return "what layers.1.ffn.up computes from batch 0 is not finite"
        model.embedding.copy_(6e4 * model.embedding.sign())  # fp16 ends at 65,504
        model.norm.weight.fill_(1e-6)  # logits are small all the same
    return "the gradient of .* is not finite, the loss is"


@pytest.mark.parametrize("where", ["weight", "layer", "gradient"])
def test_what_is_no_number_is_named_moves_nothing_and_is_seen_again(where, tmp_path):
    model, config = Transformer(SMALL), OptimConfig("adamw")
    optimizer = build(model.named_parameters(), config)
    one = batch_for(0, 1)
    one.targets[:, 1:] = IGNORE
    batches, dtype = [one, replace(one, targets=torch.full_like(one.targets, IGNORE))], None
    if where == "gradient":
        dtype = torch.float16
    said = spoil(model, where)
    before = [x.clone() for x in (*model.state_dict().values(), *optimizer.tensors().values())]
    with pytest.raises(NotFinite, match=said):
        update(model, batches, optimizer, 0.1, config, dtype)
    after = [*model.state_dict().values(), *optimizer.tensors().values()]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    write_replay(path := tmp_path / "step.safetensors", model, batches, dtype)
    assert re.search(said, replay(path))


def test_a_loss_that_is_no_number_is_not_the_loss_scale_s_fault():
    model, config, scale = Transformer(SMALL), OptimConfig("adamw"), LossScale()
    optimizer = build(model.named_parameters(), config)
    said = spoil(model, "layer")
    with pytest.raises(NotFinite, match=said):
        update(model, [batch_for(0, 1)], optimizer, 0.1, config, torch.float16, scale)
    assert scale.scale == 2.0**16
    scale.scale = 0.5  # below 1 a scale helps no more
    model = Transformer(SMALL)
    spoil(model, "gradient")
    one = batch_for(0, 1)
    one.targets[:, 1:] = IGNORE
    optimizer = build(model.named_parameters(), config)
    with pytest.raises(NotFinite, match="the gradient of"):
        model.embedding.data.mul_(1.05)
        update(model, [one], optimizer, 0.1, config, torch.float16, scale)


def test_a_replay_of_a_good_step_says_so(tmp_path):
    model, batches = Transformer(SMALL), [batch_for(i, 2) for i in (0, 1)]
    write_replay(path := tmp_path / "step.safetensors", model, batches, torch.bfloat16)
    loss, _ = accumulate(model, batches, torch.bfloat16)
    assert f"loss {loss:.4f}" in replay(path) and "all is finite" in replay(path)


def test_a_file_that_is_no_replay_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read"):
        replay(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a file that"):
        replay(path)
    write_replay(path, Transformer(SMALL), [batch_for(0, 1)], None)
    tensors = load_tensors(path)
    del tensors["batch/0/targets"]
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(tensors, path, about)
    with pytest.raises(UserError, match="does not fit together"):
        replay(path)


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
