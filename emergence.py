"""What language models can do that nobody taught them in so many words, shown on small ones.

Idea: three claims of the field, each made so small that it can be seen happening, and each answer
so plain that it can be checked.

    shots     In-context learning: a model sees a few pairs of a mapping that it has never met, and
              continues it. By number of pairs, by size of the model, and by training step: the
              loss falls smoothly, and what it is asked for comes all at once.
    thought   Chain of thought: one and the same model, asked for a sum at once, step by step, and
              several times with a vote.
    tuning    Instruction tuning: pairs of operations, and wordings, that no lesson had, by the
              number of tasks that were taught; against the base model with four examples.

Run: python emergence.py                one model that learns to look back, in a minute
     python emergence.py shots          five minutes on two cores
     python emergence.py thought        five minutes
     python emergence.py tuning         eight minutes, and as many for the base, once
     python emergence.py thought --seeds 5

Papers: Brown et al. 2020 (arXiv 2005.14165); Olsson et al. 2022, induction heads (arXiv
2209.11895); Wei et al. 2022, chain of thought (arXiv 2201.11903) and FLAN (arXiv 2109.01652); Wang
et al. 2023 (arXiv 2203.11171); Schaeffer et al. 2023, on jumps (arXiv 2304.15004).

Letters: B rows · T tokens of a row · n symbols.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import examine
import tasks
from evaluate import interval
from examine import Examine, examined
from instruct import Lessons
from kernels.cross_entropy import IGNORE
from model import ModelConfig, Transformer
from objectives import Batch
from optim import OptimConfig, build, learning_rate
from pictures import picture, table
from run import RUNS, UserError, generator, main, write_json
from stages import base_run, choose, lessons_file, trained
from step import pick_device, to, update
from writer import writer_of

SIZES = ("#b5892e", "#9db7d5", "#4a90d9", "#0d2240", "#2a7f62")
COLORS = ("#9db7d5", "#5b8bc9", "#1f4e8c", "#0d2240", "#b5892e", "#2a7f62")


def with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half of its interval, 0 where one seed cannot say."""
    middle, half = interval(list(values))
    return middle, half if half < 10 else 0.0


def keep(name: str, found: object) -> None:
    """The numbers behind a picture, beside it."""
    RUNS.mkdir(exist_ok=True)
    write_json(RUNS / f"{name}.json", found)


# --- in-context learning --------------------------------------------------------------------------

SYMBOLS, ANSWERS, PAIRS = 8, 26, 17  # what is mapped, to what; pairs in a row, the last asked


@dataclass(frozen=True)
class Shots:
    """Learn to continue mappings, and be asked for mappings never seen."""

    sizes: tuple[str, ...] = ("1x64", "2x16", "2x32", "2x64")  # blocks x width
    steps: int = 3000  # updates of each model
    batch: int = 64  # rows of 17 pairs
    lr: float = 0.01  # highest learning rate
    seeds: int = 1  # models of each size
    asked: int = 1000  # rows of the examination
    every: int = 50  # updates between examinations
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.steps, self.batch, self.seeds, self.asked, self.every) < 1:
            raise UserError("all numbers must be at least 1")
        if not self.sizes:
            raise UserError("--sizes needs one at least")
        for size in self.sizes:
            shape_of(size)


def shape_of(size: str) -> ModelConfig:
    """2x64: two blocks, 64 wide."""
    layers, x, dim = size.partition("x")
    if not (x and layers.isdecimal() and dim.isdecimal() and int(layers) and int(dim) % 8 == 0):
        raise UserError(f"--sizes {size!r} must be blocks x width, such as 2x64")
    return ModelConfig(
        dim=int(dim), layers=int(layers), heads=max(1, int(dim) // 16), context=2 * PAIRS,
        vocab_size=SYMBOLS + ANSWERS,
    )  # fmt: skip


def mappings(count: int, rng: torch.Generator, side: tasks.Side) -> Tensor:
    """Random mappings (count n) of symbols to answers, all of one side."""
    found: list[list[int]] = []
    while len(found) < count:
        some = torch.randint(ANSWERS, (count, SYMBOLS), generator=rng).tolist()
        found += [one for one in some if tasks.side(f"mapping {one}") == side]
    return torch.tensor(found[:count])


def rows(count: int, seed: int, number: int, side: tasks.Side) -> Batch:
    """x₁ f(x₁) x₂ f(x₂) …, a mapping a row; asked for is each f(x)."""
    rng = generator(seed, f"mappings {side}", number)
    maps = mappings(count, rng, side)
    x = torch.randint(SYMBOLS, (count, PAIRS), generator=rng)
    ids = torch.stack([x, SYMBOLS + maps.gather(1, x)], -1).flatten(1)
    targets = torch.full_like(ids, IGNORE)
    targets[:, ::2] = ids[:, 1::2]
    return Batch(ids, targets, torch.zeros_like(ids))


@torch.no_grad()
def by_shots(model: Transformer, batch: Batch) -> tuple[list[float], float]:
    """Share of right answers behind 0, 1, 2, … pairs, and the mean loss in nats."""
    logits = model.logits(model(batch.inputs))[:, ::2]
    answers = batch.targets[:, ::2]
    log_p = logits.log_softmax(-1).gather(-1, answers[..., None])
    return (logits.argmax(-1) == answers).double().mean(0).tolist(), -log_p.mean().item()


class Learned(NamedTuple):
    """A model's way, examined every few steps."""

    steps: list[int]
    right: list[list[float]]  # by shots
    loss: list[float]


def learn_mappings(config: Shots, size: str, seed: int, bar: tqdm) -> Learned:
    device = pick_device(config.device)
    model = Transformer(shape_of(size), seed).to(device)
    how = OptimConfig(lr=config.lr)
    optimizer = build(model.named_parameters(), how)
    exam = to(rows(config.asked, seed, 0, "test"), device)
    found = Learned([], [], [])
    for step in range(config.steps + 1):
        if step % config.every == 0 or step == config.steps:
            right, loss = by_shots(model, exam)
            for kept, new in zip(found, (step, right, loss), strict=True):
                kept.append(new)
        if step < config.steps:
            lr = learning_rate(how, step, config.steps)
            update(model, [to(rows(config.batch, seed, step, "train"), device)], optimizer, lr, how)
            bar.update()
    return found


def best_possible(shots: int) -> float:
    """The symbol was among the pairs, or else one guesses: 1 − (1 − 1/26)(7/8)^shots."""
    return 1 - (1 - 1 / ANSWERS) * (1 - 1 / SYMBOLS) ** shots


def of_shots(config: Shots) -> None:
    total = len(config.sizes) * config.seeds * config.steps
    with tqdm(total=total, unit="step", leave=False, disable=None) as bar:
        found = {
            size: [learn_mappings(config, size, seed, bar) for seed in range(config.seeds)]
            for size in config.sizes
        }
    marks = (0, 1, 2, 4, 8, 16)
    lines = []
    for size, runs in found.items():
        each = [with_interval([run.right[-1][k] for run in runs]) for k in marks]
        lines.append((size, *(in_percent(*x) for x in each)))
    lines.append(("best possible", *(f"{best_possible(k):.0%}" for k in marks)))
    head = ("right answers after pairs", *(str(k) for k in marks))
    print(f"{SYMBOLS} symbols, {ANSWERS} answers, mappings that no training row had\n")
    print(table(head, *lines))
    keep("shots", {
        size: [run._asdict() for run in runs] for size, runs in found.items()
    })  # fmt: skip
    draw_shots(found, path := RUNS / "shots.png")
    print(f"\npicture: {path}")


def in_percent(middle: float, half: float) -> str:
    return f"{middle:.0%}" + (f" ± {100 * half:.0f}" if half else "")


def draw_shots(found: dict[str, list[Learned]], path: Path) -> None:
    """Left by number of pairs, right by training step, with the loss of the last size."""
    with picture(path, 2, (12, 4.8)) as (left, right):
        shots = range(PAIRS)
        for (size, runs), color in zip(found.items(), cycle(SIZES), strict=False):
            each = [with_interval([r.right[-1][k] for r in runs]) for k in shots]
            left.plot(
                shots, [100 * y for y, _ in each], "o-", markersize=4, color=color, label=size
            )
            left.fill_between(shots, [100 * (y - far) for y, far in each],
                              [100 * (y + far) for y, far in each], color=color, alpha=0.15,
                              linewidth=0)  # fmt: skip
            for run in runs:
                right.plot(run.steps, [100 * r[8] for r in run.right], color=color, linewidth=1.2)
        left.plot(shots, [100 * best_possible(k) for k in shots], "--", color="#777777",
                  label="best possible")  # fmt: skip
        left.set(title="Mappings never seen, by examples in the context", xlabel="pairs before",
                 ylabel="right answers, %", ylim=(0, 100))  # fmt: skip
        left.legend(frameon=False)
        *_, runs = found.values()
        loss = right.twinx()
        loss.plot(runs[0].steps, runs[0].loss, ":", color="#c8442d")
        loss.set_ylabel("nats per answer (dotted, the last size)", color="#c8442d")
        loss.grid(visible=False)
        right.set(title="After 8 pairs, by training step: each model", xlabel="step",
                  ylabel="right answers, %", ylim=(0, 100))  # fmt: skip


# --- chain of thought -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Thought:
    """Learn sums, half of them with their steps, and be asked in three ways."""

    digits: tuple[int, ...] = (1, 2, 3, 4)  # of the numbers to add
    steps: int = 1200  # updates
    seeds: int = 1  # models
    seed: int = 0  # of the first
    asked: int = 200  # sums of each length
    votes: int = 9  # answers drawn for a vote
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.steps, self.seeds, self.asked, self.votes) < 1:
            raise UserError("--steps, --seeds, --asked and --votes must be at least 1")
        tasks.check(("add",), self.digits, "--digits")


WAYS = {"at once": {}, "step by step": {"think": True}, "by vote": {"think": True, "votes": 0}}


def taught(config: Thought, seed: int) -> str:
    """A run that has learnt sums."""
    lessons = Lessons(("add",), config.digits, 20_000, turns=1, seed=seed)
    return trained(
        f"thought-{config.steps}-{seed}", "--objective", "chat", "--data.form", "chat",
        "--data.path", str(lessons_file(lessons)), "--tokenizer.vocab-size", "320", "--model.dim",
        "96", "--model.layers", "3", "--batch", "16", "--steps", str(config.steps), "--seed",
        str(seed), "--device", config.device, "--evaluate-every", "400",
    )  # fmt: skip


def of_thought(config: Thought) -> None:
    found: dict[str, list[list[examine.Result]]] = {way: [] for way in WAYS}
    for seed in range(config.seed, config.seed + config.seeds):
        writer = writer_of(taught(config, seed), "", config.device)
        for way, how in WAYS.items():
            how = {**how, "votes": config.votes} if "votes" in how else how
            found[way].append([
                examined(writer, Examine(tasks=("add",), levels=(n,), wording="known",
                                         count=config.asked, seed=seed, tokens=160, **how))[0]
                for n in config.digits
            ])  # fmt: skip
    shares = {
        way: [with_interval([r[i].right for r in runs]) for i in range(len(config.digits))]
        for way, runs in found.items()
    }
    head = ("right answers, by digits", *map(str, config.digits))
    lines = ((way, *(in_percent(*x) for x in each)) for way, each in shares.items())
    print("\n" + table(head, *lines))
    keep("thought", shares)
    draw_ways(config.digits, shares, path := RUNS / "thought.png")
    print(f"\npicture: {path}")


def draw_ways(digits: Sequence[int], shares: dict, path: Path) -> None:
    with picture(path) as (axes,):
        looks = zip(shares.items(), COLORS[::2], (6, 10, 5), strict=False)
        for (way, each), color, size in looks:  # of unlike size, as they may lie on each other
            y, far = ([100 * x[i] for x in each] for i in (0, 1))
            axes.errorbar(digits, y, far, fmt="o-", capsize=3, color=color, label=way,
                          markersize=size, linewidth=size / 3)  # fmt: skip
        axes.set(title="One model, asked in three ways", xlabel="digits of the numbers to add",
                 ylabel="right answers, %", xticks=digits, ylim=(0, 105))  # fmt: skip
        axes.legend(frameon=False)


# --- instruction tuning ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """Tune one base on few tasks and on many, and ask for what no lesson had."""

    counts: tuple[int, ...] = (4, 12, 40)  # tasks in the lessons
    steps: int = 600  # updates of each tuning
    seeds: int = 1  # times, with other tasks in the lessons
    asked: int = 20  # questions of each task
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if not self.counts or min(self.steps, self.seeds, self.asked, *self.counts) < 1:
            raise UserError("all numbers must be at least 1, and --counts some")
        if max(self.counts) > len(Lessons().names):
            raise UserError(f"there are {len(Lessons().names)} tasks to learn from")


def curriculum(count: int, seed: int) -> tuple[str, ...]:
    """So many tasks; of a larger number the smaller one's are a part."""
    names = list(Lessons().names)
    random.Random(generator(seed, "curriculum").initial_seed()).shuffle(names)
    return tuple(names[:count])


def tuned(config: Tuning, base: str, count: int, seed: int) -> str:
    lessons = Lessons(curriculum(count, seed), seed=seed)
    return trained(
        f"tuning-{count}-{config.steps}-{seed}", "--base", base, "--objective", "chat",
        "--data.form", "chat", "--data.path", str(lessons_file(lessons)), "--steps",
        str(config.steps), "--batch", "4", "--seed", str(seed), "--device", config.device,
    )  # fmt: skip


PAIRS_OF = {"tasks": tuple(tasks.composed("test")), "wording": "known"}
UNSEEN = {  # what no lesson had
    "new pairs of operations": PAIRS_OF,
    "the same, step by step": PAIRS_OF | {"think": True},
    "operations in new words": {"tasks": tuple(tasks.OPERATIONS)},
}


def unseen(config: Tuning, run: str, shots: int, seed: int) -> list[float]:
    """Share of right answers to each of them."""
    writer = writer_of(run, "", config.device)
    asked = Examine(count=config.asked, shots=shots, seed=seed, tokens=100)
    return [examined(writer, replace(asked, **how), what)[0].right for what, how in UNSEEN.items()]


def of_tuning(config: Tuning) -> None:
    base = base_run("")
    found: dict[str, list[list[float]]] = {}
    for seed in range(config.seeds):
        runs = {"base": (base, 0), "base, 4 examples": (base, 4)} | {
            f"{count} tasks": (tuned(config, base, count, seed), 0) for count in config.counts
        }
        for name, (run, shots) in runs.items():
            found.setdefault(name, []).append(unseen(config, run, shots, seed))
    shares = {
        name: [with_interval(x) for x in zip(*each, strict=True)] for name, each in found.items()
    }
    lines = ((name, *(in_percent(*x) for x in each)) for name, each in shares.items())
    print("\n" + table(("right answers", *UNSEEN), *lines))
    keep("tuning", shares)
    draw_tuning(shares, path := RUNS / "tuning.png")
    print(f"\npicture: {path}")


def draw_tuning(shares: dict[str, list[tuple[float, float]]], path: Path) -> None:
    with picture(path) as (axes,):
        for i, (what, color) in enumerate(zip(UNSEEN, COLORS[::2], strict=False)):
            y, far = ([100 * x[i][j] for x in shares.values()] for j in (0, 1))
            axes.errorbar(range(len(y)), y, far, fmt="o-", capsize=3, color=color, label=what)
        axes.set(xticks=range(len(y)), ylim=(-2, 105), ylabel="right answers, %",
                 title="Answers to what no lesson had, by tasks in the lessons")  # fmt: skip
        axes.set_xticklabels(list(shares))
        axes.legend(frameon=False)


# --- the script -----------------------------------------------------------------------------------

SHOWS = {
    "shots": (Shots, of_shots),
    "thought": (Thought, of_thought),
    "tuning": (Tuning, of_tuning),
}


def script() -> None:
    """Without arguments: shots, by one size."""
    choose(SHOWS, ["shots", "--sizes", "2x64"], __doc__)


if __name__ == "__main__":
    main(script)
