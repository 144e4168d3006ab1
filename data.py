"""From a corpus to batches: read documents, hold some out, make tokens once, pack them into rows.

Idea: documents are chosen for the held-out part by a hash of their text, so that neither their
order nor a document added later moves one across, and copies stay together. Tokens are written once
to memory-mapped shards and found again by a key of corpus and tokenizer. Rows of a fixed length are
packed with whole documents where they fit; no token is lost, repeated or seen across a border.

Without a path the corpus is the prose of Python's own standard library, which lies on every
machine: docstrings, comments, and the language reference behind `help()`.

Run: python data.py                       the corpus, some documents, and how one batch is packed
     python data.py --data.path README.md     the same for other text

Papers: Raffel et al. 2020, on packing (arXiv 1910.10683); Ding et al. 2024, best-fit packing
(arXiv 2404.10830).
"""

import ast
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
import torch
import tyro
from tqdm import tqdm

from objectives import IGNORE, Rows
from run import RUNS, UserError, generator, main, read_json, write_json
from tokenizer import BPE, END_OF_TEXT

CACHE = RUNS / "cache"
SHARD_TOKENS = 1 << 27  # tokens in one file
LAST_TENTH = 0.1  # what is held out of a corpus that is one single document


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    path: str = (
        ""  # file, folder or glob of .txt .md .py .jsonl (also .gz); empty: Python's own prose
    )
    held_out: float = 0.05  # share of the documents never trained on (one document: its last tenth)

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise UserError(f"--data.held-out {self.held_out} must lie between 0 and 1")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text is cut."""

    kind: Literal["bpe", "bytes"] = (
        "bpe"  # merges learnt from the training documents, or plain bytes
    )
    vocab_size: int = 2048  # tokens of a BPE: 256 bytes, the merges, and the end of text
    pattern: Literal["gpt4", "gpt2"] = "gpt4"  # how text is split before merging

    def __post_init__(self):
        if self.vocab_size < 257:
            raise UserError(
                f"--tokenizer.vocab-size {self.vocab_size} is too small: 256 bytes and the end of "
                "text need 257"
            )


class Document(NamedTuple):
    text: str
    source: str


# --- reading documents ----------------------------------------------------------------------------

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
NOT_PROSE = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
SHORTEST = 80  # characters: below that a docstring or comment says little


def python_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not NOT_PROSE & set(p.relative_to(root).parts))
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def standard_library() -> Iterator[Document]:
    """Docstrings, comment blocks and `help()` topics of the running Python, in a fixed order."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for name, text in sorted(topics.items()):
        yield Document(text.strip(), f"pydoc_data.topics[{name!r}]")
    for path in tqdm(python_files(), "reading the standard library", leave=False, disable=None):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        for line, text in sorted(prose(source, tree)):
            if len(text) >= SHORTEST:
                yield Document(text, f"{path.relative_to(root).as_posix()}:{line}")


def prose(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring and of each block of comment lines outside strings."""
    in_string = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            in_string.update(range(node.lineno, node.end_lineno + 1))
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], 1):
        comment = line.strip()
        if comment.startswith("#") and number not in in_string:
            block.append(comment.lstrip("#").removeprefix(" "))
        elif block:
            yield number - len(block), "\n".join(block).strip()
            block = []


def files_of(path: str) -> list[Path]:
    """The files that --data.path names, in a fixed order; UserError if it names none."""

    def known(p: Path) -> bool:
        return os.path.isfile(p) and p.name.lower().removesuffix(".gz").endswith(SUFFIXES)

    def shown(p: Path) -> bool:
        return not any(part.startswith(".") for part in p.relative_to(place).parts)

    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):
        if not known(place):
            raise UserError(
                f"{place}: text files end in {', '.join(SUFFIXES)} (or one of these + .gz)"
            )
        return [place]
    if os.path.isdir(place):
        files = sorted(p for p in place.rglob("*") if known(p) and shown(p))
    else:  # a set, because a pattern with two ** finds a file twice
        files = sorted(p for p in {*map(Path, glob.glob(str(place), recursive=True))} if known(p))
    if not files:
        what = "holds no" if os.path.exists(place) else "is no file or folder and matches no"
        raise UserError(f"--data.path {path} {what} {', '.join(SUFFIXES)} file (or .gz of these)")
    return files


def read_file(path: Path) -> Iterator[Document]:
    """One document a file, or split at <|endoftext|>; in .jsonl one a line, under "text"."""
    text = read_text(path)
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):  # JSON may hold U+2028, for example
            where = f"{path}:{number}"
            if line.strip() and (part := text_field(line, where)).strip():
                yield Document(part, where)
    elif END_OF_TEXT in text:
        for number, part in enumerate(text.split(END_OF_TEXT), 1):
            if part.strip():
                yield Document(part.strip("\r\n"), f"{path}#{number}")
    elif text.strip():
        yield Document(text, str(path))


def read_text(path: Path) -> str:
    """The file as UTF-8 text, or a UserError that says what it is instead."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if b"\0" in data:
        raise UserError(f"{path} is binary, not text: there is a zero byte at {data.index(0)}")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at {error.start} has no "
            "meaning; convert it, for example with iconv -t UTF-8"
        ) from None


def text_field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{where}: each line must be a JSON object with a string "text"') from None


def read_documents(config: DataConfig) -> Iterator[Document]:
    if not config.path:
        yield from standard_library()
    else:
        for path in files_of(config.path):
            yield from read_file(path)


# --- holding out ----------------------------------------------------------------------------------


def held_out(documents: Iterable[Document], share: float) -> np.ndarray:
    """Which documents are held out: those whose text hashes into the lowest `share` of all hashes.

    At least one, and never all: if the hashes leave a side empty, the lowest or highest one goes
    there (only then can a document added later take its place).
    """
    marks = np.array(
        [
            int.from_bytes(hashlib.blake2b(d.text.encode(), digest_size=8).digest(), "big")
            for d in documents
        ],
        dtype=np.uint64,
    )
    held = marks / 2.0**64 < share
    if len(set(marks.tolist())) > 1:
        if not held.any():
            held = marks == marks.min()
        if held.all():
            held = marks != marks.max()
    return held


def split(documents: Iterable[Document], held: np.ndarray) -> Iterator[tuple[Document, bool]]:
    """(document, is it held out). A single document is cut: its last tenth is held out."""
    for document, out in zip(documents, held, strict=True):
        if len(held) > 1:
            yield document, bool(out)
        else:
            cut = int(len(document.text) * (1 - LAST_TENTH))
            yield Document(document.text[:cut], document.source), False
            yield Document(document.text[cut:], document.source), True


# --- token files ----------------------------------------------------------------------------------


class Shards:
    """Documents as tokens in memory-mapped files: <|endoftext|> and the text, one after another.

    document(i) gives its tokens. As inputs they are asked for the next token each, the last one for
    <|endoftext|>, so a document of n tokens is n pairs.
    """

    def __init__(self, folder: Path, name: str):
        offsets = np.fromfile(folder / f"{name}-offsets.int64", np.int64)
        self.starts, self.lengths = offsets[:-1], np.diff(offsets)
        dtype = np.dtype(read_json(folder / "meta.json")["dtype"])
        files = sorted(folder.glob(f"{name}-*.bin"))
        self.files = [np.memmap(path, dtype, "r") for path in files if path.stat().st_size]
        self.borders = np.cumsum([0, *map(len, self.files)])
        if (self.lengths < 1).any() or offsets[0] or offsets[-1] != self.borders[-1]:
            raise ValueError(f"the lengths of the {name} documents do not fit their tokens")

    def __len__(self) -> int:
        return len(self.lengths)

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
        return {
            "documents": len(self.lengths),
            "tokens": sum(self.lengths),
            "bytes": self.bytes,
            "hash": self.hash.hexdigest(),
        }


@dataclass(frozen=True)
class Corpus:
    """Everything training needs of a corpus."""

    tokenizer: BPE
    train: Shards
    held: Shards
    meta: dict = field(repr=False)


def prepare(
    config: DataConfig, cutting: TokenizerConfig, tokenizer: BPE | None = None, cache: Path = CACHE
) -> Corpus:
    """The corpus as tokens, made now or found from before; a tokenizer is trained unless given."""
    marks = identity(config)
    key = hashlib.blake2b(
        json.dumps(
            [marks, asdict(cutting) if tokenizer is None else tokenizer.fingerprint]
        ).encode(),
        digest_size=8,
    ).hexdigest()
    folder = cache / key
    if not (folder / "meta.json").is_file():
        make(folder, lambda out: tokenize(config, cutting, tokenizer, out))
    try:
        tokenizer = BPE.load(folder / "tokenizer.json")
        train, held = Shards(folder, "train"), Shards(folder, "held")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"the token files in {folder} are damaged, delete them: {error}") from None
    return Corpus(tokenizer, train, held, read_json(folder / "meta.json"))


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder: it appears whole or not at all, though several processes do so."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(".draft", f".{folder.name}.", folder.parent) as draft:
            out = Path(draft, "tokens")
            out.mkdir()
            write(out)
            if not (folder / "meta.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                out.rename(folder)
    except OSError as error:
        if not (folder / "meta.json").is_file():  # else another process was faster
            raise UserError(f"cannot write the token files in {folder}: {error}") from None


def identity(config: DataConfig) -> list:
    """What a corpus is known by: its files' names, sizes and times, and how it is split."""
    files = files_of(config.path) if config.path else python_files()
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    own = [] if config.path else [sys.version, SHORTEST]
    return [config.held_out, LAST_TENTH, stats, own]


def tokenize(
    config: DataConfig, cutting: TokenizerConfig, tokenizer: BPE | None, out: Path
) -> None:
    """Read, hold out, train the tokenizer on what is left, write tokens and a description."""
    again = (lambda: read_documents(config)) if config.path else list(standard_library()).__iter__
    held = held_out(again(), config.held_out)
    if not len(held):
        raise UserError(f"there is no text in {config.path}: every file is empty")
    if len(held) > 1 and held.all() == held.any():
        raise UserError(
            f"{config.path} holds {len(held)} copies of one document, so that none can be held "
            "out: give more text, or only one copy"
        )
    if tokenizer is None:
        tokenizer = make_tokenizer(
            (d.text for d, out_ in split(again(), held) if not out_), cutting
        )
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = [ShardWriter(out, name, dtype, tokenizer.end_of_text) for name in ("train", "held")]
    press, squeezed = lzma.LZMACompressor(), 0
    fast = tokenizer.to_tiktoken()
    parts = split(tqdm(again(), "tokens", len(held), leave=False, disable=None, unit="doc"), held)
    while batch := list(islice(parts, 512)):
        ids = encode(tokenizer, fast, [document.text for document, _ in batch])
        for (document, is_held), tokens in zip(batch, ids, strict=True):
            data = document.text.encode()
            writers[is_held].write(tokens, len(data))
            squeezed += len(press.compress(data)) if is_held else 0
    squeezed += len(press.flush())
    train, validation = (writer.close() for writer in writers)
    tokenizer.save(out / "tokenizer.json")
    write_json(
        out / "meta.json",
        {
            "source": config.path or f"prose of Python {sys.version.split()[0]}'s standard library",
            "dtype": dtype.name,
            "train": train,
            "held": validation,
            "lzma_bits_per_byte": 8 * squeezed / max(1, validation["bytes"]),
        },
    )


def encode(tokenizer: BPE, fast: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    """Ids of texts, in which nothing is special; tiktoken gives up on a million blanks in a row."""
    try:
        return fast.encode_batch(texts, num_threads=2, disallowed_special=())
    except ValueError:
        return [*tokenizer.encode_batch(texts)]


def make_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> BPE:
    if config.kind == "bytes":
        return BPE.bytes()
    return BPE.train(texts, config.vocab_size, config.pattern, progress=True)


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
    """Endless batches of packed rows, each epoch cut, packed and shuffled anew from (seed, epoch).

    Its place is two numbers, `epoch` and `row`, which a checkpoint keeps.
    """

    def __init__(self, shards: Shards, T: int, end_of_text: int, seed: int):
        self.shards, self.T, self.end_of_text, self.seed = shards, T, end_of_text, seed
        if (pairs := int(shards.lengths.sum())) <= T:
            raise UserError(
                f"the training part of the corpus has {pairs} tokens, less than one window of "
                f"--model.context {T}: give more text, or a smaller context"
            )
        self.seek(0, 0)

    def seek(self, epoch: int, row: int) -> None:
        self.epoch, self.row = epoch, row
        seed = generator(self.seed, "data", epoch).initial_seed()
        rng = np.random.default_rng(seed)
        pieces = cut(self.shards.lengths, self.T, rng)
        rng.shuffle(pieces)  # equal lengths meet in another order each epoch
        self.rows = best_fit(pieces, self.T)
        rng.shuffle(self.rows)

    def take(self, B: int) -> Rows:
        """The next B rows."""
        rows: list[list[Piece]] = []
        while len(rows) < B:
            if self.row >= len(self.rows):
                self.seek(self.epoch + 1, 0)
            new = self.rows[self.row : self.row + B - len(rows)]
            rows += new
            self.row += len(new)
        return fill(rows, self.shards, self.T, self.end_of_text)


def whole(shards: Shards, T: int, B: int, end_of_text: int) -> Iterator[Rows]:
    """Every pair of every document once, in batches of B rows, always the same: for evaluation.

    A document is cut every T pairs; with the document mask its loss does not depend on neighbours.
    """
    rows = best_fit(cut(shards.lengths, T, None), T)
    for i in range(0, len(rows), B):
        yield fill(rows[i : i + B], shards, T, end_of_text)


# --- demo -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Show a corpus: its size, a few documents, and how a batch is packed."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    context: int = 64  # tokens in a row


def show() -> None:
    config = tyro.cli(Show)
    corpus = prepare(config.data, config.tokenizer)
    meta, tokenizer = corpus.meta, corpus.tokenizer
    print(f"\n{meta['source']}")
    for name in ("train", "held"):
        print(f"  {name:5} {meta[name]['documents']:>7,} documents {meta[name]['bytes']:>12,} "
              f"bytes {meta[name]['tokens']:>12,} tokens")  # fmt: skip
    for i in range(0, len(corpus.held), max(1, len(corpus.held) // 3)):
        text = tokenizer.decode(corpus.held.document(i)[1:61].tolist())
        print(f"\n  held out, document {i}: {' '.join(text.split())} …")
    stream = Stream(corpus.train, config.context, tokenizer.end_of_text, 0)
    rows = stream.take(6)
    print(f"\nsix rows of {config.context} tokens; a letter is a document, a dot is padding:")
    for starts, nexts in zip(rows.starts.tolist(), rows.nexts.tolist(), strict=True):
        letters = {s: chr(97 + n % 26) for n, s in enumerate(dict.fromkeys(starts))}
        print("  " + "".join("." if n == IGNORE else letters[s]
                             for s, n in zip(starts, nexts, strict=True)))  # fmt: skip
    pairs = sum(piece.length for row in stream.rows for piece in row)
    full = pairs / len(stream.rows) / config.context
    print(f"\nan epoch is {len(stream.rows):,} rows, {full:.1%} full")


if __name__ == "__main__":
    main(show)
