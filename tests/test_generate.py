"""Laws of generate.py: which token is drawn, the cache, and what ends a text."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT
from helpers import array, assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st
from models import SHAPES, shaken
from torch.utils.flop_counter import FlopCounterMode

import chat
from attention import prefix_mask
from bpe import BPE
from generate import (
    Cache,
    Generate,
    Sampling,
    bench,
    continued,
    distribution,
    draw,
    generate,
    next_logits,
    recorded,
    write,
)
from model import ModelConfig, Transformer
from run import Run, UserError, load_tensors
from tokenizer import KINDS
from unigram import Unigram
from vocabulary import END_OF_TEXT
from wordpiece import WordPiece
from writer import cast, load, load_folder, load_tokenizer, load_weights, script

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


kinds = st.sampled_from(["full", "performer"])  # of caches: keys and values, or running sums


@given(seeds, st.lists(st.integers(0, 10), min_size=1, max_size=6), kinds)
def test_greedy_text_is_that_of_the_model_without_a_cache(seed, prompt, kind):
    model = random_model(seed, attention=kind)
    text = list(prompt)
    for _ in range(5):
        text.append(int(model.logits(model(torch.tensor([text])))[0, -1].argmax()))
    steps = generate(model, [prompt], 5, Sampling(greedy=True), set(), 0)
    assert columns(steps) == [text[len(prompt) :]]


prompts = st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=5), min_size=1, max_size=4)


@given(seeds, prompts, kinds)
def test_a_prompt_does_not_notice_what_stands_beside_it(seed, prompts, kind):
    """Prompts of different lengths in one batch give, greedily, what each gives alone."""
    model, how = random_model(seed, attention=kind), Sampling(greedy=True)
    together = columns(generate(model, prompts, 4, how, {3}, seed))
    alone = [columns(generate(model, [p], 4, how, {3}, seed))[0] for p in prompts]
    assert together == alone


@given(seeds, st.lists(st.integers(0, 10), min_size=1, max_size=6), st.booleans())
def test_a_prompt_seen_whole_is_read_as_a_prefix(seed, prompt, whole):
    model, text = random_model(seed), list(prompt)
    for _ in range(5):
        seen = prefix_mask(torch.tensor([len(prompt) if whole else 1]), len(text))
        hidden = model(torch.tensor([text]), mask=seen)
        text.append(int(model.logits(hidden)[0, -1].argmax()))
    how = Sampling(greedy=True)
    steps = generate(model, [prompt], 5, how, set(), 0, whole=whole)
    assert columns(steps) == [text[len(prompt) :]]


def cost_of_a_token(model, S, capacity):
    """Multiplications of the token behind S others, and what its cache holds."""
    cache, pads = Cache(model, 1, capacity), torch.zeros(1, dtype=torch.long)
    next_logits(model, cache, torch.zeros(1, S, dtype=torch.long), torch.arange(S), pads)
    with FlopCounterMode(display=False) as counter:
        next_logits(model, cache, torch.zeros(1, 1, dtype=torch.long), torch.tensor([S]), pads)
    return counter.get_total_flops(), cache.buffer.numel()


def test_a_performer_s_token_costs_the_same_however_long_its_text_is():
    few, many = (cost_of_a_token(random_model(attention="performer"), S, S + 9) for S in (3, 700))
    assert few == many
    few, many = (cost_of_a_token(random_model(), S, S + 9) for S in (3, 700))
    assert few[0] < many[0] and few[1] < many[1]


texts = st.lists(st.integers(0, 10), min_size=1, max_size=6)


@given(seeds, st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_an_answer_is_that_of_the_model_without_a_cache(seed, pairs):
    """The encoder's texts differ in length and do not notice each other."""
    model, how = random_model(seed, arch="encdec"), Sampling(greedy=True)
    prompts, sources = ([*side] for side in zip(*pairs, strict=True))
    want = []
    for prompt, source in pairs:
        memory, text = model.encode(torch.tensor([source])), list(prompt)
        for _ in range(4):
            hidden = model(torch.tensor([text]), memory=memory)
            text.append(int(model.logits(hidden)[0, -1].argmax()))
        want.append(text[len(prompt) :])
    assert columns(generate(model, prompts, 4, how, set(), 0, sources=sources)) == want
    with pytest.raises(UserError, match="13 tokens, more than the model's context"):
        next(generate(model, [[1]], 4, how, set(), 0, sources=[[1] * 13]))


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


@given(seeds, st.lists(st.integers(0, 10), max_size=10, unique=True), st.booleans())
def test_no_token_of_never_is_drawn(seed, never, greedy):
    """Every other one as if these did not exist: their rows of the head do not matter."""
    model, how = random_model(seed, tied=False), Sampling(2.0, greedy=greedy)
    first = columns(generate(model, [[1]] * 4, 11, how, set(), seed, never))
    assert not {token for text in first for token in text} & set(never)
    model.head.data[never] += 1000
    assert first == columns(generate(model, [[1]] * 4, 11, how, set(), seed, never))


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="13 tokens, more than the model's context"):
        next(generate(random_model(), [[1] * 13], 1, Sampling(), set(), 0))
    with pytest.raises(UserError, match="at least one token"):
        next(generate(random_model(), [[]], 1, Sampling(), set(), 0))


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": t} for t in (0, float("nan"), float("inf"), 1e-310)),
        {"top_k": -1},
        {"top_p": 0},
    ],
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


def test_a_performer_s_step_asks_no_tensor_for_its_numbers():
    """So it can be recorded, and nothing waits for a GPU; on the meta device there are none."""
    with torch.device("meta"):
        model = Transformer(replace(SMALL, attention="performer"), seed=None).to("meta")
        cache, ids = Cache(model, 2, 9), torch.zeros(2, 1, dtype=torch.long)
        cache.whole = True
        logits = next_logits(model, cache, ids, torch.arange(1), torch.zeros(2, dtype=torch.long))
    assert logits.shape == (2, 11)


def test_the_step_before_a_recording_counts_its_token_once(monkeypatch):
    """A Performer's sums would hold it twice; what is recorded is not run."""
    model = random_model(attention="performer")
    cache, pads = Cache(model, 1, 9), torch.zeros(1, dtype=torch.long)
    next_logits(model, cache, torch.tensor([[1, 2, 3]]), torch.arange(3), pads)
    before = cache.buffer.clone()

    @contextmanager
    def recording(graph):
        now = cache.buffer.clone()
        yield
        cache.buffer.copy_(now)

    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    monkeypatch.setattr("torch.cuda.graph", recording)
    step = partial(next_logits, model, cache, torch.tensor([[4]]), torch.tensor([3]), pads)
    recorded(step, cache)
    assert torch.equal(cache.buffer, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@given(seeds, st.booleans(), kinds)
def test_a_recorded_step_writes_what_a_step_writes(seed, greedy, kind):
    how, prompts = Sampling(greedy=greedy), [[1, 2], [3]]
    model = Transformer(replace(SMALL, dim=64, attention=kind)).cuda()
    with mock.patch("generate.recorded", lambda step, cache: step):
        plain = columns(generate(model, prompts, 9, how, set(), seed))
    assert plain == columns(generate(model, prompts, 9, how, set(), seed))


def test_a_cast_model_keeps_its_norms():
    model = Transformer(replace(SMALL, norm="layernorm", bias=True))
    cast(model, torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all((kind == torch.float32) == ("norm" in name) for name, kind in kinds.items())
    (text,) = columns(generate(model, [[1]], 4, Sampling(greedy=True), set(), 0))
    assert len(text) == 4


# --- loading a run --------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with one checkpoint of a model that was never trained."""
    monkeypatch.chdir(tmp_path)
    tokenizer, config = BPE.bytes(), replace(SMALL, vocab_size=257)
    run = Run.create("mine", {"model": asdict(config)})
    tokenizer.save(run.folder / "tokenizer.json")
    weights = random_model(vocab_size=257).float().state_dict()
    run.save(1, weights, {}, {"text": f"{tokenizer.fingerprint}-0"})
    return run


def edit(run, **changes):
    """Other settings of the model, by someone who knows about the hash; ... takes one away."""
    path = run.folder / "config.json"
    values = json.loads(path.read_text())
    model = {k: v for k, v in (values["model"] | changes).items() if v is not ...}
    path.write_text(json.dumps({"model": model}))


def test_a_run_is_loaded_with_its_tokenizer(run):
    model, tokenizer, begin, stop, *_ = load(run, CPU)
    want = random_model(vocab_size=257).float().state_dict()
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())
    assert tokenizer.fingerprint == BPE.bytes().fingerprint
    assert (begin, stop) == ([256], {256})


@pytest.mark.parametrize("objective", ["causal", "prefix", "spans", None])
def test_a_run_s_prompt_is_seen_whole_as_in_its_training(run, objective):
    path = run.folder / "config.json"
    model = json.loads(path.read_text())["model"]
    values = {"model": model} | ({"objective": objective} if objective else {})
    path.write_text(json.dumps(values))
    assert load(run, CPU).whole == (objective in ("prefix", "spans"))


def test_a_run_older_than_a_setting_is_loaded(run):
    edit(run, rope_scaling=..., rope_factor=..., rope_context=..., rope_low=..., rope_high=...)
    assert load(run, CPU).model.config == replace(SMALL, vocab_size=257)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"dim": 10**9}, "must be 0 or more, below"),
        ({"dim": 2**27}, r"embedding is \(257, 16\), not \(257, 134217728\)"),
        ({"layers": 10**8}, "it has 2 blocks, not 100000000"),
        ({"ffn_dim": 2**27}, r"ffn.down.weight is"),
        ({"dim": "16"}, "config.json: model.dim cannot be '16'"),
        ({"position": "rape"}, "position cannot be 'rape'"),
        ({"width": 3}, "width"),
        ({"dim": 30}, "not divisible"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(run, changes, named):
    edit(run, **changes)
    with pytest.raises(UserError, match=named) as caught:
        load(run, CPU)
    assert str(run.folder) in str(caught.value)


@pytest.mark.parametrize("kept", [True, None, {"model": 3}, {"model": {"dim": 32}}, {}])
def test_settings_of_a_checkpoint_that_are_none_or_others_are_refused(run, kept):
    state = run.newest() / "train_state.json"
    text = json.loads(state.read_text())["text"]
    weights = load_tensors(run.newest() / "model.safetensors")
    run.save(2, weights, {}, {"text": text, "settings": kept})
    with pytest.raises(UserError, match=r"train_state.json|is not the one"):
        load(run, CPU)


def test_a_run_with_another_tokenizer_is_refused(run):
    """As large as its own, and so would decode to nonsense."""
    BPE.bytes(special=["<|begin|>"]).save(run.folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer in .*mine is not the one"):
        load(run, CPU)


def test_a_tokenizer_that_knows_more_than_the_model_does_not_fit(tmp_path):
    BPE.bytes().save(tmp_path / "tokenizer.json")
    for known in (257, 300):
        assert load_tokenizer(tmp_path / "tokenizer.json", known).vocab_size == 257
    with pytest.raises(UserError, match="257 tokens but the model knows 256"):
        load_tokenizer(tmp_path / "tokenizer.json", 256)
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


def test_weights_are_loaded_into_the_parameters_that_an_optimizer_knows(run):
    model = Transformer(replace(SMALL, vocab_size=257))
    before = list(model.parameters())
    load_weights(model, run.newest() / "model.safetensors")
    after = load(run, CPU).model.parameters()
    for p, same, want in zip(before, model.parameters(), after, strict=True):
        assert p is same and torch.equal(p, want)


# --- loading a folder of Hugging Face -------------------------------------------------------------


def folder_of(tmp_path, tokenizer, end, vocab_size=300):
    """A Llama with random weights, and rows of its embedding that stand for nothing."""
    model = random_model(qk_norm=False, vocab_size=vocab_size, context=40).float()
    model.save(tmp_path / "model", end=end, begin=end)
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "special, end, begins",
    [
        (["<|begin|>", END_OF_TEXT], 256, [256]),  # as config.json says
        (["<|begin|>", END_OF_TEXT], None, [257]),  # as the tokenizer says
        (["<|begin|>", END_OF_TEXT], 299, [257]),  # where config.json speaks of an unknown id
        (["<|begin|>"], None, []),
    ],
)
def test_a_folder_says_how_its_texts_begin(tmp_path, capsys, special, end, begins):
    folder = folder_of(tmp_path, BPE.bytes(special), end)
    writer = load_folder(folder, CPU)
    assert (writer.begin, writer.stop) == (begins, set(begins))
    for samples in (1, 3):
        write(writer, Generate(prompt="ab", samples=samples, tokens=20, temperature=9.0))
        assert capsys.readouterr().out.count("ab") >= samples
    if not begins:
        with pytest.raises(UserError, match="--prompt must not be empty"):
            write(writer, Generate())


@pytest.mark.parametrize("special", [[END_OF_TEXT], [END_OF_TEXT, chat.END]])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "t5"])
def test_a_run_that_is_exported_begins_and_ends_as_it_did(run, monkeypatch, capsys, kind, special):
    """And `transformers` goes on with a text, or answers it, as the run does."""
    transformers = pytest.importorskip("transformers")
    tokenizer = BPE.bytes(special)
    model = shaken(Transformer(replace(SHAPES[kind], vocab_size=tokenizer.vocab_size)), 0)
    run = Run.create("one", {"model": asdict(model.config)})
    tokenizer.save(run.folder / "tokenizer.json")
    run.save(1, model.state_dict(), {}, {"text": f"{tokenizer.fingerprint}-0"})
    monkeypatch.setattr("sys.argv", ["writer.py", "--run", "one", "--out", "folder"])
    script()
    ours, again = load(run, CPU), load_folder(Path("folder"), CPU)
    assert (ours.begin, ours.stop, [*ours.close]) == (again.begin, again.stop, [*again.close])
    assert ours.stop == {*tokenizer.special.values()}
    name = json.loads(Path("folder/config.json").read_text())["architectures"][0]
    assert f"folder/, for {name}.from_pretrained" in capsys.readouterr().out
    theirs = getattr(transformers, name).from_pretrained("folder")
    ids = [*ours.begin, *tokenizer.encode("ab")]
    start, sources = (list(ours.answer), [ids]) if kind == "t5" else (ids, None)
    assert not sources or again.answer == ours.answer
    for stop in ({}, {*ours.stop}):
        ends = sorted(stop) or None
        steps = generate(model, [start], 5, Sampling(greedy=True), stop, 0, sources=sources)
        (want,) = columns(steps)
        got = theirs.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=ends
        )
        assert got[0, len(start) :].tolist() == want


def test_a_folder_with_a_larger_tokenizer_is_refused(tmp_path):
    folder = folder_of(tmp_path, BPE.bytes(), None, vocab_size=200)
    with pytest.raises(UserError, match="model has 257 tokens but the model knows 200"):
        load_folder(folder, CPU)


def start(*arguments):
    """python generate.py …"""
    return subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), *map(str, arguments), "--device", "cpu"],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_script_writes_with_a_folder_s_model(tmp_path):
    folder = folder_of(tmp_path, BPE.bytes(), 256)
    done = start("--model", folder, "--prompt", "Return the", "--samples", "1", "--tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("Return the"), done.stderr


def test_a_t5_answers_what_its_encoder_read(tmp_path, capsys):
    """As transformers writes it: the text and </s> in, from the pad token on out of the decoder."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Unigram.train(["the model reads the text and writes"] * 9, 300, ["<pad>", "</s>"])
    shape = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 4, "num_layers": 2}
    pad, end = (tokenizer.special[text] for text in ("<pad>", "</s>"))
    config = transformers.T5Config(
        **shape, vocab_size=310, decoder_start_token_id=pad, eos_token_id=end, pad_token_id=pad
    )
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / tokenizer.file_name)
    writer = load_folder(tmp_path, CPU)
    unused = [[id] for id in range(310) if id not in tokenizer.known_ids]
    source = torch.tensor([[*tokenizer.encode("the text"), end]])
    ids = theirs.generate(source, max_new_tokens=8, do_sample=False, bad_words_ids=unused)
    want = tokenizer.decode(id for id in ids[0, 1:].tolist() if id != end)
    write(writer, Generate(prompt="the text", samples=1, tokens=8, greedy=True))
    assert capsys.readouterr().out == f"{want}\n"


def test_a_bert_fills_in_what_is_masked(tmp_path, capsys):
    """As transformers' masked head scores it, between [CLS] and [SEP]."""
    transformers = pytest.importorskip("transformers")
    tokenizer = WordPiece.train(["the model reads the text and writes"] * 9, 60)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=20, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / tokenizer.file_name)
    ids = [tokenizer.special["[CLS]"], *tokenizer.encode("the [MASK] reads", special="ids")]
    ids.append(tokenizer.special["[SEP]"])
    at = ids.index(tokenizer.special["[MASK]"])
    with torch.no_grad():
        p = theirs(torch.tensor([ids])).logits[0, at]
    p[[id for id in range(64) if id not in tokenizer.known_ids]] = -torch.inf
    best = int(p.argmax())
    writer = load_folder(tmp_path, CPU)
    write(writer, Generate(prompt="the [MASK] reads"))
    text, _, guesses = capsys.readouterr().out.splitlines()
    assert text == tokenizer.decode([*ids[1:at], best, *ids[at + 1 : -1]])
    assert guesses.startswith(f"{tokenizer.decode([best])!r} {p.softmax(-1)[best]:.0%}, ")
    with pytest.raises(UserError, match="give a --prompt with"):
        write(writer, Generate(prompt="the model reads"))
    with pytest.raises(UserError, match="more than the model's context"):
        write(writer, Generate(prompt="the [MASK] " * 20))


TEXT = "The model reads the text and writes the next word of the text. " * 3


@given(st.sampled_from(sorted(KINDS)), st.integers(0, len(TEXT)), st.integers(0, len(TEXT)))
def test_a_prompt_goes_on_as_its_tokens_do(kind, end, more):
    """Within a word, behind a blank or at the beginning: what is decoded is one text."""
    tokenizer = trained(kind)
    prompt, whole = tokenizer.encode(TEXT[:end]), tokenizer.encode(TEXT[:end] + TEXT[:more])
    rest = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode("word of")
    text = "".join(continued(tokenizer, prompt, rest))
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + rest)


@cache
def trained(kind):
    return KINDS[kind].train([TEXT], 290)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_writes(tmp_path, monkeypatch, kind):
    """A piece that begins a word keeps its blank, one that goes on with a word has none."""
    tokenizer = trained(kind)
    tokenizer.save(tmp_path / tokenizer.file_name)
    assert load_tokenizer(tmp_path, 1000).fingerprint == tokenizer.fingerprint
    prompt = tokenizer.encode("the model reads")
    following = tokenizer.encode("the model reads the")[len(prompt) :]
    assert "".join(continued(tokenizer, prompt, following * 2)) == " the the"


def test_what_cannot_become_tokens_is_one_sentence(tmp_path):
    folder = folder_of(tmp_path, BPE.bytes(), 256)
    for flag in ("--prompt", "--stop"):
        done = start("--model", folder, flag, os.fsdecode(b"\xff"))
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {flag} cannot become tokens: ")
        assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_not_there_is_one_sentence():
    done = start("--model", "nowhere")
    assert (done.returncode, done.stderr) == (2, "error: there is no folder nowhere\n")
    for name in ("x" * 300, "x/" * 3000):
        done = start("--model", name)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    with pytest.raises(UserError, match="--run and --model are two models"):
        Generate(run="mine", model="nowhere")
