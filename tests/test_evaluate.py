"""Laws of evaluate.py."""

import math
import re
import shutil
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from test_train import write_texts

import evaluate
from data import DataConfig, TokenizerConfig, prepare
from evaluate import (
    MULTIPLES,
    Deep,
    Length,
    Precision,
    Reach,
    Recipe,
    difference,
    draw_length,
    draw_losses,
    frequencies,
    interval,
    learn,
    long_windows,
    measure_length,
    show_length,
    show_losses,
    smooth,
    stretched,
    student,
    token_losses,
)
from model import ModelConfig, Transformer
from objectives import causal
from optim import learning_rate
from packing import Mixture
from pictures import picture
from run import RUNS, Run, UserError
from step import update

TEXT, BYTES = DataConfig("text", held_out=0.5), TokenizerConfig("bytes")
SMALL = ModelConfig(dim=16, layers=1, heads=2, context=8, vocab_size=257)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- intervals ------------------------------------------------------------------------------------


def test_student_s_numbers_are_those_of_his_distribution():
    """The share of a t distribution between −t and t is 95 %, by summing its density."""
    for n in range(1, 21):
        x = np.linspace(0, student(n), 200_001)
        density = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
        area = np.trapezoid(density * (1 + x * x / n) ** (-(n + 1) / 2), x)
        assert area == pytest.approx(0.475, abs=4e-5)
    assert student(2.9) == student(2) and student(500) == student(20)


@given(seeds, st.integers(2, 9))
def test_an_interval_is_t_standard_errors(seed, n):
    values = np.random.default_rng(seed).normal(3, 2, n)
    middle, half = interval(values.tolist())
    assert middle == pytest.approx(values.mean())
    assert half == pytest.approx(student(n - 1) * values.std(ddof=1) / math.sqrt(n))
    assert interval([4.0]) == (4.0, math.inf)


def test_intervals_of_differences_hold_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    for paired, (n, m, s) in ((True, (4, 4, 1)), (False, (3, 5, 1)), (False, (6, 3, 4))):
        held = 0
        for _ in range(2000):
            luck = rng.normal(0, 3 * paired, max(n, m))
            a = luck[:n] + rng.normal(1, 1, n)
            b = luck[:m] + rng.normal(1.5, s, m)
            middle, half = difference(a.tolist(), b.tolist(), paired)
            held += abs(middle - 0.5) <= half
        assert 0.93 < held / 2000 < 0.985
    assert difference([1.0], [2.0], True)[1] == difference([1.0], [2.0, 3.0], False)[1] == math.inf
    assert difference([1.0, 1.0], [2.0, 2.0], False) == (1.0, 0.0)


# --- length ---------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 40))
def test_every_token_is_asked_once_with_what_its_part_holds(seed, T, N, at_once):
    model = Transformer(SMALL, seed).double()
    torch.nn.init.normal_(model.layers[0].attention.output.weight)
    windows = torch.randint(257, (N, 9), generator=torch.Generator().manual_seed(seed))
    got = token_losses(model, windows, T, at_once)
    for n in range(N):
        for t in range(8):
            seen = windows[n, t - t % T : t + 1]
            p = model.logits(model(seen[None]))[0, -1].log_softmax(-1)
            assert got[n, t] == pytest.approx(-p[windows[n, t + 1]].item(), rel=1e-9)


def test_windows_are_the_beginnings_of_held_out_documents_that_are_long_enough(folder):
    corpus = prepare(TEXT, BYTES)
    lengths = corpus.held.lengths.tolist()
    length = sorted(lengths)[len(lengths) // 2]
    windows = long_windows(corpus, length, 1000)
    long = [corpus.held.document(i) for i, n in enumerate(lengths) if n > length]
    assert windows.tolist() == [x[: length + 1].tolist() for x in long]
    assert len(long_windows(corpus, length, 2)) == 2
    with pytest.raises(UserError, match="no held-out document has 8,001 tokens, 8 times"):
        long_windows(corpus, 8000, 10)


@pytest.mark.parametrize("scaling", evaluate.STRETCHED)
def test_stretching_keeps_weights_and_slows_the_angles(scaling):
    model = Transformer(replace(SMALL, position="rope", dim=32), 3)
    other = stretched(model, scaling)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert other.config.rope_scaling == scaling
    config = replace(other.config, rope_scaling="none", rope_factor=model.config.rope_factor)
    assert config == model.config and other.config.rope_factor == MULTIPLES[-1] == 8.0
    ids = torch.arange(16)[None]
    torch.nn.init.normal_(model.layers[0].attention.output.weight)
    other = stretched(model, scaling)
    assert torch.equal(model(ids)[:, 0], other(ids)[:, 0])
    assert not torch.allclose(model(ids)[:, 9], other(ids)[:, 9])


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_is_train_s_own_step_on_the_seed_s_rows_of_t(folder, seed):
    corpus, how = prepare(TEXT, BYTES), Recipe(steps=30, batch=4)
    seen, rates, draws = [], [], []

    def look(model, batches, optimizer, lr, *rest):
        seen.append(batches[0].inputs)
        draws.extend(batches[0].draws.tolist())
        rates.append(lr)
        return update(model, batches, optimizer, lr, *rest)

    with patch("evaluate.update", look):
        losses = list(learn(Transformer(SMALL), corpus, how, 8, seed))
    rows = Mixture(corpus.train, 8, corpus.tokenizer.end_of_text, seed, corpus.parts)
    assert all(torch.equal(x, causal(rows.take(4)).inputs) and x.shape == (4, 8) for x in seen)
    assert rates == [learning_rate(how.optim, step, 30) for step in range(30)]
    assert draws == [[seed, row // 4, row] for row in range(120)]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.5


@contextmanager
def watched_learning():
    """The models that evaluate.py trains: as they were at first, as they are now, T and seed."""
    trained = []

    def look(model, corpus, how, T, seed, *rest):
        before = {name: x.clone() for name, x in model.state_dict().items()}
        trained.append((model, before, T, seed))
        return learn(model, corpus, how, T, seed, *rest)

    with patch("evaluate.learn", look):
        yield trained


def test_every_kind_is_trained_alike_and_asked_at_every_length(folder):
    """Each number is that of the model whose name it bears; none of them happens to be another."""
    kinds, how = ("alibi", "rope"), Recipe(steps=40, batch=8)
    corpus = prepare(TEXT, BYTES)
    config = Length(how, TEXT, BYTES, replace(SMALL, context=4), kinds, seeds=2, windows=3)
    with watched_learning() as trained:
        found = measure_length(config, corpus)
    windows = long_windows(corpus, 32, 3)
    assert [(m.config.position, T, s) for m, _, T, s in trained] == [
        (kind, 4, seed) for seed in range(2) for kind in kinds
    ]
    assert found.keys() == {*kinds, *(f"rope, {s}" for s in evaluate.STRETCHED)}
    for model, before, _, seed in trained:
        start = Transformer(model.config, seed).state_dict()
        assert all(torch.equal(before[name], x) for name, x in start.items())
        ways = {model.config.position: model}
        if model.config.position == "rope":
            ways |= {f"rope, {s}": stretched(model, s) for s in evaluate.STRETCHED}
        for name, which in ways.items():
            at = [token_losses(which, windows, T).mean().item() for T in (4, 8, 16, 32)]
            assert found[name][seed].at == at
            more = token_losses(which, windows, 32) - token_losses(which, windows, 4)
            assert found[name][seed].places.equal(more.mean(0))
            assert more[:, :4].abs().max() < 1e-5  # no longer row is seen there
    every = [x for runs in found.values() for r in runs for x in r.at[1:]]
    assert len(set(every)) == len(every)


def test_frequencies_are_the_entropy_of_single_tokens(folder):
    corpus = prepare(TEXT, BYTES)
    tokens = np.concatenate([np.asarray(x) for x in corpus.train.files])
    p = np.bincount(tokens) / len(tokens)
    assert frequencies(corpus) == pytest.approx(-sum(x * math.log(x) for x in p if x), rel=1e-5)
    halves = SimpleNamespace(files=[np.array([0, 0, 1]), np.array([2])])
    cut = SimpleNamespace(train=halves, tokenizer=SimpleNamespace(vocab_size=4))
    assert frequencies(cut) == pytest.approx(1.5 * math.log(2))


# --- tables and pictures --------------------------------------------------------------------------


@given(seeds, st.integers(1, 30), st.integers(1, 12))
def test_smoothing_is_the_mean_of_the_last_steps(seed, n, width):
    x = np.random.default_rng(seed).normal(size=n)
    want = [x[: i + 1][-width:].mean() for i in range(n)]
    assert smooth(x.tolist(), width) == pytest.approx(want)


def test_tables_say_what_was_found():
    """Steps in quarters, each with the mean of its last ten; the best at the longest row first."""
    losses = {"deepnorm": [float(i) for i in range(1, 41)], "post": [4.0] * 12 + [math.nan]}
    rows = [line.split() for line in show_losses(losses, 40, 3.25).splitlines()]
    assert rows[0][-4:] == ["10", "20", "30", "40"]
    assert rows[1] == ["deepnorm", "5.500", "15.500", "25.500", "35.500"]
    assert rows[2][:2] == ["post", "4.000"] and rows[3][-1] == "3.250"
    found = {
        "rope": [Reach([1.0, 3, 4, 9], torch.zeros(64)), Reach([1.0, 5, 4, 9], torch.zeros(64))],
        "alibi": [Reach([2.0, 2, 2, 2], torch.zeros(64)), Reach([2.0, 2, 2, 2], torch.zeros(64))],
    }
    rows = [re.split(r"\s{2,}", line) for line in show_length(found, 8).splitlines()]
    assert rows[0][-4:] == ["8", "16", "32", "64"]
    assert [row[0] for row in rows[1:]] == ["alibi", "rope"]
    assert rows[2][1:] == ["1.000 ± 0.000", "4.000 ± 12.706", "4.000 ± 0.000", "9.000 ± 0.000"]
    alone = show_length({"rope": found["rope"][:1]}, 8)
    assert alone.split()[-5:] == ["rope", "1.000", "3.000", "4.000", "9.000"]


@contextmanager
def drawn():
    """The axes that are drawn on, to be looked at."""
    kept = []

    @contextmanager
    def look(*words):
        with picture(*words) as axes:
            yield axes
            kept.extend(axes)

    with patch("evaluate.picture", look):
        yield kept


def test_pictures_show_what_was_found(tmp_path):
    """Loss at the step where it was, at the length where it was, at the middle of its places."""
    runs = [
        Reach([1.0, 2, 3, 4], torch.arange(32.0)),
        Reach([3.0, 2, 3, 4], torch.arange(32.0) + 2),
    ]
    with drawn() as kept:
        draw_length({"alibi": runs}, 4, tmp_path / "a.png")
        draw_losses({"post": [2.0] * 5}, "title", tmp_path / "b.png", 3.25)
    left, right, axes = kept
    assert left.lines[0].get_xydata().tolist() == [[4, 2], [8, 2], [16, 3], [32, 4]]
    reaches = sorted((low, high) for (_, low), (_, high) in left.collections[0].get_segments())
    assert reaches[0] == pytest.approx((2 - 12.706, 2 + 12.706)) and reaches[-1] == (4, 4)
    assert right.lines[0].get_xydata().tolist() == [[2 * i + 1.0, 2 * i + 1.5] for i in range(16)]
    assert all({*each.lines[-1].get_xdata()} == {4} for each in (left, right))
    assert axes.lines[0].get_xydata().tolist() == [[i + 1, 2.0] for i in range(5)]
    assert {*axes.lines[1].get_ydata()} == {3.25}


# --- the script -----------------------------------------------------------------------------------


def run(*words):
    out = StringIO()
    with redirect_stdout(out), patch.object(sys, "argv", ["evaluate.py", *map(str, words)]):
        evaluate.script()
    return out.getvalue()


TINY = "--train.steps 3 --train.batch 2 --data.path text --data.held-out 0.5 --tokenizer.kind bytes"
TINY = f"{TINY} --model.dim 16 --model.layers 2 --model.heads 2 --model.context 4".split()


def test_length_shows_every_kind_with_intervals(folder):
    said = run("length", *TINY, "--seeds", 2, "--windows", 5)
    for kind in evaluate.COLORS:
        assert any(line.startswith(kind) and line.count("±") == 4 for line in said.splitlines())
    assert (RUNS / "length.png").stat().st_size > 10_000


@pytest.mark.parametrize("what, names", [
    ("depth", ["deepnorm", "post", "only frequencies"]),
    ("precision", [*evaluate.PRECISIONS, "only frequencies"]),
])  # fmt: skip
def test_the_other_demonstrations_show_theirs(folder, what, names):
    said = run(what, *TINY)
    assert all(any(line.startswith(name) for line in said.splitlines()) for name in names)
    assert (RUNS / f"{what}.png").stat().st_size > 10_000


def test_depth_trains_each_order_and_tells_its_gradients(folder):
    with watched_learning() as trained:
        said = run("depth", *TINY, "--seed", 3, "--orders", "post", "deepnorm", "pre")
    assert [m.config.order for m, *_ in trained] == ["post", "deepnorm", "pre"]
    for model, before, T, seed in trained:
        start = Transformer(model.config, 3).state_dict()
        assert (T, seed) == (4, 3) and all(torch.equal(before[n], x) for n, x in start.items())
        first, last = (model.layers[i].ffn.up.weight.grad.norm().item() for i in (0, 1))
        assert first != last
        assert (
            f"{model.config.order}: gradient's norm in the first block {first:.1e}, in the last "
            f"{last:.1e}"
        ) in said


def test_one_update_of_one_row_is_enough():
    assert Recipe(steps=1, batch=1).steps == 1


@pytest.mark.parametrize("make, said", [
    (lambda: Length(positions=("rope", "polar")), "--positions polar: there are"),
    (lambda: Length(seeds=0), "--seeds from 1 to 20"),
    (lambda: Length(seeds=21), "--seeds from 1 to 20"),
    (lambda: Length(windows=0), "--windows must be at least 1"),
    (lambda: Length(model=replace(SMALL, arch="encoder")), "--model.arch decoder"),
    (lambda: Length(positions=()), "--positions needs one or more of"),
    (lambda: Deep(orders=("sandwich",)), "--orders sandwich: there are"),
    (lambda: Deep(orders=()), "--orders needs one or more of"),
    (lambda: Deep(model=replace(SMALL, arch="encdec")), "--model.arch must be decoder or encoder"),
    (lambda: Precision(model=replace(SMALL, arch="encdec")), "--model.arch must be decoder or"),
    (lambda: Recipe(steps=0), "--train.steps and --train.batch must be at least 1"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


# --- compare --------------------------------------------------------------------------------------


def finished(name, seed, value, **changes):
    """A run as train.py leaves it, of which only settings and the last measurement matter."""
    config = {"steps": 7, "seed": seed, "data": "x", "objective": "causal", "tokenizer": "y"}
    run = Run.create(name, config | changes)
    run.measure(step=4, held_out_loss=99.0, bits_per_byte=99.0)
    run.measure(step=7, held_out_loss=3 * value, bits_per_byte=value)


def test_runs_of_several_seeds_are_compared(folder):
    for seed, luck in enumerate((0.3, -0.2, 0.1)):
        finished(f"a-seed{seed}", seed, 2 + luck)
        finished(f"b-seed{seed}", seed, 1.9 + luck + 0.001 * seed)
        finished(f"c-seed{seed}", seed + 5, 1.9 + luck)
    said = run("compare", "a", "b")
    assert "difference -0.0990 ± 0.0025, paired by seed: b is better" in said
    assert "a is better" not in said and "3 seeds" in said
    assert "paired by seed: b is better" in run("compare", "b", "a")
    assert "-0.1000 ± 0.5" in run("compare", "a", "c") and "not decided" in run("compare", "a", "c")
    assert "not decided, as one run" in run("compare", "a-seed0", "b-seed0")
    finished("d", 0, 2.0, objective="masked")
    finished("e", 0, 2.0, steps=8)
    for pair, why in ((("a", "d"), "not asked the same"), (("a", "e"), "has not come to its end"),
                      (("a", "z"), "no run named 'z'")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            run("compare", *pair)
    shutil.copytree("runs/d", "runs/a-seed3")
    with pytest.raises(UserError, match="was not measured as the others"):
        run("compare", "a", "b")
