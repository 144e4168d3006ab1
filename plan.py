"""The automatic plan: who shares the data, each matrix and the layers, found by trying all.

Idea: a transformer of equal layers has only some thousand plans, so each is tried on paper, with
the costs of plan_costs.py. Embedding and head make the outer stages of a pipeline unlike the
others; their layers are split exactly, by dynamic programming. What does not fit is refused with
its reason, the fastest of the rest is written to a file for train.py.

Run: python plan.py                      BLOOM on 384 A100: its plans, and how far to trust them
     python plan.py --model.preset gpt3-13b --devices 8 --batch 1024
     torchrun --nproc-per-node 8 train.py --plan.file runs/plan.json …     train under what it found

`--calibrate table.csv` fits the constants to your own measurements. The table has the columns
hidden, layers, heads, zero, dp, tp, pp, mbs (rows of a micro-batch), gbs (of an update) and sec,
and may have mem_gb, recompute and network.

Papers: Zheng et al. 2022, Alpa (arXiv 2201.12023); Narayanan et al. 2021 (arXiv 2104.04473);
Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054).
"""

import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

import mesh
from model import PRESETS, ModelConfig, preset_in
from pictures import table
from plan_costs import (
    DOCS,
    EMBEDDING,
    NETWORK,
    NODE,
    RECOMPUTE,
    Columns,
    Constants,
    Measured,
    Room,
    calibrated,
    columns_of,
    draw,
    gigabytes,
    judged_by_itself,
    megatron,
    read,
    seconds,
    show_trust,
    stages,
    usable,
)
from run import RUNS, UserError, main, read_json, settings, write_json
from scaling import GB, HARDWARE, Hardware

FIELDS = ("data", "tensor", "pipeline", "zero", "rows", "recompute")

# --- a plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan(mesh.Plan):
    """A plan that leaves nothing open, and what is computed again."""

    recompute: Literal[RECOMPUTE] = "none"  # in the backward pass

    def __post_init__(self):
        super().__post_init__()
        if self.rows < 1:
            raise UserError(f"a plan's rows {self.rows} must be at least 1")
        if len(self.layers) != self.pipeline or min(self.layers) < 1:
            raise UserError(
                f"a plan with pipeline {self.pipeline} must say the layers of as many stages, at "
                f"least 1 each, not {self.layers}"
            )

    @property
    def shape(self) -> mesh.Plan:
        """What train.py's --plan has of it."""
        return mesh.Plan(**{f.name: getattr(self, f.name) for f in fields(mesh.Plan)})

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        return settings(cls, read_json(path), str(path))


# --- the search -----------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A plan, and by part what an update takes and what the fullest device holds."""

    plan: Plan
    seconds: dict[str, float]
    memory: dict[str, float]  # GB


class Cluster(NamedTuple):
    """What a plan is for, and what is known of the devices."""

    model: ModelConfig
    devices: int
    batch: int  # rows of an update
    hardware: Hardware
    speed: Constants
    room: Room
    network: float  # GB/s from a device to another node


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def objection(at: Cluster, t: int, p: int, d: int) -> tuple[str, str] | None:
    """Why no plan of this shape can be: in short, and with its numbers."""
    c = at.model
    if t > NODE:
        return f"tensor beyond the {NODE} devices of a node", f"tensor {t}"
    for name, parts in (("heads", c.heads), ("key heads", c.kv_heads_or_heads), ("F", c.ffn_width)):
        if parts % t:
            return f"{name} not divisible by tensor", f"{parts} {name} by {t}"
    if p > c.layers:
        return "more stages than layers", f"{p} stages, {c.layers} layers"
    if at.batch % d:
        return "batch not divisible by data", f"{at.batch} rows by {d}"
    return None


def search(at: Cluster) -> tuple[list[Choice], list[tuple[str, str]]]:
    """All plans that fit, the fastest first (of equals the smaller); why the others were refused.

    Micro-batches have 1, 2, 4, 8 or 16 rows. Layers are split for each plan by what its head costs.
    """
    plans, refused = [], []
    for t, p in product(divisors(at.devices), repeat=2):
        d = at.devices // (t * p)
        if t * p * d != at.devices:
            continue
        if why := objection(at, t, p, d):
            refused.append(why)
            continue
        for rows in (1, 2, 4, 8, 16):
            if at.batch // d % rows:
                refused.append(
                    ("a copy's share not divisible by rows", f"{at.batch // d} by {rows}")
                )
                continue
            for zero, again in product(stages_of_zero(p, d), RECOMPUTE):
                plans.append(Plan(d, p, t, zero, rows, (1,) * p, recompute=again))
    if not plans:
        return [], refused
    rough = seconds(columns(at, plans), at.speed, at.hardware)
    heads = np.round(rough["head"] / rough["layer"], 1)
    plans = [
        replace(plan, layers=stages(at.model.layers, plan.pipeline, EMBEDDING, float(head)))
        for plan, head in zip(plans, heads, strict=True)
    ]
    choices = []
    for choice in judged(at, plans):
        if (needs := choice.memory["total"]) > (there := at.hardware.memory / GB):
            refused.append(("not enough memory", f"needs {needs:.1f} GB of {there:.0f}"))
        else:
            choices.append(choice)
    return sorted(choices, key=lambda x: (x.seconds["total"], x.memory["total"])), refused


def columns(at: Cluster, plans: list[Plan]) -> Columns:
    return columns_of(at.model, plans, at.batch, network=at.network)


def stages_of_zero(p: int, d: int) -> range:
    """Worth trying: 1 holds less than 0, and as measured sends as much; 2 and 3 know no pipeline.

    Those measured reduced, scattered and gathered. train.py, whose gradients are summed on all
    before they are divided, sends 1.5 times as much with 1 as with 0 (traffic.py).
    """
    return range(1) if d == 1 else range(1, 4 if p == 1 else 2)


def judged(at: Cluster, plans: list[Plan]) -> list[Choice]:
    c = columns(at, plans)
    taken, held = seconds(c, at.speed, at.hardware), gigabytes(c, at.room)
    return [
        Choice(plan, *({name: float(x[i]) for name, x in part.items()} for part in (taken, held)))
        for i, plan in enumerate(plans)
    ]


# --- the command line -----------------------------------------------------------------------------


# 105 s and 59 GB (Le Scao et al. 2022)
BLOOMS = Plan(8, 12, 4, 1, 2, (5, *[6] * 10, 5), recompute="blocks")


def rank(choices: list[Choice], plan: Plan) -> int:
    """The place of a plan in a list, from 1; 0: it is not there."""
    return 1 + [x.plan for x in choices].index(plan) if plan in [x.plan for x in choices] else 0


def show_bloom(choices: list[Choice], at: Cluster) -> None:
    """Where BLOOM's makers' choice stands, and what it took them."""
    own = judged(at, [BLOOMS])[0]
    same = [x for x in choices if x.plan.recompute == "blocks"]
    print(
        f"Megatron's table, each half by the other: {megatron(at.hardware, at.speed):.1%}\n"
        f"BLOOM's own plan, 105 s and 59 GB: {own.seconds['total']:.1f} s, "
        f"{own.memory['total']:.1f} GB; place {rank(choices, BLOOMS)} of all, "
        f"{rank(same, BLOOMS)} of those that recompute blocks, as all measured ones did"
    )


@dataclass(frozen=True)
class Automatic:
    """Search for the fastest plan."""

    model: ModelConfig = PRESETS["bloom-176b"]
    devices: int = 384  # that train
    batch: int = 2048  # rows of model.context tokens in an update
    hardware: str = "a100-80g"  # v100, a100-40g, a100-80g, h100, h200, tpuv4
    network: float = NETWORK  # GB/s that one device sends to another node
    calibrate: str = ""  # a table of measured plans; empty: BLOOM's makers'
    file: str = str(RUNS / "plan.json")  # where the fastest plan is written

    def __post_init__(self):
        if self.hardware not in HARDWARE:
            raise UserError(f"--hardware {self.hardware} is none of {', '.join(HARDWARE)}")
        if not (1 <= self.devices <= 1 << 20 and 1 <= self.batch <= 1 << 30):
            raise UserError("--devices must be from 1 to 2^20, and --batch from 1 to 2^30")
        if not 0 < self.network < float("inf"):
            raise UserError(f"--network {self.network} must be above 0 GB/s")
        if not self.model.vocab_size:
            raise UserError("without a tokenizer, --model.vocab-size must be at least 1")
        if self.model.arch != "decoder":
            raise UserError(f"plans are known for decoders, not for an {self.model.arch}")


def cluster(config: Automatic) -> tuple[Cluster, Measured]:
    """What is searched for, with constants fitted to the table."""
    c, bloom = config.model, PRESETS["bloom-176b"]
    if config.calibrate:
        found = read(Path(config.calibrate), c.vocab_size, c.context, config.network)
    else:
        found = read(DOCS / "bloom_plans.csv", bloom.vocab_size, bloom.context)
    if (n := int(usable(found)[0].sum())) < 8:
        raise UserError(f"{config.calibrate} has seconds in {n} rows: constants need 8 or more")
    constants = calibrated(found, measured_on(config))
    it = HARDWARE[config.hardware]
    return Cluster(c, config.devices, config.batch, it, *constants, config.network), found


def measured_on(config: Automatic) -> Hardware:
    return HARDWARE[config.hardware if config.calibrate else "a100-80g"]


def blooms_cluster(at: Cluster) -> Cluster:
    """What BLOOM's makers had."""
    it = HARDWARE["a100-80g"]
    return Cluster(PRESETS["bloom-176b"], 384, 2048, it, at.speed, at.room, NETWORK)


def stages_in_words(layers: tuple[int, ...]) -> str:
    """5, 10 × 6, 5"""
    runs = [(n, len(list(same))) for n, same in groupby(layers)]
    return ", ".join(f"{times} × {n}" if times > 1 else f"{n}" for n, times in runs)


def show_choices(choices: list[Choice]) -> None:
    """The ten fastest: what an update takes, in seconds, and the fullest device holds, in GB."""
    parts = ("total", "compute", "tensor", "pipeline", "waiting", "data")
    held = ("total", "state", "kept")
    head = ("", *FIELDS, "seconds", *parts[1:], "GB", *held[1:], "layers")
    lines = [
        (f"{n}", *(f"{getattr(x.plan, name)}" for name in FIELDS),
         *(f"{x.seconds[name]:.1f}" for name in parts), *(f"{x.memory[name]:.1f}" for name in held),
         stages_in_words(x.plan.layers))
        for n, x in enumerate(choices[:10], 1)
    ]  # fmt: skip
    print(table(head, *lines))


def show_refused(refused: list[tuple[str, str]]) -> None:
    """How often each reason was met, and the least of its numbers."""
    counts = Counter(why for why, _ in refused)
    cases = {why: min((x for w, x in refused if w == why), key=numbers) for why in counts}
    lines = [(why, f"{n:,}", cases[why]) for why, n in counts.most_common()]
    print("\n" + table(("refused because", "plans", "the nearest"), *lines))


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[0-9.]+", text)]


def write_plan(plan: Plan, path: Path) -> None:
    """The file for train.py, in a folder that is made if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"plan: {path}")


def automatic(config: Automatic) -> None:
    """Search, show the ten fastest and what was refused, write the fastest."""
    at, found = cluster(config)
    start = time.perf_counter()
    choices, refused = search(at)
    took = time.perf_counter() - start
    c = at.model
    print(
        f"{c.preset}: {c.layers} blocks, {c.dim:,} wide, on {at.devices:,} × {config.hardware}; "
        f"{at.batch:,} rows of {c.context:,} tokens an update\n"
        f"{len(choices) + len(refused):,} plans tried in {took:.2f} s, {len(choices)} fit\n"
    )
    if choices:
        show_choices(choices)
    show_refused(refused)
    if not choices:
        raise UserError("no plan fits: more devices, or a smaller model or batch")
    write_plan(choices[0].plan, Path(config.file))
    if config.hardware != "a100-80g" and not config.calibrate:
        print("\nThe constants are of BLOOM's A100: measure some plans, and --calibrate by them.")
    units = ("B/number", "B/pair", "B/pair", "×", "GB/s", "×", "GB/s", "GB", "×", "×")
    values = {**at.speed._asdict(), **at.room._asdict()}.items()
    said = (f"{name} {x:.3g} {unit}" for (name, x), unit in zip(values, units, strict=True))
    print(f"\nconstants: {', '.join(said)}")
    own = judged_by_itself(found, measured_on(config))
    show_trust(own, found, measured_on(config), at.room)
    if not config.calibrate:
        known = blooms_cluster(at)
        show_bloom(search(known)[0], known)
    plans = f"plans of {config.calibrate}" if config.calibrate else "BLOOM's makers' plans"
    draw(own, plans, RUNS / "plan.png")
    print(f"\npicture: {RUNS / 'plan.png'}")


def script() -> None:
    default = Automatic(model=preset_in(sys.argv[1:], Automatic.model))
    automatic(tyro.cli(Automatic, default=default, description=__doc__))


if __name__ == "__main__":
    main(script)
