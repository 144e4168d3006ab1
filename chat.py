"""Conversations: how they are written, where they are read from, and what of them is learnt.

Idea: a conversation is a list of turns, each with a role. Written for a model, a turn begins with a
special token for its role and ends with another one; what people say is always text, so nobody can
forge a turn. Only what the assistant says is learnt, and that it ends.

    <|endoftext|><|user|>Sort c a b.<|end|><|assistant|>a b c<|end|>
                                            ^^^^^^^^^^^^^^^^^ these tokens are asked for

The template is also kept as Jinja, as `transformers` has it, which then writes the same text.

    turns      a record of JSON or CSV -> turns: chats, Alpaca, Self-Instruct, GSM8K, MMLU
    written    turns -> ids; `shortened` first drops what does not fit, the oldest turns first

Run: python -m pytest tests/test_chat.py

Papers: Ouyang et al. 2022, InstructGPT (arXiv 2203.02155); Wei et al. 2022, FLAN (arXiv
2109.01652); Cobbe et al. 2021, GSM8K (arXiv 2110.14168); Hendrycks et al. 2021, MMLU (arXiv
2009.03300); Wang et al. 2023, Self-Instruct (arXiv 2212.10560).
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from objectives import ROLES as SPECIAL
from run import UserError, write_json
from vocabulary import END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant")
OPENING = dict(zip(ROLES, SPECIAL, strict=False))  # what a turn begins with
END = SPECIAL[-1]  # and ends with
JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Turn(NamedTuple):
    role: str  # one of ROLES
    text: str


Turns = list[Turn]

# --- writing --------------------------------------------------------------------------------------


def with_roles(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with ids for the roles behind all others if it has none yet."""
    missing = [text for text in SPECIAL if text not in tokenizer.special]
    first = tokenizer.vocab_size
    more = {text: first + i for i, text in enumerate(missing)}
    return replace(tokenizer, special=tokenizer.special | more) if more else tokenizer


def knows_roles(tokenizer: Tokenizer) -> bool:
    return all(text in tokenizer.special for text in SPECIAL)


def template(turns: Turns, answer: bool = False) -> str:
    """The text as `transformers` writes it; answer: up to where the assistant begins."""
    said = "".join(f"{OPENING[role]}{text}{END}" for role, text in turns)
    return END_OF_TEXT + said + OPENING["assistant"] * answer


def written(tokenizer: Tokenizer, turns: Turns, answer: bool = False) -> list[int]:
    """ids of `template` without its first token; special tokens in what people say are letters."""
    special, ids = tokenizer.special, []
    for role, text in turns:
        ids += [special[OPENING[role]], *tokenizer.encode(text), special[END]]
    return ids + [special[OPENING["assistant"]]] * answer


def shortened(tokenizer: Tokenizer, turns: Turns, most: int) -> tuple[list[int], int]:
    """ids of at most `most` tokens, and how many were left out.

    First the oldest turns go, but not what the system says, and a reply with what it replies to;
    then what the system says, then the beginning of what is asked last, and at last the end of the
    last reply.
    """
    each = [written(tokenizer, [turn]) for turn in turns]
    full = left = sum(map(len, each))
    roles = [turn.role for turn in turns[:-2]]
    gone: set[int] = set()
    for i in sorted(range(len(roles)), key=lambda i: roles[i] == "system"):
        if left <= most and not (gone and roles[i] == "assistant"):
            break
        gone.add(i)
        left -= len(each[i])
    kept = [part for i, part in enumerate(each) if i not in gone]
    ids = [*chain.from_iterable(kept)]
    if left > most:
        *asked, reply = kept
        before = asked[0] if asked else []
        room = max(0, most - len(reply))
        if room < 3:  # not even a role, a token and its end
            before = []
        elif len(before) > room:
            before = [before[0], *before[len(before) - room + 1 :]]
        ids = (before + reply)[:most]
    return ids, full - len(ids)


def keep_template(folder: Path) -> None:
    """What `transformers` must know of the tokenizer beside it, to write the same text."""
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END,
        "pad_token": END_OF_TEXT, "chat_template": JINJA, "clean_up_tokenization_spaces": False,
    })  # fmt: skip


# --- reading --------------------------------------------------------------------------------------

SUFFIXES = (".json", ".jsonl", ".csv")
FORMS = (
    '"messages" (a chat), "instruction" and "output" (Alpaca), "instruction" and "instances" '
    '(Self-Instruct), "question" and "answer" (GSM8K), or these with "choices"'
)
UNREADABLE = (OSError, EOFError, zlib.error)  # what reading an `opened` file may raise


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if it is a .gz."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def records(path: Path) -> Iterator[tuple[str, object]]:
    """(where it stands, record) of a JSON list, of JSON lines, or of a table of MMLU.

    A line that is no JSON is a ValueError in the place of its record.
    """
    name = path.name.lower().removesuffix(".gz")
    with TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
        if name.endswith(".csv"):
            for number, row in enumerate(csv.reader(file), 1):
                yield f"{path}:{number}", row
        elif name.endswith(".jsonl"):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", parsed(line)
        elif isinstance(all_of_it := parsed(file.read()), list):
            for number, record in enumerate(all_of_it, 1):
                yield f"{path}, record {number}", record
        else:
            yield str(path), all_of_it


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is no JSON: {error}")


def turns(record: object) -> list[Turns | ValueError]:
    """The conversations of a record; ValueError, which says the field, for one that has none.

    Of several, one that is none is a ValueError in its place.
    """
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, list):
        return [multiple_choice(record)]
    if not isinstance(record, dict):
        raise ValueError(f"is {type(record).__name__}, not an object with fields")
    if "messages" in record:
        return [chat(record["messages"])]
    if "instances" in record:
        return instances(record)
    if "instruction" in record:
        return [alpaca(record)]
    if "choices" in record:
        return [choices(record)]
    if "question" in record:
        return [word_problem(record)]
    raise ValueError(f"has none of the fields {FORMS}")


def text_of(record: dict, name: str, needed: bool = True) -> str:
    text = record.get(name, "")
    if not isinstance(text, str):
        raise ValueError(f'"{name}" is {type(text).__name__}, not text')
    if needed and not text.strip():
        raise ValueError(f'"{name}" is missing or empty')
    return whole(text, name)


def whole(text: str, name: str) -> str:
    """The same text; ValueError for half a letter in it, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{name}" holds half a letter, {text[error.start]!a}') from None
    return text


def chat(messages: object) -> Turns:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is no list of turns')
    found = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is no object")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}, not {', '.join(ROLES)}")
        try:
            found.append(Turn(role, text_of(message, "content")))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if found[-1].role != "assistant":
        raise ValueError("its last message is not the assistant's, so there is nothing to learn")
    return found


def alpaca(record: dict) -> Turns:
    """Instruction, and what it is about below it  (Taori et al. 2023)."""
    about = text_of(record, "input", needed=False)
    asked = text_of(record, "instruction") + (f"\n\n{about}" if about.strip() else "")
    return [Turn("user", asked), Turn("assistant", text_of(record, "output"))]


def instances(record: dict) -> list[Turns | ValueError]:
    """Self-Instruct: one instruction, with several inputs and outputs  (Wang et al. 2023)."""
    each, found = record["instances"], []
    if not isinstance(each, list) or not each:
        raise ValueError('"instances" is no list, or an empty one')
    for number, one in enumerate(each, 1):
        try:
            if not isinstance(one, dict):
                raise ValueError("is no object")
            found.append(alpaca({**record, **one}))
        except ValueError as error:
            found.append(ValueError(f"instance {number}: {error}"))
    return found


def word_problem(record: dict) -> Turns:
    """GSM8K: the calculator's notes <<…>> go, and "#### 42" becomes a sentence."""
    steps, mark, answer = text_of(record, "answer").rpartition("####")
    if not mark:
        raise ValueError('"answer" has no ####, behind which the number stands')
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    said = f"{steps}\nSo the answer is {answer.strip().replace(',', '')}."
    return [Turn("user", text_of(record, "question")), Turn("assistant", said)]


LETTERS = "ABCDEFGHIJ"


def multiple_choice(row: list) -> Turns:
    """A row of MMLU: question, four answers, and the letter of the right one."""
    texts = all(isinstance(entry, str) for entry in row)
    if not texts or len(row) != 6 or row[5] not in list(LETTERS[:4]):
        raise ValueError("is not a question, four answers and the letter of the right one")
    return posed(whole(row[0], "question"), row[1:5], row[5])


def choices(record: dict) -> Turns:
    """A question with a list of choices, and as answer the number from 0 or the letter of one."""
    each, right = record["choices"], record.get("answer")
    if not isinstance(each, list) or not 2 <= len(each) <= len(LETTERS):
        raise ValueError(f'"choices" is no list of 2 to {len(LETTERS)}')
    letters = LETTERS[: len(each)]
    letter = letters[right] if type(right) is int and 0 <= right < len(each) else right
    if not isinstance(letter, str) or letter not in list(letters):
        raise ValueError(f'"answer" is {right!r}, neither a number nor a letter of the choices')
    return posed(text_of(record, "question"), each, letter)


def posed(question: str, answers: list, letter: str) -> Turns:
    lines = [f"{c}. {answer}" for c, answer in zip(LETTERS, answers, strict=False)]
    asked = whole("\n".join([question, *lines]), "choices")
    return [Turn("user", asked), Turn("assistant", letter)]


def conversations(path: Path) -> Iterator[tuple[str, Turns | str]]:
    """(where it stands, turns), or instead of turns why there are none."""
    return read(path, turns)


def read(path: Path, understood: Callable[[object], Iterable]) -> Iterator[tuple[str, Any]]:
    """(where it stands, each thing that a record is understood as), or instead why it is none."""
    try:
        for where, record in records(path):
            try:
                for one in understood(record):
                    yield where, str(one) if isinstance(one, ValueError) else one
            except ValueError as error:
                yield where, str(error)
    except (*UNREADABLE, UnicodeDecodeError, csv.Error) as error:
        yield str(path), f"cannot be read: {error}"


def checked(found: Iterable[tuple[str, str]]) -> Turns:
    """Turns from pairs of role and text; UserError for a role that there is not."""
    made = [Turn(*pair) for pair in found]
    if wrong := [turn.role for turn in made if turn.role not in ROLES]:
        raise UserError(f"there is no role {wrong[0]!r}: choose among {', '.join(ROLES)}")
    return made
