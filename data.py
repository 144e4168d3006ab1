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

import hashlib
import json
import lzma
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from documents import (
    SHORTEST,
    Document,
    files_of,
    python_files,
    read_file,
    standard_library,
)
from objectives import IGNORE
from packing import Shards, ShardWriter, Stream
from run import RUNS, UserError, main, read_json, write_json
from tokenizer import BPE

CACHE = RUNS / "cache"
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


# --- reading documents ---------------------------------------------------------------------------


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


# --- tokens ---------------------------------------------------------------------------------------


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
