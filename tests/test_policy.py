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
    assert torch.allclose(found.sum(-1), scores - beta * kl, atol=1e-12)


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
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1) * mask, atol=1e-12)


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
        assert torch.allclose(whole[mask != 0], right, atol=1e-12)
    assert not whole[mask == 0].any()
    parts = [range(i, B, processes) for i in range(processes)]
    sums = [mask.sum(), (x * mask).sum()]
    center = sums[1] / sums[0]
    totals = [torch.stack(sums), ((x - center) ** 2 * mask).sum()]
    for part in parts:
        left = iter(totals)
        if len(part):
            found = whiten(x[part], mask[part], shift, lambda own, left=left: next(left))
            assert torch.allclose(found, whole[part], atol=1e-12)


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
    assert torch.allclose(rewards.sum(-1), whole, atol=1e-15)


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

    assert torch.allclose(gradient(parts, pads), gradient(1, 0), atol=1e-12)


# --- where they end: 8 tokens, length 3, all 512 responses, exact expectations --------------------

V, L = 8, 3
EVERY = torch.cartesian_prod(*[torch.arange(V)] * L)  # 512 responses
WHOLE = torch.ones(V**L, L).double()


class Tree:
    """A policy by a table: for each beginning the logits of what comes next."""

    def __init__(self, seed, scale=1.0):
        rng = torch.Generator().manual_seed(seed)
        rows = sum(V**t for t in range(L))
        self.table = scale * torch.randn(rows, V, generator=rng, dtype=torch.float64)

    def log_p(self, table=None):
        """Of each token of each response (512 L)."""
        table = self.table if table is None else table
        place, first = torch.zeros(V**L, dtype=torch.long), 0
        found = []
        for t in range(L):
            found.append(log_probs(table[first + place][:, None], EVERY[:, t : t + 1]))
            place, first = place * V + EVERY[:, t], first + V**t
        return torch.cat(found, 1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum().item()


def optimum(ref, scores, beta):
    """log π*, π* ∝ π_ref exp(r/β)."""
    return (ref.sum(1) + scores / beta).log_softmax(0)


def improved(ref, step, rounds, lr=0.05, epochs=2):
    """A table that begins at the reference and follows a loss, with rates that fall to 0.

    step(log_p, old, weights) is the loss under the weights of the policy that was sampled.
    """
    table = ref.table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr, betas=(0.9, 0.99), eps=1e-5)
    for i in range(rounds):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / rounds)
        with torch.no_grad():
            old = ref.log_p(table)
        for _ in range(epochs):
            optimizer.zero_grad()
            step(ref.log_p(table), old, old.sum(1).exp()).backward()
            optimizer.step()
    return ref.log_p(table.detach()).sum(1)


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
def test_dpo_ends_at_the_optimum(beta):
    """On all pairs, each preferred as often as Bradley and Terry say."""
    ref = Tree(0)
    scores = torch.randn(V**L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = ref.log_p().sum(1)
    table = ref.table.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table], max_iter=1500, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    often = torch.sigmoid(scores[:, None] - scores)  # i before j

    def closure():
        optimizer.zero_grad()
        now = ref.log_p(table).sum(1)
        pairs = dpo_loss(now[:, None], now[None], own[:, None], own[None], beta)
        loss = (often * pairs).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = ref.log_p(table.detach()).sum(1)
    assert kl(found, optimum(ref.log_p(), scores, beta)) <= 1e-3
    assert kl(own, optimum(ref.log_p(), scores, beta)) > 0.1


def expected(rewards, weights):
    """The values of a perfect critic: what still comes on average, behind the same beginning."""
    to_come = rewards.flip(1).cumsum(1).flip(1)
    columns = []
    for t in range(L):
        w, x = (y.view(V**t, -1) for y in (weights, to_come[:, t]))
        columns.append(((w * x).sum(1) / w.sum(1)).repeat_interleave(V ** (L - t)))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_with_the_kl_in_the_reward_they_end_at_the_optimum(method, beta):
    ref = Tree(0)
    scores = torch.randn(V**L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = ref.log_p()

    def ppo(log_p, old, weights):
        mask = weights[:, None] * WHOLE
        rewards = token_rewards(scores, old, start, mask, beta)
        advantages = whiten(gae(rewards, expected(rewards, weights), mask)[0], mask)
        return mean(policy_loss(log_p, old, advantages), mask)

    def grpo(log_p, old, weights):
        whole = scores - beta * (old - start).sum(1)
        advantages = group_advantages(whole, weights=weights)[:, None]
        return mean(policy_loss(log_p, old, advantages), weights[:, None] * WHOLE)

    found = improved(ref, {"ppo": ppo, "grpo": grpo}[method], 1500)
    assert kl(found, optimum(start, scores, beta)) <= 1e-2


def with_k3_in_the_loss(ref, scores, beta):
    """Where GRPO ends whose loss holds k3 and whose scores are divided by their spread σ.

    On average k3's gradient is that of KL(π_ref‖π), at each beginning by itself, so that there
    Σ π Q/σ − β KL(π_ref‖π) is largest: π = β π_ref/(λ − Q/σ), λ such that it sums to 1, Q the score
    that is expected behind each next token. From the end to the beginning, until σ stays.
    """
    start, spread = ref.log_p(), 1.0
    for _ in range(60):
        value, whole = scores, torch.zeros(1).double()
        for t in reversed(range(L)):
            p = start[:: V ** (L - 1 - t), t].view(V**t, V).exp()
            q = value.view(V**t, V) / spread
            low = (q + beta * p).amax(1, keepdim=True)  # no token may have more than all
            high = q.amax(1, keepdim=True) + beta
            for _ in range(80):
                middle = (low + high) / 2
                above = (beta * p / (middle - q)).sum(1, keepdim=True) > 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            now = beta * p / (high - q)
            value = (now * value.view(V**t, V)).sum(1)
            whole = (now.log()[:, :, None] + whole.view(-1, V, V ** (L - 1 - t))
                     if t < L - 1 else now.log()).flatten()  # fmt: skip
        weights = whole.exp()
        spread = (weights * (scores - (weights * scores).sum()) ** 2).sum().sqrt() + 1e-4
    return whole.log_softmax(0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_with_k3_in_the_loss_grpo_ends_elsewhere_and_there(beta):
    ref = Tree(0)
    scores = torch.randn(V**L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = ref.log_p()

    def grpo(log_p, old, weights):
        advantages = group_advantages(scores, weights=weights)[:, None]
        losses = policy_loss(log_p, old, advantages) + beta * k3(log_p, start)
        return mean(losses, weights[:, None] * WHOLE)

    found = improved(ref, grpo, 1500)
    assert kl(found, with_k3_in_the_loss(ref, scores, beta)) <= 1e-2
    assert kl(found, optimum(start, scores, beta)) > 0.1
