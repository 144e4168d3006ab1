"""The whole chain of alignment, and two of its surprises, each one command with one picture.

    think   a run that half of the time thinks before it answers is told which answers were right,
            and nothing else: it comes to think always, because thinking is more often right
    hack    a reward model that has seen few comparisons is a bad guess of what people want; a
            policy that is free to go anywhere finds where it is wrong, one that pays for KL less
    all     base, instructions, comparisons, reward model, and then PPO, DPO and GRPO

Run: python align.py think
     python align.py hack
     python align.py all

Papers: Ouyang et al. 2022, InstructGPT (arXiv 2203.02155); Gao et al. 2023, over-optimization
(arXiv 2210.10760); DeepSeek-AI 2025, R1 (arXiv 2501.12948), where thinking grows longer by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

import tasks
from evaluate import interval
from instruct import Lessons
from pictures import LINES, picture, smooth, table
from run import RUNS, Run, UserError, read_json, write_json
from stages import lessons_file, made, trained

SMALL = ("--model.dim", "96", "--model.layers", "3", "--model.context", "256")
COLORS = {"sft": "#777777", "ppo": "#1f4e8c", "grpo": "#b5892e", "dpo": "#2a7f62"}
HATCHES = ("", "//", "..", "xx")


def improved(kind: str, name: str, *words: str) -> Run:
    """A run of ppo, grpo or dpo; made if it is not there yet, or on from where it was stopped."""
    return Run.open(made(name, "align.py", kind, *words, last="standing.json"))


def rewarded(name: str, *words: str) -> str:
    """A reward model; fitted if it is not there yet."""
    return made(name, "align.py", "reward", *words, last="examination.json")


def band(axes, steps: Sequence[int], each: Sequence[Sequence[float]], **look) -> None:
    """The mean of several runs, and between which values they lie."""
    columns = list(zip(*map(smooth, each), strict=True))
    axes.plot(steps, [sum(c) / len(c) for c in columns], **look)
    if len(each) > 1:
        axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), linewidth=0,
                          color=look["color"], alpha=0.15)  # fmt: skip


def in_numbers(values: Sequence[float], form: str) -> str:
    """A mean, and over several seeds its interval."""
    middle, half = interval(list(values))
    return form.format(middle) + (f" ± {form.format(half)}" if len(values) > 1 else "")


# --- learning to think ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Think:
    """Let a run that sometimes thinks learn from right and wrong alone."""

    digits: tuple[int, ...] = (4, 5, 6)  # of the numbers to add
    tuning: int = 700  # updates of the run that sometimes thinks
    lessons: int = 20_000  # conversations that it is tuned on
    steps: int = 30  # rounds of PPO and of GRPO
    seeds: int = 1  # times, from the tuning on
    asked: int = 100  # sums in the examinations before and after
    tokens: int = 160  # of an answer, at most
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.tuning, self.steps, self.seeds, self.asked, self.tokens) < 1:
            raise UserError("--tuning, --steps, --seeds, --asked and --tokens must be at least 1")
        tasks.check(("add",), self.digits, "--digits")


def undecided(config: Think, seed: int) -> str:
    """A run that has learnt sums, half of them at once and half with their steps, unasked."""
    how = Lessons(
        ("add",), config.digits, config.lessons, think=0.5, unasked=True, turns=1, seed=seed
    )
    return trained(
        f"undecided-{config.tuning}-{seed}", "--objective", "chat", "--data.form", "chat",
        "--data.path", str(lessons_file(how)), *SMALL, "--tokenizer.vocab-size", "320", "--batch",
        "32", "--steps", str(config.tuning), "--seed", str(seed), "--device", config.device,
        "--evaluate-every", "300",
    )  # fmt: skip


RATES = {"ppo": "3e-4", "grpo": "5e-4"}


def think(config: Think) -> None:
    """PPO and GRPO, paid by the check alone."""
    found: dict[str, list[Run]] = {kind: [] for kind in RATES}
    for seed in range(config.seeds):
        run = undecided(config, seed)
        for kind, lr in RATES.items():
            found[kind].append(improved(
                kind, f"think-{kind}-{config.steps}-{seed}", "--run", run, "--tasks", "add",
                "--levels", *map(str, config.digits), "--steps", str(config.steps), "--lr", lr,
                "--beta", "0.01", "--tokens", str(config.tokens), "--asked", str(config.asked),
                "--seed", str(seed), "--device", config.device,
            ))  # fmt: skip
    rows = []
    for kind, runs in found.items():
        stands = [read_json(run.folder / "standing.json") for run in runs]
        ends = [run.metrics()[-1] for run in runs]
        rows.append((
            kind.upper(), *(in_numbers([s[when]["drawn"] for s in stands], "{:.0%}")
                            for when in ("before", "after")),
            in_numbers([run.metrics()[0]["thought"] for run in runs], "{:.0%}"),
            in_numbers([row["thought"] for row in ends], "{:.0%}"),
            f"{max(row['seconds'] for row in ends):.0f} s",
        ))  # fmt: skip
    print("\n" + table(("", "right", "then", "thinks", "then", "takes"), *rows))
    draw_think(found, path := RUNS / "think.png")
    print(f"\npicture: {path}")


WATCHED = {"right": ("-", "right"), "thought": ("--", "thinks first")}


def draw_think(found: dict[str, list[Run]], path: Path) -> None:
    with picture(path) as (axes,):
        for kind, runs in found.items():
            each = [run.metrics() for run in runs]
            steps = [row["step"] for row in each[0]]
            for name, style in WATCHED.items():
                band(axes, steps, [[100 * row[name] for row in rows] for rows in each],
                     color=COLORS[kind], linestyle=style[0],
                     label=f"{kind.upper()}: {style[1]}")  # fmt: skip
        axes.set(title="Paid for right answers, it learns to think", xlabel="round",
                 ylabel="of all answers, %", ylim=(0, 102))  # fmt: skip
        axes.legend(frameon=False, loc="lower right")


# --- over-optimization ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hack:
    """Let a weak reward model be deceived, with and without a price of KL."""

    count: int = 100  # questions whose answers it has seen compared
    digits: tuple[int, ...] = (4, 5, 6)  # of the numbers to add
    tuning: int = 700  # updates of the run that sometimes thinks
    lessons: int = 20_000  # conversations that it is tuned on
    betas: tuple[float, ...] = (0.0, 0.3)  # prices of a nat of KL
    steps: int = 60  # rounds
    tokens: int = 160  # of an answer, at most
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.count, self.steps) < 1 or not self.betas or min(self.betas) < 0:
            raise UserError(
                "--count and --steps must be at least 1, --betas some that are not below 0"
            )
        tasks.check(("add",), self.digits, "--digits")


def hack(config: Hack) -> None:
    """GRPO by a reward model that has seen little; reward and worth on one picture."""
    how = Think(config.digits, config.tuning, config.lessons, device=config.device)
    run = undecided(how, config.seed)
    asked = ("--tasks", "add", "--levels", *map(str, config.digits))
    weak = rewarded(f"weak-{config.count}-{config.seed}", "--run", run, "--count",
                    str(config.count), *asked, "--seed", str(config.seed), "--device",
                    config.device)  # fmt: skip
    runs = {
        beta: improved(
            "grpo", f"hack-{config.count}-{beta:g}-{config.steps}-{config.seed}", "--run", run,
            *asked, "--reward", weak, "--beta", str(beta), "--lr", "1e-3", "--explode", "1e6",
            "--tokens", str(config.tokens), "--steps", str(config.steps), "--seed",
            str(config.seed), "--device", config.device,
        )
        for beta in config.betas
    }  # fmt: skip
    rows = []
    for beta, one in runs.items():
        first, *_, last = one.metrics()
        before_and_after = (f"{row[n]:.2f}" for n in ("reward", "worth") for row in (first, last))
        rows.append((f"β = {beta:g}", *before_and_after, f"{last['kl']:.1f}"))
    print("\n" + table(("", "reward", "then", "worth", "then", "nats away"), *rows))
    draw_hack({beta: one.metrics() for beta, one in runs.items()}, path := RUNS / "hack.png")
    print(f"\npicture: {path}")


def draw_hack(found: dict[float, list[dict]], path: Path) -> None:
    with picture(path, 3, (15, 4.5)) as panels:
        colors = cycle(("#c8442d", "#1f4e8c", "#2a7f62"))
        looks = zip(found.items(), colors, cycle(LINES), strict=False)
        for (beta, rows), color, line in looks:
            steps = [row["step"] for row in rows]
            for axes, name in zip(panels, ("reward", "worth", "kl"), strict=True):
                axes.plot(steps, smooth([row[name] for row in rows]), line, color=color,
                          label=f"β = {beta:g}")  # fmt: skip
        titles = ("What the reward model says", "What people feel", "KL from what it was, nats")
        for axes, title in zip(panels, titles, strict=True):
            axes.set(title=title, xlabel="round")
        panels[0].legend(frameon=False)


# --- the whole chain ------------------------------------------------------------------------------


@dataclass(frozen=True)
class All:
    """Base, instructions, comparisons, reward model, PPO, DPO and GRPO."""

    tasks: tuple[str, ...] = ("add",)  # what is asked, compared and improved
    also: tuple[str, ...] = ("look up", "absent")  # what lessons and examinations have beside it
    levels: tuple[int, ...] = (2, 3)  # of their difficulty
    start: str = ""  # a base run to begin with; empty: one is made
    base: int = 300  # updates of the base
    tuning: int = 700  # of the tuning on instructions
    lessons: int = 20_000  # conversations that it is tuned on
    compared: int = 3000  # questions whose answers are compared
    steps: int = 30  # rounds of PPO and GRPO; five updates of DPO for each
    beta: float = 0.1  # their price of a nat of KL, without which they deceive the reward model
    seeds: int = 1  # times, from the tuning on
    asked: int = 100  # questions of each task in the examinations
    tokens: int = 128  # of an answer, at most
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        tasks.check(self.tasks, self.levels)
        tasks.check((*self.tasks, *self.also), self.levels)
        if min(self.base, self.tuning, self.compared, self.steps, self.seeds, self.asked) < 1:
            raise UserError("all numbers must be at least 1")


def chained(config: All, seed: int) -> dict[str, Run]:
    """All links with one seed."""
    how, asked = ("--device", config.device), ("--tasks", *config.tasks, "--levels",
                                                *map(str, config.levels))  # fmt: skip
    base = config.start or trained(
        f"all-base-{config.base}", "--data.mix", "stories=world:@1", "facts=facts:@2",
        "quiz=quiz:4000@1", *SMALL, "--tokenizer.vocab-size", "1024", "--batch", "16", "--steps",
        str(config.base), *how,
    )  # fmt: skip
    names = (*config.tasks, *config.also, *config.tasks * 3)  # what is improved, four times
    lessons = Lessons(
        names, config.levels, config.lessons, think=0.5, unasked=True, turns=1, seed=seed
    )
    tuned = trained(
        f"all-sft-{config.tuning}-{seed}", "--base", base, "--objective", "chat", "--data.form",
        "chat", "--data.path", str(lessons_file(lessons)), "--batch", "32", "--steps",
        str(config.tuning), "--seed", str(seed), *how,
    )  # fmt: skip
    count = str(config.compared)
    reward = rewarded(f"all-reward-{count}-{seed}", "--run", tuned, "--count", count, *asked,
                      "--seed", str(seed), *how)  # fmt: skip
    words = (
        "--run", tuned, "--reward", reward, *asked, "--also", *config.also, "--asked",
        str(config.asked), "--tokens", str(config.tokens), "--seed", str(seed), *how,
    )  # fmt: skip
    end = f"{config.steps}-{seed}"
    online = ("--steps", str(config.steps), "--beta", str(config.beta))
    return {
        "ppo": improved("ppo", f"all-ppo-{end}", *words, *online),
        "grpo": improved("grpo", f"all-grpo-{end}", *words, *online),
        "dpo": improved("dpo", f"all-dpo-{end}", *words, "--steps", str(5 * config.steps),
                        "--count", count),
    }  # fmt: skip


def everything(config: All) -> None:
    """The chain, with one table and one picture."""
    found = [chained(config, seed) for seed in range(config.seeds)]
    stands = {
        kind: [read_json(runs[kind].folder / "standing.json") for runs in found]
        for kind in found[0]
    }
    first = [each["before"] for each in stands["ppo"]]
    each = {"sft": first} | {kind: [s["after"] for s in some] for kind, some in stands.items()}
    rows, forms = [], {"right": "{:.0%}", "worth": "{:.2f}", "made_up": "{:.0%}"}
    for kind, some in each.items():
        ways = [one[kind].metrics() for one in found] if kind != "sft" else []
        ends = [[row for row in way if "kl" in row][-1] for way in ways]
        rows.append((
            kind.upper(), *(in_numbers([s[n] for s in some], form) if n in some[0] else "-"
                            for n, form in forms.items()),
            *(in_numbers([row[n] for row in ends], "{:.1f}") if ends else "-"
              for n in ("kl", "length")),
        ))  # fmt: skip
    head = ("", "right", "worth, 0 to 4", "made up", "nats away", "tokens")
    print("\n" + table(head, *rows))
    RUNS.mkdir(exist_ok=True)
    write_json(RUNS / "all.json", each)
    draw_all(each, found, path := RUNS / "all.png")
    print(f"\npicture: {path}")


MEANS = ("right", "drawn", "worth", "worth_error", "made_up")  # of all tasks


def draw_all(each: dict[str, list[dict]], found: list[dict[str, Run]], path: Path) -> None:
    """Left: right answers by task; right: worth by distance, of each seed and on average."""
    names = [n for n in each["sft"][0] if n not in MEANS]
    with picture(path, 2, (14, 4.8)) as (bars, ways):
        for i, (kind, some) in enumerate(each.items()):
            y = [100 * sum(s[t] for s in some) / len(some) for t in names]
            bars.bar([x + (i - 1.5) * 0.2 for x in range(len(names))], y, 0.2, color=COLORS[kind],
                     hatch=HATCHES[i], edgecolor="white", label=kind.upper())  # fmt: skip
        bars.set(title="Right answers to questions that nobody learnt from", ylabel="%",
                 ylim=(0, 105), xticks=range(len(names)))  # fmt: skip
        bars.set_xticklabels(names, rotation=20)
        bars.legend(frameon=False, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        for kind in found[0]:
            each_way = [way(runs[kind]) for runs in found]
            for one in each_way:
                ways.plot(*one, color=COLORS[kind], linewidth=0.8, alpha=0.3)
            middle = torch.tensor(each_way).mean(0).tolist()
            ways.plot(*middle, "o-", markersize=3, color=COLORS[kind], label=kind.upper())
        ways.set(title="What answers are worth, by distance from the tuned run",
                 xlabel="KL, nats", ylabel="worth, 0 to 4")  # fmt: skip
        ways.legend(frameon=False, loc="lower right")


def way(run: Run) -> tuple[list[float], list[float]]:
    """How far a run has gone at each look, and what its answers were worth."""
    rows = [row for row in run.metrics() if "kl" in row]
    return smooth([row["kl"] for row in rows]), smooth([row["worth"] for row in rows])
