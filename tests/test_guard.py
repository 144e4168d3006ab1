"""Laws of guard.py, and that a guarded run recovers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from test_train import EACH, write_texts

from data import prepare
from guard import AGAIN, LEAST, GuardConfig, deviations, failing, fit, spike
from run import Run, UserError
from step import Update, replay
from train import complete, loop
from training import Training, kept_skips, stored

ON = GuardConfig()


# --- spikes ---------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 50), st.floats(-5, 5))
def test_a_deviation_is_a_standard_deviation_of_normal_noise(seed, n, far):
    """Of logarithms, and never below its floor."""
    logs = np.random.default_rng(seed).normal(0.3, 0.1, n)
    middle = np.median(logs[-20:])
    spread = 1.4826 * np.median(np.abs(np.diff(logs))) / 2**0.5
    past = [math.exp(x) for x in logs]
    for floor in (1e-9, 10.0):
        want = far / max(spread, floor)
        assert deviations(past, math.exp(middle + far), floor) == pytest.approx(want, abs=1e-6)


def test_a_deviation_of_much_noise_is_its_standard_deviation():
    past = np.exp(np.random.default_rng(0).normal(1.0, 0.2, 20_000))
    above = np.exp(np.median(np.log(past[-20:])) + 0.6)
    assert deviations(list(past), above, 1e-9) == pytest.approx(3.0, rel=0.02)
    sloping = past * np.exp(-0.01 * np.arange(20_000))  # a slope is no noise
    assert deviations(list(sloping), sloping[-20] * np.exp(0.6), 1e-9) < 5


def noisy(seed, n=200):
    """What a run that goes well measures: falling, with noise, the norm's with long tails."""
    rng, steps = np.random.default_rng(seed), np.arange(1, n + 1)
    losses = (2 + 4 * steps**-0.4) * np.exp(rng.normal(0, 0.03, n))
    norms = (0.5 + 3 * steps**-0.5) * np.exp(0.15 * rng.standard_t(6, n))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


@given(seeds, st.sampled_from([0, 1]), st.floats(8, 1e9))
def test_a_jump_is_a_spike_whichever_of_the_two_it_is_in(seed, column, factor):
    past = noisy(seed)
    now = list(past[-1])
    assert not spike(ON, past[-100:], tuple(now))
    now[column] = now[column] * factor * (1, 20)[column] if factor < 1e8 else math.nan
    assert "jumped" in spike(ON, past[-100:], tuple(now))
    assert ["the loss", "gradient's norm"][column] in spike(ON, past[-100:], tuple(now))
    assert not spike(replace(ON, window=0), past[-100:], tuple(now))
    assert not spike(ON, past[-LEAST + 1 :], tuple(now))


@given(seeds)
def test_noise_is_no_spike_and_a_fall_is_none(seed):
    run = noisy(seed)
    assert not any(spike(ON, run[max(0, i - 100) : i], now) for i, now in enumerate(run))
    assert not spike(ON, run[-100:], (1e-3, 1e-3))


def test_what_is_known_by_heart_has_no_spikes():
    """A run had gone back to its beginning because a loss of 0.0008 nats had become 0.0018."""
    past = [(0.0008, 0.01)] * 100
    assert not spike(ON, past, (0.0018, 0.02)) and not spike(ON, past, (0.0106, 1.0))
    assert "the loss" in spike(ON, past, (0.06, 0.02))
    assert "gradient's norm" in spike(ON, past, (0.0008, math.inf))
    assert "the loss" in spike(ON, past, (math.nan, 0.01))


def test_a_norm_may_jump_three_times_as_far():
    """Neighbours in e^0.1: a deviation is 0.1·1.4826/√2, above its floor of 0.1."""
    past = [(1.1 ** (i % 2), math.exp(0.1 * (i % 2))) for i in range(50)]
    one = 0.1 * 1.4826 / 2**0.5
    for far, jumped in ((6.5, ""), (20.0, ""), (22.0, "gradient's norm")):
        now = (1.0, math.exp(0.05 + far * one))
        assert jumped in spike(ON, past, now) and bool(spike(ON, past, now)) == bool(jumped)
    assert spike(ON, past, (math.exp(0.05 + 8 * one), 1.0))


def test_an_update_that_fp16_skipped_is_no_spike(tmp_path, monkeypatch):
    config, corpus = start(replace(LONG, steps=2, dtype="float16"), tmp_path, monkeypatch)
    training = Training(config, corpus)
    training.past = [(1.0, 1.0)] * 50
    assert training.jumped(Update(1.0, 9, math.inf, False)) == ""
    assert training.past == [(1.0, 1.0)] * 50
    assert "jumped" in training.jumped(Update(1.0, 9, math.inf, True))


def test_a_forecast_neither_rises_nor_falls_below_nothing():
    steps = [100 * i for i in range(1, 9)]
    falling = fit(steps, [8 - 0.9 * i for i in range(1, 9)])
    rising = fit(steps, [1 + 0.1 * i for i in range(1, 9)])
    assert falling.a >= 0 and rising.b >= 0 and falling.at(10**9) >= 0


@pytest.mark.parametrize("bad", [{"window": 5}, {"window": 10**6}, {"skip": 0}, {"spike": math.nan},
                                 {"spike": 0.5}, {"patience": -1}])  # fmt: skip
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(UserError, match=f"--guard.{next(iter(bad))}"):
        GuardConfig(**bad)


# --- a run that is poisoned -----------------------------------------------------------------------

LONG = replace(EACH, steps=60, save_every=10, batch=4, evaluate_every=20)


def poisoned(config, corpus, rows, how="noise"):
    """A Training some of whose rows of text are not what the model learns from."""

    class Poisoned(Training):
        def batch(self, texts, name, number):
            batch = super().batch(texts, name, number)
            if name == "objective" and number in rows:
                if how == "weights":  # as a fault of the machine might
                    with torch.no_grad():
                        self.model.layers[0].ffn.down.weight[0, 0] = math.nan
                batch.targets.copy_((batch.targets + 128) % 256)
            return batch

    return Poisoned(config, corpus)


def start(config, tmp_path, monkeypatch):
    if not (tmp_path / "text").exists():
        write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    corpus = prepare(config.data, config.tokenizer)
    return complete(config, corpus.tokenizer.vocab_size), corpus


def check_recovery(config, corpus, rows, how="noise"):
    """A run with poison ends as one, from the checkpoint that it went back to, without it."""
    run = Run.create("", config)
    training = poisoned(config, corpus, rows, how)
    assert loop(training, run, 1.0)
    skips = kept_skips(run)
    assert skips and {row for s in skips for row in range(s.first, s.end)} >= rows
    pure = Training(config, corpus)  # it does what the laws say, by hand
    for skip in skips:
        assert skip.back_to % config.save_every == 0 and skip.back_to < skip.step
        assert skip.step - skip.back_to <= 2 * config.save_every
    row = 0
    while pure.step < config.steps:
        if skip := next((s for s in skips if s.first == row), None):
            pure.rows.take(skip.end - skip.first)
            row = pure.row = skip.end
            continue
        pure.advance()
        row = pure.row
    for name, x in pure.model.state_dict().items():
        assert torch.equal(x, training.model.state_dict()[name]), name
    for name, x in pure.optimizer.tensors().items():
        assert torch.equal(x, training.optimizer.tensors()[name]), name
    return run, skips


@pytest.mark.parametrize("seed", range(3))
def test_a_poisoned_run_ends_as_one_that_never_saw_the_poison(seed, tmp_path, monkeypatch, capsys):
    config, corpus = start(replace(LONG, seed=seed), tmp_path, monkeypatch)
    at = 4 * (33 + 5 * seed)
    run, skips = check_recovery(config, corpus, {at, at + 4})
    said = capsys.readouterr().out
    assert f"back to step {skips[0].back_to:,}" in said and "jumped from" in said
    assert "jumped" in skips[0].why and len(skips) <= 2
    assert [row["step"] for row in run.metrics()] == list(range(1, 61))


@pytest.mark.slow
def test_twenty_poisoned_runs_recover(tmp_path, monkeypatch):
    for seed in range(20):
        config, corpus = start(replace(LONG, seed=seed), tmp_path, monkeypatch)
        at = 4 * (34 + seed)
        check_recovery(config, corpus, {at, at + 4})


@pytest.mark.slow
def test_fifty_clean_runs_raise_no_alarm(tmp_path, monkeypatch):
    """Nor are they called failing."""
    for seed in range(50):
        name = ("muon", "adamw", "adam", "adafactor", "sgd")[seed % 5]
        optim = replace(LONG.optim, name=name, lr=0.1 if name == "sgd" else 0.01)
        dtype = ("float32", "bfloat16", "float16")[seed % 3]
        config = replace(LONG, seed=seed, optim=optim, steps=200, batch=2 + seed % 7, dtype=dtype)
        config, corpus = start(config, tmp_path, monkeypatch)
        run = Run.create("", config)
        assert loop(Training(config, corpus), run, 1.0)
        assert not kept_skips(run), seed


def test_a_weight_that_is_no_number_never_reaches_a_checkpoint(tmp_path, monkeypatch, capsys):
    config, corpus = start(LONG, tmp_path, monkeypatch)
    run, skips = check_recovery(config, corpus, {4 * 35}, "weights")
    assert "layers.0.ffn.down.weight" in skips[0].why and f"rows {4 * 35:,} to" in skips[0].why
    (left,) = run.folder.glob("replay-*.safetensors")
    assert str(left) in skips[0].why and "layers.0.ffn.down.weight is not finite" in replay(left)


def test_a_run_that_always_spikes_is_given_up(tmp_path, monkeypatch):
    config, corpus = start(LONG, tmp_path, monkeypatch)
    run = Run.create("", config)
    with pytest.raises(UserError, match=f"spike number {AGAIN + 1} behind step"):
        loop(poisoned(config, corpus, {*range(4 * 36, 4 * 400)}), run, 1.0)
    assert len(kept_skips(run)) == AGAIN and run.checkpoints()


def test_a_run_goes_back_behind_what_it_read_before_the_spike(tmp_path, monkeypatch):
    """The four updates before step 42 began before checkpoint 40: so it is not taken up."""
    config, corpus = start(LONG, tmp_path, monkeypatch)
    _, skips = check_recovery(config, corpus, {4 * 41})
    assert (skips[0].step, skips[0].back_to, skips[0].first) == (42, 30, 4 * 38)


def test_where_every_step_is_saved_the_oldest_checkpoint_is_gone_on_from(tmp_path, monkeypatch):
    """It has read two of the four updates, whose rows cannot be passed over any more."""
    config, corpus = start(replace(LONG, save_every=1), tmp_path, monkeypatch)
    _, skips = check_recovery(config, corpus, {4 * 41})
    assert skips[0][:4] == (4 * 40, 4 * 42, 42, 40)


def test_a_run_without_checkpoints_cannot_go_back(tmp_path, monkeypatch):
    config, corpus = start(LONG, tmp_path, monkeypatch)
    training, run = poisoned(config, corpus, {4 * 41}), Run.create("", config)
    monkeypatch.setattr(training, "save", lambda run: None)
    with pytest.raises(UserError, match=r"step 42: .*there is no whole checkpoint to go back to"):
        loop(training, run, 1.0)
    assert not kept_skips(run)


def test_a_damaged_list_of_what_is_passed_over_is_told(tmp_path, monkeypatch):
    config, corpus = start(replace(LONG, steps=2), tmp_path, monkeypatch)
    run = Run.create("", config)
    loop(Training(config, corpus), run, 1.0)
    for text in ("{", '{"skips": [[1]]}', '{"skips": 3}', '{"hash": "x", "skips": []}'):
        (run.folder / "skips.json").write_text(text)
        with pytest.raises(UserError, match=r"skips\.json"):
            Training(stored(run), corpus).load(run)


# --- runs that fail -------------------------------------------------------------------------------


@given(st.floats(0.5, 3), st.floats(0.1, 5), st.floats(0.1, 1.5))
def test_a_planted_curve_is_found(a, b, c):
    steps = [100 * i for i in range(1, 12)]
    curve = fit(steps, [a + b * s**-c for s in steps])
    for step in (1200, 1500):
        assert curve.at(step) == pytest.approx(a + b * step**-c, rel=0.01)
    assert curve.error < 0.01


@given(seeds, st.integers(1, 5), st.integers(6, 20))
def test_only_a_curve_that_stays_above_its_forecast_fails(seed, patience, early):
    rng = np.random.default_rng(seed)
    n = early + patience
    good = [(100 * i, 2 + 30 / (100 * i) ** 0.5 + rng.normal(0, 0.01)) for i in range(1, n + 1)]
    assert not failing(good, patience)
    bad = [(s, x * 1.4 if i >= early else x) for i, (s, x) in enumerate(good)]
    assert "above its forecast" in failing(bad, patience)
    assert not failing(bad, 0) and not failing(bad[:-1], patience)
    once = [*bad[:-1], good[-1]]
    assert not failing(once, patience)


def test_a_failing_run_is_stopped_with_its_checkpoint(tmp_path, monkeypatch):
    config, corpus = start(replace(LONG, evaluate_every=3, save_every=50), tmp_path, monkeypatch)
    training, run = Training(config, corpus), Run.create("", config)
    training.held_out = lambda: {
        "held_out_loss": 2 + 10 / training.step + (training.step > 40), "bits_per_byte": 1.0
    }  # fmt: skip
    with pytest.raises(UserError, match="has been above its forecast") as said:
        loop(training, run, 1.0)
    step = run.metrics()[-1]["step"]
    assert run.newest().name == f"step-{step:06d}" and f"after step {step}" in str(said.value)
    assert "--guard.patience 0" in str(said.value)
