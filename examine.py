"""Examinations: what a model can answer, how it is asked, and how sure one can be of the number.

Idea: a question can be put to a model in several ways, and which one is used changes what is
measured. So each is a function here, and all use the same questions, from tasks whose test side no
training side has seen, from MMLU, from GSM8K, or from a file of one's own.

    exact         the model writes an answer, which must be the right one: greedy, or drawn
    few-shot      k solved examples stand before the question; which and in what order, a seed says
    think         the model is asked to think step by step, or its examples do
    vote          several drawn answers, of which the most frequent counts (self-consistency)
    choice        the likeliest of the letters before given answers (as MMLU is asked)
    answer        the likeliest of the given answers themselves, which the question then does not
                  list; by log p, or by log p per byte, which does not favour the short

A run that was tuned on conversations is asked in a conversation, any other in the form "Question: …
Answer: …". Intervals hold the true value in 95 of 100 cases, by drawing questions again and again.

Run: python examine.py                          the newest run, on a few tasks
     python examine.py --file questions.jsonl --shots 5 --ask choice
     python examine.py --file mmlu/test --examples mmlu/dev --shots 5 --ask choice
     python examine.py --tasks add --levels 3 --think --votes 9

Papers: Brown et al. 2020, GPT-3 (arXiv 2005.14165); Wei et al. 2022 (arXiv 2201.11903); Kojima et
al. 2022 (arXiv 2205.11916); Wang et al. 2023, self-consistency (arXiv 2203.11171); Efron 1979.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

import chat
import tasks
from chat import Turn
from generate import Sampling, generate
from packing import Shards
from pictures import picture, table
from quality import hash_windows
from run import RUNS, Run, UserError, generator, main, write_json
from tasks import ANSWER, FORM, THINK, final
from training import corpus_of, stored
from vocabulary import Tokenizer
from writer import Writer, unknown, writer_of

# --- what is asked --------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question whose answer is known."""

    kind: str  # by which results are told apart
    question: str
    answer: str
    worked: str = ""  # the answer behind its steps, if they are known
    choices: tuple[str, ...] = ()  # answers to choose from, if there are some


def from_tasks(
    names: Sequence[str],
    count: int,
    side: tasks.Side,
    seed: int,
    levels: Sequence[int],
    wording: tasks.Side | None = None,
) -> list[Asked]:
    """`count` problems of each task, level after level; wording: of which side, if of another."""
    return [
        Asked(name, p.question, p.answer, p.worked)
        for name in names
        for p in (
            tasks.problem(name, levels[i % len(levels)], side, i, seed, wording)
            for i in range(count)
        )
    ]


def from_files(path: Path) -> list[Asked]:
    """The questions of a file, or of all files of a folder, each of which is a kind."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if bare(p).lower().endswith(chat.SUFFIXES))
    found = [one for file in files for one in from_file(file)]
    if not found:
        raise UserError(f"{path} holds no question")
    return found


def bare(path: Path) -> str:
    return re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)


def from_file(path: Path) -> list[Asked]:
    """MMLU's tables, GSM8K's lines, and whatever else chat.py reads, in its order.

    UserError for what cannot be read, with the place.
    """
    found, side = [], "(dev|val|test|train)$"  # of which both have the same kind
    kind = re.sub(f"_{side}", "", Path(bare(path)).stem)
    kind = path.absolute().parent.name if re.fullmatch(side, kind) else kind
    for where, turns in chat.conversations(path):
        if isinstance(turns, str):
            raise UserError(f"{where} {turns}")
        *_, asked, reply = turns if len(turns) > 1 else (Turn("user", ""), *turns)
        _, list_of, listed = asked.text.rpartition("\nA. ")
        letters = ("A", *re.findall(r"^([A-Z])\. ", listed, re.MULTILINE)) if list_of else ()
        letters = letters if len(letters) > 1 and reply.text in letters else ()
        worked = reply.text if ANSWER in reply.text else ""
        found.append(Asked(kind, asked.text, final(reply.text), worked, letters))
    return found


def unlisted(asked: Asked) -> Asked:
    """The question without its list of choices, which are then answers instead of letters."""
    if "A" not in asked.choices:
        return asked
    question, _, listed = asked.question.rpartition("\nA. ")
    answers = tuple(text.strip() for text in re.split(r"^[A-Z]\. ", listed, flags=re.MULTILINE))
    right = answers[asked.choices.index(asked.answer)]
    return asked._replace(question=question, answer=right, choices=answers)


# --- how it is asked ------------------------------------------------------------------------------


class TooLong(UserError):
    """No question fits into the context."""


class Manner(NamedTuple):
    """How questions are put."""

    shots: int = 0  # solved examples before each
    think: bool = False  # ask for steps, and show them in the examples
    chat: bool = False  # as a conversation


def prompt(writer: Writer, asked: Asked, how: Manner, examples: Sequence[Asked]) -> list[int]:
    """The ids of a question behind its examples."""
    tokenizer, extra = writer.tokenizer, f" {THINK}" if how.think else ""
    if how.chat:
        turns = []
        for one in examples:
            turns += [Turn("user", one.question + extra), Turn("assistant", shown(one, how))]
        turns.append(Turn("user", asked.question + extra))
        return [*writer.begin, *chat.written(tokenizer, turns, answer=True)]
    text = "\n\n".join(
        FORM.format(question=one.question + extra, answer=shown(one, how))
        for one in [*examples, asked._replace(answer="", worked="")]
    )
    return [*writer.begin, *tokenizer.encode(text.rstrip())]


def shown(example: Asked, how: Manner) -> str:
    return example.worked if how.think and example.worked else example.answer


def prompts(
    writer: Writer, questions: Sequence[Asked], pool: Sequence[Asked], how: Manner, seed: int
) -> list[list[int]]:
    """Each question behind examples of its own kind, drawn for it from the pool.

    UserError if there are too few.
    """
    found, kinds = [], {kind: [] for kind in dict.fromkeys(q.kind for q in questions)}
    for one in pool:
        kinds.setdefault(one.kind, []).append(one)
    for number, asked in enumerate(questions):
        own = [one for one in kinds[asked.kind] if one.question != asked.question]
        if len(own) < how.shots:
            raise UserError(
                f"--shots {how.shots} are more than the {len(own)} examples of {asked.kind}"
            )
        rng = random.Random(generator(seed, "shots", number).initial_seed())
        found.append(prompt(writer, asked, how, rng.sample(own, how.shots)))
    return found


def fits(writer: Writer, asked: Asked, ids: list[int]) -> bool:
    """Is there room behind the question for its longest choice, or for a token?"""
    longest = max((len(writer.tokenizer.encode(f" {one}")) for one in asked.choices), default=1)
    return len(ids) + longest <= writer.model.config.context


# --- answers --------------------------------------------------------------------------------------

AT_ONCE = 64  # questions


def replies(
    writer: Writer,
    asked: list[list[int]],
    sampling: Sampling,
    tokens: int,
    seed: int,
    end: str = "\n",
) -> list[str]:
    """What the model writes behind each prompt; of a model that is no chat's up to `end`."""
    found = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))  # alike ones at once
    speaks = chat.knows_roles(writer.tokenizer)
    never = unknown(writer)
    for first in tqdm(range(0, len(order), AT_ONCE), "answers", leave=False, disable=None):
        some = order[first : first + AT_ONCE]
        ids: list[list[int]] = [[] for _ in some]
        steps = generate(writer.model, [asked[i] for i in some], tokens, sampling, writer.stop,
                         seed + first, never)  # fmt: skip
        for step in steps:
            for column, token in zip(ids, step, strict=True):
                if token is not None and token not in writer.stop:
                    column.append(token)
        for i, column in zip(some, ids, strict=True):
            text = writer.tokenizer.decode(column)
            found[i] = text if speaks else text.strip().split(end)[0]
    return found


def right(asked: Asked, reply: str) -> bool:
    """Is the answer in a reply the right one? 1,200 and 1200 are one number (Cobbe et al. 2021)."""
    said, key = (re.sub(r"(?<=\d),(?=\d{3}\b)", "", final(x)) for x in (reply, asked.answer))
    return said == key


def voted(each: Sequence[str]) -> str:
    """The most frequent answer; of equally frequent ones that which came first."""
    return Counter(final(reply) for reply in each).most_common(1)[0][0]


@torch.no_grad()
def log_likelihoods(
    writer: Writer, asked: list[list[int]], answers: list[list[int]], at_once: int = 1 << 13
) -> Tensor:
    """Σ log p of the tokens of each answer behind its prompt, in float64."""
    found = torch.zeros(len(asked), dtype=torch.float64)
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i]) - len(answers[i]))
    device = writer.model.embedding.device
    while order:
        width = len(asked[order[0]]) + len(answers[order[0]])
        some, order = order[: max(1, at_once // width)], order[max(1, at_once // width) :]
        rows = [asked[i] + answers[i] for i in some]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        logits = writer.model.logits(writer.model(ids[:, :-1]))
        each = F.log_softmax(logits.double(), -1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
        for i, row, log_p in zip(some, rows, each, strict=True):
            found[i] = log_p[len(asked[i]) - 1 : len(row) - 1].sum()
    return found


def chosen(
    writer: Writer, questions: Sequence[Asked], asked: list[list[int]], per_byte: bool
) -> list[str]:
    """Of each question's choices the likeliest."""
    texts = [(f"{'' if chat.knows_roles(writer.tokenizer) else ' '}{choice}", ids)
             for q, ids in zip(questions, asked, strict=True) for choice in q.choices]  # fmt: skip
    log_p = log_likelihoods(
        writer, [ids for _, ids in texts], [writer.tokenizer.encode(text) for text, _ in texts]
    )
    if per_byte:
        log_p /= torch.tensor([max(1, len(text.strip().encode())) for text, _ in texts])
    best, at = [], 0
    for q in questions:
        scores = log_p[at : at + len(q.choices)]
        best.append(q.choices[int(scores.argmax())])
        at += len(q.choices)
    return best


# --- leaks ----------------------------------------------------------------------------------------

RUN = 13  # words in a row that nobody writes twice by chance (Brown et al. 2020, appendix C)


def words_in_tokens(questions: Sequence[Asked], tokenizer: Tokenizer) -> int:
    """In how many tokens of the questions there are 13 words, on average."""
    words = max(1, sum(len(q.question.split()) for q in questions))
    return math.ceil(RUN * sum(len(tokenizer.encode(q.question)) for q in questions) / words)


def leaked(
    questions: Sequence[Asked], tokenizer: Tokenizer, shards: Shards, run: int = RUN
) -> list[bool]:
    """Whether `run` tokens in a row of a question, or all if it is shorter, were trained on."""
    ids = [np.array(tokenizer.encode(q.question), np.uint64) for q in questions]
    found = [False] * len(ids)
    for n in sorted({min(run, len(x)) for x in ids} - {0}):  # of nothing, nothing was learnt
        known = np.concatenate([windows(np.asarray(file, np.uint64), n) for file in shards.files])
        known = np.unique(known)
        for i, x in enumerate(ids):
            if min(run, len(x)) == n:
                found[i] = bool(np.isin(windows(x, n), known).any())
    return found


def windows(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of each n tokens in a row."""
    return hash_windows(ids + np.uint64(1), np.arange(max(0, len(ids) - n + 1)), n)


def leak_check(run: Run, writer: Writer, questions: Sequence[Asked]) -> str:
    """In words, how many questions the run was trained on; or why that cannot be said."""
    try:
        corpus = corpus_of(stored(run), writer.tokenizer)
    except UserError as error:
        return f"no leak check: {error}"
    tokens = words_in_tokens(questions, writer.tokenizer)
    many = sum(leaked(questions, writer.tokenizer, corpus.train, tokens))
    return (
        f"leak check: {many} of {len(questions)} questions have {tokens} tokens in a row ({RUN} "
        "words) that were trained on"
    )


# --- how sure -------------------------------------------------------------------------------------


def bootstrap(marks: Sequence[bool], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Where the true share lies in 95 of 100 cases (Efron 1979): questions are drawn again.

    Where all answers are right, or all wrong, that says nothing: then all shares that would give n
    of them in a row in more than 5 of 100 cases, pⁿ > 0.05 (Hanley and Lippman-Hand 1983).
    """
    if len(set(marks)) == 1:
        least = 0.05 ** (1 / len(marks))
        return (least, 1.0) if marks[0] else (0.0, 1 - least)
    x = torch.tensor(marks, dtype=torch.float64)
    at = torch.randint(len(x), (draws, len(x)), generator=generator(seed, "bootstrap"))
    low, high = x[at].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class Result(NamedTuple):
    kind: str
    asked: int
    right: float  # share
    low: float
    high: float
    example: tuple[str, str, str]  # question, reply, right answer


def results(questions: Sequence[Asked], said: Sequence[str], seed: int) -> list[Result]:
    """One for each kind, in the order in which they come."""
    found = []
    for kind in dict.fromkeys(q.kind for q in questions):
        pairs = [(q, r) for q, r in zip(questions, said, strict=True) if q.kind == kind]
        marks = [right(q, r) for q, r in pairs]
        q, r = pairs[0]
        found.append(Result(kind, len(marks), sum(marks) / len(marks), *bootstrap(marks, seed),
                            (q.question, r, q.answer)))  # fmt: skip
    return found


# --- an examination -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examine:
    """Ask a model questions whose answers are known."""

    run: str = ""  # a run's name or folder; empty: the newest
    model: str = ""  # instead of a run: the folder of a model in Hugging Face's layout
    adapter: str = ""  # beside it: the folder of an adapter in PEFT's layout
    # what is asked: python tasks.py shows them
    tasks: tuple[str, ...] = ("copy", "reverse", "sort", "add", "count", "look up", "story")
    levels: tuple[int, ...] = (1, 2)  # of the tasks' difficulty
    wording: Literal["new", "known"] = "new"  # of tasks: words that no lesson had, or the lessons'
    file: str = ""  # instead of tasks: .jsonl, .json or .csv (MMLU, GSM8K, …), or a folder of them
    examples: str = ""  # the same, for --shots to be drawn from; empty: the questions themselves
    count: int = 50  # questions of each kind, at most
    # for an answer of its own, the letter of a choice, or the likeliest of the choices themselves
    ask: Literal["exact", "choice", "answer", "answer-per-byte"] = "exact"
    shots: int = 0  # solved examples before each question
    think: bool = False  # ask for steps before the answer
    votes: int = 1  # drawn answers of which the most frequent counts; 1: the likeliest
    temperature: float = 0.7  # of drawn answers
    tokens: int = 120  # of an answer, at most
    seed: int = 0  # of questions, examples and draws
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.count, self.votes, self.tokens) < 1 or self.shots < 0:
            raise UserError("--count, --votes and --tokens must be at least 1, --shots at least 0")
        if self.examples and not self.file:
            raise UserError("--examples are for the questions of a --file: give both")
        if self.votes > 1 and self.ask != "exact":
            raise UserError("--votes are of drawn answers: leave --ask out")
        if self.run and self.model:
            raise UserError("--run and --model are two models: give one")
        tasks.check(self.tasks, self.levels)


def questions_of(config: Examine) -> tuple[list[Asked], list[Asked]]:
    """What is asked, and from where examples are drawn."""
    if config.file:
        every = from_files(Path(config.file))
        pool = from_files(Path(config.examples)) if config.examples else every
        kinds = dict.fromkeys(q.kind for q in every)
        if len(kinds) == len({q.kind for q in pool}) == 1:  # whatever the two files are called
            pool = [q._replace(kind=every[0].kind) for q in pool]
        some = [q for kind in kinds for q in [q for q in every if q.kind == kind][: config.count]]
        return some, pool
    many = max(8, 2 * config.shots) if config.shots else 0
    return (
        from_tasks(
            config.tasks,
            config.count,
            "test",
            config.seed,
            config.levels,
            "train" if config.wording == "known" else None,
        ),
        from_tasks(config.tasks, many, "train", config.seed + 1, config.levels),
    )


def examined(writer: Writer, config: Examine, together: str = "") -> list[Result]:
    """The results of an examination, one for each kind; or one for all together, of that name."""
    if writer.model.config.arch != "decoder":
        raise UserError("questions are for a decoder, which goes on with what it is given")
    questions, pool = questions_of(config)
    if config.ask.startswith("answer"):
        questions, pool = [unlisted(q) for q in questions], [unlisted(q) for q in pool]
    how = Manner(config.shots, config.think, chat.knows_roles(writer.tokenizer))
    asked = prompts(writer, questions, pool, how, config.seed)
    fitting = [fits(writer, q, ids) for q, ids in zip(questions, asked, strict=True)]
    if not all(fitting):
        long = f"longer than the model's context of {writer.model.config.context:,} tokens"
        if not any(fitting):
            raise TooLong(f"all questions are {long}, with {config.shots} examples")
        print(f"left out {fitting.count(False)} of {len(questions)} questions: {long}")
        questions, asked = list(compress(questions, fitting)), list(compress(asked, fitting))
    if config.ask != "exact":
        if missing := [q for q in questions if not q.choices]:
            raise UserError(f"--ask {config.ask} needs choices, and {missing[0].kind} has none")
        said = chosen(writer, questions, asked, config.ask == "answer-per-byte")
    else:
        greedy = Sampling(greedy=True)
        sampling = greedy if config.votes == 1 else Sampling(config.temperature, top_p=1.0)
        end = "\n\n" if config.think else "\n"  # steps have lines, and examples stand apart
        each = [
            replies(writer, asked, sampling, config.tokens, config.seed + 10**6 * vote, end)
            for vote in range(config.votes)
        ]
        said = each[0] if config.votes == 1 else [voted(a) for a in zip(*each, strict=True)]
    if together:
        questions = [q._replace(kind=together) for q in questions]
    return results(questions, said, config.seed)


def show(found: Sequence[Result]) -> str:
    rows = []
    for r in found:
        example = f"{' '.join(r.example[1].split())[:44]!r} for {r.example[2]!r}"
        surely = f"{r.low:.0%} to {r.high:.0%}"
        rows.append((r.kind, str(r.asked), f"{r.right:.0%}", surely, example))
    mean = sum(r.right for r in found) / len(found)
    head = ("", "asked", "right", "surely", "for example")
    return table(head, *rows, ("mean", "", f"{mean:.0%}", "", ""))


def draw(found: dict[str, Sequence[Result]], path: Path, title: str) -> None:
    """The share of right answers by kind, for each examination a bar, with its interval."""
    colors = ("#9db7d5", "#1f4e8c", "#b5892e", "#2a7f62")
    kinds = list(dict.fromkeys(r.kind for each in found.values() for r in each))
    width = 0.8 / len(found)
    with picture(path, size=(2 + 0.7 * len(kinds), 4.5)) as (axes,):
        for i, (name, each) in enumerate(found.items()):
            x = [kinds.index(r.kind) + (i - (len(found) - 1) / 2) * width for r in each]
            y = [100 * r.right for r in each]
            below = [100 * (r.right - r.low) for r in each]
            far = [below, [100 * (r.high - r.right) for r in each]]
            axes.bar(x, y, width, yerr=far, capsize=2, color=colors[i % 4], label=name)
        axes.set(xticks=range(len(kinds)), ylim=(0, 105), ylabel="right answers, %", title=title)
        axes.set_xticklabels(kinds, rotation=30, ha="right")
        if len(found) > 1:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.05), ncol=len(found))


def script() -> None:
    config = tyro.cli(Examine, description=__doc__)
    run = None if config.model else Run.open(config.run)  # once: another may be the newest soon
    folder = run.folder if run else RUNS
    writer = writer_of(str(folder) if run else "", config.model, config.device, config.adapter)
    found = examined(writer, config)
    print(show(found))
    if run:
        print("\n" + leak_check(run, writer, questions_of(config)[0]))
    folder.mkdir(exist_ok=True)
    write_json(folder / "examination.json", {
        "settings": asdict(config), "results": [r._asdict() for r in found]
    })  # fmt: skip
    draw({"": found}, folder / "examination.png", "An examination")
    print(f"\nnumbers: {folder / 'examination.json'}\npicture: {folder / 'examination.png'}")


if __name__ == "__main__":
    main(script)
