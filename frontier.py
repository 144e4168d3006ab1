"""Where PPO, GRPO and DPO end, exactly: on all 512 responses of 3 tokens out of 8.

Idea: of all policies that are KL nats from π_ref, π* ∝ π_ref exp(r/β) has the most reward. Where
every response can be listed, expectations are sums, and it can be seen whether a method ends there.
With the KL in the reward PPO and GRPO do, and so does DPO where each pair is preferred as often as
Bradley and Terry say. GRPO as it is often used, with k3 in the loss, does not: on average k3's
gradient is that of KL(π_ref‖π), the other way round, and dividing scores by their spread changes
how much it counts. It has an end of its own, which is computed here too.

Run: python frontier.py          a table and a picture, in two minutes

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Korbak et al. 2022, π* (arXiv 2205.11275); Rafailov
et al. 2023 (arXiv 2305.18290); Shao et al. 2024 (arXiv 2402.03300); Schulman 2020, k3
(http://joschu.net/blog/kl-approx.html).

Letters: V tokens · L of a response · N = Vᴸ responses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from pictures import picture, table
from policy import (
    dpo_loss,
    gae,
    group_advantages,
    k3,
    log_probs,
    mean,
    policy_loss,
    token_rewards,
    whiten,
)
from run import RUNS, UserError, main

V, L = 8, 3
EVERY = torch.cartesian_prod(*[torch.arange(V)] * L)  # all responses (N L)
WHOLE = torch.ones(V**L, L, dtype=torch.float64)


def random_table(seed: int) -> Tensor:
    """A policy: for each beginning of a response the logits of its next token."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(sum(V**t for t in range(L)), V, generator=rng, dtype=torch.float64)


def random_scores(seed: int) -> Tensor:
    """What each response is worth (N)."""
    return torch.randn(V**L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_log_p(policy: Tensor) -> Tensor:
    """log π of each token of each response (N L)."""
    place, first, found = torch.zeros(V**L, dtype=torch.long), 0, []
    for t in range(L):
        found.append(log_probs(policy[first + place][:, None], EVERY[:, t : t + 1]))
        place, first = place * V + EVERY[:, t], first + V**t
    return torch.cat(found, 1)


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """Σ p log(p/q) over whole responses (N)."""
    return (log_p.exp() * (log_p - log_q)).sum().item()


# --- the ends -------------------------------------------------------------------------------------


def optimum(start: Tensor, scores: Tensor, beta: float) -> Tensor:
    """log π* of whole responses, π* ∝ π_ref exp(r/β)."""
    return (start.sum(1) + scores / beta).log_softmax(0)


def with_k3(start: Tensor, scores: Tensor, beta: float, scaled: bool = True) -> Tensor:
    """log π where GRPO ends whose loss holds k3 and whose scores are divided by their spread σ.

    There Σ π Q/σ − β KL(π_ref‖π) is largest at each beginning by itself: π = β π_ref/(λ − Q/σ), λ
    such that it sums to 1, Q the score that is expected behind each next token. From the end to the
    beginning, until σ stays; not scaled, σ is 1.
    """
    spread = 1.0
    for _ in range(60 if scaled else 1):
        value, whole = scores, torch.zeros_like(scores)
        for t in reversed(range(L)):
            p = start[:: V ** (L - 1 - t), t].view(V**t, V).exp()
            q = value.view(V**t, V) / spread
            now = tilted(p, q, beta)
            value = (now * value.view(V**t, V)).sum(1)
            whole = (now.log()[..., None] + whole.view(-1, V, V ** (L - 1 - t))).flatten()
        if scaled:
            weights = whole.exp()
            spread = (weights * (scores - (weights * scores).sum()) ** 2).sum().sqrt() + 1e-4
    return whole.log_softmax(0)


def tilted(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """β p/(λ − q) in each row (… V), λ by halving so that it sums to 1."""
    low = (q + beta * p).amax(1, keepdim=True)  # no token may have more than all
    high = q.amax(1, keepdim=True) + beta
    for _ in range(80):
        middle = (low + high) / 2
        above = (beta * p / (middle - q)).sum(1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return beta * p / (high - q)


# --- the methods ----------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # log π, log π_old (N L), weights (N) to a loss
ROUNDS = 1500


def improved(policy: Tensor, step: Step, rounds: int, lr: float = 0.05) -> Tensor:
    """log π of whole responses after rounds of two updates each, with rates that fall to 0.

    step is the loss under the weights of the policy that is sampled: all that there is.
    """
    policy = policy.clone().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr, betas=(0.9, 0.99), eps=1e-5)
    for i in range(rounds):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / rounds)
        with torch.no_grad():
            old = every_log_p(policy)
        for _ in range(2):
            optimizer.zero_grad()
            step(every_log_p(policy), old, old.sum(1).exp()).backward()
            optimizer.step()
    return every_log_p(policy.detach()).sum(1)


def expected(rewards: Tensor, weights: Tensor) -> Tensor:
    """The values of a perfect critic (N L): what still comes, behind the same beginning."""
    to_come, columns = rewards.flip(1).cumsum(1).flip(1), []
    for t in range(L):
        w, x = (y.view(V**t, -1) for y in (weights, to_come[:, t]))
        columns.append(((w * x).sum(1) / w.sum(1)).repeat_interleave(V ** (L - t)))
    return torch.stack(columns, 1)


def ppo(policy: Tensor, scores: Tensor, beta: float, rounds: int = ROUNDS) -> Tensor:
    start = every_log_p(policy)

    def step(log_p: Tensor, old: Tensor, weights: Tensor) -> Tensor:
        mask = weights[:, None] * WHOLE
        rewards = token_rewards(scores, old, start, mask, beta)
        advantages = whiten(gae(rewards, expected(rewards, weights), mask)[0], mask)
        return mean(policy_loss(log_p, old, advantages), mask)

    return improved(policy, step, rounds)


def grpo(policy: Tensor, scores: Tensor, beta: float, rounds: int = ROUNDS) -> Tensor:
    """With the KL in the reward."""
    start = every_log_p(policy)

    def step(log_p: Tensor, old: Tensor, weights: Tensor) -> Tensor:
        whole = scores - beta * (old - start).sum(1)
        advantages = group_advantages(whole, weights=weights)[:, None]
        return mean(policy_loss(log_p, old, advantages), weights[:, None] * WHOLE)

    return improved(policy, step, rounds)


def grpo_k3(
    policy: Tensor, scores: Tensor, beta: float, rounds: int = ROUNDS, scaled: bool = True
) -> Tensor:
    """With k3 in the loss."""
    start = every_log_p(policy)

    def step(log_p: Tensor, old: Tensor, weights: Tensor) -> Tensor:
        advantages = group_advantages(scores, scaled, weights)[:, None]
        losses = policy_loss(log_p, old, advantages) + beta * k3(log_p, start)
        return mean(losses, weights[:, None] * WHOLE)

    return improved(policy, step, rounds)


def dpo(policy: Tensor, scores: Tensor, beta: float, rounds: int = ROUNDS) -> Tensor:
    """On all pairs, each preferred as often as Bradley and Terry say."""
    own = every_log_p(policy).sum(1)
    often = torch.sigmoid(scores[:, None] - scores)  # i before j
    policy = policy.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [policy], max_iter=rounds, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        now = every_log_p(policy).sum(1)
        pairs = dpo_loss(now[:, None], now[None], own[:, None], own[None], beta)
        loss = (often * pairs).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return every_log_p(policy.detach()).sum(1)


METHODS = {
    "PPO": ppo,
    "GRPO": grpo,
    "DPO": dpo,
    "GRPO, k3 in the loss": grpo_k3,
    "the same, not scaled": lambda *how: grpo_k3(*how, scaled=False),
}
ENDS = {  # of those that do not end at π*
    "GRPO, k3 in the loss": with_k3,
    "the same, not scaled": lambda *how: with_k3(*how, scaled=False),
}


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Draw where each method ends."""

    betas: tuple[float, ...] = (0.3, 1.0, 3.0)  # prices of a nat of KL
    seed: int = 0
    rounds: int = ROUNDS  # of two updates each

    def __post_init__(self):
        if self.rounds < 1:
            raise UserError("--rounds must be at least 1")
        if not self.betas or min(self.betas) < 0.05:
            raise UserError("--betas must be at least 0.05, and some")


LOOKS = {
    "PPO": ("o", "#1f4e8c"),
    "GRPO": ("s", "#b5892e"),
    "DPO": ("^", "#2a7f62"),
    "GRPO, k3 in the loss": ("X", "#c8442d"),
    "the same, not scaled": ("P", "#8a5a9c"),
}


def draw(points: dict[str, list[tuple[float, float]]], curve: list, path: Path) -> None:
    """Reward against KL(π‖π_ref): the most possible as a line, the methods as marks."""
    with picture(path) as (axes,):
        axes.plot(*zip(*curve, strict=True), color="#777777", label="the most possible")
        for name, each in points.items():
            marker, color = LOOKS[name]
            size = 11 if name == "PPO" else 6  # they lie on each other
            axes.plot(*zip(*each, strict=True), marker, color=color, label=name, markersize=size,
                      fillstyle="none" if name == "PPO" else "full")  # fmt: skip
        axes.set(title="Where they end, on all 512 responses", xlabel="KL(π‖π_ref), nats",
                 ylabel="reward that is expected")  # fmt: skip
        axes.legend(frameon=False, loc="lower right")


def script() -> None:
    config = tyro.cli(Show, description=__doc__)
    policy, scores = random_table(config.seed), random_scores(config.seed + 1)
    start = every_log_p(policy)

    def place(log_p: Tensor) -> tuple[float, float]:
        return kl(log_p, start.sum(1)), (log_p.exp() * scores).sum().item()

    curve = [place(optimum(start, scores, 10 ** (1 - i / 30))) for i in range(61)]
    points, rows = {name: [] for name in METHODS}, []
    jobs = [(name, beta) for name in METHODS for beta in config.betas]
    for name, beta in tqdm(jobs, "methods", leave=False, disable=None):
        found = METHODS[name](policy, scores, beta, config.rounds)
        points[name].append(place(found))
        gaps = [kl(found, optimum(start, scores, beta))]
        gaps += [kl(found, ENDS[name](start, scores, beta))] if name in ENDS else []
        rows.append((name, f"{beta:g}", *(f"{x:.3f}" for x in place(found)),
                     *(f"{gap:.1e}" for gap in gaps), *[""] * (2 - len(gaps))))  # fmt: skip
    head = ("", "β", "KL to π_ref", "reward", "KL to π*", "to its own end")
    print(table(head, *rows))
    draw(points, curve, path := RUNS / "frontier.png")
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main(script)
