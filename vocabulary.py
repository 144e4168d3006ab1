"""What all tokenizers do alike: the interface, special tokens, memory for pieces, many texts.

Idea: a special token stands for one id and is no text. Whether its letters inside a text mean it is
for the caller to say, or any user could forge one. And of all pieces that a text is cut into most
have come before, so that their ids need not be found again.

    train -> encode, encode_batch, spans -> decode, decode_stream -> save, load

Run: python -m pytest tests/test_tokenizers.py
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Any, Self

from tqdm import tqdm

from processes import in_processes

END_OF_TEXT = "<|endoftext|>"
LONG_PIECE = 100  # characters; longer ones hardly come twice
CACHED_PIECES = 1 << 16  # pieces whose ids are remembered: some 10 MB
MOST_LEARNT = 1_000_000  # ids; while they are learnt each is a character, of which there are more

Token = str | bytes
Span = tuple[int, int]  # where a part of a text begins and ends, in characters


def special_regex(special: Iterable[str]) -> re.Pattern[str]:
    """Finds special tokens, the longest first, so that it wins over another that it begins with."""
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


class Memory(dict):
    """piece -> ids, made when first asked for; what was not asked for long is forgotten.

    Tuples, for Python's garbage collector soon knows that it need not look into them again.
    """

    def __init__(self, make: Callable[[str], list[int]], room: int):
        self.make, self.half, self.old = make, room // 2, {}

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = self.old.get(piece) or tuple(self.make(piece))
        if len(piece) < LONG_PIECE:
            if len(self) >= self.half:
                self.old = self.copy()
                self.clear()
            self[piece] = ids
        return ids


# --- training -------------------------------------------------------------------------------------


def counted(
    texts: Iterable[str],
    cut: Callable[[Iterable[str]], Counter[str]],
    special: Iterable[str] = (),
    progress: bool = False,
    processes: int = 0,
) -> Counter[str]:
    """How often each piece occurs, as `cut` counts them in parts of texts.

    Special tokens separate parts and are not counted. Many texts go to several processes (0: one
    for each core).
    """
    if isinstance(texts, str):
        raise ValueError("texts must be several texts: write [text] for a single one")
    borders = special_regex(special)

    def count_group(texts: list[str]) -> Counter[str]:
        for text in texts:
            text.encode()  # a lone surrogate is a ValueError here, with its position
        return cut(part for text in texts for part in borders.split(text)[::2])

    texts = tqdm(texts, "count", unit=" texts", disable=None if progress else True)
    total: Counter[str] = Counter()
    for counts in in_processes(count_group, texts, processes):
        total.update(counts)
    return total


def room_for(vocab_size: int, fixed: int) -> int:
    """How many ids are left to learn beside those that are fixed."""
    if vocab_size < fixed:
        raise ValueError(f"vocab_size must be {fixed} or more, not {vocab_size}")
    return min(vocab_size - fixed, MOST_LEARNT)


def up_to(room: int, learnt: Iterator[Any], progress: bool) -> Iterator[Any]:
    """As many of what is learnt as there is room for, with a bar."""
    return tqdm(islice(learnt, room), "merge", room, disable=None if progress else True)


# --- the interface --------------------------------------------------------------------------------


@contextmanager
def loading(path: Path, kind: str) -> Iterator[None]:
    """What makes a file unreadable becomes one sentence."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be loaded as {kind} ({error}): choose another file, or write this one "
            f"again with {kind}.save"
        ) from None


class Tokenizer:
    """text <-> ids. A kind of tokenizer is a dataclass whose fields tell everything.

    It sets what stands here without a value, and has the methods that raise NotImplementedError.
    """

    special: dict[str, int]  # texts that stand for one id each, such as END_OF_TEXT
    unknown_id: int | None = None  # of what has no other; None: every text has ids of its own
    file_name = "tokenizer.json"  # what `save` writes is mostly called so
    _tokens: dict[int, Token]  # id -> what it stands for, special tokens too
    _special: re.Pattern[str]  # finds them

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special: Iterable[str] = (END_OF_TEXT,),
        progress: bool = False,
        processes: int = 0,
    ) -> Self:
        """Learn from texts until there are vocab_size ids, or fewer if nothing is left to learn.

        Nothing is learnt from or across a special token. Many texts are counted in several
        processes (0: one for each core).
        """
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer, ours or another's, or say why the ids would not be the same."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write a file that other programs read as the same tokenizer, whole or not at all."""
        raise NotImplementedError

    def _encode(self, text: str) -> Iterable[int]:
        """The ids of a text in which nothing is special."""
        raise NotImplementedError

    def _spans(self, text: str) -> Iterable[Span]:
        """For each of these the part of the text that it stands for."""
        raise NotImplementedError

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """ids -> text bit by bit: a letter comes out as soon as nothing can change it any more."""
        raise NotImplementedError

    # --- from these follows:

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text."""
        return "".join(self.decode_stream(ids))

    def encode(self, text: str, special: str = "text") -> list[int]:
        """text -> ids. What a special token inside the text means is for the caller to say.

        "text": its letters, like any others, so that no user can forge one · "ids": its id, the
        longest where several begin · "refuse": ValueError. A lone surrogate is a ValueError, too.
        """
        ids: list[int] = []
        for at, part in enumerate(self._parts(text, special)):
            if at % 2:
                ids.append(self.special[part])
            else:
                ids.extend(self._encode(part))
        return ids

    def spans(self, text: str, special: str = "text") -> list[Span]:
        """For each token of `encode` the characters it stands for, text[start:end]."""
        found, start = [], 0
        for at, part in enumerate(self._parts(text, special)):
            spans = [(0, len(part))] if at % 2 else self._spans(part)
            found += [(start + begin, start + end) for begin, end in spans]
            start += len(part)
        return found

    def _parts(self, text: str, special: str) -> list[str]:
        """Ordinary text and special tokens in turn, if `special` is "ids"; see `encode`."""
        if special not in ("text", "ids", "refuse"):
            raise ValueError(f'special must be "text", "ids" or "refuse", not {special!r}')
        text.encode()  # a lone surrogate is a ValueError here, with its position
        parts = [text] if special == "text" else self._special.split(text)
        if special == "refuse" and len(parts) > 1:
            what = f"the text contains the special token {parts[1]!r}"
            raise ValueError(f'{what}: remove it, or choose special="text" or special="ids"')
        return parts

    def encode_batch(
        self, texts: Iterable[str], special: str = "text", processes: int = 0
    ) -> Iterator[list[int]]:
        """`encode` of each text, in order, in several processes (0: one for each core)."""

        def encode(texts: list[str]) -> list[array]:  # one is a block of memory: sent as it is
            return [array("I", self.encode(text, special)) for text in texts]

        for group in in_processes(encode, texts, processes):
            yield from (ids.tolist() for ids in group)

    # --- the vocabulary

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokens, default=-1) + 1

    @property
    def known_ids(self) -> set[int]:
        """The ids that stand for something: a vocabulary may have gaps."""
        return {*self._tokens}

    @property
    def end_of_text(self) -> int:
        """The id that stands between documents."""
        if END_OF_TEXT not in self.special:
            raise ValueError(f"this tokenizer has no {END_OF_TEXT}: list it among the special ones")
        return self.special[END_OF_TEXT]

    def token(self, id: int) -> Token:
        """What an id stands for, as the vocabulary has it."""
        try:
            return self._tokens[id]
        except KeyError:
            raise ValueError(
                f"id {id} is not among the {self.vocab_size} of this vocabulary: decode with the "
                "tokenizer that encoded"
            ) from None

    @cached_property
    def fingerprint(self) -> str:
        """Differs where anything differs: a key for whatever is cached with these ids."""
        content = tuple(sorted(x.items()) if isinstance(x, dict) else x for x in self._values())
        return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()

    def __reduce__(self):  # for pickle: the fields rebuild the rest
        return type(self), self._values()

    def _values(self) -> tuple:
        return tuple(getattr(self, f.name) for f in fields(self))

    def _set_tokens(self, tokens: list[Token]) -> None:
        """id -> token, and back; an empty one belongs to a special token or to none."""
        self._tokens = {id: token for id, token in enumerate(tokens) if token}
        self._ids = {token: id for id, token in self._tokens.items()}
        if len(self._ids) != len(self._tokens):
            raise ValueError("two ids have the same token")

    def _add_special(self, in_file: Callable[[str], Token | None]) -> None:
        """Special tokens join the others; in_file: what a file would take their text for."""
        for text, id in self.special.items():
            clash = id < 0 or id in self._tokens or in_file(text) in self._ids
            if clash or not text or not text.isprintable():
                what = f"special token {short(text)} with id {id}"
                raise ValueError(f"{what} is empty, unprintable or clashes with another token")
            self._tokens[id] = text
        if self.vocab_size > 2 * len(self._tokens) + 1024:
            many = f"far more than its {len(self._tokens)} tokens"
            raise ValueError(f"its ids up to {self.vocab_size - 1} are {many}")
        self._special = special_regex(self.special)
