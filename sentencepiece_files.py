"""SentencePiece's .model files: a protocol buffer and a double-array trie, by hand.

Idea: a protocol buffer is a list of (number, value) pairs, where a value is an integer of as many
bytes as it needs, four bytes, or a string, in which another message may stand. A reader passes over
numbers that it does not know, so that old programs read new files.

    ModelProto = pieces (text, score, kind) + trainer's settings + normalizer's settings

A normalizer is a list of replacements, the longest that fits first. SentencePiece keeps their keys
in a trie that is two arrays in one: the child of a node by a byte stands at (the node's base XOR
the byte) and carries that byte, so that a step costs one look.

Run: python -m pytest tests/test_unigram.py

Papers: Kudo and Richardson 2018, "SentencePiece" (arXiv 1808.06226); Aoe 1989, "An Efficient
Digital Search Algorithm by Using a Double-Array Structure"; the layout is that of darts-clone.
"""

import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cache
from itertools import groupby
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

# --- protocol buffers -----------------------------------------------------------------------------

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of values on the wire


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, and a high bit where more follow: (value, place)."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            break
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise ValueError("it is cut off or damaged: a number has no end")


def read_fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(number, kind, value) of each field of a message; strings are views, which cost nothing."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = read_varint(data, at)
        else:
            if kind == BYTES:
                size, at = read_varint(data, at)
            elif kind in (FIXED32, FIXED64):
                size = 4 if kind == FIXED32 else 8
            else:
                raise ValueError(f"it is damaged: its field {number} is of no known kind")
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError(f"it is cut off or damaged: its field {number} has no end")
        yield number, kind, value


def write_varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number is written as a huge one
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def write_field(number: int, value: int | float | str | bytes) -> bytes:
    """An int or bool as a varint, a float in four bytes, text and bytes with their length."""
    if isinstance(value, int):
        return write_varint(number << 3 | VARINT) + write_varint(value)
    if isinstance(value, float):
        return write_varint(number << 3 | FIXED32) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return write_varint(number << 3 | BYTES) + write_varint(len(value)) + value


def converted(kind: int, value: Any, like: Any, name: str) -> Any:
    """A value of the wire as the type of `like`."""
    match like, kind:
        case bool(), 0:
            return bool(value)
        case int(), 0:
            return value - (1 << 64) if value >> 63 else value
        case float(), 5:
            return struct.unpack("<f", value)[0]
        case str(), 2:
            return str(value, "utf-8")
        case bytes(), 2:
            return bytes(value)
    raise ValueError(f"it is damaged: {name} is of another type")


# --- the messages ---------------------------------------------------------------------------------


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2  # stands for whatever has no piece
    CONTROL = 3  # never comes from a text, such as the end of one
    USER_DEFINED = 4  # always cut out whole, and not normalized
    UNUSED = 5  # comes out of no text
    BYTE = 6  # "<0x41>", a byte of a character that has no piece


class Piece(NamedTuple):
    text: str
    score: float = 0.0  # log-probability in a unigram model, -rank in BPE; a float32
    kind: Kind = Kind.NORMAL


def at(number: int, default: Any) -> Any:
    """A field of a message: its number on the wire and what holds where it is not written."""
    return field(default=default, metadata={"number": number})


@dataclass
class Trainer:
    """The part of SentencePiece's TrainerSpec that says how to cut."""

    model_type: int = at(3, 1)  # a key of MODEL_TYPES
    vocab_size: int = at(4, 8000)
    treat_whitespace_as_suffix: bool = at(24, False)
    byte_fallback: bool = at(35, False)
    unk_id: int = at(40, 0)
    bos_id: int = at(41, 1)
    eos_id: int = at(42, 2)
    pad_id: int = at(43, -1)
    unk_surface: str = at(44, " \u2047 ")  # what an unknown token is decoded to
    unk_piece: str = at(45, "<unk>")
    bos_piece: str = at(46, "<s>")
    eos_piece: str = at(47, "</s>")
    pad_piece: str = at(48, "<pad>")


@dataclass
class Normalizer:
    """NormalizerSpec: what happens to a text before it is cut."""

    name: str = at(1, "identity")
    charsmap: bytes = at(2, b"")  # the replacements, as `Charsmap` reads them
    add_dummy_prefix: bool = at(3, True)  # a blank before the first word, as before the others
    remove_extra_whitespaces: bool = at(4, True)  # at both ends, and all but one in the middle
    escape_whitespaces: bool = at(5, True)  # a blank becomes ▁, so that pieces are easily read


class Model(NamedTuple):
    """What a .model file says."""

    pieces: list[Piece]
    trainer: Trainer
    normalizer: Normalizer


MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5  # fields of ModelProto


def read_message(data: memoryview, kind: type) -> Any:
    """A Trainer or Normalizer; of a field that is written twice the last holds."""
    known = {f.metadata["number"]: f for f in fields(kind)}
    values = {}
    for number, wire, value in read_fields(data):
        if (f := known.get(number)) is not None:
            values[f.name] = converted(wire, value, f.default, f.name)
    return kind(**values)


def write_message(message: Trainer | Normalizer) -> bytes:
    parts = [(f.metadata["number"], getattr(message, f.name)) for f in fields(message)]
    return b"".join(write_field(number, value) for number, value in parts)


def read_piece(data: memoryview) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, wire, value in read_fields(data):
        match number:
            case 1:
                text = converted(wire, value, "", "a piece's text")
            case 2:
                score = converted(wire, value, 0.0, "a piece's score")
            case 3:
                kind = converted(wire, value, 0, "a piece's kind")
    if not text or score - score != 0 or kind not in set(Kind):
        raise ValueError(f"its piece {short(text)} is empty, has no finite score or no known kind")
    return Piece(text, score, Kind(kind))


def read_model(data: bytes) -> Model:
    """A .model file as data, or a ValueError that says why it is none."""
    messages = {TRAINER: b"", NORMALIZER: b"", DENORMALIZER: b""}
    pieces = []
    for number, wire, value in read_fields(memoryview(data)):
        if number == PIECES or number in messages:
            if wire != BYTES:
                raise ValueError(f"it is damaged: its field {number} is no message")
            if number == PIECES:
                pieces.append(read_piece(value))
            else:
                messages[number] += value  # of two messages the fields are joined
    if not pieces:
        raise ValueError("it has no pieces")
    trainer = read_message(memoryview(messages[TRAINER]), Trainer)
    normalizer = read_message(memoryview(messages[NORMALIZER]), Normalizer)
    if read_message(memoryview(messages[DENORMALIZER]), Normalizer).charsmap:
        raise ValueError("it has a denormalizer, which changes what is decoded")
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("its blanks end words (treat_whitespace_as_suffix)")
    return Model(pieces, trainer, normalizer)


def write_model(model: Model) -> bytes:
    """A .model file that sentencepiece reads."""
    out = []
    for text, score, kind in model.pieces:
        piece = write_field(1, text) + write_field(2, float(score)) + write_field(3, int(kind))
        out.append(write_field(PIECES, piece))
    out.append(write_field(TRAINER, write_message(model.trainer)))
    out.append(write_field(NORMALIZER, write_message(model.normalizer)))
    return b"".join(out)


# --- replacements: a double-array trie, then the strings ------------------------------------------

LEAF = 1 << 31  # a unit that is a value and no node
BLOCK = 256  # a base and all its children lie in one block
OPEN_BLOCKS = 16  # the last ones, in whose gaps nodes are still put
LARGEST = 1 << 21  # units whose distance needs no second format
MOST_WAYS = 1 << 16  # through a trie's first two characters; nmt_nfkc has 21,000
BYTES_OF_KEYS = np.arange(1, 256, dtype=np.uint32)


class Charsmap:
    """The replacements of a precompiled_charsmap: the trie's size, the trie, strings that end in 0.

    nmt_nfkc has 225,000 of them, so that they stay in the trie, whose ends they share. Read out are
    only its first characters, which tell where in a text there is anything to look up:

    singles   character -> replacement
    starts    characters with which a longer key begins, and
    seconds   those that stand behind them
    """

    def __init__(self, blob: bytes):
        size = int.from_bytes(blob[:4], "little")
        if blob and (size % 4 or not 0 < size <= len(blob) - 4):
            raise ValueError("its charsmap is cut off or damaged: the trie's size cannot be")
        units = np.frombuffer(blob[4 : 4 + size], "<u4")
        units = np.append(units, np.zeros(-len(units) % BLOCK or BLOCK * (not len(units)), "<u4"))
        self._strings = blob[4 + size :]
        if self._strings and self._strings[-1]:
            raise ValueError("its charsmap is cut off or damaged: its last string has no end")
        self._labels = np.where(units & LEAF, 0, units & 0xFF).astype(np.uint8)
        self._bases = np.arange(len(units), dtype=np.uint32) ^ offsets(units)
        self._bases[self._bases >= len(units)] = 0  # where no node has its base: a dead end
        self._units = units
        first = self._next_characters(np.zeros(1, np.uint32))
        found = {char: self._value(node) for node, char in first}
        self.singles = {char: value for char, value in found.items() if value is not None}
        self.starts, self.seconds, ways = set(), set(), 0
        for node, char in first:
            if more := self._next_characters(np.array([node], np.uint32)):
                self.starts.add(char)
                self.seconds.update(second for _, second in more)
                ways += len(more)
            if ways > MOST_WAYS:
                raise ValueError("its charsmap is damaged: the trie has no end")

    def _value(self, node: int) -> str | None:
        if not self._units[node] >> 8 & 1 or self._units[node] & LEAF:
            return None
        start = int(self._units[self._bases[node]]) & ~LEAF
        end = self._strings.find(b"\0", start)
        return None if end < 0 else self._strings[start:end].decode(errors="replace")

    def _next_characters(self, nodes: np.ndarray) -> list[tuple[int, str]]:
        """(node, character) for each way on from these nodes; all at once, a byte each step."""
        out, keys = [], [b""] * len(nodes)
        while len(nodes):
            children = self._bases[nodes][:, None] ^ BYTES_OF_KEYS  # nodes x bytes
            parent, byte = np.nonzero(self._labels[children] == BYTES_OF_KEYS)
            steps = zip(children[parent, byte].tolist(), parent, byte, strict=True)
            more = [(node, keys[p] + bytes([b + 1])) for node, p, b in steps]
            going = []
            for node, key in more:
                try:
                    out.append((node, key.decode()))
                except UnicodeDecodeError as error:
                    if error.reason == "unexpected end of data":
                        going.append((node, key))
            if len(out) + len(going) > MOST_WAYS:
                raise ValueError("its charsmap is damaged: the trie has no end")
            nodes = np.array([node for node, _ in going], np.uint32)
            keys = [key for _, key in going]
        return out

    def longest(self, text: str, at: int) -> tuple[str, int] | None:
        """The replacement of the longest key that stands at this place, and where it ends."""
        node, found = 0, None
        for end in range(at, len(text)):
            for byte in text[end].encode():
                node = int(self._bases[node]) ^ byte
                if self._labels[node] != byte:
                    return found
            if (value := self._value(node)) is not None:
                found = value, end + 1
        return found


def offsets(units: np.ndarray) -> np.ndarray:
    """How far (by XOR) a node's base is from the node itself."""
    return (units >> 10) << ((units & 1 << 9) >> 6)


def write_charsmap(replacements: dict[str, str]) -> bytes:
    """The precompiled_charsmap of these replacements, which `Charsmap` reads."""
    if not replacements:
        return b""
    strings, place = bytearray(), {}
    for value in replacements.values():
        if value not in place:
            place[value] = len(strings)
            strings += value.encode() + b"\0"
    trie = build_trie({key.encode(): place[value] for key, value in replacements.items()})
    return len(trie).to_bytes(4, "little") + trie + bytes(strings)


def build_trie(values: dict[bytes, int]) -> bytes:
    """A double array of these keys, none of which is empty or holds a 0: little-endian uint32.

    A node's base is the first place where all its children are free. No two nodes share a base, for
    a child does not say whose it is.
    """
    keys = sorted(values)
    if not keys or not keys[0] or any(0 in key for key in keys):
        raise ValueError("a replacement's key is empty or holds a 0")
    units: list[int] = []
    free: dict[int, None] = {}  # places, in order
    bases = {0}

    def more_room() -> None:
        end = len(units)
        units.extend([0] * BLOCK)
        free.update(dict.fromkeys(range(end, end + BLOCK)))
        for old in range(max(0, end - OPEN_BLOCKS * BLOCK), end - (OPEN_BLOCKS - 1) * BLOCK):
            free.pop(old, None)

    def base_for(labels: list[int]) -> int:
        while True:
            for place in free:
                base = place ^ labels[0]
                if base not in bases and all(base ^ label in free for label in labels):
                    return base
            more_room()

    more_room()
    del free[0]
    waiting = [(0, 0, len(keys), 0)]  # node, its keys from ... to, its depth
    while waiting:
        node, low, high, depth = waiting.pop()
        children, start = [], low
        for label, group in groupby(
            keys[low:high], lambda key, depth=depth: key[depth] if depth < len(key) else 0
        ):
            end = start + len(list(group))
            children.append((label, start, end))
            start = end
        base = base_for([label for label, _, _ in children])
        bases.add(base)
        units[node] |= (node ^ base) << 10 | (children[0][0] == 0) << 8
        for label, start, end in children:
            del free[base ^ label]
            if label:
                units[base ^ label] = label
                waiting.append((base ^ label, start, end, depth + 1))
            else:
                units[base] = LEAF | values[keys[start]]
    if len(units) > LARGEST:
        raise ValueError("these are too many replacements for one trie")
    return np.array(units, "<u4").tobytes()


# --- rules ----------------------------------------------------------------------------------------

# What SentencePiece's nmt_nfkc adds to NFKC: these are blanks, and these are nothing.
BLANKS = "\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd"
NOTHING = [*range(1, 9), 0x0B, *range(0x0E, 0x20), 0x7F, 0x8F, 0x9F]


@cache
def nfkc_charsmap() -> bytes:
    """NFKC as a list of replacements, as far as one can be, after the Unicode of this Python.

    Each character that NFKC changes, and each sequence that is one composed character. Marks in an
    unusual order stay as they are: a list that held all orders would have no end.
    """
    rules = {}
    for char in map(chr, range(1, 0x110000)):
        if unicodedata.category(char) in ("Cn", "Cs", "Co"):
            continue
        if (to := unicodedata.normalize("NFKC", char)) != char:
            rules[char] = to
        apart = unicodedata.normalize("NFD", char)
        sequences = {apart, unicodedata.normalize("NFC", apart[:-1]) + apart[-1:]}
        for sequence in sequences if len(apart) > 1 else ():
            if (to := unicodedata.normalize("NFKC", sequence)) != sequence:
                rules[sequence] = to
    del rules["\uff5e"]  # Japanese uses both tildes
    rules |= dict.fromkeys(BLANKS, " ") | dict.fromkeys(map(chr, NOTHING), "")
    return write_charsmap(rules)


NORMALIZERS = {"identity": lambda: b"", "nfkc": nfkc_charsmap}  # name -> charsmap

# --- text -> normalized text ----------------------------------------------------------------------

SPACE = "\u2581"  # ▁, a blank that one sees


def longest_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest first; none finds nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class Normalization:
    """What happens to a text before it is cut: replacements, then blanks, as a Normalizer says."""

    def __init__(self, normalizer: Normalizer, defined: re.Pattern[str]):
        """defined: finds user-defined pieces, in which nothing is replaced."""
        self.normalizer, self.defined = normalizer, defined
        self.space = SPACE if normalizer.escape_whitespaces else " "
        self.charsmap = Charsmap(normalizer.charsmap)
        self.singles = str.maketrans(self.charsmap.singles)
        places = [] if defined.pattern == "(?!)" else [defined.pattern]
        if self.charsmap.starts:
            starts, seconds = (
                "".join(map(re.escape, sorted(chars)))
                for chars in (self.charsmap.starts, self.charsmap.seconds)
            )
            places.append(f"[{starts}](?=[{seconds}])")
        if any("  " in text for text in self.charsmap.singles.values()):
            places.append("")  # blanks are collapsed between replacements, not inside
        self.several = re.compile("|".join(places) if places else "(?!)")

    def _unit(self, text: str, at: int) -> tuple[str, int]:
        """What the text from here becomes, and where its next part begins."""
        if found := self.defined.match(text, at):
            return found.group(), found.end()
        if (char := text[at]) in self.charsmap.singles or char in self.charsmap.starts:
            return self.charsmap.longest(text, at) or (char, at + 1)
        return char, at + 1

    def aligned(self, text: str) -> tuple[str, list[int]]:
        """The normalized text, and where in the text each of its characters, and its end, are from.

        Replacements, longest first, but none in user-defined pieces; then a dummy blank before,
        blanks collapsed and taken from both ends, and ▁ for blank, as `normalizer` says.
        """
        text.encode()  # a lone surrogate is a ValueError here, with its position
        at, collapse = 0, self.normalizer.remove_extra_whitespaces
        while collapse and at < len(text):
            unit, end = self._unit(text, at)
            if unit != " ":
                break
            at = end
        if at == len(text):
            return "", [at]
        dummy = self.normalizer.add_dummy_prefix
        out, origins, behind_blank = [self.space * dummy], [at] * dummy, collapse
        while at < len(text):
            unit, end = self._unit(text, at)
            unit = unit.lstrip(" ") if behind_blank else unit
            if unit:
                out.append(unit.replace(" ", self.space))
                origins += [at] * len(unit)
                behind_blank = collapse and unit[-1] == " "
            at = end
        normal = "".join(out)
        if collapse and len(kept := normal.rstrip(self.space)) < len(normal):
            normal, at = kept, origins[len(kept)]
            del origins[len(kept) :]
        return normal, [*origins, at]

    def normalize(self, text: str) -> str:
        """The same without the places, mostly at once."""
        if self.several.search(text):
            return self.aligned(text)[0]
        text.encode()  # as above
        if not text:
            return ""
        out = text.translate(self.singles)
        if collapse := self.normalizer.remove_extra_whitespaces:
            out = re.sub("  +", " ", out).lstrip(" ")
        out = (" " * self.normalizer.add_dummy_prefix + out).replace(" ", self.space)
        return out.rstrip(self.space) if collapse else out
