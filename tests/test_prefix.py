"""Prefix and prompt tuning: what real tokens would have said, said by numbers of their own."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_lora import ARCHS, alone_with, drawn, gradients, in_short, part_with

import prefix
from adapters import adapt, first_ids, freeze, frozen_mark
from attention import Mask, document_mask
from certificate import LAWS, MODEL, OPTIM, batches_of, differences, together
from generate import Sampling, generate
from lora import Adapter, plain
from mesh import Group, Plan
from model import PRESETS, ModelConfig, Transformer
from optim import build, learnt
from parallel import check
from recompute import recompute
from run import UserError, generator
from split import Cut, Place, split_block
from step import update as plain_update
from tokenizer import KINDS

DECODER = ModelConfig(dim=24, layers=2, heads=4, kv_heads=2, context=12, vocab_size=19)
configs = st.builds(
    partial(replace, DECODER),
    position=st.sampled_from(["rope", "learned", "sinusoidal", "t5", "alibi", "none"]),
    kv_heads=st.sampled_from([0, 1, 2]),
    order=st.sampled_from(["pre", "post"]),
    qk_norm=st.booleans(),
    bias=st.booleans(),
    embed_norm=st.booleans(),
    context=st.just(40),
)
sizes = st.integers(1, 6)


def tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=generator(seed, f"ids/{shape}"))


def before(kind: str, model: Transformer, ids: torch.Tensor, hidden: int = 0) -> Transformer:
    """The model behind a prefix or prompt that says what these ids (P) say."""
    how = Adapter(kind, tokens=len(ids), hidden=hidden)
    adapt(model, how, ids=ids.tolist())
    return model


# --- what real tokens say -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@given(configs, sizes, sizes, seeds)
def test_numbers_made_of_a_real_prompt_are_that_prompt(kind, config, P, T, seed):
    """To the last digits, for every position, grouped heads and every order of norms."""
    model = drawn(config, seed)
    first, text = tokens(config, P, seed=seed), tokens(config, 3, T, seed=seed + 1)
    right = model.logits(model(torch.cat((first.expand(3, -1), text), 1)))[:, P:]
    assert_close(before(kind, model, first).logits(model(text)), right, 1e-12)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_in_fp32_too(kind):
    """A model as it begins: noise in every weight, as above, makes more of the last bits."""
    model = Transformer(replace(DECODER, context=40), 0)
    first, text = tokens(DECODER, 5), tokens(DECODER, 3, 9, seed=1)
    right = model.logits(model(torch.cat((first.expand(3, -1), text), 1)))[:, 5:]
    assert right.std() > 0.1
    assert_close(before(kind, model, first).logits(model(text)), right, 1e-6)


@given(seeds, sizes, st.sampled_from(["learned", "sinusoidal", "t5", "alibi", "rope"]))
def test_an_encoder_s_prompt_is_part_of_what_it_reads(seed, P, position):
    config = replace(ARCHS["encoder"], position=position, context=40)
    model = drawn(config, seed)
    first, text = tokens(config, P), tokens(config, 3, 7, seed=1)
    right = model.logits(model(torch.cat((first.expand(3, -1), text), 1)))[:, P:]
    assert_close(before("prompt", model, first).logits(model(text)), right, 1e-12)


@given(seeds, sizes, st.booleans())
def test_a_decoder_looks_at_its_encoder_s_prompt_too(seed, P, padded):
    config = replace(ARCHS["encdec"], context=40)
    model = drawn(config, seed)
    first, said = tokens(config, P), tokens(config, 3, 5, seed=2)
    text = tokens(config, 3, 7, seed=1)
    lengths = torch.tensor([7, 4, 2] if padded else [7, 7, 7])[:, None]

    def logits(source: torch.Tensor, more: int) -> torch.Tensor:
        last = (lengths + more - 1).expand(-1, source.shape[1])
        memory = model.encode(source, Mask(torch.zeros_like(last), last))
        at_5 = (lengths + P - 1 if more or model.before is None else lengths - 1).expand(-1, 5)
        return model.logits(model(said, memory=memory, cross_mask=Mask(at_5 * 0, at_5)))

    right = logits(torch.cat((first.expand(3, -1), text), 1), P)
    before("prompt", model, first)
    assert_close(logits(text, 0), right, 1e-12)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("position", ["rope", "t5", "alibi", "none"])
def test_each_document_of_a_packed_row_stands_behind_it(kind, position):
    model = drawn(replace(DECODER, position=position, context=40), 0)
    before(kind, model, tokens(DECODER, 4))
    texts = [tokens(DECODER, 1, n, seed=n) for n in (5, 3, 8)]
    starts = torch.tensor([[0] * 5 + [5] * 3 + [8] * 8])
    row = model(torch.cat(texts, 1), mask=document_mask(starts))
    apart = torch.cat([model(text) for text in texts], 1)
    assert_close(row, apart, 1e-12)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("position", ["rope", "learned", "t5", "alibi"])
def test_the_cache_writes_what_the_whole_text_says(kind, position):
    """Prompts of several lengths, so with pads."""
    model = drawn(replace(DECODER, position=position, context=40), 0)
    before(kind, model, tokens(DECODER, 4))
    prompts = [tokens(DECODER, n, seed=n).tolist() for n in (1, 4, 6)]
    steps = list(generate(model, prompts, 6, Sampling(greedy=True), set(), 0))
    for prompt, written in zip(prompts, zip(*steps, strict=True), strict=True):
        ids = list(prompt)
        for token in written:
            assert model.logits(model(torch.tensor([ids])))[0, -1].argmax() == token
            ids.append(token)


# --- what is learnt -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ARCHS))
@pytest.mark.parametrize("how", [Adapter("prefix", tokens=3), Adapter("prompt", tokens=3),
                                 Adapter("prefix", tokens=3, hidden=5)])  # fmt: skip
def test_nothing_but_it_moves(kind, how):
    model = drawn(replace(ARCHS[kind], context=16, position="t5"), 0)
    adapt(model, how, 0)
    mark, names = frozen_mark(model), set(learnt(model))
    assert names and all("prefix." in n or "before." in n for n in names)
    old = {n: p.clone() for n, p in learnt(model).items()}
    batch = batches_of(replace(model.config, context=12), 0, 4)[0]
    optimizer = build(model.named_parameters(), OPTIM)
    for _ in range(2):
        plain_update(model, [batch], optimizer, 0.1, OPTIM)
    assert frozen_mark(model) == mark
    still = [n for n, p in learnt(model).items() if torch.equal(p, old[n])]
    assert not still
    with pytest.raises(UserError, match="cannot become part of the weights"):
        plain(model)
    with pytest.raises(UserError, match="already: there can be one"):
        adapt(model, how, 0)
    freeze(model)
    assert frozen_mark(model) == mark


def test_they_are_counted():
    """P rows of C numbers; two of K·D for each of P and each layer. PEFT counts the same."""
    with torch.device("meta"):
        config = replace(PRESETS["llama3-8b"], vocab_size=64)
        for kind, each in (("prefix", 2 * 32 * 8 * 128), ("prompt", 4096)):
            model = Transformer(config, None)
            adapt(model, Adapter(kind, tokens=20))
            assert sum(p.numel() for p in learnt(model).values()) == 20 * each


def test_an_mlp_adds_nothing_at_first_and_is_dropped_in_the_end():
    first, text = tokens(DECODER, 5), tokens(DECODER, 3, 6, seed=1)
    plainly = before("prefix", drawn(DECODER, 0), first)
    model = before("prefix", drawn(DECODER, 0), first, hidden=7)
    assert torch.equal(model(text), plainly(text))
    for attention in prefix.attentions(model):
        for p in (attention.prefix.to_keys, attention.prefix.to_values):
            p.data.normal_(generator=generator(0, "noise"))
    said = model(text)
    assert not torch.allclose(said, plainly(text))
    prefix.settle(model)
    assert_close(model(text), said, 1e-12)
    assert set(learnt(model)) == set(learnt(plainly))


@pytest.mark.parametrize("what", ["attention", "blocks"])
@pytest.mark.parametrize("kind", sorted(ARCHS))
def test_recomputation_changes_no_gradient(kind, what):
    model = drawn(ARCHS[kind], 0)
    model.config = replace(model.config, context=9)
    if kind != "biased":  # whose table of positions has no room
        adapt(model, Adapter("prefix", tokens=3, hidden=4), 0)
        batches = batches_of(model.config, 0, 4)
        plain_way = gradients(model, batches)
        recompute(model, what)
        again = gradients(model, batches)
        assert plain_way.keys() == again.keys() and len(again) > 8
        for name, g in again.items():
            assert_close(g, plain_way[name], 1e-12)


def test_first_tokens_are_ordinary_ones_or_those_of_a_text():
    words = KINDS["bpe"].train(["the cat sat on the mat. " * 40], 300)
    found = first_ids(Adapter("prompt", tokens=50), words, 3)
    assert len(found) == 50
    all_of_them = set(first_ids(Adapter("prompt", tokens=5000), words, 3))
    assert all_of_them == set(words.known_ids) - set(words.special.values())
    assert found == first_ids(Adapter("prompt", tokens=50), words, 3)
    assert found != first_ids(Adapter("prompt", tokens=50), words, 4)
    how = Adapter("prefix", tokens=30, start="text", text="the cat sat")
    ids = words.encode("the cat sat")
    assert first_ids(how, words, 0) == (ids * 30)[:30]
    assert first_ids(Adapter("prefix", start="random"), words, 0) == []
    pieces = KINDS["wordpiece"].train(["the cat sat on the mat. " * 40], 300)
    with pytest.raises(UserError, match=r"--adapter\.text ' ' has no token"):
        first_ids(Adapter("prefix", start="text", text=" "), pieces, 0)


# --- many processes -------------------------------------------------------------------------------

PLANS = [Plan(2), Plan(1, 2), Plan(1, 1, 2), Plan(2, 2, 2), Plan(2, zero=2), Plan(2, zero=3),
         Plan(1, 1, 2, sequence=True)]  # fmt: skip
HOWS = [Adapter("prefix", tokens=3, hidden=4), Adapter("prompt", tokens=3)]


@pytest.mark.parametrize("plan", PLANS, ids=in_short)
@pytest.mark.parametrize("how", HOWS,
                         ids=lambda how: how.kind)  # fmt: skip
def test_any_plan_computes_what_one_process_computes(ranks, how, plan):
    if how.kind == "prompt" and (plan.pipeline > 1 or plan.sequence or plan.zero == 3):
        with pytest.raises(UserError, match="not go with --plan"):
            check(MODEL, plan, how)
        return
    found = ranks.run(together, partial(part_with, how), MODEL, plan, 3, torch.float64, OPTIM)
    apart = differences(alone_with(how, MODEL, 3), [said for said in found if said])
    assert all(apart[what] <= law for what, law in LAWS.items()), apart


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.kind)
def test_each_part_of_a_block_has_the_keys_and_values_of_its_heads(how):
    """Where one process has several parts, too."""
    model, text = drawn(DECODER, 0), tokens(DECODER, 3, 6)
    adapt(model, how, 0)
    whole = model(text)
    for name, p in model.named_parameters():
        p.place = Place(name, tuple(p.shape))
    for block in model.layers:
        split_block(block, Cut(Group([0], "", Counter()), 2))
    assert_close(model(text), whole, 1e-12)


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"attention": "sliding"}, {"position": "relative"}])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_models_that_cannot_have_one(kind, change):
    with pytest.raises(UserError, match="needs --model"):
        adapt(Transformer(replace(DECODER, **change)), Adapter(kind))


def test_settings_that_cannot_be():
    for values in ({"tokens": 0}, {"hidden": -1}, {"start": "text"}, {"text": "a"}):
        with pytest.raises(UserError):
            Adapter("prefix", **values)
    with pytest.raises(UserError, match="needs --model"):
        adapt(Transformer(replace(ARCHS["encoder"], dropout=0.1)), Adapter("prompt"))
    with pytest.raises(UserError, match="has no MLP"):
        Adapter("prompt", hidden=3)


def test_an_encoder_s_prompt_is_not_for_rows_of_several_texts():
    model = before("prompt", drawn(ARCHS["encoder"], 0), tokens(DECODER, 3))
    with pytest.raises(UserError, match="needs rows with one text each"):
        model(tokens(DECODER, 1, 5), mask=document_mask(torch.tensor([[0, 0, 0, 3, 3]])))
