"""The certificate of parallelism: every plan is tried, and held to what one process computes.

Idea: a parallel program is right if nobody can tell from its numbers that it was parallel. A small
model with all that is hard to divide (an odd vocabulary, tied embeddings, biases, dropout, targets
that are not asked, a clipped gradient) takes a few steps under each plan, and each rank's numbers
are laid beside those of one process:

    loss and norm     at most 1e-12 apart, in float64
    gradients         at most 1e-10 of the weight's largest gradient apart
    weights           at most 1e-9 apart
    bits              in exact mode, in fp32, the same under every plan
    bytes             held and sent by each rank: as the formulas of traffic.py say
    in flight         micro-batches that a stage keeps at once: as the schedule says

The function that trains is handed in, so that a wrong one can be tried as well: `parallel.trained`
is the one to be certified.

Run: python parallel.py certificate      every plan of 1, 2, 4 and 8 processes
     python parallel.py                  the most different of them, in a minute

Letters: B batch · T tokens · C model width · V vocabulary · M micro-batches.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dropout import drawn_from
from mesh import Mesh, Plan
from model import ModelConfig, Transformer
from objectives import IGNORE, Batch
from optim import OptimConfig, Optimizer, build
from pictures import picture, table
from ranks import Ranks
from run import RUNS, UserError, generator
from schedule import SCHEDULES, Played, draw, simulate
from split import Place
from step import update
from traffic import held, sent
from zero import held as pieces
from zero import holders

MODEL = ModelConfig(
    dim=32, layers=5, heads=8, kv_heads=8, context=12, vocab_size=97, ffn_dim=40, bias=True,
    norm="layernorm", dropout=0.1,
)  # fmt: skip
OPTIM = OptimConfig("adamw", lr=0.01, clip=0.5)
ROWS = 8  # of a batch
LAWS = {"losses": 1e-12, "gradients": 1e-10, "weights": 1e-9}  # the largest differences
# What the bytes of each group are for
SIDES = {"data": ("data",), "pipeline": ("up", "down", "ends"), "tensor": ("tensor",),
         "norm and loss": ("model", "world")}  # fmt: skip


def plans(most: int = 8, zero: bool = True) -> list[Plan]:
    """Every data × pipeline × tensor of 1, 2, 4, … ranks; with each ZeRO that it can have."""
    powers = [1 << i for i in range(most.bit_length())]
    found = [Plan(*sides) for sides in product(powers, repeat=3)]
    found = sorted((plan for plan in found if plan.size <= most), key=lambda plan: plan.size)
    return [
        replace(plan, zero=stage) for plan in found for stage in zeros(plan if zero else Plan())
    ]


def zeros(plan: Plan) -> range:
    """Copies divide among them the optimizer's state; with one stage gradients and weights, too."""
    return range(1) if plan.data == 1 else range(2) if plan.pipeline > 1 else range(4)


QUICK = [Plan(), Plan(2), Plan(1, 2), Plan(1, 1, 2), Plan(4, zero=1), Plan(2, zero=3),
         Plan(2, 2, 2), Plan(2, 1, 4, zero=2), Plan(1, 4, 2)]  # fmt: skip


# --- one process, and many ------------------------------------------------------------------------

# A function that trains returns its part, its optimizer and what it says of each update.
Train = Callable[[ModelConfig, Plan, Mesh, list, OptimConfig, torch.dtype], tuple]


class Alone(NamedTuple):
    """What one process computes."""

    made: list[tuple[float, float]]  # loss and norm of each step
    gradients: dict[str, Tensor]  # of the last step, clipped
    weights: dict[str, Tensor]


class Said(NamedTuple):
    """What one of many ranks says of the same."""

    made: list[tuple[float, float]]
    gradients: list[tuple[Place, Tensor]]
    weights: list[tuple[Place, Tensor]]
    at: tuple[int, int, int]  # copy, stage, place among tensor ranks
    held: tuple[int, int, int]  # bytes of weights, gradients and the optimizer's state
    sent: Counter  # bytes of all steps, by group and kind
    in_flight: int
    seconds: float  # of all steps


def batches_of(config: ModelConfig, step: int, rows: int = ROWS) -> list[Batch]:
    """Random rows, of whose targets some are not asked, in some rows most."""
    rng = generator(0, "batch", step)
    ids, targets = torch.randint(0, config.vocab_size, (2, rows, config.context), generator=rng)
    hidden = torch.rand(rows, config.context, generator=rng) < torch.rand(rows, 1, generator=rng)
    lo = torch.zeros_like(ids)
    hi = torch.full_like(ids, config.context - 1) if config.arch == "encoder" else None
    source = ()
    if config.arch == "encdec":
        last = torch.full_like(ids, config.context - 1)
        source = torch.randint_like(ids, config.vocab_size, generator=rng), lo, last, lo, last
    batch = Batch(ids, targets.masked_fill(hidden, IGNORE), lo, hi, *source)
    batch.draws = drawn_from(0, step, 0, rows)
    return [batch]


def alone(
    config: ModelConfig, steps: int, dtype: torch.dtype = torch.float64, optim: OptimConfig = OPTIM
) -> Alone:
    """The plain model, after the plain update with each batch."""
    model = Transformer(config, 0).to(dtype)
    optimizer = build(model.named_parameters(), optim, dtype)
    made = [
        update(model, batches_of(config, s), optimizer, optim.lr, optim, dtype)
        for s in range(steps)
    ]
    named = dict(model.named_parameters())
    return Alone(
        [(m.loss, m.norm) for m in made],
        {name: p.grad for name, p in named.items()},
        {name: p.detach() for name, p in named.items()},
    )


def together(
    train: Train, config: ModelConfig, plan: Plan, steps: int, dtype: torch.dtype = torch.float64,
    optim: OptimConfig = OPTIM,
) -> Said | None:  # fmt: skip
    """The same by this rank; None from one that the plan does not need."""
    torch.use_deterministic_algorithms(plan.exact)
    mesh = Mesh(plan.data, plan.pipeline, plan.tensor, plan.exact)
    if not mesh.inside:
        return None
    with closing(mesh):
        batches = [batches_of(config, s) for s in range(steps)]
        start = time.perf_counter()
        part, optimizer, made = train(config, plan, mesh, batches, optim, dtype)
        seconds = time.perf_counter() - start
        weights = [(place, x) for kind, place, x in pieces(part, optimizer) if kind == "weight"]
        return Said(
            [(m.loss, m.norm) for m in made],
            [(p.place, p.grad) for p in holders(part)],
            weights,
            mesh.at,
            held_by(part, optimizer),
            mesh.traffic,
            part.in_flight,
            seconds,
        )


def held_by(part: Transformer, optimizer: Optimizer) -> tuple[int, int, int]:
    """Bytes of the memory behind weights, gradients and the optimizer's state."""
    params = [*part.parameters(), *holders(part), *(part.shards.of.values() if part.shards else ())]
    grads = [p.grad for p in params if p.grad is not None]
    state = [x for tensors in optimizer.state.values() for x in tensors.values()]
    return in_memory(params), in_memory(grads), in_memory(state)


def in_memory(tensors: list[Tensor]) -> int:
    """Bytes, of memory that several tensors share once."""
    memory = [x.untyped_storage() for x in tensors]
    return sum({x.data_ptr(): x.nbytes() for x in memory}.values())


# --- the laws -------------------------------------------------------------------------------------


def differences(plain: Alone, found: list[Said]) -> dict[str, float]:
    """The largest of each kind, over all ranks; infinite where a weight is nobody's."""
    most = dict.fromkeys(LAWS, 0.0)
    for said in found:
        ours, theirs = torch.tensor([said.made, plain.made], dtype=torch.float64)
        most["losses"] = max(most["losses"], largest(ours - theirs))
        for place, own in said.gradients:
            whole = plain.gradients[place.name]
            apart = largest(own - place.read(whole)) / (largest(whole) + 1e-3)
            most["gradients"] = max(most["gradients"], apart)
        for place, own in said.weights:
            apart = largest(own - place.read(plain.weights[place.name]))
            most["weights"] = max(most["weights"], apart)
    held = {place.name for said in found for place, _ in said.weights}
    return most if held == set(plain.weights) else dict.fromkeys(LAWS, inf)


def largest(x: Tensor) -> float:
    """max |x|; what is no number is infinite, since NaN is larger than nothing."""
    return x.abs().nan_to_num(inf, inf).max().item() if x.numel() else 0.0


def same_bits(first: list[Said], found: list[Said]) -> bool:
    """Losses, norms and every part of every weight, in exact mode."""
    known = {(place.name, place.part): own for place, own in first[0].weights}
    return all(
        said.made == first[0].made
        and all(torch.equal(own, known[place.name, place.part]) for place, own in said.weights)
        for said in found
    )


class Line(NamedTuple):
    """What was found of a plan."""

    plan: Plan
    apart: dict[str, float]
    bits: bool | None  # are they the same in exact mode, if the plan has one?
    held: float  # bytes of a rank, the mean of all
    sent: dict[str, float]  # likewise, in an update
    counted: list[str]  # what is held or sent and is not as the formula says, in words
    in_flight: list[int]  # of each stage


def examined(ranks: Ranks, train: Train, tried: list[Plan], steps: int) -> list[Line]:
    """All plans, behind a bar; the first must be that of one process."""

    def said(plan: Plan, dtype: torch.dtype) -> list[Said]:
        arguments = together, train, MODEL, plan, steps, dtype
        return [x for x in ranks.run(*arguments, timeout=60 * steps) if x]

    plain, first, lines = alone(MODEL, steps), None, []
    for plan in tqdm(tried, desc="plans", leave=False, disable=None):
        found, bits = said(plan, torch.float64), None
        if plan.zero < 2:
            again = said(replace(plan, exact=True), torch.float32)
            first = first or again
            bits = same_bits(first, again)
        kept = [max(x.in_flight for x in found if x.at[1] == s) for s in range(plan.pipeline)]
        mean = sum(sum(x.held) for x in found) / len(found)
        lines.append(Line(plan, differences(plain, found), bits, mean, by_side(found, steps),
                          miscounted(plan, found, steps), kept))  # fmt: skip
    return lines


def by_side(found: list[Said], steps: int) -> dict[str, float]:
    total = sum((said.sent for said in found), Counter())
    return {
        side: sum(n for (group, _), n in total.items() if group in groups) / steps / len(found)
        for side, groups in SIDES.items()
    }


def miscounted(
    plan: Plan, found: list[Said], steps: int, config: ModelConfig = MODEL, w: int = 8
) -> list[str]:
    """In words each count of bytes that is not the formula's; w bytes a number."""
    wrong = []
    for said in found:
        want = held(config, plan, said.at, w)
        for what, own, formula in zip(
            ("weights", "gradients", "state"), said.held, want, strict=True
        ):
            if own != formula:
                wrong.append(f"rank {said.at} holds {own:,} bytes of {what}, not {formula:,}")
        want = sent(config, plan, said.at, w, ROWS)
        for kind in sorted(want.keys() | said.sent.keys()):
            own, formula = said.sent[kind] / steps, want.get(kind, 0.0)
            if abs(own - formula) > 1e-9 * formula:  # 2(N − 1)/N is no binary number
                wrong.append(
                    f"rank {said.at} sends {own:,.0f} bytes by {' '.join(kind)}, not {formula:,.0f}"
                )
    return wrong


def keeps(plan: Plan) -> list[int]:
    """Micro-batches that each stage keeps; a copy's share is cut into as many as it has stages."""
    one = [1.0] * plan.pipeline
    return simulate(SCHEDULES[plan.schedule](plan.pipeline, plan.pipeline), one, one).kept


def broken(line: Line) -> list[str]:
    """The laws that a plan breaks, each in words."""
    said = [
        f"its {what} differ by {line.apart[what]:.1e} and not at most {law:g}"
        for what, law in LAWS.items()
        if not line.apart[what] <= law
    ]
    said += line.counted[:1]
    if line.bits is False:
        said.append("exact mode ends in other bits than one process")
    if line.in_flight != keeps(line.plan):
        said.append(f"its stages keep {line.in_flight} micro-batches, not {keeps(line.plan)}")
    return said


MIXED = [Plan(), Plan(2, 2, 2), Plan(4, 1, 2, zero=1), Plan(1, 4, 2), Plan(2, 1, 4),
         Plan(1, 2, 4), Plan(2, 2, 2, zero=1, schedule="gpipe")]  # fmt: skip


def of_exact(ranks: Ranks, train: Train, steps: int, width: int) -> None:
    """Exact and fast mode of the same updates in fp32: the bits, and what exactness costs."""
    model = replace(MODEL, dim=width, ffn_dim=2 * width, context=width)
    first, rows, wrong = None, [], []
    for plan in tqdm(MIXED, desc="plans", leave=False, disable=None):
        took = []
        for exact in (False, True):
            arguments = together, train, model, replace(plan, exact=exact), steps, torch.float32
            found = [x for x in ranks.run(*arguments, timeout=60 * steps) if x]
            took.append(max(x.seconds for x in found))
        first = first or found
        if not (same := same_bits(first, found)):
            wrong.append(in_words(plan))
        fast, slow = took
        rows.append((in_words(plan), f"{fast:.1f}", f"{slow:.1f}", f"{slow / fast:.2f} ×",
                     "same" if same else "OTHER"))  # fmt: skip
    print(table(("data × pipeline × tensor", "fast, s", "exact, s", "exact/fast", "bits"), *rows))
    if wrong:
        sys.exit(f"exact mode ends in other bits than one process under {', '.join(wrong)}")


# --- what is shown --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """Hold plans to what one process computes."""

    ranks: int = 8  # processes at most, 1, 2, 4 or 8
    steps: int = 5  # updates under each plan
    quick: bool = False  # only the plans that differ most
    exact: bool = False  # instead exact mode, on six plans that mix sides, and what it costs
    width: int = 32  # of the model whose exact mode is tried; its rows have as many tokens

    def __post_init__(self):
        if self.ranks not in (1, 2, 4, 8):
            raise UserError(f"--ranks {self.ranks} must be 1, 2, 4 or 8")
        if self.exact and self.ranks < 8:
            raise UserError(
                f"--exact tries plans of 8 processes, not of {self.ranks}: leave --ranks out"
            )
        if self.width < 16 or self.width % 16:
            raise UserError(f"--width {self.width} must be a multiple of 16")
        if not 1 <= self.steps <= 1000:
            raise UserError(f"--steps {self.steps} must be from 1 to 1000")

    @property
    def plans(self) -> list[Plan]:
        chosen = QUICK if self.quick else plans(self.ranks)
        return [plan for plan in chosen if plan.size <= self.ranks]


def certify(config: Certificate, train: Train) -> None:
    """Try the plans and show what was found; exit status 1 if a law is broken."""
    with closing(Ranks(config.ranks)) as ranks:
        if config.exact:
            return of_exact(ranks, train, config.steps, config.width)
        lines = examined(ranks, train, config.plans, config.steps)
    show(lines)
    path = RUNS / "certificate.png"
    draw_lines(lines, path)
    print(f"\npicture: {path}")
    if wrong := [line for line in lines if broken(line)]:
        first = f"first under {in_words(wrong[0].plan)}: {', '.join(broken(wrong[0]))}"
        sys.exit(f"broken under {len(wrong)} of {len(lines)} plans, {first}")
    worst = {what: max(line.apart[what] for line in lines) for what in LAWS}
    print(
        f"\nShown: under each of {len(lines)} plans of 1 to {config.ranks} processes, "
        f"{config.steps} updates are those of one process, to {worst['losses']:.0e} in losses and "
        f"norms, {worst['gradients']:.0e} in gradients and {worst['weights']:.0e} in weights; in "
        "exact mode they end in the same bits, each rank holds and sends as many bytes as the "
        "formulas say, and no stage keeps more micro-batches than its schedule says."
    )


def in_words(plan: Plan) -> str:
    divided = f" ZeRO {plan.zero}" if plan.zero else ""
    return f"{plan.data} × {plan.pipeline} × {plan.tensor}{divided}"


def show(lines: list[Line]) -> None:
    model = f"{MODEL.layers} blocks, {MODEL.dim} wide, {MODEL.vocab_size} tokens"
    print(f"{model}; {ROWS} rows of {MODEL.context} tokens an update\n")
    head = ("data × pipeline × tensor", *LAWS, "bits", "holds, kB", "sends, kB", "formula", "keeps")
    rows = [
        (in_words(line.plan), *(f"{x:.0e}" for x in line.apart.values()),
         {True: "same", False: "OTHER", None: ""}[line.bits], f"{line.held / 1e3:,.0f}",
         f"{sum(line.sent.values()) / 1e3:,.0f}", "OTHER" if line.counted else "equal",
         " ".join(map(str, line.in_flight)))
        for line in lines
    ]  # fmt: skip
    print(table(head, *rows))


def draw_lines(lines: list[Line], path: Path) -> None:
    """Differences beside their laws, bytes by what they are for, and the two schedules."""
    size = 18, 1.6 + 0.3 * max(10, len(lines))
    with picture(path, columns=3, size=size) as (errors, traffic, schedules):
        draw_errors(lines, errors)
        draw_traffic(lines, traffic)
        for axes in (errors, traffic):
            axes.set(yticks=range(len(lines)), ylim=(len(lines) - 0.5, -0.5),
                     yticklabels=[in_words(line.plan) for line in lines])  # fmt: skip
        draw_schedules(schedules)


def draw_errors(lines: list[Line], axes) -> None:
    """Zero is drawn at the left edge, as what float64 cannot tell from zero."""
    for (what, law), color in zip(LAWS.items(), ("#1f4e8c", "#b5892e", "#2a7f62"), strict=True):
        apart = [min(1.0, max(1e-18, line.apart[what])) for line in lines]
        axes.plot(apart, range(len(lines)), "o", color=color, label=what)
        axes.axvline(law, color=color, linestyle="--", linewidth=1)
    axes.set(xscale="log", xlim=(5e-19, 2e-8), ylabel="data × pipeline × tensor",
             xlabel="largest difference; its law dashed", title="Against one process")  # fmt: skip
    axes.legend(frameon=False, loc="lower left")


def draw_traffic(lines: list[Line], axes) -> None:
    left = [0.0] * len(lines)
    for side, color in zip(SIDES, ("#1f4e8c", "#b5892e", "#2a7f62", "#999999"), strict=True):
        width = [line.sent[side] / 1e3 for line in lines]
        axes.barh(range(len(lines)), width, left=left, color=color, label=side)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.set(xlabel="kB that a rank sends in an update", title="What is sent, and for what")
    axes.legend(frameon=False)


def draw_schedules(axes, stages: int = 4, micros: int = 8) -> None:
    """Both schedules, one below the other; a backward pass takes twice as long."""
    forward, backward = [1.0] * stages, [2.0] * stages
    made = {name: SCHEDULES[name](stages, micros) for name in ("gpipe", "1f1b")}
    played = {name: simulate(plan, forward, backward) for name, plan in made.items()}
    starts = [*played["gpipe"].starts, [], *played["1f1b"].starts]  # a line between them is empty
    draw([*made["gpipe"], [], *made["1f1b"]], Played(starts, played["1f1b"].makespan, []),
         [*forward, 0.0, *forward], [*backward, 0.0, *backward], axes)  # fmt: skip
    for top, (name, it) in zip((0, stages + 1), played.items(), strict=True):
        kept = ", ".join(map(str, it.kept))
        axes.text(0, top - 0.6, f"{name}: the stages keep {kept} micro-batches", va="bottom")
    labels = [*map(str, range(stages)), "", *map(str, range(stages))]
    axes.set(yticklabels=labels, ylim=(2 * stages + 0.6, -1.2), title="Who computes when")
    axes.grid(False)
