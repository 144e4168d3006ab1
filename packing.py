"""Tokens in files, and rows of a fixed length packed from them.

Idea: documents become tokens once, in memory-mapped shards. A row is packed with whole documents
where they fit, the longest first, each into the fullest row with room for it; no token is lost,
repeated or seen across a border. An epoch is cut, packed and shuffled from (seed, epoch) alone, so
that a place in it is two numbers. Of several sources each is packed alone, and their rows alternate
in fixed proportions.

Run: python -m pytest tests/test_data.py

Papers: Raffel et al. 2020, on packing (arXiv 1910.10683); Ding et al. 2024, best-fit packing
(arXiv 2404.10830).
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from objectives import IGNORE, Rows
from run import UserError, generator

SHARD_TOKENS = 1 << 27  # tokens in one file

# --- token files ----------------------------------------------------------------------------------


class Shards:
    """Documents as tokens in memory-mapped files: <|endoftext|> and the text, one after another.

    document(i) gives its tokens. As inputs they are asked for the next token each, the last one for
    <|endoftext|>, so a document of n tokens is n pairs. ValueError if a bit is not as written.
    """

    def __init__(self, folder: Path, name: str, meta: dict):
        """meta: what its writer said of it on closing, and the dtype."""
        self.folder = folder
        offsets = np.fromfile(folder / f"{name}-offsets.int64", np.int64)
        self.starts, self.lengths = offsets[:-1], np.diff(offsets)
        files = sorted(folder.glob(f"{name}-*.bin"))
        tokens = [np.memmap(path, meta["dtype"], "r") for path in files if path.stat().st_size]
        self.files, self.borders = tokens, np.cumsum([0, *map(len, tokens)])
        found = hashlib.blake2b(digest_size=8)
        for part in (*tokens, offsets):
            found.update(part)
        if found.hexdigest() != meta["hash"]:
            raise ValueError(f"the tokens of {name} are not what was written")

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, n: int) -> "Shards":
        """Its first n documents alone."""
        part = copy.copy(self)
        part.starts, part.lengths = self.starts[:n], self.lengths[:n]
        return part

    def document(self, i: int) -> np.ndarray:
        shard = int(np.searchsorted(self.borders, self.starts[i], "right")) - 1
        start = int(self.starts[i] - self.borders[shard])
        return self.files[shard][start : start + int(self.lengths[i])]


class ShardWriter:
    """Writes what `Shards` reads; a document never crosses from one file to the next."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, end_of_text: int):
        self.folder, self.name, self.dtype, self.end_of_text = folder, name, dtype, end_of_text
        self.lengths: list[int] = []
        self.number, self.filled, self.bytes = 0, 0, 0
        self.hash = hashlib.blake2b(digest_size=8)
        self.file = open(self.path(), "wb")  # noqa: SIM115 closed by close()

    def path(self) -> Path:
        return self.folder / f"{self.name}-{self.number:05d}.bin"

    def write(self, ids: list[int], size: int) -> None:
        if self.filled and self.filled + len(ids) >= SHARD_TOKENS:
            self.file.close()
            self.number, self.filled = self.number + 1, 0
            self.file = open(self.path(), "wb")  # noqa: SIM115
        data = np.array([self.end_of_text, *ids], self.dtype).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.lengths.append(len(ids) + 1)
        self.filled += len(ids) + 1
        self.bytes += size

    def close(self) -> dict:
        self.file.close()
        offsets = np.cumsum([0, *self.lengths], dtype=np.int64)
        offsets.tofile(self.folder / f"{self.name}-offsets.int64")
        self.hash.update(offsets)
        return {
            "documents": len(self.lengths),
            "tokens": sum(self.lengths),
            "bytes": self.bytes,
            "hash": self.hash.hexdigest(),
        }


class Part(NamedTuple):
    """Neighbours among the documents, and how often they are to be seen beside others."""

    name: str
    first: int
    documents: int
    weight: float


# --- packing --------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Pairs begin … begin + length − 1 of a document."""

    document: int
    begin: int
    length: int


def cut(lengths: np.ndarray, T: int, rng: np.random.Generator | None) -> list[Piece]:
    """Documents in pieces of at most T pairs; with rng, a long one is cut elsewhere each time."""
    pieces = []
    for i, length in enumerate(lengths.tolist()):
        begin = 0
        if length > T and rng is not None and (first := int(rng.integers(T))):
            pieces.append(Piece(i, 0, first))
            begin = first
        pieces += [Piece(i, b, min(T, length - b)) for b in range(begin, length, T)]
    return pieces


def best_fit(pieces: list[Piece], T: int) -> list[list[Piece]]:
    """Rows of at most T pairs: the longest piece first, each into the fullest row with room for it.

    `free[n]` are the rows with n places left; bit n of `some` says whether there are any.
    """
    rows: list[list[Piece]] = []
    free: list[list[int]] = [[] for _ in range(T + 1)]
    some = 0
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        room = some >> piece.length
        if room:
            left = piece.length + (room & -room).bit_length() - 1
            row = free[left].pop()
            if not free[left]:
                some &= ~(1 << left)
        else:
            left, row = T, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := left - piece.length:
            free[left].append(row)
            some |= 1 << left
    return rows


def packed(lengths: np.ndarray, T: int, rng: np.random.Generator) -> list[list[Piece]]:
    """Rows of whole documents where they fit."""
    pieces = cut(lengths, T, rng)
    rng.shuffle(pieces)  # equal lengths meet in another order each epoch
    return best_fit(pieces, T)


def plain(lengths: np.ndarray, T: int, rng: np.random.Generator) -> list[list[Piece]]:
    """Documents one behind another, cut every T pairs; only first and last row may have a gap."""
    rows: list[list[Piece]] = [[]]
    room = int(rng.integers(1, T + 1))  # of the first row, so that borders fall elsewhere each time
    for i in rng.permutation(len(lengths)).tolist():
        begin = 0
        while left := int(lengths[i]) - begin:
            if not room:
                rows.append([])
                room = T
            length = min(left, room)
            rows[-1].append(Piece(i, begin, length))
            begin, room = begin + length, room - length
    return rows


PACKINGS = {"best_fit": packed, "plain": plain}


def fill(rows: list[list[Piece]], shards: Shards, T: int, end_of_text: int) -> Rows:
    """The tokens of packed rows."""
    ids = np.full((len(rows), T), end_of_text, np.int64)
    nexts = np.full((len(rows), T), IGNORE, np.int64)
    starts = np.tile(np.arange(T), (len(rows), 1))
    for b, row in enumerate(rows):
        at = 0
        for i, begin, length in row:
            tokens, here = shards.document(i), slice(at, at + length)
            ids[b, here] = tokens[begin : begin + length]
            following = tokens[begin + 1 : begin + length + 1]
            nexts[b, at : at + len(following)] = following
            if begin + length == len(tokens):
                nexts[b, at + length - 1] = end_of_text
            starts[b, here] = at
            at += length
    return Rows(*map(torch.from_numpy, (ids, nexts, starts)))


class Stream:
    """Endless packed rows of some documents, each epoch cut, packed and shuffled anew.

    An epoch is made from (seed, name, epoch) alone; its place in it is the number of a row.
    """

    def __init__(
        self, lengths: np.ndarray, first: int, T: int, seed: int, name: str = "data",
        packing: str = "best_fit",
    ):  # fmt: skip
        """lengths: of the documents first, first + 1, …"""
        self.lengths, self.first, self.T, self.seed, self.name = lengths, first, T, seed, name
        self.pack = PACKINGS[packing]
        self.seek(0, 0)

    def seek(self, epoch: int, row: int) -> None:
        self.epoch, self.row = epoch, row
        rng = np.random.default_rng(generator(self.seed, self.name, epoch).initial_seed())
        self.rows = self.pack(self.lengths, self.T, rng)
        rng.shuffle(self.rows)

    def __next__(self) -> list[Piece]:
        while self.row >= len(self.rows):
            self.seek(self.epoch + 1, 0)
        self.row += 1
        return [p._replace(document=p.document + self.first) for p in self.rows[self.row - 1]]


class Mixture:
    """Endless batches of rows, drawn from streams in fixed proportions: after n rows stream k gave
    about w_k·n of them.

    The next row is always that of the stream which lags behind most, so that nothing is random and
    the place is three numbers for each stream: epoch, row, rows given in all.
    """

    def __init__(
        self, shards: Shards, T: int, end_of_text: int, seed: int, parts: Sequence[Part] = (),
        packing: str = "best_fit",
    ):  # fmt: skip
        """parts: without any, all documents as they come; packing: a name in PACKINGS."""
        self.shards, self.T, self.end_of_text = shards, T, end_of_text
        parts = [p for p in parts or [Part("data", 0, len(shards), 1.0)] if p.weight > 0]
        self.streams = []
        for part in parts:
            lengths = shards.lengths[part.first : part.first + part.documents]
            if (pairs := int(lengths.sum())) <= T:
                raise UserError(
                    f"the training part of the {part.name} has {pairs} tokens, less than one window"
                    f" of --model.context {T}: give more text, or a smaller context"
                )
            self.streams.append(Stream(lengths, part.first, T, seed, part.name, packing))
        total = sum(part.weight for part in parts)
        self.weights = [part.weight / total for part in parts]
        self.given = [0] * len(parts)

    @property
    def place(self) -> list[list[int]]:
        return [[s.epoch, s.row, n] for s, n in zip(self.streams, self.given, strict=True)]

    def seek(self, place: list[list[int]]) -> None:
        for k, (stream, (epoch, row, given)) in enumerate(zip(self.streams, place, strict=True)):
            stream.seek(epoch, row)
            self.given[k] = given

    def knows(self, place: object) -> bool:
        """Whether this, which stood in a file, can be a place of this mixture."""
        return (
            isinstance(place, list)
            and len(place) == len(self.streams)
            and all(isinstance(numbers, list) and len(numbers) == 3 for numbers in place)
            and all(type(n) is int and 0 <= n < 1 << 53 for numbers in place for n in numbers)
        )

    @property
    def epochs(self) -> dict[str, float]:
        """How often the documents of each part were seen."""
        return {s.name: s.epoch + s.row / len(s.rows) for s in self.streams}

    def take(self, B: int) -> Rows:
        """The next B rows."""
        return fill([self.next_row() for _ in range(B)], self.shards, self.T, self.end_of_text)

    def next_row(self) -> list[Piece]:
        n = sum(self.given) + 1
        lag = [w * n - given for w, given in zip(self.weights, self.given, strict=True)]
        k = lag.index(max(lag))
        self.given[k] += 1
        return next(self.streams[k])


def whole(shards: Shards, T: int, B: int, end_of_text: int) -> Iterator[Rows]:
    """Every pair of every document once, in batches of B rows, always the same: for evaluation.

    A document is cut every T pairs; with the document mask its loss does not depend on neighbours.
    """
    rows = best_fit(cut(shards.lengths, T, None), T)
    for i in range(0, len(rows), B):
        yield fill(rows[i : i + B], shards, T, end_of_text)
