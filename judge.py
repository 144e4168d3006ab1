"""From answers to a reward model: people compare what a run says, a model learns what they feel.

Idea: the run answers each question several times. Simulated people, whose true feelings are known,
or a person at the terminal, put the answers in an order or rate them; the file that comes of it is
what a reward model is fitted to. Since the simulated people are known, so is the best that anybody
could do who does not know which of them was asked:

    pairs     how often the better answer is known, beside the ceiling: whoever knows all feelings
    ratings   the squared error that is to be expected, beside the noise: the variance of the same
              person's own ratings

Run: python align.py prefer --out people.jsonl    simulated people on the answers of a run
     python align.py label        you, at the terminal
     python align.py reward        a reward model

Papers: Ziegler et al. 2019 (arXiv 1909.08593); Stiennon et al. 2020 (arXiv 2009.01325); Ouyang et
al. 2022 (arXiv 2203.02155).
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import preferences
import tasks
from adapters import adapt
from chat import END, Turn, Turns, knows_roles
from improve import Dpo
from lora import Adapter, plain
from optim import OptimConfig
from pictures import table
from preferences import Ranking, Rating, label, ranked, rated, usable
from questions import Asked, prompt_ids, question
from reward import (
    LOSSES,
    Judged,
    RewardModel,
    Scale,
    accuracy,
    calibration,
    fitted,
    save,
    texts_of,
)
from rollout import sample
from run import Run, UserError, check_free, generator, start, write_json
from stages import free, tuned_run
from tasks import RATERS, Problem, Rater
from writer import Writer, writer_of

# --- answers --------------------------------------------------------------------------------------

AT_ONCE = 128  # answers


def answered(
    writer: Writer, questions: Sequence[Asked], each: int, temperature: float, tokens: int,
    seed: int,
) -> list[tuple[str, ...]]:  # fmt: skip
    """What the model says to each question when it is asked several times; each answer once."""
    prompts = [prompt_ids(writer, one.turns) for one in questions for _ in range(each)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike ones at once
    said = [""] * len(prompts)
    for first in tqdm(range(0, len(order), AT_ONCE), "answers", leave=False, disable=None):
        some = order[first : first + AT_ONCE]
        drawn = sample(writer, [prompts[i] for i in some], tokens, temperature, seed, some)
        for i, reply in zip(some, drawn.replies, strict=True):
            said[i] = reply.strip()
    groups = (said[i : i + each] for i in range(0, len(said), each))
    return [tuple(dict.fromkeys(filter(None, group))) for group in groups]


def problems(
    names: Sequence[str], levels: Sequence[int], count: int, side: tasks.Side, seed: int
) -> list[Problem]:
    """So many, task after task and level after level, asked in the words of lessons."""
    return [
        tasks.problem(names[n % len(names)], levels[n // len(names) % len(levels)], side, n, seed,
                      "train")
        for n in range(count)
    ]  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Questions, and how a run answers them."""

    run: str = ""  # a run of align.py sft, by name or folder; empty: sft, made if need be
    out: str = "preferences.jsonl"  # the file to which what is said goes
    tasks: tuple[str, ...] = tasks.PLAIN  # what is asked
    levels: tuple[int, ...] = (1, 2, 3)  # of their difficulty
    count: int = 1000  # questions
    each: int = 4  # answers to a question, at most
    temperature: float = 1.0  # at which they are drawn
    tokens: int = 128  # of an answer, at most
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if self.count < 1 or not 2 <= self.each <= 9:
            raise UserError("--count must be at least 1, and --each from 2 to 9")
        tasks.check(self.tasks, self.levels)


def asked_and_said(config: Answers) -> list[tuple[Problem, tuple[str, ...]]]:
    writer = writer_of(tuned_run(config.run), "", config.device)
    if not knows_roles(writer.tokenizer):
        raise UserError(f"{config.run} knows no roles: tune it first with python align.py sft")
    asked = problems(config.tasks, config.levels, config.count, "train", config.seed + 5)
    said = answered(writer, [question(p) for p in asked], config.each, config.temperature,
                    config.tokens, config.seed)  # fmt: skip
    return list(zip(asked, said, strict=True))


# --- what people say ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefer(Answers):
    """Let simulated people compare the answers of a run, and rate them."""

    out: str = "simulated.jsonl"  # a new file, to which what is said goes
    raters: tuple[str, ...] = ("strict", "kind", "hasty")  # of whom each answers in turn

    def __post_init__(self):
        super().__post_init__()
        people_of(self.raters)


def people_of(names: Sequence[str]) -> list[Rater]:
    known = {rater.name: rater for rater in RATERS}
    if not names or (unknown := [name for name in names if name not in known]):
        said = f"there is no rater {unknown[0]!r}" if names else "--raters names nobody"
        raise UserError(f"{said}: choose among {', '.join(known)}")
    return [known[name] for name in names]


def prefer(config: Prefer) -> None:
    """An order of the answers to each question, and a rating of each by each criterion."""
    people = people_of(config.raters)
    if Path(config.out).exists():
        raise UserError(f"{config.out} is there already: give --out a new name")
    found: list[Ranking | Rating] = []
    for number, (problem, replies) in enumerate(asked_and_said(config)):
        rng = random.Random(generator(config.seed, "people", number).initial_seed())
        rater = people[number % len(people)]
        if len(replies) > 1:
            found.append(ranked(problem, replies, rater, rng))
        for reply in replies:
            found += rated(problem, reply, rng.choice(people), rng)
    preferences.write(found, Path(config.out))
    orders = sum(isinstance(one, Ranking) for one in found)
    print(f"{orders:,} orders and {len(found) - orders:,} ratings: {config.out}")


def simulated(how: "Reward | Dpo") -> str:
    """The file of what simulated people say of a run's answers; made if need be."""
    mark = hashlib.blake2b(f"{how.tasks} {how.levels}".encode(), digest_size=4).hexdigest()
    path = Run.open(how.run).folder / f"preferences-{how.count}-{how.seed}-{mark}.jsonl"
    if not path.is_file():
        start("align.py", "prefer", "--run", how.run, "--out", str(path), "--count",
              str(how.count), "--seed", str(how.seed), "--device", how.device, "--tasks",
              *how.tasks, "--levels", *map(str, how.levels))  # fmt: skip
    return str(path)


@dataclass(frozen=True)
class Label(Answers):
    """Put the answers of a run in order, at the terminal."""

    count: int = 20  # questions


def labels(config: Label) -> None:
    items = [([Turn("user", p.question)], said) for p, said in asked_and_said(config)]
    label([one for one in items if len(one[1]) > 1], Path(config.out))


# --- a reward model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """Fit a reward model to what people said of answers."""

    run: str = ""  # with whose weights it begins; empty: sft, made if need be
    name: str = ""  # of the reward model; empty: the first that is free of reward, reward-2, …
    preferences: str = ""  # .jsonl or .json; empty: of simulated people, on answers of the run
    count: int = 2000  # questions that these are asked
    tasks: tuple[str, ...] = tasks.PLAIN  # of the questions
    levels: tuple[int, ...] = (1, 2, 3)  # of their difficulty
    said: Literal[tuple(LOSSES)] = "pairs"  # orders by their pairs, whole orders, or ratings
    criterion: str = "helpful"  # of ratings
    lowest: float = 0.0  # rating; what is below is left out
    highest: float = 10.0  # rating; what is above is left out
    strict: bool = False  # end at the first record that cannot be used, instead of leaving it out
    arch: Literal["decoder", "encoder"] = "decoder"  # encoder: each token sees the whole answer
    adapter: Adapter = Adapter()
    epochs: int = 2  # times through all that was said
    batch: int = 16  # questions in an update; of ratings as many answers
    lr: float = 2e-3  # highest learning rate; it falls to 0
    normalize: bool = True  # scores of mean 0 and variance 1 on the answers, before and after
    held: float = 0.1  # share of questions that it is examined by
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.count, self.epochs, self.batch) < 1 or not 0 < self.held < 1:
            raise UserError(
                "--count, --epochs and --batch must be at least 1, and --held between 0 and 1"
            )
        if self.adapter.kind in ("prefix", "prompt"):
            raise UserError("a reward model is kept whole: --adapter.kind must be lora or none")
        if not self.lr > 0 or not self.lowest < self.highest:
            raise UserError("--lr must be above 0, and --lowest below --highest")


class Material(NamedTuple):
    """What was said, cut into what is learnt from and what is held out."""

    train: list[Judged]
    held: list[Judged]
    spoken: list[Ranking | Rating]  # those that are held out, as they were said
    raters: list[str]


def material(config: Reward, writer: Writer, found: Sequence[Ranking | Rating]) -> Material:
    """By question: what is held out shares none with what is learnt from.

    UserError if there is nothing of the kind that is asked for, on either side.
    """
    orders = config.said != "ratings"
    kept = [
        one for one in found
        if isinstance(one, Ranking) == orders and (orders or one.criterion == config.criterion)
    ]  # fmt: skip
    raters = sorted({one.rater for one in kept if isinstance(one, Rating)})
    sides: tuple[list, list] = ([], [])
    spoken = []
    for one, (prompt, ids) in in_context(writer, kept, config.strict):
        out = held_out(one.prompt, config.held)
        if out:
            spoken.append(one)
        values, rater = ([one.value], raters.index(one.rater)) if not orders else (one.ranks, 0)
        sides[out].append(Judged(prompt, ids, [*values], rater))
    if not all(sides):
        what = "orders" if orders else f"ratings by the criterion {config.criterion}"
        raise UserError(
            f"of {len(found):,} records {len(kept):,} are {what}: too few to learn from and to "
            "examine by"
        )
    return Material(*sides, spoken, raters or [""])


def held_out(prompt: Turns, share: float) -> bool:
    mark = hashlib.blake2b(str([tuple(t) for t in prompt]).encode(), digest_size=8).digest()
    return int.from_bytes(mark, "big") < share * 2**64


def in_context(
    writer: Writer, said: Sequence[Ranking | Rating], strict: bool
) -> Iterator[tuple[Ranking | Rating, tuple[list[int], list[list[int]]]]]:
    """Each record with the ids of its prompt and of its responses.

    What is longer than the model's context is left out and counted; UserError if strict.
    """
    end, most = [writer.tokenizer.special[END]], writer.model.config.context
    long = 0
    for one in said:
        texts = one.responses if isinstance(one, Ranking) else [one.response]
        prompt = prompt_ids(writer, one.prompt)
        ids = [writer.tokenizer.encode(text) + end for text in texts]
        if len(prompt) + max(map(len, ids)) <= most:
            yield one, (prompt, ids)
        elif strict:
            raise UserError(f"longer than the model's context of {most} tokens: {texts[0][:60]!r}")
        else:
            long += 1
    if long:
        print(f"left out {long:,} × longer than the model's context of {most} tokens")


def reward(config: Reward) -> None:
    """Fit, normalise, examine, and keep as a run."""
    config = replace(config, name=config.name or free("reward"))
    check_free(config.name, "")
    tuned = tuned_run(config.run)
    path = config.preferences or simulated(replace(config, run=tuned))
    writer = writer_of(tuned, "", config.device)
    found = usable(Path(path), config.strict, config.lowest, config.highest)
    parts = material(config, writer, found)
    model = plain(writer.model)
    adapt(model, config.adapter, config.seed)
    model.config = replace(model.config, arch=config.arch)
    mine = RewardModel(model, config.seed).to(model.embedding.device)
    texts = texts_of(parts.train[:500], model.embedding.device)
    if config.normalize:
        mine.rescale(Scale.of(mine.scores(texts)))
    if config.said == "ratings":  # whose numbers have a middle
        torch.nn.init.constant_(mine.head.dense.bias, mean(one.said[0] for one in parts.train))
    rate = OptimConfig("adamw", config.lr, weight_decay=0.0, eps=1e-5, warmup=0.05)
    zeros = fitted(mine, parts.train, config.said, rate, config.batch, config.epochs,
                   len(parts.raters), config.seed)  # fmt: skip
    known = {p.question: p for p in problems(config.tasks, config.levels, config.count, "train",
                                             config.seed + 5)}  # fmt: skip
    found = (of_ratings if config.said == "ratings" else of_orders)(mine, parts, zeros, known)
    if config.normalize:
        mine.rescale(Scale.of(mine.scores(texts)))
    mine.model = plain(mine.model)
    run = Run.create(config.name, {"model": asdict(model.config), "objective": "reward",
                                   "settings": asdict(config)})  # fmt: skip
    writer.tokenizer.save(run.folder / writer.tokenizer.file_name)
    save(run, mine, writer.tokenizer, 0)
    write_json(run.folder / "examination.json", found)
    print(f"\nreward model: {run.folder}")


def of_orders(mine: RewardModel, parts: Material, zeros: Tensor, known: dict) -> dict[str, float]:
    """Accuracy and calibration on held-out orders, beside the ceiling where feelings are known."""
    device = mine.model.embedding.device
    scores = mine.scores(texts_of(parts.held, device)).tolist()
    mine_d, best_d, first = [], [], 0
    for one in parts.spoken:
        own = scores[first : first + len(one.responses)]
        first += len(own)
        problem = known.get(one.prompt[-1].text)
        for i, j, often in one.pairs():
            if often == 1.0:
                mine_d.append(own[i] - own[j])
                if problem:
                    best_d.append(felt_better(problem, one.responses[i], one.responses[j]) - 0.5)
    d = torch.tensor(mine_d, dtype=torch.float64)
    found = {"pairs": len(d), "accuracy": accuracy(d, torch.zeros_like(d))}
    chances = torch.cat([d, -d]).sigmoid()
    came = torch.cat([torch.ones_like(d), torch.zeros_like(d)])
    found["calibration"] = calibration(chances, came)
    if best_d:
        best = torch.tensor(best_d, dtype=torch.float64)
        found["ceiling"] = accuracy(best, torch.zeros_like(best))
    print(table(("held-out pairs", f"{len(d):,}"), *((name, f"{x:.3f}") for name, x in
                found.items() if name != "pairs")))  # fmt: skip
    return found


def felt_better(problem: Problem, one: str, other: str) -> float:
    """How often a simulated person, whoever it is, prefers the one."""
    far = (
        (r.felt(problem, one) - r.felt(problem, other)) / r.noise for r in RATERS
    )  # fmt: skip
    return sum(1 / (1 + math.exp(-x)) for x in far) / len(RATERS)


def of_ratings(mine: RewardModel, parts: Material, zeros: Tensor, known: dict) -> dict[str, float]:
    """The squared error on held-out ratings; of known people also the one to expect, and noise.

    What is to be expected of a person who rates again and again does not hang on how the dice fell
    that one time: E (score − rating)² = (score − mean)² + variance.
    """
    device = mine.model.embedding.device
    raters = torch.tensor([one.rater for one in parts.held], device=device)
    scores = (mine.scores(texts_of(parts.held, device)) + zeros[raters]).tolist()
    errors = [(s - one.said[0]) ** 2 for s, one in zip(scores, parts.held, strict=True)]
    found = {"ratings": len(errors), "error": mean(errors)}
    people = {rater.name: rater for rater in RATERS}
    spread = [
        (s, *again(people[one.rater], known[one.prompt[-1].text], one))
        for s, one in zip(scores, parts.spoken, strict=True)
        if one.rater in people and one.prompt[-1].text in known
    ]
    if spread:
        found["to be expected"] = mean((s - middle) ** 2 + noise for s, middle, noise in spread)
        found["noise"] = mean(noise for _, _, noise in spread)
    print(table(("held-out ratings", f"{len(errors):,}"), *((name, f"{x:.3f}") for name, x in
                found.items() if name != "ratings")))  # fmt: skip
    return found


def again(rater: Rater, problem: Problem, one: Rating) -> tuple[float, float]:
    """Mean and variance of the ratings that the same person would give again and again."""
    chances = rater.chances(rater.felt(problem, one.response, one.criterion))
    middle = sum(k * p for k, p in enumerate(chances))
    return middle, sum((k - middle) ** 2 * p for k, p in enumerate(chances))
