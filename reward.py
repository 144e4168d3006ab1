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
    fitted         the training: a few times through what people said, with a rate that falls to 0
    accuracy, calibration    how often the better one is known, and how well the model knows that

Run: python align.py reward

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Stiennon et al. 2020 (arXiv 2009.01325); Ouyang et
al. 2022 (arXiv 2203.02155); Breslow 1974, equal ranks; Guo et al. 2017, calibration (arXiv
1706.04599).

Letters: B texts · T tokens · K responses to one prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attention import Mask
from heads import ScalarHead, last
from model import Transformer, assembled
from model_files import Weights
from optim import OptimConfig, build, learning_rate
from rollout import Texts
from run import Run, UserError, generator, load_tensors
from step import clip
from vocabulary import Tokenizer
from writer import load_tokenizer, model_of

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

    def of(self, texts: Texts) -> Tensor:
        """The score of each (B), the judged token being the last of its response."""
        return self(texts.ids, texts.lengths, texts.before)

    @torch.no_grad()
    def scores(self, texts: Texts, at_once: int = 64) -> Tensor:
        """The same of many, some at a time."""
        rows = torch.arange(len(texts.ids), device=texts.ids.device).split(at_once)
        return torch.cat([self.of(texts.rows(some)) for some in rows])

    @torch.no_grad()
    def rescale(self, scale: Scale) -> None:
        """Let the head say what the scale makes of its scores."""
        self.head.dense.weight /= scale.spread
        self.head.dense.bias.copy_((self.head.dense.bias - scale.center) / scale.spread)


# --- training -------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """Responses to one prompt, as ids, and what was said of them: ranks, or one rating."""

    prompt: list[int]
    responses: list[list[int]]
    said: list[float]
    rater: int = 0


def texts_of(groups: Sequence[Judged], device: torch.device) -> Texts:
    """All responses of all groups, in order."""
    return Texts.of([g.prompt for g in groups for _ in g.responses],
                    [r for g in groups for r in g.responses], device)  # fmt: skip


def order_losses(how: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The mean of ranking_loss or order_loss over groups, each of which counts alike."""

    def loss(scores: Tensor, groups: Sequence[Judged], zeros: Tensor) -> Tensor:
        each, first = [], 0
        for group in groups:
            n = len(group.said)
            each.append(how(scores[first : first + n], torch.tensor(group.said).to(scores)))
            first += n
        return torch.stack(each).mean()

    return loss


def rating_losses(scores: Tensor, groups: Sequence[Judged], zeros: Tensor) -> Tensor:
    ratings = torch.tensor([g.said[0] for g in groups]).to(scores)
    raters = torch.tensor([g.rater for g in groups], device=scores.device)
    return rating_loss(scores, zeros, raters, ratings).mean()


LOSSES = {
    "pairs": order_losses(ranking_loss),
    "order": order_losses(order_loss),
    "ratings": rating_losses,
}


def fitted(
    reward: RewardModel, groups: Sequence[Judged], loss: str, rate: OptimConfig, batch: int,
    epochs: int = 1, raters: int = 1, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Fit a reward model; the raters' zeros, which count from their mean."""
    device = reward.model.embedding.device
    zeros = nn.Parameter(torch.zeros(raters, device=device))
    named = [*reward.named_parameters(), ("zeros", zeros)]
    optimizer, params = build(named, rate), [p for _, p in named]
    steps = epochs * -(-len(groups) // batch)
    parts = (
        part for epoch in range(epochs)
        for part in torch.randperm(len(groups), generator=generator(seed, "judged", epoch))
        .split(batch)
    )  # fmt: skip
    for step, part in enumerate(tqdm(parts, "reward model", steps, leave=False, disable=None)):
        some = [groups[i] for i in part.tolist()]
        value = LOSSES[loss](reward.of(texts_of(some, device)), some, zeros)
        value.backward()
        norm = clip([p for p in params if p.grad is not None], rate.clip)
        if not (torch.isfinite(value) and norm < float("inf")):
            raise UserError(
                f"update {step + 1} of the reward model is not finite: lower --lr from {rate.lr:g}"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(rate, step, steps)
        optimizer.step()
        optimizer.zero_grad()
    return (zeros - zeros.mean()).detach()


# --- files ----------------------------------------------------------------------------------------


def save(run: Run, reward: RewardModel, tokenizer: Tokenizer, step: int) -> None:
    """As a checkpoint: the model, and beside it the head."""
    head = {f"head/{name}": x for name, x in reward.head.state_dict().items()}
    info = {"text": f"{tokenizer.fingerprint}-judged",
            "settings": {"model": asdict(reward.model.config)}}  # fmt: skip
    run.save(step, reward.model.state_dict(), head, info)


def load(run: Run, tokenizer: Tokenizer, device: torch.device) -> RewardModel:
    """UserError if it is no reward model, or if its tokens are not those of this tokenizer."""
    if run.config().get("objective") != "reward":
        raise UserError(f"{run.folder} is no reward model: make one with python align.py reward")
    config = model_of(run)
    if load_tokenizer(run.folder, config.vocab_size).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the reward model {run.folder} has another tokenizer than the policy: train one from "
            "a run with the same tokens"
        )
    newest = run.newest()
    reward = RewardModel(assembled(config, Weights([newest / "model.safetensors"])))
    state = load_tensors(newest / "train_state.safetensors")
    reward.head.load_state_dict({name.removeprefix("head/"): x for name, x in state.items()})
    return reward.to(device).eval()


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
