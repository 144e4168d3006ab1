"""Where PPO, GRPO and DPO end: 8 tokens, length 3, all 512 responses, exact expectations."""

import pytest
import torch

from frontier import (
    EVERY,
    L,
    V,
    dpo,
    every_log_p,
    expected,
    grpo,
    grpo_k3,
    kl,
    optimum,
    ppo,
    random_scores,
    random_table,
    tilted,
    with_k3,
)

POLICY, SCORES = random_table(0), random_scores(1)
START = every_log_p(POLICY)


def test_a_policy_is_a_distribution_over_all_responses():
    whole = START.sum(1)
    assert whole.exp().sum().item() == pytest.approx(1, abs=1e-12) and len(whole) == V**L
    by_hand = 0.0
    place = 0
    for t, token in enumerate(EVERY[300].tolist()):
        row = sum(V**i for i in range(t)) + place
        by_hand += POLICY[row].log_softmax(0)[token].item()
        place = place * V + token
    assert whole[300].item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
def test_dpo_ends_at_the_optimum(beta):
    found = dpo(POLICY, SCORES, beta)
    assert kl(found, optimum(START, SCORES, beta)) <= 1e-3
    assert kl(START.sum(1), optimum(START, SCORES, beta)) > 0.1


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("method", [ppo, grpo])
def test_with_the_kl_in_the_reward_they_end_at_the_optimum(method, beta):
    assert kl(method(POLICY, SCORES, beta), optimum(START, SCORES, beta)) <= 1e-2


@pytest.mark.parametrize("beta, scaled", [(0.3, True), (1.0, True), (1.0, False)])
def test_with_k3_in_the_loss_grpo_ends_elsewhere_and_there(beta, scaled):
    found = grpo_k3(POLICY, SCORES, beta, scaled=scaled)
    assert kl(found, with_k3(START, SCORES, beta, scaled)) <= 1e-2
    assert kl(found, optimum(START, SCORES, beta)) > 0.1
    other = with_k3(START, SCORES, beta, not scaled)
    assert kl(found, other) > 2 * kl(found, with_k3(START, SCORES, beta, scaled))


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_tilted_is_where_the_lagrangian_is_flat(beta):
    """Σ π q + β Σ p log π has the same slope q + β p/π = λ for each token."""
    p = torch.randn(5, V, dtype=torch.float64).softmax(1)
    q = torch.randn(5, V, dtype=torch.float64)
    found = tilted(p, q, beta)
    slope = q + beta * p / found
    assert torch.allclose(found.sum(1), torch.ones(5).double(), rtol=0, atol=1e-9)
    assert (slope - slope[:, :1]).abs().max() < 1e-6


def test_values_are_means_over_what_may_still_come():
    weights = START.sum(1).exp()
    rewards = torch.zeros(V**L, L, dtype=torch.float64)
    rewards[:, -1] = SCORES
    values = expected(rewards, weights)
    assert torch.allclose(values[:, 0], (weights * SCORES).sum().expand(V**L), rtol=0, atol=1e-12)
    same = (EVERY[:, :2] == EVERY[77, :2]).all(1)
    right = (weights[same] * SCORES[same]).sum() / weights[same].sum()
    assert values[77, 2].item() == pytest.approx(right.item(), abs=1e-12)
