"""From documents to text worth training on: steps, each of which says what it dropped, and why.

Idea: what is left after a step is counted, what is dropped has a named reason, and one example of
each reason is kept for the reader. Documents wait in a file, so that a corpus may be larger than
memory. So far there is one step, reading.

Run: python -m pytest tests/test_data.py
"""

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from documents import Document, Problem
from run import UserError

EXCERPT = 120  # characters of an example


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
        start, end = self.starts[i : i + 2]
        document, source = json.loads(os.pread(self.file.fileno(), end - start, start))
        return Item(Document(*document), source)

    @property
    def texts(self) -> "Texts":
        return Texts(self)


class Texts(Sequence[str]):
    """The texts of a store."""

    def __init__(self, store: Store):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: int) -> str:
        return self.store[i].document.text


# --- the steps ------------------------------------------------------------------------------------


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
