"""Documents: text and where it stands, read from files of several kinds or from Python itself.

Idea: a corpus is an iterator of documents in a fixed order, so that everything made from it can be
made again. Without a path it is the prose of Python's own standard library, which lies on every
machine: docstrings, comments, and the language reference behind `help()`.

Run: python -m pytest tests/test_data.py
"""

import ast
import glob
import gzip
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from run import UserError
from tokenizer import END_OF_TEXT


class Document(NamedTuple):
    text: str
    source: str


# --- reading documents ----------------------------------------------------------------------------

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
NOT_PROSE = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
SHORTEST = 80  # characters: below that a docstring or comment says little


def python_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not NOT_PROSE & set(p.relative_to(root).parts))
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


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


def files_of(path: str) -> list[Path]:
    """The files that --data.path names, in a fixed order; UserError if it names none."""

    def known(p: Path) -> bool:
        return os.path.isfile(p) and p.name.lower().removesuffix(".gz").endswith(SUFFIXES)

    def shown(p: Path) -> bool:
        return not any(part.startswith(".") for part in p.relative_to(place).parts)

    place = Path(os.path.expanduser(path))
    if os.path.isfile(place):
        if not known(place):
            raise UserError(
                f"{place}: text files end in {', '.join(SUFFIXES)} (or one of these + .gz)"
            )
        return [place]
    if os.path.isdir(place):
        files = sorted(p for p in place.rglob("*") if known(p) and shown(p))
    else:  # a set, because a pattern with two ** finds a file twice
        files = sorted(p for p in {*map(Path, glob.glob(str(place), recursive=True))} if known(p))
    if not files:
        what = "holds no" if os.path.exists(place) else "is no file or folder and matches no"
        raise UserError(f"--data.path {path} {what} {', '.join(SUFFIXES)} file (or .gz of these)")
    return files


def read_file(path: Path) -> Iterator[Document]:
    """One document a file, or split at <|endoftext|>; in .jsonl one a line, under "text"."""
    text = read_text(path)
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):  # JSON may hold U+2028, for example
            where = f"{path}:{number}"
            if line.strip() and (part := text_field(line, where)).strip():
                yield Document(part, where)
    elif END_OF_TEXT in text:
        for number, part in enumerate(text.split(END_OF_TEXT), 1):
            if part.strip():
                yield Document(part.strip("\r\n"), f"{path}#{number}")
    elif text.strip():
        yield Document(text, str(path))


def read_text(path: Path) -> str:
    """The file as UTF-8 text, or a UserError that says what it is instead."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if b"\0" in data:
        raise UserError(f"{path} is binary, not text: there is a zero byte at {data.index(0)}")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at {error.start} has no "
            "meaning; convert it, for example with iconv -t UTF-8"
        ) from None


def text_field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{where}: each line must be a JSON object with a string "text"') from None
