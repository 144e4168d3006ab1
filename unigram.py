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

Run: python -m pytest tests/test_unigram.py

Papers: Kudo 2018, "Subword Regularization" (arXiv 1804.10959); Kudo and Richardson 2018,
"SentencePiece" (arXiv 1808.06226); Sennrich et al. 2016 (arXiv 1508.07909) for the pairs.
"""

import heapq
import math
import random
import re
from array import array
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Self

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
from vocabulary import (
    CACHED_PIECES,
    END_OF_TEXT,
    Memory,
    Span,
    Tokenizer,
    counted,
    loading,
    room_for,
    special_regex,
)

WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
ESCAPED = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of a byte
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

    file_name = "tokenizer.model"
    model_type = 0  # a key of MODEL_TYPES

    def __post_init__(self):
        self.trainer = replace(self.trainer, model_type=self.model_type)
        self._set_tokens([piece.text for piece in self.pieces])
        if len(self._tokens) < len(self.pieces):
            raise ValueError("one of its pieces is empty")
        kinds = [piece.kind for piece in self.pieces]
        if kinds.count(Kind.UNKNOWN) != 1:
            raise ValueError("not exactly one of its pieces stands for what is unknown")
        self.unknown_id = kinds.index(Kind.UNKNOWN)
        self.special = {text: id for text, id in self._ids.items() if kinds[id] == Kind.CONTROL}
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

    @property
    def end_of_text(self) -> int:
        """The id that stands between documents: END_OF_TEXT, or what the file calls its end."""
        ends = self.trainer.eos_piece if END_OF_TEXT not in self.special else END_OF_TEXT
        return self.special[ends] if ends in self.special else super().end_of_text

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
            end = at + (1 if id == self.unknown_id else len(self.pieces[id].text))
            if run is not None and id != self.unknown_id:
                yield self.unknown_id, run, at
                run = None
            if id != self.unknown_id:
                yield id, at, end
            elif self._bytes:
                *most, last = normal[at].encode()
                yield from ((self._byte_ids[byte], at, at) for byte in most)
                yield self._byte_ids[last], at, end
            elif run is None:
                run = at
            at = end
        if run is not None:
            yield self.unknown_id, run, at

    def _encode(self, text: str) -> list[int]:
        normal = self.normalize(text)
        cut = self._cut(normal)
        unknown = self.unknown_id in cut
        return [id for id, *_ in self._placed(cut, normal)] if unknown else cut

    def _spans(self, text: str) -> Iterable[Span]:
        """Blanks that were dropped belong to the token before them.

        Of a character that is given in bytes the last has all and the others nothing.
        """
        normal, origins = self.aligned(text)
        for _, begin, end in self._placed(self._cut(normal), normal):
            yield origins[begin], origins[end]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """ids -> text, as SentencePiece does it.

        ▁ becomes blank, but not the first, which `normalize` put there (with
        remove_extra_whitespaces none before the first letter). Control tokens are invisible. Bytes
        that are not UTF-8 become U+FFFD each.
        """
        decoder = getincrementaldecoder("utf-8")("surrogateescape")
        collapse = self.normalizer.remove_extra_whitespaces
        begun = held = False  # has any text come, are there bytes that wait for others

        def letters(data: bytes = b"") -> str:
            """What is whole with these bytes; without any, all that is left."""
            return ESCAPED.sub("\ufffd", decoder.decode(data, final=not data))

        for id in ids:
            text = self.token(id)
            if id in self._bytes:
                begun = held = True
                yield letters(bytes([self._bytes[id]]))
                continue
            if id == self.unknown_id:
                text = self.trainer.unk_surface
            elif text in self.special:
                text = ""
            elif not begun and text[0] == SPACE and (collapse or self.normalizer.add_dummy_prefix):
                text, begun = text[1:].replace(SPACE, " "), not collapse
            else:
                text = text.replace(SPACE, " ")
            begun = begun or text != ""
            yield letters() + text if held else text
            held = False
        yield letters()

    # --- files

    def save(self, path: str | Path) -> None:
        """Write a .model file that sentencepiece reads, whole or not at all."""
        write_whole(Path(path), write_model(Model(self.pieces, self.trainer, self.normalizer)))

    @classmethod
    def load(cls, path: str | Path) -> "SentencePiece":
        """Read a .model file, as a Unigram or a SentencePieceBPE, or say why that cannot be."""
        with loading(path, cls.__name__):
            model = read_model(Path(path).read_bytes())
            for kind in (Unigram, SentencePieceBPE):
                if kind.model_type == model.trainer.model_type:
                    return kind(*model)
            name = MODEL_TYPES.get(model.trainer.model_type, "unknown")
            raise ValueError(f"it cuts into words or characters: its model_type is {name}")


class Unigram(SentencePiece):
    """The likeliest pieces: the segmentation of the highest sum of log-probabilities."""

    model_type = 1

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
                further.insert(0, (at + 1, self.unknown_id, self._unknown_score))
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
        least = len(fixed) + len(kept)
        room = len(kept) + room_for(vocab_size, least)
        others = str.maketrans(dict.fromkeys({*"".join(counts)} - kept, END))
        known: Counter[str] = Counter()
        for word, times in counts.items():
            known[word.translate(others)] += times
        found = learn(known, len(fixed) + room, room, longest, progress) or {SPACE: 0.0}
        pieces = [*fixed, *(Piece(text, float32(p)) for text, p in found.items())]
        return cls(pieces, replace(trainer, vocab_size=len(pieces)), normalizer)

    def count_words(
        self, texts: Iterable[str], progress: bool = False, processes: int = 0
    ) -> Counter[str]:
        """How often each word occurs in the normalized texts; special tokens separate texts."""

        def cut(parts: Iterable[str]) -> Counter[str]:
            counts: Counter[str] = Counter()
            for part in parts:
                if words := SPLIT.findall(self.normalize(part)):
                    words[-1] += END
                counts.update(words)
            return counts

        return counted(texts, cut, self.special, progress, processes)


class SentencePieceBPE(SentencePiece):
    """Pairs joined in the order of their scores, as in Llama 2; it is loaded, not trained."""

    model_type = 2

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
                ids.append(self._ids.get(text, self.unknown_id))
            elif text in seen:  # its parts come out instead
                waiting += seen[text][::-1]
            else:
                ids.append(self.unknown_id)
        return ids


NORMALIZATIONS = {  # name -> replacements, and whether blanks are collapsed
    "lossless": ("identity", False),  # but for ▁ itself
    "identity": ("identity", True),
    "nfkc": ("nfkc", True),
}
