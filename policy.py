"""From rewards to a better policy: the parts of PPO, GRPO and DPO, each a function by itself.

Idea: a language model is a policy, which writes a response token by token and is told at its end
what it was worth. How it should change is decided in small steps that are easy to get wrong by a
sign or by one place, so that each stands alone here, takes plain tensors, and has a slow definition
in the tests:

    log_probs      of the tokens that were written, at the temperature they were drawn with
    token_rewards  a score at the last token, and −β log(π/π_ref) at each: to stay what it was
    gae            how much better than expected each token was                    (PPO)
    whiten         mean 0, variance 1, over all that all processes hold
    policy_loss    ratio × advantage, of which nothing is gained beyond the clip   (PPO, GRPO)
    value_loss     what is expected, moved no farther than the clip                (PPO)
    group_advantages  better or worse than other responses to the same prompt      (GRPO)
    dpo_loss       what is preferred becomes likelier, by as much as π_ref allows  (DPO)

With the KL in the reward all of them have the same end, which is known: π* ∝ π_ref exp(r/β).

A mask says which tokens count; they begin at the first place and have no gaps. It may hold weights
instead of ones. Means are taken over all that count, by `count` also over other batches: then no
result depends on how responses are cut into batches or dealt out to processes.

Run: python -m pytest tests/test_policy.py

Papers: Schulman et al. 2016, GAE (arXiv 1506.02438) and 2017, PPO (arXiv 1707.06347); Ziegler et
al. 2019 (arXiv 1909.08593); Ouyang et al. 2022 (arXiv 2203.02155); Huang et al. 2024, "The N+
implementation details of RLHF with PPO" (arXiv 2403.17031); Rafailov et al. 2023, DPO (arXiv
2305.18290); Shao et al. 2024, GRPO (arXiv 2402.03300).

Letters: B responses · T tokens of a response · V vocabulary · G responses to one prompt.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# --- what was written -----------------------------------------------------------------------------


def log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(token) at each place (B T), of logits (B T V): in nats, at the temperature of sampling.

    The same temperature belongs into sampling, reference and update, or the ratio is not 1 at the
    first update.
    """
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Σ x·mask / count, the count that of the mask, or of a larger whole to which this belongs."""
    return (x * mask).sum() / (mask.sum() if count is None else count)


def of_sequence(log_p: Tensor, mask: Tensor) -> Tensor:
    """log π of whole responses (B): the sum over their tokens, not the mean."""
    return (log_p * mask).sum(-1)


# --- rewards --------------------------------------------------------------------------------------


def unended(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores (B) less a penalty for a response that did not end: who never stops is not heard."""
    return scores - penalty * (~ended).to(scores.dtype)


def token_rewards(
    scores: Tensor, log_p: Tensor, ref_log_p: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """rₜ = −β log(π/π_ref)ₜ, and at each response's last token its score too (B T).

    (Ziegler et al. 2019, eq. 2.) Their sum over a response is score − β log(π/π_ref).
    """
    rewards = -beta * (log_p - ref_log_p) * (mask != 0)
    last = (mask != 0).sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, scores[:, None])


def next_beta(beta: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """β (1 + e·responses/horizon), e = kl/target − 1 within ±0.2 (Ziegler et al. 2019, sect. 2.2).

    kl is that of whole responses: the mean over them of the sum over their tokens, in nats.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + error * responses / horizon)


# --- advantages -----------------------------------------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages Aₜ = Σₖ (γλ)ᵏ δₜ₊ₖ and returns Aₜ + Vₜ (B T), δₜ = rₜ + γ Vₜ₊₁ − Vₜ.

    (Schulman et al. 2016, eq. 16.) Behind the last token nothing is expected: V = 0.
    """
    there = mask != 0
    advantage, value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    found = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * there[:, t]
        value = values[:, t] * there[:, t]
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return advantages, (advantages + values) * there


def alone(x: Tensor) -> Tensor:
    """The sum over processes, where there is one."""
    return x


def whiten(
    x: Tensor, mask: Tensor, shift: bool = True, total: Callable[[Tensor], Tensor] = alone
) -> Tensor:
    """(x − mean)/√(variance + 1e-8) over what counts; without shift the mean stays in it.

    `total` adds over processes. Were each to whiten its own, the result would depend on who got
    which responses.
    """
    count, sums = total(torch.stack([mask.sum().to(x.dtype), (x * mask).sum()]))
    center = sums / count
    variance = total(((x - center) ** 2 * mask).sum()) / count
    y = (x - center) * (variance + 1e-8).rsqrt()
    return (y if shift else y + center) * (mask != 0)


def group_advantages(scores: Tensor, scaled: bool = True, weights: Tensor | None = None) -> Tensor:
    """(r − mean)/(spread + 1e-4) within each group (… G), or only r − mean (Shao et al., 4.1.2).

    The spread is that of a sample, with G − 1. With weights, which sum to 1, the group stands for
    all that there is: mean and spread are exact expectations.
    """
    if weights is None:
        center, spread = scores.mean(-1, keepdim=True), scores.std(-1, keepdim=True)
    else:
        center = (weights * scores).sum(-1, keepdim=True)
        spread = (weights * (scores - center) ** 2).sum(-1, keepdim=True).sqrt()
    return (scores - center) / (spread + 1e-4) if scaled else scores - center


# --- losses, of each token or pair ----------------------------------------------------------------


def policy_loss(log_p: Tensor, old_log_p: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """−min(ρA, clip(ρ, 1 ± clip) A) of each token, ρ = π/π_old (Schulman et al. 2017, eq. 7)."""
    ratio = (log_p - old_log_p).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped(log_p: Tensor, old_log_p: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Where the clip holds a token back, so that it has no gradient."""
    ratio = (log_p - old_log_p).exp()
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantages != 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, ±clip) − R)²) of each token (Huang et al. 2024)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def k3(log_p: Tensor, ref_log_p: Tensor) -> Tensor:
    """e^Δ − Δ − 1 of each token, Δ = log(π_ref/π): never below 0, on average KL(π‖π_ref)."""
    delta = ref_log_p - log_p
    return torch.expm1(delta) - delta


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1,
    smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """−(1 − ε) log σ(h) − ε log σ(−h), h = β(log(π/π_ref) of the chosen − of the rejected).

    (Rafailov et al. 2023, eq. 7; ε of the labels are taken to be wrong.) All four (B) are log
    probabilities of whole responses. At the start, where π is π_ref, it is ln 2.
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)
