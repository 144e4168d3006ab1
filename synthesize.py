"""Instructions that a model writes itself, and of which only what is right and new is kept.

Idea: a base model that has read many statements can write more. A few seeds are shown to it, it
goes on, and what it writes passes three gates: can the statement be understood, is it right, is it
unlike all that is there already? What is left becomes questions and answers, in many wordings, and
some of it is shown as seeds in turn (Self-Instruct).

    novel    the likeness to each kept one, by ROUGE-L over words, must be below 0.7

Run: python synthesize.py --run base --count 200 --out new.jsonl

Papers: Wang et al. 2023, Self-Instruct (arXiv 2212.10560); Lin 2004, ROUGE.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

import tasks
import world
from chat import Turn, Turns
from generate import Sampling, generate
from instruct import rouge_l, write
from pictures import table
from run import UserError, generator, main
from tasks import FACTS, TASKS, side
from writer import Writer, unknown, writer_of

ALIKE = 0.7  # ROUGE-L from which two statements are the same
SEEDS, OWN = 6, 2  # statements that are drawn for a prompt: seeds, and of the model's own
SHOWN = 3  # of these stand in it, as contexts are short here


# --- what a text says -----------------------------------------------------------------------------


@cache
def patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Of each statement its task, and an expression that finds its content and its answer."""
    letter, digits = "[a-z](?: [a-z])*", r"\d(?: \d)*"
    name, row = "[A-Z][a-z]+", r"[A-Z][a-z]+ \d"
    happens = rf"{name} (?:gets \d+ more|gives away \d+)\."
    fields = {
        "add": {"a": digits, "b": digits}, "subtract": {"a": digits, "b": digits},
        "compare": {"a": digits, "b": digits}, "count": {"x": letter, "y": "[a-z]"},
        "replace": {"x": letter, "y": "[a-z]", "z": "[a-z]"},
        "look up": {"x": f"{row}(?:, {row})*", "y": name},
        "reckon": {"x": rf"{name} has \d+ [a-z]+\.(?: {happens})+", "z": "[a-z]+"},
    }  # fmt: skip
    found = []
    for task, template in FACTS.items():
        known = fields.get(task, {"x": letter}) | {"answer": rf"{letter}|{digits}"}
        expression = "".join(
            f"(?P<{part[1:-1]}>{known[part[1:-1]]})" if part.startswith("{") else re.escape(part)
            for part in re.split(r"(\{\w+\})", template)
        )
        found.append((task, re.compile(expression)))
    return found


class Stated(NamedTuple):
    """A statement that was found in a text."""

    task: str
    content: dict[str, str]
    answer: str

    @property
    def right(self) -> bool:
        if self.task == "reckon" and not of_one(self.content):
            return False
        try:
            return TASKS[self.task].solve(self.content).answer == self.answer
        except (ValueError, LookupError):  # numbers of unlike length, a name that is not there
            return False


def of_one(tale: dict[str, str]) -> bool:
    """Is it of one person and one kind of thing?"""
    first, *rest = (sentence.rstrip(".").split() for sentence in world.sentences(tale["x"]))
    return first[-1] == tale["z"] and all(words[0] == tale["y"] for words in rest)


def stated(text: str) -> Iterator[Stated | str]:
    """The statements of a text, in order; what is none comes as text, up to the next full stop."""
    text = text.strip()
    while text:
        matches = ((task, pattern.match(text)) for task, pattern in patterns())
        task, match = next(((t, m) for t, m in matches if m), ("", None))
        if match:
            content = match.groupdict()
            if task == "reckon":  # whose statement does not name its person again
                content["y"] = content["x"].split()[0]
            yield Stated(task, content, content.pop("answer"))
            end = match.end()
        else:
            end = text.find(".") + 1 or len(text)
            yield text[:end]
        text = text[end:].strip()


# --- what of it is kept ---------------------------------------------------------------------------


@dataclass
class Synthesis:
    """What was kept, and why the rest was not."""

    seeds: list[str]
    kept: list[Stated] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> what was dropped for it

    def judge(self, said: Stated | str) -> None:
        """Keep a statement, or count why not."""
        text = said if isinstance(said, str) else worded(said)
        if reason := self.objection(said, text):
            self.dropped[reason] += 1
            self.examples.setdefault(reason, text)
        else:
            self.kept.append(said)

    def objection(self, said: Stated | str, text: str) -> str:
        if isinstance(said, str):
            return "no statement"
        if not said.right:
            return "wrong"
        if side(tasks.canonical(said.task, said.content)) != "train":
            return "kept for examinations"
        known = [*self.seeds, *map(worded, self.kept)]
        return "not new" if any(alike(text, other) for other in known) else ""


def alike(a: str, b: str) -> bool:
    """Whether ROUGE-L is at least 0.7, which words in common, in whatever order, bound from above:
    that is soon counted."""
    x, y = Counter(a.lower().split()), Counter(b.lower().split())
    most = 2 * (x & y).total() / (x.total() + y.total())
    return most >= ALIKE and rouge_l(a, b) >= ALIKE


def worded(said: Stated) -> str:
    return FACTS[said.task].format(**said.content, answer=said.answer)


def seeds(each: int, seed: int) -> list[str]:
    """So many statements of each kind."""
    found: dict[str, list[str]] = {name: [] for name in FACTS}
    for paragraph in tasks.facts(seed):
        for one in stated(paragraph):
            if not isinstance(one, str) and len(found[one.task]) < each:
                found[one.task].append(worded(one))
        if all(len(some) == each for some in found.values()):
            return [text for some in found.values() for text in some]


def synthesized(
    writer: Writer, shown: list[str], count: int, seed: int, at_once: int = 32, rounds: int = 100
) -> Synthesis:
    """Let the model write until `count` are kept, or for so many rounds."""
    made = Synthesis(shown)
    rng = random.Random(generator(seed, "synthesis").initial_seed())
    with tqdm(total=count, desc="kept", leave=False, disable=None) as bar:
        for turn in range(rounds):
            for text in continued(writer, prompts(made, rng, at_once), seed + turn):
                for said in stated(text):
                    made.judge(said)
            bar.update(min(count, len(made.kept)) - bar.n)
            if len(made.kept) >= count:
                break
    del made.kept[count:]
    return made


def prompts(made: Synthesis, rng: random.Random, many: int) -> list[str]:
    """Statements of one kind each time, some of them the model's own."""
    found = []
    for _ in range(many):
        kind = rng.choice(list(FACTS))
        own = [worded(said) for said in made.kept if said.task == kind]
        given = [text for text in made.seeds if next(stated(text)).task == kind]
        some = rng.sample(given, min(SEEDS, len(given))) + rng.sample(own, min(OWN, len(own)))
        rng.shuffle(some)
        found.append(" ".join(some[:SHOWN]))
    return found


def continued(writer: Writer, texts: Sequence[str], seed: int, tokens: int = 120) -> list[str]:
    """What the model writes behind each text, without what is cut off at its end."""
    asked = [[*writer.begin, *writer.tokenizer.encode(text)] for text in texts]
    columns: list[list[int]] = [[] for _ in asked]
    steps = generate(writer.model, asked, tokens, Sampling(1.0, top_p=0.95), writer.stop, seed,
                     unknown(writer))  # fmt: skip
    ended = [False] * len(asked)
    for step in steps:
        for i, token in enumerate(step):
            ended[i] |= token is None or token in writer.stop
            if not ended[i]:
                columns[i].append(token)
    said = [writer.tokenizer.decode(column) for column in columns]
    return [text if done else text[: text.rfind(".") + 1]
            for text, done in zip(said, ended, strict=True)]  # fmt: skip


def conversations(made: Synthesis, seed: int) -> list[Turns]:
    """Each statement as a question in one of its wordings, and its answer."""
    found = []
    for number, said in enumerate(made.kept):
        rng = random.Random(generator(seed, "wording", number).initial_seed())
        task = TASKS[said.task]
        template = rng.choice(tasks.templates(said.task, "train"))
        question = task.templates[template].format(**said.content)
        found.append([Turn("user", question), Turn("assistant", said.answer)])
    return found


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synthesize:
    """Let a base model write instructions."""

    run: str = "base"  # a run's name or folder
    count: int = 100  # instructions to keep
    seeds: int = 6  # statements of each kind to begin with
    out: str = "synthesis.jsonl"  # where the conversations go
    rounds: int = 100  # of 32 texts, after which it gives up
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.count, self.seeds, self.rounds) < 1:
            raise UserError("--count, --seeds and --rounds must be at least 1")


def script() -> None:
    config = tyro.cli(Synthesize, description=__doc__)
    writer = writer_of(config.run, "", config.device)
    start = seeds(config.seeds, config.seed)
    made = synthesized(writer, start, config.count, config.seed, rounds=config.rounds)
    rows = [("kept", str(len(made.kept)), worded(made.kept[-1])[:60] if made.kept else "")]
    rows += [(why, str(n), made.examples[why][:60]) for why, n in made.dropped.most_common()]
    print(table(("", "statements", "for example"), *rows))
    if not made.kept:
        return print(f"\n{config.run} wrote nothing that could be kept: train it longer")
    write(conversations(made, config.seed), Path(config.out))
    kinds = Counter(said.task for said in made.kept)
    print("\n" + ", ".join(f"{n} × {task}" for task, n in kinds.most_common()))
    print(f"conversations: {config.out}")


if __name__ == "__main__":
    main(script)
