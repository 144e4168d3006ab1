"""The files that tokenizers are kept in: read and written here, understood in bpe.py.

    tokenizer.json            Hugging Face: everything in one file
    encoder.json + vocab.bpe  GPT-2 as released (vocab.json + merges.txt elsewhere)
    *.tiktoken                tiktoken: each token in base64 and its rank; no pattern, no specials

All three are byte-level BPE. Text is JSON or base64 and never trusted: whatever would give other
ids than its own program is refused with a reason.

Run: python -m pytest tests/test_tokenizer.py

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (the byte
alphabet).
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

Pair = tuple[int, int]

PAIRS_OF_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class Vocabulary(NamedTuple):
    """What a file says of a tokenizer."""

    tokens: list[bytes]  # id -> its bytes; b"" where the id belongs to a special token or to none
    merges: list[Pair] | None  # in rank order; None: the ids themselves are the ranks
    special: dict[str, int]
    pattern: str | None  # None: the file does not say
    whole: bool = True  # whether a piece that is a token is that token, merges or not


def read(path: Path) -> Vocabulary:
    """Whatever lies at path: a file of any of the three kinds, or a folder that holds one."""
    if path.is_dir():
        path = found_in(path)
    data = path.read_bytes()
    if not data.lstrip().startswith(b"{"):
        merges_of = {merges: vocab for vocab, merges in PAIRS_OF_FILES}
        if path.name in merges_of:
            return read(path.with_name(merges_of[path.name]))
        return from_ranks(data)
    file = json.loads(data)
    if isinstance(file.get("model"), dict):  # GPT-2 has a token of this name
        return from_json(file)
    for name, merges in PAIRS_OF_FILES:
        if path.name == name:
            return from_gpt2(file, path.with_name(merges).read_text("utf-8"))
    raise ValueError("it has no model, and is none of " + ", ".join(n for n, _ in PAIRS_OF_FILES))


def found_in(folder: Path) -> Path:
    for name in ("tokenizer.json", *(vocab for vocab, _ in PAIRS_OF_FILES)):
        if (folder / name).is_file():
            return folder / name
    raise ValueError("this folder holds no tokenizer.json, encoder.json or vocab.json")


# --- bytes as characters --------------------------------------------------------------------------


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: its own if it has one, else U+0100 and on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_chars(token: bytes) -> str:
    """to_chars(b" the") is "Ġthe"."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def to_bytes(chars: str) -> bytes | None:
    """to_bytes("Ġthe") is b" the", and None if some character stands for no byte."""
    return bytes(map(CHAR_TO_BYTE.get, chars)) if CHAR_TO_BYTE.keys() >= set(chars) else None


def by_id(tokens: dict[Any, bytes | None], special: int) -> list[bytes]:
    """id -> bytes as a list, b"" where nothing is known; there are `special` more ids."""
    if not all(type(id) is int and id >= 0 for id in tokens):
        raise ValueError("an id of its vocab is no number from 0 on")
    last = max(tokens, default=-1)
    if last > 2 * (len(tokens) + special) + 1024:  # real ones have gaps of a few ids
        raise ValueError(f"its id {last} is far beyond its {len(tokens)} tokens")
    if not all(tokens.values()):
        raise ValueError("a token of its vocab is not written in the byte alphabet")
    return [tokens.get(id) or b"" for id in range(last + 1)]


def inverted(vocab: dict[str, Any]) -> dict[Any, bytes | None]:
    """text -> id becomes id -> bytes."""
    try:
        out = {id: to_bytes(text) for text, id in vocab.items()}
    except TypeError:  # a list as id
        raise ValueError("an id of its vocab is no number from 0 on") from None
    if len(out) != len(vocab):
        raise ValueError("its vocab has doubles: an id stands for two tokens")
    return out


def read_merge(pair: Any, vocab: dict[str, int]) -> Pair:
    match pair.split(" ") if isinstance(pair, str) else pair:
        case [str(left), str(right)] if left in vocab and right in vocab:
            return vocab[left], vocab[right]
    raise ValueError(f"the merge {short(pair)} does not name two tokens of the vocab")


# --- tokenizer.json -------------------------------------------------------------------------------

UNLIKE_OURS = ("normalizer", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def to_json(
    tokens: list[bytes], merges: Iterable[Pair], special: dict[str, int], pattern: str
) -> dict[str, Any]:
    """What Hugging Face's `tokenizers` reads as the same tokenizer."""
    chars = [to_chars(token) for token in tokens]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | {"invert": False}, as_bytes | {"use_regex": False}]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": text, "special": True} | plain
            for text, id in sorted(special.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": as_bytes | {"use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token is that token
            "vocab": {token: id for id, token in enumerate(chars) if token} | special,
            "merges": [[chars[left], chars[right]] for left, right in merges],
        },
    }


def from_json(file: Any) -> Vocabulary:
    """What a tokenizer.json says; ValueError if it is not one like ours."""
    model = file["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise ValueError(f"its model is {short(kind)}, not BPE")
    match file:
        case {"added_tokens": list(added), "pre_tokenizer": dict(steps)}:
            vocab, merges = model.get("vocab"), model.get("merges")
        case _:
            raise ValueError("it has no added_tokens or no pre_tokenizer")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError("its model has no vocab or no merges")
    for key in UNLIKE_OURS:
        if model.get(key) or file.get(key):
            raise ValueError(f"it has a {key}, which changes the ids")
    special = dict(map(read_special, added))
    if len(special) != len(added):
        raise ValueError("an added token is listed twice")
    ordinary = {text: id for text, id in vocab.items() if special.get(text) != id}
    tokens = by_id(inverted(ordinary), len(special))
    pairs = [read_merge(pair, vocab) for pair in merges]
    return Vocabulary(tokens, pairs, special, read_pattern(steps), bool(model.get("ignore_merges")))


def read_special(added: Any) -> tuple[str, int]:
    match added:
        case {"content": str(text), "id": int(id), **flags} if type(id) is int and id >= 0:
            if not any(flags.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                return text, id
    raise ValueError(f"the added token {short(added)} is not a text with its id and nothing more")


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


# --- GPT-2's two files ----------------------------------------------------------------------------


def from_gpt2(vocab: Any, merges: str) -> Vocabulary:
    """encoder.json, token -> id, and vocab.bpe, a merge a line below a line with the version.

    <|endoftext|> and what else stands in such brackets without a merge is special.
    """
    if not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise ValueError("an id of its vocab is no number from 0 on")
    lines = merges.split("\n")
    lines = [line for line in lines[lines[0].startswith("#version") :] if line]
    pairs = [read_merge(line, vocab) for line in lines]
    made = {line.replace(" ", "", 1) for line in lines}
    apart = {text: id for text, id in vocab.items() if text not in made and len(text) > 1}
    special = {text: id for text, id in apart.items() if text[0] == "<" and text[-1] == ">"}
    ordinary = {text: id for text, id in vocab.items() if text not in special}
    return Vocabulary(by_id(inverted(ordinary), len(special)), pairs, special, "gpt2", whole=False)


# --- tiktoken's ranks -----------------------------------------------------------------------------


def to_ranks(tokens: list[bytes]) -> bytes:
    """A line for each token: its bytes in base64, and its id, which is its rank."""
    lines = [base64.b64encode(t) + f" {id}\n".encode() for id, t in enumerate(tokens) if t]
    return b"".join(lines)


def from_ranks(data: bytes) -> Vocabulary:
    """The tokens of a rank file. Its merges are not there: ids are joined in the order of ids."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        match line.split(b" "):
            case [code, rank] if code and rank.isdigit() and len(rank) < 10:
                token, id = base64.b64decode(code, validate=True), int(rank)
                if id in tokens:
                    raise ValueError(f"its line {number} gives the rank {id} again")
                tokens[id] = token
            case [b""] | []:
                continue
            case _:
                raise ValueError(f"its line {number} is not a token in base64 and its rank")
    if not tokens:
        raise ValueError("it is empty")
    return Vocabulary(by_id(tokens, 0), None, {}, None)
