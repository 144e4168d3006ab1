"""Laws of policy.py: each part is its definition, and all of them end where theory says."""

import math

import pytest
import torch
from helpers import normals, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import (
    clipped,
    dpo_loss,
    gae,
    group_advantages,
    k3,
    log_probs,
    mean,
    next_beta,
    of_sequence,
    policy_loss,
    token_rewards,
    unended,
    value_loss,
    whiten,
)

sizes = st.integers(1, 6)


def drawn(seed, B, T, many):
    """`many` tensors (B T) in float64, and a mask of responses of 1 to T tokens."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=rng)
    mask = (torch.arange(T) < lengths[:, None]).double()
    return [x.detach() for x in normals(seed, *[(B, T)] * many)], mask


# --- each is its definition -----------------------------------------------------------------------


@given(seeds, sizes, sizes, st.floats(0.2, 3))
def test_log_probs_are_those_of_the_softmax(seed, B, T, temperature):
    (logits,) = (x.detach() for x in normals(seed, (B, T, 5)))
    tokens = torch.randint(5, (B, T), generator=torch.Generator().manual_seed(seed))
    found = log_probs(logits, tokens, temperature)
    for b in range(B):
        for t in range(T):
            weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            right = math.log(weights[tokens[b, t]] / sum(weights))
            assert found[b, t].item() == pytest.approx(right, abs=1e-12)


@given(seeds, sizes, sizes, st.floats(0, 2))
def test_rewards_pay_for_the_score_and_for_staying(seed, B, T, beta):
    (log_p, ref), mask = drawn(seed, B, T, 2)
    scores = torch.arange(B).double() + 1
    found = token_rewards(scores, log_p, ref, mask, beta)
    for b in range(B):
        n = int(mask[b].sum())
        for t in range(T):
            right = -beta * (log_p[b, t] - ref[b, t]) if t < n else 0.0
            right += scores[b] if t == n - 1 else 0.0
            assert abs(found[b, t] - right) < 1e-12
    kl = of_sequence(log_p - ref, mask)
    assert torch.allclose(found.sum(-1), scores - beta * kl, rtol=0, atol=1e-12)


@given(seeds, sizes, st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_the_sum_of_what_was_unexpected(seed, B, T, gamma, lam):
    """The O(T²) definition, δ by δ."""
    (rewards, values), mask = drawn(seed, B, T, 2)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(B):
        n = int(mask[b].sum())
        expected = [*values[b, :n].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * expected[t + 1] - expected[t] for t in range(n)]
        for t in range(T):
            right = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert abs(advantages[b, t] - right) < 1e-12
            assert abs(returns[b, t] - (right + expected[t] if t < n else 0)) < 1e-12


@given(seeds, sizes, sizes)
def test_with_lambda_one_returns_are_what_came(seed, B, T):
    (rewards, values), mask = drawn(seed, B, T, 2)
    rewards = rewards * mask
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1) * mask, rtol=0, atol=1e-12)


@settings(max_examples=60)
@given(seeds, st.integers(2, 6), st.integers(2, 6), st.booleans(), st.integers(1, 3))
def test_whitened_over_all_processes(seed, B, T, shift, processes):
    """However responses are dealt out, each gets what one process would have computed."""
    (x,), mask = drawn(seed, B, T, 1)
    whole = whiten(x, mask, shift)
    kept = x[mask != 0]
    if len(kept) > 1:
        right = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()
        right = right if shift else right + kept.mean()
        assert torch.allclose(whole[mask != 0], right, rtol=0, atol=1e-12)
    assert not whole[mask == 0].any()
    parts = [range(i, B, processes) for i in range(processes)]
    sums = [mask.sum(), (x * mask).sum()]
    center = sums[1] / sums[0]
    totals = [torch.stack(sums), ((x - center) ** 2 * mask).sum()]
    for part in parts:
        left = iter(totals)
        if len(part):
            found = whiten(x[part], mask[part], shift, lambda own, left=left: next(left))
            assert torch.allclose(found, whole[part], rtol=0, atol=1e-12)


@given(seeds, sizes, sizes, st.floats(0.05, 0.5))
def test_losses_are_the_loops_of_the_papers(seed, B, T, clip):
    (log_p, old, advantages, values, returns), _ = drawn(seed, B, T, 5)
    policy = policy_loss(log_p, old, advantages, clip)
    value = value_loss(values, old, returns, clip)
    penalty, held = k3(log_p, old), clipped(log_p, old, advantages, clip)
    for b in range(B):
        for t in range(T):
            p, q, a, v, r = (x[b, t].item() for x in (log_p, old, advantages, values, returns))
            ratio = math.exp(p - q)
            least = min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
            assert policy[b, t].item() == pytest.approx(-least, abs=1e-12)
            near = q + min(max(v - q, -clip), clip)
            right = max((v - r) ** 2, (near - r) ** 2) / 2
            assert value[b, t].item() == pytest.approx(right, abs=1e-12)
            right = math.exp(q - p) - (q - p) - 1
            assert penalty[b, t].item() == pytest.approx(right, abs=1e-12) and right >= 0
            x = log_p[b, t].clone().requires_grad_()
            policy_loss(x, old[b, t], advantages[b, t], clip).backward()
            assert held[b, t] == (x.grad == 0)


@given(seeds, sizes, st.floats(0.01, 2), st.floats(0, 0.5))
def test_dpo_is_its_equation(seed, B, beta, smoothing):
    four = [x.detach() for x in normals(seed, *[(B,)] * 4)]
    found = dpo_loss(*four, beta, smoothing)
    for loss, (c, r, ref_c, ref_r) in zip(found, zip(*four, strict=True), strict=True):
        h = beta * ((c - ref_c) - (r - ref_r)).item()
        right = (1 - smoothing) * math.log1p(math.exp(-h)) + smoothing * math.log1p(math.exp(h))
        assert loss.item() == pytest.approx(right, abs=1e-12)


@given(seeds, sizes, st.integers(2, 6), st.booleans())
def test_a_group_is_compared_with_itself(seed, B, G, scaled):
    (scores,) = (x.detach() for x in normals(seed, (B, G)))
    found = group_advantages(scores, scaled)
    for group, mine in zip(scores.tolist(), found.tolist(), strict=True):
        center = sum(group) / G
        spread = (sum((r - center) ** 2 for r in group) / (G - 1)) ** 0.5 + 1e-4
        right = [(r - center) / (spread if scaled else 1) for r in group]
        assert mine == pytest.approx(right, abs=1e-12)
    alike = group_advantages(torch.full((2, G), 3.0), scaled)
    assert not alike.any()  # where all are alike nothing is learnt
    even = torch.full((B, G), 1 / G).double()
    exact = group_advantages(scores, scaled, even)
    ratio = ((G - 1) / G) ** 0.5 if scaled else 1.0
    assert torch.allclose(exact * ratio, found, rtol=2e-2, atol=1e-3)


def test_what_does_not_end_is_worth_less():
    scores, ended = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert unended(scores, ended, 3.0).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("kl, error", [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)])
def test_beta_follows_the_kl(kl, error):
    assert next_beta(0.15, kl, 6.0, 64, 10_000) == pytest.approx(0.15 * (1 + error * 64 / 10_000))


# --- laws -----------------------------------------------------------------------------------------


@given(seeds, sizes, sizes)
def test_at_the_start_nothing_is_known(seed, B, T):
    """π is π_old and π_ref: ratio 1, nothing clipped, KL 0, DPO's loss ln 2."""
    (log_p, advantages), mask = drawn(seed, B, T, 2)
    assert torch.equal(policy_loss(log_p, log_p, advantages), -advantages)
    assert not clipped(log_p, log_p, advantages).any() and not k3(log_p, log_p).any()
    whole = of_sequence(log_p, mask)
    loss = dpo_loss(whole, whole.flip(0), whole, whole.flip(0))
    assert (loss - math.log(2)).abs().max() < 1e-15
    rewards = token_rewards(whole, log_p, log_p, mask, 0.5)
    assert torch.allclose(rewards.sum(-1), whole, rtol=0, atol=1e-15)


@settings(max_examples=60)
@given(seeds, sizes, sizes, st.integers(1, 3), st.integers(0, 16))
def test_nothing_depends_on_batches_or_on_the_width(seed, B, T, parts, pads):
    """Gradients of the mean loss: in micro-batches, and with pads behind, which hold anything."""
    (log_p, old, rewards, values), mask = drawn(seed, B, T, 4)

    def gradient(cuts, width):
        wide = [torch.cat([x, 9e9 * torch.ones(B, width).double()], 1)
                for x in (old, rewards, values)]  # fmt: skip
        there = torch.cat([mask, torch.zeros(B, width).double()], 1)
        p = torch.cat([log_p, torch.zeros(B, width).double()], 1).requires_grad_()
        o, r, v = (torch.where(there != 0, x, 0) for x in wide)
        advantages = whiten(gae(r, v, there)[0], there)
        for i in range(cuts):
            loss = policy_loss(p[i::cuts], o[i::cuts], advantages[i::cuts])
            mean(loss, there[i::cuts], there.sum()).backward()
        return p.grad[:, :T]

    assert torch.allclose(gradient(parts, pads), gradient(1, 0), rtol=0, atol=1e-12)


# --- the formulas of a trusted library ------------------------------------------------------------


def masked(x, mask):
    return (x * mask).sum() / mask.sum()


@given(seeds, st.integers(2, 6), sizes, st.floats(0.05, 0.5), st.floats(0.01, 1))
def test_they_are_trl_s(seed, B, T, clip, beta):
    """As trl (0.24 and 1.16) computes them, from clamps and maxima in its own order."""
    (log_p, old, ref, adv, values, old_values, returns), mask = drawn(seed, B, T, 7)
    ratio = torch.exp(log_p - old)
    ppo = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 1.0 - clip, 1.0 + clip))
    mine = mean(policy_loss(log_p, old, adv, clip), mask)
    assert mine.item() == pytest.approx(masked(ppo, mask).item(), abs=1e-12)
    near = torch.clamp(values, old_values - clip, old_values + clip)
    value = 0.5 * masked(torch.max((values - returns) ** 2, (near - returns) ** 2), mask)
    mine = mean(value_loss(values, old_values, returns, clip), mask)
    assert mine.item() == pytest.approx(value.item(), abs=1e-12)
    per_token = -torch.min(ratio * adv, torch.clamp(ratio, 1 - clip, 1 + clip) * adv)
    per_token = per_token + beta * (torch.exp(ref - log_p) - (ref - log_p) - 1)
    grpo = (per_token * mask).sum() / mask.sum()  # loss_type "dapo": over all tokens
    mine = mean(policy_loss(log_p, old, adv, clip) + beta * k3(log_p, ref), mask)
    assert mine.item() == pytest.approx(grpo.item(), abs=1e-12)
    whitened = (adv - masked(adv, mask)) * torch.rsqrt(
        masked((adv - masked(adv, mask)) ** 2, mask) + 1e-8
    )
    assert torch.allclose(whiten(adv, mask), whitened * mask, rtol=0, atol=1e-12)
    rewards, kl = (-beta * (log_p - ref)) * mask, old[:, 0]
    rewards[torch.arange(B), mask.sum(1).long() - 1] += kl
    assert torch.allclose(token_rewards(kl, log_p, ref, mask, beta), rewards, rtol=0, atol=1e-12)


@given(seeds, sizes, st.floats(0.01, 2), st.floats(0, 0.5))
def test_dpo_is_trl_s(seed, B, beta, smoothing):
    chosen, rejected, ref_chosen, ref_rejected = (x.detach() for x in normals(seed, *[(B,)] * 4))
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    theirs = (
        -torch.nn.functional.logsigmoid(beta * logits) * (1 - smoothing)
        - torch.nn.functional.logsigmoid(-beta * logits) * smoothing
    )
    mine = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@given(seeds, st.integers(1, 4), st.integers(2, 6))
def test_group_advantages_are_trl_s(seed, B, G):
    (rewards,) = (x.detach() for x in normals(seed, (B * G,)))
    middle = rewards.view(-1, G).mean(1).repeat_interleave(G)
    spread = rewards.view(-1, G).std(1).repeat_interleave(G)
    theirs = (rewards - middle) / (spread + 1e-4)
    mine = group_advantages(rewards.view(-1, G)).flatten()
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@given(seeds, sizes, sizes)
def test_losses_have_the_gradient_of_finite_differences(seed, B, T):
    (log_p, old, adv, values, returns), mask = drawn(seed, B, T, 5)
    losses = {
        "policy": lambda x: mean(policy_loss(x, old, adv), mask),
        "value": lambda x: mean(value_loss(x, values, returns), mask),
        "k3": lambda x: mean(k3(x, old), mask),
        "dpo": lambda x: dpo_loss(x.sum(1), old.sum(1), adv.sum(1), values.sum(1)).mean(),
    }
    way = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(seed)).double()
    for name, loss in losses.items():
        x = log_p.clone().requires_grad_()
        loss(x).backward()
        up, down = (loss(log_p + s * 1e-6 * way).item() for s in (1, -1))
        slope = (x.grad * way).sum().item()
        assert slope == pytest.approx((up - down) / 2e-6, abs=1e-7), name
