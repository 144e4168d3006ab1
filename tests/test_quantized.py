"""Quantized linears: errors within their bounds, exact sums, the same bits from a file."""

import copy
import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import CUDA, DEVICE, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS, SHAPES, Batch, shaken
from safetensors.torch import save_file
from torch.nn import Parameter

import run
import split
from adapters import adapt
from attention import ATTENTIONS, Linear
from grids import NF4
from kernels.int4 import int4_linear_obvious, int4_linear_triton
from kernels.int8 import int8_linear_obvious, outlier_columns, quantize_rows
from lora import Adapter, adapted, exchange, linears, plain
from mesh import Group
from model import Transformer
from optim import learnt
from quantized import (
    Int8,
    Int8Linear,
    Packed,
    PackedLinear,
    assembled,
    int8_linear_on_cpu,
    packed,
    quantized,
)
from run import UserError
from split import Cut, Place

sizes = st.integers(1, 40)
FEW = st.lists(st.integers(0, 39), max_size=40)
bits = st.integers(2, 8)
hows = st.one_of(
    st.builds(Packed, bits=bits, group=st.sampled_from([0, 1, 4]), symmetric=st.booleans()),
    st.builds(Packed, group=st.sampled_from([0, 2, 4]), levels=st.just("normal")),
)


def some(W, how, bias=None, columns=()):
    """Either kind of linear for a matrix."""
    if isinstance(how, Packed):
        return PackedLinear.of(W, bias, how)
    return Int8Linear.of(W, bias, how, torch.tensor(sorted({c % W.shape[1] for c in columns}),
                                                    dtype=torch.int64))  # fmt: skip


def drawn(seed, *shapes):
    return [x.detach().float() for x in normals(seed, *shapes)]


# --- eight bits -----------------------------------------------------------------------------------


@given(sizes, sizes, sizes, FEW, seeds, st.booleans(), st.sampled_from([0.0, 1.5]))
def test_int8_is_the_obvious_product_to_the_bit(M, N, K, columns, seed, given_weights, size):
    """Rows of zeros, no outlier and nothing but outliers among them."""
    x, W = drawn(seed, (M, K), (N, K))
    x[:: 2 + seed % 3] *= size
    columns = torch.tensor(sorted({c for c in columns if c < K}), dtype=torch.int64)
    codes, scale = quantize_rows(W, columns)
    outliers = W[:, columns] if given_weights else None
    got = int8_linear_on_cpu(x, codes, scale, None, columns, outliers)
    assert torch.equal(got, int8_linear_obvious(x, codes, scale, None, columns, outliers))


def test_sums_of_bytes_are_exact_up_to_the_longest_row():
    """127² · 65,536 < 2³¹; fp32 sums would be off."""
    K = 65536
    W = torch.cat([torch.ones(1, K), -torch.ones(1, K), normals(3, (2, K))[0].detach().float()])
    x = torch.cat([torch.ones(2, K), normals(4, (3, K))[0].detach().float()])
    linear = Int8Linear.of(W, how=Int8(0.0))
    q, s = quantize_rows(x)
    want = (q.long() @ linear.codes.long().T).double() * s.double()[:, None] * linear.scale.double()
    assert_close(linear(x) / want.float(), torch.ones(5, 4), 3e-7)
    assert torch.equal(torch._int_mm(q, linear.codes.T).long(), q.long() @ linear.codes.long().T)
    with pytest.raises(UserError, match="65,537 products of bytes may not fit"):
        Int8Linear.of(torch.ones(2, K + 1))


@given(sizes, sizes, sizes, FEW, seeds, st.booleans())
def test_the_error_of_int8_is_within_its_bound(M, N, K, columns, seed, with_bias):
    """|x̂ ŵ − x w| ≤ Σ |x| s_w/2 + |w| s_x/2 + s_x s_w/4 over ordinary features; fp16 for others."""
    x, W, b = drawn(seed, (M, K), (N, K), (N,))
    columns = torch.tensor(sorted({c for c in columns if c < K}), dtype=torch.int64)
    x[:, columns] *= 50
    linear = Int8Linear.of(W, b if with_bias else None, Int8(), columns)
    want = F.linear(x.double(), W.double(), b.double() if with_bias else None)
    rest = x.index_fill(1, columns, 0).double().abs()
    w = W.index_fill(1, columns, 0).double().abs()
    sx, sw = rest.amax(1) / 127, w.amax(1) / 127
    bound = rest.sum(1)[:, None] * sw / 2 + sx[:, None] * w.sum(1) / 2
    bound += (K - len(columns)) * sx[:, None] * sw / 4
    far = x[:, columns].double().abs() @ W[:, columns].double().abs().T
    bound += far * 2**-11 + 1e-5 * (1 + want.abs() + far)
    assert ((linear(x).double() - want).abs() <= bound).all()
    assert (linear.dense()[:, columns] == W[:, columns].half()).all()
    assert not linear.codes[:, columns].any()
    assert_close(linear.scale, sw, 1e-7)  # of those in bytes alone


@given(sizes, sizes, sizes, seeds)
def test_dynamic_outliers_are_those_of_the_batch(M, N, K, seed):
    x, W = drawn(seed, (M, K), (N, K))
    x[:, seed % K] += 9
    linear = Int8Linear.of(W, how=Int8(dynamic=True), columns=torch.tensor([0]))
    assert torch.equal(linear.codes, quantize_rows(W)[0]) and not linear.columns.numel()
    columns = outlier_columns(x)
    assert seed % K in columns or K == 1 or x[:, seed % K].abs().max() < 6
    want = int8_linear_obvious(x, linear.codes, linear.scale, None, columns)
    assert torch.equal(linear(x), want)
    calm = Int8Linear.of(W, how=Int8(0.0))
    assert torch.equal(linear(x / 99), calm(x / 99))


@given(sizes, sizes, sizes, seeds, st.floats(-3, 3))
def test_a_zero_point_serves_values_that_lie_on_one_side(M, N, K, seed, shift):
    """Within s_x/2 of x for each weight, s_x = (max − min) / 255, and s_w/2 of w."""
    x, W = drawn(seed, (M, K), (N, K))
    x = x + shift
    linear = Int8Linear.of(W, how=Int8(0.0, zero_point=True))
    s = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) * (1 + 1e-5) / 255
    bound = s[:, None] * linear.dense().abs().sum(1) / 2
    want = x.double() @ linear.dense().double().T
    assert ((linear(x) - want).abs() <= bound + 1e-5 * (1 + want.abs())).all()


# --- a few bits -----------------------------------------------------------------------------------


@given(sizes, sizes, st.integers(1, 9), hows, seeds, st.booleans(), st.booleans())
def test_codes_stand_for_the_nearest_numbers(M, N, G, how, seed, with_bias, empty):
    """Its product is that of the matrix on its grid, which is half a step from W at most."""
    x, W, b = drawn(seed, (M, 4 * G), (N, 4 * G), (N,))
    W[:: 2 if empty else N + 1] = 0  # some rows hold nothing
    linear = some(W, how, b if with_bias else None)
    grid = how.grid(W)
    dense = grid.values(grid.codes(W))
    assert torch.equal(linear.dense(), dense)
    assert torch.equal(linear(x), F.linear(x, dense) + (b if with_bias else 0))
    step = grid.scale.float().repeat_interleave(linear.group, 1)
    widest = (NF4[1:] - NF4[:-1]).max() / 2 if how.levels == "normal" else 0.5
    assert ((dense - W).abs() <= step * widest * (1 + 2**-8) + step.abs() * 2**-9).all()
    assert not dense[:: 2 if empty else N + 1].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_a_file_has_its_theoretical_size(bits, group, tmp_path):
    """b bits a weight, 16 for a step and b for its zero point; ≤ 1.05 × that, header and all."""
    N, K = 256, 352
    tensors = some(drawn(0, (N, K))[0], Packed(bits, group)).tensors()
    G = K // (group or K)
    theory = N * (K * bits + G * (16 + bits)) / 8
    save_file(run.plain(tensors), tmp_path / "x.safetensors")
    assert theory <= (tmp_path / "x.safetensors").stat().st_size <= 1.05 * theory


# --- what every linear answers --------------------------------------------------------------------

KINDS = [
    Int8(), Int8(0.0), Int8(dynamic=True), Int8(0.0, zero_point=True), Packed(), Packed(3, 4),
    Packed(2, 4, True), Packed(8), Packed(4, 4, True), Packed(4, 4, levels="normal"),
]  # fmt: skip


@given(st.sampled_from(KINDS), seeds, st.booleans())
def test_like_is_the_same_kind_again(how, seed, with_bias):
    """And of what codes stand for the same codes, where a grid has the largest weight on it."""
    W, x, b = drawn(seed, (8, 16), (3, 16), (8,))
    linear = some(W, how, b if with_bias else None, (1, 5))
    assert torch.equal(linear.like(W)(x), linear(x)) and linear.like(W).how == how
    if isinstance(how, Int8) or how.symmetric or how.levels == "normal":
        assert_close(linear.like(linear.dense()).dense(), linear.dense(), 1e-6)


@given(st.sampled_from(KINDS), seeds, st.integers(0, 1), st.sampled_from([1, 2, 4]))
def test_parts_are_the_whole(how, seed, dim, parts):
    """Their matrices to the bit, and what they compute in float64 to 1e-12.

    But parts of Int8Linear's columns have scales of a token of their own, and keep the bound.
    """
    W, x, b = drawn(seed, (8, 16), (3, 16), (8,))
    x = x.double()
    x[:, 5] *= 30
    linear = some(W, how, b, (1, 5))
    linear.bias.place = Place("b", (8,))
    cut = Cut(None, parts)
    found = [linear.split(dim, partial(split.share, cut=cut, part=i)) for i in range(parts)]
    assert torch.equal(torch.cat([p.dense() for p in found], dim), linear.dense())
    if dim == 0:
        assert_close(torch.cat([p(x) for p in found], 1), linear(x))
        return
    assert all(p.bias is None for p in found)
    total = sum(p(part) for p, part in zip(found, x.chunk(parts, 1), strict=True)) + b
    bound = 1e-12 * (1 + linear(x).abs().max())
    if isinstance(how, Int8):
        want = F.linear(x, linear.dense().double(), b.double())
        kept = x.index_fill(1, torch.tensor([1, 5]), 0) if how.threshold else x
        bound += 16 * kept.abs().max() / 127 * W.abs().max()
    else:
        want = linear(x)
    assert (total - want).abs().max() <= bound


def test_a_group_is_never_cut():
    linear = some(torch.ones(4, 12), Packed(4, 6))
    with pytest.raises(UserError, match="groups of 6 cannot be cut: 4 input features from number"):
        linear.split(1, partial(split.share, cut=Cut(None, 3), part=1))


@given(st.sampled_from(KINDS), seeds)
def test_the_gradient_is_that_of_the_dense_matrix(how, seed):
    W, x, b = drawn(seed, (8, 16), (2, 3, 16), (8,))
    linear = some(W, how, Parameter(b))
    x.requires_grad_()
    y = linear(x)
    y.backward(torch.ones_like(y))
    assert_close(x.grad, linear.dense().sum(0).expand(2, 3, 16), 1e-5)
    assert torch.equal(linear.bias.grad, torch.full((8,), 6.0))


@given(st.sampled_from(KINDS), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_every_dtype_computes_about_the_same(how, dtype):
    W, x = drawn(3, (8, 16), (5, 16))
    linear = some(W, how)
    y = linear(x.to(dtype))
    assert y.dtype == dtype and (y.float() - linear(x)).abs().max() < 0.15


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("product", [int4_linear_obvious, int4_linear_triton])
def test_the_kernel_of_four_bits_reads_them_as_they_lie(group, symmetric, product):
    """To the bit, one feature at a time; whole rows, too, which end before a block of 128 does."""
    K = 256 if group else 136
    (W,) = drawn(3, (24, K))
    linear = some(W, Packed(4, group, symmetric)).to(DEVICE)
    x = torch.eye(K, device=DEVICE)
    assert torch.equal(product(x, *linear.for_kernel(x.dtype)), linear.dense().T)
    assert some(W[:, :48], Packed(4, 24)).kernel_group() == 0  # unknown to it: a matrix is made


@pytest.mark.parametrize("how", KINDS, ids=repr)
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_gpu_computes_the_same(how):
    W, x = drawn(3, (96, 256), (5, 256))
    x[:, 7] *= 40
    linear = some(W, replace(how, group=32) if isinstance(how, Packed) else how, None, (7,))
    for rows in (x, x[:1]):
        want = linear.to("cpu")(rows)
        got = linear.to(DEVICE)(rows.to(DEVICE)).cpu()
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


# --- models ---------------------------------------------------------------------------------------


def all_quantized(model, how):
    """The same model on the grids of `how`, without a calibration."""
    model = Transformer(model.config, 0)
    model.load_state_dict(MODELS[kind_of(model.config)].state_dict())
    for name, linear in linears(model).items():
        exchange(model, name, some(linear.dense(), how, linear.bias, (1,)))
    return model


def unpacked(model):
    """A plain model with the matrices that the codes stand for."""
    model = copy.deepcopy(model)
    for name, old in quantized(model).items():
        new = Linear(*reversed(old.shape))
        new.weight.data, new.bias = old.dense(), old.bias
        exchange(model, name, new)
    return model


def kind_of(config):
    return next(kind for kind, known in SHAPES.items() if known == config)


WHOLE = [Int8(), Packed(), Packed(3, 0, True), Packed(4, 0, levels="normal")]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", WHOLE, ids=repr)
def test_a_file_gives_back_every_bit(kind, how, tmp_path):
    model = all_quantized(MODELS[kind], how)
    assert len(quantized(model)) == len(linears(model)) >= 12
    tensors, kinds = packed(model)
    save_file(tensors, path := tmp_path / "model.safetensors")
    again = assembled(model.config, path, json.loads(json.dumps(kinds)))
    batch = Batch(model.config, 5)
    assert torch.equal(batch.ours(again), batch.ours(model))
    for name, x in model.state_dict().items():
        assert (
            torch.equal(again.state_dict()[name], x) and x.dtype == again.state_dict()[name].dtype
        )
    if isinstance(how, Packed):
        assert_close(batch.ours(unpacked(model)), batch.ours(model), 1e-5)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_model_of_every_attention_is_assembled(kind, tmp_path):
    """One that draws constants has them again, though it was built without memory."""
    config = replace(SHAPES["llama"], attention=kind)
    model = shaken(Transformer(config), 0)
    for name, linear in linears(model).items():
        exchange(model, name, some(linear.dense(), Packed(), linear.bias))
    tensors, kinds = packed(model)
    save_file(tensors, path := tmp_path / "model.safetensors")
    batch = Batch(config, 5)
    assert torch.equal(batch.ours(assembled(config, path, kinds)), batch.ours(model))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", WHOLE, ids=repr)
def test_tensor_parallelism_cuts_quantized_models(kind, how):
    """Two parts of each block compute what the whole does: to 1e-12, but for bytes' own scales."""
    model = all_quantized(MODELS[kind], how)
    for p in model.parameters():  # as writer.cast does: buffers stay what they are
        p.data = p.data.double()
    batch = Batch(model.config, 5)
    whole = batch.ours(model)
    for name, p in model.named_parameters():
        p.place = Place(name, tuple(p.shape))
    for stack in filter(None, (model, model.encoder)):
        for block in stack.layers:
            split.split_block(block, Cut(Group([0], "", Counter()), 2))
    assert len(quantized(model)) >= 20
    apart = (batch.ours(model) - whole).abs().max()
    assert apart <= (0.05 if isinstance(how, Int8) else 1e-12) * (1 + whole.abs().max())


def damaged(kinds, tensors, what):
    name = next(iter(kinds))
    match what:
        case "kind":
            kinds[name] = {"kind": "int3"}
        case "setting":
            kinds[name]["colour"] = 1
        case "bits":
            kinds[name]["bits"] = 3
        case "group":
            kinds[name]["group"] = 5
        case "linear":
            kinds["layers.9.ffn.up"] = kinds[name]
        case "lost":
            del tensors[f"{name}.codes"]
        case "more":
            tensors[f"{name}.more"] = torch.ones(1)
        case "infinite":
            tensors[f"{name}.step"][0] = torch.inf
        case "dtype":
            tensors[f"{name}.step"] = tensors[f"{name}.step"].float()
        case "embedding":
            tensors["embedding"] = tensors["embedding"][1:]
        case "unquantized":
            del kinds[name]


@pytest.mark.parametrize(
    "what, said",
    [("kind", "knows no linear"), ("setting", "knows no setting"), ("bits", "is damaged: codes"),
     ("group", "do not divide"), ("linear", "knows no linear layers.9"), ("lost", "codes is None"),
     ("more", "more is"), ("infinite", "not finite"), ("dtype", "step is"),
     ("embedding", "embedding is"), ("unquantized", "does not fit its config.json")],
)  # fmt: skip
def test_damage_is_told_in_a_sentence(what, said, tmp_path):
    tensors, kinds = packed(all_quantized(MODELS["llama"], Packed()))
    damaged(kinds, tensors, what)
    save_file({n: x.clone() for n, x in tensors.items()}, path := tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=said):
        assembled(SHAPES["llama"], path, kinds)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read the weights"):
        assembled(SHAPES["llama"], path, kinds)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [*WHOLE, Int8(dynamic=True)], ids=repr)
def test_adapters_learn_on_a_quantized_base(how):
    """QLoRA: bit-equal at the start; then adapters alone move, by gradients through the codes."""
    model = all_quantized(MODELS["llama"], how)
    batch = Batch(model.config, 5)
    before = batch.ours(model)
    tensors = {n: x.clone() for n, x in packed(model)[0].items()}
    adapt(model, Adapter("lora", 2, on=("layers.*",)))
    assert torch.equal(batch.ours(model), before)
    assert learnt(model) and all(".adapters." in name for name in learnt(model))
    optimizer = torch.optim.SGD(learnt(model).values(), 0.1)
    for _ in range(3):
        loss = batch.loss(batch.ours(model), False)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = batch.loss(batch.ours(model), False)[0]
    assert after < batch.loss(before, False)[0]
    for name, x in packed(model)[0].items():
        if ".adapters." not in name:
            assert torch.equal(x, tensors[name.replace(".base.", ".")])


def test_merging_puts_adapters_on_the_grid():
    """`lora.plain` quantizes W + Δ again, in the same way."""
    model = all_quantized(MODELS["llama"], Packed(8))
    adapt(model, Adapter("lora", 2, on=("query",)))
    for linear in adapted(model).values():
        linear.adapters["default"].B.data += 0.3
    merged = plain(model)
    for name, linear in adapted(model).items():
        new = merged.get_submodule(name)
        assert isinstance(new, PackedLinear) and new.how == Packed(8)
        assert torch.equal(new.dense(), some(linear.dense(), Packed(8)).dense())
