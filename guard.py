"""A run that nobody watches: when it spikes it goes back, when it fails it is stopped.

Idea: now and then one batch throws a model off its course. Loss or gradient jump; the model needs
long to recover, if it ever does. From the same checkpoint with other batches there is no spike
(Chowdhery et al. 2022, section 5.1). So a jump is looked for in each update: a value far above the
median of those just before, measured by how far such neighbours lie apart. Then the run goes back
to a checkpoint from before, and passes over the rows it read since shortly before the jump.

A failing run is another matter: its held-out loss rises above the curve it was on. The curve is
a + b·step⁻ᶜ, fitted to the evaluations before the last few.

Run: python -m pytest tests/test_guard.py

Papers: Chowdhery et al. 2022, PaLM (arXiv 2204.02311); Leys et al. 2013, the median absolute
deviation (doi 10.1016/j.jesp.2013.03.013); Hestness et al. 2017, the curve (arXiv 1712.00409).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np

from run import UserError


@dataclass(frozen=True)
class GuardConfig:
    """What counts as a spike or a failure, and what is done about it."""

    window: int = 50  # updates that a loss and a gradient are compared with; 0: no guard
    spike: float = 7.0  # deviations above the median that make a spike (of a norm thrice as many)
    skip: int = 4  # updates whose rows are passed over: the one with the spike and those before
    patience: int = 3  # evaluations above their forecast after which a run is stopped; 0: never
    ranks: int = 100  # updates between looks whether processes still hold the same; 0: never

    def __post_init__(self):
        if self.window and not LEAST <= self.window <= 10_000:
            raise UserError(f"--guard.window {self.window} must be 0, or from {LEAST} to 10,000")
        if not 1 <= self.skip <= 10_000:
            raise UserError(f"--guard.skip {self.skip} must be from 1 to 10,000")
        if not 1 <= self.spike < math.inf:
            raise UserError(f"--guard.spike {self.spike} must be at least 1")
        if not 0 <= self.ranks <= 10**9:
            raise UserError(f"--guard.ranks {self.ranks} must be from 0 to 1,000,000,000")
        if not 0 <= self.patience <= 1000:
            raise UserError(f"--guard.patience {self.patience} must be from 0 to 1,000")


LEAST = 20  # updates whose median counts, and without which nothing is a spike yet
NORMAL = 1.4826  # standard deviations that a median absolute deviation is, where noise is normal
LIMITS = {  # least deviation, as a share of the value; limit as a multiple of `spike`
    "loss": (0.02, 1.0),
    "gradient's norm": (0.1, 3.0),  # whose noise has long tails where texts are of many kinds
}
AGAIN = 3  # spikes behind one checkpoint that make it a run which diverges


def deviations(past: Sequence[float], value: float, floor: float) -> float:
    """How many deviations log(value) lies above the median of the last of log(past).

    One deviation is 1.4826·median|log xᵢ₊₁ − log xᵢ|/√2, at least `floor`: what neighbours differ
    by is noise, while all of the past together also lies along a slope.
    """
    logs = [math.log(max(x, 1e-30)) for x in past]
    deviation = NORMAL * median(abs(b - a) for a, b in pairwise(logs)) / math.sqrt(2)
    return (math.log(max(value, 1e-30)) - median(logs[-LEAST:])) / max(deviation, floor)


CALM = 0.05  # nats: so small a loss is of what is known by heart, where ten times more is no fault
Made = tuple[float, float]  # of an update: its loss and its gradient's norm


def spike(config: GuardConfig, past: Sequence[Made], now: Made) -> str:
    """In words what has jumped, or an empty string.

    `past` are those of the last updates, of which there may be too few to tell.
    """
    if not config.window or len(past) < LEAST or (now[0] < CALM and math.isfinite(now[1])):
        return ""
    columns = zip(*past, strict=True)
    for (what, (floor, more)), before, value in zip(LIMITS.items(), columns, now, strict=True):
        limit = more * config.spike
        if not math.isfinite(value) or deviations(before, value, floor) > limit:
            return f"the {what} jumped from about {median(before):.3g} to {value:.3g}"
    return ""


class Skip(NamedTuple):
    """Rows of the text that are passed over, and why."""

    first: int  # row
    end: int  # the row behind the last
    step: int  # update in which it was seen
    back_to: int  # step of the checkpoint that the run went on from
    why: str


# --- the forecast ---------------------------------------------------------------------------------


class Curve(NamedTuple):
    """a + b·step⁻ᶜ, and the standard deviation of what it was fitted to."""

    a: float
    b: float
    c: float
    error: float

    def at(self, step: int) -> float:
        return self.a + self.b * step**-self.c


EXPONENTS = np.linspace(0.05, 2, 40)


def fit(steps: Sequence[int], losses: Sequence[float]) -> Curve:
    """Least squares: for each c of a grid a and b are linear; neither is negative, as losses fall
    and are none."""
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    best = Curve(y.mean(), 0.0, 1.0, y.std())
    for c in EXPONENTS:
        powers = np.stack([np.ones_like(x), x**-c], axis=1)
        (a, b), *_ = np.linalg.lstsq(powers, y, rcond=None)
        if a < 0:
            a, b = 0.0, powers[:, 1] @ y / (powers[:, 1] @ powers[:, 1])
        error = np.sqrt(np.mean((powers @ (a, b) - y) ** 2))
        if b >= 0 and error < best.error:
            best = Curve(a, b, c, error)
    return best


EARLY = 6  # evaluations that a forecast needs
MARGIN = 0.1  # share of a forecast that a loss may lie above it, at least; at most 5 deviations


def failing(evaluations: Sequence[tuple[int, float]], patience: int) -> str:
    """In words why a run is to be stopped, or an empty string.

    evaluations: (step, held-out loss). The last `patience` of them are compared with the curve
    through all before, and all must lie above it.
    """
    if not patience or len(evaluations) < EARLY + patience:
        return ""
    early, late = evaluations[:-patience], evaluations[-patience:]
    curve = fit(*zip(*early, strict=True))
    for step, loss in late:
        if loss <= curve.at(step) + max(5 * curve.error, MARGIN * curve.at(step)):
            return ""
    step, loss = late[-1]
    return (
        f"the held-out loss {loss:.3f} has been above its forecast, {curve.at(step):.3f} at step "
        f"{step:,}, for {patience} evaluations"
    )
