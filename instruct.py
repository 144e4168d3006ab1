"""Instruction data: tasks as conversations, and how new a text is.

Idea: to follow instructions is learnt from many kinds of them, asked in many ways: with and without
solved examples, in one turn and in several, with and without the steps. Each kind gets an equal
share here; sources of unlike sizes are mixed by size up to a cap (--data.cap).

    lesson      a conversation of a few problems of one kind, or of several
    rouge_l     how alike two texts are, by their longest common subsequence

Run: python instruct.py                      some lessons
     python instruct.py --out lessons.jsonl    as many as --count, as conversations in JSON lines

Papers: Wei et al. 2022, FLAN (arXiv 2109.01652); Raffel et al. 2020, T5 (arXiv 1910.10683); Wang et
al. 2023, Self-Instruct (arXiv 2212.10560); Lin 2004, ROUGE.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from tqdm import tqdm

import tasks
from chat import Turn, Turns
from run import UserError, generator, main, write_whole
from tasks import THINK, Problem

SYSTEM = ("You are a helpful assistant.", "Answer in a word or two.", "You solve small problems.")
OFTEN = 0.2  # share of lessons in which the system says something


@dataclass(frozen=True)
class Lessons:
    """Which problems are made into conversations, and how."""

    tasks: tuple[str, ...] = ()  # empty: all, with those compositions that are for learning
    levels: tuple[int, ...] = (1, 2, 3)  # of their difficulty
    count: int = 20_000  # conversations
    think: float = 0.5  # share of problems whose reply shows its steps
    unasked: bool = False  # show them though nobody asked: a reply then begins either way
    turns: int = 3  # problems in a conversation, at most
    seed: int = 0

    def __post_init__(self):
        tasks.check(self.names, self.levels)
        if self.count < 2 or self.turns < 1 or not 0 <= self.think <= 1:
            raise UserError("--count must be at least 2, --turns 1, and --think from 0 to 1")

    @property
    def names(self) -> tuple[str, ...]:
        return self.tasks or (*tasks.PLAIN, *tasks.composed("train"))


# --- conversations --------------------------------------------------------------------------------


def exchange(asked: Problem, think: bool, unasked: bool = False) -> Turns:
    """A problem and its reply; with steps, it is also asked for them."""
    question = f"{asked.question} {THINK}" if think and not unasked else asked.question
    return [Turn("user", question), Turn("assistant", asked.worked if think else asked.answer)]


def lesson(how: Lessons, number: int) -> Turns:
    """Conversation `number`: problems of one kind, like examples for the last one, or mixed."""
    rng = random.Random(generator(how.seed, "lesson", number).initial_seed())
    name, mixed = how.names[number % len(how.names)], rng.random() < 0.5
    found = [Turn("system", rng.choice(SYSTEM))] if rng.random() < OFTEN else []
    think = rng.random() < how.think
    for turn in range(rng.randint(1, how.turns)):
        kind = rng.choice(how.names) if mixed and turn else name
        asked = tasks.problem(
            kind, rng.choice(how.levels), "train", number * how.turns + turn, how.seed
        )
        found += exchange(asked, think, how.unasked)
    return found


def lessons(how: Lessons) -> Iterator[Turns]:
    return (lesson(how, number) for number in range(how.count))


def write(conversations: Sequence[Turns], path: Path) -> None:
    """JSON lines, each with "messages"."""
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
        for turns in conversations
    ]
    write_whole(path, ("\n".join(lines) + "\n").encode())


# --- likeness -------------------------------------------------------------------------------------


def rouge_l(a: str, b: str) -> float:
    """F₁ of the longest common subsequence of words (Lin 2004): 2 L/(|a| + |b|)."""
    x, y = a.lower().split(), b.lower().split()
    row = [0] * (len(y) + 1)
    for word in x:
        before = 0
        for j, other in enumerate(y, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(x) + len(y)) if x and y else 0.0


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show(Lessons):
    """Show lessons, or write them to a file."""

    out: str = ""  # a file of JSON lines; empty: show a few


def script() -> None:
    config = tyro.cli(Show, description=__doc__)
    if config.out:
        found = list(tqdm(lessons(config), "lessons", config.count, leave=False, disable=None))
        write(found, Path(config.out))
        print(f"{len(found):,} conversations: {config.out}")
        return
    for turns in islice(lessons(config), 8):
        print("\n".join(f"{turn.role:>9}: {turn.text}" for turn in turns) + "\n")


if __name__ == "__main__":
    main(script)
