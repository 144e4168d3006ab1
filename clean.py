"""From documents to text worth training on: steps, each of which says what it dropped, and why.

Idea: most of what a crawl or a disk holds teaches little, or teaches the same thing again, or is
somebody's private matter. A step is one function from the texts of a corpus to what each of them
becomes, or None, and the reasons:

    quality -> copies -> near_copies -> repeated sentences and lines -> privacy

What is left after each is counted, what is dropped has a named reason, and one example of each
reason is kept for the reader. Documents wait in a file and steps hold at most some hashes of each,
so that a corpus may be larger than memory; the result depends on the documents and their order
alone, not on the number of processes.

Run: python data.py                      all steps on Python's own prose, as a table and a figure
     python -m pytest tests/test_clean.py

Papers: Rae et al. 2021, section A.1 (arXiv 2112.11446); Raffel et al. 2020, section 2.2 (arXiv
1910.10683); Penedo et al. 2024 (arXiv 2406.17557); Lee et al. 2022 (arXiv 2107.06499).
"""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dedup import Interval, clusters, first_copies, removed, repeated_lines, repeated_spans
from dedup import text_hashes as hashes_of
from documents import SHORTEST, Document, Problem
from processes import in_processes
from quality import Verdict, c4_keeps, check, clean_c4, language
from redact import redact
from run import UserError

EXCERPT = 120  # characters of an example
SURE = 0.65  # that a text is English


class Item(NamedTuple):
    """A document on its way, and the number of its source."""

    document: Document
    source: int


# --- what happened --------------------------------------------------------------------------------


@dataclass
class Step:
    """What a step left, and what it dropped: documents, or parts of them, by reason."""

    name: str
    documents: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> source, excerpt

    def keep(self, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode())

    def drop(self, reason: str, source: str, text: str, times: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + times
        excerpt = " ".join(text[: 4 * EXCERPT].split())[:EXCERPT]
        self.examples.setdefault(reason, [source, excerpt])


# --- documents that need not fit into memory ------------------------------------------------------


class Store(Sequence[Item]):
    """Items in a file, of which any can be read again, also by several processes at once."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "w+b")  # noqa: SIM115 it lives as long as this
        self.starts = array("q", [0])

    def append(self, item: Item) -> None:
        self.file.write(line := json.dumps(item).encode())
        self.starts.append(self.starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> Item:
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.file.flush()
        start, end = self.starts[i], self.starts[i + 1]
        document, source = json.loads(os.pread(self.file.fileno(), end - start, start))
        return Item(Document(*document), source)

    @property
    def texts(self) -> "Texts":
        return Texts(self, range(len(self)))

    def remove(self) -> None:
        self.file.close()
        self.path.unlink()


class Texts(Sequence[str]):
    """The texts of some items of a store."""

    def __init__(self, store: Store, which: Sequence[int]):
        self.store, self.which = store, which

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i: int) -> str:
        return self.store[int(self.which[i])].document.text


def gather(found: Iterable[tuple[Document | Problem, int]], store: Store, strict: bool) -> Step:
    """Into the store what holds a text; what cannot be read is a UserError if strict."""
    step = Step("read")
    for thing, source in found:
        if isinstance(thing, Problem):
            if strict:
                raise UserError(thing.sentence)
            step.drop("cannot be read", thing.sentence, "")
        elif not thing.text.strip():
            step.drop("empty", thing.source, "")
        else:
            step.keep(thing.text)
            store.append(Item(thing, source))
    return step


# --- the steps ------------------------------------------------------------------------------------


class Change(NamedTuple):
    """What becomes of a text, None if it is dropped; reason -> how often, and an example."""

    text: str | None
    reasons: dict[str, tuple[int, str]] = {}  # noqa: RUF012 never written to


Changes = Callable[[Texts], Iterator[Change]]  # one for each text, in order


def in_groups(change: Callable[[str], Change]) -> Changes:
    """A step that looks at each text alone, in several processes."""

    def changes(texts: Texts) -> Iterator[Change]:
        for group in in_processes(lambda group: [*map(change, group)], texts):
            yield from group

    return changes


def quality(preset: str) -> Changes:
    """What fails a rule of quality.PRESETS goes; of web pages first the lines that C4 drops."""

    def change(text: str) -> Change:
        left, reasons = without_lines(text) if preset == "web" else Change(text)
        verdict = check(left, preset)
        if verdict.kept:
            return Change(left, reasons)
        why = {verdict.rule: (1, f"{told(verdict)}: {text[:EXCERPT]}")}
        return Change(None, reasons | why)

    return in_groups(change)


def without_lines(text: str) -> Change:
    """The lines that C4 keeps, but for its rule of how they end, as FineWeb has it."""
    lines = filter(str.strip, text.split("\n"))
    gone = [line for line in lines if not c4_keeps(line, terminal=False)]
    reasons = {"line that C4 drops": (len(gone), gone[0])} if gone else {}
    return Change(clean_c4(text, terminal=False), reasons)


def english(text: str) -> Change:
    """What is hardly English goes (Penedo et al. 2024, section 3.3: 0.65)."""
    label, sure = language(text)
    if label == "en" and sure >= SURE:
        return Change(text)
    return Change(None, {f"language {label}": (1, f"{sure:.2f} sure: {text[:EXCERPT]}")})


def told(verdict: Verdict) -> str:
    sign = "<" if verdict.value < verdict.bound else ">"
    return f"{verdict.value:.3g} {sign} {verdict.bound:g}"


def copies(texts: Texts) -> Iterator[Change]:
    """The first of texts that are equal but for case and white space stays."""
    return firsts(texts, first_copies(hashes_of(texts)), "copy")


def near_copies(texts: Texts) -> Iterator[Change]:
    """The first of texts that share 70 % of their runs of five words stays."""
    return firsts(texts, clusters(texts), "near-copy")


def firsts(texts: Texts, first: Sequence[int], reason: str) -> Iterator[Change]:
    for i, text in enumerate(texts):
        yield Change(text) if first[i] == i else Change(None, {reason: (1, text)})


def passages(find: Callable[[Texts], Iterator[list[Interval]]], reason: str) -> Changes:
    """The intervals that `find` names go, and texts of which little is left."""

    def changes(texts: Texts) -> Iterator[Change]:
        for text, intervals in zip(texts, find(texts), strict=True):
            if not intervals:
                yield Change(text)
                continue
            left = removed(text, intervals).strip()
            start, end = intervals[0]
            reasons = {reason: (len(intervals), text[start:end])}
            if len(left) < SHORTEST:
                reasons["little was left"] = (1, text)
            yield Change(left if len(left) >= SHORTEST else None, reasons)

    return changes


def private(text: str) -> Change:
    """What is somebody's is replaced by its kind, which is also all that an example shows."""
    clean, counts = redact(text)
    shown = {k: (n, clean[max(0, clean.find(f"<{k}>") - 60) :]) for k, n in counts.items()}
    return Change(clean, shown)


COMMON: dict[str, Changes] = {
    "copies": copies,
    "near-copies": near_copies,
    "repeated sentences": passages(repeated_spans, "three sentences seen before"),
    "repeated lines": passages(repeated_lines, "line seen before"),
    "privacy": in_groups(private),
}
RECIPES: dict[str, dict[str, Changes]] = {
    "none": {},
    "docs": {"quality": quality("docs"), **COMMON},
    "web": {"language": in_groups(english), "quality": quality("web"), **COMMON},
}


def clean(store: Store, recipe: str) -> tuple[Store, list[Step]]:
    """The store that the steps of a recipe leave, and what they did; the given one is removed."""
    steps = []
    for name, changes in RECIPES[recipe].items():
        store, step = one_step(store, name, changes)
        steps.append(step)
    return store, steps


def one_step(store: Store, name: str, changes: Changes) -> tuple[Store, Step]:
    """What a step leaves of a store, which is removed, and what it did."""
    left, step = Store(store.path.with_name(name)), Step(name)
    bar = tqdm(store, name, leave=False, disable=None, unit="doc")
    for item, (text, reasons) in zip(bar, changes(store.texts), strict=True):
        document = item.document
        for reason, (times, example) in reasons.items():
            step.drop(reason, document.source, example, times)
        if text is not None and text.strip():
            step.keep(text)
            left.append(item._replace(document=document._replace(text=text)))
    store.remove()
    return left, step
