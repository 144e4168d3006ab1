"""What a policy is asked, and who judges what it answers.

Idea: a question is a conversation whose next turn is the assistant's. What an answer is worth, says
a judge: a check, where the right answer is known, or a reward model, where people were asked.

Run: python -m pytest tests/test_improve.py

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Ouyang et al. 2022 (arXiv 2203.02155).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import chat
import tasks
from chat import Turn, Turns
from reward import RewardModel
from rollout import Drawn
from run import UserError
from tasks import Problem
from writer import Writer


class Asked(NamedTuple):
    """A question: a conversation whose next turn is the assistant's."""

    turns: Turns
    problem: Problem | None = None  # if it is one of tasks.py, whose answer can be checked


def question(problem: Problem) -> Asked:
    return Asked([Turn("user", problem.question)], problem)


def prompt_ids(writer: Writer, turns: Turns) -> list[int]:
    return [*writer.begin, *chat.written(writer.tokenizer, turns, answer=True)]


Judge = Callable[[Sequence[Asked], Drawn], Tensor]  # what each response is worth (B)


def checked(asked: Sequence[Asked], drawn: Drawn) -> Tensor:
    """1 for a right answer, 0 for any other: nobody's taste, and nothing to deceive."""
    right = [tasks.mark(one.problem, said) for one, said in zip(asked, drawn.replies, strict=True)]
    return torch.tensor(right, dtype=drawn.log_p.dtype, device=drawn.log_p.device)


def judged(judge: Judge, asked: Sequence[Asked], drawn: Drawn) -> Tensor:
    """UserError, with the response, where the judge says no number."""
    scores = judge(asked, drawn)
    if not (good := torch.isfinite(scores)).all():
        i = int((~good).nonzero()[0])
        raise UserError(
            f"the reward is {scores[i].item()} for the answer {drawn.replies[i]!r} to "
            f"{asked[i].turns[-1].text!r}: the reward model is damaged, or was badly trained"
        )
    return scores


def questions_of(path: Path) -> list[Asked]:
    """Conversations up to the last reply; UserError for a record that is none."""
    found = []
    for where, turns in chat.conversations(path):
        if isinstance(turns, str):
            raise UserError(f"{where} {turns}")
        found.append(Asked(turns[:-1]))
    if not found:
        raise UserError(f"{path} holds no conversation")
    return found


class ByModel:
    """A reward model as the judge."""

    def __init__(self, model: RewardModel):
        self.model = model

    def __call__(self, asked: Sequence[Asked], drawn: Drawn) -> Tensor:
        return self.model.scores(drawn.texts).to(drawn.log_p.dtype)
