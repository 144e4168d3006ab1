"""From a corpus to batches: read and clean documents, hold some out, make tokens once, pack rows.

Idea: documents are chosen for the held-out part by a hash of their text, so that neither their
order nor a document added later moves one across, and copies stay together. Tokens are written once
to memory-mapped shards and found again by a key of corpus and tokenizer. Rows of a fixed length are
packed with whole documents where they fit; no token is lost, repeated or seen across a border.

Without a path the corpus is the prose of Python's own standard library, which lies on every
machine: docstrings, comments, and the language reference behind `help()`.

Run: python data.py                       what each step leaves, and how one batch is packed
     python data.py --data.path README.md     the same for other text

Papers: Raffel et al. 2020, on packing (arXiv 1910.10683); Ding et al. 2024, best-fit packing
(arXiv 2404.10830).
"""

import hashlib
import json
import lzma
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import chat
import clean
import wordpiece
from bpe import BPE
from clean import Item, Step, Store, Texts, gather
from dedup import SPLIT, clusters, first_copies, shared_spans, split_by_cluster, text_hashes
from documents import HERE, Document, Problem, files_of, python_files, read
from objectives import IGNORE
from packing import Mixture, Part, Shards, ShardWriter
from pictures import picture
from run import RUNS, UserError, main, read_sealed, write_sealed
from tokenizer import KINDS, load
from vocabulary import END_OF_TEXT, Tokenizer

# What these modules do decides what the token files hold.
MADE_BY = (
    "bpe", "chat", "clean", "data", "dedup", "documents", "merges", "packing", "pieces",
    "processes", "quality", "redact", "sentencepiece_files", "tasks", "tokenizer_files", "unigram",
    "unigram_learning", "vocabulary", "wordpiece", "world",
)  # fmt: skip
CACHE = RUNS / "cache"
FIXED = {"wordpiece": wordpiece.SPECIAL}  # special tokens that a kind always has
LAST_TENTH = 0.1  # what is held out of a corpus that is one single document


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and what becomes of it before it is trained on."""

    # file, folder or glob of .txt .md .py .jsonl (also .gz); empty: Python's own prose
    path: str = ""
    # those of path; world: stories that world.py writes, in which all can be checked
    source: Literal["files", "world"] = "files"
    # of files; chat: conversations in .json, .jsonl or .csv, for --objective chat
    form: Literal["text", "chat"] = "text"
    mix: tuple[str, ...] = ()  # instead of path, several sources: name=path or name=path@weight
    temperature: float = 1.0  # of weights not given: min(tokens, cap)^(1/temperature) (T5, 3.5.2)
    cap: int = 0  # tokens up to which a source counts; 0: all
    strict: bool = False  # stop at the first line or file that cannot be read
    # steps before training, with rules for documentation or web pages; auto: docs for Python's own
    # prose, none for text of yours
    clean: Literal["auto", "none", "docs", "web"] = "auto"
    # whole documents in a row where they fit, or one behind another, cut anywhere
    packing: Literal["best_fit", "plain"] = "best_fit"
    held_out: float = 0.05  # share of the documents never trained on (one document: its last tenth)

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise UserError(f"--data.held-out {self.held_out} must lie between 0 and 1")
        if not self.temperature > 0:
            raise UserError(f"--data.temperature {self.temperature} must be above 0")
        if self.cap < 0:
            raise UserError(f"--data.cap {self.cap} must be at least 0")
        if self.source == "world" and (self.path or self.mix or self.form == "chat"):
            raise UserError("--data.source world needs no --data.path, --data.mix or --data.form")
        if self.mix and self.path:
            raise UserError("--data.path and --data.mix both name the text: give one of them")
        if self.form == "chat" and self.clean in ("docs", "web"):
            raise UserError(
                f"--data.clean {self.clean} is for texts, and would not reach what is said in a "
                "conversation: leave it out with --data.form chat, and clean the files before"
            )
        sources_of(self)


@dataclass(frozen=True)
class TokenizerConfig:
    """How text is cut."""

    # what is learnt from the training documents, or plain bytes; wordpiece loses case
    kind: Literal["bpe", "wordpiece", "unigram", "characters", "bytes"] = "bpe"
    vocab_size: int = 2048  # tokens of all but bytes: those that are fixed, and what is learnt
    pattern: Literal["gpt4", "gpt2"] = "gpt4"  # how bpe splits text before merging

    def __post_init__(self):
        if self.vocab_size < 257 and self.kind not in ("wordpiece", "unigram"):
            raise UserError(
                f"--tokenizer.vocab-size {self.vocab_size} is too small: 256 bytes and the end of "
                "text need 257"
            )


# --- sources --------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Documents with a name, and how often they are to be seen beside others."""

    name: str
    path: str  # as --data.path
    weight: float | None  # None: by size


def sources_of(config: DataConfig) -> list[Source]:
    """The sources that the settings name; UserError where they cannot be mixed."""
    if not config.mix:
        return [Source("corpus", "world:" if config.source == "world" else config.path, 1.0)]
    sources = [source_of(text) for text in config.mix]
    names, weights = [s.name for s in sources], [s.weight for s in sources]
    if len(set(names)) < len(names):
        raise UserError(f"--data.mix names a source twice: {', '.join(names)}")
    if any(w is None for w in weights) != all(w is None for w in weights):
        raise UserError("--data.mix: give each source a weight, as in name=path@2, or none")
    if None not in weights and not sum(weights) > 0:
        raise UserError("--data.mix: the weights sum to nothing")
    return sources


def source_of(text: str) -> Source:
    """name=path, name=path@weight, or name= for Python's own prose."""
    name, equals, path = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--data.mix {text!r} must be a name, =, and a path, as in books=books/")
    path, at, number = path.rpartition("@") if "@" in path else (path, "", "")
    try:
        weight = float(number) if at else None
    except ValueError:  # a path with an @
        path, weight = f"{path}@{number}", None
    if weight is not None and not 0 <= weight < math.inf:
        raise UserError(f"--data.mix {text!r}: a weight is a number from 0 on")
    return Source(name, path, weight)


def recipe_of(config: DataConfig) -> str:
    if config.clean != "auto":
        return config.clean
    return "none" if config.path or config.mix or config.source == "world" else "docs"


def read_all(config: DataConfig) -> Iterator[tuple[Document | Problem, int]]:
    """All that the sources hold, one after another, with the number of the source."""
    for number, source in enumerate(sources_of(config)):
        for found in read(source.path, config.form):
            yield found, number


# --- holding out ----------------------------------------------------------------------------------


def held_out(clusters: np.ndarray, hashes: np.ndarray, share: float) -> np.ndarray:
    """Which texts are held out: whole clusters, whose first hashes into the lowest `share` of all.

    At least one, and never all: if the hashes leave a side empty, the lowest or highest one goes
    there (only then can a text added later take its place).
    """
    held, marks = split_by_cluster(clusters, hashes, share), hashes[clusters]
    if len(set(marks.tolist())) > 1:
        if not held.any():
            held = marks == marks.min()
        if held.all():
            held = marks != marks.max()
    return held


def divide(store: Store, config: DataConfig) -> tuple[Store, np.ndarray, list[Step]]:
    """Which documents are held out, and what had to go so that none of them is known already.

    Of texts that were cleaned those that share half of their runs of five words lie on one side,
    and a text held out that shares a run of 13 words with training texts goes, unless all that are
    held out do: then they stay, which is said.
    """
    texts, cleaned = store.texts, recipe_of(config) != "none"
    hashes = text_hashes(texts)
    held = held_out(clusters(texts, SPLIT) if cleaned else first_copies(hashes), hashes,
                    config.held_out)  # fmt: skip
    if not cleaned or held.all() == held.any():
        return store, held, []
    train, test = (Texts(store, np.flatnonzero(side)) for side in (~held, held))
    leaks = set(test.which[shared_spans(train, test) > 0].tolist())
    step, left = Step("leak check"), Store(store.path.with_name("divided"))
    if len(leaks) == len(test):
        print(f"all {len(test):,} documents held out share 13 words in a row with some trained on: "
              "they stay, for else none would, and their loss is too low")  # fmt: skip
        leaks = set()
    for i, item in enumerate(tqdm(store, "leak check", leave=False, disable=None, unit="doc")):
        if i in leaks:
            step.drop("held out, but 13 words in a row are trained on", item.document.source,
                      item.document.text)  # fmt: skip
        else:
            step.keep(item.document.text)
            left.append(item)
    store.remove()
    return left, held[[i not in leaks for i in range(len(held))]], [step]


def split(items: Iterable[Item], held: np.ndarray) -> Iterator[tuple[Item, bool]]:
    """(item, is it held out). A single document is cut: its last tenth is held out."""
    for item, out in zip(items, held, strict=True):
        if len(held) > 1:
            yield item, bool(out)
        else:
            document = item.document
            cut = int(len(document.text) * (1 - LAST_TENTH))
            for text, is_out in ((document.text[:cut], False), (document.text[cut:], True)):
                yield item._replace(document=document._replace(text=text)), is_out


# --- tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Everything training needs of a corpus."""

    tokenizer: Tokenizer
    train: Shards
    held: Shards
    meta: dict = field(repr=False)

    @property
    def parts(self) -> list[Part]:
        """The sources of the training part, with the weights of their mixture."""
        return [Part(**part) for part in self.meta["parts"]]


def prepare(
    config: DataConfig,
    cutting: TokenizerConfig,
    tokenizer: Tokenizer | None = None,
    cache: Path = CACHE,
    special: tuple[str, ...] = (),
    most: int = 0,
) -> Corpus:
    """The corpus as tokens, made now or found from before; a tokenizer is trained unless given.

    special: the texts that one trained here has as special tokens, beside those of its kind; most:
    tokens of a conversation, of which more are cut away.
    """
    own = any(not s.path or s.path.startswith(HERE) for s in sources_of(config))
    if config.form == "chat" and own:
        raise UserError("--data.form chat needs a --data.path or --data.mix with conversations")
    how = [asdict(cutting), special] if tokenizer is None else tokenizer.fingerprint
    how = [how, most] if config.form == "chat" else how
    marks = json.dumps([identity(config), how]).encode()
    folder = cache / hashlib.blake2b(marks, digest_size=8).hexdigest()

    def write(out: Path) -> None:
        tokenize(
            config, lambda texts: tokenizer or make_tokenizer(texts, cutting, special), out, most
        )

    if not (folder / "meta.json").is_file():
        make(folder, write)
    try:
        tokenizer, meta = load(folder), read_sealed(folder / "meta.json")
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("the tokenizer is not what was written")
        dtype = {"dtype": meta["dtype"]}
        train, held = (Shards(folder, name, meta[name] | dtype) for name in ("train", "held"))
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        raise UserError(f"the token files in {folder} are damaged, delete them: {error}") from None
    return Corpus(tokenizer, train, held, meta)


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
    """What a corpus is known by: settings, its files' names, sizes and times, and this program."""
    found = []
    for source in sources_of(config):
        files = files_of(source.path, config.form) if source.path else python_files()
        found += [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        found += [] if source.path else [sys.version]
    programs = [Path(__file__).with_name(f"{name}.py") for name in MADE_BY]
    made_by = [hashlib.blake2b(program.read_bytes()).hexdigest() for program in programs]
    return [asdict(config) | {"packing": ""}, found, made_by, chat.SPECIAL]


def tokenize(
    config: DataConfig, tokenizer_for: Callable[[Iterable[str]], Tokenizer], out: Path,
    most: int = 0,
) -> None:  # fmt: skip
    """Read, clean, divide, train the tokenizer on one side, write tokens and a description."""
    with TemporaryDirectory(dir=out.parent) as scratch:
        store = Store(Path(scratch, "documents"))
        read_step = gather(read_all(config), store, config.strict)
        check(config, store, read_step)
        store, clean_steps = clean.clean(store, recipe_of(config))
        check(config, store, *clean_steps)
        store, held, last_step = divide(store, config)
        if config.form == "chat" and len(held) < 2:
            raise UserError(f"{named(config)} holds one conversation: some must be held out")
        if len(held) > 1 and held.all() == held.any():
            raise UserError(f"{named(config)} holds {alike(config, len(held))}")
        texts = (item.document.text for item, is_out in split(store, held) if not is_out)
        tokenizer = tokenizer_for(texts)
        cutter = Cutter(tokenizer, most, config.form == "chat")
        meta = write_tokens(split(store, held), len(held), cutter, out)
        last_step += cutter.said
    tokenizer.save(out / tokenizer.file_name)
    tokenizer = load(out)  # as it will be known
    parts = parts_of(config, meta.pop("sources"))
    steps = [asdict(step) for step in (read_step, *clean_steps, *last_step)]
    write_sealed(
        out / "meta.json",
        {"source": named(config), "tokenizer": tokenizer.fingerprint, "parts": parts}
        | {"steps": steps, **meta},
    )


def alike(config: DataConfig, many: int) -> str:
    """Why none of documents that `divide` takes for one can be held out, and what to do."""
    if recipe_of(config) == "none":
        return (f"{many} copies of one document, so that none can be held out: give more text, or "
                "only one copy")  # fmt: skip
    return (f"{many} documents after cleaning, each with half of its runs of five words in another,"
            " so that none can be held out: give more text, or --data.clean none")  # fmt: skip


def named(config: DataConfig) -> str:
    own = f"prose of Python {sys.version.split()[0]}'s standard library"
    here = {"world:": "stories of world.py", "facts:": "statements of tasks.py",
            "quiz:": "questions about stories", "": own}  # fmt: skip
    return ", ".join(here.get(source.path, source.path) for source in sources_of(config))


def check(config: DataConfig, store: Store, *steps: Step) -> None:
    """UserError if the steps left nothing, with what they say of it."""
    if len(store) == 0:
        reasons = [(n, reason, step) for step in steps for reason, n in step.dropped.items()]
        why = "every file is empty"
        if reasons and reasons[0][1] != "empty":
            times, reason, step = max(reasons, key=lambda r: r[0])
            example = " ".join(step.examples[reason]).strip()
            why = f"{times:,} × {reason}, as in {example}; see --data.clean"
        raise UserError(f"there is no text in {named(config)}: {why}")


def write_tokens(
    parts: Iterable[tuple[Item, bool]], count: int, cutter: "Cutter", out: Path
) -> dict[str, Any]:
    """The shards of both sides; what they hold, also by source, and what lzma makes of one."""
    tokenizer = cutter.tokenizer
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = [ShardWriter(out, name, dtype, tokenizer.end_of_text) for name in ("train", "held")]
    press, squeezed = lzma.LZMACompressor(), 0
    sources: dict[int, list[int]] = {}  # documents and tokens trained on
    parts = iter(tqdm(parts, "tokens", count, leave=False, disable=None, unit="doc"))
    while batch := list(islice(parts, 512)):
        ids = cutter.encode([item.document for item, _ in batch])
        for (item, is_out), tokens in zip(batch, ids, strict=True):
            data = item.document.text.encode()
            writers[is_out].write(tokens, len(data))
            if is_out:
                squeezed += len(press.compress(data))
            else:
                documents, before = sources.get(item.source, (0, 0))
                sources[item.source] = [documents + 1, before + len(tokens) + 1]
    squeezed += len(press.flush())
    train, held = (writer.close() for writer in writers)
    bits = 8 * squeezed / max(1, held["bytes"])
    return {
        "dtype": dtype.name, "train": train, "held": held, "lzma_bits_per_byte": bits,
        "sources": sources,
    }  # fmt: skip


def parts_of(config: DataConfig, found: dict[int, list[int]]) -> list[dict[str, Any]]:
    """Of each source its place among the documents trained on, and its weight."""
    parts, first = [], 0
    for number, source in enumerate(sources_of(config)):
        documents, tokens = found.get(number, (0, 0))
        by_size = min(tokens, config.cap or tokens) ** (1 / config.temperature)
        weight = by_size if source.weight is None else source.weight
        parts.append(Part(source.name, first, documents, weight)._asdict())
        first += documents
    return parts


CUT = "conversations made shorter"


class Cutter:
    """From documents to ids; `said` tells what had to be left out."""

    def __init__(self, tokenizer: Tokenizer, most: int = 0, talks: bool = False):
        """most: tokens of a conversation, 0 for any number; talks: documents are conversations."""
        self.tokenizer, self.most, self.talks = tokenizer, most or sys.maxsize, talks
        self.fast = None
        with suppress(ValueError):  # not every vocabulary is one that tiktoken can have
            self.fast = tokenizer.to_tiktoken() if isinstance(tokenizer, BPE) else None
        self.said: list[Step] = []

    def encode(self, documents: list[Document]) -> list[list[int]]:
        """Ids in which nothing of a text is special; of a conversation also those of its roles."""
        if not self.talks:
            return self.of_texts([document.text for document in documents])
        found = []
        for document in documents:
            turns = chat.checked(document.meta["turns"])
            ids, left_out = chat.shortened(self.tokenizer, turns, self.most)
            found.append(ids)
            if left_out:
                self.said = self.said or [Step(CUT)]
                self.said[0].drop(f"more than {self.most:,} tokens", document.source, document.text)
        return found

    def of_texts(self, texts: list[str]) -> list[list[int]]:
        """tiktoken gives up on a million blanks in a row."""
        if self.fast:
            with suppress(ValueError):
                return self.fast.encode_batch(texts, num_threads=2, disallowed_special=())
        return [*self.tokenizer.encode_batch(texts)]


def make_tokenizer(
    texts: Iterable[str], config: TokenizerConfig, further: tuple[str, ...] = ()
) -> Tokenizer:
    """A tokenizer learnt from texts, with further special tokens."""
    size, special = config.vocab_size, (*FIXED.get(config.kind, (END_OF_TEXT,)), *further)
    try:
        match config.kind:
            case "bytes":
                return BPE.bytes(special)
            case "characters":
                return BPE.characters(texts, size, special)
            case "bpe":
                return BPE.train(texts, size, config.pattern, special, progress=True)
        return KINDS[config.kind].train(texts, size, special, progress=True)
    except ValueError as error:
        raise UserError(f"--tokenizer.vocab-size does not suit this text: {error}") from None


# --- demo -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Show a corpus: its size, a few documents, and how a batch is packed."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    context: int = 64  # tokens in a row

    def __post_init__(self):
        if self.context < 1:
            raise UserError(f"--context {self.context} must be at least 1")


def show() -> None:
    config = tyro.cli(Show, description=__doc__)
    talks = config.data.form == "chat"
    if config.data.clean == "auto" and recipe_of(config.data) == "none" and not talks:
        print("train.py takes text of yours as it stands; here are the steps of --data.clean docs")
        config = replace(config, data=replace(config.data, clean="docs"))
    corpus = prepare(config.data, config.tokenizer, special=chat.SPECIAL if talks else ())
    meta, tokenizer = corpus.meta, corpus.tokenizer
    steps = [Step(**step) for step in meta["steps"]]
    print(f"\n{meta['source']}\n\n{funnel(steps)}\n")
    for name in ("train", "held"):
        print(f"  {name:5} {meta[name]['documents']:>7,} documents {meta[name]['bytes']:>12,} "
              f"bytes {meta[name]['tokens']:>12,} tokens")  # fmt: skip
    for i in range(0, len(corpus.held), max(1, len(corpus.held) // 3)):
        text = tokenizer.decode(corpus.held.document(i)[1:61].tolist())
        print(f"\n  held out, document {i}: {' '.join(text.split())} …")
    show_rows(corpus, config.context, config.data.packing)
    print(f"\npicture: {draw_funnel(steps, corpus.train.folder / 'funnel.png')}")


def funnel(steps: list[Step]) -> str:
    """What each step left and why it dropped what, with an example of each reason, as a table."""
    most = max(step.bytes for step in steps) or 1
    lines = [f"{'step':20} {'documents':>10} {'bytes':>14}"]
    for step in steps:
        bar = "█" * round(24 * step.bytes / most)
        lines.append(f"{step.name:20} {step.documents:>10,} {step.bytes:>14,}  {bar}")
        for reason, times in sorted(step.dropped.items(), key=lambda item: -item[1]):
            source, excerpt = step.examples[reason]
            lines.append(f"  {times:>8,} × {reason}, as in {source} {excerpt!r}"[:160])
    return "\n".join(lines)


def draw_funnel(steps: list[Step], path: Path) -> Path:
    """The megabytes that each step left, and what it took."""
    left = [step.bytes / 1e6 for step in steps]
    before = [max(one, two) for one, two in zip(left, [left[0], *left], strict=False)]
    with picture(path, size=(8, 0.6 + 0.55 * len(steps))) as (axes,):
        axes.barh(range(len(steps)), before, color="#d9d9d9", label="before")
        axes.barh(range(len(steps)), left, color="#1f4e8c", label="after")
        for i, (step, x) in enumerate(zip(steps, before, strict=True)):
            dropped = sum(step.dropped.values())
            said = f"  {step.documents:,} documents, {dropped:,} dropped or cut"
            axes.text(x, i, said, va="center")
        axes.set(yticks=range(len(steps)), yticklabels=[step.name for step in steps],
                 xlabel="megabytes of text", xlim=(0, 1.6 * max(*before, 1e-6)))  # fmt: skip
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncol=2)
    return path


def show_rows(corpus: Corpus, context: int, packing: str) -> None:
    """How rows are packed: six of them, and how full an epoch is."""
    mixture = Mixture(corpus.train, context, corpus.tokenizer.end_of_text, 0, corpus.parts, packing)
    rows = mixture.take(6)
    print(f"\nsix rows of {context} tokens; a letter is a document, a dot is padding:")
    for starts, nexts in zip(rows.starts.tolist(), rows.nexts.tolist(), strict=True):
        letters = {s: chr(97 + n % 26) for n, s in enumerate(dict.fromkeys(starts))}
        print("  " + "".join("." if n == IGNORE else letters[s]
                             for s, n in zip(starts, nexts, strict=True)))  # fmt: skip
    for stream in mixture.streams:
        pairs = sum(piece.length for row in stream.rows for piece in row)
        full = pairs / len(stream.rows) / context
        print(f"\nan epoch of the {stream.name} is {len(stream.rows):,} rows, {full:.1%} full")


if __name__ == "__main__":
    main(show)
