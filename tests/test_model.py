"""Laws of model.py: its parts against the papers, the whole against itself.

What transformers computes is compared in test_model_files.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from attention import ATTENTIONS, document_mask, full_mask
from generate import Cache, next_logits
from model import (
    ACTIVATIONS,
    NORMS,
    ORDERS,
    PRESETS,
    ModelConfig,
    Transformer,
    count_parameters,
    deepnorm,
    show,
)
from positions import POSITIONS, SCALINGS
from presets import PUBLISHED
from run import UserError

size = st.integers(1, 9)
SMALL = ModelConfig(
    dim=16, layers=2, heads=4, context=12, vocab_size=11, rope_context=6, reach=8, buckets=6,
    window=3,
)  # fmt: skip


def makes_sense(choices):
    try:
        return bool(replace(SMALL, **choices))
    except UserError:
        return False


choices = st.fixed_dictionaries(
    {
        "kv_heads": st.sampled_from([0, 1, 2]),
        "position": st.sampled_from(sorted(POSITIONS)),
        "norm": st.sampled_from(sorted(NORMS)),
        "order": st.sampled_from(sorted(ORDERS)),
        "attention": st.sampled_from(sorted(ATTENTIONS)),
        "embed_norm": st.booleans(),
        "rope_interleaved": st.booleans(),
        "head_width": st.sampled_from([0, 6]),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "bias": st.booleans(),
        "tied": st.booleans(),
        "qk_norm": st.booleans(),
        "rope_scaling": st.sampled_from(sorted(SCALINGS)),
    }
)
configs = choices.filter(makes_sense).map(lambda chosen: replace(SMALL, **chosen))


def random_model(config, seed):
    """A model in float64 whose every weight, the zeros of the start too, is a normal number."""
    model = Transformer(config, seed).double()
    for p, x in zip(
        model.parameters(), normals(seed, *(p.shape for p in model.parameters())), strict=True
    ):
        p.data.copy_(0.3 * x.detach() + (p.dim() == 1))
    return model


def random_ids(config, seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, config.vocab_size, shape))


# --- parts ----------------------------------------------------------------------------------------


@given(seeds, size, size, st.floats(1e-8, 1e-2))
def test_norms_are_the_papers(seed, T, C, eps):
    x, w, b = normals(seed, (T, C), (C,), (C,))
    for name, want in (
        ("rmsnorm", reference.rmsnorm(array(x), array(w), eps)),
        ("layernorm", reference.layernorm(array(x), array(w), array(b), eps)),
    ):
        norm = NORMS[name](C, eps, bias=True).double()
        norm.weight.data.copy_(w)
        if name == "layernorm":
            norm.bias.data.copy_(b)
        assert_close(norm(x), want, 1e-11)


@given(seeds, size)
def test_activations_are_the_papers(seed, F):
    up, gate = normals(seed, (F,), (F,))
    a, b = array(up), array(gate)
    assert_close(ACTIVATIONS["gelu"].bend(up), reference.gelu(a))
    assert_close(ACTIVATIONS["gelu_tanh"].bend(up), reference.gelu_tanh(a))
    assert_close(ACTIVATIONS["swiglu"].bend(up, gate), reference.silu(b) * a)


def test_gated_feed_forwards_hold_as_many_weights_as_plain_ones():
    gated, plain = (
        replace(SMALL, dim=768, activation=name).ffn_width for name in ("swiglu", "gelu")
    )
    assert 3 * gated == 2 * plain


class Times(torch.nn.Module):
    """A norm that is none: it multiplies, so that one sees what it was given."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x

    def add(self, x, branch):
        return x + branch, self(x + branch)


def test_orders_are_their_formulas():
    """pre: x + f(n(x)). post: n(αx + f(x)). Twice, with n = 2· or 3·, f = 5· or 7·."""
    norms, branches = [Times(2), Times(3)], [Times(5), Times(7)]
    one = torch.tensor(1.0)
    assert ORDERS["pre"](one, norms, branches, 1.0) == (1 + 5 * 2) * (1 + 7 * 3)
    assert ORDERS["post"](one, norms, branches, 1.0) == 3 * (1 + 7) * 2 * (1 + 5)
    assert ORDERS["deepnorm"](one, norms, branches, 10.0) == 3 * (10 + 7) * 2 * (10 + 5)


def test_deepnorm_has_the_numbers_of_table_1():
    deep = replace(SMALL, order="deepnorm", layers=100)
    for arch, encoder, alpha, beta in (
        ("decoder", False, 200**0.25, 800**-0.25),
        ("encoder", True, 200**0.25, 800**-0.25),
        ("encdec", True, 0.81 * (100**4 * 100) ** (1 / 16), 0.87 * (100**4 * 100) ** (-1 / 16)),
        ("encdec", False, 300**0.25, 1200**-0.25),
    ):
        got = deepnorm(replace(deep, arch=arch), encoder)
        assert_close(np.array(got), np.array([alpha, beta]))
    model = Transformer(replace(deep, layers=2, dim=64, vocab_size=2))
    plain = Transformer(replace(deep, layers=2, dim=64, vocab_size=2, order="post"))
    for name, p in model.named_parameters():
        ratio = p.std() / dict(plain.named_parameters())[name].std()
        scaled = "norm" not in name and name.endswith(
            ("value.weight", "output.weight", "up.weight", "gate.weight", "down.weight")
        )
        if p.dim() == 2:
            assert_close(ratio.detach(), np.array(16**-0.25 if scaled else 1.0), 1e-6)
    assert deepnorm(SMALL, False) == (1, 1)


# --- the whole ------------------------------------------------------------------------------------


@given(configs, seeds, st.integers(1, 3), st.integers(2, 10))
def test_no_token_sees_the_future(config, seed, B, T):
    """A change of token t changes no hidden state before t, and does change t's own."""
    model, ids = random_model(config, seed), random_ids(config, seed, B, T)
    t = seed % T
    other = ids.clone()
    other[:, t] = (ids[:, t] + 1) % config.vocab_size
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t] != after[:, t]).any()


parts_of_a_text = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(configs, seeds, st.integers(1, 3), parts_of_a_text, st.booleans())
def test_cached_logits_are_the_full_logits(dtype, bound, config, seed, B, parts, whole):
    """However a text is fed in parts, the last logits of each part are those of the whole text.

    So too where layers are always given the whole cache, as on a GPU: what is not yet written, here
    numbers from another text, has no influence; and beyond the context before RoPE was scaled.
    """
    model, ids = random_model(config, seed).to(dtype), random_ids(config, seed, B, sum(parts))
    full = model.logits(model(ids))
    cache, at, pads = Cache(model, B, sum(parts) + 2), 0, torch.zeros(B, dtype=torch.long)
    cache.buffer += 3
    cache.whole = whole
    for n in parts:
        got = next_logits(model, cache, ids[:, at : at + n], torch.arange(at, at + n), pads)
        at += n
        assert_close(got, full[:, at - 1], bound)


@given(configs, seeds, st.integers(2, 8))
def test_all_of_a_source_reads_all_of_it(config, seed, S):
    """What an encoder makes of its first token depends on its last; a mask tells it not to."""
    config = replace(config, arch="encdec", layers=1, attention="full")
    model, ids = random_model(config, seed), random_ids(config, seed, 1, S)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % config.vocab_size
    first, changed = (model.encode(x)[0].values[:, :, 0] for x in (ids, other))
    assert not torch.equal(first, changed)
    mask = full_mask(S, S - 1)
    first, changed = (model.encode(x, mask)[0].values[:, :, 0] for x in (ids, other))
    assert torch.equal(first, changed)


@given(configs, seeds)
def test_a_scaled_head_sees_less(config, seed):
    plain, scaled = (random_model(replace(config, scaled_head=x), seed) for x in (False, True))
    ids = random_ids(config, seed, 1, 4)
    assert_close(scaled(ids), plain(ids) / 4)  # √16


@given(configs, seeds, st.integers(1, 5), st.integers(1, 5))
def test_what_follows_a_past_has_the_next_positions(config, seed, m, n):
    model, ids = random_model(config, seed), random_ids(config, seed, 2, m + n)
    _, past = model.extend(ids[:, :m], None)
    assert_close(model.extend(ids[:, m:], past)[0], model(ids)[:, m:], 1e-11)


@given(configs, seeds, st.integers(1, 5), st.integers(1, 5))
def test_padding_on_the_left_changes_nothing(config, seed, T, pads):
    model, ids = random_model(config, seed), random_ids(config, seed, 1, T)
    padded = torch.cat((random_ids(config, seed + 1, 1, pads), ids), 1)
    place = torch.arange(T + pads)
    got = next_logits(model, Cache(model, 1, T + pads), padded, place, torch.tensor([pads]))
    assert_close(got, model.logits(model(ids))[:, -1], 1e-11)


@given(configs, seeds, st.integers(1, 4), st.integers(1, 4))
def test_packed_documents_do_not_see_each_other(config, seed, m, n):
    """With the document mask, the second document of a row is as if it stood there alone."""
    model, ids = random_model(config, seed), random_ids(config, seed, 1, m + n)
    starts = torch.tensor([[0] * m + [m] * n])
    packed = model(ids, mask=document_mask(starts))
    alone = model(ids[:, m:], positions=torch.arange(m, m + n)[None])
    assert_close(packed[:, m:], alone, 1e-11)
    assert_close(packed[:, :m], model(ids[:, :m]), 1e-11)


@given(seeds)
def test_a_block_runs_with_given_weights(seed):
    """torch.func.functional_call with another block's weights gives the other block's result."""
    from attention import causal_mask

    one, two = random_model(SMALL, seed).layers
    (x,) = normals(seed, (2, 5, 16))
    rotation = POSITIONS["rope"](SMALL, True).rotation(torch.arange(5)[None])
    args = (x, causal_mask(5), rotation)
    got, _ = torch.func.functional_call(one, dict(two.named_parameters()), args)
    assert_close(got, two(*args)[0], 0)


def test_a_new_model_is_the_identity_and_does_not_depend_on_what_else_exists():
    model = Transformer(SMALL, 0)
    ids = random_ids(SMALL, 0, 2, 7)
    assert torch.equal(model(ids), model.norm(model.embedding[ids]))
    deeper = Transformer(replace(SMALL, layers=5, tied=False), 0)
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(deeper.named_parameters())[name])
    assert not torch.equal(model.embedding, Transformer(SMALL, 1).embedding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_arithmetic_and_not_of_the_weights(dtype):
    model = Transformer(SMALL)
    hidden = model(random_ids(SMALL, 0, 2, 5), dtype=dtype)
    assert hidden.dtype == dtype
    model.logits(hidden).sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


# --- numbers --------------------------------------------------------------------------------------


def test_gpt2_has_as_many_parameters_as_openai_s():
    """124,439,808 in 12 blocks (Radford et al. 2019), of which each block has 7,087,872."""
    one_block = Transformer(replace(PRESETS["gpt2"], layers=1))
    assert count_parameters(one_block) == 124_439_808 - 11 * 7_087_872


@pytest.mark.parametrize(
    "change, named",
    [
        ({"dim": 18}, "not divisible by --model.heads 4"),
        ({"kv_heads": 3}, "--model.kv-heads 3"),
        ({"dim": 12, "heads": 4}, "--model.dim 12 / --model.heads 4 = 3 must be even"),
        ({"head_width": 3}, "so --model.head-width 3 must be even"),
        ({"block": 8}, "--model.block 8 must be a power of 2, at least 16"),
        ({"block": 24}, "--model.block 24 must be a power of 2, at least 16"),
        ({"layers": 0}, "at least 1"),
        ({"layers": 10**9}, "layers 1000000000 must be 0 or more, below"),
        ({"ffn_dim": -1}, "ffn-dim -1 must be 0 or more"),
        ({"norm_eps": float("nan")}, "norm-eps nan"),
        ({"rope_base": float("inf")}, "rope-base inf"),
        ({"rope_factor": 0.5}, "rope-factor must be at least 1"),
        ({"rope_low": 4.0}, "rope-low below rope-high"),
        ({"dim": 2**27 + 1, "heads": 2**27}, "such as 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        replace(SMALL, **change)


def test_a_text_longer_than_the_learned_positions_is_refused():
    model = Transformer(replace(SMALL, position="learned"))
    with pytest.raises(ValueError, match="12 learned positions"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_the_table_of_presets_counts_every_one(capsys):
    show()
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() == PUBLISHED.keys()
    for name, count in {
        "gpt2": "124,439,808", "bert-base": "109,482,240", "t5-11b": "11,307,321,344",
        "bloom-176b": "176,247,271,424",
    }.items():  # fmt: skip
        assert rows[name][1] == count


@pytest.mark.parametrize("order", ["pre", "deepnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_at_first_all_tokens_are_about_as_likely(order, tied):
    """The loss begins near ln V, whether the head is zero or the embedding."""
    config = replace(SMALL, dim=64, vocab_size=300, order=order, tied=tied)
    model = Transformer(config)
    ids = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(0))
    others = (ids + 1) % 300  # its own token is likelier where the head is the embedding
    loss = F.cross_entropy(model.logits(model(ids)).flatten(0, 1), others.flatten())
    assert loss.item() == pytest.approx(np.log(300), abs=0.3)
