"""What all tokenizers do alike: special tokens in a text, memory for pieces, many texts at once.

Idea: a special token stands for one id and is no text. Whether its letters inside a text mean it is
for the caller to say, or any user could forge one. And of all pieces that a text is cut into most
have come before, so that their ids need not be found again.

Run: python -m pytest tests/test_tokenizer.py
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator

from processes import in_processes

END_OF_TEXT = "<|endoftext|>"
LONG_PIECE = 100  # characters; longer ones hardly come twice
CACHED_PIECES = 1 << 16  # pieces whose ids are remembered: some 10 MB


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


class Tokenizer:
    """A subclass has `special`, text -> id, its `special_regex` as `_special`, and `encode`."""

    special: dict[str, int]
    _special: re.Pattern[str]

    @property
    def end_of_text(self) -> int:
        """The id that stands between documents."""
        if END_OF_TEXT not in self.special:
            raise ValueError(f"this tokenizer has no {END_OF_TEXT}: list it among the special ones")
        return self.special[END_OF_TEXT]

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
