"""What a model can do, and what a change does, measured on text that it never saw.

Idea: a table and a picture for each question; where luck could answer it, several seeds and an
interval that holds the truth in 95 of 100 cases.

    length    Trained on rows of T tokens, how well does a model read 2 T, 4 T, 8 T? Each kind of
              position is trained alike, and the same held-out tokens are asked at every length: a
              model that can use more text gets better, one that is lost gets worse.
    depth     A hundred blocks behind each other: with the norm behind each sum (post) all that is
              learnt is how often each letter comes, with DeepNorm's two constants much more.
    precision The same run with numbers of 32 and of 16 bits, and what loss scaling is for.
    compare   Two groups of runs of train.py: is one better, or is it luck?

Run: python evaluate.py length               every kind of position, a minute or two
     python evaluate.py depth                a hundred blocks, some minutes
     python evaluate.py precision            half a minute
     python evaluate.py compare muon adamw   is the second better? of train.py --seeds

Papers: Press et al. 2022, ALiBi (arXiv 2108.12409); Chen et al. 2023 (arXiv 2306.15595) and bloc97
2023, RoPE stretched; Wang et al. 2022, DeepNorm (arXiv 2203.00555); Micikevicius et al. 2018, mixed
precision (arXiv 1710.03740); Student 1908; Welch 1947.

Letters: N windows · T tokens of a row · V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import mean, variance
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from data import Corpus, DataConfig, TokenizerConfig, prepare
from dropout import drawn_from
from model import ORDERS, ModelConfig, Transformer
from objectives import causal
from optim import OptimConfig, build, learning_rate
from packing import Mixture
from pictures import LINES, picture, table
from positions import POSITIONS
from run import RUNS, Run, UserError, main
from step import LossScale, NotFinite, pick_device, to, update

# --- what all have in common ----------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a small model is trained."""

    optim: OptimConfig = OptimConfig()
    steps: int = 200  # updates
    batch: int = 32  # rows of model.context tokens in an update
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if min(self.steps, self.batch) < 1:
            raise UserError("--train.steps and --train.batch must be at least 1")


def check_kinds(flag: str, kinds: Sequence[str], known: Iterable[str]) -> None:
    if unknown := {*kinds} - {*known}:
        raise UserError(f"{flag} {' '.join(sorted(unknown))}: there are {[*known]}")
    if not kinds:
        raise UserError(f"{flag} needs one or more of {[*known]}")


def check_one_text(model: ModelConfig) -> None:
    if model.arch == "encdec":
        raise UserError("--model.arch must be decoder or encoder here: an encdec reads two texts")


def learn(
    model: Transformer, corpus: Corpus, how: Recipe, T: int, seed: int,
    dtype: torch.dtype | None = None, scale: LossScale | None = None,
) -> Iterator[float]:  # fmt: skip
    """Train to predict the next token of rows of T; yields the loss of each step, in nats."""
    optimizer = build(model.named_parameters(), how.optim)
    rows = Mixture(corpus.train, T, corpus.tokenizer.end_of_text, seed, corpus.parts)
    for step in range(how.steps):
        batch = causal(rows.take(how.batch))
        batch.draws = drawn_from(seed, step, step * how.batch, how.batch)
        batch = to(batch, model.embedding.device)
        lr = learning_rate(how.optim, step, how.steps)
        yield update(model, [batch], optimizer, lr, how.optim, dtype, scale).loss


# Student's t: for 1, 2, … degrees of freedom, how many standard errors hold the mean at 95 %.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few runs, and how far on each side of it the true one lies; inf for one run."""
    n = len(values)
    if n == 1:
        return values[0], math.inf
    return mean(values), student(n - 1) * math.sqrt(variance(values) / n)


def student(freedom: float) -> float:
    return STUDENT[min(int(freedom), len(STUDENT)) - 1]


def smooth(losses: Sequence[float], width: int = 10) -> list[float]:
    """The mean of each step and those just before it."""
    return [mean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]


def draw_losses(found: dict[str, list[float]], title: str, path: Path, known: float) -> None:
    """A line for each run, and one at what is known from the tokens' frequencies alone."""
    colors = ("#1f4e8c", "#c8442d", "#8a9a2f", "#7d4a9e", "#e39b2d", "#5b8bc9")
    with picture(path) as (axes,):
        for (name, losses), color, line in zip(found.items(), colors, cycle(LINES), strict=False):
            steps = range(1, len(losses) + 1)
            axes.plot(steps, smooth(losses), line, color=color, linewidth=1.6, label=name)
            if not math.isfinite(losses[-1]):
                last = smooth(losses[:-1])[-1] if losses[1:] else known
                axes.plot(len(losses), last, "x", color=color, markersize=9)
        axes.axhline(known, color="#777777", linestyle="--", linewidth=1, label="only frequencies")
        axes.set(title=title, xlabel="step", ylabel="nats per token")
        axes.legend(frameon=False)


def show_losses(found: dict[str, list[float]], steps: int, known: float) -> str:
    marks = sorted({max(1, steps * part // 4) for part in (1, 2, 3, 4)})
    lines = [("nats per token at step", *(f"{n:,}" for n in marks))]
    for name, losses in found.items():
        means = smooth(losses)
        cells = (f"{means[n - 1]:.3f}" if n <= len(means) else "no number" for n in marks)
        lines.append((name, *cells))
    return table(*lines, ("only frequencies known", *[f"{known:.3f}"] * len(marks)))


def frequencies(corpus: Corpus) -> float:
    """The loss in nats of who knows how often each token comes, and nothing else: −Σ p log p."""
    counts = sum(
        torch.bincount(torch.from_numpy(x.astype("int64")), minlength=corpus.tokenizer.vocab_size)
        for x in corpus.train.files
    )
    p = counts / counts.sum()
    return -torch.xlogy(p, p).sum().item()


# --- length ---------------------------------------------------------------------------------------

MULTIPLES = (1, 2, 4, 8)  # of the length trained at
STRETCHED = ("linear", "ntk")  # ways in which RoPE reaches further without being trained again
COLORS = {
    "alibi": "#c8442d", "t5": "#e39b2d", "relative": "#8a9a2f", "rope": "#1f4e8c",
    "rope, linear": "#5b8bc9", "rope, ntk": "#9db7d5", "none": "#777777", "sinusoidal": "#7d4a9e",
    "learned": "#d08bb0",
}  # fmt: skip


@dataclass(frozen=True)
class Length:
    """Train on short rows, read long ones, with every kind of position."""

    train: Recipe = Recipe()
    data: DataConfig = DataConfig(held_out=0.1)
    tokenizer: TokenizerConfig = TokenizerConfig(vocab_size=1024)
    model: ModelConfig = ModelConfig(dim=64, layers=2, heads=4, context=32)  # context: T
    positions: tuple[str, ...] = tuple(POSITIONS)  # kinds to compare
    seeds: int = 1  # models of each kind
    windows: int = 64  # held-out texts of 8 T tokens, at most

    def __post_init__(self):
        check_kinds("--positions", self.positions, POSITIONS)
        if min(self.seeds, self.windows) < 1 or self.seeds > len(STUDENT):
            raise UserError(f"--windows must be at least 1, --seeds from 1 to {len(STUDENT)}")
        if self.model.arch != "decoder":
            raise UserError("length is measured on --model.arch decoder, which reads on and on")


def long_windows(corpus: Corpus, length: int, most: int) -> Tensor:
    """Held-out runs of length + 1 tokens (N length+1), each of one document, the first of each."""
    long = [i for i, n in enumerate(corpus.held.lengths.tolist()) if n > length][:most]
    if not long:
        raise UserError(
            f"no held-out document has {length + 1:,} tokens, {MULTIPLES[-1]} times "
            f"--model.context {length // MULTIPLES[-1]}: choose a smaller one, or longer texts"
        )
    texts = [corpus.held.document(i)[: length + 1].astype("int64") for i in long]
    return torch.stack([torch.from_numpy(x) for x in texts])


@torch.no_grad()
def token_losses(model: Transformer, windows: Tensor, T: int, at_once: int = 1 << 13) -> Tensor:
    """−log p of each token (N length) when a model sees no more than the T tokens of its part.

    windows (N length+1) are cut into parts of T, so that every token is asked at every T.
    """
    inputs, targets = (x.reshape(-1, T) for x in (windows[:, :-1], windows[:, 1:]))
    rows = max(1, at_once // T)
    losses = [
        F.cross_entropy(model.logits(model(x)).transpose(1, 2), y, reduction="none")
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses).view(len(windows), -1)


class Reach(NamedTuple):
    """What one trained model makes of longer texts."""

    at: list[float]  # mean loss at each of MULTIPLES
    places: Tensor  # how much higher it is at each place of the longest than in rows of T


def reach(model: Transformer, windows: Tensor, T: int) -> Reach:
    every = [token_losses(model, windows, n * T) for n in MULTIPLES]
    return Reach([x.mean().item() for x in every], (every[-1] - every[0]).mean(0).cpu())


def stretched(model: Transformer, scaling: str) -> Transformer:
    """The same weights, with RoPE's angles for a text MULTIPLES[-1] times as long."""
    config = replace(model.config, rope_scaling=scaling, rope_factor=float(MULTIPLES[-1]))
    other = Transformer(config, seed=None).to(model.embedding)
    other.load_state_dict(model.state_dict())
    return other


def measure_length(config: Length, corpus: Corpus) -> dict[str, list[Reach]]:
    """For each kind of position, what models of several seeds reach."""
    T, device = config.model.context, pick_device(config.train.device)
    windows = long_windows(corpus, MULTIPLES[-1] * T, config.windows).to(device)
    known = {"context": MULTIPLES[-1] * T, "vocab_size": corpus.tokenizer.vocab_size}
    found: dict[str, list[Reach]] = {}
    runs = [(seed, kind) for seed in range(config.seeds) for kind in config.positions]
    with tqdm(total=len(runs) * config.train.steps, unit="step", disable=None) as bar:
        for seed, kind in runs:
            model = Transformer(replace(config.model, position=kind, **known), seed).to(device)
            bar.set_postfix_str(f"{kind}, seed {seed}")
            for _ in learn(model, corpus, config.train, T, seed):
                bar.update()
            found.setdefault(kind, []).append(reach(model, windows, T))
            for scaling in STRETCHED if kind == "rope" else ():
                longer = reach(stretched(model, scaling), windows, T)
                found.setdefault(f"rope, {scaling}", []).append(longer)
    return found


def cells(runs: list[Reach]) -> list[tuple[float, float]]:
    """Mean and half width of its interval, at each of MULTIPLES."""
    return [interval(values) for values in zip(*(r.at for r in runs), strict=True)]


def show_length(found: dict[str, list[Reach]], T: int) -> str:
    """Nats per token at each length, the best at the longest first."""
    lines = [("nats per token of rows of", *(f"{n * T:,}" for n in MULTIPLES))]
    rows = {kind: cells(runs) for kind, runs in found.items()}
    for kind, row in sorted(rows.items(), key=lambda item: item[1][-1][0]):
        said = (f"{m:.3f}" + (f" ± {half:.3f}" if half < math.inf else "") for m, half in row)
        lines.append((kind, *said))
    return table(*lines)


def draw_length(found: dict[str, list[Reach]], T: int, path: Path) -> None:
    """Left the loss at each length with its interval, right what the longest rows change by place.

    Right, how hard the text is at a place falls out: the same tokens are compared.
    """
    together, lengths = max(1, T // 2), [n * T for n in MULTIPLES]
    best = min(min(r.at) for runs in found.values() for r in runs)
    with picture(path, 2, (12, 4.8)) as (left, right):
        for (kind, runs), line in zip(found.items(), cycle(LINES), strict=False):
            middle, half = zip(*cells(runs), strict=True)
            style = {"color": COLORS[kind], "label": kind, "linestyle": line}
            bars = None if len(runs) == 1 else half
            left.errorbar(lengths, middle, bars, marker="o", capsize=3, markersize=4, **style)
            places = torch.stack([r.places for r in runs]).mean(0).view(-1, together).mean(1)
            x = [together * (i + 0.5) for i in range(len(places))]
            right.plot(x, places.tolist(), **style)
        for axes in (left, right):
            axes.axvline(T, color="#777777", linestyle="--", linewidth=1)
        left.set_xscale("log", base=2)
        left.set_xticks(lengths, [f"{n:,}" for n in lengths])
        left.set(title="all tokens, by length of row", xlabel="tokens; trained at the dashed line")
        left.set(ylabel="nats per token", ylim=(best - 0.1, best + 1))
        right.set(title=f"{lengths[-1]:,} tokens against {T:,}", xlabel="place in the row")
        right.set(ylabel="nats per token more than in the short row", ylim=(-0.2, 0.6))
        left.legend(frameon=False, ncol=2)


def of_length(config: Length) -> None:
    found = measure_length(config, prepare(config.data, config.tokenizer))
    print(show_length(found, config.model.context))
    draw_length(found, config.model.context, path := RUNS / "length.png")
    print(f"\npicture: {path}")


# --- depth ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deep:
    """Train many blocks in each order of norms.

    By SGD, whose steps are as small as the gradients that DeepNorm's analysis speaks of. Adam moves
    every weight of every block by one size, however many blocks there are: at this width 200 norms
    and branches together then soon add the same to every token, in either order.
    """

    train: Recipe = Recipe(OptimConfig("sgd", lr=0.1, weight_decay=0.0, warmup=0.1), steps=150)
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig("bytes")
    model: ModelConfig = ModelConfig(
        dim=32, layers=100, heads=2, context=32, norm="layernorm", activation="gelu",
        position="learned", qk_norm=False, tied=False,
    )  # fmt: skip
    orders: tuple[str, ...] = ("deepnorm", "post")  # to compare
    seed: int = 0  # of weights and order

    def __post_init__(self):
        check_kinds("--orders", self.orders, ORDERS)
        check_one_text(self.model)


def of_depth(config: Deep) -> None:
    corpus, device = prepare(config.data, config.tokenizer), pick_device(config.train.device)
    found: dict[str, list[float]] = {}
    with tqdm(total=len(config.orders) * config.train.steps, unit="step", disable=None) as bar:
        for order in config.orders:
            shape = replace(config.model, order=order, vocab_size=corpus.tokenizer.vocab_size)
            model = Transformer(shape, config.seed).to(device)
            losses = found.setdefault(order, [])
            for loss in learn(model, corpus, config.train, shape.context, config.seed):
                losses.append(loss)
                bar.update()
                bar.set_postfix_str(f"{order}, loss {loss:.2f}")
            ends = [model.layers[i].ffn.up.weight.grad.norm().item() for i in (0, -1)]
            bar.write(f"{order}: gradient's norm in the first block {ends[0]:.1e}, in the last "
                      f"{ends[1]:.1e}")  # fmt: skip
    known = frequencies(corpus)
    print(show_losses(found, config.train.steps, known))
    draw_losses(found, f"{config.model.layers} blocks", path := RUNS / "depth.png", known)
    print(f"\npicture: {path}")


# --- precision ------------------------------------------------------------------------------------


class Numbers(NamedTuple):
    """Which numbers a run computes with, and which its weights are."""

    compute: torch.dtype
    weights: torch.dtype = torch.float32
    scaled: bool = False


PRECISIONS = {
    "fp32": Numbers(torch.float32),
    "bf16": Numbers(torch.bfloat16),
    "fp16, loss scaled": Numbers(torch.float16, scaled=True),
    "fp16, not scaled": Numbers(torch.float16),
    "bf16, weights too": Numbers(torch.bfloat16, torch.bfloat16),
    "fp16, weights too": Numbers(torch.float16, torch.float16),
}


@dataclass(frozen=True)
class Precision:
    """Train the same model with several kinds of numbers.

    With 16 bits for weights too, a step far smaller than its weight is rounded away (bf16 keeps 8
    bits), and fp16 has no number as small as a squared gradient: Adam divides by 0.
    """

    train: Recipe = Recipe(OptimConfig("adamw", lr=2e-3, eps=1e-8), batch=16)
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig("bytes")
    model: ModelConfig = ModelConfig(dim=64, layers=2, heads=4, context=64)
    seed: int = 0  # of weights and order

    def __post_init__(self):
        check_one_text(self.model)


def of_precision(config: Precision) -> None:
    corpus, device = prepare(config.data, config.tokenizer), pick_device(config.train.device)
    shape = replace(config.model, vocab_size=corpus.tokenizer.vocab_size)
    found: dict[str, list[float]] = {}
    with tqdm(total=len(PRECISIONS) * config.train.steps, unit="step", disable=None) as bar:
        for name, numbers in PRECISIONS.items():
            bar.set_postfix_str(name)
            model = Transformer(shape, config.seed).to(device, numbers.weights)
            scale = LossScale() if numbers.scaled else None
            run = learn(model, corpus, config.train, shape.context, config.seed, numbers.compute,
                        scale)  # fmt: skip
            losses = found.setdefault(name, [])
            try:
                for loss in run:
                    losses.append(loss)
                    bar.update()
            except NotFinite as error:
                bar.write(f"{name}, step {len(losses) + 1}: {error}")
                losses.append(math.nan)
    known = frequencies(corpus)
    print(show_losses(found, config.train.steps, known))
    draw_losses(found, "one run, several kinds of numbers", path := RUNS / "precision.png", known)
    print(f"\npicture: {path}")


# --- compare --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compare:
    """Is the second of two groups of runs better than the first?"""

    runs: tyro.conf.Positional[tuple[str, str]]  # a run's name, or of `--seeds` what it begins with


class Group(NamedTuple):
    """The last measurement on held-out text of each run of a group, by its seed."""

    name: str
    unit: str
    text: str  # what tells the held-out text
    values: dict[int, float]


def group(name: str) -> Group:
    """The run of this name, or all that `train.py --seeds` made under it."""
    names = [name] if (RUNS / name).is_dir() else sorted(p.name for p in RUNS.glob(f"{name}-seed*"))
    found = Group(name, "", "", {})
    for each in names or [name]:
        run = Run.open(each)
        rows = [row for row in run.metrics() if "held_out_loss" in row]
        config = run.config()
        if not rows or rows[-1]["step"] != config["steps"]:
            raise UserError(f"{run.folder} has not come to its end: {run.command}")
        unit = "bits_per_byte" if "bits_per_byte" in rows[-1] else "held_out_loss"
        text = str(
            [config["data"], config["objective"], unit == "bits_per_byte" or config["tokenizer"]]
        )
        if found.values and (unit, text) != found[1:3]:
            raise UserError(f"{run.folder} was not measured as the others of {name}-seed*")
        found = Group(name, unit, text, {**found.values, config["seed"]: rows[-1][unit]})
    return found


def difference(a: Sequence[float], b: Sequence[float], paired: bool) -> tuple[float, float]:
    """Mean of b − a, and half the width of its 95 % interval.

    Runs of the same seeds see the same text in the same order and are paired (Student); others are
    not (Welch: variances may differ).
    """
    if paired:
        return interval([y - x for x, y in zip(a, b, strict=True)])
    if min(len(a), len(b)) == 1:
        return mean(b) - mean(a), math.inf
    u, v = variance(a) / len(a), variance(b) / len(b)
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1)) if u + v else 1
    return mean(b) - mean(a), student(freedom) * math.sqrt(u + v)


def of_compare(config: Compare) -> None:
    first, second = (group(name) for name in config.runs)
    if (first.unit, first.text) != (second.unit, second.text):
        raise UserError(f"{first.name} and {second.name} were not asked the same held-out text")
    paired = first.values.keys() == second.values.keys()
    seeds = sorted(first.values) if paired else []
    a, b = ([g.values[s] for s in seeds] or [*g.values.values()] for g in (first, second))
    for one in (first, second):
        middle, half = interval([*one.values.values()])
        print(f"{one.name:24} {middle:.4f}" + (f" ± {half:.4f}" if half < math.inf else "")
              + f" {one.unit.replace('_', ' ')}, {len(one.values)} seeds")  # fmt: skip
    middle, half = difference(a, b, paired)
    if half == math.inf:
        print(f"difference {middle:+.4f}: not decided, as one run does not tell what luck does; "
              "train both with --seeds 3")  # fmt: skip
        return
    verdict = (
        "not decided" if abs(middle) <= half else f"{(first, second)[middle < 0].name} is better"
    )
    print(f"difference {middle:+.4f} ± {half:.4f}{', paired by seed' if paired else ''}: {verdict}")


# --- the script -----------------------------------------------------------------------------------

KINDS = {Length: of_length, Deep: of_depth, Precision: of_precision, Compare: of_compare}


def script() -> None:
    named = tyro.conf.subcommand
    kinds = (
        Annotated[Length, named("length", default=Length())]
        | Annotated[Deep, named("depth", default=Deep())]
        | Annotated[Precision, named("precision", default=Precision())]
        | Annotated[Compare, named("compare")]
    )
    config = tyro.cli(kinds, default=Length(), description=__doc__)
    KINDS[type(config)](config)


if __name__ == "__main__":
    main(script)
