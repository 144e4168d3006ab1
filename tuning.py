"""How few weights can learn a new task: adapters and full tuning, measured side by side.

    demo       a small model does one of four things to digits; an adapter for each says which
    compare    a run that follows instructions, tuned on three tasks by each method

Run: python lora.py                  the demonstration, in a minute
     python lora.py compare          three tasks, every method: weights, memory, time, accuracy

Papers: Hu et al. 2021, LoRA (arXiv 2106.09685); Li and Liang 2021 (arXiv 2101.00190); Lester et al.
2021 (arXiv 2104.08691).

Letters: B batch · n digits · T tokens.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adapters import adapt
from examine import Examine, Result, examined
from instruct import Lessons
from lora import NONE, Adapter, flags, merge, unmerge, use
from model import ModelConfig, Transformer, count_parameters
from objectives import IGNORE, Batch
from optim import OptimConfig, build, learning_rate, learnt
from pictures import picture, table
from run import RUNS, Run, UserError, generator, main, write_json
from stages import choose, lessons_file, trained, tuned_run
from step import update
from writer import writer_of

# --- the demonstration ----------------------------------------------------------------------------

DIGITS, LENGTH = 10, 6
SHAPE = ModelConfig(dim=64, layers=2, heads=4, context=2 * LENGTH, vocab_size=DIGITS + 1)
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "sort": lambda x: x.sort(1).values,
    "add up": lambda x: x.cumsum(1) % DIGITS,
}
METHODS = {
    "all weights": NONE,
    "LoRA, rank 1": Adapter("lora", 1, alpha=2.0, on=("layers.*",)),
    "LoRA, rank 4": Adapter("lora", 4, alpha=8.0, on=("layers.*",)),
    "prefix of 8": Adapter("prefix", tokens=8, start="random"),
    "prompt of 8": Adapter("prompt", tokens=8, start="random"),
}


@dataclass(frozen=True)
class Demo:
    """One base, which mixes up what it can; an adapter for each thing says which."""

    steps: int = 80  # updates for each task; the base has four times as many
    batch: int = 64  # rows in an update
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.batch) < 1:
            raise UserError("--steps and --batch must be at least 1")


def rows(tasks: Sequence[str], count: int, seed: int, number: int) -> Batch:
    """x₁ … xₙ, a sign, y₁ … yₙ₋₁; asked for is y, which one of the tasks makes of x."""
    x = torch.randint(DIGITS, (count, LENGTH), generator=generator(seed, " ".join(tasks), number))
    y = torch.cat(
        [TASKS[t](part) for t, part in zip(tasks, x.tensor_split(len(tasks)), strict=True)]
    )
    ids = torch.cat((x, torch.full((count, 1), DIGITS), y[:, :-1]), 1)
    targets = torch.full_like(ids, IGNORE)
    targets[:, LENGTH:] = y
    return Batch(ids, targets, torch.zeros_like(ids))


@torch.no_grad()
def right(model: Transformer, task: str) -> float:
    """The share of rows of which every digit is right, each read behind the right ones before."""
    exam = rows([task], 200, 0, -1)
    said = model.logits(model(exam.inputs)[:, LENGTH:]).argmax(-1)
    return (said == exam.targets[:, LENGTH:]).all(1).double().mean().item()


def learn(
    model: Transformer, tasks: Sequence[str], config: Demo, lr: float, bar: tqdm
) -> list[float]:
    """Tune what is not frozen; the share of right answers in the first task on the way."""
    how = OptimConfig(lr=lr)
    optimizer, found = build(model.named_parameters(), how), []
    for step in range(config.steps):
        rate = learning_rate(how, step, config.steps)
        update(model, [rows(tasks, config.batch, config.seed, step)], optimizer, rate, how)
        bar.update()
        if step % max(1, config.steps // 10) == 0 or step == config.steps - 1:
            found.append(right(model, tasks[0]))
    return found


def demo(config: Demo) -> None:
    """Teach a model that mixes up its tasks to do one, in several ways, and let it forget none."""
    torch.set_num_threads(1)  # these products are too small to be shared out
    base, new = Transformer(SHAPE, config.seed), list(TASKS)[1:]
    total = config.steps * (4 + len(new) * len(METHODS))
    curves: dict[str, dict[str, list[float]]] = {name: {} for name in METHODS}
    weights = {}
    with tqdm(total=total, unit="step", leave=False, disable=None) as bar:
        learn(base, list(TASKS), replace(config, steps=4 * config.steps), 0.02, bar)
        one = copy.deepcopy(base)  # which shall have all adapters at once
        for name, how in METHODS.items():
            for task in new:
                model = copy.deepcopy(base)
                adapt(model, how, config.seed)
                curves[name][task] = learn(
                    model, [task], config, 0.01 if how == NONE else 0.05, bar
                )
                weights[name] = sum(p.numel() for p in learnt(model).values())
                if name == "LoRA, rank 4":
                    stand(one, model, task, how)
    all = count_parameters(base)
    told = [(name, f"{weights[name]:,}", f"{weights[name] / all:.1%}",
             *(f"{each[task][-1]:.0%}" for task in new))
            for name, each in curves.items()]  # fmt: skip
    before = ("before", "", "", *(f"{right(base, task):.0%}" for task in new))
    print(
        f"{LENGTH} digits, and one of {len(TASKS)} things to do with them, learnt each by itself:\n"
    )
    print(table(("", "weights", "of all", *new), before, *told))
    several(base, one, new)
    draw_curves(curves, weights, path := RUNS / "lora.png")
    print(f"\npicture: {path}")


def stand(one: Transformer, tuned: Transformer, task: str, how: Adapter) -> None:
    """Put the adapter of one model on another one, under the task's name."""
    adapt(one, how, name=task)
    own = dict(one.named_parameters())
    for name, p in learnt(tuned).items():
        own[name.replace(".default.", f".{task}.")].data.copy_(p.data)


def several(base: Transformer, one: Transformer, tasks: list[str]) -> None:
    """The same weights with each adapter in turn, and with none; merged, too."""
    ids = rows(["copy"], 4, 0, 0).inputs
    print("\none base with three adapters of rank 4, switched:\n")
    lines = []
    for task in tasks:
        use(one, {task: 1.0})
        lines.append((task, *(f"{right(one, other):.0%}" for other in TASKS)))
    apart = one.logits(one(ids))
    merge(one)
    apart = (one.logits(one(ids)) - apart).abs().max().item()
    unmerge(one)
    use(one, {})
    lines.append(("none", *(f"{right(one, other):.0%}" for other in TASKS)))
    print(table(("adapter", *TASKS), *lines))
    same = torch.equal(one.logits(one(ids)), base.logits(base(ids)))
    print(
        f"\nmerged, logits differ by {apart:.0e}; with none they are the base's to the bit: {same}"
    )


LOOKS = (("#1f4e8c", "-"), ("#b5892e", "--"), ("#b5892e", "-"), ("#2a7f62", "-."), ("#8c4a6b", ":"))


def draw_curves(curves: dict[str, dict], weights: dict[str, int], path: Path) -> None:
    """Right answers on the way, a panel for each task."""
    tasks = list(next(iter(curves.values())))
    with picture(path, len(tasks), size=(3.6 * len(tasks), 3.8)) as axes:
        for axis, task in zip(axes, tasks, strict=True):
            for (name, each), (color, line) in zip(curves.items(), LOOKS, strict=True):
                y = [100 * r for r in each[task]]
                x = [100 * i / max(1, len(y) - 1) for i in range(len(y))]
                axis.plot(x, y, line, color=color, label=f"{name} ({weights[name]:,})")
            axis.set(title=task, ylim=(-3, 103), xlabel="% of the steps")
        axes[0].set(ylabel="right answers, %")
        axes[0].legend(frameon=False, fontsize=8, loc="upper left")  # all begin low


# --- the comparison -------------------------------------------------------------------------------

MOST = ("query", "value", "output", "up", "gate", "down")  # without keys below 2 % of all weights
WAYS = {  # what is trained, and its learning rate
    "all weights": (NONE, 0.01),
    "LoRA on query, value": (Adapter("lora", 8), 0.02),
    "LoRA on all but keys": (Adapter("lora", 2, alpha=4.0, on=MOST), 0.02),
    "rsLoRA, the same": (Adapter("lora", 2, alpha=2.0, root=True, on=MOST), 0.02),
    "prefix": (Adapter("prefix", tokens=16), 0.02),
    "prefix by MLP": (Adapter("prefix", tokens=16, hidden=32), 0.02),
    "prompt": (Adapter("prompt", tokens=32), 0.05),
}


@dataclass(frozen=True)
class Compare:
    """Tune one run on three tasks, by each method and by all weights."""

    run: str = ""  # a run that was tuned on instructions; empty: sft, made if need be
    tasks: tuple[str, ...] = ("sort", "replace", "count")  # one tuning by each way for each
    ways: tuple[str, ...] = tuple(WAYS)  # methods
    levels: tuple[int, ...] = (1, 2)  # of the tasks' difficulty
    steps: int = 150  # updates
    batch: int = 4  # rows in an update
    asked: int = 100  # questions of each task
    name: str = "compare"  # with which the names of the runs begin
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise UserError(f"--ways {unknown[0]!r} is not one of {', '.join(map(repr, WAYS))}")
        if min(self.steps, self.batch, self.asked) < 1 or not self.tasks or not self.ways:
            raise UserError("--steps, --batch, --asked, and tasks and ways, must be at least 1")


def compare(config: Compare) -> None:
    base = tuned_run(config.run)
    how = Examine(tasks=config.tasks, levels=config.levels, count=config.asked, tokens=60,
                  wording="known", seed=config.seed)  # fmt: skip
    before = examined(writer_of(base, "", config.device), how)
    found: dict[str, list[dict]] = {way: [] for way in config.ways}
    for task in config.tasks:
        for way in config.ways:
            found[way].append(tuned(config, base, task, way, how))
    gains = {way: gain(before, [one["right"] for one in each]) for way, each in found.items()}
    whole = gains.get("all weights", 0.0)
    lines = [("before", "", "", "", "", *(f"{r.right:.0%}" for r in before), "", "")]
    for way, each in found.items():
        one = each[0]
        lines.append(
            (way, f"{one['weights']:,}", f"{one['weights'] / one['of']:.2%}",
             f"{one['bytes'] / 2**20:.1f}", f"{sum(e['seconds'] for e in each) / len(each):.0f}",
             *(f"{e['right']:.0%}" for e in each), f"{100 * gains[way]:+.0f}",
             f"{gains[way] / whole:.0%}" if whole else "")
        )  # fmt: skip
    head = ("", "weights", "of all", "MB", "s", *config.tasks, "gain", "of full tuning's")
    print("\n" + table(head, *lines))
    print("\nMB: weights, gradients and optimizer; s: of the updates alone")
    write_json(RUNS / f"{config.name}.json", {"settings": asdict(config), "found": found,
               "before": [r._asdict() for r in before]})  # fmt: skip
    draw_ways(config, before, found, path := RUNS / f"{config.name}.png")
    print(f"picture: {path}")


def gain(before: list[Result], after: list[float]) -> float:
    return sum(after) / len(after) - sum(r.right for r in before) / len(before)


def tuned(config: Compare, base: str, task: str, way: str, how: Examine) -> dict:
    """One run of one method on one task, and what it costs and can."""
    adapter, lr = WAYS[way]
    lessons = Lessons((task,), config.levels, 4000, think=0.0, seed=config.seed)
    name = f"{config.name}-{task}-{way}".replace(" ", "-").replace(",", "")
    name = trained(
        name, "--base", base, "--objective", "chat", "--data.form", "chat",
        "--data.path", str(lessons_file(lessons)), "--steps", str(config.steps), "--batch",
        str(config.batch), "--optim.lr", str(lr), "--seed", str(config.seed), "--device",
        config.device, *flags(adapter),
    )  # fmt: skip
    run = Run.open(name)
    writer = writer_of(name, "", config.device)
    (result,) = examined(writer, replace(how, tasks=(task,)))
    moved = sum(p.numel() for p in learnt(writer.model).values())
    whole = count_parameters(writer.model) - (moved if adapter != NONE else 0)
    seconds = sum(row.get("seconds", 0.0) for row in run.metrics())
    return {"right": result.right, "low": result.low, "high": result.high, "weights": moved,
            "of": whole, "bytes": 4 * whole + 12 * moved, "seconds": seconds}  # fmt: skip


def draw_ways(config: Compare, before: list[Result], found: dict[str, list[dict]], path: Path):
    """Right answers against trained weights, a panel for each task."""
    marks = "osD^vPX"
    with picture(path, len(config.tasks), size=(3.8 * len(config.tasks), 4.2)) as axes:
        for i, (axis, task) in enumerate(zip(axes, config.tasks, strict=True)):
            axis.axhline(100 * before[i].right, color="#999999", linestyle=":", label="before")
            for mark, (way, each) in zip(marks, found.items(), strict=False):
                one = each[i]
                far = [[100 * (one["right"] - one["low"])], [100 * (one["high"] - one["right"])]]
                axis.errorbar(one["weights"], 100 * one["right"], far, fmt=mark, capsize=2,
                              label=way)  # fmt: skip
            axis.set(xscale="log", ylim=(-3, 105), title=task, xlabel="trained weights")
        axes[0].set(ylabel="right answers, %")
        axes[0].legend(frameon=False, fontsize=8)


STAGES = {"demo": (Demo, demo), "compare": (Compare, compare)}


def script() -> None:
    choose(STAGES, ["demo"], __doc__)


if __name__ == "__main__":
    main(script)
