"""Byte-level byte-pair encoding (BPE) by hand: text <-> token ids, as in GPT-2 and Llama 3.

Idea: a model reads integers. BPE starts from the 256 bytes, so that no text is ever unknown, and
gives the commonest pair of neighbours an id of its own, again and again: `t h` becomes `th`, then
`th e` becomes `the`. To encode, the merges are replayed in the order in which they were learnt.
A regular expression first cuts the text into pieces (about a word and the blank before it). No
merge crosses a piece, so that training needs only the different pieces and their counts.

    count_pieces -> learn_merges -> BPE.encode, BPE.decode -> BPE.save, BPE.load

Merges are learnt and applied in merges.py.

Run: python -m pytest tests/test_tokenizer.py

Papers: Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016 (arXiv 1508.07909);
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (bytes, split pattern).
"""

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import Self

import tiktoken

import tokenizer_files
from merges import Tie, apply_merges, apply_merges_to_long, learn_merges
from pieces import ASCII_PATTERNS, LAST_CUT, SPLIT_PATTERNS, splitter
from run import write_whole
from tokenizer_files import Pair, to_bytes
from vocabulary import (
    CACHED_PIECES,
    END_OF_TEXT,
    LONG_PIECE,
    Memory,
    Span,
    Tokenizer,
    counted,
    loading,
    room_for,
    up_to,
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
    split = splitter(pattern)

    def cut(parts: Iterable[str]) -> Counter[str]:
        return Counter(chain.from_iterable(map(split, parts)))

    return counted(texts, cut, special, progress, processes)


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
        self._split = splitter(self.pattern)
        self._set_tokens(self.tokens)
        self._alphabet = [self._ids.get(bytes([byte])) for byte in range(256)]
        if None in self._alphabet:
            byte = self._alphabet.index(None)
            raise ValueError(f"byte 0x{byte:02x} has no token, so that some text has no ids")
        if self.merges is None:
            self._ranks, self._made = dict(self._splits()), range(len(self.tokens))
        else:
            self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
            self._made = [self._joined(pair) for pair in self.merges]
            if len(self._ranks) != len(self.merges):
                raise ValueError("a merge is listed twice")
        self._add_special(to_bytes)
        self._tokens |= {id: text.encode() for text, id in self.special.items()}
        self._memory = Memory(self._encode_piece, CACHED_PIECES)

    def _joined(self, pair: Pair) -> int:
        left, right = (self._tokens.get(id) for id in pair)
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
        special = list(dict.fromkeys(special))
        room = room_for(vocab_size, 256 + len(special))
        counts = count_pieces(texts, pattern, special, progress, processes)
        tokens, merges = [bytes([byte]) for byte in range(256)], []
        for pair, _ in up_to(room, learn_merges(counts, tie), progress):
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            merges.append(pair)
        special_ids = {text: id for id, text in enumerate(special, len(tokens))}
        return cls(tokens, merges, special_ids, pattern)

    def _encode(self, text: str) -> Iterable[int]:
        return chain.from_iterable(map(self._memory.__getitem__, self._split(text)))

    def _spans(self, text: str) -> Iterable[Span]:
        """A token that begins or ends inside of a character has all of that character."""
        character = [i for i, c in enumerate(text) for _ in range(len(c.encode()))]  # of each byte
        end = 0
        for id in self._encode(text):
            start, end = end, end + len(self._tokens[id])
            yield character[start], character[end - 1] + 1

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
        return b"".join(map(self.token, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text. Bytes that are not UTF-8 (half a letter, say) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The same bit by bit: a letter comes out as soon as its last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            yield decoder.decode(self.token(id))
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
    ) -> Self:
        """Read a tokenizer, ours or another's, or say why the ids would not be the same.

        path: a tokenizer.json; GPT-2's encoder.json or vocab.bpe, the other beside it; a rank file
        of tiktoken; or a folder with one of the first two. Only for a rank file, which does not
        tell: pattern, and special tokens (None: END_OF_TEXT behind the last id).
        All added tokens count as special. A post-processor, which surrounds the text, is ignored.
        """
        with loading(path, cls.__name__):
            file = tokenizer_files.read(Path(path))
            if file.pattern is None:
                special = {END_OF_TEXT: len(file.tokens)} if special is None else special
                file = file._replace(pattern=pattern, special=special)
            bpe = cls(*file[:4])
            for id, token in enumerate(bpe.tokens if not file.whole else ()):
                if token and bpe._merged(token) != [id]:  # which must then not come out
                    raise ValueError(f"its merges do not lead to the token {short(token)}")
            return bpe

    @classmethod
    def characters(
        cls, texts: Iterable[str], vocab_size: int, special: Iterable[str] = (END_OF_TEXT,)
    ) -> Self:
        """Each character is a token: the commonest of texts, by count; others are their bytes."""
        special = list(dict.fromkeys(special))
        room = room_for(vocab_size, 256 + len(special))
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
