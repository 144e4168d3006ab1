"""What a run would take, before it begins: memory, time, and the largest batch that fits.

Idea: a formula for the memory of activations is wrong as soon as somebody changes the model. So
updates are made for real, and nothing of them is kept. Some with 1, 2, 4, … rows tell how many fit;
then ten with the whole batch, or with as much of it as fits, tell memory and time.

Run: python train.py --dry-run
"""

import math
import time
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import NamedTuple

from data import Corpus
from recompute import LiveBytes
from step import device_memory, evaluate
from training import Train, Training

STEPS = 10  # updates of the probe
ENOUGH = 20  # seconds of them
ROOM = 0.6  # of the memory, for tensors: operations, torch and the system need some, too
MOST = 10**9  # rows that one can speak of


class Forecast(NamedTuple):
    """What a run takes, if as many rows as fit go through the model at once."""

    batch: int  # such rows, at most those asked for
    largest: int  # that would fit; of no meaning beyond what was tried
    state: int  # bytes of weights, gradients and the optimizer's tensors
    peak: int  # most bytes of tensors alive at once
    step: float  # seconds of an update with all its rows
    whole: float  # seconds of all updates and measurements


def forecast(config: Train, corpus: Corpus) -> Forecast:
    """Make the updates of a probe, on a model of their own."""
    # a second batch of an update meets the gradients of the first
    plain = replace(config, accumulate=min(2, config.accumulate), ramp_from=0, ramp_tokens=0)
    real = begun(config, corpus)
    largest = fitting(plain, corpus, ROOM * device_memory(real.device))
    batch = max(1, min(config.batch, largest))
    probe = Training(replace(plain, batch=batch), corpus)
    peak, rows = peak_of(probe), batch * plain.accumulate
    update, fixed = seconds(probe), 0.0
    if (few := min(batch, real.ramp.first)) < rows:  # a ramp: an update with few rows is dear
        less = seconds(Training(replace(plain, batch=few, accumulate=1), corpus))
        fixed = max(0.0, (less * rows - update * few) / (rows - few))
    row = (update - fixed) / rows
    measurements = math.ceil(config.steps / config.evaluate_every) + 1  # one when all is done
    return Forecast(
        batch, largest, state_bytes(real), peak, fixed + row * real.ramp.full,
        fixed * config.steps + row * real.ramp.seen(config.steps)
        + measurements * measuring(probe),
    )  # fmt: skip


def begun(config: Train, corpus: Corpus) -> Training:
    """The run before its first step, whether or not its batch fits."""
    rows = config.batch * config.accumulate
    training = Training(replace(config, batch=1, accumulate=rows), corpus)
    training.config = config
    return training


def seconds(training: Training) -> float:
    """What an update takes, as the median of some: fewer where they are long."""
    times: list[float] = []
    while len(times) < STEPS and sum(times) < ENOUGH:
        start = time.perf_counter()
        training.advance()
        times.append(time.perf_counter() - start)
    return median(times)


def fitting(config: Train, corpus: Corpus, there: float) -> int:
    """The most rows at once whose update takes no more than so many bytes, or many enough.

    More rows are tried as long as they fit for sure: what comes to weights and optimizer grows at
    most as the rows do, gradients included, as not all of them are there at the peak.
    """
    rows, real = 1, begun(config, corpus)
    held, known = state_bytes(real) - gradient_bytes(real), (0, state_bytes(real))
    while True:
        peak = peak_of(Training(replace(config, batch=rows), corpus))
        if rows == config.batch:  # it fits: how many more would, by the bytes of the last rows?
            row = max(1.0, (peak - known[1]) / (rows - known[0]))
            return rows + max(0, math.floor(min(MOST, (there - peak) / row)))
        sure = math.floor(min(config.batch, rows * (there - held) / (peak - held)))
        if sure <= rows:
            return max(0, sure)
        known, rows = (rows, peak), min(sure, 2 * rows)


def peak_of(training: Training) -> int:
    """The most bytes of tensors that are alive in an update."""
    with LiveBytes() as live:
        training.advance()
    return state_bytes(training) - gradient_bytes(training) + live.peak


def state_bytes(training: Training) -> int:
    tensors = training.optimizer.tensors().values()
    return 2 * gradient_bytes(training) + sum(x.nbytes for x in tensors)


def gradient_bytes(training: Training) -> int:
    """As many as those of the weights."""
    return sum(p.nbytes for p in training.model.parameters())


def measuring(training: Training, most: int = 4) -> float:
    """Seconds of a measurement on the held-out documents, of which some rows are tried."""
    rows = 4 * training.config.batch
    batches = sum(1 for _ in training.held(rows))
    start = time.perf_counter()
    for number, some in enumerate(islice(training.held(rows), most)):
        evaluate(training.model, [training.batch(some, "held out", number)], training.dtype)
    return (time.perf_counter() - start) * batches / max(1, min(batches, most))


def in_words(found: Forecast, config: Train) -> str:
    fits = (
        f"--batch {config.batch} fits"
        if found.batch == config.batch
        else f"--batch {config.batch} does not fit, {found.batch} does: more --accumulate instead"
    )
    return (
        f"memory   {found.state / 1e6:,.1f} MB of weights, gradients and optimizer, at most "
        f"{found.peak / 1e6:,.1f} MB of tensors at once; {fits}, about {found.largest:,} would\n"
        f"time     {found.step:.3f} s an update, {found.whole:,.0f} s in all"
    )
