"""Pipeline schedules as data: who computes which micro-batch when, checked before it runs.

Idea: a model cut into p stages is an assembly line. A stage that only waits for the others wastes
its time, so the batch is cut into m micro-batches that follow each other. A schedule is a list of
steps for each stage; what must travel between stages follows from the steps.

    gpipe   all forward passes, then all backward passes: m activations are kept
    1f1b    as soon as the line is full, each forward pass is followed by a backward pass:
            the same time, but stage s keeps at most p − s activations

With f and b the time of a forward and a backward pass of one stage, both take (m + p − 1)(f + b),
of which (p − 1)(f + b) are waiting, the bubble.

Sends never wait and each channel has one direction, so a schedule cannot lock up if every step's
needs come from an earlier one; `simulate` plays it, and refuses one that stands still.

Run: python -m pytest tests/test_schedule.py

Papers: Huang et al. 2019, GPipe (arXiv 1811.06965); Narayanan et al. 2019, PipeDream (1F1B);
Narayanan et al. 2021 (arXiv 2104.04473, figures 3 and 4).
"""

from typing import NamedTuple

from run import UserError


class Step(NamedTuple):
    """A forward pass (back = False) or a backward pass of one micro-batch on one stage."""

    back: bool
    micro: int


Schedule = list[list[Step]]  # for each stage its steps, in order


def gpipe(stages: int, micros: int) -> Schedule:
    """Every stage: all forward, then all backward  (Huang et al. 2019, figure 2c)."""
    return [[Step(back, i) for back in (False, True) for i in range(micros)]
            for _ in range(stages)]  # fmt: skip


def one_f_one_b(stages: int, micros: int) -> Schedule:
    """Stage s: p − 1 − s forward passes, then one forward, one backward in turn, then the rest."""
    plan = []
    for stage in range(stages):
        warm = min(stages - 1 - stage, micros)
        steps = [Step(False, i) for i in range(warm)]
        for i in range(micros - warm):
            steps += [Step(False, warm + i), Step(True, i)]
        plan.append(steps + [Step(True, i) for i in range(micros - warm, micros)])
    return plan


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}


class Played(NamedTuple):
    """What a schedule comes to."""

    starts: list[list[float]]  # of each stage's steps
    makespan: float
    kept: list[int]  # per stage: most micro-batches between forward and backward at once


def simulate(plan: Schedule, forward: list[float], backward: list[float]) -> Played:
    """Play a schedule: a step begins when its stage is free and what it needs has come.

    forward and backward: seconds of each stage. A forward pass needs that of the stage before, a
    backward pass that of the stage behind and its own forward pass. UserError for a schedule that
    stands still, or leaves something out or does it twice.
    """
    stages, done = len(plan), {}
    micros = {step.micro for step in plan[0]}
    for stage, steps in enumerate(plan):
        if sorted(steps) != sorted(Step(back, i) for back in (False, True) for i in micros):
            raise UserError(f"stage {stage} of the schedule leaves out a step or does one twice")
    free, place = [0.0] * stages, [0] * stages
    starts: list[list[float]] = [[] for _ in plan]
    while any(place[s] < len(plan[s]) for s in range(stages)):
        moved = False
        for s in range(stages):
            while place[s] < len(plan[s]):
                step = plan[s][place[s]]
                needs = [(s + 1, step)] if step.back and s + 1 < stages else []
                needs += [(s, Step(False, step.micro))] if step.back else []
                needs += [(s - 1, step)] if not step.back and s else []
                if any(need not in done for need in needs):
                    break
                start = max([free[s], *(done[need] for need in needs)])
                free[s] = done[s, step] = start + (backward if step.back else forward)[s]
                starts[s].append(start)
                place[s], moved = place[s] + 1, True
        if not moved:
            s = next(s for s in range(stages) if place[s] < len(plan[s]))
            raise UserError(f"the schedule stands still: stage {s} waits at {plan[s][place[s]]}")
    return Played(starts, max(free), [most_kept(steps) for steps in plan])


def most_kept(steps: list[Step]) -> int:
    """The most micro-batches whose forward pass is done and backward pass is not."""
    now = most = 0
    for step in steps:
        now += -1 if step.back else 1
        most = max(most, now)
    return most


def draw(plan: Schedule, played: Played, forward: list[float], backward: list[float], axes) -> None:
    """Time from left to right, a line for each stage, a box for each step with its number."""
    for stage, (steps, starts) in enumerate(zip(plan, played.starts, strict=True)):
        for step, start in zip(steps, starts, strict=True):
            width = (backward if step.back else forward)[stage]
            color = "#b5892e" if step.back else "#1f4e8c"
            axes.barh(stage, width, left=start, color=color, edgecolor="white")
            axes.text(start + width / 2, stage, step.micro, ha="center", va="center",
                      color="white", fontsize=7)  # fmt: skip
    axes.set(yticks=range(len(plan)), ylabel="stage", xlabel="time")
    axes.invert_yaxis()
