"""Known faults in known text: what each step of cleaning finds of them, and what it takes for one.

Idea: of a real corpus nobody knows how many copies or telephone numbers it has, so nobody can say
what share was found. Here stories of world.py get faults planted, each for one step, and the steps
of clean.py are run over them. Recall is the share of the planted, as far as no step before took it,
that its step removed; precision the share of what it removed that had to go.

Run: python planted.py        half a minute: a table, and a picture

Papers: Lee et al. 2022, deduplication (arXiv 2107.06499); Penedo et al. 2023, RefinedWeb (arXiv
2306.01116).
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tyro

import world
from clean import RECIPES, Item, Store, one_step
from documents import Document
from pictures import picture, table
from redact import luhn
from run import RUNS, UserError, generator, main

STORIES = 4  # of a document


class Planted(NamedTuple):
    """A document, and what is wrong with it."""

    text: str
    fault: str  # a name in FAULTS, or "" for none
    marks: tuple[str, ...] = ()  # texts that should go, while the document stays


# --- faults ---------------------------------------------------------------------------------------

OTHERS = (  # two sentences each in languages that are not English
    "Der Hund geht langsam durch den alten Garten und sucht seinen roten Ball unter dem Baum.",
    "Gestern war das Wetter schön, und wir haben am Fluss mit den Kindern gespielt.",
    "La fille marche dans la forêt avec son frère et ils cherchent une maison blanche.",
    "Hier il faisait beau, alors nous avons mangé du pain et du fromage près de la rivière.",
    "El niño corre por la calle con su perro y busca la pelota roja debajo de los árboles.",
    "Ayer hizo buen tiempo y comimos pan con queso cerca del río con nuestros amigos.",
)  # fmt: skip
FOOTERS = (
    "Subscribe to our newsletter and never miss a story from the village again.",
    "All rights reserved by the publisher of this page and its partners worldwide.",
)


def another_language(text: str, rng: random.Random) -> Planted:
    first = rng.randrange(0, len(OTHERS), 2)
    some = OTHERS[first : first + 2]
    return Planted(" ".join(rng.choice(some) for _ in range(12)), "another language")


def no_prose(text: str, rng: random.Random) -> Planted:
    """English, but a list, lines that break off, or one sentence again and again."""
    sentences = world.sentences(text)
    kinds = (
        lambda: "\n".join(f"- {sentence}" for sentence in sentences),
        lambda: "\n".join(f"{sentence.rstrip('.')} ..." for sentence in sentences),
        lambda: " ".join([rng.choice(sentences)] * 40),
    )
    return Planted(rng.choice(kinds)(), "no prose")


def copy(text: str, rng: random.Random) -> Planted:
    """The same, but for case and white space."""
    return Planted(rng.choice((text, text.upper(), text.replace(" ", "  "))), "copy")


def near_copy(text: str, rng: random.Random) -> Planted:
    """Two words of the whole are others."""
    words = text.split(" ")
    for _ in range(2):
        words[rng.randrange(len(words))] = rng.choice(("perhaps", "suddenly", "indeed"))
    return Planted(" ".join(words), "near-copy")


def footer(text: str, rng: random.Random) -> Planted:
    """A line that stands under many."""
    line = rng.choice(FOOTERS)
    return Planted(f"{text}\n{line}", "footer", (line,))


def private(text: str, rng: random.Random) -> Planted:
    """Addresses and numbers from ranges that are nobody's, but look like somebody's."""
    name = rng.choice(world.NAMES).lower()
    found = (
        f"{name}.{rng.randrange(1000)}@mail.example.org",
        f"+1 202-555-01{rng.randrange(100):02}",
        card(f"411111{rng.randrange(10**9):09}"),
        f"8.8.{rng.randrange(1, 255)}.{rng.randrange(1, 255)}",
    )
    marks = tuple(rng.sample(found, 2))
    sentences = world.sentences(text)
    for mark in marks:
        said = rng.choice((f"Write to {mark} for more.", f"The note said {mark} in small letters."))
        sentences.insert(rng.randrange(1, len(sentences)), said)
    return Planted(" ".join(sentences), "private", marks)


def card(digits: str) -> str:
    """A card's number: the last digit makes the sum right (ISO/IEC 7812-1)."""
    number = digits + next(last for last in "0123456789" if luhn(digits + last))
    return " ".join(number[i : i + 4] for i in range(0, len(number), 4))


# fault -> how it is planted, and the step that is there for it
FAULTS = {
    "another language": (another_language, "language"),
    "no prose": (no_prose, "quality"),
    "copy": (copy, "copies"),
    "near-copy": (near_copy, "near-copies"),
    "footer": (footer, "repeated lines"),
    "private": (private, "privacy"),
}


def documents(count: int, share: float, seed: int) -> list[Planted]:
    """`count` documents of stories, and for each fault a share of them with it, shuffled."""
    told = (story.text for story in world.stories(seed))
    rng = random.Random(generator(seed, "planted").initial_seed())
    found = [Planted("\n".join(islice(told, STORIES)), "") for _ in range(count)]
    for plant, _ in FAULTS.values():
        for _ in range(round(count * share)):
            fresh = "\n".join(islice(told, STORIES))
            source = rng.choice(found[:count]).text if plant in (copy, near_copy) else fresh
            found.append(plant(source, rng))
    first, later = found[:count], found[count:]  # a copy stands behind what it is a copy of
    rng.shuffle(later)
    return first + later


# --- what is found --------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of the faults for one step."""

    step: str
    fault: str
    planted: int
    found: int  # of these
    right: int  # of all that was removed what had to go, whatever its fault
    taken: int  # all that was removed

    @property
    def recall(self) -> float:
        return self.found / max(1, self.planted)

    @property
    def precision(self) -> float:
        return self.right / self.taken if self.taken else 1.0


def cleaned(planted: Sequence[Planted], folder: Path, recipe: str = "web") -> Iterator[Found]:
    """Run each step over what those before it left, and count."""
    store = Store(folder / "documents")
    for number, one in enumerate(planted):
        store.append(Item(Document(one.text, str(number)), 0))
    for name, changes in RECIPES[recipe].items():
        before = {int(item.document.source): item.document.text for item in store}
        store, _ = one_step(store, name, changes)
        after = {int(item.document.source): item.document.text for item in store}
        for fault, (_, step) in FAULTS.items():
            if step == name:
                yield count(name, fault, planted, before, after)


def count(
    step: str, fault: str, planted: Sequence[Planted], before: dict[int, str], after: dict[int, str]
) -> Found:
    """Documents that went; of faults within a document, the places that changed."""
    own = {n for n in before if planted[n].fault == fault}
    if not any(planted[n].marks for n in own):
        gone = before.keys() - after.keys()
        right = sum(bool(planted[n].fault) and not planted[n].marks for n in gone)
        return Found(step, fault, len(own), len(own & gone), right, len(gone))
    there = [(n, mark) for n in sorted(own) for mark in planted[n].marks if mark in before[n]]
    if step == "repeated lines":  # the first of each stays
        lines = [mark for _, mark in there]
        there = [pair for i, pair in enumerate(there) if pair[1] in lines[:i]]
    found = sum(mark not in after.get(n, "") for n, mark in there)
    if step == "privacy":
        taken = sum(len(re.findall(r"<[A-Z0-9]+>", text)) for text in after.values())
    else:
        taken = sum(before[n] != after.get(n) for n in before)
    return Found(step, fault, len(there), found, found, taken)


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Plant faults, clean, and count what was found."""

    count: int = 1000  # documents without a fault
    share: float = 0.1  # of them again with each fault
    seed: int = 0

    def __post_init__(self):
        if self.count < 1 or not 0 < self.share <= 1:
            raise UserError("--count must be at least 1, and --share above 0 and at most 1")
        if not round(self.count * self.share):
            raise UserError(f"of --count {self.count} a --share of {self.share} is none: give more")


def script() -> None:
    config = tyro.cli(Show, description=__doc__)
    with TemporaryDirectory() as folder:
        planted = documents(config.count, config.share, config.seed)
        found = list(cleaned(planted, Path(folder)))
    rows = [
        (f.step, f.fault, f"{f.planted:,}", f"{f.recall:.1%}", f"{f.precision:.1%}") for f in found
    ]
    print(table(("step", "planted", "so often", "recall", "precision"), *rows))
    path = RUNS / "planted.png"
    with picture(path) as (axes,):
        for shift, name, color in ((-0.2, "recall", "#1f4e8c"), (0.2, "precision", "#b5892e")):
            y = [100 * getattr(f, name) for f in found]
            axes.bar([i + shift for i in range(len(found))], y, 0.38, color=color, label=name)
        axes.set(xticks=range(len(found)), ylim=(0, 105), ylabel="%", title="Planted, and found")
        axes.set_xticklabels([f.fault for f in found], rotation=20, ha="right")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.05), ncol=2)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main(script)
