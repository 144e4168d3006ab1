"""Laws of improve.py: steps are their definitions, and nothing depends on how work is dealt out."""

import math
from dataclasses import replace

import pytest
import torch
from models import DECODERS, SHAPES, shaken

from bpe import BPE
from chat import with_roles
from improve import (
    Dpo,
    DpoImprovement,
    Grpo,
    OnlineImprovement,
    Pair,
    Ppo,
    loop,
)
from mesh import Mesh
from model import Transformer
from policy import gae, group_advantages, token_rewards
from questions import checked, judged, question
from rollout import likely, states
from run import Run, UserError
from tasks import problem
from vocabulary import END_OF_TEXT
from writer import Writer

TOKENIZER = with_roles(BPE.bytes((END_OF_TEXT,)))


def writer(kind="llama", seed=0, dtype=torch.float64):
    """A model that says anything, and ends one answer in about six tokens."""
    config = replace(SHAPES[kind], vocab_size=262, context=128)
    model = shaken(Transformer(config), seed).to(dtype).eval()
    return Writer(model, TOKENIZER, [256], {256, TOKENIZER.special["<|end|>"], *range(40)})


def length(asked, drawn):
    """A judge with a taste: for letters that are even."""
    return torch.tensor([sum(ord(c) % 2 == 0 for c in said) + 0.1 * len(said)
                         for said in drawn.replies]).to(drawn.log_p)  # fmt: skip


BASE = {"tasks": ("copy", "add"), "levels": (1,), "questions": 4, "each": 3, "tokens": 9,
        "batch": 64, "lr": 0.01, "steps": 3, "device": "cpu", "stop_kl": 0.0}  # fmt: skip
CONFIGS = {
    "ppo": Ppo(**BASE, epochs=2, minibatches=2),
    "ppo-own": Ppo(**BASE, critic="own", whiten_rewards=True, target_kl=1.0, temperature=1.3),
    "grpo": Grpo(**BASE, temperature=0.7),
    "grpo-loss": Grpo(**BASE, kl="loss", scaled=False, epochs=2, beta=0.3),
}
DPO = Dpo(**{k: v for k, v in BASE.items() if k != "stop_kl"}, pairs=5, evaluate_every=2)


def pairs(seed, count):
    rng = torch.Generator().manual_seed(seed)

    def some(most):
        n = int(torch.randint(1, most, (1,), generator=rng))
        return torch.randint(256, (n,), generator=rng).tolist()

    return [Pair([256, *some(8)], some(9), some(9)) for _ in range(count)]


def made(kind, config=None, world=None, mine=None, seed=0):
    config, mine = config or (DPO if kind == "dpo" else CONFIGS[kind]), mine or writer(seed=seed)
    if kind == "dpo":
        return DpoImprovement(config, mine, length, pairs(seed, 7), world)
    return OnlineImprovement(config, mine, length, world)


def weights(it):
    return {f"{name}/{n}": x for name, m in it.parts.items() for n, x in m.state_dict().items()}


def far(one, other):
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


def after(kind, config=None, world=None, steps=2, seed=0):
    it = made(kind, config, world, seed=seed)
    rows = [it.advance() for _ in range(steps)]
    return weights(it), rows


KINDS = [*CONFIGS, "dpo"]


# --- at the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_at_the_start_the_policy_is_what_it_was(kind):
    """Ratio 1, nothing clipped, KL 0 — of any decoder."""
    it = made("ppo", replace(CONFIGS["ppo"], epochs=1, minibatches=1), mine=writer(kind))
    row = it.advance()
    assert abs(row["kl"]) < 1e-9 and row["clipped"] == 0 and row["moved"] < 1e-18
    assert row["updates"] == 1 and row["norm"] > 0
    assert far(weights(it), weights(made("ppo", mine=writer(kind)))) > 1e-3


def test_dpo_begins_at_ln_2():
    row = made("dpo").advance()
    assert abs(row["loss"] - math.log(2)) < 1e-12
    assert row["chosen"] == row["rejected"] == 0 and abs(row["kl"]) < 1e-9


# --- a step is its definition ---------------------------------------------------------------------


def by_hand(it, drawn, scores, numbers):
    """Advantages and returns of one round, response by response, with nothing padded."""
    c, found = it.config, []
    for i, said in enumerate(drawn.texts.response.tolist()):
        one = drawn.texts.rows(torch.tensor([i]))
        log_p = drawn.log_p[i : i + 1, :said]
        with torch.no_grad():
            h = states(it.reference, one)
            ref = likely(it.reference, h, one, c.temperature, it.never)
            mask = torch.ones(1, said).double()
            score = scores[i : i + 1] - (0.0 if drawn.ended[i] else c.penalty)
            if isinstance(c, Ppo):
                body = it.parts.get("critic", it.model)
                values = it.parts["value"](states(body, one))
                rewards = token_rewards(score, log_p, ref, mask, it.beta)
                found.append((rewards, values))
            else:
                found.append(score - (it.beta * (log_p - ref).sum() if c.kl == "reward" else 0))
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_advantages_are_those_of_each_response_alone(kind):
    it = made(kind)
    if "value" in it.parts:
        assert not it.parts["value"].dense.weight.any()  # nothing is expected at first
        torch.nn.init.normal_(it.parts["value"].dense.weight)
    before = [one.turns for one in it.draw()[0]]
    it.advance()  # the policy is no longer what it was
    asked, drawn, numbers = it.draw()
    scores = length(asked, drawn)
    assert [one.turns for one in asked] != before
    found = it.round(drawn, scores)
    each = by_hand(it, drawn, scores, numbers)
    sizes = drawn.texts.response.tolist()
    if isinstance(it.config, Ppo):
        rewards = torch.cat([r[0] for r, _ in each])
        if it.config.whiten_rewards:
            rewards = rewards / (rewards.var(unbiased=False) + 1e-8).sqrt() + rewards.mean() * (
                1 - 1 / (rewards.var(unbiased=False) + 1e-8).sqrt()
            )
        rewards = rewards.split(sizes)
        ones = [gae(r[None], v, torch.ones_like(v), it.config.gamma, it.config.lam)
                for r, (_, v) in zip(rewards, each, strict=True)]  # fmt: skip
        flat = torch.cat([a[0] for a, _ in ones])
        flat = (flat - flat.mean()) / (flat.var(unbiased=False) + 1e-8).sqrt()
        for i, (n, a) in enumerate(zip(sizes, flat.split(sizes), strict=True)):
            assert torch.allclose(found.advantages[i, :n], a, rtol=0, atol=1e-12)
            assert torch.allclose(found.returns[i, :n], ones[i][1][0], rtol=0, atol=1e-12)
            assert not found.advantages[i, n:].any()
    else:
        groups = group_advantages(torch.cat(each).view(-1, it.config.each), it.config.scaled)
        for i, (n, a) in enumerate(zip(sizes, groups.flatten(), strict=True)):
            assert torch.allclose(found.advantages[i, :n], a.expand(n), rtol=0, atol=1e-12)
            assert not found.advantages[i, n:].any()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_has_the_gradient_of_finite_differences(kind):
    it = made(kind)
    asked, drawn, _numbers = it.draw()
    experience = it.round(drawn, length(asked, drawn))
    experience = experience._replace(old=experience.old + 0.05, values=experience.values + 0.1)
    tokens = experience.texts.response.sum().double()

    def loss():
        return it.loss(experience, tokens)[0]

    loss().backward()
    rng = torch.Generator().manual_seed(0)
    for p in it.params:
        if p.grad is None:
            continue
        way, eps = torch.randn(p.shape, generator=rng, dtype=torch.float64), 1e-6
        with torch.no_grad():
            p += eps * way
            up = loss().item()
            p -= 2 * eps * way
            down = loss().item()
            p += eps * way
        assert (p.grad * way).sum().item() == pytest.approx((up - down) / (2 * eps), abs=2e-7)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_its_formula(kind):
    """Response by response and token by token, once the policy has moved."""
    it = made(kind)
    it.advance()
    asked, drawn, _numbers = it.draw()
    some, c = it.round(drawn, length(asked, drawn)), it.config
    some = some._replace(old=some.old + 0.3 * torch.randn(some.old.shape).double(),
                         reference=some.reference + 0.7, values=some.values + 0.1)  # fmt: skip
    total = 0.0
    for i, n in enumerate(some.texts.response.tolist()):
        one = some.texts.rows(torch.tensor([i]))
        with torch.no_grad():
            log_p = likely(it.model, states(it.model, one), one, c.temperature, it.never)[0]
            values = it.values(one)[0] if isinstance(c, Ppo) else None
        for t in range(n):
            A, ratio = some.advantages[i, t].item(), math.exp(log_p[t] - some.old[i, t])
            total -= min(ratio * A, min(max(ratio, 1 - c.clip), 1 + c.clip) * A)
            if isinstance(c, Ppo):
                V, old, R = (x.item() for x in (values[t], some.values[i, t], some.returns[i, t]))
                near = old + min(max(V - old, -c.value_clip), c.value_clip)
                total += c.value_weight * 0.5 * max((V - R) ** 2, (near - R) ** 2)
            elif c.kl == "loss":
                delta = (some.reference[i, t] - log_p[t]).item()
                total += it.beta * (math.exp(delta) - delta - 1)
    tokens = some.texts.response.sum().double()
    found = it.loss(some, tokens)[0].item()
    assert found == pytest.approx(total / tokens.item(), abs=1e-10)


def test_each_time_through_a_round_has_an_order_of_its_own():
    it = made("ppo")
    orders = []
    for it.step in range(3):
        parts = [part.tolist() for part in it.minibatches(list(range(12)))]
        assert [len(part) for part in parts] == [6] * 4
        orders += [parts[0] + parts[1], parts[2] + parts[3]]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


# --- nothing depends on how it is dealt out -------------------------------------------------------


def agree(rows, again):
    """Numbers of each step, but for how many pairs DPO orders at first: all margins are 0 there,
    and rounding decides."""
    for step, (one, other) in enumerate(zip(rows, again, strict=True)):
        assert one.keys() == other.keys()
        names = one.keys() - ({"ordered"} if step == 0 else set())
        assert all(abs(one[n] - other[n]) <= 1e-12 * max(1, abs(one[n])) for n in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5])
def test_micro_batches_change_nothing(kind, batch):
    config = DPO if kind == "dpo" else CONFIGS[kind]
    whole, rows = after(kind)
    cut, again = after(kind, replace(config, batch=batch))
    assert far(whole, cut) < 1e-12
    agree(rows, again)


def on_rank(kind, size):
    """Of several processes the first `size` do it together."""
    mesh = Mesh(size)
    return after(kind, world=mesh.data) if mesh.inside else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_processes_change_nothing(ranks, kind, size):
    whole, rows = after(kind)
    found = [x for x in ranks.run(on_rank, kind, size) if x]
    assert len(found) == size
    for theirs, again in found:
        assert far(whole, theirs) < 1e-12
        agree(rows, again)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_a_checkpoint(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = made(kind, mine=writer(dtype=torch.float32))
    for _ in range(2):
        whole.advance()
    run = Run.create("improved", {"model": {}})
    whole.save(run)
    again = made(kind, mine=writer(dtype=torch.float32))
    again.load(run)
    assert again.step == 2 and again.beta == whole.beta
    assert whole.advance() == again.advance() and far(weights(whole), weights(again)) == 0


# --- they learn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ppo", "ppo-own", "grpo", "grpo-loss"])
def test_the_reward_rises(kind):
    config = replace(CONFIGS[kind], steps=25, questions=8, each=8, beta=0.01, target_kl=0.0)
    it = made(kind, config, mine=writer(dtype=torch.float32))
    rewards = [it.advance()["reward"] for _ in range(config.steps)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1


def test_dpo_tells_them_apart():
    it = made("dpo", replace(DPO, steps=30, pairs=7))
    rows = [it.advance() for _ in range(30)]
    assert rows[-1]["loss"] < 0.3 and rows[-1]["ordered"] == 1
    assert rows[-1]["chosen"] - rows[-1]["rejected"] > 1


def test_a_round_that_moves_too_far_ends():
    config = replace(CONFIGS["ppo"], lr=0.5, epochs=4, stop_kl=0.01)
    assert made("ppo", config).advance()["updates"] < 8
    assert made("ppo", replace(config, stop_kl=0.0)).advance()["updates"] == 8


def test_beta_is_steered():
    it = made("ppo-own")
    it.advance()
    assert it.beta == pytest.approx(0.02 * (1 - 0.2 * 12 / 2000))


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_reward_that_is_no_number_is_shown_with_its_answer():
    it = made("grpo")
    it.judge = lambda asked, drawn: length(asked, drawn) * torch.tensor([1.0] * 5 + [math.nan] * 7)
    with pytest.raises(UserError, match="the reward is nan for the answer"):
        it.advance()


def test_a_policy_that_goes_too_far_is_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIGS["grpo"], lr=1.0, beta=0.0, explode=2.0, steps=20, save_every=1)
    it, run = made("grpo", config), Run.create("improved", {"model": {}})
    with pytest.raises(UserError, match="with more --beta than 0, or less --lr than 1"):
        loop(it, run)
    assert run.checkpoints()


def test_the_check_knows_right_answers():
    asked = [question(problem("add", 1, "train", n)) for n in range(3)]
    drawn = (
        made("grpo")
        .draw()[1]
        ._replace(
            replies=[asked[0].problem.answer, "no", asked[2].problem.worked],
            log_p=torch.zeros(3, 1).double(),
        )
    )
    assert checked(asked, drawn).tolist() == [1, 0, 1]
    assert judged(checked, asked, drawn).tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind, how", [
    (Ppo, {"gamma": 1.5}), (Ppo, {"value_clip": 0}), (Grpo, {"each": 1}), (Ppo, {"steps": 0}),
    (Ppo, {"clip": 1.0}), (Ppo, {"minibatches": 10**6}), (Dpo, {"smoothing": 0.5}),
    (Dpo, {"beta": 0.0}), (Ppo, {"tasks": ("fly",)}), (Grpo, {"levels": (0,)}),
    (Grpo, {"horizon": 0}), (Ppo, {"target_kl": 1.0, "horizon": 100}),
    (Ppo, {"target_kl": 1.0, "beta": 0.0}), (Grpo, {"tasks": (), "also": ("copy",)}),
    (Ppo, {"temperature": 0.0}), (Ppo, {"beta": -1.0}),
])  # fmt: skip
def test_a_wrong_setting_is_one_sentence(kind, how):
    with pytest.raises(UserError, match=r"--|no task"):
        kind(**how)
