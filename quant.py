"""Fewer bits a weight, applied from outside to a whole model, and what that costs.

Idea: how many bits a weight needs is a question of how they are chosen (calibrate.py, gptq.py),
and of a few features whose values are so large that in bytes nothing is left of the others.

Run: python quant.py                                   a minute: what 4 and 3 bits cost, three ways
     python quant.py save --run base --method gptq --bits 4 --group 64 --name small
     python quant.py ladder --run base                 every method: bits, bytes, loss, time
     python quant.py outliers --run base               why LLM.int8 takes its outliers apart

A run that `save` made is loaded by generate.py, examine.py and whatever else asks writer.py.

Papers: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); Frantar et al. 2022, GPTQ (arXiv
2210.17323) and Optimal Brain Compression (arXiv 2208.11580); Dettmers et al. 2023, QLoRA (arXiv
2305.14314).

Letters: N output features · K input features of a linear.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calibrate import CALIBRATED, READ_BY, Layer, Method, in_order, quantize, run_hooked
from data import Corpus
from generate import Sampling, generate
from improve import IMPROVED
from lora import linears, plain
from model import Transformer
from objectives import Batch
from pictures import picture, table
from quantized import packed, quantized
from recompute import LiveBytes
from run import Run, UserError, first_run, main, read_json, step_of
from stages import choose
from step import pick_device
from training import Training, corpus_of, stored
from writer import Writer, cast, load

# --- runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfRun:
    """Which model, and what it is shown."""

    run: str = ""  # a run's name or folder; empty: the newest
    calibration: int = 32  # rows of training text that calibrate
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        if not 0 <= self.calibration <= 1 << 16:
            raise UserError(f"--calibration {self.calibration} must be from 0 to {1 << 16:,}")


class Subject(NamedTuple):
    """A run's model, and the texts to calibrate and to measure it on."""

    run: Run
    writer: Writer
    training: Training
    batches: list[Batch]

    def measured(self, model: Transformer, dtype: torch.dtype = torch.float32) -> float:
        """Bits per byte of the held-out text; nats per token asked, where that is not defined."""
        self.training.model, self.training.dtype = model, dtype
        found = self.training.held_out()
        return found.get("bits_per_byte", found["held_out_loss"])

    @property
    def unit(self) -> str:
        causal = self.training.config.objective == "causal"
        return "bits per byte" if causal else "nats per token"


def subject(config: OfRun) -> Subject:
    """UserError if there is no such run, it writes no text, or its text is gone."""
    run, device = Run.open(config.run), pick_device(config.device)
    writer = load(run, device)
    how = replace(stored(run), dtype="float32", device=str(device))
    corpus = corpus_of(how, writer.tokenizer)
    training = Training(replace(how, base="", adapter=type(how.adapter)()), corpus)
    state = read_json(run.newest() / "train_state.json")
    if state.get("text", "").endswith(IMPROVED):
        state = {}  # no text is its own
    if any(state.get(name, mark) != mark for name, mark in training.texts().items()):
        raise UserError(f"the text that {run.folder} was trained on is no longer the same")
    rows = [training.rows.take(min(8, config.calibration - i))
            for i in range(0, config.calibration, 8)]  # fmt: skip
    batches = [training.batch(some, "calibration", i) for i, some in enumerate(rows)]
    return Subject(run, writer._replace(model=plain(writer.model)), training, batches)


def size(model: nn.Module) -> tuple[float, int]:
    """Bits for each weight of the linears, with all that belongs to them; bytes of the model."""
    tensors, kinds = packed(model)
    own = tuple(f"{name}." for name in kinds) if kinds else tuple(f"{n}." for n in linears(model))
    inside = sum(x.nbytes for n, x in tensors.items() if n.startswith(own) and ".bias" not in n)
    weights = sum(math.prod(linear.shape) for linear in linears(model).values())
    return 8 * inside / weights, sum(x.nbytes for x in tensors.values())


class Result(NamedTuple):
    """What a model is after it was quantized."""

    name: str
    bits: float  # a weight of the linears
    bytes: int  # of the whole model
    measure: float  # as Subject.measured
    seconds: float  # that quantizing took
    speed: float  # tokens/s
    layers: list[Layer]


def speed(writer: Writer, model: Transformer, tokens: int = 48) -> float:
    """Tokens/s of one text that is written greedily; 0 for a model that does not write."""
    if model.config.arch != "decoder":
        return 0.0
    how, begin = Sampling(greedy=True), writer.begin or [0]
    times = [time.perf_counter() for _ in generate(model, [begin], tokens, how, set(), 0)]
    return (len(times) - 1) / (times[-1] - times[0])


def result(it: Subject, name: str, how: Method | torch.dtype) -> Result:
    """A method on a copy of the model; or the model in another dtype."""
    model, layers, seconds = copy.deepcopy(it.writer.model), [], 0.0
    dtype = how if isinstance(how, torch.dtype) else torch.float32
    if isinstance(how, Method):
        begin = time.perf_counter()
        layers = quantize(model, how, it.batches if how.method in CALIBRATED else ())
        seconds = time.perf_counter() - begin
    elif how != torch.float32:
        cast(model, how)
    return Result(name, *size(model), it.measured(model, dtype), seconds,
                  speed(it.writer, model), layers)  # fmt: skip


def show(found: Sequence[Result], unit: str) -> str:
    """A line each, and how much worse than the first it is."""
    lines = [("", "bits a weight", "MB", unit, "", "layer error", "of nearest", "quantized in",
              "tokens/s")]  # fmt: skip
    for r in found:
        own, nearest = (sum(getattr(x, n) for x in r.layers) for n in ("error", "nearest"))
        lines.append((
            r.name, f"{r.bits:.2f}", f"{r.bytes / 1e6:.2f}", f"{r.measure:.4f}",
            f"{100 * (r.measure / found[0].measure - 1):+.2f} %",
            f"{own / len(r.layers):.2%}" if own != nearest else "",
            f"{own / nearest:.2f}" if own != nearest else "",
            f"{r.seconds:.1f} s", f"{r.speed:.0f}",
        ))  # fmt: skip
    return table(*lines)


# --- without arguments ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo(OfRun):
    """What 4 and 3 bits cost, three ways; of a small model if there is no run."""

    held: int = 100_000  # bytes of held-out text to measure on, about; 0: all

    def __post_init__(self):
        super().__post_init__()
        if self.held < 0:
            raise UserError(f"--held {self.held} must not be negative")


def shorter(corpus: Corpus, least: int) -> Corpus:
    """The corpus with the first of its held-out documents alone, of so many bytes or more."""
    size = documents = 0
    while size < least and documents < len(corpus.held):
        ids = corpus.held.document(documents).tolist()[1:]
        size, documents = size + len(corpus.tokenizer.decode(ids).encode()), documents + 1
    held = corpus.meta["held"] | {"bytes": size}
    return replace(corpus, held=corpus.held.first(documents), meta=corpus.meta | {"held": held})


def demo(config: Demo) -> None:
    if not config.run:
        first_run()
    rows = {"fp32": torch.float32} | {
        f"{bits} bits, {name}": Method(method, bits, group)
        for bits in (4, 3)
        for name, method, group in (
            ("nearest", "rtn", 0), ("nearest, groups", "rtn", 64), ("gptq, groups", "gptq", 64)
        )
    }  # fmt: skip
    it = subject(config)
    if config.held:
        it.training.corpus = shorter(it.training.corpus, config.held)
    print(show([result(it, name, how) for name, how in rows.items()], it.unit))


# --- save -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Save(OfRun, Method):
    """Quantize a run, as a run of its own."""

    name: str = ""  # of the new run; empty: the next free run-001, run-002, …

    def __post_init__(self):
        OfRun.__post_init__(self)
        Method.__post_init__(self)


def save(config: Save) -> None:
    """A run whose checkpoint holds codes, and in train_state.json what they are."""
    it = subject(config)
    whole = it.measured(it.writer.model)
    with LiveBytes() as live:
        layers = quantize(it.writer.model, config, it.batches)
    (tensors, kinds), (bits, _) = packed(it.writer.model), size(it.writer.model)
    measure, old = it.measured(it.writer.model), it.run.newest()
    state = read_json(old / "train_state.json")
    kept = {key: state[key] for key in ("text", "held_out", "settings") if key in state}
    run = Run.create(config.name, it.run.config())
    it.writer.tokenizer.save(run.folder / it.writer.tokenizer.file_name)
    run.measure(step=step_of(old), **{it.unit.replace(" ", "_"): measure}, whole=whole)
    path = run.save(step_of(old), tensors, {}, kept | {"quantization": kinds})
    groups = sorted({how["group"] for how in kinds.values() if how.get("group")})
    stored_bytes = (path / "model.safetensors").stat().st_size
    run.log(
        f"{it.run.folder} in {bits:.2f} bits a weight"
        + (f", groups of {' and '.join(map(str, groups))}" if groups else "")
        + f": {measure:.4f} {it.unit}, whole {whole:.4f}, {stored_bytes:,} bytes\n"
        f"at most {live.peak / 1e6:.1f} MB beside the model at once"
    )
    if layers:
        worst = max(layers, key=lambda layer: layer.error)
        run.log(f"the largest error, {worst.error:.2%} of its outputs, has {worst.name}")
    run.log(f"now: python generate.py --run {run.name}")


# --- ladder ---------------------------------------------------------------------------------------

RUNGS: dict[str, torch.dtype | Method] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": Method("int8"),
    "int8, zero point": Method("zero-point"),
    "LLM.int8": Method("llm-int8"),
    **{f"nearest {b}": Method("rtn", b, 0) for b in (8, 4, 3, 2)},
    **{f"nearest {b}, groups": Method("rtn", b) for b in (4, 3)},
    "NF4": Method("nf4"),
    **{f"GPTQ {b}": Method("gptq", b, 0) for b in (8, 4, 3, 2)},
    **{f"GPTQ {b}, act-order": Method("gptq", b, 0, act_order=True) for b in (4, 3)},
    **{f"GPTQ {b}, groups": Method("gptq", b) for b in (4, 3)},
    **{f"GPTQ {b}, groups, act-order": Method("gptq", b, act_order=True) for b in (4, 3)},
    **{f"OBQ {b}": Method("obq", b, 0) for b in (4, 3)},
}


@dataclass(frozen=True)
class Ladder(OfRun):
    """Every method on one run."""

    rows: tuple[str, ...] = tuple(RUNGS)  # which of them
    group: int = 64  # weights that share a step, where there are groups

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.rows if name not in RUNGS]:
            raise UserError(f"--rows {unknown[0]!r} is none of {', '.join(RUNGS)}")
        if not self.rows:
            raise UserError("--rows must name at least one")
        Method(group=self.group)  # says what is wrong


def ladder(config: Ladder) -> None:
    it, found = subject(config), []
    for name in config.rows:
        how = RUNGS[name]
        if isinstance(how, Method) and how.method in READ_BY["group"] and how.group:
            how = replace(how, group=config.group)
        found.append(result(it, name, how))
        print(f"{name}: {found[-1].measure:.4f} {it.unit}", flush=True)
    print("\n" + show(found, it.unit))
    draw_ladder(found, it.unit, path := it.run.folder / "ladder.png")
    print(f"\npicture: {path}")


LOOKS = {  # color, marker, line
    "nearest": ("#c8442d", "o", ":"), "GPTQ": ("#1f4e8c", "s", "-"), "OBQ": ("#0d2240", "^", "--"),
    "NF4": ("#8a9a2f", "D", ""), "int8": ("#b5892e", "v", ""), "LLM.int8": ("#2a7f62", "P", ""),
    "bf16": ("#777777", "X", ""), "fp32": ("#777777", "*", ""),
}  # fmt: skip
FILLS = {"": "full", "groups": "none", "act-order": "left", "groups, act-order": "bottom"}
LEAST = 0.01  # % that is drawn


def draw_ladder(found: Sequence[Result], unit: str, path: Path) -> None:
    """How much worse than the first, by bits a weight; markers are filled by what is added."""
    with picture(path, size=(9, 5)) as (axes,):
        lines: dict[tuple[str, str], list[Result]] = {}
        for r in found[1:]:
            method, _, more = r.name.partition(", ")
            lines.setdefault((method.split()[0], more), []).append(r)
        for (method, more), some in lines.items():
            color, marker, line = LOOKS[method]
            y = [max(LEAST, 100 * (r.measure / found[0].measure - 1)) for r in some]
            axes.plot([r.bits for r in some], y, marker=marker, linestyle=line, color=color,
                      fillstyle=FILLS.get(more, "none"), linewidth=1.3, markersize=7,
                      label=", ".join(filter(None, (method, more))))  # fmt: skip
        worse = f"% more {unit} than {found[0].name}; {LEAST} or less at the bottom"
        axes.set(xscale="log", yscale="log", xlabel="bits a weight, steps and all", ylabel=worse)
        ticks = (2, 3, 4, 6, 8, 16)
        axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axes.minorticks_off()
        axes.axhline(1, color="#777777", linestyle="--", linewidth=1)
        axes.set_title("What fewer bits cost")
        axes.legend(frameon=False, ncol=2, fontsize=8)


# --- outliers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outliers(OfRun):
    """Give a run outlier features, without changing what it computes, and quantize it."""

    channels: int = 6  # of the stream, made to stand out behind each norm
    factor: float = 64.0  # by which; a power of two changes no bit

    def __post_init__(self):
        super().__post_init__()
        if self.channels < 1 or not 1 <= self.factor <= 2**20:
            raise UserError("--channels must be at least 1, --factor from 1 to 2^20")


@torch.no_grad()
def plant(model: Transformer, channels: Sequence[int], factor: float) -> None:
    """Norms' gains of some channels × factor, the columns that read them / factor: the same model.

    Large models grow such features themselves (Dettmers et al. 2022, section 4).
    """
    if model.config.order != "pre":
        raise UserError("behind a norm after the sum the stream goes on: outliers need --order pre")
    at = list(channels)
    for stack in filter(None, (model, model.encoder)):
        for block in stack.layers:
            norms = [(block.attention_norm, block.attention, ("query", "key", "value")),
                     (block.ffn_norm, block.ffn, ("up", "gate"))]  # fmt: skip
            if block.cross is not None:
                norms.append((block.cross_norm, block.cross, ("query",)))
            for norm, layer, readers in norms:
                for p in norm.parameters():
                    p[at] *= factor
                for reader in filter(None, (getattr(layer, name) for name in readers)):
                    reader.weight[:, at] /= factor


@torch.no_grad()
def magnitudes(model: Transformer, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of each input feature (K) the largest magnitude, for one of those that read the same."""
    found: dict[str, Tensor] = {}
    firsts = [names[0] for names in in_order(model, batches[0])]

    def look(name: str, x: Tensor) -> None:
        largest = x.flatten(0, -2).abs().amax(0)
        found[name] = largest.maximum(found.get(name, largest))

    run_hooked(model, firsts, batches, look)
    return found


def outliers(config: Outliers) -> None:
    it = subject(config)
    if not it.batches:
        raise UserError("outliers are seen in texts: give a --calibration of at least 1")
    channels = torch.linspace(0, it.writer.model.config.dim - 1, config.channels + 2)[1:-1]
    found, seen = [], {}
    for name in ("as trained", "planted"):
        if name == "planted":
            plant(it.writer.model, channels.long().tolist(), config.factor)
        seen[name] = magnitudes(it.writer.model, it.batches)
        for how in ("fp32", "int8", "LLM.int8"):
            found.append(result(it, f"{name}, {how}", RUNGS[how]))
    print(show(found, it.unit))
    print(f"\n{whole_bytes(it):.2%} of the inputs' values of the planted model are in bytes")
    draw_outliers(seen, found, it.unit, path := it.run.folder / "outliers.png")
    print(f"picture: {path}")


def whole_bytes(it: Subject) -> float:
    """The share of a matrix product's terms that LLM.int8 leaves to integers."""
    quantize(model := copy.deepcopy(it.writer.model), Method("llm-int8"), it.batches)
    made = quantized(model).values()
    return 1 - sum(m.outliers.numel() for m in made) / sum(m.codes.numel() for m in made)


def draw_outliers(
    seen: dict[str, dict[str, Tensor]], found: Sequence[Result], unit: str, path: Path
) -> None:
    """Left and middle the largest input of each feature, layer by layer; right what bytes cost."""
    top = max(x.max().item() for some in seen.values() for x in some.values())
    top = math.ceil(math.log10(top))
    with picture(path, 3, (14, 4.8)) as (*both, right):
        for axes, (name, some) in zip(both, seen.items(), strict=True):
            readers = {n: x for n, x in some.items() if n.endswith(("query", "up"))}
            rows = torch.stack(list(readers.values())).log10().clamp(min=-1).cpu().numpy()
            image = axes.imshow(rows, aspect="auto", cmap="Greys", vmin=-1, vmax=top,
                                interpolation="nearest")  # fmt: skip
            axes.set_yticks(range(len(readers)), [n.removeprefix("layers.") for n in readers])
            axes.set(title=name, xlabel="feature")
            axes.grid(visible=False)
        bar = axes.figure.colorbar(image, ax=axes, label="largest |x|")
        ticks = range(-1, top + 1)
        bar.set_ticks(list(ticks), labels=[f"{10.0**n:g}" for n in ticks])
        names = [r.name for r in found]
        cost = [100 * (r.measure / found[0].measure - 1) for r in found]
        right.barh(names, cost, color=["#9db7d5", "#c8442d", "#1f4e8c"] * 2)
        for y, x in enumerate(cost):
            right.annotate(f" {x:+.2f} %", (max(0, x), y), va="center")
        right.invert_yaxis()
        right.set(title="in bytes", xlabel=f"% more {unit}", xlim=(0, 1.3 * max(*cost, 0.1)))


# --- the script -----------------------------------------------------------------------------------

STAGES = {
    "demo": (Demo, demo),
    "save": (Save, save),
    "ladder": (Ladder, ladder),
    "outliers": (Outliers, outliers),
}


def script() -> None:
    """Without arguments: demo."""
    choose(STAGES, ["demo"], __doc__)


if __name__ == "__main__":
    main(script)
