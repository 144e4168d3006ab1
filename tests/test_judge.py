"""From answers to an improved run, every stage at a tiny size; and files that people got wrong."""

import json
import math
import random
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import variance
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from test_align import SMALL, TINY
from test_train import run

import align
import chain
import gauge
import improve
import judge
import preferences
import reward
import stages
from chat import Turn
from examine import writer_of
from improve import Dpo, Grpo, Ppo
from instruct import Lessons, lessons, write
from judge import Label, Prefer, Reward, again, felt_better
from preferences import Ranking, Rating, fault, usable
from questions import questions_of
from rollout import sample
from run import RUNS, Run, UserError, write_json
from tasks import RATERS, WORTHLESS, Rater, problem

ASK = {"tasks": ("copy", "unsaid"), "levels": (1,), "device": "cpu"}
SHORT = {**ASK, "steps": 2, "questions": 2, "each": 2, "tokens": 5, "asked": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run that was tuned a little."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(list(lessons(Lessons(("copy",), (1,), 80))), Path("talk.jsonl"))
        how = ["--objective", "chat", "--data.form", "chat", "--data.path", "talk.jsonl"]
        small = ["--steps", "4", "--tokenizer.vocab-size", "300", "--name", "sft"]
        assert run("train.py", *how, *SMALL, *TINY, *small)[0] == 0
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for module in (stages, judge, align):
        monkeypatch.setattr(module, "start", here)
    return tmp_path / "here"


def here(script, *words):
    """A script in this process."""
    if script != "align.py":
        assert run(script, *words)[0] == 0
        return
    with patch.object(sys, "argv", [script, *words]):
        align.script()


# --- files ----------------------------------------------------------------------------------------

GOOD = {"prompt": "a?", "chosen": "x", "rejected": "y"}
RATED = {"prompt": "a?", "response": "x", "rater": "me", "ratings": {"helpful": 4}}


@pytest.mark.parametrize("record, why", [
    ({"prompt": "a?", "chosen": "x"}, '"rejected" is missing or empty'),
    ({"prompt": "a?", "chosen": "x", "rejected": ""}, '"rejected" is missing or empty'),
    ({"prompt": "a?", "chosen": "x", "rejected": "x"}, "the same answer twice"),
    ({"prompt": "a?", "responses": ["x", " "], "ranks": [1, 2]}, "an empty answer"),
    ({"prompt": "a?", "responses": ["x", "y", "x"], "ranks": [1, 2, 2]}, "the same answer twice"),
    (RATED | {"ratings": {"helpful": 11}}, "a rating that is not from 0 to 10"),
    (RATED | {"ratings": {"helpful": -1}}, "a rating that is not from 0 to 10"),
])  # fmt: skip
def test_what_cannot_be_used_is_counted_and_shown_or_ends_it(record, why, tmp_path, capsys):
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, record, RATED, record)))
    found = usable(path, False, 0, 10)
    assert [type(one) for one in found] == [Ranking, Rating]
    assert f"left out 2 × {why}, as in {path}:2" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"said.jsonl:2.*{why}"):
        usable(path, True, 0, 10)


def test_a_file_without_any_use_is_one_sentence(tmp_path):
    (tmp_path / "none.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="nothing to learn"):
        usable(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="nothing to learn"):
        usable(tmp_path / "absent.jsonl")
    assert fault(Rating([Turn("user", "a")], " ", "me", "helpful", 1), 0, 4) == "an empty answer"


# --- what could be known --------------------------------------------------------------------------


def test_the_ceiling_knows_how_often_each_is_preferred():
    """Against counting: orders of two answers by all raters, without equal ones."""
    asked, rng = problem("add", 2, "train", 0), random.Random(0)
    long = f"{asked.worked} {asked.worked}"
    for one, other in ((asked.answer, "1"), (asked.worked, long), ("1", f"1 {long} no")):
        count = sum(
            preferences.ranked(asked, (one, other), RATERS[n % 3], rng, 0).ranks == (1, 2)
            for n in range(6000)
        )
        assert felt_better(asked, one, other) == pytest.approx(count / 6000, abs=0.02)
        both = felt_better(asked, one, other) + felt_better(asked, other, one)
        assert both == pytest.approx(1)


@pytest.mark.parametrize("rater", RATERS, ids=lambda r: r.name)
def test_what_one_person_says_again_and_again_has_this_mean_and_variance(rater):
    asked, rng = problem("add", 2, "train", 0), random.Random(0)
    one = Rating([], asked.answer, rater.name, "helpful", 0)
    values = [rater.rate(asked, asked.answer, "helpful", rng) for _ in range(20_000)]
    middle, noise = again(rater, asked, one)
    assert middle == pytest.approx(sum(values) / len(values), abs=0.03)
    assert noise == pytest.approx(variance(values), rel=0.05)
    sure = Rater("sure", 1e-9)
    assert again(sure, asked, one) == pytest.approx((WORTHLESS + 4, 0), abs=1e-9)
    assert sure.rate(asked, asked.answer, "helpful", rng) == WORTHLESS + 4


def test_what_is_held_out_depends_on_the_question_alone():
    out = [judge.held_out([Turn("user", str(n))], 0.1) for n in range(2000)]
    assert 140 < sum(out) < 260
    assert out == [judge.held_out([Turn("user", str(n))], 0.1) for n in range(2000)]


# --- the stages -----------------------------------------------------------------------------------


def test_simulated_people_say_what_they_think(folder, capsys):
    judge.prefer(Prefer(out="said.jsonl", count=6, each=3, tokens=6, **ASK))
    found = usable(Path("said.jsonl"))
    ratings = [one for one in found if isinstance(one, Rating)]
    assert len(ratings) % 3 == 0 and {r.criterion for r in ratings} == {
        "helpful", "honest", "harmless"
    }  # fmt: skip
    assert any(isinstance(one, Ranking) for one in found)
    assert "orders" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):  # it may be somebody's work
        judge.prefer(Prefer(out="said.jsonl", **ASK))
    with pytest.raises(UserError, match="no rater 'nobody'"):
        Prefer(raters=("nobody",))


def test_a_person_may_label_them(folder, monkeypatch):
    monkeypatch.setattr(judge, "label", partial(preferences.label, say=lambda text: "1"))
    judge.labels(Label(out="mine.jsonl", count=3, each=2, tokens=6, **ASK))
    assert all(one.ranks[0] == 1 for one in usable(Path("mine.jsonl")))


@pytest.mark.parametrize("said", ["pairs", "order", "ratings"])
@pytest.mark.parametrize("arch", ["decoder", "encoder"])
def test_a_reward_model_is_fitted_kept_and_read_again(folder, said, arch, capsys):
    config = Reward(name="judge", count=40, said=said, arch=arch, held=0.3, epochs=1, **ASK)
    judge.reward(config)
    out = capsys.readouterr().out
    assert ("noise" if said == "ratings" else "ceiling") in out
    writer = writer_of("sft", "", "cpu")
    model = reward.load(Run.open("judge"), writer.tokenizer, torch.device("cpu"))
    assert model.model.config.arch == arch
    found = json.loads((RUNS / "judge" / "examination.json").read_text())
    assert all(math.isfinite(x) for x in found.values())
    with pytest.raises(UserError, match="judges texts and writes none"):
        writer_of("judge", "", "cpu")
    with pytest.raises(UserError, match="is no reward model"):
        reward.load(Run.open("sft"), writer.tokenizer, torch.device("cpu"))
    other = replace(writer.tokenizer, special=writer.tokenizer.special | {"<|new|>": 999})
    with pytest.raises(UserError, match="another tokenizer"):
        reward.load(Run.open("judge"), other, torch.device("cpu"))


def test_a_normalised_reward_model_has_mean_0_and_variance_1(folder):
    judge.reward(Reward(name="judge", count=40, held=0.3, epochs=1, **ASK))
    writer = writer_of("sft", "", "cpu")
    model = reward.load(Run.open("judge"), writer.tokenizer, torch.device("cpu"))
    (path,) = (RUNS / "sft").glob("preferences-*.jsonl")
    config = Reward(held=0.3)
    parts = judge.material(config, writer, usable(path))
    scores = model.scores(reward.texts_of(parts.train, torch.device("cpu")))
    assert abs(scores.mean()) < 1e-4 and scores.std(correction=0) == pytest.approx(1, abs=1e-4)


def test_nothing_of_the_kind_is_one_sentence(folder):
    Path("said.jsonl").write_text((json.dumps(GOOD) + "\n") * 3)
    with pytest.raises(UserError, match="of 3 records 0 are ratings by the criterion honest"):
        judge.reward(Reward(name="j", preferences="said.jsonl", said="ratings", criterion="honest"))


@pytest.mark.parametrize("config", [
    Ppo(name="better", epochs=1, minibatches=1, **SHORT), Grpo(name="better", **SHORT),
    Dpo(name="better", count=12, pairs=2, evaluate_every=1, **SHORT),
], ids=["ppo", "grpo", "dpo"])  # fmt: skip
def test_a_run_is_improved_kept_and_read_again(folder, config, capsys):
    align.better(config)
    out = capsys.readouterr().out
    assert "made up what nobody can know" in out and (RUNS / "better" / "gauge.png").is_file()
    assert writer_of("better", "", "cpu").model.config.layers == 2
    stands = json.loads((RUNS / "better" / "standing.json").read_text())
    assert stands.keys() == {"before", "after"}
    rows = Run.open("better").metrics()
    assert [row["step"] for row in rows] == [1, 2]
    for changed in (replace(config, steps=9), type(config)(name="better", steps=9)):
        with pytest.raises(UserError, match="goes on as better began: leave out --steps"):
            align.better(replace(changed, resume=True))
    align.better(type(config)(name="better", resume=True))
    assert len(Run.open("better").metrics()) == 2


def test_what_is_longer_than_the_context_is_left_out_and_counted(folder, capsys):
    """Of learned positions there are no more, and others were never trained so far out."""
    long = {"prompt": "b?", "chosen": "x " * 600, "rejected": "y"}
    other = [{**GOOD, "prompt": f"{n}?"} for n in range(30)]
    Path("said.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (*other, long)))
    writer = writer_of("sft", "", "cpu")
    found = align.pairs(Dpo(preferences="said.jsonl"), writer)
    assert len(found) == 30
    told = "left out 1 × longer than the model's context of 512 tokens"
    assert told in capsys.readouterr().out
    parts = judge.material(Reward(held=0.3), writer, usable(Path("said.jsonl")))
    assert len(parts.train) + len(parts.held) == 30 and told in capsys.readouterr().out
    assert len(parts.spoken) == len(parts.held)
    with pytest.raises(UserError, match="longer than the model's context of 512 tokens: 'x x"):
        align.pairs(Dpo(preferences="said.jsonl", strict=True), writer)
    with pytest.raises(UserError, match="sft exists already: choose another"):
        judge.reward(Reward(name="sft"))


def test_resuming_what_is_not_there_trains_nothing(folder):
    shutil.rmtree(RUNS / "sft")
    with pytest.raises(UserError, match="there is no run named 'nothere'"):
        align.better(Ppo(name="nothere", resume=True))
    assert not [*RUNS.glob("*/config.json")]


def test_a_run_that_was_stopped_goes_on_to_the_same_end(folder):
    config = Grpo(name="whole", **{**SHORT, "steps": 3}, save_every=1)
    align.better(config)
    shutil.copytree(RUNS / "whole", RUNS / "cut")
    shutil.rmtree(Run.open("cut").newest())
    values = json.loads((RUNS / "cut" / "improvement.json").read_text())
    write_json(RUNS / "cut" / "improvement.json", values | {"name": "cut"})
    align.better(Grpo(name="cut", resume=True))
    one, other = (Run.open(name) for name in ("whole", "cut"))
    assert [row["step"] for row in other.metrics()] == [1, 2, 3]
    assert {**one.metrics()[-1], "seconds": 0} == {**other.metrics()[-1], "seconds": 0}
    for a, b in zip(*(writer_of(n, "", "cpu").model.parameters() for n in ("whole", "cut")),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_a_reward_model_judges_and_its_weights_begin_the_critic(folder):
    judge.reward(Reward(name="judge", count=30, held=0.3, epochs=1, **ASK))
    config = Ppo(name="better", reward="judge", critic="own", **SHORT)
    writer = writer_of("sft", "", "cpu")
    it = align.improvement(replace(config, run="sft"), writer, None)
    known = it.judge.model.model.state_dict()
    assert all(torch.equal(x, known[n]) for n, x in it.parts["critic"].state_dict().items())
    align.better(config)


def test_questions_of_one_s_own_are_judged_by_a_model(folder):
    judge.reward(Reward(name="judge", count=30, held=0.3, epochs=1, **ASK))
    config = Grpo(name="better", reward="judge", path="talk.jsonl", **SHORT)
    align.better(config)
    row = Run.open("better").metrics()[-1]
    assert "reward" in row and "right" not in row
    with pytest.raises(UserError, match="--path needs a --reward"):
        Grpo(path="talk.jsonl")
    Path("none.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(UserError, match=r"none\.jsonl:1"):
        align.better(replace(config, name="other", path="none.jsonl"))


def test_one_s_own_questions_end_before_the_reply_that_was_given():
    talk = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    write([talk, talk[:2]], path := Path("own.jsonl"))
    assert [one.turns for one in questions_of(path)] == [talk[:3], talk[:1]]
    path.unlink()


def test_answers_stand_with_their_questions(monkeypatch):
    """Several to each, drawn in another order: short ones first."""

    def said(writer, prompts, tokens, temperature, seed, numbers):
        replies = [f"{prompt} {n % 2}" for prompt, n in zip(prompts, numbers, strict=True)]
        return SimpleNamespace(replies=replies)

    monkeypatch.setattr(judge, "sample", said)
    monkeypatch.setattr(judge, "prompt_ids", lambda writer, turns: turns)
    asked = [SimpleNamespace(turns="x" * n) for n in (5, 1, 3)]
    found = judge.answered(None, asked, 2, 1.0, 9, 0)
    assert found == [("xxxxx 0", "xxxxx 1"), ("x 0", "x 1"), ("xxx 0", "xxx 1")]


def test_who_knows_no_roles_cannot_be_asked(folder):
    assert run("train.py", "--data.mix", "a=world:60", "--name", "base", *SMALL, *TINY, "--steps",
               "2", "--tokenizer.vocab-size", "300")[0] == 0  # fmt: skip
    for stage, config in ((align.better, Grpo(run="base", **SHORT)),
                          (judge.prefer, Prefer(run="base", **ASK))):  # fmt: skip
        with pytest.raises(UserError, match="knows no roles"):
            stage(config)


# --- the gauge, and what is drawn -----------------------------------------------------------------


def test_repetition_is_counted():
    assert gauge.repeated("a b c d a b c d") == pytest.approx(1 / 5)
    assert gauge.repeated("a b c") == 0 == gauge.repeated("")
    assert gauge.repeated("a " * 20) > 0.9


def test_the_frontier_is_the_closed_form():
    """KL(π*‖π_ref) and E r of π* ∝ π_ref exp(r/β), which no policy at this KL beats."""
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for beta, (kl, best) in zip((2.0, 0.5), gauge.frontier(scores, [2.0, 0.5]), strict=True):
        p = (scores / beta).softmax(-1)
        assert kl == pytest.approx((p * (p * 8).log()).sum(-1).mean().item())
        assert best == pytest.approx((p * scores).sum(-1).mean().item())
        other = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)).double()
        other = other / other.sum(-1, keepdim=True)
        q = other  # whoever moves elsewhere: reward − β KL is less
        there = (q * scores).sum(-1).mean() - beta * (q * (q * 8).log()).sum(-1).mean()
        assert there < best - beta * kl


def test_the_chain_at_a_tiny_size(folder, monkeypatch, capsys):
    monkeypatch.setattr(align, "best_possible", lambda it: [(0.0, 0.0), (1.0, 1.0)])
    monkeypatch.setattr(
        improve, "sample", lambda writer, prompts, tokens, *rest: sample(writer, prompts, 4, *rest)
    )
    monkeypatch.setattr(chain, "trained", lambda name, *words: "sft")
    chain.think(chain.Think((1,), tuning=2, lessons=60, steps=2, seeds=2, asked=2, device="cpu"))
    assert "GRPO" in capsys.readouterr().out and (RUNS / "think.png").is_file()
    chain.everything(
        chain.All(
            ("copy",), ("absent",), (1,), lessons=60, compared=30, steps=1, asked=2, device="cpu"
        )
    )
    out = capsys.readouterr().out
    assert all(name in out for name in ("SFT", "PPO", "GRPO", "DPO", "made up"))
    assert (RUNS / "all.png").is_file()
