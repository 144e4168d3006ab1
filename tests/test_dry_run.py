"""Laws of dry_run.py: what it says is what a run then takes."""

import math
import sys
import time
from dataclasses import replace
from statistics import median

import pytest
from test_train import EACH, write_texts

import dry_run
import train
from data import prepare
from model import ModelConfig
from objectives import OBJECTIVES
from recompute import LiveBytes
from run import RUNS, Run, UserError
from train import complete, loop
from training import Training

MODEL = ModelConfig(dim=32, layers=2, heads=2, context=32)
SETTINGS = [
    replace(EACH, model=MODEL, steps=40, evaluate_every=20, save_every=100, **some)
    for some in (
        {"batch": 8}, {"batch": 3, "accumulate": 3}, {"batch": 16, "recompute": "blocks"},
        {"batch": 16, "recompute": "attention"}, {"batch": 8, "dtype": "bfloat16"},
        {"batch": 8, "dtype": "float16"}, {"batch": 8, "ramp_from": 2, "ramp_tokens": 4000},
    )
] + [
    replace(EACH, steps=40, evaluate_every=20, save_every=100, batch=8,
            model=replace(MODEL, arch=arch, layers=3), objective=objective,
            optim=replace(EACH.optim, name=name))
    for arch, objective, name in (
        ("encdec", "spans", "adamw"), ("encoder", "masked", "adafactor"),
        ("decoder", "prefix", "sgd"),
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "ROOM", 1.0)


def prepared(config):
    special = OBJECTIVES[config.objective].special
    corpus = prepare(config.data, config.tokenizer, special=special)
    return complete(config, corpus.tokenizer.vocab_size), corpus


@pytest.mark.parametrize("config", SETTINGS)
def test_the_peak_is_that_of_a_run(folder, config):
    config, corpus = prepared(config)
    said = dry_run.forecast(config, corpus)
    training, peaks = Training(config, corpus), []
    held = sum(p.nbytes for p in training.model.parameters())
    held += sum(x.nbytes for x in training.optimizer.tensors().values())
    while training.step < 12 or len(training.batches[0].targets) < config.batch:
        for p in training.model.parameters():
            p.grad = None  # they were there before, and an update drops them first
        with LiveBytes() as live:
            training.advance()
        peaks.append(held + live.peak)
    assert said.peak == pytest.approx(max(peaks), rel=0.05)
    assert said.batch == config.batch and said.largest > config.batch
    assert said.state < said.peak


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(folder, monkeypatch):
    config, corpus = prepared(SETTINGS[0])
    peak_of = dry_run.peak_of
    peaks = [dry_run.peak_of(Training(replace(config, batch=n), corpus)) for n in range(1, 9)]
    assert peaks == sorted(peaks)
    for rows in (1, 3, 5, 7):
        there = (peaks[rows - 1] + 9 * peaks[rows]) / 10  # hardly too little for one more
        monkeypatch.setattr(dry_run, "device_memory", lambda device, there=there: there)
        tried = []

        def watching(training, tried=tried):
            tried.append((training.config.batch, peak_of(training)))
            return tried[-1][1]

        monkeypatch.setattr(dry_run, "peak_of", watching)
        said = dry_run.forecast(config, corpus)
        assert said.batch == said.largest in (rows - 1, rows, 1) and said.peak <= there
        assert all(peak <= there for batch, peak in tried if batch > 1)  # none that may not fit
    assert f"--batch 8 does not fit, {said.batch} does" in dry_run.in_words(said, config)
    monkeypatch.setattr(dry_run, "device_memory", lambda device: math.inf)
    assert "--batch 8 fits" in dry_run.in_words(dry_run.forecast(config, corpus), config)


def test_a_dry_run_begins_no_run(folder, capsys, monkeypatch):
    words = "train.py --dry-run --data.path text --batch 2 --device cpu --tokenizer.kind bytes"
    words += " --model.dim 16 --model.heads 2"
    monkeypatch.setattr(sys, "argv", words.split())
    train.script()
    said = capsys.readouterr().out
    assert "memory   " in said and "s an update" in said and "parameters" in said
    assert not list(RUNS.glob("run-*"))


def test_a_batch_beyond_all_memory_is_told_with_one_that_fits(folder):
    config, corpus = prepared(replace(SETTINGS[0], batch=10**9))
    there = dry_run.device_memory(Training(replace(config, batch=1), corpus).device)
    with pytest.raises(UserError, match="takes at least"):
        Training(config, corpus)
    training = dry_run.begun(config, corpus)
    assert training.config == config and training.ramp.full == 10**9
    assert "10000000" in train.introduction(training, 1e9).replace(",", "")
    small = replace(config, batch=8)
    with pytest.MonkeyPatch.context() as patch:
        peak = dry_run.peak_of(Training(replace(small, batch=4), corpus))
        patch.setattr(dry_run, "device_memory", lambda device: peak)
        said = dry_run.forecast(config, corpus)
    assert 1 < said.batch <= 4 and said.peak <= peak < there
    assert f"does not fit, {said.batch} does" in dry_run.in_words(said, config)


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS)
def test_the_time_is_that_of_a_run(folder, config):
    """Within 15 %, by the median of five pairs: updates of some tens of ms."""
    model = replace(config.model, dim=64, layers=3, context=64)
    config, corpus = prepared(replace(config, model=model, steps=40, evaluate_every=20))
    ratios = []
    for _ in range(5):
        said = dry_run.forecast(config, corpus)
        training, run = Training(config, corpus), Run.create("", config)
        start = time.perf_counter()
        loop(training, run, 1.0)
        training.held_out()
        ratios.append(said.whole / (time.perf_counter() - start))
    print([round(x, 3) for x in ratios])
    assert median(ratios) == pytest.approx(1, abs=0.15)
