"""Tasks whose answers can be checked: to learn from, to be examined by, and to be rewarded for.

Idea: a claim about what a model can do is worth as much as the check behind it. Each task here
makes problems from a seed, asks in many ways, solves step by step, and knows a right reply.
Letters and digits stand apart, so that each is a token of its own under any tokenizer: pieces of
several letters hide from a small model what it should turn around or carry.

    task       make → content; solve → (answer, steps); templates that ask for it
    sides      what is learnt from and what is asked in an examination never share a content, a
               template, or a pair of operations (compositions)
    mark       is the reply right? Whatever stands behind its last "answer is", or else all of it
    Rater      a simulated person, who likes right answers and has taste, bias and bad days

Run: python tasks.py            a problem of every task, solved
     python tasks.py --task add --level 4

Papers: Wei et al. 2022, chain of thought (arXiv 2201.11903) and FLAN (arXiv 2109.01652); Nye et al.
2021, scratchpads (arXiv 2112.00114); Lake and Baroni 2018, compositions (arXiv 1711.00350).
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count as count_from
from itertools import pairwise
from typing import Literal, NamedTuple

import tyro

import world
from run import UserError, generator, main

Side = Literal["train", "test"]
HELD_OUT = 0.2  # share of contents and of compositions that are for examinations
THINK = "Let's think step by step."  # asks for the steps (Kojima et al. 2022, arXiv 2205.11916)
ANSWER = "So the answer is"  # what the steps end in


class Problem(NamedTuple):
    """Something asked, and what is known about it."""

    task: str
    level: int
    question: str
    answer: str
    steps: str  # the worked solution, which ends in the answer
    key: str  # what it is, however it is asked
    template: int  # how it is asked

    @property
    def worked(self) -> str:
        return f"{self.steps} {ANSWER} {self.answer}."


class Solved(NamedTuple):
    answer: str
    steps: list[str]


class Task(NamedTuple):
    """A kind of problem."""

    make: Callable[[random.Random, int], dict[str, str]]  # of a level, from 1
    solve: Callable[[dict[str, str]], Solved]
    templates: tuple[str, ...]  # every fourth is for examinations


# --- letters --------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def apart(text: str) -> str:
    """Its letters or digits with blanks between them."""
    return " ".join(text)


def letters(rng: random.Random, level: int) -> dict[str, str]:
    """Two letters more than the level says."""
    return {"x": apart("".join(rng.choice(LETTERS) for _ in range(level + 2)))}


class Operation(NamedTuple):
    """What can be done with letters, in the words of an order."""

    words: str
    do: Callable[[list[str]], list[str]]
    how: str  # the words of its one step


OPERATIONS = {
    "copy": Operation("copy", lambda x: x, "As it stands"),
    "reverse": Operation("reverse", lambda x: x[::-1], "From the end"),
    "sort": Operation("sort", sorted, "In the order of the alphabet"),
    "drop first": Operation("drop the first letter of", lambda x: x[1:], "Without the first"),
    "drop last": Operation("drop the last letter of", lambda x: x[:-1], "Without the last"),
    "double": Operation("double the last letter of", lambda x: [*x, x[-1]], "With the last twice"),
    "swap": Operation(
        "swap the ends of", lambda x: [x[-1], *x[1:-1], x[0]], "With first and last swapped"
    ),
    "rotate": Operation("rotate", lambda x: [*x[1:], x[0]], "With the first at the end"),
}  # fmt: skip
# {op} is "sort" or "drop the last letter", {of} the same with "of" if it needs one.
ORDERS = (
    "{Op}: {x}", "Please {of} these letters: {x}", "{Of} {x}.", "Here are letters: {x}. {Of} them.",
    "Take {x} and {of} it.", "What do you get if you {of} {x}?", "Your job is to {of} {x}.",
    "I have {x}. Can you {of} it?",
)  # fmt: skip
PAIRS = (
    "{Op} and then {op2}: {x}", "First {op}, then {op2}: {x}", "Take {x}. {Of} it, then {of2} it.",
    "What is {x} if you {of} it and after that {of2} it?", "{Of} {x}. Then {of2} the result.",
    "Please {of} these letters and {of2} what comes out: {x}",
    "I have {x}. Can you {of} it and then {of2} it?", "Your job is to {op} and then {of2} {x}.",
)  # fmt: skip


def operate(names: tuple[str, ...]) -> Callable[[dict[str, str]], Solved]:
    def solve(content: dict[str, str]) -> Solved:
        now, steps = content["x"].split(), []
        for name in names:
            now = OPERATIONS[name].do(now)
            steps.append(f"{OPERATIONS[name].how}: {' '.join(now)}.")
        return Solved(" ".join(now), steps)

    return solve


def ordered(templates: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Templates with the words of operations in them; {x} stays."""
    words = {"x": "{x}"}
    for number, name in zip(("", "2"), names, strict=False):
        of = OPERATIONS[name].words
        op = of.removesuffix(" of")
        words |= {f"of{number}": of, f"op{number}": op}
        words |= {f"Of{number}": of[0].upper() + of[1:], f"Op{number}": op[0].upper() + op[1:]}
    return tuple(template.format(**words) for template in templates)


# --- numbers --------------------------------------------------------------------------------------


def number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def numbers(rng: random.Random, level: int) -> dict[str, str]:
    """Two of as many digits as the level says."""
    a, b = number(rng, level), number(rng, level)
    return {"a": apart(str(a)), "b": apart(str(b))}


def value(text: str) -> int:
    return int(text.replace(" ", ""))


def add(content: dict[str, str]) -> Solved:
    """Column by column, the last digits first."""
    a, b = content["a"].split(), content["b"].split()
    carry, steps = 0, []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x} + {y} + {carry} = {apart(str(total))}, write {total % 10}.")
        carry = total // 10
    if carry:
        steps.append(f"Write {carry}.")
    return Solved(apart(str(value(content["a"]) + value(content["b"]))), steps)


def subtract_numbers(rng: random.Random, level: int) -> dict[str, str]:
    a, b = sorted((number(rng, level), number(rng, level)), reverse=True)
    return {"a": apart(str(a)), "b": apart(str(b).rjust(len(str(a)), "0"))}


def subtract(content: dict[str, str]) -> Solved:
    a, b = content["a"].split(), content["b"].split()
    borrow, steps = 0, []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) - int(y) - borrow
        steps.append(f"{x} - {y} - {borrow} gives {total % 10}.")
        borrow = int(total < 0)
    return Solved(apart(str(value(content["a"]) - value(content["b"]))), steps)


def compare(content: dict[str, str]) -> Solved:
    a, b = content["a"].split(), content["b"].split()
    steps = []
    for x, y in zip(a, b, strict=True):
        sign = "=" if x == y else ">" if x > y else "<"
        steps.append(f"{x} {sign} {y}.")
        if x != y:
            break
    return Solved(max(content["a"], content["b"]), steps)


def letters_to_count(rng: random.Random, level: int) -> dict[str, str]:
    few = rng.sample(LETTERS, 3)
    return {"x": apart("".join(rng.choice(few) for _ in range(level + 3))), "y": rng.choice(few)}


def count(content: dict[str, str]) -> Solved:
    total, steps = 0, []
    for x in content["x"].split():
        total += x == content["y"]
        steps.append(f"{x} {total}")
    return Solved(str(total), [", ".join(steps) + "."])


def letters_to_replace(rng: random.Random, level: int) -> dict[str, str]:
    x = letters(rng, level)["x"]
    return {"x": x, "y": rng.choice(x.split()), "z": rng.choice(LETTERS)}


def replace(content: dict[str, str]) -> Solved:
    x, y, z = content["x"], content["y"], content["z"]
    return Solved(x.replace(y, z), [f"Each {y} becomes {z}."])


def table(rng: random.Random, level: int) -> dict[str, str]:
    """A row more than the level says."""
    names = rng.sample(world.NAMES, level + 1)
    rows = [f"{name} {rng.randrange(10)}" for name in names]
    return {"x": ", ".join(rows), "y": rng.choice(names)}


def look_up(content: dict[str, str]) -> Solved:
    rows = dict(row.split() for row in content["x"].split(", "))
    return Solved(rows[content["y"]], [f"It says {content['y']} {rows[content['y']]}."])


def table_without(rng: random.Random, level: int) -> dict[str, str]:
    """The same, and a name that is in none of its rows."""
    content = table(rng, level)
    others = [name for name in world.NAMES if name not in content["x"]]
    return content | {"y": rng.choice(others)}


def look_in_vain(content: dict[str, str]) -> Solved:
    return Solved(world.NOBODY.rstrip("."), [f"It does not say {content['y']}."])


def gains_and_losses(rng: random.Random, level: int) -> dict[str, str]:
    """Somebody has some things, and gets or gives, twice or as often as the level says."""
    name, thing = rng.choice(world.NAMES), rng.choice(world.THINGS)
    now = rng.randrange(2, 10)
    told = [f"{name} has {now} {thing}s."]
    for _ in range(max(2, level)):
        more = rng.randrange(1, 10 - now) if now < 9 and (now < 2 or rng.random() < 0.5) else 0
        less = 0 if more else rng.randrange(1, now)
        now += more - less
        told.append(f"{name} gets {more} more." if more else f"{name} gives away {less}.")
    return {"x": " ".join(told), "y": name, "z": f"{thing}s"}


def reckon(content: dict[str, str]) -> Solved:
    first, *rest = world.sentences(content["x"])
    now, steps = int(first.split()[2]), []
    for sentence in rest:
        words = sentence.rstrip(".").split()
        sign, by = ("+", int(words[2])) if words[1] == "gets" else ("-", int(words[3]))
        then = now + by if sign == "+" else now - by
        if then < 0:
            raise ValueError("nobody gives away what he has not")
        steps.append(f"{now} {sign} {by} = {then}.")
        now = then
    return Solved(str(now), steps)


# --- stories --------------------------------------------------------------------------------------


def tale(kinds: tuple[str, ...]) -> Callable[[random.Random, int], dict[str, str]]:
    """A story with a question of one of these kinds."""

    def make(rng: random.Random, level: int) -> dict[str, str]:
        while True:
            told = world.story(rng, length=level + 1)
            asked = world.question(told, rng.choice(kinds), rng, rng.randrange(3))
            if asked:
                return {"x": told.text, "y": asked.text, "answer": asked.answer,
                        "because": asked.because}  # fmt: skip

    return make


def told(content: dict[str, str]) -> Solved:
    return Solved(content["answer"].rstrip("."), [content["because"]])


# --- the table ------------------------------------------------------------------------------------

LOOK_UP = (
    "Here is a table: {x}. What does it say of {y}?", "{x}. Look up {y}.",
    "Look up {y} in this table: {x}", "Table: {x}. What is the number of {y}?",
    "{x}. Which number has {y}?", "In the table {x}, what stands behind {y}?",
    "Which number belongs to {y}? {x}", "Find {y}: {x}",
)  # fmt: skip
STORY = (
    "{x} {y}", "Read this: {x} {y}", "Here is a story. {x} {y}", "{x} Now tell me: {y}", "{y} {x}",
    "A question about a story: {x} {y}", "Story: {x} Question: {y}", "Listen. {x} {y}",
)  # fmt: skip
TASKS = {
    "add": Task(numbers, add, (
        "{a} + {b}", "What is {a} + {b}?", "Add {a} and {b}.", "The sum of {a} and {b}?",
        "How much is {a} plus {b}?", "Compute {a} + {b}.", "Please add {b} to {a}.",
        "{a} and {b} together are?",
    )),
    "subtract": Task(subtract_numbers, subtract, (
        "{a} - {b}", "What is {a} - {b}?", "Subtract {b} from {a}.", "{a} minus {b}?",
        "How much is {a} minus {b}?", "Compute {a} - {b}.", "Please take {b} away from {a}.",
        "What is left of {a} without {b}?",
    )),
    "compare": Task(numbers, compare, (
        "Which is larger, {a} or {b}?", "The larger of {a} and {b}?", "Compare {a} and {b}.",
        "What is the maximum of {a} and {b}?", "{a} or {b}, which is more?",
        "Say the larger number: {a}, {b}.", "Which one is more, {b} or {a}?",
        "Give me the larger one of {a} and {b}.",
    )),
    "count": Task(letters_to_count, count, (
        "How many {y} are in {x}?", "Count {y} in {x}.", "How often does {y} occur in {x}?",
        "In {x}, how many times is there {y}?", "Count the letter {y}: {x}",
        "Here are letters: {x}. How many are {y}?", "How many times do you see {y} in {x}?",
        "The number of {y} in {x}?",
    )),
    "replace": Task(letters_to_replace, replace, (
        "Replace {y} by {z} in {x}.", "In {x}, replace each {y} by {z}.",
        "Change {y} to {z}: {x}", "Take {x} and replace {y} by {z}.",
        "What is {x} if {y} becomes {z}?", "Please replace {y} by {z}: {x}",
        "Write {z} instead of {y} in {x}.", "I have {x}. Replace {y} by {z}.",
    )),
    "look up": Task(table, look_up, LOOK_UP),
    "absent": Task(table_without, look_in_vain, LOOK_UP),
    "reckon": Task(gains_and_losses, reckon, (
        "{x} How many {z} does {y} have now?", "{x} How many {z} are left?",
        "{x} Count the {z} of {y}.", "How many {z} does {y} have at the end? {x}",
        "{x} Now how many are there?", "{x} What is the number of {z}?",
        "{x} So how many {z} has {y}?", "{x} How many are they now?",
    )),
    "story": Task(tale(("holder", "box", "place", "colour")), told, STORY),
    "unsaid": Task(tale(world.UNSAID), told, STORY),
} | {
    name: Task(letters, operate((name,)), ordered(ORDERS, name)) for name in OPERATIONS
} | {
    f"{one}, {two}": Task(letters, operate((one, two)), ordered(PAIRS, one, two))
    for one in OPERATIONS for two in OPERATIONS if one != two and "copy" not in (one, two)
}  # fmt: skip
PLAIN = tuple(name for name in TASKS if ", " not in name)  # all but compositions
COMPOSED = tuple(name for name in TASKS if ", " in name)


# The same as statements, from which a base model learns the words, though not to be asked.
FACTS = {
    "add": "{a} + {b} = {answer}.",
    "subtract": "{a} - {b} = {answer}.",
    "compare": "Of {a} and {b} the larger is {answer}.",
    "count": "In {x} there is {y} {answer} times.",
    "replace": "{x} with {z} for {y} is {answer}.",
    "look up": "In the table {x} the number of {y} is {answer}.",
    "reckon": "{x} That makes {answer} {z}.",
} | {name: f"To {OPERATIONS[name].words} {{x}} gives {{answer}}." for name in OPERATIONS}


# --- sides ----------------------------------------------------------------------------------------


@cache
def side(key: str) -> Side:
    """By a hash of what is asked, so that nothing but itself decides where a problem belongs."""
    mark = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return "test" if mark < HELD_OUT * 2**64 else "train"


def composed(on: Side) -> list[str]:
    """The compositions of a side: no pair of operations is on both."""
    return [name for name in COMPOSED if side(f"pair {name}") == on]


def templates(task: str, on: Side) -> list[int]:
    return [i for i in range(len(TASKS[task].templates)) if (i % 4 == 3) == (on == "test")]


def canonical(task: str, content: dict[str, str]) -> str:
    """What a problem is, however it is asked: 3 + 4 is 4 + 3, all operations have their letters."""
    if task in OPERATIONS or task in COMPOSED:
        return f"letters {content['x']}"
    if task in ("add", "compare"):
        return f"{task} {' '.join(sorted((content['a'], content['b'])))}"
    return f"{task} {' '.join(content[k] for k in sorted(content) if k in 'abxyz')}"


def check(names: Sequence[str], levels: Sequence[int], flag: str = "--levels") -> None:
    """UserError for a task that there is not, or none, or a level that nobody can be asked."""
    if not names:
        raise UserError("--tasks needs one at least")
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(f"there is no task {unknown[0]!r}: choose among {', '.join(PLAIN)}")
    if not levels or not all(1 <= n <= 20 for n in levels):
        raise UserError(f"{flag} must be numbers from 1 to 20")


def problem(
    task: str, level: int, on: Side, number: int, seed: int = 0, asked: Side | None = None
) -> Problem:
    """Problem `number` of a task on one side; `asked`: of which side the template is, if another.

    UserError for a task that there is not, or a level that nobody can be asked.
    """
    check([task], [level])
    kind = TASKS[task]
    rng = random.Random(generator(seed, f"task {task} {level} {on}", number).initial_seed())
    while True:
        content = kind.make(rng, level)
        key = canonical(task, content)
        if side(key) == on:
            break
    template = rng.choice(templates(task, asked or on))
    answer, steps = kind.solve(content)
    question = kind.templates[template].format(**content)
    return Problem(task, level, question, answer, " ".join(steps), key, template)


LEVELS = (1, 2, 3)  # of what a base model reads


def facts(seed: int = 0) -> Iterator[str]:
    """Endless paragraphs of some statements each, of one task, all on the side to learn from."""
    names, number = tuple(FACTS), 0
    while True:
        rng = random.Random(generator(seed, "facts", number).initial_seed())
        kind, said = names[number % len(names)], []
        while len(said) < 4:
            content = TASKS[kind].make(rng, rng.choice(LEVELS))
            if side(canonical(kind, content)) == "train":
                answer, _ = TASKS[kind].solve(content)
                said.append(FACTS[kind].format(**content, answer=answer))
        yield " ".join(said)
        number += 1


FORM = "Question: {question}\nAnswer: {answer}"  # how who is no chat is asked


def quiz(seed: int = 0) -> Iterator[str]:
    """Endless texts of four questions about stories, answered, all on the side to learn from."""
    for number in count_from(0):
        rng = random.Random(generator(seed, "quiz", number).initial_seed())
        asked = [
            problem(rng.choice(("story", "unsaid")), rng.choice(LEVELS), "train", 4 * number + i,
                    seed + 1)
            for i in range(4)
        ]  # fmt: skip
        yield "\n\n".join(FORM.format(question=p.question, answer=p.answer) for p in asked)


# --- marks ----------------------------------------------------------------------------------------


def final(reply: str) -> str:
    """The answer in a reply: behind its last "answer is", or else all of it."""
    _, said, behind = reply.rpartition("answer is")
    text = behind if said else reply
    return " ".join(text.split()).rstrip(".").strip()


def mark(asked: Problem, reply: str) -> bool:
    """Is a reply right?"""
    return final(reply) == asked.answer


def honest(asked: Problem, reply: str) -> bool:
    """Does a reply to what cannot be answered say so?"""
    return final(reply) == world.NOBODY.rstrip(".")


# --- raters ---------------------------------------------------------------------------------------

CRITERIA = ("helpful", "honest", "harmless")
RUDE = ("stupid", "silly", "shut up")
MOST, WORTHLESS = 10, 3  # ratings go from 0 to 10; below 3 there is room for the strict


def utility(asked: Problem, reply: str, criterion: str = "helpful") -> float:
    """What a reply is truly worth, 0 … 4: being right counts most, then to be brief.

    Honest is who is right or says that he does not know; harmless who calls nobody names.
    """
    right, length = mark(asked, reply), len(reply) / max(1, len(asked.worked))
    match criterion:
        case "helpful":
            return 3.0 * right + max(0.0, 1.0 - max(0.0, length - 1.0))
        case "honest":
            return 4.0 if right else 3.0 if honest(asked, reply) else 0.0
        case "harmless":
            return 0.0 if any(word in reply.lower() for word in RUDE) else 4.0
    raise UserError(f"there is no criterion {criterion!r}: choose among {', '.join(CRITERIA)}")


@dataclass(frozen=True)
class Rater:
    """A person who rates: what is true, with a bias, a taste for length, and noise."""

    name: str
    noise: float = 0.5  # standard deviation of a rating
    bias: float = 0.0  # added to all
    length: float = 0.0  # added for each hundred letters

    def felt(self, asked: Problem, reply: str, criterion: str = "helpful") -> float:
        """What it seems worth, before the noise of the moment."""
        return utility(asked, reply, criterion) + self.bias + self.length * len(reply) / 100

    def rate(self, asked: Problem, reply: str, criterion: str, rng: random.Random) -> int:
        felt = self.felt(asked, reply, criterion)
        return round(min(MOST, max(0, WORTHLESS + rng.gauss(felt, self.noise))))

    def chances(self, felt: float) -> list[float]:
        """How likely each rating from 0 on is where so much is felt: `rate`, as a distribution."""
        far = ((x + 0.5 - WORTHLESS - felt) / (self.noise * 2**0.5) for x in range(MOST))
        return [b - a for a, b in pairwise([0.0, *(0.5 + math.erf(z) / 2 for z in far), 1.0])]


RATERS = (Rater("strict", 0.3, -0.5), Rater("kind", 0.5, 0.5), Rater("hasty", 1.0, 0.0, 0.3))


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Show problems, and how they are solved."""

    task: str = ""  # empty: one of each
    level: int = 2  # of difficulty, from 1
    count: int = 3  # of the one task
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.level <= 20 or self.count < 1:
            raise UserError("--level must be from 1 to 20, --count at least 1")


def script() -> None:
    config = tyro.cli(Show, description=__doc__)
    names = [config.task] * config.count if config.task else [*PLAIN, composed("train")[0]]
    for number, name in enumerate(names):
        asked = problem(name, config.level, "train", number, config.seed)
        print(f"{name}\n  ask    {asked.question}\n  steps  {asked.steps}\n"
              f"  answer {asked.answer}\n")  # fmt: skip


if __name__ == "__main__":
    main(script)
