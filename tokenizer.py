"""Tokenizers by hand: text <-> token ids. So far byte-level byte-pair encoding (BPE).

Idea: a model reads integers. BPE starts from the 256 bytes, so that no text is ever unknown, and
gives the commonest pair of neighbours an id of its own, again and again: `t h` becomes `th`, then
`th e` becomes `the`. To encode, the merges are replayed in the order in which they were learnt.
A regular expression first cuts the text into pieces (about a word and the blank before it). No
merge crosses a piece, so that training needs only the different pieces and their counts.

    count_pieces -> learn_merges -> BPE.encode, BPE.decode -> BPE.save, BPE.load

Merges are learnt and applied in merges.py.

Run: python tokenizer.py
     python tokenizer.py --text "How is this sentence cut?" --vocab-size 1024

Papers: Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016 (arXiv 1508.07909);
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (bytes, split pattern).
"""

import codecs
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from reprlib import repr as short
from typing import Self

import tiktoken
import tyro
from tqdm import tqdm

import tokenizer_files
from merges import Tie, apply_merges, apply_merges_to_long, learn_merges
from pieces import ASCII_PATTERNS, LAST_CUT, SPLIT_PATTERNS, splitter
from processes import in_processes, sum_of
from run import write_whole
from tokenizer_files import Pair, to_bytes
from vocabulary import (
    CACHED_PIECES,
    END_OF_TEXT,
    LONG_PIECE,
    Memory,
    Tokenizer,
    special_regex,
)

BLOCK = 1 << 14  # characters of a stream that are encoded at once

CHARACTER = r"[\s\S]"  # the pattern that cuts everywhere

# --- text -> pieces -------------------------------------------------------------------------------


def count_pieces(
    texts: Iterable[str],
    pattern: str = "gpt4",
    special: Sequence[str] = (),
    progress: bool = False,
    processes: int = 0,
) -> Counter[str]:
    """How often each piece occurs; special tokens separate texts and are not counted."""
    if isinstance(texts, str):
        raise ValueError("texts must be several texts: write [text] for a single one")
    split, borders = splitter(pattern), special_regex(special)

    def count(texts: list[str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for text in texts:
            for part in borders.split(text)[::2]:  # the odd parts are the special tokens
                counts.update(split(part))
        return counts

    texts = tqdm(texts, "count pieces", unit=" texts", disable=None if progress else True)
    return sum_of(in_processes(count, texts, processes))


# --- the tokenizer --------------------------------------------------------------------------------


@dataclass
class BPE(Tokenizer):
    """A byte-level BPE vocabulary; everything else is derived from these four fields.

    Ids come in any order: bytes need not be first, nor merges by rank; a few may be unused.
    """

    tokens: list[bytes]  # id -> its bytes; b"" where the id belongs to a special token or to none
    merges: list[Pair] | None  # in rank order: what was learnt first is merged first. None: any two
    # neighbours whose bytes joined are a token merge, that of the lowest id first (tiktoken's rule)
    special: dict[str, int]  # texts that stand for one id each, such as END_OF_TEXT
    pattern: str = "gpt4"  # a name in SPLIT_PATTERNS or a regular expression, which is what is kept

    def __post_init__(self):
        self.pattern = SPLIT_PATTERNS.get(self.pattern, self.pattern)
        self._split, self._special = splitter(self.pattern), special_regex(self.special)
        self._bytes = {id: token for id, token in enumerate(self.tokens) if token}
        self._ids = {token: id for id, token in self._bytes.items()}
        self._alphabet = [self._ids.get(bytes([byte])) for byte in range(256)]
        if None in self._alphabet:
            byte = self._alphabet.index(None)
            raise ValueError(f"byte 0x{byte:02x} has no token, so that some text has no ids")
        if len(self._ids) != len(self._bytes):
            raise ValueError("two ids have the same bytes")
        if self.merges is None:
            self._ranks, self._made = dict(self._splits()), range(len(self.tokens))
        else:
            self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
            self._made = [self._joined(pair) for pair in self.merges]
            if len(self._ranks) != len(self.merges):
                raise ValueError("a merge is listed twice")
        for text, id in self.special.items():
            clash = id in self._bytes or to_bytes(text) in self._ids
            if clash or not text or not text.isprintable():
                what = f"special token {short(text)} with id {id}"
                raise ValueError(f"{what} is empty, unprintable or clashes with another token")
            self._bytes[id] = text.encode()
        if min(self._bytes) < 0 or self.vocab_size > 2 * len(self._bytes) + 1024:
            raise ValueError(
                f"its ids from {min(self._bytes)} to {max(self._bytes)} are far more than its "
                f"{len(self._bytes)} tokens"
            )
        self._memory = Memory(self._encode_piece, CACHED_PIECES)

    def _joined(self, pair: Pair) -> int:
        left, right = (self._bytes.get(id) for id in pair)
        if left is None or right is None or left + right not in self._ids:
            raise ValueError(f"the merge of ids {pair} needs or makes a token that is not there")
        return self._ids[left + right]

    def _splits(self) -> Iterator[tuple[Pair, int]]:
        """Each token as two others, in every way there is: (pair, id)."""
        for id, token in enumerate(self.tokens):
            for cut in range(1, len(token)):
                left, right = self._ids.get(token[:cut]), self._ids.get(token[cut:])
                if left is not None and right is not None:
                    yield (left, right), id

    def __reduce__(self):  # for pickle: the fields rebuild the rest
        return BPE, (self.tokens, self.merges, self.special, self.pattern)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt4",
        special: Iterable[str] = (END_OF_TEXT,),
        progress: bool = False,
        tie: Tie = "lowest ids",
        processes: int = 0,
    ) -> Self:
        """Learn merges until there are vocab_size ids: bytes, then merges, then special tokens.

        Fewer if nothing is left to merge. No merge is learnt from or across a special token. Of
        equally common pairs the one of lowest ids is merged first, as in Hugging Face's tokenizers
        and rustbpe, or that of greatest bytes, as in subword-nmt and Stanford's CS336. Many texts
        are counted in several processes (0: one for each core).
        """
        special, room = cls._room(vocab_size, special)
        counts = count_pieces(texts, pattern, special, progress, processes)
        learnt = islice(learn_merges(counts, tie), room)
        tokens, merges = [bytes([byte]) for byte in range(256)], []
        for pair, _ in tqdm(learnt, "merge", room, disable=None if progress else True):
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            merges.append(pair)
        special_ids = {text: id for id, text in enumerate(special, len(tokens))}
        return cls(tokens, merges, special_ids, pattern)

    @staticmethod
    def _room(vocab_size: int, special: Iterable[str]) -> tuple[list[str], int]:
        """Special tokens, each once, and how many ids they and the bytes leave."""
        special = list(dict.fromkeys(special))
        room = vocab_size - 256 - len(special)
        if room < 0:
            raise ValueError(f"vocab_size must be {vocab_size - room} or more, not {vocab_size}")
        return special, room

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Differs where anything differs: a key for whatever is cached with these ids."""
        content = self.tokens, self.merges, sorted(self.special.items()), self.pattern
        return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()

    def encode(self, text: str, special: str = "text") -> list[int]:
        """text -> ids. What a special token inside the text means is for the caller to say.

        "text": its letters, like any others, so that no user can forge one · "ids": its id, the
        longest where several begin · "refuse": ValueError. A lone surrogate is a ValueError, too.
        """
        ids: list[int] = []
        for at, part in enumerate(self._parts(text, special)):  # ordinary and special in turn
            if at % 2:
                ids.append(self.special[part])
            else:
                ids.extend(chain.from_iterable(map(self._memory.__getitem__, self._split(part))))
        return ids

    def spans(self, text: str, special: str = "text") -> list[tuple[int, int]]:
        """For each token of `encode` the characters it stands for, text[start:end].

        A token that begins or ends inside of a character has all of that character.
        """
        character = [i for i, c in enumerate(text) for _ in range(len(c.encode()))]  # of each byte
        found, end = [], 0
        for id in self.encode(text, special):
            start, end = end, end + len(self._bytes[id])
            found.append((character[start], character[end - 1] + 1))
        return found

    def encode_iterable(self, texts: Iterable[str], special: str = "text") -> Iterator[int]:
        """The ids of the texts joined, while they come in: a stream may be larger than memory.

        It is cut only where the pattern has a border whatever follows (a pattern of your own has no
        place that is known to be one, so all of it waits) and where no special token is cut.
        """
        known = self.pattern in ASCII_PATTERNS
        tail = max(map(len, self.special), default=0) if special != "text" else 0
        waiting: list[str] = []
        size, enough = 0, BLOCK
        for text in texts:
            waiting.append(text)
            size += len(text)
            if size < enough or not known:
                continue
            text = "".join(waiting)
            cut = self._last_cut(text, tail)
            yield from self.encode(text[:cut], special)
            waiting, size = [text[cut:]], len(text) - cut
            enough = BLOCK + 2 * size  # where there is no cut, looking for one stays linear
        yield from self.encode("".join(waiting), special)

    def _last_cut(self, text: str, tail: int) -> int:
        """The last place where text may be cut though more follows; special tokens if tail > 0.

        One that might still grow beyond the text begins in its last `tail` characters.
        """
        found = LAST_CUT.search(text, 0, len(text) - tail) if tail < len(text) else None
        cut = found.start() if found else 0
        inside = (m.start() for m in self._special.finditer(text) if m.start() < cut < m.end())
        return next(inside, cut) if tail else cut

    def _encode_piece(self, piece: str) -> list[int]:
        data = piece.encode()
        if data in self._ids:  # as tiktoken has it, whether or not the merges lead there
            return [self._ids[data]]
        return self._merged(data)

    def _merged(self, data: bytes) -> list[int]:
        ids = [self._alphabet[byte] for byte in data]
        apply = apply_merges if len(ids) < LONG_PIECE else apply_merges_to_long
        return apply(ids, self._ranks, self._made)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join([self._bytes[id] for id in ids])
        except KeyError as error:
            raise ValueError(
                f"id {error} is not among the {self.vocab_size} of this vocabulary: decode with "
                "the tokenizer that encoded"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text. Bytes that are not UTF-8 (half a letter, say) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The same bit by bit: a letter comes out as soon as its last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            yield decoder.decode(self.decode_bytes([id]))
        yield decoder.decode(b"", final=True)

    def to_tiktoken(self, name: str = "handmade") -> tiktoken.Encoding:
        """The same vocabulary in tiktoken (Rust), whose `encode_ordinary` is the fast way in bulk.

        tiktoken knows no merges: of all neighbours it joins those whose result has the lowest id.
        """
        self._check_ranks()
        return tiktoken.Encoding(
            name, pat_str=self.pattern, mergeable_ranks=self._ids, special_tokens=self.special
        )

    def _check_ranks(self) -> None:
        """ValueError where the order of ids is not that of merges, or some pairs never merge."""
        made = list(self._made)
        learnt = len(set(made)) == len(self._ids) - 256
        if self.merges is not None and (
            made != sorted(made)
            or not (learnt or self._ranks.keys() == dict(self._splits()).keys())
        ):
            raise ValueError("the ids do not follow the order of the merges, as tiktoken needs")

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json, whole or not at all.

        Hugging Face reads patterns with Oniguruma: one of your own must be valid there, too. It
        knows no ids as ranks (merges = None): it gets every split of every token, in their order.
        """
        merges = self.merges
        if merges is None:
            merges = [pair for pair, _ in sorted(self._splits(), key=lambda split: split[::-1])]
        file = tokenizer_files.to_json(self.tokens, merges, self.special, self.pattern)
        write_whole(Path(path), json.dumps(file, ensure_ascii=False).encode())

    def save_ranks(self, path: str | Path) -> None:
        """Write a rank file for tiktoken, which holds neither the pattern nor special tokens."""
        self._check_ranks()
        write_whole(Path(path), tokenizer_files.to_ranks(self.tokens))

    @classmethod
    def load(
        cls, path: str | Path, pattern: str = "gpt4", special: dict[str, int] | None = None
    ) -> "BPE":
        """Read a tokenizer, ours or another's, or say why the ids would not be the same.

        path: a tokenizer.json; GPT-2's encoder.json or vocab.bpe, the other beside it; a rank file
        of tiktoken; or a folder with one of the first two. Only for a rank file, which does not
        tell: pattern, and special tokens (None: END_OF_TEXT behind the last id).
        All added tokens count as special. A post-processor, which surrounds the text, is ignored.
        """
        try:
            file = tokenizer_files.read(Path(path))
            if file.pattern is None:
                special = {END_OF_TEXT: len(file.tokens)} if special is None else special
                file = file._replace(pattern=pattern, special=special)
            bpe = cls(*file[:4])
            for id, token in enumerate(bpe.tokens if not file.whole else ()):
                if token and bpe._merged(token) != [id]:  # which must then not come out
                    raise ValueError(f"its merges do not lead to the token {short(token)}")
            return bpe
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be loaded as a byte-level BPE ({error}): choose another file, or "
                "write this one again with BPE.save"
            ) from None

    @classmethod
    def characters(
        cls, texts: Iterable[str], vocab_size: int, special: Iterable[str] = (END_OF_TEXT,)
    ) -> Self:
        """Each character is a token: the commonest of texts, by count; others are their bytes."""
        special, room = cls._room(vocab_size, special)
        counts = count_pieces(texts, CHARACTER, special)
        longer = [c for c in counts if len(c.encode()) > 1]
        longer.sort(key=lambda c: (-counts[c], c))
        tokens = [*(bytes([byte]) for byte in range(256)), *(c.encode() for c in longer[:room])]
        ids = {text: id for id, text in enumerate(special, len(tokens))}
        return cls(tokens, None, ids, CHARACTER)

    @classmethod  # the last method, because above this line `bytes` must mean the type
    def bytes(cls, special: Iterable[str] = (END_OF_TEXT,)) -> Self:
        """No merges: every byte is a token."""
        special = list(special)
        return cls.train([], 256 + len(set(special)), special=special)


# --- the idea, shown ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Learn a small vocabulary from Python's own manual, then show how it cuts a text."""

    text: str = "Tokenizers cut 12345 naïve sentences into strings that often occur."  # what to cut
    vocab_size: int = 2048  # bytes, merges and one special token
    pattern: str = "gpt4"  # which pieces no merge crosses: gpt2, gpt4 or a regular expression
    file: str = ""  # a tokenizer to cut with, instead of learning: tokenizer.json, GPT-2's files


def learn_from_manual(vocab_size: int, pattern: str) -> BPE:
    counts = count_pieces(topics.values(), pattern)
    print(f"Python's manual: {sum(counts.values()):,} pieces, {len(counts):,} different ones.")
    print("The first merges:\n\n  count    id  token")
    tokens = [bytes([byte]) for byte in range(256)]
    for (left, right), count in islice(learn_merges(counts), 12):
        tokens.append(tokens[left] + tokens[right])
        new, *parts = (tokens[id].decode(errors="replace") for id in (-1, left, right))
        print(f"{count:7,} {len(tokens) - 1:5}  {new!r:8} = {parts[0]!r} + {parts[1]!r}")
    return BPE.train(topics.values(), vocab_size, pattern)


def show_cut(bpe: BPE, text: str) -> None:
    ids = bpe.encode(text)
    size = f"{len(text)} characters, {len(text.encode())} bytes, {len(ids)} tokens"
    print(f"\n{text}\n\n{size}: {len(text) / max(1, len(ids)):.2f} characters per token.\n")
    print("     id  token          bytes")
    for id in ids:
        token = bpe.decode_bytes([id])
        print(f"{id:7}  {token.decode(errors='replace')!r:14} {token.hex(' ')}")


def main(settings: Settings) -> None:
    if settings.file:
        bpe = BPE.load(settings.file)
    else:
        bpe = learn_from_manual(settings.vocab_size, settings.pattern)
    show_cut(bpe, settings.text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (OSError, ValueError) as error:
        print(f"tokenizer.py: {error}", file=sys.stderr)
        sys.exit(2)
