"""Laws of recompute.py."""

from dataclasses import replace

import models
import pytest
import torch
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from test_axes import BASE, name_of
from test_axes import MODELS as PAIRS
from test_model import random_ids, random_model

from bench import Bench
from generate import Sampling, generate
from model import ModelConfig, Transformer
from recompute import KINDS, LiveBytes, Settings, memory, random_batch, recompute
from run import UserError
from step import accumulate, loss_sum

SMALL = ModelConfig(dim=16, layers=2, heads=4, context=12, vocab_size=11)
KINDS_OF_IT = [what for what in KINDS if what != "none"]
kinds = st.sampled_from(KINDS_OF_IT)


def made_of(model, step):
    """What a step gives, and the gradients that it leaves."""
    model.zero_grad()
    given = step()
    return given, {name: p.grad for name, p in model.named_parameters()}


def assert_same_bits(model, step, kinds=KINDS_OF_IT):
    """A step of the model and of those that recompute gives the same, and the same gradients."""
    recompute(model, "none")
    want, grads = made_of(model, step)
    assert any(g is not None and g.any() for g in grads.values())
    for what in kinds:
        recompute(model, what)
        got, others = made_of(model, step)
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want)), what
        for name, want_ in grads.items():
            got_ = others[name]
            assert (got_ is None) == (want_ is None), f"{what}: {name}"
            assert got_ is None or torch.equal(got_, want_), f"{what}: {name}"


# --- the same, bit for bit ------------------------------------------------------------------------


@pytest.mark.parametrize("choices", PAIRS, ids=name_of)
def test_loss_and_gradients_are_those_of_the_plain_model(choices):
    """In every architecture and kind of attention and position, in two batches added up.

    With dropout, too, in all but some: the second batch has been through when the first is drawn
    again, and other batches may have.
    """
    config = replace(BASE, **choices, dropout=PAIRS.index(choices) % 3 / 4)
    model = random_model(config, 0).float()
    batches = [random_batch(config, rows, rows) for rows in (2, 1)]
    dtype = torch.bfloat16 if PAIRS.index(choices) % 2 else None
    assert_same_bits(model, lambda: accumulate(model, batches, dtype)[0])


@pytest.mark.parametrize("kind", models.CONFIGS)
def test_padded_rows_of_published_families_too(kind):
    @given(models.CONFIGS[kind], seeds)
    def law(config, seed):
        model = models.shaken(Transformer(config), seed)
        batch = models.Batch(config, seed)

        def step():
            loss, _ = batch.loss(batch.ours(model), config.arch == "encdec")
            loss.backward()
            return loss

        assert_same_bits(model, step)

    law()


@pytest.mark.parametrize("arch", ["encoder", "encdec"])
def test_every_token_of_what_is_measured_is_seen(arch):
    batch = random_batch(replace(SMALL, arch=arch), 2)
    hi = batch.hi if arch == "encoder" else batch.source_hi
    assert (hi == SMALL.context - 1).all()


@given(seeds, st.sampled_from(["decoder", "encoder", "encdec"]), st.floats(0.1, 0.9))
def test_frozen_weights_stay_without_gradient(seed, arch, share):
    """Any of them may be frozen, and what goes into a block may need no gradient."""
    model = random_model(replace(SMALL, arch=arch, position="t5"), seed).float()
    drawn = torch.rand(len([*model.parameters()]), generator=torch.Generator().manual_seed(seed))
    for p, x in zip(model.parameters(), drawn.tolist(), strict=True):
        p.requires_grad_(x < share)
    model.layers[-1].ffn.down.weight.requires_grad_(True)
    batch = random_batch(model.config, 2)
    assert_same_bits(model, lambda: accumulate(model, [batch])[0])
    assert all((p.grad is None) >= (not p.requires_grad) for p in model.parameters())


@pytest.mark.parametrize("arch", ["decoder", "encdec"])
def test_weights_that_blocks_share_get_the_sum(arch):
    model = random_model(replace(SMALL, arch=arch, layers=3), 1).float()
    model.layers[2].ffn.up.weight = model.layers[0].ffn.up.weight
    model.layers[1].attention.key.weight = model.layers[0].attention.query.weight
    model.layers[2].ffn = model.layers[1].ffn
    batch = random_batch(model.config, 2)
    assert_same_bits(model, lambda: accumulate(model, [batch])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_token_too(dtype, monkeypatch):
    """Without a graph one query is decoded, by a kernel on CUDA whose last bits differ."""
    monkeypatch.setattr("attention.decode", None)
    model = random_model(replace(SMALL, arch="encdec", kv_heads=2), 2).float()
    ids, source = (random_ids(SMALL, 0, 64, size) for size in (1, 12))

    def step():
        hidden = model(ids, dtype=dtype, memory=model.encode(source, dtype=dtype))
        (loss := hidden.float().square().sum()).backward()
        return loss

    assert_same_bits(model, step)


@given(seeds, kinds, st.sampled_from(["rope", "relative", "t5"]), st.booleans())
def test_new_keys_and_values_have_their_gradients(seed, what, position, frozen):
    """A text of which the second half looks at the first, which only its keys and values tell.

    The first block's keys may have none, where neither tokens nor the matrix ask for any.
    """
    model = random_model(replace(SMALL, position=position), seed).float()
    model.embedding.requires_grad_(not frozen)
    for name in ("attention_norm", "attention.key"):
        model.layers[0].get_submodule(name).requires_grad_(not frozen)
    ids = random_ids(model.config, seed, 2, 9)

    def step():
        _, past = model.extend(ids[:, :5], None)
        hidden, _ = model.extend(ids[:, 5:], past)
        (loss := hidden.square().sum()).backward()
        return loss

    assert_same_bits(model, step, [what])


# --- transparent ----------------------------------------------------------------------------------


def counted(model):
    """How often feed-forward, attention and cross attention are computed, from now on."""
    calls = dict.fromkeys(("ffn", "attention", "cross"), 0)

    def count(name):
        calls[name] += 1

    for layer in model.layers:
        for part, name in ((layer.ffn, "ffn"), (layer.attention.output, "attention"),
                           (layer.cross.output, "cross")):  # fmt: skip
            part.register_forward_hook(lambda *_, name=name: count(name))
    return calls


@pytest.mark.parametrize(
    "what, ffn, looks", [("none", 1, 1), ("attention", 1, 2), ("blocks", 2, 2)]
)
def test_each_part_is_computed_as_often_as_it_says(what, ffn, looks, monkeypatch):
    """Once more in the backward pass, and never without gradients or behind a past."""
    model = random_model(replace(SMALL, arch="encdec"), 0)
    recompute(model, what)
    calls, batch, L = counted(model), random_batch(model.config, 2), SMALL.layers
    accumulate(model, [batch])
    assert calls == {"ffn": ffn * L, "attention": looks * L, "cross": looks * L}
    calls.update(ffn=0, attention=0, cross=0)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("recompute.Recompute", None)
        memory = model.encode(batch.source)
        _, past = model.extend(batch.inputs, None, memory=memory)
    hidden, _ = model.extend(batch.inputs, past, memory=memory)
    hidden.sum().backward()
    crossed = 3 if what == "attention" else 2  # a look at the memory knows of no past
    assert calls == {"ffn": 2 * L, "attention": 2 * L, "cross": crossed * L}


@pytest.mark.parametrize("what", KINDS_OF_IT)
def test_names_objects_and_files_stay(what):
    """And a model can go back."""
    config = replace(SMALL, arch="encdec")
    model, plain = Transformer(config), Transformer(config, seed=1)
    before, parts = model.state_dict(), [*model.named_modules()]
    recompute(model, what)
    assert list(model.state_dict()) == list(before) and parts == [*model.named_modules()]
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert {type(part) for _, part in parts} & set(KINDS[what]) == set(KINDS[what])
    recompute(model, "none")
    assert [type(part) for _, part in parts] == [type(part) for part in plain.modules()]


@pytest.mark.parametrize("kind", [Settings, Bench])
def test_a_model_without_tokens_is_refused(kind):
    with pytest.raises(UserError, match=r"--model.vocab-size must be at least 1"):
        kind(model=replace(kind().model, vocab_size=0))


@pytest.mark.parametrize("what", KINDS_OF_IT)
def test_an_unknown_kind_second_derivatives_and_changed_weights_are_refused(what):
    model, batch = Transformer(SMALL), random_batch(SMALL, 2)
    with pytest.raises(UserError, match="choose none, attention, blocks"):
        recompute(model, "all")
    recompute(model, what)
    weight = model.layers[0].attention.query.weight
    loss = loss_sum(model, batch)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    hidden = model(batch.inputs).square().sum()
    (first,) = torch.autograd.grad(hidden, [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("what", KINDS_OF_IT)
@pytest.mark.parametrize("arch", ["decoder", "encdec"])
def test_generation_stays_as_it_is(arch, what):
    model = random_model(replace(SMALL, arch=arch), 3)
    texts = {"sources": [[1, 2, 3], [4]]} if arch == "encdec" else {}
    prompts, how = [[5], [6, 7]], Sampling(temperature=1.0)
    want = [*generate(model, prompts, 8, how, set(), 0, **texts)]
    recompute(model, what)
    assert [*generate(model, prompts, 8, how, set(), 0, **texts)] == want


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["decoder", "encoder", "encdec"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_halve_what_is_kept_and_the_peak(arch, dtype):
    config = ModelConfig(arch=arch, dim=32, context=64, vocab_size=64)
    model, batch = Transformer(config), random_batch(config, 4)
    found = {}
    for what in KINDS:
        recompute(model, what)
        kept, live = memory(model, batch, dtype)
        found[what] = kept, live.peak
        left = live.course[-1] - sum(p.grad.nbytes for p in model.parameters())
        assert left < batch.inputs.numel() * config.dim * dtype.itemsize  # of no block its input
        model.zero_grad()
    (kept, peak), (some, lower), (few, low) = found.values()
    assert some < 0.75 * kept and lower < 0.85 * peak
    assert few < 0.15 * kept and low < 0.5 * peak


@pytest.mark.parametrize("size, dtype", [(4, torch.float32), (2, torch.bfloat16)])
def test_of_each_block_only_its_input_is_kept(size, dtype):
    """B·T·C numbers for each further block, to the byte."""
    kept = []
    for layers in (2, 3, 5):
        config = replace(SMALL, layers=layers)
        model = Transformer(config)
        recompute(model, "blocks")
        kept.append(memory(model, random_batch(config, 3), dtype)[0])
    numbers = 3 * SMALL.context * SMALL.dim
    assert kept[1] - kept[0] == size * numbers and kept[2] - kept[1] == 2 * size * numbers


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 99)), max_size=30))
def test_live_bytes_are_those_of_memory_that_is_alive(actions):
    """Made, seen from another side, written in place, dropped, in any order."""
    old, held, sizes, most = torch.ones(50), [], {}, 0
    with LiveBytes() as live:
        for number, (action, size, which) in enumerate(actions):
            if action <= 1 or not held:
                held.append((number, torch.zeros(size)))
                sizes[number] = 4 * size
            elif action == 2:
                owner, x = held[which % len(held)]
                held.append((owner, x[: size // 2]))
            elif action == 3:
                held[which % len(held)][1].add_(1)
            elif action == 4:
                held.append((None, old.view(5, 10)[0]))
            else:
                held.pop(which % len(held))
                x = None
            alive = sum(sizes[owner] for owner in {o for o, _ in held if o is not None})
            most = max(most, alive)
            assert live.now == alive
    assert live.peak == most


def test_a_graph_keeps_what_its_backward_pass_needs():
    x, old = torch.ones(100, requires_grad=True), torch.ones(5)
    with LiveBytes() as live:
        y = x.exp().exp().sum()  # keeps both exponentials
        assert live.now == 2 * 400 + 4
        y.backward()
        assert live.now == 400 + 4  # the gradient, and y
        torch.zeros(5, out=old)
        assert live.now == 400 + 4
        z = torch.empty_strided((3,), (4,))
        assert live.now == 400 + 4 + 4 * (1 + 2 * 4) and len(z) == 3
    assert live.peak >= 3 * 400
