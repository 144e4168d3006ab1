"""Laws of reward.py: losses are their loops, scores do not depend on pads, truth is found again."""

import math
from itertools import permutations

import pytest
import torch
from helpers import normals, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig, Transformer
from optim import OptimConfig, learning_rate
from reward import (
    LOSSES,
    Judged,
    RewardModel,
    Scale,
    accuracy,
    calibration,
    fitted,
    order_loss,
    pair_loss,
    ranking_loss,
    rating_loss,
    texts_of,
)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


ranks = st.lists(st.integers(1, 4), min_size=2, max_size=5)


def drawn(seed, *shape):
    (x,) = normals(seed, shape)
    return x.detach()


# --- losses ---------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
def test_of_a_pair(seed, often):
    x, y = drawn(seed, 2, 6) * 3
    found = pair_loss(x, y, often)
    for loss, a, b in zip(found.tolist(), x.tolist(), y.tolist(), strict=True):
        right = -often * log_sigmoid(a - b) - (1 - often) * log_sigmoid(b - a)
        assert loss == pytest.approx(right, abs=1e-12)


def test_a_large_difference_is_no_overflow():
    x = torch.tensor([0.0, 500.0])
    assert pair_loss(x, x.flip(0)).tolist() == [500.0, 0.0]


@settings(max_examples=60)
@given(seeds, ranks)
def test_of_a_ranking_it_is_the_mean_over_its_pairs(seed, ranks):
    scores, K = drawn(seed, 2, len(ranks)), len(ranks)
    found = ranking_loss(scores, torch.tensor([ranks, ranks[::-1]]))
    for row, order, loss in zip(scores.tolist(), (ranks, ranks[::-1]), found.tolist(), strict=True):
        each = []
        for i in range(K):
            for j in range(i):
                a, b = sorted((i, j), key=lambda k: order[k])
                d = row[a] - row[b]
                even = (-log_sigmoid(d) - log_sigmoid(-d)) / 2
                each.append(even if order[a] == order[b] else -log_sigmoid(d))
        assert loss == pytest.approx(sum(each) / len(each), abs=1e-12)


@settings(max_examples=60)
@given(seeds, ranks)
def test_of_an_order_it_is_breslow_s(seed, ranks):
    scores = drawn(seed, len(ranks))
    right = 0.0
    for i, rank in enumerate(ranks):
        left = [math.exp(scores[j]) for j, other in enumerate(ranks) if other >= rank]
        right -= math.log(math.exp(scores[i]) / sum(left))
    assert order_loss(scores, torch.tensor(ranks)).item() == pytest.approx(right, abs=1e-12)


@given(seeds, st.integers(2, 4))
def test_the_chances_of_all_orders_are_one(seed, K):
    scores = drawn(seed, K)
    orders = torch.tensor([[1 + o.index(i) for i in range(K)] for o in permutations(range(K))])
    chances = (-order_loss(scores.expand(len(orders), K), orders)).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    first = (orders == 1).double()  # who is first, as the softmax says
    assert torch.allclose(chances @ first, scores.softmax(-1), rtol=0, atol=1e-12)


@given(seeds, st.integers(1, 4), st.integers(1, 9))
def test_a_rater_has_a_zero_of_his_own(seed, n, B):
    scores, ratings = drawn(seed, 2, B)
    zeros, raters = drawn(seed + 1, n), torch.arange(B) % n
    found = rating_loss(scores, zeros, raters, ratings)
    for b in range(B):
        zero = zeros[b % n] - zeros.sum() / n
        assert abs(found[b] - (scores[b] + zero - ratings[b]) ** 2 / 2) < 1e-12
    moved = rating_loss(scores, zeros + 5, raters, ratings)  # all of them strict is nobody strict
    assert torch.allclose(found, moved, rtol=0, atol=1e-12)


# --- truth is found again -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [ranking_loss, order_loss])
def test_worth_is_found_from_the_orders_of_noisy_people(loss):
    """Worth plus Gumbel noise: both losses are largest in likelihood, or near, at the worth."""
    rng = torch.Generator().manual_seed(0)
    worth = torch.tensor([1.5, 0.5, 0.0, -2.0]).double()
    u = torch.rand(20_000, 4, generator=rng, dtype=torch.float64)
    felt = worth - (-u.log()).log()
    places = felt.argsort(descending=True).argsort() + 1
    scores = torch.zeros(4).double().requires_grad_()
    optimizer = torch.optim.LBFGS([scores], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(scores.expand_as(felt), places).mean()
        value.backward()
        return value

    optimizer.step(closure)
    found = scores.detach() - scores.detach().mean()
    assert (found - (worth - worth.mean())).abs().max() < 0.05


def test_worth_is_found_from_ratings_of_the_strict_and_the_kind():
    rng = torch.Generator().manual_seed(0)
    worth = torch.randn(50, generator=rng, dtype=torch.float64)
    own = torch.tensor([-1.0, 0.0, 1.0]).double()
    items, raters = torch.arange(50).repeat(40), torch.randint(3, (2000,), generator=rng)
    noise = 0.5 * torch.randn(2000, generator=rng, dtype=torch.float64)
    ratings = worth[items] + own[raters] + noise
    scores = torch.zeros(50).double().requires_grad_()
    zeros = torch.zeros(3).double().requires_grad_()
    optimizer = torch.optim.LBFGS([scores, zeros], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = rating_loss(scores[items], zeros, raters, ratings).mean()
        value.backward()
        return value

    optimizer.step(closure)
    assert (zeros.detach() - zeros.detach().mean() - own).abs().max() < 0.1
    assert ((scores.detach() - worth) ** 2).mean() < 1.5 * 0.25 / 40  # the variance of a mean of 40
    plain = torch.stack([ratings[items == i].mean() for i in range(50)])  # who does not know raters
    assert ((plain - worth) ** 2).mean() > 1.5 * ((scores.detach() - worth) ** 2).mean()


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["decoder", "encoder"])
@given(seeds, st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 16),
       st.integers(0, 16))  # fmt: skip
def test_a_score_does_not_depend_on_pads(arch, seed, lengths, before, behind):
    config = ModelConfig(dim=16, layers=2, heads=2, vocab_size=11, context=40, arch=arch,
                         position="learned")  # fmt: skip
    reward = RewardModel(Transformer(config, 0)).double()
    rng = torch.Generator().manual_seed(seed)
    texts = [torch.randint(11, (n,), generator=rng) for n in lengths]
    alone = [reward(text[None], torch.tensor([len(text)])) for text in texts]
    width = before + max(lengths) + behind
    ids = torch.randint(11, (len(texts), width), generator=rng)
    starts = torch.tensor([(before + i) % (width - n + 1) for i, n in enumerate(lengths)])
    for row, text, start in zip(ids, texts, starts, strict=True):
        row[start : start + len(text)] = text
    found = reward(ids, torch.tensor(lengths), starts)
    assert (found - torch.cat(alone)).abs().max() < 1e-12
    plain = torch.stack([torch.nn.functional.pad(x, (0, 8 - len(x)), value=3) for x in texts])
    assert (reward(plain, torch.tensor(lengths)) - found).abs().max() < 1e-12


def small(arch="decoder", vocab_size=11):
    config = ModelConfig(dim=16, layers=1, heads=2, vocab_size=vocab_size, context=40, arch=arch)
    return RewardModel(Transformer(config, 0)).double()


def judged_at_random(seed, count):
    """Prompts with two to four responses each, in some order."""
    rng = torch.Generator().manual_seed(seed)

    def number(lo, hi):
        return int(torch.randint(lo, hi, (1,), generator=rng))

    def ids():
        return torch.randint(11, (number(1, 6),), generator=rng).tolist()

    return [
        Judged(
            ids(), [ids() for _ in range(K)], [float(number(1, 4)) for _ in range(K)], number(0, 2)
        )
        for K in (number(2, 5) for _ in range(count))
    ]


@given(seeds, st.sampled_from([("pairs", ranking_loss), ("order", order_loss)]))
def test_the_loss_of_a_batch_is_the_mean_over_its_prompts(seed, kind):
    name, of_one = kind
    groups = judged_at_random(seed, 4)
    scores = drawn(seed, sum(len(g.said) for g in groups))
    each, left = [], list(scores)
    for g in groups:
        own, left = left[: len(g.said)], left[len(g.said) :]
        each.append(of_one(torch.stack(own), torch.tensor(g.said)).item())
    found = LOSSES[name](scores, groups, torch.zeros(1))
    assert found.item() == pytest.approx(sum(each) / 4, abs=1e-12)


@given(seeds)
def test_a_rescaled_model_says_what_the_scale_makes_of_its_scores(seed):
    reward, cpu = small(), torch.device("cpu")
    texts = texts_of(judged_at_random(seed, 3), cpu)
    with torch.no_grad():
        reward.head.dense.bias += 3
    before = reward.scores(texts)
    scale = Scale.of(before)
    reward.rescale(scale)
    after = reward.scores(texts)
    assert torch.allclose(after, scale(before), rtol=0, atol=1e-9)
    assert abs(after.mean()) < 1e-9 and after.var(correction=0) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_fitting_is_one_update_after_another(loss):
    """Against AdamW as torch has it, with gradients of one batch at a time."""
    groups = judged_at_random(1, 6)
    if loss == "ratings":
        groups = [g._replace(responses=g.responses[:1], said=g.said[:1]) for g in groups]
    reward, by_hand = small(), small()
    how = OptimConfig("adamw", 0.01, weight_decay=0.0, beta2=0.99, eps=1e-5, warmup=0.0)
    zeros = fitted(reward, groups, loss, how, batch=6, epochs=3, raters=2)
    own = torch.nn.Parameter(torch.zeros(2))
    params = [*by_hand.parameters(), own]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = learning_rate(how, step, 3)
        optimizer.zero_grad()
        scores = by_hand.of(texts_of(groups, torch.device("cpu")))
        LOSSES[loss](scores, groups, own).backward()
        torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], how.clip)
        optimizer.step()
    for (name, p), q in zip(reward.named_parameters(), by_hand.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-6, name  # torch adds ε to a clipped norm
    assert (zeros - (own - own.mean())).abs().max() < 1e-5


# --- how good it is -------------------------------------------------------------------------------


@given(seeds, st.integers(2, 30))
def test_scores_are_normal_where_they_were_measured(seed, B):
    scores = 3 + 5 * drawn(seed, B)
    scaled = Scale.of(scores)(scores)
    assert abs(scaled.mean()) < 1e-9 and scaled.var(correction=0) == pytest.approx(1, abs=1e-9)
    assert not Scale.of(torch.ones(3))(torch.ones(3)).any()


def test_accuracy_counts_the_better_one():
    assert accuracy(torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 4.0])) == 0.625


def test_who_knows_the_chances_is_calibrated_and_who_is_too_sure_is_not():
    rng = torch.Generator().manual_seed(0)
    chances = torch.rand(20_000, generator=rng, dtype=torch.float64)
    came = (torch.rand(20_000, generator=rng, dtype=torch.float64) < chances).long()
    assert calibration(chances, came) < 0.02
    assert calibration((chances > 0.5).double(), came) == pytest.approx(0.25, abs=0.02)
    by_hand = calibration(torch.tensor([0.05, 0.15, 0.12]), torch.tensor([1, 0, 1]))
    assert by_hand == pytest.approx(0.95 / 3 + 2 / 3 * abs(0.5 - 0.135), abs=1e-6)
