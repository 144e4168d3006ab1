"""Laws of generate.py: which token is drawn, the cache, and what ends a text."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from generate import (
    Generate,
    Sampling,
    bench,
    cast,
    distribution,
    draw,
    generate,
    load_tokenizer,
    load_weights,
    model_config,
)
from model import ModelConfig, Transformer
from run import UserError
from tokenizer import BPE

SMALL = ModelConfig(dim=16, layers=2, heads=4, kv_heads=2, context=12, vocab_size=11)


def random_model(seed=0, **changes):
    model = Transformer(replace(SMALL, **changes)).double()
    for p, x in zip(
        model.parameters(), normals(seed, *(p.shape for p in model.parameters())), strict=True
    ):
        p.data.copy_(x.detach())
    return model


def columns(steps):
    """Each sample's tokens, without what comes after its end."""
    return [[t for t in column if t is not None] for column in zip(*steps, strict=True)]


# --- choosing -------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 20), st.floats(0.1, 3), st.floats(0.01, 1))
def test_top_p_keeps_the_nucleus(seed, V, temperature, p):
    (logits,) = normals(seed, (1, V))
    full = torch.softmax(logits / temperature, -1)
    got = distribution(logits, Sampling(temperature=temperature, top_p=p))[0]
    kept = reference.nucleus(array(full[0]), p)
    assert {i for i in range(V) if got[i] > 0} == kept
    assert_close(got[sorted(kept)], full[0][sorted(kept)] / full[0][sorted(kept)].sum())


@given(seeds, st.integers(1, 20), st.integers(1, 25))
def test_top_k_keeps_the_k_likeliest(seed, V, k):
    logits = torch.randint(0, 4, (1, V), generator=torch.Generator().manual_seed(seed)).double()
    got = distribution(logits, Sampling(1.0, top_k=k, top_p=1.0))[0]
    want = sorted(range(V), key=lambda i: (-logits[0, i], i))[:k]  # of equal ones the lowest ids
    assert [i for i in range(V) if got[i] > 0] == sorted(want)


@given(seeds, st.integers(1, 20))
def test_greedy_is_the_limit_of_every_other_way(seed, V):
    (logits,) = normals(seed, (3, V))
    greedy = distribution(logits, Sampling(greedy=True))
    assert (greedy.argmax(-1) == logits.argmax(-1)).all() and (greedy.sum(-1) == 1).all()
    assert torch.equal(greedy, distribution(logits, Sampling(top_k=1, top_p=1.0)))
    assert_close(greedy, distribution(logits, Sampling(1e-6, top_p=1.0)), 1e-6)


@given(seeds, st.integers(1, 12))
def test_draw_inverts_the_distribution_function(seed, V):
    """u in [F(i−1), F(i)) gives i; no u, from 0 to almost 1, gives a token of probability 0."""
    rng = np.random.default_rng(seed)
    p = rng.random(V) * (rng.random(V) < 0.6)
    p[rng.integers(V)] = 0.5
    p = torch.from_numpy(p / p.sum())
    for u in (0.0, 1 - 2**-53, *rng.random(20)):
        got = int(draw(p[None], torch.tensor([u], dtype=torch.float64)))
        assert p[got] > 0
        below, above = p[:got].sum(), p[: got + 1].sum()
        assert below - 1e-12 <= u * p.sum() <= above + 1e-12


def test_samples_have_the_frequencies_of_the_distribution():
    p = torch.tensor([[0.5, 0.3, 0.0, 0.2]], dtype=torch.float64)
    n = 40_000
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(p.expand(n, -1), u), minlength=4) / n
    assert ((counts - p[0]).abs() <= 4 * (p[0] * (1 - p[0]) / n).sqrt()).all()


# --- writing --------------------------------------------------------------------------------------


@given(seeds, st.lists(st.integers(0, 10), min_size=1, max_size=6))
def test_greedy_text_is_that_of_the_model_without_a_cache(seed, prompt):
    model = random_model(seed)
    text = list(prompt)
    for _ in range(5):
        text.append(int(model.logits(model(torch.tensor([text])))[0, -1].argmax()))
    steps = generate(model, [prompt], 5, Sampling(greedy=True), set(), 0)
    assert columns(steps) == [text[len(prompt) :]]


@given(
    seeds, st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_a_prompt_does_not_notice_what_stands_beside_it(seed, prompts):
    """Prompts of different lengths in one batch give, greedily, what each gives alone."""
    model, how = random_model(seed), Sampling(greedy=True)
    together = columns(generate(model, prompts, 4, how, {3}, seed))
    alone = [columns(generate(model, [p], 4, how, {3}, seed))[0] for p in prompts]
    assert together == alone


@given(seeds)
def test_the_same_seed_writes_the_same_and_the_first_samples_do_not_change(seed):
    model, how = random_model(seed), Sampling(1.5)
    many, few = (columns(generate(model, [[1, 2]] * n, 6, how, set(), seed)) for n in (4, 2))
    assert many[:2] == few
    assert len({tuple(text) for text in many}) > 1


@given(seeds, st.integers(0, 10))
def test_a_text_ends_with_its_stop_token(seed, stop):
    for text in columns(generate(random_model(seed), [[1]] * 4, 11, Sampling(2.0), {stop}, seed)):
        assert stop not in text[:-1]
        assert text[-1] == stop or len(text) == 11


@given(st.integers(1, 12), st.integers(1, 20))
def test_a_text_ends_where_the_context_does(prompt, tokens):
    """The last token may be written but not read: prompt + text ≤ context + 1."""
    for position in ("rope", "learned"):
        model = random_model(position=position)
        (text,) = columns(generate(model, [[1] * prompt], tokens, Sampling(), set(), 0))
        assert len(text) == min(tokens, 12 - prompt + 1)


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="13 tokens, more than the model's context"):
        next(generate(random_model(), [[1] * 13], 1, Sampling(), set(), 0))
    with pytest.raises(UserError, match="at least one token"):
        next(generate(random_model(), [[]], 1, Sampling(), set(), 0))


@pytest.mark.parametrize(
    "bad", [{"temperature": 0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}]
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(UserError):
        Sampling(**bad)


def test_the_bench_says_how_fast_this_machine_writes(capsys):
    bench(Generate(bench="tiny", samples=2, tokens=4), torch.device("cpu"), torch.bfloat16)
    said = capsys.readouterr().out
    assert "1.3 M parameters, bfloat16 on cpu, 2 at once" in said and "tokens/s" in said
    with pytest.raises(UserError, match="--tokens 3 or more"):
        bench(Generate(bench="tiny", tokens=2), torch.device("cpu"), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@given(seeds, st.booleans())
def test_a_recorded_step_writes_what_a_step_writes(seed, greedy):
    how, prompts = Sampling(greedy=greedy), [[1, 2], [3]]
    model = Transformer(replace(SMALL, dim=64)).cuda()
    with mock.patch("generate.recorded", lambda step: step):
        plain = columns(generate(model, prompts, 9, how, set(), seed))
    assert plain == columns(generate(model, prompts, 9, how, set(), seed))


def test_a_cast_model_keeps_its_norms():
    model = Transformer(replace(SMALL, norm="layernorm", bias=True))
    cast(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all((kind == torch.float32) == ("norm" in name) for name, kind in kinds.items())
    (text,) = columns(generate(model, [[1]], 4, Sampling(greedy=True), set(), 0))
    assert len(text) == 4


# --- loading --------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_size_does_not_fit(tmp_path):
    BPE.bytes().save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json", 257).vocab_size == 257
    with pytest.raises(UserError, match="257 tokens but the model was trained with 300"):
        load_tokenizer(tmp_path / "tokenizer.json", 300)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json", 257)


def test_weights_of_another_model_do_not_fit(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(Transformer(replace(SMALL, dim=32)).state_dict(), path)
    with pytest.raises(UserError, match="does not fit its config"):
        load_weights(Transformer(SMALL), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read the weights"):
        load_weights(Transformer(SMALL), path)


@pytest.mark.parametrize(
    "bad", [None, {"dim": "x"}, {"width": 3}, {"dim": True}, {"dim": 30, "heads": 4}]
)
def test_settings_of_no_model_are_refused(bad, tmp_path):
    with pytest.raises(UserError):
        model_config(bad, tmp_path / "config.json")
