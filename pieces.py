"""Text cut into pieces, about a word and the blank before it, which no token ever crosses.

Idea: a regular expression decides what may never become one token: "dog" and "dog." should not be
strangers, nor should digits or line ends melt into words. Its matches, joined, are the text again.

A stream has to be cut before its end is known. `LAST_CUT` finds a place where all patterns here
have a border between pieces, whatever follows.

Run: python -m pytest tests/test_tokenizer.py

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (section 2.2).
"""

import re
from collections.abc import Callable
from functools import partial
from reprlib import repr as short

import regex

PATIENCE, SLOWEST = 10, 10**5  # seconds that a pattern may take, and characters in one more
PARAGRAPH = 256  # characters of a text that are either all ASCII or not

# gpt2 stands as it was published; gpt4 cuts as tiktoken's cl100k does, in a spelling that Python's
# regex, Rust's fancy_regex (tiktoken) and Oniguruma (Hugging Face) read alike.
SPLIT_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# The same for ASCII text, where Python's own re can be used, which is twice as fast.
ASCII_PATTERNS = {
    SPLIT_PATTERNS["gpt2"]: r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+"
    r"|\s+(?!\S)|\s+",
    SPLIT_PATTERNS["gpt4"]: r"'(?i:[sdmt]|ll|ve|re)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
    r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    SPLIT_PATTERNS["o200k"]: r"[^\r\na-zA-Z0-9]?[A-Z]*[a-z]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\na-zA-Z0-9]?[A-Z]+[a-z]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[0-9]{1,3}"
    r"| ?[^\sa-zA-Z0-9]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Where all of these have a border between pieces, whatever stands further left or right: behind a
# word or number before a blank, behind anything before a blank that ends no line, and behind a
# letter before what neither goes on with a word nor shortens one.
CUT = r"(?<=[\p{L}\p{N}])(?=\s)|(?<=\S)(?=[^\S\r\n])|(?<=\p{L})(?=[^\p{L}\p{M}'])"
NEXT_CUT, LAST_CUT = regex.compile(CUT), regex.compile("(?r)" + CUT)


def splitter(pattern: str) -> Callable[[str], list[str]]:
    """A function text -> pieces, which joined are the text again; pattern is a name or a regex."""
    pattern = SPLIT_PATTERNS.get(pattern, pattern)
    try:
        everywhere = regex.compile(pattern)
    except (regex.error, ValueError, RecursionError) as error:
        raise ValueError(f"the split pattern {short(pattern)} is wrong: {error}") from None
    if everywhere.groups:
        raise ValueError(f"the split pattern {short(pattern)} captures: write (?:…) and not (…)")
    if pattern in ASCII_PATTERNS:
        return partial(split_by_parts, everywhere, re.compile(ASCII_PATTERNS[pattern], re.ASCII))

    def split(text: str) -> list[str]:
        text.encode()  # a lone surrogate is a ValueError here, with its position
        try:  # a pattern that comes with a file may be made to take for ever
            pieces = everywhere.findall(text, timeout=PATIENCE + len(text) / SLOWEST)
        except TimeoutError:
            raise ValueError(f"the split pattern {short(pattern)} comes to no end") from None
        if sum(map(len, pieces)) != len(text):
            raise ValueError(f"the split pattern {short(pattern)} leaves out parts of the text")
        return pieces

    return split


def split_by_parts(everywhere: regex.Pattern, in_ascii: re.Pattern, text: str) -> list[str]:
    """The pieces of text; each ASCII part of it, about a paragraph, goes the fast way."""
    if text.isascii():
        return in_ascii.findall(text)
    text.encode()  # a lone surrogate is a ValueError here, with its position
    pieces, start = [], 0
    while start < len(text):
        cut = NEXT_CUT.search(text, start + PARAGRAPH)
        end = cut.start() if cut else len(text)
        part = text[start:end]
        pieces += (in_ascii if part.isascii() else everywhere).findall(part)
        start = end
    return pieces
