"""Documents: text and where it stands, read from files of several kinds or from Python itself.

Idea: a corpus is an iterator of documents in a fixed order, so that everything made from it can be
made again. Without a path it is the prose of Python's own standard library, which lies on every
machine: docstrings, comments, and the language reference behind `help()`.

Run: python -m pytest tests/test_data.py
"""

import ast
import glob
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

import chat
import tasks
import world
from chat import UNREADABLE, opened
from run import UserError
from vocabulary import END_OF_TEXT


class Document(NamedTuple):
    text: str
    source: str  # where it stands
    meta: dict | None = None  # of a conversation: its turns


class Problem(NamedTuple):
    """Something that is no document, in one sentence that says where it stands."""

    sentence: str


# --- reading documents ----------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"  # which Windows puts before UTF-8
BLOCK = 1 << 20  # bytes of a file read at once
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
NOT_PROSE = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
SHORTEST = 80  # characters: below that a docstring or comment says little


def python_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = (name for name in inner if name not in NOT_PROSE)  # packages can be many
        found += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def standard_library() -> Iterator[Document]:
    """Docstrings, comment blocks and `help()` topics of the running Python, in a fixed order."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for name, text in sorted(topics.items()):
        yield Document(text.strip(), f"pydoc_data.topics[{name!r}]")
    for path in tqdm(python_files(), "reading the standard library", leave=False, disable=None):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        for line, text in sorted(prose(source, tree)):
            if len(text) >= SHORTEST:
                yield Document(text, f"{path.relative_to(root).as_posix()}:{line}")


def prose(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of each docstring and of each block of comment lines outside strings."""
    in_string = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            in_string.update(range(node.lineno, node.end_lineno + 1))
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], 1):
        comment = line.strip()
        if comment.startswith("#") and number not in in_string:
            block.append(comment.lstrip("#").removeprefix(" "))
        elif block:
            yield number - len(block), "\n".join(block).strip()
            block = []


def read(path: str, form: str = "text") -> Iterator[Document | Problem]:
    """The documents of a file, folder or glob, or Python's own prose; some may be empty.

    form "chat": they are conversations, whose turns stand in `meta`. "world:" and a number are as
    many stories of world.py, "facts:" paragraphs of statements of tasks.py, "quiz:" stories with
    questions and answers.
    """
    if not path:
        yield from standard_library()
    elif path.startswith(HERE):
        yield from written_here(path)
    else:
        for file in files_of(path, form):
            yield from read_file(file) if form == "text" else read_chat(file)


WRITTEN = {
    "world": lambda: (story.text for story in world.stories()),
    "facts": tasks.facts,
    "quiz": tasks.quiz,
}
HERE = tuple(f"{kind}:" for kind in WRITTEN)
MANY = 20_000


def written_here(path: str) -> Iterator[Document]:
    kind, _, number = path.partition(":")
    number = number or str(MANY)
    if not number.isdecimal() or not int(number):
        raise UserError(f"{path}: behind {kind}: stands how many, such as {MANY}")
    for i, text in zip(range(int(number)), WRITTEN[kind](), strict=False):
        yield Document(text, f"{kind}:{i}")


def read_chat(path: Path) -> Iterator[Document | Problem]:
    """Each conversation as its text, with its turns beside it."""
    for where, turns in chat.conversations(path):
        if isinstance(turns, str):
            yield Problem(f"{where} {turns}")
        else:
            yield Document(chat.template(turns), where, {"turns": turns})


def files_of(path: str, form: str = "text") -> list[Path]:
    """The files that --data.path names, in a fixed order; UserError if it names none."""
    if path.startswith(HERE):
        return []
    endings = SUFFIXES if form == "text" else chat.SUFFIXES

    def known(p: Path) -> bool:
        return os.path.isfile(p) and p.name.lower().removesuffix(".gz").endswith(endings)

    def shown(p: Path) -> bool:
        return not any(part.startswith(".") for part in p.relative_to(place).parts)

    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):
        if not known(place):
            raise UserError(
                f"{place}: {form} files end in {', '.join(endings)} (or one of these + .gz)"
            )
        return [place]
    if os.path.isdir(place):
        files = sorted(p for p in place.rglob("*") if known(p) and shown(p))
    else:  # a set, because a pattern with two ** finds a file twice
        files = sorted(p for p in {*map(Path, glob.glob(str(place), recursive=True))} if known(p))
    if not files:
        what = "holds no" if os.path.exists(place) else "is no file or folder and matches no"
        raise UserError(f"--data.path {path} {what} {', '.join(endings)} file (or .gz of these)")
    return files


def read_file(path: Path) -> Iterator[Document | Problem]:
    """One document a file, or split at <|endoftext|>; in .jsonl one a line, under "text".

    A file may be larger than memory. What cannot be read is a Problem, and the next part follows.
    """
    lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    parts = read_lines if lines else read_parts
    try:
        with opened(path) as file:
            yield from parts(file, path)
    except UNREADABLE as error:
        yield Problem(f"cannot read {path}: {error}")


def read_lines(file: BinaryIO, path: Path) -> Iterator[Document | Problem]:
    """A line feed alone ends a line: JSON strings may hold U+2028, for example."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            yield from_json(line, f"{path}:{number}")


def from_json(line: bytes, where: str) -> Document | Problem:
    try:
        text = json.loads(line.decode())["text"]
        text.encode()
    except UnicodeDecodeError as error:
        return Problem(f"{where} is {not_utf8(error.object, error.start)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Problem(f'{where}: each line must be a JSON object with a string "text"')
    return Document(text, where)


def read_parts(file: BinaryIO, path: Path) -> Iterator[Document | Problem]:
    """What stands between two <|endoftext|>, or the file as it is if there is none."""
    for number, (begin, data, last) in enumerate(parts_of(file), 1):
        if begin == 0 and data.startswith(BOM):
            begin, data = len(BOM), data.removeprefix(BOM)
        if (zero := data.find(0)) >= 0:
            yield Problem(f"{path} is binary, not text: there is a zero byte at {begin + zero}")
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            yield Problem(f"{path} is {not_utf8(data, error.start, begin)}")
            continue
        whole = number == 1 and last
        yield (
            Document(text, str(path)) if whole else Document(text.strip("\r\n"), f"{path}#{number}")
        )


def parts_of(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """(where it begins, a part, is it the last) between <|endoftext|>s, read block by block."""
    mark, begin, waiting = END_OF_TEXT.encode(), 0, bytearray()
    while block := file.read(BLOCK):
        seen = max(0, len(waiting) - len(mark) + 1)
        waiting += block
        while (at := waiting.find(mark, seen)) >= 0:
            yield begin, bytes(waiting[:at]), False
            del waiting[: at + len(mark)]
            begin, seen = begin + at + len(mark), 0
    yield begin, bytes(waiting), True


def not_utf8(data: bytes, at: int, begin: int = 0) -> str:
    return (
        f"not UTF-8 text: byte 0x{data[at]:02x} at {begin + at} has no meaning; convert it, for "
        "example with iconv -t UTF-8"
    )
