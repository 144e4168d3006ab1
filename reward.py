"""A reward model: what people would say of a response, as one number.

Idea: a transformer reads prompt and response, and a head of one number looks at the last token, the
only one that has seen all. It is fitted to what people said. Of orders only differences matter: the
better response should have the higher score. Ratings are numbers already, but each rater has a zero
of his own.

    pair_loss      −log σ(better − worse)                               (Bradley and Terry 1952)
    ranking_loss   its mean over all pairs of one prompt                (Ouyang et al. 2022, eq. 1)
    order_loss     −log of the chance of the whole order, best first    (Plackett 1975, Luce 1959)
    rating_loss    ½ (score + the rater's zero − rating)²
    Scale          scores of mean 0 and variance 1 on responses of the policy that will be tuned
    accuracy, calibration    how often the better one is known, and how well the model knows that

Run: python -m pytest tests/test_reward.py

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Stiennon et al. 2020 (arXiv 2009.01325); Ouyang et
al. 2022 (arXiv 2203.02155); Breslow 1974, equal ranks; Guo et al. 2017, calibration (arXiv
1706.04599).

Letters: B texts · T tokens · K responses to one prompt.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Mask
from heads import ScalarHead, last
from model import Transformer

# --- losses ---------------------------------------------------------------------------------------


def pair_loss(better: Tensor, worse: Tensor, often: Tensor | float = 1.0) -> Tensor:
    """−p log σ(d) − (1 − p) log σ(−d), d = better − worse, p how often it was the better; ½: equal.

    By logsigmoid, as log(1 + e^x) is infinite in fp32 from x = 89 on.
    """
    d = better - worse
    return -often * F.logsigmoid(d) - (1 - often) * F.logsigmoid(-d)


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """The mean of pair_loss over the K(K − 1)/2 pairs of each prompt (… K) to (…); 1 is the best.

    A mean within each prompt: its pairs share their responses, and a longer list counts no more.
    """
    i, j = torch.triu_indices(scores.shape[-1], scores.shape[-1], 1)
    by = ranks[..., j] - ranks[..., i]
    often = (1 + by.sign()) / 2
    return pair_loss(scores[..., i], scores[..., j], often.to(scores.dtype)).mean(-1)


def order_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """−Σᵢ log(e^sᵢ / Σ e^sⱼ over those that are not better than i) (… K) to (…); 1 is the best.

    Equal ranks have the same sum (Breslow 1974): none of them is taken before the others.
    """
    left = ranks[..., None, :] >= ranks[..., :, None]
    among = scores[..., None, :].expand(left.shape).masked_fill(~left, -torch.inf)
    return (among.logsumexp(-1) - scores).sum(-1)


def rating_loss(scores: Tensor, zeros: Tensor, raters: Tensor, ratings: Tensor) -> Tensor:
    """½ (score + zero of the rater − rating)² of each; the zeros (raters) count from their mean."""
    return 0.5 * (scores + (zeros - zeros.mean())[raters] - ratings) ** 2


# --- the model ------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """(score − center)/spread: 0 on average, of variance 1, on what it was measured on."""

    center: float = 0.0
    spread: float = 1.0

    @classmethod
    def of(cls, scores: Tensor) -> "Scale":
        return cls(scores.mean().item(), max(scores.std(correction=0).item(), 1e-8))

    def __call__(self, scores: Tensor) -> Tensor:
        return (scores - self.center) / self.spread


class RewardModel(nn.Module):
    """A score for each text: decoder or encoder, and a head at the last token that is no pad."""

    def __init__(self, model: Transformer, seed: int = 0):
        super().__init__()
        self.model, self.head = model, ScalarHead(model.config, seed)

    def forward(self, ids: Tensor, lengths: Tensor, before: Tensor | None = None) -> Tensor:
        """ids (B T), lengths (B) to scores (B).

        `before` (B) pads stand before each text, none unless given, and any number behind it.
        """
        at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        lo = torch.zeros_like(at) if before is None else before[:, None].expand(ids.shape)
        end = lo[:, 0] + lengths
        both_ways = self.model.config.arch == "encoder"
        mask = Mask(lo, (end - 1)[:, None].expand(ids.shape) if both_ways else at)
        states = last(self.model(ids, (at - lo).clamp(min=0), mask), end)
        return self.head(states.to(self.head.dense.weight.dtype))


# --- how good it is -------------------------------------------------------------------------------


def accuracy(better: Tensor, worse: Tensor) -> float:
    """How often the better response has the higher score; the same score counts half."""
    d = better - worse
    return ((d > 0).double() + 0.5 * (d == 0).double()).mean().item()


def calibration(chances: Tensor, came: Tensor, bins: int = 10) -> float:
    """Σ |how often it came − how likely it was said to be| over bins of equal width, by size.

    (Guo et al. 2017, eq. 3.) chances (B) from 0 to 1, came (B) 0 or 1. 0 is perfect.
    """
    place = (chances * bins).long().clamp(max=bins - 1)
    error = 0.0
    for b in range(bins):
        here = place == b
        if here.any():
            gap = came[here].double().mean() - chances[here].double().mean()
            error += here.double().mean().item() * gap.abs().item()
    return error
