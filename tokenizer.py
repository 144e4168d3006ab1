"""Tokenizers by hand: text <-> token ids. So far byte-level byte-pair encoding (BPE).

Idea: a model reads integers. BPE starts from the 256 bytes, so that no text is ever unknown, and
gives the commonest pair of neighbours an id of its own, again and again: `t h` becomes `th`, then
`th e` becomes `the`. To encode, the merges are replayed in the order in which they were learnt.
A regular expression first cuts the text into pieces (about a word and the blank before it). No
merge crosses a piece, so that training needs only the different pieces and their counts.

    count_pieces -> learn_merges -> BPE.encode, BPE.decode -> BPE.save, BPE.load (tokenizer.json)

`learn_obviously` and `apply_merges` are the definitions; `learn_merges` and `apply_merges_to_long`
give the same, fast.

Run: python tokenizer.py
     python tokenizer.py --text "How is this sentence cut?" --vocab-size 1024

Papers: Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016 (arXiv 1508.07909);
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (bytes, split pattern).
"""

import codecs
import hashlib
import heapq
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice, pairwise
from operator import add
from pathlib import Path
from pydoc_data.topics import topics
from reprlib import repr as short
from typing import Any, Self

import regex
import tiktoken
import tyro
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
LONG_PIECE = 100  # bytes; from here on a heap beats looking at every pair again
CACHED_PIECES = 1 << 18  # pieces whose ids are remembered

Pair = tuple[int, int]
Ranks = Mapping[Pair, tuple[int, int]]  # pair -> (rank: the lower merges first, id of the result)

# --- text -> pieces -------------------------------------------------------------------------------

# gpt2 stands as it was published; gpt4 cuts as tiktoken's cl100k does, in a spelling that Python's
# regex, Rust's fancy_regex (tiktoken) and Oniguruma (Hugging Face) read alike.
SPLIT_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}
# The same for ASCII text, where Python's own re can be used, which is twice as fast.
ASCII_PATTERNS = {
    SPLIT_PATTERNS["gpt2"]: r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+"
    r"|\s+(?!\S)|\s+",
    SPLIT_PATTERNS["gpt4"]: r"'(?i:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
    r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}


def splitter(pattern: str) -> Callable[[str], list[str]]:
    """A function text -> pieces, which joined are the text again; pattern is a name or a regex."""
    pattern = SPLIT_PATTERNS.get(pattern, pattern)
    try:
        everywhere = regex.compile(pattern)
    except (regex.error, ValueError, RecursionError) as error:
        raise ValueError(f"the split pattern {short(pattern)} is wrong: {error}") from None
    if everywhere.groups:
        raise ValueError(f"the split pattern {short(pattern)} captures: write (?:…) and not (…)")
    proven = pattern in ASCII_PATTERNS  # to leave nothing out
    in_ascii = re.compile(ASCII_PATTERNS.get(pattern, ""), re.ASCII)

    def split(text: str) -> list[str]:
        text.encode()  # a lone surrogate is a ValueError here, with its position
        pieces = (in_ascii if proven and text.isascii() else everywhere).findall(text)
        if not proven and sum(map(len, pieces)) != len(text):
            raise ValueError(f"the split pattern {short(pattern)} leaves out parts of the text")
        return pieces

    return split


def special_regex(special: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens, the longest first, so that it wins over another that it begins with."""
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def count_pieces(
    texts: Iterable[str], pattern: str = "gpt4", special: Sequence[str] = (), progress: bool = False
) -> Counter[str]:
    """How often each piece occurs; special tokens separate texts and are not counted."""
    if isinstance(texts, str):
        raise ValueError("texts must be several texts: write [text] for a single one")
    split, borders = splitter(pattern), special_regex(special)
    counts: Counter[str] = Counter()
    for text in tqdm(texts, "count pieces", unit=" texts", disable=None if progress else True):
        for part in borders.split(text)[::2]:  # the odd parts are the special tokens
            counts.update(split(part))
    return counts


# --- pieces -> merges -----------------------------------------------------------------------------


def pair_counts(words: Mapping[tuple[int, ...], int]) -> Counter[Pair]:
    """How often two ids are neighbours: {(1, 1, 1, 2): 5} -> {(1, 1): 10, (1, 2): 5}."""
    counts: Counter[Pair] = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times
    return counts


def merge(ids: Sequence[int], pair: Pair, new: int) -> tuple[int, ...]:
    """pair becomes new, from left to right: merge((1, 1, 1, 2), (1, 1), 9) -> (9, 1, 2)."""
    out, at = [], 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        out.append(new if found else ids[at])
        at += 2 if found else 1
    return tuple(out)


def learn_obviously(counts: Mapping[str, int]) -> Iterator[tuple[Pair, int]]:
    """The definition: count every pair, merge the commonest, repeat. Yields (pair, its count).

    Between equal counts the smallest (left id, right id) wins. No two merges give the same bytes:
    between borders that merges did not cross, equal bytes are always cut alike.
    """
    words = {tuple(piece.encode()): times for piece, times in counts.items()}
    new = 256
    while pairs := pair_counts(words):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        yield best, pairs[best]
        words = {merge(word, best, new): times for word, times in words.items()}
        new += 1


def learn_merges(counts: Mapping[str, int]) -> Iterator[tuple[Pair, int]]:
    """The same as `learn_obviously`, but only the words that hold the pair are touched.

    A word is a string whose characters are token ids, chr(id): a merge is then str.replace, and the
    tie rule is the order of strings. The heap is lazy: the count of an old pair can only fall (a
    pair that gains holds the new token), so a stale entry is put right when it comes up.
    """
    words = [piece.encode().decode("latin-1") for piece in counts]  # byte b -> chr(b)
    times = list(counts.values())
    pairs: defaultdict[str, int] = defaultdict(int)
    where: defaultdict[str, list[int]] = defaultdict(list)  # pair -> words that held it once
    for index, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pairs[pair] += times[index]
            where[pair].append(index)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    new = chr(256)
    while heap:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        yield (ord(pair[0]), ord(pair[1])), -count
        gained = set()
        for index in where.pop(pair):
            parts = words[index].split(pair)
            words[index] = new.join(parts)
            for old_pair, new_pair in seams(parts, pair, new):
                pairs[old_pair] -= times[index]
                pairs[new_pair] += times[index]
                where[new_pair].append(index)
                gained.add(new_pair)
        for new_pair in gained:
            heapq.heappush(heap, (-pairs[new_pair], new_pair))
        new = chr(ord(new) + 1)


def seams(parts: list[str], pair: str, new: str) -> Iterator[tuple[str, str]]:
    """Old and new pairs beside a merged pair: x|ab|y -> xa xN, by Ny. parts = word.split(pair).

    Two merged pairs side by side share one seam: ab|ab -> ba NN. Pairs are counted in windows, as
    in `pair_counts`: "aa" twice in "aaa", of which the seam aa|a -> aa Na takes one away.
    """
    last = len(parts) - 1
    for at, part in enumerate(parts):
        if part:
            if at > 0:
                yield pair[1] + part[0], new + part[0]
            if at < last:
                yield part[-1] + pair[0], part[-1] + new
        elif 0 < at < last:
            yield pair[1] + pair[0], new + new


# --- merges -> ids of a piece ---------------------------------------------------------------------


def apply_merges(ids: list[int], ranks: Ranks) -> list[int]:
    """Merge the pair of lowest rank, and of these the leftmost, until no pair has a rank."""
    none = (math.inf, -1)
    while len(ids) > 1:
        found = [ranks.get(pair, none) for pair in pairwise(ids)]
        best = min(found)
        if best is none:
            break
        at = found.index(best)
        ids = [*ids[:at], best[1], *ids[at + 2 :]]
    return ids


def apply_merges_to_long(ids: list[int], ranks: Ranks) -> list[int]:
    """The same in O(n log n): a linked list of ids, and a heap of (rank, place)."""
    n = len(ids)
    ids = [*ids, None]  # None, the end and whatever was swallowed, is in no pair with a rank
    before, after = [*range(-1, n)], [*range(1, n + 1), n]
    heap: list[tuple[int, int]] = []

    def offer(at: int) -> None:
        if found := ranks.get((ids[at], ids[after[at]])):
            heapq.heappush(heap, (found[0], at))

    for at in range(n):
        offer(at)
    while heap:
        rank, at = heapq.heappop(heap)
        swallowed = after[at]
        found = ranks.get((ids[at], ids[swallowed]))
        if not found or found[0] != rank:
            continue  # the pair that was offered is gone
        ids[at], ids[swallowed] = found[1], None
        after[at] = after[swallowed]
        before[after[at]] = at
        offer(at)
        offer(before[at])  # place -1 before the first is the None at the end
    return [id for id in ids if id is not None]


# --- the tokenizer --------------------------------------------------------------------------------


@dataclass
class BPE:
    """A byte-level BPE vocabulary; everything else is derived from these four fields.

    Ids run from 0 without a gap, in any order: bytes need not come first, nor merges by rank.
    """

    tokens: list[bytes]  # id -> its bytes; b"" where the id belongs to a special token
    merges: list[Pair]  # in rank order: what was learnt first is merged first
    special: dict[str, int]  # texts that stand for one id each, such as END_OF_TEXT
    pattern: str = "gpt4"  # a name in SPLIT_PATTERNS or a regular expression, which is what is kept

    def __post_init__(self):
        self.pattern = SPLIT_PATTERNS.get(self.pattern, self.pattern)
        self._split, self._special = splitter(self.pattern), special_regex(self.special)
        self._bytes = {id: token for id, token in enumerate(self.tokens) if token}
        self._ids = {token: id for id, token in self._bytes.items()}
        for byte in range(256):
            if bytes([byte]) not in self._ids:
                raise ValueError(f"byte 0x{byte:02x} has no token, so that some text has no ids")
        if len(self._ids) != len(self._bytes):
            raise ValueError("two ids have the same bytes")
        self._ranks = {pair: (rank, self._made(pair)) for rank, pair in enumerate(self.merges)}
        if len(self._ranks) != len(self.merges):
            raise ValueError("a merge is listed twice")
        for text, id in self.special.items():
            clash = id in self._bytes or to_bytes(text) in self._ids
            if clash or not text or not text.isprintable():
                what = f"special token {short(text)} with id {id}"
                raise ValueError(f"{what} is empty, unprintable or clashes with another token")
            self._bytes[id] = text.encode()
        if self._bytes.keys() != set(range(self.vocab_size)):
            raise ValueError(f"its {self.vocab_size} ids do not run from 0 without a gap")
        self._cached_piece = lru_cache(CACHED_PIECES)(self._encode_piece)

    def _made(self, pair: Pair) -> int:
        left, right = (self._bytes.get(id) for id in pair)
        if left is None or right is None or left + right not in self._ids:
            raise ValueError(f"the merge of ids {pair} needs or makes a token that is not there")
        return self._ids[left + right]

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
    ) -> Self:
        """Learn merges until there are vocab_size ids: bytes, then merges, then special tokens.

        Fewer if nothing is left to merge. No merge is learnt from or across a special token.
        """
        special = list(dict.fromkeys(special))
        room = vocab_size - 256 - len(special)
        if room < 0:
            raise ValueError(f"vocab_size must be {vocab_size - room} or more, not {vocab_size}")
        learnt = islice(learn_merges(count_pieces(texts, pattern, special, progress)), room)
        tokens, merges = [bytes([byte]) for byte in range(256)], []
        for pair, _ in tqdm(learnt, "merge", room, disable=None if progress else True):
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            merges.append(pair)
        special_ids = {text: id for id, text in enumerate(special, len(tokens))}
        return cls(tokens, merges, special_ids, pattern)

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def end_of_text(self) -> int:
        """The id that stands between documents."""
        if END_OF_TEXT not in self.special:
            raise ValueError(f"this tokenizer has no {END_OF_TEXT}: list it among the special ones")
        return self.special[END_OF_TEXT]

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
        if special not in ("text", "ids", "refuse"):
            raise ValueError(f'special must be "text", "ids" or "refuse", not {special!r}')
        parts = [text] if special == "text" else self._special.split(text)
        if special == "refuse" and len(parts) > 1:
            what = f"the text contains the special token {parts[1]!r}"
            raise ValueError(f'{what}: remove it, or choose special="text" or special="ids"')
        ids: list[int] = []
        for at, part in enumerate(parts):  # ordinary and special in turn
            if at % 2:
                ids.append(self.special[part])
            else:
                ids.extend(chain.from_iterable(map(self._cached_piece, self._split(part))))
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        data = piece.encode()
        if data in self._ids:  # as tiktoken has it, whether or not the merges lead there
            return [self._ids[data]]
        return self._merged(data)

    def _merged(self, data: bytes) -> list[int]:
        ids = [self._ids[bytes([byte])] for byte in data]
        return (apply_merges if len(ids) < LONG_PIECE else apply_merges_to_long)(ids, self._ranks)

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
        made = [new for _, new in self._ranks.values()]
        if made != sorted(made) or len(set(made)) != len(self._ids) - 256:
            raise ValueError("the ids do not follow the order of the merges, as tiktoken needs")
        return tiktoken.Encoding(
            name, pat_str=self.pattern, mergeable_ranks=self._ids, special_tokens=self.special
        )

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json, whole or not at all.

        Hugging Face reads patterns with Oniguruma: one of your own must be valid there, too.
        """
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(to_json(self), ensure_ascii=False), "utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "BPE":
        """Read a tokenizer.json, ours or Hugging Face's, or say why the ids would not be the same.

        All added tokens count as special. A post-processor, which surrounds the text, is ignored.
        """
        try:
            return from_json(json.loads(Path(path).read_bytes()))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be loaded as the tokenizer.json of a byte-level BPE ({error}): "
                "choose another file, or write this one again with BPE.save"
            ) from None

    @classmethod  # the last method, because above this line `bytes` must mean the type
    def bytes(cls, special: Iterable[str] = (END_OF_TEXT,)) -> Self:
        """No merges: every byte is a token."""
        special = list(special)
        return cls.train([], 256 + len(set(special)), special=special)


# --- tokenizer.json -------------------------------------------------------------------------------


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: its own if it has one, else U+0100 and on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
UNLIKE_OURS = ("normalizer", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def to_chars(token: bytes) -> str:
    """to_chars(b" the") is "Ġthe"."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def to_bytes(chars: str) -> bytes | None:
    """to_bytes("Ġthe") is b" the", and None if some character stands for no byte."""
    return bytes(map(CHAR_TO_BYTE.get, chars)) if CHAR_TO_BYTE.keys() >= set(chars) else None


def to_json(bpe: BPE) -> dict[str, Any]:
    """What Hugging Face's `tokenizers` reads as the same tokenizer."""
    chars = [to_chars(token) for token in bpe.tokens]
    split = {"type": "Split", "pattern": {"Regex": bpe.pattern}, "behavior": "Isolated"}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | {"invert": False}, as_bytes | {"use_regex": False}]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": text, "special": True} | plain
            for text, id in sorted(bpe.special.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": as_bytes | {"use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token is that token
            "vocab": {token: id for id, token in enumerate(chars) if token} | bpe.special,
            "merges": [[chars[left], chars[right]] for left, right in bpe.merges],
        },
    }


def from_json(file: Any) -> BPE:
    """The tokenizer that a tokenizer.json describes; ValueError if it is not one like ours."""
    match file:
        case {"model": dict(model), "added_tokens": list(added), "pre_tokenizer": dict(steps)}:
            vocab, merges = model.get("vocab"), model.get("merges")
        case _:
            raise ValueError("it has no model, no added_tokens or no pre_tokenizer")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("its model has no vocab or no merges")
    if model.get("type", "BPE") != "BPE":
        raise ValueError("its model is not BPE")
    for key in UNLIKE_OURS:
        if model.get(key) or file.get(key):
            raise ValueError(f"it has a {key}, which changes the ids")
    special = dict(map(read_special, added))
    if len(special) != len(added):
        raise ValueError("an added token is listed twice")
    ordinary = {text: id for text, id in vocab.items() if special.get(text) != id}
    tokens = read_tokens(ordinary, special)
    bpe = BPE(tokens, [read_merge(pair, vocab) for pair in merges], special, read_pattern(steps))
    if not model.get("ignore_merges"):  # then a token that no merges reach must not come out
        for id, token in enumerate(tokens):
            if token and bpe._merged(token) != [id]:
                raise ValueError(f"its merges do not lead to the token {short(token)}")
    return bpe


def read_special(added: Any) -> tuple[str, int]:
    match added:
        case {"content": str(text), "id": int(id), **flags}:
            if not any(flags.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                return text, id
    raise ValueError(f"the added token {short(added)} is not a text with its id and nothing more")


def read_tokens(vocab: dict[str, Any], special: dict[str, int]) -> list[bytes]:
    """text -> id becomes id -> bytes, with b"" where a special token has the id."""
    by_id = {id: to_bytes(text) for text, id in vocab.items() if isinstance(id, int)}
    tokens = [by_id.get(id) or b"" for id in range(len(vocab) + len(special))]
    if sum(map(bool, tokens)) != len(vocab):
        raise ValueError("the ids of its vocab have gaps or doubles, or a token is not in bytes")
    while tokens and not tokens[-1]:
        tokens.pop()
    return tokens


def read_merge(pair: Any, vocab: dict[str, int]) -> Pair:
    match pair.split(" ") if isinstance(pair, str) else pair:
        case [str(left), str(right)] if left in vocab and right in vocab:
            return vocab[left], vocab[right]
    raise ValueError(f"the merge {short(pair)} does not name two tokens of the vocab")


def read_pattern(steps: dict[str, Any]) -> str:
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **level}]:
            if level.get("use_regex", True):
                return "gpt2"
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", **more},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            if not more.get("invert"):
                return pattern
    raise ValueError("its pre_tokenizer is neither GPT-2's ByteLevel nor Split, then ByteLevel")


# --- the idea, shown ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Learn a small vocabulary from Python's own manual, then show how it cuts a text."""

    text: str = "Tokenizers cut 12345 naïve sentences into strings that often occur."  # what to cut
    vocab_size: int = 2048  # bytes, merges and one special token
    pattern: str = "gpt4"  # which pieces no merge crosses: gpt2, gpt4 or a regular expression
    file: str = ""  # a tokenizer.json to cut with, instead of learning


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
