"""What a run will reach, said before it begins; and whether it is on its way there.

Idea: at each share of their steps (5 %, 10 %, …) small runs obey a law of their parameters and
tokens, as they do at the end. So the whole curve of a larger run can be forecast, share by share.
How far to trust it has two parts: a bootstrap's, for the noise of the runs; and what the law gets
wrong, seen by fitting it without the largest budget and forecasting that. A run that lies far above
its forecast has something wrong with it, and is stopped before it has cost what it would have.

Run: python scaling.py forecast --width 96 --steps 1920     writes forecast.json

Papers: OpenAI 2023, GPT-4's technical report (arXiv 2303.08774, section 3); Hoffmann et al. 2022.

Letters: N parameters · D tokens · n runs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from laws import Fit, fit, least
from pictures import picture
from run import Run, UserError, read_json, settings, write_json

SHARES = np.arange(1, 21) / 20  # of the steps, at which curves are compared
RESAMPLES = 200
OUTSIDE = 4.0  # standard deviations above its forecast with which a run is stopped
SURE = 0.02  # least standard deviation of log L that is believed
FILE = "forecast.json"


class Small(NamedTuple):
    """A finished run that a law is fitted to."""

    name: str
    N: int
    D: int
    curve: np.ndarray  # bits per byte at each of SHARES; nan before its first evaluation

    @property
    def loss(self) -> float:
        return float(self.curve[-1])


def curve(evaluations: Sequence[tuple[int, float]], steps: int) -> np.ndarray:
    """Losses at SHARES of the steps: between evaluations (step, loss) along log step."""
    x, y = np.array(evaluations, float).T
    found = np.interp(np.log(SHARES * steps), np.log(x), y)
    return np.where(SHARES * steps < x[0] - 0.5, np.nan, found)


@dataclass(frozen=True)
class Forecast:
    """The losses of a run that has not begun."""

    command: str = ""  # that begins it
    parameters: int = 0
    tokens: int = 0
    held_out: str = ""  # which documents, by their hash
    runs: tuple[str, ...] = ()  # that it is made from
    shares: tuple[float, ...] = ()  # of the steps
    middle: tuple[float, ...] = ()  # bits per byte, as likely below as above
    spread: tuple[float, ...] = ()  # standard deviation of their logarithm
    follows: tuple[float, ...] = ()  # correlation of its error then and at the end

    def at(self, share: float) -> tuple[float, float]:
        """(bits per byte, standard deviation of their logarithm) at a share of the steps."""
        x = np.log(self.shares)
        middle = np.interp(math.log(share), x, np.log(self.middle))
        return math.exp(middle), float(np.interp(math.log(share), x, self.spread))

    def interval(self, share: float = 1.0, holds: float = 0.8) -> tuple[float, float]:
        """Between which losses the run lies with this probability."""
        middle, spread = self.at(share)
        z = NormalDist().inv_cdf((1 + holds) / 2)
        return middle * math.exp(-z * spread), middle * math.exp(z * spread)

    def limit(self, share: float) -> float:
        """The loss above which something is wrong."""
        middle, spread = self.at(share)
        return middle * math.exp(OUTSIDE * spread)

    def from_here(self, share: float, loss: float, holds: float = 0.8) -> tuple[float, ...]:
        """(least, middle, greatest) loss at the end of a run that has come this far.

        As log-losses then and at the end are normal together: its error now stays in part.
        """
        (now, then), (end, spread) = self.at(share), self.at(1.0)
        rho = float(np.interp(math.log(share), np.log(self.shares), self.follows))
        middle = math.log(end) + rho * spread / then * math.log(loss / now)
        rest = NormalDist().inv_cdf((1 + holds) / 2) * spread * math.sqrt(1 - rho**2)
        return math.exp(middle - rest), math.exp(middle), math.exp(middle + rest)


# --- from small runs ------------------------------------------------------------------------------


def law_of(runs: Sequence[Small], share: int = -1, resamples: int = 0) -> Fit:
    """E + A/N^α + B/D^β at one of SHARES."""
    x = [(run.N, run.D) for run in runs]
    return fit(x, [run.curve[share] for run in runs], resamples=resamples)


def misfit(runs: Sequence[Small], share: int) -> float:
    """By how much (log, root mean square) the runs of the largest budget differ from what those of
    smaller ones say of them; 0 if these are too few for a law."""
    top = max(run.N * run.D for run in runs) / 1.5
    small, large = [r for r in runs if top > r.N * r.D], [r for r in runs if top <= r.N * r.D]
    try:
        law = law_of(small, share).law
    except UserError:
        return 0.0
    return float(np.mean([np.log(r.curve[share] / law(r.N, r.D)) ** 2 for r in large]) ** 0.5)


def forecast(runs: Sequence[Small], N: int, D: int, command: str, held_out: str) -> Forecast:
    """The curve of a run with N parameters and D tokens. UserError if the runs are too few."""
    known = [i for i in range(len(SHARES)) if not any(math.isnan(r.curve[i]) for r in runs)]
    if len(runs) < least(2):
        law_of(runs)  # says how many are missing
    fits = [law_of(runs, i, RESAMPLES) for i in known]
    middle = [float(f.law(N, D)) for f in fits]
    spread = []
    for i, f in zip(known, fits, strict=True):
        noise = float(np.std(f.residuals))
        doubt = float(np.std(np.log([law(N, D) for law in f.resampled])))
        spread.append(max(SURE, math.hypot(doubt, max(noise, misfit(runs, i)))))
    errors = np.array([f.residuals for f in fits])
    follows = np.atleast_2d(np.corrcoef(errors))[-1].clip(0, 0.99)  # of one share it is a number
    return Forecast(
        command, N, D, held_out, tuple(r.name for r in runs), tuple(SHARES[known].tolist()),
        tuple(middle), tuple(spread), tuple(follows.tolist()),
    )  # fmt: skip


# --- as a file ------------------------------------------------------------------------------------


def write(forecast: Forecast, path: Path) -> None:
    write_json(path, asdict(forecast))


def read(path: Path) -> Forecast:
    """UserError, in one sentence, if it is no forecast."""
    found = settings(Forecast, read_json(path), str(path))
    rows = (found.shares, found.middle, found.spread, found.follows)
    numbers = [x for row in rows for x in row]
    if not found.shares or len({len(row) for row in rows}) > 1 or not np.isfinite(numbers).all():
        raise UserError(f"{path} is damaged: its curve is incomplete")
    if min(numbers) < 0 or min(*found.middle, *found.spread, found.shares[0]) <= 0:
        raise UserError(f"{path} is damaged: its numbers must be above 0")
    return found


def check(forecast: Forecast, N: int, D: int, held_out: str, path: str) -> None:
    """UserError if it is the forecast of another run."""
    for what, said, is_ in (
        ("parameters", forecast.parameters, N),
        ("tokens of training", forecast.tokens, D),
    ):
        if said != is_:
            raise UserError(
                f"{path} is the forecast of another run: {said:,} {what}, not {is_:,}; "
                f"it belongs to {forecast.command}"
            )
    if forecast.held_out != held_out:
        raise UserError(f"{path} is the forecast of a run with other held-out documents")


# --- during the run -------------------------------------------------------------------------------


def evaluations(run: Run) -> list[tuple[int, float]]:
    """(step, bits per byte) of the held-out documents."""
    rows = run.metrics()
    return [(r["step"], r["bits_per_byte"]) for r in rows if "bits_per_byte" in r]


def last(run: Run) -> tuple[int, float]:
    return evaluations(run)[-1]


def in_words(forecast: Forecast, step: int, steps: int, loss: float) -> str:
    """How a run does, and where that leads."""
    share = max(step / steps, forecast.shares[0])
    (low, high), end = forecast.interval(share), forecast.from_here(share, loss)
    return (
        f"              forecast {low:.3f} to {high:.3f}; from here to {end[1]:.3f} "
        f"({end[0]:.3f} to {end[2]:.3f}) at the end"
    )


def outside(forecast: Forecast, step: int, steps: int, loss: float) -> str:
    """In words why a run is to be stopped, or an empty string."""
    share = step / steps
    if share < forecast.shares[0] * 0.99 or loss <= forecast.limit(share):
        return ""
    low, high = forecast.interval(share)
    return (
        f"{loss:.3f} bits per byte at step {step:,} lie above {forecast.limit(share):.3f}, and the "
        f"forecast was {low:.3f} to {high:.3f}"
    )


def plot(run: Run, steps: int) -> Path:
    """forecast.png: the run's held-out loss in the band that was forecast."""
    told = read(run.folder / FILE)
    x = np.array(told.shares)
    path = run.folder / "forecast.png"
    with run.writing(path), picture(path) as (axes,):
        low, high = np.array([told.interval(s) for s in x]).T
        axes.fill_between(x * steps, low, high, color="#9db7d5", alpha=0.6, label="forecast, 80 %")
        axes.plot(x * steps, told.middle, "--", color="#1f4e8c", label="its middle")
        axes.plot(
            x * steps, [told.limit(s) for s in x], ":", color="#777777", label="stopped above"
        )
        found = [(s, loss) for s, loss in evaluations(run) if math.isfinite(loss)]
        if found:
            axes.plot(*zip(*found, strict=True), "o-", color="#c8442d", ms=4, label="held out")
        top = 1.5 * told.limit(told.shares[0])
        axes.set(xlabel="step", ylabel="bits per byte", ylim=(0.9 * low.min(), top))
        axes.set_title(f"{run.name}: as forecast by {len(told.runs)} small runs", parse_math=False)
        axes.legend(frameon=False)
    return path
