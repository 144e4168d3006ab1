"""Responses of a policy: drawn token by token, and looked at again whole.

Idea: what is learnt from rewards is learnt from what the policy itself writes. It is drawn with a
cache, and how likely each token was is kept at once. Later the same responses go through policy,
reference and critic as whole texts; all must mean the same tokens at the same places, however a
text is padded:

    ids        pads …  p₁ p₂ p₃  r₁ r₂ r₃ r₄  pads …        before, prompt and response say how many
    state of          · · p₃  r₁ r₂ r₃                      decides on, and expects, the token after

Run: python -m pytest tests/test_rollout.py

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Huang et al. 2024, "The N+ implementation details of
RLHF with PPO" (arXiv 2403.17031), where pads and positions go wrong.

Letters: B responses · T tokens of prompt and response · R of a response · C width · V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention import Mask
from generate import Sampling, tokens_on_device
from model import Transformer
from policy import log_probs
from run import UserError
from writer import Writer, unknown


class Texts(NamedTuple):
    """Prompts with their responses, in rows of one width."""

    ids: Tensor  # B T
    before: Tensor  # (B) pads before the prompt
    prompt: Tensor  # (B) tokens of the prompt
    response: Tensor  # (B) tokens of the response

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
        device: torch.device | None = None, before: Sequence[int] = (), behind: int = 0,
    ) -> "Texts":  # fmt: skip
        """Rows as wide as the longest text, and `behind`; with pads before some, if wanted."""
        before = before or [0] * len(prompts)
        rows = [[0] * n + [*p, *r] for n, p, r in zip(before, prompts, responses, strict=True)]
        width = max(map(len, rows)) + behind
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        sizes = (before, [len(p) for p in prompts], [len(r) for r in responses])
        return cls(ids, *(torch.tensor(n, device=device) for n in sizes))

    @property
    def lengths(self) -> Tensor:
        """(B) tokens of prompt and response."""
        return self.prompt + self.response

    @property
    def places(self) -> Tensor:
        """Where each token of a response stands (B R); behind its end the last place of the row."""
        first = self.before + self.prompt
        t = torch.arange(int(self.response.max()), device=first.device)
        return (first[:, None] + t).clamp(max=self.ids.shape[1] - 1)

    @property
    def tokens(self) -> Tensor:
        """The responses alone (B R), anything behind their ends."""
        return self.ids.gather(1, self.places)

    @property
    def mask(self) -> Tensor:
        """1.0 where a response has a token (B R)."""
        t = torch.arange(int(self.response.max()), device=self.ids.device)
        return (t < self.response[:, None]).float()

    def rows(self, some: Tensor) -> "Texts":
        """Some of them, in rows that are no wider than these need."""
        ids, *sizes = (x[some] for x in self)
        return Texts(ids[:, : int(sum(sizes).max())], *sizes)


def hidden(model: Transformer, texts: Texts) -> Tensor:
    """What the model makes of whole texts (B T C): of nothing but their own tokens."""
    if not texts.before.any():  # causal, and pads stand behind
        return model(texts.ids)
    at = torch.arange(texts.ids.shape[1], device=texts.ids.device).expand(texts.ids.shape)
    lo = texts.before[:, None].expand(at.shape)
    return model(texts.ids, (at - lo).clamp(min=0), Mask(lo, at))


def states(model: Transformer, texts: Texts) -> Tensor:
    """For each token of a response the state (B R C) of the token before it."""
    found = hidden(model, texts)
    at = (texts.places - 1)[..., None]
    return found.gather(1, at.expand(-1, -1, found.shape[-1]))


def likely(
    model: Transformer, h: Tensor, texts: Texts, temperature: float, never: Sequence[int] = ()
) -> Tensor:
    """log π of each token of a response (B R) by its states h (B R C); 0 behind their ends.

    never: rows of the embedding that no token has, and so none that is drawn.
    """
    logits = model.logits(h)
    if never:
        logits = logits.index_fill(-1, torch.tensor(never, device=h.device), -torch.inf)
    found = log_probs(logits, texts.tokens, temperature)
    return torch.where(texts.mask != 0, found, 0.0)


class Drawn(NamedTuple):
    """Responses, and how they came about."""

    texts: Texts
    log_p: Tensor  # (B R) of each token when it was drawn, 0 behind the end
    ended: Tensor  # (B) by a token that ends a text, not for lack of room
    replies: list[str]


@torch.no_grad()
def sample(
    writer: Writer, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int,
    numbers: Sequence[int] = (),
) -> Drawn:  # fmt: skip
    """A response of at most `tokens` tokens to each prompt, which ends with a token of writer.stop.

    Response i is drawn from the stream of numbers[i], by default i, whatever stands beside it.
    """
    longest, context = max(map(len, prompts)), writer.model.config.context
    if longest >= context:
        raise UserError(
            f"a question has {longest} tokens, and the model's context {context}: there is no room "
            "for an answer"
        )
    how, found = Sampling(temperature, top_p=1.0), []

    def look(logits: Tensor, token: Tensor) -> None:
        found.append(log_probs(logits[:, None], token.to(logits.device)[:, None], temperature))

    steps, ended = [], torch.zeros(len(prompts), dtype=torch.bool)
    draws = tokens_on_device(writer.model, [list(p) for p in prompts],
                             min(tokens, context - longest), how, seed, unknown(writer),
                             numbers=numbers, look=look)  # fmt: skip
    for token in draws:
        steps.append(token.cpu())
        ended |= torch.isin(steps[-1], torch.tensor(sorted(writer.stop)))
        if ended.all():
            break
    columns = torch.stack(steps, 1).tolist()
    responses = [upto(column, writer.stop) for column in columns]
    texts = Texts.of(prompts, responses, writer.model.embedding.device)
    log_p = torch.cat(found, 1)[:, : texts.mask.shape[1]]
    said = [[t for t in response if t not in writer.stop] for response in responses]
    return Drawn(texts, torch.where(texts.mask != 0, log_p, 0.0), ended.to(log_p.device),
                 [writer.tokenizer.decode(ids) for ids in said])  # fmt: skip


def upto(ids: list[int], stop: set[int]) -> list[int]:
    """With the first token that ends a text, and nothing behind it."""
    end = next((i for i, id in enumerate(ids) if id in stop), len(ids) - 1)
    return ids[: end + 1]
