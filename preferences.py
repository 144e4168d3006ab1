"""Which response is better: what people say of them, read, typed in at a terminal, or simulated.

Idea: people judge in two ways. They put several responses to one prompt in an order, in which some
may be equal; or they give each a number, by a criterion, and one is strict where another is kind.
Both are kept as they were said, each a line of JSON, and the reward model makes sense of them.

    Ranking    responses to a prompt, each with its rank: 1 is the best, equal ones have equal ranks
    Rating     one response, by whom, by which criterion, and a number

Simulated people know the truth (tasks.py): so the best that a reward model can do is known too.

Run: python preferences.py                         what three simulated people say
     python preferences.py --file preferences.jsonl   what stands in a file

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Ouyang et al. 2022, K-way rankings (arXiv
2203.02155); Bai et al. 2022, helpful and harmless (arXiv 2204.05862); Plackett 1975; Luce 1959.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import tyro

import chat
import tasks
from chat import Turn, Turns
from run import UserError, generator, main, write_whole
from tasks import CRITERIA, RATERS, Problem, Rater


class Ranking(NamedTuple):
    """Responses to a prompt, and how good they are beside each other."""

    prompt: Turns
    responses: tuple[str, ...]
    ranks: tuple[int, ...]  # 1 the best

    def pairs(self) -> list[tuple[int, int, float]]:
        """(i, j, how often i is better): 1 where its rank is, ½ where both are equal, each once."""
        n = range(len(self.ranks))
        each = ((i, j, self.ranks[j] - self.ranks[i]) for i in n for j in n)
        return [(i, j, 1.0 if by else 0.5) for i, j, by in each if by > 0 or (by == 0 and i < j)]


class Rating(NamedTuple):
    """A number that somebody gave a response."""

    prompt: Turns
    response: str
    rater: str
    criterion: str
    value: float


# --- files ----------------------------------------------------------------------------------------

FORMS = (
    '"chosen" and "rejected" (with "prompt" or "instruction", or as chats), "responses" and '
    '"ranks", or "response" and "ratings"'
)


def read(path: Path) -> Iterator[tuple[str, Ranking | Rating | str]]:
    """(where it stands, what was said), or instead why it cannot be read."""
    return chat.read(path, said)


def said(record: object) -> list[Ranking | Rating]:
    """What a record holds; ValueError, which says the field, for one that holds nothing."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"is {type(record).__name__}, not an object with fields")
    if "chosen" in record:
        return [chosen(record)]
    if "responses" in record:
        return [ranking(record)]
    if "ratings" in record:
        return ratings(record)
    raise ValueError(f"has none of the fields {FORMS}")


def prompt_of(record: dict) -> Turns:
    """ "prompt" as text or as a chat, or Alpaca's "instruction" and "input"."""
    if "instruction" in record:
        return chat.alpaca({**record, "output": "-"})[:-1]
    if record.get("prompt") == []:
        raise ValueError('"prompt" is no list of turns')
    if isinstance(record.get("prompt"), list):
        return chat.chat([*record["prompt"], {"role": "assistant", "content": "-"}])[:-1]
    return [Turn("user", chat.text_of(record, "prompt"))]


def chosen(record: dict) -> Ranking:
    """One of two is better; both may be whole chats, which differ in their last turn only."""
    both = record["chosen"], record.get("rejected")
    if all(isinstance(one, list) for one in both):
        chats = [chat.chat(one) for one in both]
    elif "prompt" not in record and "instruction" not in record:
        chats = [transcript(chat.text_of(record, name)) for name in ("chosen", "rejected")]
    else:
        texts = tuple(chat.text_of(record, name) for name in ("chosen", "rejected"))
        return Ranking(prompt_of(record), texts, (1, 2))
    if chats[0][:-1] != chats[1][:-1]:
        raise ValueError('"chosen" and "rejected" differ before their last turn')
    prompt = chats[0][:-1] or prompt_of(record)  # which stands beside them in TRL's form
    return Ranking(prompt, (chats[0][-1].text, chats[1][-1].text), (1, 2))


SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def transcript(text: str) -> Turns:
    """Turns behind "Human:" and "Assistant:"  (Bai et al. 2022)."""
    found: Turns = []
    for part in f"\n\n{text.strip()}".split("\n\n")[1:]:
        name, colon, words = part.partition(":")
        if colon and name in SPEAKERS:
            found.append(Turn(SPEAKERS[name], words.strip()))
        elif found:
            found[-1] = Turn(found[-1].role, f"{found[-1].text}\n\n{part}")
    if len(found) < 2 or found[-1].role != "assistant":
        raise ValueError('has no "prompt", and is no transcript of Human: and Assistant:')
    return found


def ranking(record: dict) -> Ranking:
    responses, ranks = record["responses"], record.get("ranks")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError('"responses" is no list of texts')
    if not isinstance(ranks, list) or not all(type(r) is int and r > 0 for r in ranks):
        raise ValueError('"ranks" is no list of whole numbers from 1')
    if len(ranks) != len(responses) or len(ranks) < 2:
        raise ValueError(f"has {len(responses)} responses and {len(ranks)} ranks")
    texts = tuple(chat.whole(text, "responses") for text in responses)
    return Ranking(prompt_of(record), texts, tuple(ranks))


def ratings(record: dict) -> list[Rating]:
    """By criterion; "rater" is who gave them."""
    each, response = record["ratings"], chat.text_of(record, "response")
    if not isinstance(each, dict) or not each:
        raise ValueError('"ratings" is no object of criteria and numbers')
    for criterion, value in each.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f'"ratings": {criterion} is {value!r}, not a number')
    prompt, rater = prompt_of(record), chat.text_of(record, "rater", needed=False)
    return [Rating(prompt, response, rater, name, float(x)) for name, x in each.items()]


def fault(one: Ranking | Rating, lowest: float, highest: float) -> str:
    """Why nothing can be learnt from it, or an empty string."""
    if isinstance(one, Rating):
        if lowest <= one.value <= highest:
            return "" if one.response.strip() else "an empty answer"
        return f"a rating that is not from {lowest:g} to {highest:g}"
    if not all(text.strip() for text in one.responses):
        return "an empty answer"
    return "the same answer twice" if len(set(one.responses)) < len(one.responses) else ""


def usable(
    path: Path, strict: bool = False, lowest: float = -math.inf, highest: float = math.inf
) -> list[Ranking | Rating]:
    """What a file says; what cannot be used is counted, and shown by an example.

    UserError for the first such record if strict, and if nothing is left.
    """
    found, left_out = [], {}
    for where, one in read(path):
        why = one if isinstance(one, str) else fault(one, lowest, highest)
        if not why:
            found.append(one)
        elif strict:
            raise UserError(f"{where} {why if isinstance(one, str) else f'has {why}'}")
        else:
            times, first = left_out.get(why, (0, where))
            left_out[why] = times + 1, first
    for why, (times, first) in left_out.items():
        print(f"left out {times:,} × {why}, as in {first}")
    if not found:
        raise UserError(f"{path} holds nothing to learn preferences from")
    return found


def line_of(one: Ranking | Rating) -> str:
    """A line of JSON, which `read` reads."""
    prompt = [{"role": role, "content": text} for role, text in one.prompt]
    if isinstance(one, Ranking):
        return json.dumps({"prompt": prompt, "responses": one.responses, "ranks": one.ranks})
    return json.dumps({"prompt": prompt, "response": one.response, "rater": one.rater,
                       "ratings": {one.criterion: one.value}})  # fmt: skip


def write(found: Sequence[Ranking | Rating], path: Path) -> None:
    write_whole(path, "".join(f"{line_of(one)}\n" for one in found).encode())


# --- simulated people -----------------------------------------------------------------------------


def ranked(
    asked: Problem, replies: Sequence[str], rater: Rater, rng: random.Random, alike: float = 0.2
) -> Ranking:
    """In the order of worth and Gumbel noise; who lies less than `alike` behind the last is equal.

    With noise of scale s, j is better than i with probability σ((u_j − u_i)/s)  (Luce 1959).
    """
    felt = [
        rater.felt(asked, reply) - rater.noise * math.log(-math.log(rng.random() or 0.5))
        for reply in replies
    ]
    order = sorted(range(len(replies)), key=lambda i: -felt[i])
    ranks, rank = {order[0]: 1}, 1
    for number, (before, i) in enumerate(pairwise(order), 2):
        rank = rank if felt[before] - felt[i] < alike else number
        ranks[i] = rank
    prompt = [Turn("user", asked.question)]
    return Ranking(prompt, tuple(replies), tuple(ranks[i] for i in range(len(replies))))


def rated(asked: Problem, reply: str, rater: Rater, rng: random.Random) -> list[Rating]:
    """By each criterion a number from 0 to 10."""
    prompt = [Turn("user", asked.question)]
    return [
        Rating(prompt, reply, rater.name, criterion, rater.rate(asked, reply, criterion, rng))
        for criterion in CRITERIA
    ]


# --- a person at a terminal -----------------------------------------------------------------------

HELP = """Type the numbers from the best on, such as 213; = between equal ones, such as 2=13; those
left out are equal and last. s skips, u takes the last answer back, q ends; all is saved."""


def order_of(keys: str, count: int) -> tuple[int, ...]:
    """The ranks of answers 1 to `count`; ValueError for what is no order."""
    ranks: dict[int, int] = {}
    equal, rank = False, 0
    for key in keys.replace(" ", "").replace(">", ""):
        if key == "=" and ranks and not equal:
            equal = True
            continue
        if not (key.isascii() and key.isdigit() and 1 <= int(key) <= count):
            raise ValueError(f"{key!r} is none of the answers 1 to {count}")
        if int(key) in ranks:
            raise ValueError(f"{key} is there twice")
        rank = rank if equal else len(ranks) + 1
        ranks[int(key)], equal = rank, False
    if equal or not ranks:
        raise ValueError("that is no order")
    return tuple(ranks.get(i, len(ranks) + 1) for i in range(1, count + 1))


Asked = tuple[Turns, tuple[str, ...]]  # a prompt and at most nine responses


def label(items: Sequence[Asked], out: Path, say: Callable[[str], str] = input) -> list[Ranking]:
    """Have a person put responses in order; what `out` holds already is not asked again.

    Every answer is in the file before the next question; Ctrl-C and Ctrl-D end. UserError if the
    file holds anything else.
    """
    found = labelled(out)
    known = {(str(one.prompt), one.responses) for one in found}
    left = [item for item in items if (str(item[0]), item[1]) not in known]
    print(HELP)
    number = 0
    while number < len(left):
        prompt, responses = left[number]
        print(f"\n{number + 1} of {len(left)}\n{prompt[-1].text}")
        for i, text in enumerate(responses, 1):
            print(f"  {i}  {text}")
        try:
            keys = say("best first> ").strip()
        except (EOFError, KeyboardInterrupt):
            keys = "q"
        if keys == "q":
            break
        if keys == "u" and found:
            prompt, responses, _ = found.pop()
            left.insert(number, (prompt, responses))
            write(found, out)
        elif keys == "s":
            number += 1
        else:
            try:
                found.append(Ranking(prompt, responses, order_of(keys, len(responses))))
            except ValueError as error:
                print(f"{error}\n{HELP}")
                continue
            write(found, out)
            number += 1
    print(f"\n{len(found)} orders in {out}")
    return found


def labelled(path: Path) -> list[Ranking]:
    """What was said before; UserError for what is no order."""
    found = []
    for where, one in read(path) if path.exists() else ():
        if not isinstance(one, Ranking):
            raise UserError(f"{where} {one if isinstance(one, str) else 'is no order'}")
        found.append(one)
    return found


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Show what people say of responses."""

    file: str = ""  # .jsonl or .json; empty: simulated people
    count: int = 5  # records
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise UserError("--count must be at least 1")


def simulated(seed: int) -> Iterator[Ranking | Rating]:
    """Of each problem a right answer, its steps, one that does not know and a rude one."""
    for number, name in enumerate(tasks.PLAIN):
        asked = tasks.problem(name, 1, "train", number, seed)
        rng = random.Random(generator(seed, "preferences", number).initial_seed())
        replies = (asked.answer, asked.worked, "I don't know.", f"{asked.answer}, silly.")
        rater = RATERS[number % len(RATERS)]
        yield ranked(asked, replies, rater, rng)
        yield from rated(asked, replies[number % 4], rater, rng)[:1]


def script() -> None:
    config = tyro.cli(Show, description=__doc__)
    each = read(Path(config.file)) if config.file else (("", x) for x in simulated(config.seed))
    for where, one in islice(each, config.count):
        if isinstance(one, str):
            raise UserError(f"{where} {one}")
        print(f"\n{one.prompt[-1].text}")
        if isinstance(one, Rating):
            print(f"  {one.value:g} for being {one.criterion}, {one.rater or 'somebody'} says of: "
                  f"{one.response}")  # fmt: skip
            continue
        for rank, text in sorted(zip(one.ranks, one.responses, strict=True)):
            print(f"  {rank}. {text}")


if __name__ == "__main__":
    main(script)
