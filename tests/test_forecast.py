"""Laws of forecast.py and budgets.py: what is forecast holds, and a run is held to it."""

import json
import math
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import TINY, folder, run  # noqa: F401

import budgets
import forecast
import training
from budgets import Fitted, Grid, Judged, Told
from data import DataConfig, TokenizerConfig
from forecast import FILE, SHARES, Forecast, Small, curve, misfit
from laws import Law
from run import Run, UserError
from training import Train

LAW = Law(1.2, (40.0, 1500.0), (0.38, 0.58))


def small(seed=0, noise=0.0, law=LAW, known=20):
    """Nineteen runs as `scaling.py run` has them, whose curves fall to their end with noise; only
    at their last shares are they `known`."""
    rng, runs = np.random.default_rng(seed), []
    for name, words in Grid().runs().items():
        width, steps = (int(x) for x in name.split("-")[1:])
        N, D = budgets.size(budgets.shape(width)), steps * budgets.UPDATE
        assert words[2] == name
        falling = law(N, D) * (1 + 0.5 * (1 - SHARES) ** 2)
        falling[: 20 - known] = math.nan
        runs.append(Small(name, N, D, falling * np.exp(rng.normal(0, noise))))
    return runs


def told(runs, N=400_000, D=2_000_000):
    return forecast.forecast(runs, N, D, "python train.py", "mark")


# --- the forecast ---------------------------------------------------------------------------------


def test_a_curve_is_read_at_its_shares():
    """Where it was measured it is that; between, along the logarithm; before, unknown."""
    all = curve([(n, 5 - n / 200) for n in range(10, 201, 10)], 200)
    assert all == pytest.approx(5 - SHARES)
    some = curve([(50, 4.0), (200, 2.0)], 200)
    assert np.isnan(some[:4]).all() and some[4] == 4 and some[-1] == 2
    assert some[9] == pytest.approx(4 - 2 * math.log(2) / math.log(4))


def test_without_noise_the_larger_runs_curve_is_forecast():
    it = told(small())
    assert it.shares == tuple(SHARES)
    assert it.middle == pytest.approx(
        LAW(400_000, 2_000_000) * (1 + 0.5 * (1 - SHARES) ** 2), rel=1e-3
    )
    assert it.spread == pytest.approx([forecast.SURE] * 20)


@settings(max_examples=2)
@given(seeds)
def test_noise_of_the_runs_is_in_the_interval(seed):
    """Its width is that of the errors which forecasts make, within a factor of three."""
    errors, spread = [], []
    for n in range(8):
        it = told(small(8 * seed + n, 0.02, known=2))
        errors.append(math.log(it.middle[-1] / LAW(400_000, 2_000_000)))
        spread.append(it.spread[-1])
    made = math.hypot(np.std(errors), 0.02)
    assert made / 3 < np.mean(spread) < 3 * made


@pytest.mark.slow
def test_of_two_hundred_forecasts_four_in_five_hold():
    held = 0
    for seed in range(200):
        low, high = told(small(seed, 0.02, known=2)).interval()
        new = np.random.default_rng(10_000 + seed).normal(0, 0.02)
        held += low <= LAW(400_000, 2_000_000) * math.exp(new) <= high
    print(f"{held} of 200 inside")
    assert held >= 150


def test_runs_of_one_evaluation_or_one_budget_forecast_an_end():
    it = told(small(0, 0.02, known=1))
    assert it.shares == (1.0,) and it.follows == (0.99,)
    runs = [Small(f"{n}", 1000 << n, 10**9 >> n, np.full(20, 3 - n * 0.01)) for n in range(7)]
    assert misfit(runs, -1) == 0


def test_a_law_that_is_wrong_beyond_its_runs_is_trusted_less():
    """A bend in the largest budget: what smaller ones say of it is off by as much."""
    runs = small(known=2)
    top = max(r.N * r.D for r in runs)
    bent = [r._replace(curve=r.curve * (1.1 if top / 1.5 < r.N * r.D else 1)) for r in runs]
    assert misfit(runs, -1) == pytest.approx(0, abs=1e-3)
    assert misfit(bent, -1) == pytest.approx(math.log(1.1), rel=1e-2)
    assert told(bent).spread[-1] > 0.09
    assert misfit(runs[:7], -1) == 0  # too few to leave some out


def flat(**changed):
    """A forecast of 2 bits per byte, ± 10 %, from begin to end."""
    n = len(SHARES)
    made = Forecast("python train.py", 1, 2, "mark", ("small-1",), tuple(SHARES.tolist()),
                    (2.0,) * n, (0.1,) * n, (0.5,) * n)  # fmt: skip
    return replace(made, **changed)


@given(st.floats(0.05, 1), st.floats(1, 4))
def test_what_lies_within_four_deviations_is_no_fault(share, loss):
    steps = 1000
    step = max(50, round(share * steps))
    assert bool(forecast.outside(flat(), step, steps, loss)) == (loss > 2 * math.exp(0.4))
    assert not forecast.outside(flat(), 40, steps, 9.0)  # before the first share nothing is said


def test_an_interval_holds_its_share_of_a_normal_logarithm():
    rng = np.random.default_rng(0)
    drawn = 2 * np.exp(rng.normal(0, 0.1, 100_000))
    for holds in (0.5, 0.8, 0.95):
        low, high = flat().interval(0.3, holds)
        assert np.mean((low < drawn) & (drawn < high)) == pytest.approx(holds, abs=0.01)


@given(seeds, st.floats(0, 0.95))
def test_a_run_under_way_ends_as_runs_with_its_error_do(seed, rho):
    """Of pairs of errors, then and at the end, those that begin alike: their mean and spread."""
    it = flat(spread=(0.2,) * 19 + (0.1,), follows=(rho,) * 20)
    rng = np.random.default_rng(seed)
    then, other = rng.normal(size=(2, 400_000))
    end = 0.1 * (rho * then + math.sqrt(1 - rho**2) * other)
    alike = np.abs(then - 1) < 0.05
    low, middle, high = it.from_here(0.5, 2 * math.exp(0.2))
    assert math.log(middle / 2) == pytest.approx(end[alike].mean(), abs=0.004)
    inside = (math.log(low / 2) < end) & (end < math.log(high / 2))
    assert inside[alike].mean() == pytest.approx(0.8, abs=0.02)


# --- files ----------------------------------------------------------------------------------------


def test_a_forecast_is_read_as_it_was_written(tmp_path):
    it = told(small(0, 0.01))
    forecast.write(it, tmp_path / FILE)
    assert forecast.read(tmp_path / FILE) == it


@pytest.mark.parametrize("bad, said", [
    ("", "cannot read"), ("[]", "cannot read"), ("{}", "damaged"), ('{"x": 1}', "no setting 'x'"),
    (json.dumps(asdict(flat(middle=(1.0,)))), "incomplete"),
    (json.dumps(asdict(flat(middle=(math.nan,) * 20))), "incomplete"),
    (json.dumps(asdict(flat(spread=(0.0,) * 20))), "above 0"),
    (json.dumps(asdict(flat()) | {"tokens": "many"}), "tokens cannot be"),
])  # fmt: skip
def test_a_damaged_forecast_is_told_in_a_sentence(tmp_path, bad, said):
    (tmp_path / FILE).write_text(bad)
    with pytest.raises(UserError, match=said) as error:
        forecast.read(tmp_path / FILE)
    assert FILE in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_smaller_and_a_larger_run_are_others(more):
    it = flat(parameters=70, tokens=900, held_out="m")
    forecast.check(it, 70, 900, "m", "f.json")
    for N, D, said in ((70 + more, 900, "70 parameters, not"), (70, 900 + more, "900 tokens")):
        with pytest.raises(UserError, match=said):
            forecast.check(it, N, D, "m", "f.json")


# --- a run that is held to it ---------------------------------------------------------------------

STEPS = 20
HELD = [*TINY, "--steps", str(STEPS), "--evaluate-every", "1", "--save-every", "20"]


def forecast_of(name, factor, **changed):
    """A file that says `factor` times what the run of this name, which is over, did."""
    found = Run.open(name)
    losses = np.array([loss for _, loss in forecast.evaluations(found)])
    state = json.loads((found.newest() / "train_state.json").read_text())
    it = flat(
        parameters=budgets.size(budgets.stored(found).model), tokens=found.metrics()[-1]["tokens"],
        held_out=state["held_out"], middle=tuple(losses * factor), spread=(0.02,) * 20,
    )  # fmt: skip
    forecast.write(replace(it, **changed), budgets.Path(FILE))


def test_a_run_is_drawn_against_its_forecast_and_stopped_above_it(folder):  # noqa: F811
    assert run("train.py", *HELD, "--name", "free")[0] == 0
    forecast_of("free", 1.0)
    status, out, err = run("train.py", *HELD, "--name", "as-told", "--forecast", FILE)
    assert status == 0, err
    assert (folder / "runs/as-told/forecast.png").is_file()
    assert (folder / "runs/as-told" / FILE).read_text() == (folder / FILE).read_text()
    low, _ = flat(spread=(0.02,) * 20).interval()
    assert f"forecast {forecast.evaluations(Run.open('free'))[0][1] * low / 2:.3f}" in out
    forecast_of("free", 0.9)  # the run lies 11 % above: five deviations
    status, out, err = run("train.py", *HELD, "--name", "above", "--forecast", FILE)
    assert status == 2 and "lie above" in err and "--guard.patience 0 goes on" in err
    assert Run.open("above").newest().name == "step-000001"
    (folder / FILE).unlink()  # the run has its own
    status, out, err = run(
        "train.py", "--resume", "--name", "above", "--guard.patience", "0", "--forecast", FILE
    )
    assert status == 0, err


def test_the_forecast_of_another_run_is_refused_before_anything_begins(folder):  # noqa: F811
    assert run("train.py", *HELD, "--name", "free")[0] == 0
    for changed, said in [
        ({"parameters": 7}, "7 parameters, not"),
        ({"tokens": 7}, "7 tokens of training, not"),
        ({"held_out": "other"}, "other held-out documents"),
    ]:
        forecast_of("free", 1.0, **changed)
        status, _, err = run("train.py", *HELD, "--name", "other", "--forecast", FILE)
        assert (status, err.count("\n")) == (2, 1) and said in err
    status, _, err = run("train.py", *HELD, "--name", "other", "--forecast", "nothing.json")
    assert status == 2 and "cannot read nothing.json" in err
    masked = ["--model.arch", "encoder", "--objective", "masked"]
    status, _, err = run("train.py", *HELD, *masked, "--name", "other", "--forecast", FILE)
    assert status == 2 and "only --objective causal has" in err
    assert not (folder / "runs/other").exists()


# learning rates 100 times too high or low, and from which share of the steps the text is another
FAULTS = {"fast": ("1.0", 1.0), "slow": ("0.0001", 1.0), "text": ("0.01", 0.5)}


def held_to_its_forecast(name, words, fault="", seed=0):
    """(steps, the last that was measured, why it ended there) of a run that the grid forecasts."""
    width, steps = (int(x) for x in name.split("-")[-2:])
    lr, until = FAULTS.get(fault, ("0.01", 1.0))
    plain = training.Training.batch

    def batch(self, rows, name, number):
        found = plain(self, rows, name, number)
        if name == "objective" and self.step >= until * steps:
            found.targets.copy_((found.targets + 128) % 256)
        return found

    name = f"{fault or 'healthy'}-{width}-{steps}-{seed}"
    budgets.tell(Told(width=width, steps=steps, out=FILE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "batch", batch)
        status, _, err = run(*words, "--name", name, "--optim.lr", lr, "--seed", str(seed),
                             "--forecast", FILE)  # fmt: skip
    assert (status == 0) == (not err), err
    return steps, Run.open(name).metrics()[-1]["step"], err.strip()


def faults_and_health():
    """Nine broken runs, each with the share of its steps by which it should be over; 20 healthy
    ones. Beside a grid that is there."""
    found = []
    for name, words in Grid(budgets=(5e11,), widths=(32, 48, 64)).runs().items():
        for fault, (_, until) in FAULTS.items():
            steps, last, why = held_to_its_forecast(name, words, fault)
            begun = until if until < 1 else 0
            found.append((fault, name, bool(why) and last <= (begun + 0.1) * steps))
            print(fault, name, f"stopped at {last / steps:.0%}: {why}", flush=True)
    sizes = Grid(budgets=(2e11, 4e11), widths=(24, 32, 48)).runs().items()
    for n in range(20):
        name, words = list(sizes)[n % 6]
        _, _, why = held_to_its_forecast(name, words, seed=1 + n // 6)
        found.append(("healthy", name, not why))
        print("healthy", name, why or "to its end", flush=True)
    return found


@pytest.mark.slow
def test_broken_runs_are_stopped_and_healthy_ones_are_not(folder):  # noqa: F811
    """Half an hour: a grid, then runs that are held to what it says of them."""
    budgets.grid(Grid())
    found = faults_and_health()
    assert len(found) == 29 and all(good for *_, good in found), found


# --- the grid -------------------------------------------------------------------------------------


def test_each_run_of_a_grid_spends_its_budget():
    for C in (1e11, 4e11, 1e13):
        for name, words in Grid(budgets=(C,), widths=(16, 32, 64)).runs().items():
            width, steps = (int(x) for x in name.split("-")[1:])
            N = budgets.size(budgets.shape(width))
            assert 6 * N * steps * budgets.UPDATE == pytest.approx(C, rel=0.08)
            config = budgets_of(words)
            assert (config.steps, config.batch * config.model.context) == (steps, budgets.UPDATE)
            assert config.steps == 20 * config.evaluate_every
            assert replace(config.model, vocab_size=257) == budgets.shape(width)


def test_a_grid_of_no_text_begins_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"book\.txt is no file"):
        budgets.grid(Grid(path="book.txt"))
    assert not (tmp_path / "runs").exists()
    (words, *_) = Grid(path="book.txt").runs().values()
    assert budgets_of(words).data.path == "book.txt"


def test_a_grid_takes_no_runs_of_another_text(tmp_path, monkeypatch):
    """Nor begins or resumes any before that is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budgets.subprocess, "run", None)
    (tmp_path / "b.txt").write_text("b")
    name = [*Grid().runs()][-1]
    for data, text in [
        (DataConfig(path="a.txt"), "a.txt"), (DataConfig(source="world"), "world"),
        (DataConfig(mix=("a=a.txt", "b=b.txt")), "a=a.txt b=b.txt"),
        (DataConfig(), "Python's own documentation"),
    ]:  # fmt: skip
        left_by(name, small()[-1], settings={"data": data}, last=20)
        for path in ("", "b.txt") if data.path else ("b.txt",):
            with pytest.raises(UserError, match=f"{name} was trained on {text}: choose another"):
                budgets.grid(Grid(path=path))
        shutil.rmtree(tmp_path / "runs")


def test_a_grid_makes_what_is_missing_goes_on_with_what_was_stopped_and_leaves_the_rest(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budgets, "show", lambda fitted: None)
    begun = []
    monkeypatch.setattr(
        budgets.subprocess, "run",
        lambda words, **_: begun.append(words[2:]) or SimpleNamespace(returncode=0),
    )  # fmt: skip
    whole, stopped, *_ = (names := [*Grid().runs()])
    left_by(whole, small()[-1])
    left_by(stopped, small()[-1], last=20)
    budgets.grid(Grid())
    assert begun[0] == ["--resume", "--name", stopped] and len(begun) == len(names) - 1
    assert all("--resume" not in words for words in begun[1:])


def budgets_of(words):
    from train import parse

    return parse(words[1:])[0]


def left_by(name, small, **changed):
    """The folder of a run that ended as a small one did."""
    steps = small.D // budgets.UPDATE
    config = Train(model=budgets.shape(16), tokenizer=TokenizerConfig("bytes"), steps=steps)
    made = Run.create(name, replace(config, **changed.pop("settings", {})))
    for share, loss in zip(SHARES, changed.pop("curve", small.curve), strict=True):
        made.measure(step=round(share * steps), tokens=round(share * small.D), bits_per_byte=loss)
    place = made.folder / "checkpoints" / f"step-{changed.pop('last', steps):06d}"
    place.mkdir(parents=True)
    (place / "train_state.json").write_text(json.dumps({"held_out": changed.pop("mark", "m")}))
    assert not changed


def test_runs_that_say_nothing_are_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = small()[0]
    left_by("small-whole", one)
    left_by("small-cut", one, last=20)
    left_by("small-wild", one, curve=[*one.curve[:-1], 9.0])
    left_by("small-nan", one, curve=[*one.curve[:-1], math.nan])
    left_by("small-masks", one, settings={
        "model": replace(budgets.shape(16), arch="encoder"), "objective": "masked"})  # fmt: skip
    runs, left, mark = budgets.read(["small-*"])
    assert [r.name for r in runs] == ["small-whole"] and mark == "m"
    assert runs[0].curve == pytest.approx(one.curve) and (runs[0].N, runs[0].D) == (one.N, one.D)
    assert sorted(left) == [
        "small-cut: has not come to its end",
        "small-masks: masked, which has no bits per byte",
        "small-nan: has diverged",
        "small-wild: has diverged",
    ]
    with pytest.raises(UserError, match="1 runs fit no law of 5 numbers: 6 more are needed"):
        budgets.show(Fitted())
    with pytest.raises(UserError, match="no run in runs/ is named large"):
        budgets.judge(Judged())
    left_by("large-cut", one, last=20)
    for command in (lambda: budgets.show(Fitted(("large-*",))), lambda: budgets.judge(Judged()),
                    lambda: budgets.tell(Told(("large-*",)))):  # fmt: skip
        with pytest.raises(UserError, match="none of these runs counts: large-cut: has not come"):
            command()
    left_by("small-other", one, mark="other", settings={"tokenizer": TokenizerConfig("bpe")})
    with pytest.raises(UserError, match="different held-out documents"):
        budgets.read(["small-*"])


def test_runs_of_several_tokenizers_are_compared_in_bits_per_byte(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left_by("small-a", small()[0])
    left_by("small-b", small()[1], settings={"tokenizer": TokenizerConfig("bpe")})
    assert len(budgets.read(["small-*"])[0]) == 2


def test_fit_forecast_and_judge_say_what_was_planted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = DataConfig(path="book.txt")
    for one in small(0, 0.005):
        model = budgets.shape(int(one.name.split("-")[1]))
        left_by(one.name, one, settings={"model": model, "data": own})
    budgets.show(Fitted())
    said = capsys.readouterr().out
    assert "small-16-1080" in said and "equal compute" in said
    assert (tmp_path / "runs/scaling.png").is_file()
    budgets.tell(Told(width=128, steps=2000))
    said = capsys.readouterr().out
    N, D = budgets.size(budgets.shape(128)), 2000 * budgets.UPDATE
    it = forecast.read(tmp_path / FILE)
    assert (it.parameters, it.tokens, len(it.runs)) == (N, D, 19)
    assert it.middle[-1] == pytest.approx(LAW(N, D), rel=0.03)
    assert "--forecast forecast.json" in said and "--data.path book.txt" in said  # as theirs
    assert f"{it.middle[-1]:.3f} bits per byte" in said
    large = Small("", N, D, LAW(N, D) * (1 + 0.5 * (1 - SHARES) ** 2))
    left_by("large-1", large, settings={"model": budgets.shape(128)})
    budgets.judge(Judged())
    assert "1 of 1 inside" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the larger runs has 100 ×"):
        budgets.judge(Judged(factor=100))


@pytest.mark.parametrize("bad", [
    lambda: Grid(widths=(17,)), lambda: Grid(widths=()), lambda: Grid(budgets=(0.0,)),
    lambda: Grid(budgets=()), lambda: Grid(least=0), lambda: Told(steps=0), lambda: Told(width=8),
    lambda: Fitted(budget=-1.0), lambda: Fitted(budget=0.0), lambda: Fitted(budget=math.nan),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(UserError):
        bad()
