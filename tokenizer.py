"""Three tokenizers side by side: byte-pair encoding, WordPiece and unigram language models.

Idea: words are too many and letters too short, so a model reads what lies between: pieces of words
that often occur. A text of common words then has few tokens, and a new word still has some.

              learns                                       cuts
    BPE       joins the commonest pair of neighbours,      by the same joins, in the same order
              again and again
    WordPiece joins the pair that makes the text           the longest piece that fits, from left
              likeliest, again and again                   to right
    Unigram   gives probabilities to many pieces, drops    the likeliest of all ways to cut, or
              those that are missed least                  one drawn at random

BPE and Unigram lose nothing of a text, for what has no piece is given in bytes. WordPiece, as BERT
has it, normalizes (lower case, no accents, blanks are only borders), and what it cannot cut is
unknown. All have one interface: vocabulary.Tokenizer.

Run: python tokenizer.py
     python tokenizer.py --text "How is this sentence cut?" --vocab-size 1024
     python tokenizer.py --file path/to/folder     how the tokenizer of a file or folder cuts

Papers: Sennrich et al. 2016, BPE (arXiv 1508.07909); Schuster and Nakajima 2012, "Japanese and
Korean Voice Search", and Devlin et al. 2018, BERT (arXiv 1810.04805), for WordPiece; Kudo 2018,
unigram models (arXiv 1804.10959); Bostrom and Durrett 2020 (arXiv 2004.03720) compare two.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from reprlib import repr as short
from typing import NamedTuple

import tyro
from tqdm import tqdm

from bpe import BPE, count_pieces
from merges import learn_merges
from pictures import picture
from run import RUNS, UserError, main
from unigram import SentencePiece, Unigram
from vocabulary import Token, Tokenizer
from wordpiece import WordPiece

KINDS: dict[str, type[Tokenizer]] = {"bpe": BPE, "wordpiece": WordPiece, "unigram": Unigram}

# --- files ----------------------------------------------------------------------------------------

FILES = (  # what a folder may hold, the original before what was made of it
    "*.model", "tokenizer.json", "encoder.json", "vocab.json", "vocab.txt", "*.tiktoken",
)  # fmt: skip


def load(path: str | Path) -> Tokenizer:
    """Read whatever tokenizer lies at a path, or say why that cannot be.

    path: a tokenizer.json with BPE or WordPiece; BERT's vocab.txt; SentencePiece's .model; GPT-2's
    encoder.json or vocab.bpe, the other beside it; a rank file of tiktoken (for which see
    BPE.load); or a folder with one of these.
    """
    path = Path(path)
    try:
        path = found_in(path) if path.is_dir() else path
        kind = kind_of(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no tokenizer that can be read: {error}") from None
    return kind.load(path)


def found_in(folder: Path) -> Path:
    """The file that holds the tokenizer of a folder."""
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            if path.suffix != ".model" or is_sentencepiece(path.read_bytes()):
                return path
    raise ValueError(f"it has none of {', '.join(FILES)}")


def is_sentencepiece(data: bytes) -> bool:
    """A protocol buffer begins with the number of its first field, a string, and has zeros."""
    return data.startswith(b"\n") and b"\0" in data


def kind_of(data: bytes) -> type[Tokenizer]:
    """Which kind a file is, by its content; ValueError if it is none."""
    if is_sentencepiece(data):
        return SentencePiece
    if data.lstrip().startswith(b"{"):
        model = json.loads(data).get("model")
        if not isinstance(model, dict):  # GPT-2's vocabulary, which has a token of this name
            return BPE
        name = model.get("type", "BPE" if "merges" in model else "WordPiece")  # old files: no type
        for kind in (BPE, WordPiece):
            if kind.__name__ == name:
                return kind
        made = "if it was made from a .model file, give that one"
        raise ValueError(f"its model is {short(name)}, not BPE or WordPiece; {made}")
    if b"[UNK]" in data.split():
        return WordPiece
    if len(data.lstrip().split(b"\n")[0].split()) == 2:  # a token and its rank, or a merge
        return BPE
    raise ValueError("its content is none of those that Hugging Face, BERT, SentencePiece, GPT-2 "
                     "or tiktoken write")  # fmt: skip


# --- the idea, shown ------------------------------------------------------------------------------

TEXTS = (
    "Tokenizers cut unbelievably long sentences into strings that often occur.",
    "for i in range(12345): total += 3.14 * x[i]",
    "Ein naïver Käfer, Привет, 日本語 😀",
)


@dataclass(frozen=True)
class Settings:
    """Train all three on Python's own manual, and show how each cuts the same texts."""

    text: tuple[str, ...] = TEXTS  # what to cut
    vocab_size: int = 2048  # ids of each; the picture goes from a fourth to four times as many
    file: str = ""  # cut with the tokenizer of this file or folder instead of training any

    def __post_init__(self):
        for text in self.text:
            try:
                text.encode()
            except ValueError as error:
                raise UserError(f"--text cannot be written as UTF-8: {error}") from None


def manual() -> tuple[list[str], list[str]]:
    """Python's manual: what to learn from, and every eighth topic to measure with."""
    texts = list(topics.values())
    return [text for at, text in enumerate(texts) if at % 8], texts[::8]


def show_merges(texts: Sequence[str], number: int = 12) -> None:
    counts = count_pieces(texts)
    print(f"Python's manual: {counts.total():,} pieces, {len(counts):,} different ones.")
    print("The first merges of BPE:\n\n  count    id  token")
    tokens = [bytes([byte]) for byte in range(256)]
    for (left, right), count in islice(learn_merges(counts), number):
        tokens.append(tokens[left] + tokens[right])
        new, *parts = (tokens[id].decode(errors="replace") for id in (-1, left, right))
        print(f"{count:7,} {len(tokens) - 1:5}  {new!r:8} = {parts[0]!r} + {parts[1]!r}")


def readable(token: Token) -> str:
    """A token on one line: bytes that are no text, and what cannot be seen, with a backslash."""
    text = token.decode(errors="backslashreplace") if isinstance(token, bytes) else token
    text = text.replace("▁", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_cuts(tokenizers: dict[str, Tokenizer], texts: Sequence[str]) -> None:
    """Each text, and under it how many tokens each tokenizer makes of it, and which."""
    for text in texts:
        print(f"\n{text}")
        for name, tokenizer in tokenizers.items():
            ids = tokenizer.encode(text)
            cut = "|".join(readable(tokenizer.token(id)) for id in ids)
            print(f"  {name:10} {len(ids):3}  {cut}")


def show_ways(unigram: Unigram, text: str, number: int = 3) -> None:
    """The best ways to cut a text, and some that are drawn, from which a model learns more."""
    print(f"\nUnigram's best ways to cut {text!r}, by log-probability, and some at random:\n")
    best = [(f"{score:.2f}", ids) for ids, score in unigram.n_best(text, number)]
    draw = random.Random(0)
    drawn = [("drawn", unigram.sample(text, 0.3, draw)) for _ in range(number)]
    for how, ids in best + drawn:
        print(f"{how:>8}  " + "|".join(readable(unigram.token(id)) for id in ids))


class Measured(NamedTuple):
    """What a tokenizer makes of texts that it has not learnt from."""

    name: str
    vocab_size: int
    characters: float  # per token
    bytes: float  # per token
    unknown: int  # tokens
    speed: float  # megabytes a second in one process, which sees most pieces for the first time
    seconds: float | None  # of training


def measure(
    name: str, tokenizer: Tokenizer, texts: Sequence[str], seconds: float | None = None
) -> Measured:
    start = time.perf_counter()
    ids = [id for text in texts for id in tokenizer.encode(text)]
    took = time.perf_counter() - start
    characters = sum(map(len, texts)) / len(ids)
    size = sum(len(text.encode()) for text in texts)
    unknown = ids.count(tokenizer.unknown_id)
    return Measured(name, tokenizer.vocab_size, characters, size / len(ids), unknown,
                    size / took / 1e6, seconds)  # fmt: skip


def show_table(rows: Sequence[Measured], texts: Sequence[str]) -> None:
    size = sum(len(text.encode()) for text in texts)
    print(f"\nOn {size:,} bytes of the manual, held out:\n")
    print("kind              vocabulary  characters/token  bytes/token  unknown    MB/s  training")
    for row in rows:
        training = "" if row.seconds is None else f"{row.seconds:.2f} s"
        print(f"{row.name:16} {row.vocab_size:11,} {row.characters:17.3f} {row.bytes:12.3f} "
              f"{row.unknown:8,} {row.speed:7.2f} {training:>9}")  # fmt: skip


def train_all(
    vocab_size: int, texts: Sequence[str], held: Sequence[str]
) -> dict[str, dict[int, tuple[Tokenizer, Measured]]]:
    """kind -> size -> a tokenizer, for five sizes, and what it makes of the texts held.

    One smaller than vocab_size may have no room for all letters: then it is left out.
    """
    sizes = [vocab_size, vocab_size // 4, vocab_size // 2, 2 * vocab_size, 4 * vocab_size]
    jobs = [(name, size) for size in sizes for name in KINDS]
    made = {name: {} for name in KINDS}
    for name, size in tqdm(jobs, "train", leave=False, disable=None, unit=" tokenizers"):
        start = time.perf_counter()
        try:
            tokenizer = KINDS[name].train(texts, size)
        except ValueError as error:
            if size < vocab_size:
                continue
            raise UserError(f"--vocab-size is too small for {name}: {error}") from None
        row = measure(name, tokenizer, held, time.perf_counter() - start)
        made[name][size] = tokenizer, row
    return made


def draw_compression(rows: Sequence[Measured], path: Path) -> None:
    """A picture: bytes per token over the size of the vocabulary, a line for each kind."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    with picture(path) as (axes,):
        for name, color in zip(KINDS, ("#1f4e8c", "#c8442d", "#2f8f5b"), strict=True):
            line = sorted({(row.vocab_size, row.bytes) for row in rows if row.name == name})
            sizes, values = zip(*line, strict=True)
            axes.plot(sizes, values, "o-", color=color, markersize=4, linewidth=1.6, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="tokens in the vocabulary", ylabel="bytes per token",
                 title="unseen pages of the manual; a line ends when all is learnt")  # fmt: skip
        axes.legend(frameon=False)


def script() -> None:
    config = tyro.cli(Settings, description=__doc__)
    texts, held = manual()
    if config.file:
        try:
            tokenizer = load(config.file)
            name = type(tokenizer).__name__
            show_cuts({name: tokenizer}, config.text)
            return show_table([measure(name, tokenizer, held)], held)
        except ValueError as error:
            raise UserError(str(error)) from None
    show_merges(texts)
    made = train_all(config.vocab_size, texts, held)
    chosen = {name: of_size[config.vocab_size] for name, of_size in made.items()}
    show_cuts({name: tokenizer for name, (tokenizer, _) in chosen.items()}, config.text)
    show_ways(chosen["unigram"][0], "unbelievable representations")
    show_table([row for _, row in chosen.values()], held)
    print("\nNot quite alike: WordPiece writes no blanks and no capitals, and Unigram has a token\n"
          "for each of several blanks in a row.")  # fmt: skip
    rows = [row for of_size in made.values() for _, row in of_size.values()]
    path = RUNS / "tokenizers.png"
    draw_compression(rows, path)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main(script)
