"""What an update takes under a parallel plan, in seconds and gigabytes, from a few constants.

Idea: the time is a sum of things that can be pointed at, each with a constant that has a unit:

    products     2 M N K FLOPs at 90 % of the peak, in whole waves of tiles, and memory traffic for
                 each number that comes out
    scores       traffic for each pair of tokens that one head compares
    tensor       4 all-reduces a layer and micro-batch, 6 where blocks are computed again
    pipeline     Σ tᵢ + (M − 1) max tᵢ over stages of unequal layers (Zheng et al., section 5.1)
    data         gradients out, weights back, once an update

The constants are fitted to measured plans: docs/bloom_plans.csv holds those that BLOOM's makers
tried in February 2022, all with full recomputation (BigScience's train/tr11-176B-ml/
chronicles-prequel.md, whose line is in the column `line`; what was tried on the 28th is not among
them), docs/megatron_plans.csv those of table 1 of Narayanan et al.

Run: python plan.py                      fits them, and says how far to trust what they predict

Papers: Zheng et al. 2022, Alpa (arXiv 2201.12023); Narayanan et al. 2021, Megatron-LM (arXiv
2104.04473); Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054); Korthikanti et al. 2022 (arXiv
2205.05198); Levenberg 1944, Marquardt 1963; Huber 1964.

Letters: T tokens of a row · C model width · H heads · D head width · V vocabulary · L layers ·
M micro-batches · t, p, d devices that share tensors, layers, data.
"""

import csv
from functools import cache
from itertools import combinations, pairwise
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from model import ModelConfig
from pictures import picture, table
from run import UserError
from scaling import GB, Hardware, exact_flops, ffn_matrices

Columns = dict[str, np.ndarray]  # a row for each plan
RECOMPUTE = ("none", "attention", "blocks")
NODE = 8  # devices that are joined by fast links
DOCS = Path(__file__).parent / "docs"

# --- layers to stages -----------------------------------------------------------------------------


def split(costs: tuple[float, ...], parts: int, cap: float = inf) -> tuple[int, ...]:
    """How many neighbours each part gets, so that the dearest part is as cheap as can be.

    Exact, by dynamic programming over ends: best[k, i] = min over j of max(best[k−1, j], j…i).
    Of all such splits the one with the least Σ cost², by a second pass in which no part may cost
    more than the first pass found (`cap`).
    """
    N = len(costs)
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    span = sums[None] - sums[:, None]  # [j, i]: of j … i − 1
    span = np.where(np.tri(N + 1, dtype=bool), inf, span)  # no part is empty
    if cap < inf:
        span = np.where(span <= cap * (1 + 1e-9), span**2, inf)
    best, cuts = np.where(np.arange(N + 1), inf, 0.0), []
    for _ in range(parts):
        reached = best[:, None] + span if cap < inf else np.maximum(best[:, None], span)
        cuts.append(reached.argmin(0))
        best = reached.min(0)
    if cap == inf:
        return split(costs, parts, best[N])
    ends = [N]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    return tuple(a - b for a, b in pairwise(ends))[::-1]


@cache
def stages(layers: int, parts: int, embedding: float, head: float) -> tuple[int, ...]:
    """Layers of each stage, where embedding and head cost so many layers, on the outer stages."""
    if parts == 1:
        return (layers,)
    costs = (1.0 + embedding, *[1.0] * (layers - 2), 1.0 + head)
    return split(costs, parts)


# --- what a plan takes ----------------------------------------------------------------------------

REACH = 0.9  # of the peak, what the largest products reach
NETWORK = 4.0  # GB/s from a device to another node: 64 % of BLOOM's four 100 Gbit/s links by 8
EMBEDDING = 0.1  # of a layer: no time, but something for its memory when layers are split
TILE, UNITS = (256, 128), 108  # of a product's outcome, and how many an A100 makes at once


class Constants(NamedTuple):
    """Fitted; the defaults are what one would guess, and where the fit begins."""

    traffic: float = 40.0  # bytes moved for each number that a product puts out
    scores: float = 50.0  # bytes moved for each pair of tokens, head and layer
    ragged: float = 200.0  # more of them if the head width is no multiple of 8
    head: float = 1.0  # time of the head's products, as a multiple of the same FLOPs elsewhere
    tensor: float = 150.0  # GB/s of all-reduces inside a node
    upgrade: float = 1.1  # times that they took longer before 25 February
    data: float = 3.0  # GB/s of gradients and weights to other nodes, where devices send NETWORK


class Room(NamedTuple):
    """Fitted constants of memory."""

    base: float = 8.0  # GB of libraries and buffers
    kept: float = 1.2  # bytes for each byte of a checkpoint
    work: float = 1.0  # bytes for each byte of the layer that is computed again


def layer_widths(c: Columns) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(outputs, inputs) of a layer's products, on one of `tensor` devices."""
    C, t = c["dim"], c["tensor"]
    inner, keys, F = c["inner"] / t, c["keys"] / t, c["ffn"] / t
    return (inner + 2 * keys, C), (C, inner), (c["ups"] * F, C), (C, F)


def seconds(c: Columns, k: Constants, it: Hardware) -> Columns:
    """What an update takes, by part; `layer`, `head` and `slowest` are of one micro-batch."""
    C, t, p, d = c["dim"], c["tensor"], c["pipeline"], c["data"]
    n, M = c["rows"] * c["context"], c["batch"] / (d * c["rows"])
    peak, blocks = REACH * it.half, c["again"] == 2

    def multiply(rows, columns, inner):
        tiles = np.ceil(rows / TILE[0]) * np.ceil(columns / TILE[1])
        numbers = np.ceil(tiles / UNITS) * UNITS * TILE[0] * TILE[1]
        return numbers * (2 * inner / peak + k.traffic / it.bandwidth)

    products = sum(
        (1 + blocks) * multiply(n, out, into) + multiply(n, into, out) + multiply(out, into, n)
        for out, into in layer_widths(c)
    )
    D, pairs = c["inner"] / c["heads"], c["rows"] * c["context"] ** 2 * c["heads"] / t
    moved = k.scores + k.ragged * (D % 8 != 0)
    scores = pairs * (3 + (c["again"] > 0)) / 4 * (16 * D / peak + moved / it.bandwidth)
    near = k.tensor * GB / np.where(c["old"], k.upgrade, 1)
    far = np.where(t * p * d <= NODE, near, c["network"] * GB)
    stream = 2 * n * C  # bytes
    tensor = (4 + 2 * blocks) * stream * 2 * (t - 1) / t / near
    layer = products + scores + tensor
    head = k.head * 6 * n * C * c["vocab"] / t / peak
    # forth each of t devices sends its share, back all of it
    send = np.where(p > 1, stream * (1 + 1 / t) / far, 0)
    slowest = np.maximum(c["most"] * layer, c["last"] * layer + head) + send
    once = c["layers"] * layer + head + p * send  # Σ tᵢ
    psi = (c["layers"] * c["weights"] + c["tables"] * c["vocab"] * C) / (t * p)
    # with ZeRO 1 no more than without, as in the measured plans; ours sends 3 (plan.py)
    trips = np.select([c["zero"] == 3, c["zero"] == 2], [3 * M, M + 1], 2)
    rate = np.where(t * p * d <= NODE, near, k.data * GB * c["network"] / NETWORK)
    data = 2 * psi * trips * (d - 1) / d / rate
    total = once / c["chunks"] + (M - 1 / c["chunks"]) * slowest + data
    work = M * (c["layers"] * (layer - tensor) + head) / p
    return {
        "total": total,
        "compute": work,
        "tensor": M * c["layers"] * tensor / p,
        "pipeline": M * send,
        "data": data,
        "waiting": total - data - M * (c["layers"] * layer + head) / p - M * send,
        "layer": layer,
        "head": head,
    }


def gigabytes(c: Columns, k: Room) -> Columns:
    """What the fullest device holds, in GB, by part.

    Of each parameter 2 bytes of weights, 2 of gradients, 4 of their sum if that is in fp32 and 12
    of optimizer, divided as ZeRO says. Of each micro-batch on its way, min(M, p − stage) of them,
    what each layer keeps: T·rows·C bytes times 2 (blocks), 10 + 24/t (attention), or that and
    5 H T/(C t) (none); one whole layer is at work in any case (Korthikanti et al., section 4).
    """
    C, t, p, d = c["dim"], c["tensor"], c["pipeline"], c["data"]
    n, M = c["rows"] * c["context"], c["batch"] / (d * c["rows"])
    part = [np.where(c["zero"] >= stage, d, 1) for stage in (3, 2, 1)]
    each = 2 / part[0] + (2 + 4 * c["fp32"]) / part[1] + 12 / part[2]
    whole = n * C * (10 + 24 / t + 5 * c["heads"] * c["context"] / (C * t))
    lean = n * C * (10 + 24 / t)
    keeps = np.select([c["again"] == 2, c["again"] == 1], [2 * n * C, lean], whole) * k.kept
    found = []  # the first stage, the others, the last
    for before, layers, outer, there in (
        (0, "first", c["tables"], p > 0), (1, "most", 0, p > 2), (p - 1, "last", 1, p > 1)
    ):  # fmt: skip
        state = each * (c[layers] * c["weights"] + outer * c["vocab"] * C) / t
        kept = np.minimum(M, p - before) * c[layers] * keeps
        found.append((there * state, there * kept))
    state, kept = (np.stack(x) / GB for x in zip(*found, strict=True))
    fullest = (state + kept).argmax(0), np.arange(len(n))
    work = k.work * whole / GB
    return {"total": state[fullest] + kept[fullest] + work + k.base, "state": state[fullest],
            "kept": kept[fullest], "work": work}  # fmt: skip


# --- measured plans, and the constants fitted to them ---------------------------------------------

LEFT_OUT = {  # lines of bloom_plans.csv
    648: "its 640 devices are not the 320 of its nodes",
    775: "1,568 rows took as long as 2,048 did: line 776",
}
ODD_MEMORY = {
    634: "less in micro-batches than line 635, and more memory",
    670: "without ZeRO twice what its states need: other software",
    802: "line 801 again, with 6 GB less",
}
NEEDED = ("hidden", "layers", "heads", "zero", "dp", "tp", "pp", "mbs", "gbs")


def columns_of(c: ModelConfig, plans: list, batch: int, **more) -> Columns:
    """Plans (plan.Plan) for one model, as columns; `more` are columns that are otherwise usual."""
    fields = ("data", "tensor", "pipeline", "zero", "rows")
    columns = {name: [getattr(plan, name) for plan in plans] for name in fields} | {
        "again": [RECOMPUTE.index(plan.recompute) for plan in plans],
        "first": [plan.layers[0] for plan in plans],
        "most": [max(plan.layers) for plan in plans],
        "last": [plan.layers[-1] for plan in plans],
        # of V C numbers on the first stage: embedding, and a head of its own if it is the last, too
        "tables": [1 + (plan.pipeline == 1 and not c.tied) for plan in plans],
    }
    alike = {
        "batch": batch, "layers": c.layers, "dim": c.dim, "heads": c.heads, "vocab": c.vocab_size,
        "context": c.context, "inner": c.heads * c.head_dim, "ffn": c.ffn_width,
        "keys": c.kv_heads_or_heads * c.head_dim, "ups": ffn_matrices(c) - 1,
        "network": NETWORK, "old": False, "fp32": True, "chunks": 1, **more,
    }  # fmt: skip
    made = {name: np.array(values) for name, values in columns.items()}
    made |= {name: np.full(len(plans), value) for name, value in alike.items()}
    weights = sum(out * into for out, into in layer_widths(made | {"tensor": 1}))
    return made | {"weights": weights}  # of a layer


def greedy(layers: int, parts: int) -> tuple[int, ...]:
    """As DeepSpeed divided equal layers, blind to embedding and head: 78 in 12 are 7, … 7, 1."""
    most = -(-layers // parts)
    return tuple(max(0, min(most, layers - i * most)) for i in range(parts))


class Measured(NamedTuple):
    """A table of plans that somebody tried."""

    columns: Columns
    seconds: np.ndarray  # NaN where it is not known
    memory: np.ndarray  # GB; NaN where it is not known, inf where it was too much
    odd: np.ndarray  # whose memory is not to be believed


def read(path: Path, vocab: int, context: int, network: float = NETWORK) -> Measured:
    """The rows of a table, with seconds or TFLOP/s of each device (what is recomputed counted)."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if missing := [name for name in NEEDED if name not in (rows[0] if rows else {})]:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}")
    ours = path.resolve() == (DOCS / "bloom_plans.csv").resolve()
    rows = [row for row in rows if not (ours and int(row["line"]) in LEFT_OUT)]
    odd = [ours and int(row["line"]) in ODD_MEMORY for row in rows]
    known, taken, memory = [], [], []
    for number, row in enumerate(rows, 2):
        try:
            C, L, H, zero, d, t, p, b, batch = (int(row[name]) for name in NEEDED)
            c = ModelConfig(
                dim=C, layers=L, heads=H, head_width=C // H, context=context, vocab_size=vocab,
                position="none", activation="gelu",
            )  # fmt: skip
            date = row.get("date") or ""
            parts = stages(L, p, 1.0, 1.0) if date >= "02-28" else greedy(L, p)
            plan = SimpleNamespace(
                data=d, tensor=t, pipeline=p, zero=zero, rows=b, layers=parts,
                recompute=row.get("recompute") or "blocks",
            )  # fmt: skip
            if min(d, t, p, b, batch) < 1 or batch % (d * b) or zero not in range(4) or p > L:
                raise UserError("a plan cannot be so")
            if plan.recompute not in RECOMPUTE:
                raise UserError(f"recompute {plan.recompute!r} is none of {', '.join(RECOMPUTE)}")
            chunks, rate = int(row.get("chunks") or 1), float(row.get("tflops") or "nan")
            flops = batch * exact_flops(c, context, "full") / (d * t * p * 1e12)
            taken.append(float(row.get("sec") or "nan") if "sec" in row else flops / rate)
            gb = row.get("mem_gb") or "nan"
            memory.append(inf if gb == "OOM" else float(gb))
            far = float(row.get("network") or network)
            if taken[-1] <= 0 or memory[-1] <= 0 or not 0 < far < inf:
                raise UserError("seconds, memory and network must be above 0")
            era = {
                "old": "" < date < "02-25", "fp32": not "" < date < "02-28", "chunks": chunks,
                "network": far,
            }  # fmt: skip
        except (ValueError, TypeError, UserError, ZeroDivisionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        known.append(columns_of(c, [plan], batch, **era))
    columns = {name: np.concatenate([row[name] for row in known]) for name in known[0]}
    return Measured(columns, np.array(taken), np.array(memory), np.array(odd))


def only(c: Columns, rows: np.ndarray) -> Columns:
    return {name: values[rows] for name, values in c.items()}


def fit(model, c: Columns, wanted: np.ndarray, start: NamedTuple) -> NamedTuple:
    """The constants whose predictions are nearest, by Levenberg's and Marquardt's method.

    Minimizes Σ huber(ln model / wanted) + Σ (0.04 ln constant / start)²: relative errors, which
    count linearly beyond 5 % since a bad measurement may be off by any amount; and of a constant we
    believe as much before the fit that it is right within a factor e, as of a row within 4 %.
    """
    bend, belief = 0.05, 0.04

    def residual(x):
        return np.log(model(c, type(start)(*np.exp(x + begin)))["total"] / wanted)

    def cost(r, x):
        size = np.abs(r)
        return np.where(size < bend, r**2, 2 * bend * size - bend**2).sum() + belief**2 * x @ x

    begin, x, damp = np.log(start), np.zeros(len(start)), 1e-3
    r = residual(x)
    for _ in range(60):
        slope = np.stack([(residual(x + step) - r) / 1e-5 for step in 1e-5 * np.eye(len(x))], 1)
        weight = np.minimum(1, bend / np.maximum(np.abs(r), 1e-9))
        bent = slope.T @ (weight[:, None] * slope) + belief**2 * np.eye(len(x))
        down = slope.T @ (weight * r) + belief**2 * x
        while damp < 1e6:
            new = x - np.clip(np.linalg.solve(bent + damp * np.diag(np.diag(bent)), down), -1, 1)
            if cost(residual(new), new) < cost(r, x):
                break
            damp *= 4
        else:
            break
        gain = cost(r, x) - cost(residual(new), new)
        x, r, damp = new, residual(new), damp / 3
        if gain < 1e-9:
            break
    return type(start)(*(float(v) for v in np.exp(x + begin)))


def held_out(model, c: Columns, wanted: np.ndarray, start: NamedTuple, groups) -> np.ndarray:
    """Each row as predicted by constants fitted to the rows of all other groups."""
    predicted = np.zeros(len(wanted))
    for group in np.unique(groups):
        out = groups == group
        k = fit(model, only(c, ~out), wanted[~out], start)
        predicted[out] = model(only(c, out), k)["total"]
    return predicted


def off(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Mean of |predicted / measured − 1|."""
    return float(np.abs(predicted / wanted - 1).mean())


def pairs_in_order(c: Columns, predicted: np.ndarray, wanted: np.ndarray) -> tuple[int, int]:
    """Of pairs of plans for one model, measured over 2 % apart: how many are ordered right."""
    right = there = 0
    same = np.stack([c[x] for x in ("dim", "layers", "heads", "old", "batch")], 1)
    how = np.stack([c[x] for x in ("data", "tensor", "pipeline", "rows", "zero")], 1)
    same[:, -1] //= 100  # 2,016 and 2,048 rows are 1.6 % apart
    for i, j in combinations(range(len(wanted)), 2):
        apart = abs(np.log(wanted[i] / wanted[j])) > 0.02 and (how[i] != how[j]).any()
        if apart and (same[i] == same[j]).all():
            there += 1
            right += (predicted[i] < predicted[j]) == (wanted[i] < wanted[j])
    return int(right), there


def timing(it: Hardware):
    return lambda c, k: seconds(c, k, it)


def calibrated(found: Measured, it: Hardware) -> tuple[Constants, Room]:
    """Constants of time and of memory, fitted to all rows that say something of them."""
    timed, held = usable(found)
    speed = fit(timing(it), only(found.columns, timed), found.seconds[timed], Constants())
    if held.sum() < len(usual := Room()):
        return speed, usual
    return speed, fit(gigabytes, only(found.columns, held), found.memory[held], usual)


def usable(found: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Which rows say how long an update takes, and which how much memory."""
    return np.isfinite(found.seconds), np.isfinite(found.memory) & ~found.odd


def judged_by_itself(found: Measured, it: Hardware) -> dict[str, np.ndarray | float]:
    """What constants say of rows that their fit has not seen."""
    timed, held = usable(found)
    c, wanted, model = only(found.columns, timed), found.seconds[timed], timing(it)
    room, full = only(found.columns, held), found.memory[held]
    shuffles = [np.random.default_rng(seed) for seed in range(4)]
    unseen = [
        held_out(model, c, wanted, Constants(), rng.permutation(len(wanted)) % 5)
        for rng in shuffles
    ]
    memory = [
        held_out(gigabytes, room, full, Room(), rng.permutation(len(full)) % 5) for rng in shuffles
    ] if len(full) > len(Room()) else []  # fmt: skip
    mean = np.mean(unseen, 0)
    return {
        "measured": wanted, "unseen": mean, "tensor": c["tensor"],
        "time": float(np.mean([off(x, wanted) for x in unseen])),
        "without a tensor degree": off(
            held_out(model, c, wanted, Constants(), c["tensor"]), wanted
        ) if len(set(c["tensor"])) > 1 else float("nan"),
        "memory": float(np.mean([off(x, full) for x in memory])) if memory else float("nan"),
        "pairs": pairs_in_order(c, model(c, fit(model, c, wanted, Constants()))["total"], wanted),
        "pairs unseen": pairs_in_order(c, mean, wanted),
    }  # fmt: skip


def megatron(it: Hardware, start: Constants) -> float:
    """Mean error on each half of table 1 of Narayanan et al. by constants fitted to the other."""
    found = read(DOCS / "megatron_plans.csv", vocab=51200, context=2048)
    every = np.arange(len(found.seconds)) % 2
    return off(held_out(timing(it), found.columns, found.seconds, start, every), found.seconds)


def show_trust(own: dict, found: Measured, it: Hardware, room: Room) -> None:
    """The errors on rows that were not seen, and which rows were not used."""
    right, there = own["pairs"]
    unseen, _ = own["pairs unseen"]
    lines = [
        ("on rows that the fit has not seen", "error", ""),
        (
            "time, 4 × a fifth of the rows left out",
            f"{own['time']:.1%}",
            f"{len(own['measured'])} rows",
        ),
        ("time, a degree of tensor left out", f"{own['without a tensor degree']:.1%}", ""),
        ("memory, 4 × a fifth left out", f"{own['memory']:.1%}", f"{usable(found)[1].sum()} rows"),
        ("pairs of plans for one model in order", f"{right / max(1, there):.1%}", f"{there} pairs"),
        ("the same, as not seen", f"{unseen / max(1, there):.1%}", ""),
    ]
    print("\n" + table(*lines))
    full = gigabytes(only(found.columns, np.isinf(found.memory)), room)["total"]
    if len(full):
        said = ", ".join(f"{x:.0f}" for x in full)
        print(f"plans that ran out of memory need {said} GB of {it.memory / GB:.0f}")
    if found.odd.any():
        for lines, what in ((LEFT_OUT, "left out"), (ODD_MEMORY, "memory not used")):
            for line, why in lines.items():
                print(f"line {line} {what}: {why}")


def draw(own: dict, plans: str, path: Path) -> None:
    """Predicted without having been seen, against measured; plans: whose, in words."""
    with picture(path, size=(6, 5)) as (axes,):
        for tensor, colour in zip((1, 2, 4, 8), ("#999999", "#2a7f62", "#c8442d", "#1f4e8c"),
                                  strict=True):  # fmt: skip
            these = own["tensor"] == tensor
            axes.plot(own["measured"][these], own["unseen"][these], "o", color=colour, alpha=0.7,
                      label=f"tensor {tensor}")  # fmt: skip
        ends = [0.95 * own["measured"].min(), 1.05 * own["measured"].max()]
        axes.plot(ends, ends, color="#777777", linewidth=1)
        axes.set(xlabel="seconds of an update, measured", ylabel="predicted, the row not seen",
                 title=plans)  # fmt: skip
        axes.legend(frameon=False)
