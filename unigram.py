"""Unigram language models and SentencePiece: the likeliest way to cut a text.

Idea: give every piece a probability, and a segmentation the product of those of its pieces. Cutting
a text is then looking for the best path through all places where pieces fit (Viterbi), and learning
is expectation maximization: count each piece by how likely it is in all ways to cut each word,
make the probabilities of these counts, drop the pieces that are missed least, repeat. Since every
way to cut has a probability, a text can also be cut in several ways, at random, which teaches a
model that they mean the same.

    count_words -> seeds -> Lattice.expected, maximized, pruned, again and again -> final_pieces
    normalize -> words -> best_path (Unigram) or join_pairs (SentencePieceBPE) -> unknown as bytes

SentencePiece's normalization comes first: replacements, collapsed blanks, and ▁ for blank, of which
one is put before the first word. `load` reads its .model files, Llama's and T5's, with its ids.

Run: python unigram.py
     python -m pytest tests/test_unigram.py

Papers: Kudo 2018, "Subword Regularization" (arXiv 1804.10959); Kudo and Richardson 2018,
"SentencePiece" (arXiv 1808.06226); Sennrich et al. 2016 (arXiv 1508.07909) for the pairs.
"""

import hashlib
import heapq
import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Self

from tqdm import tqdm

from processes import in_processes, sum_of
from run import write_whole
from sentencepiece_files import (
    MODEL_TYPES,
    NORMALIZERS,
    SPACE,
    Kind,
    Model,
    Normalization,
    Normalizer,
    Piece,
    Trainer,
    longest_of,
    read_model,
    write_model,
)
from unigram_learning import END, UNKNOWN_PENALTY, learn, required_characters
from vocabulary import CACHED_PIECES, END_OF_TEXT, Memory, Tokenizer, special_regex

WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
SPLIT = re.compile(f"{SPACE}?[^{SPACE}{END}]+|{SPACE}")  # as SentencePiece does it in training

# --- pieces -> the best ways to cut ---------------------------------------------------------------

Edge = tuple[int, int, float]  # where it ends, its id, its score
ROUNDING = 2.0**-22  # twice what two float32 sums of a step each may be off by, in parts of them


def float32(x: float) -> float:
    return array("f", [x])[0]


def best_path(
    edges: Sequence[list[Edge]], start: float = 0.0
) -> tuple[tuple[int, ...], float, float]:
    """(ids, score, gap): the path of the highest sum of scores, and how far behind the next one is.

    edges[i]: those from node i; one ends at i + 1. Sums are float32 and begin with `start`, and of
    equals the one whose last edge is longest wins, all as in SentencePiece.
    """
    n = len(edges)
    best, gap = array("f", [-math.inf]) * (n + 1), [math.inf] * (n + 1)
    came: list[tuple[int, int]] = [(0, 0)] * (n + 1)
    rounded = array("f", [0])
    best[0] = start
    for at, further in enumerate(edges):
        here = best[at]
        for end, id, score in further:
            rounded[0] = here + score
            new, old = rounded[0], best[end]
            if new > old:
                best[end], gap[end], came[end] = new, new - old, (at, id)
            elif old - new < gap[end]:
                gap[end] = old - new
    ids, at, least = [], n, math.inf
    while at:
        least = min(least, gap[at])
        at, id = came[at]
        ids.append(id)
    return tuple(ids[::-1]), best[n] - start, least


def n_best_paths(edges: Sequence[list[Edge]], n: int) -> list[tuple[list[int], float]]:
    """The n paths of the highest scores, best first, as (ids, score).

    A* from the end backward: what is still to come is known exactly, the best sum up to a node.
    """
    best = [0.0] + [-math.inf] * len(edges)
    into: list[list[tuple[int, int, float]]] = [[] for _ in best]
    for at, further in enumerate(edges):
        for end, id, score in further:
            best[end] = max(best[end], best[at] + score)
            into[end].append((at, id, score))
    heap, out, count = [(-best[-1], 0, len(edges), 0.0, None)], [], 0
    while heap and len(out) < n:
        _, _, node, score, rest = heapq.heappop(heap)
        if node == 0:
            ids = []
            while rest:
                id, rest = rest
                ids.append(id)
            out.append((ids, score))
        for at, id, more in into[node]:
            count += 1  # of equals the one that was found first
            entry = (-(best[at] + more + score), count, at, more + score, (id, rest))
            heapq.heappush(heap, entry)
    return out


def sampled_path(edges: Sequence[list[Edge]], alpha: float, draw: random.Random) -> list[int]:
    """A path drawn with P(path) ∝ exp(score)^α  (Kudo, section 3.3): forward sums, then backward.

    α → ∞ gives the best path, α = 0 each one alike.
    """
    total = [0.0] + [-math.inf] * len(edges)
    into: list[list[tuple[int, int, float]]] = [[] for _ in total]
    for at, further in enumerate(edges):
        for end, id, score in further:
            log_p = total[at] + alpha * score
            high, low = max(total[end], log_p), min(total[end], log_p)
            total[end] = high + math.log1p(math.exp(low - high))
            into[end].append((at, id, log_p))
    ids, at = [], len(edges)
    while at:
        weights = [math.exp(log_p - total[at]) for _, _, log_p in into[at]]
        at, id, _ = draw.choices(into[at], weights)[0]
        ids.append(id)
    return ids[::-1]


def join_obviously(symbols: list[str], scores: Mapping[str, float]) -> list[str]:
    """BPE: join the neighbours whose joined text scores highest, the leftmost of equals; repeat."""
    symbols = list(symbols)
    while True:
        joined = [a + b for a, b in pairwise(symbols)]
        found = [(-scores[text], at) for at, text in enumerate(joined) if text in scores]
        if not found:
            return symbols
        _, at = min(found)
        symbols[at : at + 2] = [joined[at]]


def join_pairs(
    symbols: list[str],
    scores: Mapping[str, float],
    frozen: Iterable[int] = (),
    seen: dict[str, tuple[str, str]] | None = None,
) -> list[str]:
    """The same in O(n log n), by a linked list and a heap; frozen symbols are joined to none.

    `seen` gets each joined text that came up and its two parts, of several the last.
    """
    n, frozen = len(symbols), frozenset(frozen)
    texts: list[str | None] = [*symbols, None]
    before, after = [*range(-1, n)], [*range(1, n + 1), n]
    heap: list[tuple[float, int, str]] = []

    def offer(at: int) -> None:
        left, right = texts[at], texts[after[at]]
        if left is None or right is None or at in frozen or after[at] in frozen:
            return
        if (score := scores.get(left + right)) is not None:
            heapq.heappush(heap, (-score, at, left + right))
            if seen is not None:
                seen[left + right] = left, right

    for at in range(n):
        offer(at)
    while heap:
        _, at, text = heapq.heappop(heap)
        left, right = texts[at], texts[after[at]]
        if left is None or right is None or len(left) + len(right) != len(text):
            continue  # the pair that was offered is gone; what stands here is its text's beginning
        texts[at], texts[after[at]] = text, None
        after[at] = after[after[at]]
        before[after[at]] = at
        if before[at] >= 0:
            offer(before[at])
        offer(at)
    return [text for text in texts if text is not None]


# --- the tokenizers -------------------------------------------------------------------------------


@dataclass
class SentencePiece(Tokenizer):
    """What both kinds of .model files share: all but how words are cut into pieces."""

    pieces: list[Piece]  # by id
    trainer: Trainer
    normalizer: Normalizer

    def __post_init__(self):
        self._by_text = {piece.text: id for id, piece in enumerate(self.pieces)}
        if len(self._by_text) < len(self.pieces):
            raise ValueError("two of its pieces are the same")
        if "" in self._by_text:
            raise ValueError("one of its pieces is empty")
        kinds = [piece.kind for piece in self.pieces]
        if kinds.count(Kind.UNKNOWN) != 1:
            raise ValueError("not exactly one of its pieces stands for what is unknown")
        self._unknown = kinds.index(Kind.UNKNOWN)
        self.special = {text: id for text, id in self._by_text.items() if kinds[id] == Kind.CONTROL}
        self._special = special_regex(self.special)
        self._set_bytes()
        defined = [piece.text for piece in self.pieces if piece.kind == Kind.USER_DEFINED]
        self._defined = longest_of(defined)
        rules = Normalization(self.normalizer, self._defined)
        self.normalize, self.aligned = rules.normalize, rules.aligned
        inside = [p.text for p in self.pieces if p.kind in (Kind.NORMAL, Kind.USER_DEFINED)]
        self._in_words = all(len(WORDS.findall(text)) == 1 for text in inside)
        self._memory = Memory(self._segment, CACHED_PIECES)

    def _set_bytes(self) -> None:
        """byte -> id and id -> byte; without byte_fallback there are none."""
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        self._bytes = {}
        for id, (text, _, kind) in enumerate(self.pieces):
            if kind == Kind.BYTE:
                if not self.trainer.byte_fallback or text not in names:
                    raise ValueError(f"its piece {short(text)} is no byte, or byte_fallback is off")
                self._bytes[id] = names[text]
        if self.trainer.byte_fallback and len(self._bytes) < 256:
            raise ValueError("byte_fallback is on, but not every byte has a piece")
        self._byte_ids = {byte: id for id, byte in self._bytes.items()}

    def __reduce__(self):  # for pickle: the fields rebuild the rest
        return type(self), (self.pieces, self.trainer, self.normalizer)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def end_of_text(self) -> int:
        """The id that stands between documents: END_OF_TEXT, or what the file calls its end."""
        ends = self.trainer.eos_piece if END_OF_TEXT not in self.special else END_OF_TEXT
        return self.special[ends] if ends in self.special else super().end_of_text

    @cached_property
    def fingerprint(self) -> str:
        """Differs where anything differs: a key for whatever is cached with these ids."""
        content = type(self).__name__, self.pieces, self.trainer, self.normalizer
        return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()

    # --- encoding

    def _words(self, normal: str) -> list[str]:
        """Parts that no piece crosses: the text itself if some piece has ▁ behind a letter."""
        return WORDS.findall(normal) if self._in_words else [normal] * bool(normal)

    def _cut(self, normal: str) -> list[int]:
        """Ids for a normalized text; each character without a piece is the unknown one."""
        return [*chain.from_iterable(map(self._memory.__getitem__, self._words(normal)))]

    def _placed(self, ids: list[int], normal: str) -> Iterator[tuple[int, int, int]]:
        """(id, from, to): unknown characters become their bytes, or a run of them one token.

        The last byte has the character, the others are empty, so that all parts make up the text.
        """
        at, run = 0, None
        for id in ids:
            end = at + (1 if id == self._unknown else len(self.pieces[id].text))
            if run is not None and id != self._unknown:
                yield self._unknown, run, at
                run = None
            if id != self._unknown:
                yield id, at, end
            elif self._bytes:
                *most, last = normal[at].encode()
                yield from ((self._byte_ids[byte], at, at) for byte in most)
                yield self._byte_ids[last], at, end
            elif run is None:
                run = at
            at = end
        if run is not None:
            yield self._unknown, run, at

    def encode(self, text: str, special: str = "text") -> list[int]:
        """text -> ids. What a special token inside the text means is for the caller to say.

        "text": its letters, as in SentencePiece, so that no user can forge one · "ids": its id,
        the longest where several begin, between texts that are normalized each alone · "refuse":
        ValueError. A lone surrogate is a ValueError, too.
        """
        ids: list[int] = []
        for at, part in enumerate(self._parts(text, special)):
            if at % 2:
                ids.append(self.special[part])
                continue
            normal = self.normalize(part)
            cut = self._cut(normal)
            ids += [id for id, *_ in self._placed(cut, normal)] if self._unknown in cut else cut
        return ids

    def spans(self, text: str, special: str = "text") -> list[tuple[int, int]]:
        """Of each id of `encode` where its part of the text begins and ends, in characters.

        Blanks that were dropped belong to the token before them. Of a character that is given in
        bytes the last has all and the others nothing.
        """
        out, start = [], 0
        for at, part in enumerate(self._parts(text, special)):
            if at % 2:
                out.append((start, start + len(part)))
            else:
                normal, origins = self.aligned(part)
                for _, begin, end in self._placed(self._cut(normal), normal):
                    out.append((start + origins[begin], start + origins[end]))
            start += len(part)
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, as SentencePiece does it.

        ▁ becomes blank, but not the first, which `normalize` put there (with
        remove_extra_whitespaces none before the first letter). Control tokens are invisible. Bytes
        that are not UTF-8 become U+FFFD each.
        """
        out, held = [], bytearray()
        first, dropped, collapse = True, False, self.normalizer.remove_extra_whitespaces
        for id in ids:
            if not 0 <= id < len(self.pieces):
                raise ValueError(
                    f"id {id} is not among the {self.vocab_size} of this vocabulary: decode with "
                    "the tokenizer that encoded"
                )
            if id in self._bytes:
                held.append(self._bytes[id])
                continue
            out.append(from_utf8(held))
            held.clear()
            first = first and not dropped and not any(out[-2:])  # those before were empty
            text, dropped = self.pieces[id].text, False
            if id == self._unknown:
                text = self.trainer.unk_surface
            elif text in self.special:
                text = ""
            elif first and text[0] == SPACE and (collapse or self.normalizer.add_dummy_prefix):
                text, dropped = text[1:], not collapse
            out.append(text if id == self._unknown else text.replace(SPACE, " "))
        return "".join([*out, from_utf8(held)])

    # --- files

    def save(self, path: str | Path) -> None:
        """Write a .model file that sentencepiece reads, whole or not at all."""
        kind = {name: number for number, name in MODEL_TYPES.items()}[MODEL_OF[type(self)]]
        trainer = replace(self.trainer, model_type=kind)
        write_whole(Path(path), write_model(Model(self.pieces, trainer, self.normalizer)))

    @classmethod
    def load(cls, path: str | Path) -> "SentencePiece":
        """Read a .model file, as a Unigram or a SentencePieceBPE, or say why that cannot be."""
        try:
            model = read_model(Path(path).read_bytes())
            name = MODEL_TYPES.get(model.trainer.model_type, "unknown")
            for kind, its_name in MODEL_OF.items():
                if name == its_name:
                    return kind(*model)
            raise ValueError(f"it cuts into words or characters: its model_type is {name}")
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be loaded as a SentencePiece model ({error}): choose another file, "
                "or write this one again with save"
            ) from None


def from_utf8(data: bytes) -> str:
    """Every byte that is not part of a character becomes U+FFFD."""
    text = data.decode(errors="surrogateescape")
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


class Unigram(SentencePiece):
    """The likeliest pieces: the segmentation of the highest sum of log-probabilities."""

    def __post_init__(self):
        scores = [piece.score for piece in self.pieces if piece.kind == Kind.NORMAL]
        self._unknown_score = float32(min(scores, default=0.0) - UNKNOWN_PENALTY)
        self._scores, self._edges_of = [], {}
        self._longest: dict[str, int] = {}  # first character -> length of its longest piece
        for id, (text, score, kind) in enumerate(self.pieces):
            if kind == Kind.USER_DEFINED:
                score = float32((len(text.encode()) - 1) / 10)  # measured in sentencepiece 0.2.3
            elif kind == Kind.UNKNOWN:
                score = self._unknown_score
            self._scores.append(score)
            if kind in (Kind.NORMAL, Kind.USER_DEFINED):
                self._edges_of[text] = id, score
                self._longest[text[0]] = max(len(text), self._longest.get(text[0], 0))
        super().__post_init__()

    def _edges(self, word: str) -> list[list[Edge]]:
        """All pieces that fit, by their first character; where none of one fits, the unknown."""
        out, known = [], self._edges_of.get
        for at, char in enumerate(word):
            further = [(end, *found) for end in range(at + 1, at + self._longest.get(char, 0) + 1)
                       if (found := known(word[at:end])) and end <= len(word)]  # fmt: skip
            if not further or further[0][0] > at + 1:
                further.insert(0, (at + 1, self._unknown, self._unknown_score))
            out.append(further)
        return out

    def _segment(self, word: str) -> tuple[tuple[int, ...], float, float]:
        return best_path(self._edges(word))

    def _cut(self, normal: str) -> list[int]:
        """The best path through the whole text, word by word.

        SentencePiece adds in float32 from the text's beginning on, so that what it rounds depends
        on what stands before. Where that might decide, the word is cut again from the same sum.
        """
        ids: list[int] = []
        total, exact, done = 0.0, 0.0, 0
        for word in self._words(normal):
            cut, score, gap = self._memory[word]
            if gap <= ROUNDING * len(word) * (abs(total) + abs(score)):
                for id in ids[done:]:
                    exact = float32(exact + self._scores[id])
                done = len(ids)
                cut, score, _ = best_path(self._edges(word), exact)
            ids += cut
            total += score
        return ids

    def n_best(self, text: str, n: int) -> list[tuple[list[int], float]]:
        """The n likeliest segmentations, best first: (ids, log-probability)."""
        normal = self.normalize(text)
        return [
            ([id for id, *_ in self._placed(ids, normal)], score)
            for ids, score in n_best_paths(self._edges(normal), n)
        ]

    def sample(self, text: str, alpha: float, draw: random.Random) -> list[int]:
        """Ids drawn with P(ids) ∝ P(segmentation)^α; Kudo uses α between 0.1 and 0.5."""
        normal = self.normalize(text)
        ids = sampled_path(self._edges(normal), alpha, draw)
        return [id for id, *_ in self._placed(ids, normal)]

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special: Iterable[str] = (END_OF_TEXT,),
        byte_fallback: bool = True,
        normalizer: Normalizer | str = "lossless",
        character_coverage: float = 0.9995,
        longest: int = 16,
        progress: bool = False,
        processes: int = 0,
    ) -> Self:
        """Learn pieces until there are vocab_size ids: unknown, special, bytes, then pieces.

        Fewer if there are no more. normalizer: a name in NORMALIZATIONS, or SentencePiece's own
        settings. character_coverage: the part of the text whose characters become pieces; the
        rarest are left to byte_fallback. No piece has more than `longest` characters, crosses a
        blank or a special token, or mixes scripts. Many texts are counted in several processes
        (0: one for each core).
        """
        if isinstance(texts, str):
            raise ValueError("texts must be several texts: write [text] for a single one")
        if isinstance(normalizer, str):
            if normalizer not in NORMALIZATIONS:
                names = ", ".join(NORMALIZATIONS)
                raise ValueError(f"normalizer must be one of {names}, not {normalizer!r}")
            name, extra = NORMALIZATIONS[normalizer]
            normalizer = Normalizer(name, NORMALIZERS[name](), True, extra)
        fixed = [Piece("<unk>", 0.0, Kind.UNKNOWN)]
        fixed += [Piece(text, 0.0, Kind.CONTROL) for text in dict.fromkeys(special)]
        if byte_fallback:
            fixed += [Piece(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
        trainer = Trainer(byte_fallback=byte_fallback, bos_id=-1, eos_id=-1)
        counts = cls(fixed, trainer, normalizer).count_words(texts, progress, processes)
        kept = required_characters(counts, character_coverage) or {SPACE}  # sentencepiece wants one
        room = vocab_size - len(fixed)
        if room < len(kept):
            raise ValueError(f"vocab_size must be {vocab_size - room + len(kept)} or more, not "
                             f"{vocab_size}, or character_coverage less")  # fmt: skip
        others = str.maketrans(dict.fromkeys({*"".join(counts)} - kept, END))
        known: Counter[str] = Counter()
        for word, times in counts.items():
            known[word.translate(others)] += times
        found = learn(known, vocab_size, room, longest, progress) or {SPACE: 0.0}
        pieces = [*fixed, *(Piece(text, float32(p)) for text, p in found.items())]
        return cls(pieces, replace(trainer, vocab_size=len(pieces)), normalizer)

    def count_words(
        self, texts: Iterable[str], progress: bool = False, processes: int = 0
    ) -> Counter[str]:
        """How often each word occurs in the normalized texts; special tokens separate texts."""

        def count(texts: list[str]) -> Counter[str]:
            counts: Counter[str] = Counter()
            for text in texts:
                for part in self._special.split(text)[::2]:
                    if words := SPLIT.findall(self.normalize(part)):
                        words[-1] += END
                    counts.update(words)
            return counts

        texts = tqdm(texts, "count words", unit=" texts", disable=None if progress else True)
        return sum_of(in_processes(count, texts, processes))


class SentencePieceBPE(SentencePiece):
    """Pairs joined in the order of their scores, as in Llama 2; it is loaded, not trained."""

    def __post_init__(self):
        super().__post_init__()
        ordinary = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
        self._score_of = {p.text: p.score for p in self.pieces if p.kind in ordinary}
        self._unused = {p.text for p in self.pieces if p.kind == Kind.UNUSED}
        if self._unused:  # how they are taken apart may depend on other words
            self._in_words = False

    def _segment(self, word: str) -> list[int]:
        symbols, frozen, at = [], [], 0
        while at < len(word):
            if found := self._defined.match(word, at):
                frozen.append(len(symbols))
            symbols.append(found.group() if found else word[at])
            at += len(symbols[-1])
        seen: dict[str, tuple[str, str]] = {}
        waiting, ids = join_pairs(symbols, self._score_of, frozen, seen)[::-1], []
        while waiting:
            text = waiting.pop()
            if text not in self._unused:
                ids.append(self._by_text.get(text, self._unknown))
            elif text in seen:  # its parts come out instead
                waiting += seen[text][::-1]
            else:
                ids.append(self._unknown)
        return ids


MODEL_OF = {Unigram: "unigram", SentencePieceBPE: "bpe"}
NORMALIZATIONS = {  # name -> replacements, and whether blanks are collapsed
    "lossless": ("identity", False),  # but for ▁ itself
    "identity": ("identity", True),
    "nfkc": ("nfkc", True),
}


def main() -> None:
    """Learn from Python's manual; cut a sentence in the best ways, then at random."""
    from pydoc_data.topics import topics

    tokenizer, text = Unigram.train(topics.values(), 2048), "unbelievable representations"
    print(f"Python's manual: {tokenizer.vocab_size:,} tokens. The best ways to cut {text!r}:\n")
    for ids, score in tokenizer.n_best(text, 5):
        print(f"{score:8.2f}  " + " ".join(tokenizer.pieces[id].text for id in ids))
    print("\nSome ways drawn at random (α = 0.3):\n")
    draw = random.Random(0)
    for _ in range(5):
        ids = tokenizer.sample(text, 0.3, draw)
        print(10 * " " + " ".join(tokenizer.pieces[id].text for id in ids))


if __name__ == "__main__":
    main()
