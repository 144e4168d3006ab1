"""Activation checkpointing: what lies inside a block is computed a second time, not kept.

Idea: the backward pass needs what the forward pass computed, and all of that takes more memory than
the weights. So keep only what goes into a block; when the gradient comes back to it, compute the
block again, this time with all that lies inside, use that and drop it. The memory of L blocks
shrinks to L inputs and the inside of one block, for one more forward pass: a third more work.

    recompute(model, "blocks")       keeps what goes into each block      (Chen et al., section 4)
    recompute(model, "attention")    keeps all but what attention computes to its result
    recompute(model, "none")         keeps everything: the plain model again

Korthikanti et al. compute only scores and softmax again, the T² of attention. `attend` never keeps
those, so here "attention" means queries, keys and values too, and what `relative` adds to scores.

The model stays the same object with the same weights under the same names. Loss and gradients are
those of the plain model bit for bit, since the same operations meet the same numbers and their
gradients are added up in the same order. Dropout is drawn again from numbers that are kept. Where
no gradient is asked for, and behind a past, nothing is computed twice.

Run: python recompute.py        memory and time of each kind, and a picture of a step's memory
     python recompute.py --model.layers 12 --dtype bfloat16

Papers: Chen et al. 2016 (arXiv 1604.06174); Korthikanti et al. 2022 (arXiv 2205.05198, section 5).

Letters: B batch · T tokens · C model width · L layers.
"""

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from attention import Attention, KeyValue, Mask
from dropout import Drop, drawn_from
from model import Block, ModelConfig, Transformer, count_parameters, preset_in
from objectives import Batch
from pictures import picture, table
from positions import Rotation
from run import RUNS, UserError, generator, main
from step import accumulate, loss_sum, machine

What = Literal["none", "attention", "blocks"]

# --- a function that is computed again ------------------------------------------------------------


class Recompute(torch.autograd.Function):
    """y = f(x; w), of which x is kept; dx, dw = (∂y/∂x, ∂y/∂w)ᵀ dy from a second f(x; w).

    The weights w are inputs too, though f knows them without being told: their gradients then go
    the way of all others, and are added up in the same order.
    """

    @staticmethod
    def forward(ctx, f: Callable, weights: list[Tensor], *tensors: Tensor | None):
        """tensors: x, any of them None, and then the weights; torch keeps no graph in here."""
        ctx.f, ctx.weights = f, weights
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # an output that nobody uses has no gradient, not zeros
        return f(*tensors[: len(tensors) - len(weights)])

    @staticmethod
    @once_differentiable
    def backward(ctx, *dy: Tensor | None):
        needed = ctx.needs_input_grad[2:]
        kept = ctx.saved_tensors  # an error if a weight or an input has changed since
        x = [
            value if value is None else value.detach().requires_grad_(need)
            for value, need in zip(kept[: len(kept) - len(ctx.weights)], needed, strict=False)
        ]
        with torch.enable_grad():
            y = ctx.f(*x)
        asked = [(out, d) for out, d in zip(y, dy, strict=True) if d is not None]
        outs, ds = zip(*((out, d) for out, d in asked if out.requires_grad), strict=True)
        to = [value for value, need in zip((*x, *ctx.weights), needed, strict=True) if need]
        found = iter(torch.autograd.grad(outs, to, ds, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needed)


def taken_apart(value: object) -> tuple[list[Tensor | None], Callable]:
    """The tensors of an argument that may have gradients, and how it is made of such again."""
    if isinstance(value, Tensor):
        return [value], lambda x: x
    if isinstance(value, KeyValue):
        return [*value], KeyValue
    if isinstance(value, Mask):
        rest = replace(value, bias=None)
        return [value.bias], lambda bias: replace(rest, bias=bias)
    return [], lambda: value


def recomputed(f: Callable, module: nn.Module, *arguments: object) -> Tensor | tuple:
    """f(*arguments), of which only the arguments are kept; f knows no weights but the module's.

    f gives a tensor, or one with new keys and values. Of the arguments tensors, a memory and a
    mask's bias may have gradients.
    """
    taken = [taken_apart(value) for value in arguments]
    build = [(len(parts), together) for parts, together in taken]

    def of(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        left = iter(tensors)
        out = f(*(together(*(next(left) for _ in range(n))) for n, together in build))
        return (out,) if isinstance(out, Tensor) else (out[0], *out[1])

    weights = [p for p in module.parameters() if p.requires_grad]
    parts = [x for some, _ in taken for x in some]
    out, *new = Recompute.apply(of, weights, *parts, *weights)
    return (out, KeyValue(*new)) if new else out


def pays(x: Tensor, past: object = None) -> bool:
    """Whether a backward pass will want what is computed from x (B T C).

    A single token is left alone: without a graph CUDA decodes it, and the last bits would differ.
    """
    return torch.is_grad_enabled() and past is None and x.shape[1] > 1


# --- what of a model is computed again ------------------------------------------------------------


class RecomputedBlock(Block):
    """A block that keeps its input: the stream, and in a decoder with an encoder its memory."""

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None,
        past: KeyValue | None = None, *more: KeyValue | Mask | Drop | None,
    ) -> tuple[Tensor, KeyValue]:  # fmt: skip
        """more: memory, its mask, and what is dropped."""
        plain = super().forward
        if not pays(x, past):
            return plain(x, mask, rotation, past, *more)
        return recomputed(plain, self, x, mask, rotation, None, *more)


class RecomputedAttention(Attention):
    """Attention that keeps its input."""

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        plain = super().forward
        if not pays(x, past):
            return plain(x, mask, rotation, past)
        return recomputed(plain, self, x, mask, rotation)

    def look_at(self, x: Tensor, memory: KeyValue, mask: Mask) -> Tensor:
        plain = super().look_at
        return recomputed(plain, self, x, memory, mask) if pays(x) else plain(x, memory, mask)


KINDS = {  # of blocks, and of the attentions in them
    "none": (Block, Attention),
    "attention": (Block, RecomputedAttention),
    "blocks": (RecomputedBlock, Attention),
}


def recompute(model: nn.Module, what: What) -> None:
    """Make a model's blocks or attentions such that are computed again, or ("none") plain ones.

    They stay the same objects, and so do weights and names; only their kind is another.
    """
    if what not in KINDS:
        raise UserError(f"there is no way {what!r} to recompute: choose {', '.join(KINDS)}")
    for module in model.modules():
        for kind in KINDS[what]:
            plain = Block if issubclass(kind, Block) else Attention
            if isinstance(module, plain):
                module.__class__ = kind


# --- how much memory is in use --------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of tensors that were made inside and are still alive.

        with LiveBytes() as live:
            loss = …                 live.now: kept for the backward pass
            loss.backward()          live.peak: the most there ever was

    Views and results written in place are counted once, what was there before never. What an
    operation takes for itself and gives back before it ends is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.course: list[int] = []  # `now` behind each operation
        self.known: dict[int, weakref.ref] = {}  # memory that is alive, by the id of its storage

    @property
    def peak(self) -> int:
        return max(self.course, default=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tensors_in((args, kwargs)):
            self.meet(x.untyped_storage(), 0)
        result = function(*args, **(kwargs or {}))
        for x in tensors_in(result):
            self.meet(storage := x.untyped_storage(), storage.nbytes())
        self.course.append(self.now)
        return result

    def meet(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count memory that is not known, until it is given back."""
        if id(storage) not in self.known:
            forget = partial(self.forget, id(storage), size)
            self.known[id(storage)] = weakref.ref(storage, forget)
            self.now += size

    def forget(self, number: int, size: int, _: weakref.ref) -> None:
        del self.known[number]
        self.now -= size


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


# --- what it costs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Memory and time of a forward and backward pass, with and without recomputation."""

    model: ModelConfig = ModelConfig(vocab_size=512)
    batch: int = 8  # rows
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    rounds: int = 7  # of all kinds in turn; the median is shown

    def __post_init__(self):
        if min(self.batch, self.rounds) < 1:
            raise UserError("--batch and --rounds must each be at least 1")
        if not self.model.vocab_size:
            raise UserError("without a tokenizer, --model.vocab-size must be at least 1")


COLORS = {"none": "#1f4e8c", "attention": "#b5892e", "blocks": "#c8442d"}


def random_batch(c: ModelConfig, rows: int, seed: int = 0) -> Batch:
    """Rows of random tokens, as the architecture reads them, each asked what the next one is."""
    shape, rng = (rows, c.context), generator(seed, "recompute")
    ids, targets, source = torch.randint(0, c.vocab_size, (3, *shape), generator=rng)
    first, last = torch.zeros_like(ids), torch.full_like(ids, c.context - 1)
    draws = drawn_from(seed, 0, 0, rows) if c.dropout else None
    if c.arch == "encdec":
        return Batch(ids, targets, first, None, source, first, last, first, last, draws)
    hi = last if c.arch == "encoder" else None
    return Batch(ids, targets, first, hi, draws=draws)


def memory(model: Transformer, batch: Batch, dtype: torch.dtype) -> tuple[int, LiveBytes]:
    """Bytes that the forward pass keeps for the backward pass, and the course of both."""
    with LiveBytes() as live:
        loss = loss_sum(model, batch, dtype)
        kept = live.now
        loss.backward()
    return kept, live


def measure(config: Settings) -> dict[str, tuple[int, LiveBytes, list[float]]]:
    """Of each kind: bytes kept, the course of memory, and seconds of one processor, by round."""
    model, batch = Transformer(config.model), random_batch(config.model, config.batch)
    dtype, found = getattr(torch, config.dtype), {}
    for what in KINDS:
        recompute(model, what)
        model.zero_grad()
        found[what] = (*memory(model, batch, dtype), [])
    for _ in range(config.rounds):
        for what in KINDS:
            recompute(model, what)
            model.zero_grad()
            start = time.process_time()
            accumulate(model, [batch], dtype)
            found[what][2].append(time.process_time() - start)
    return found


def show(found: dict[str, tuple[int, LiveBytes, list[float]]]) -> None:
    """A table. A ratio of times is the median over rounds, in which all kinds take turns."""
    whole, _, plain = found["none"]
    lines = [("recomputed", "kept MB", "saved", "peak MB", "ms", "time")]
    for what, (kept, live, times) in found.items():
        ratio = median(t / p for t, p in zip(times, plain, strict=True))
        lines.append(
            (
                what,
                f"{kept / 1e6:.1f}",
                f"{1 - kept / whole:.1%}",
                f"{live.peak / 1e6:.1f}",
                f"{1e3 * median(times):.0f}",
                f"{ratio:.2f} ×",
            )
        )
    print(f"\n{table(*lines)}")
    print("\nkept: for the backward pass, what the loss keeps included; saved: of that")


def draw(found: dict[str, tuple[int, LiveBytes, list[float]]], path: Path) -> None:
    """Memory behind each operation of a step."""
    with picture(path) as (axes,):
        for what, (_, live, _) in found.items():
            axes.plot([x / 1e6 for x in live.course], color=COLORS[what], label=what)
        axes.set(xlabel="operations of a forward and backward pass", ylabel="megabytes alive")
        axes.legend(title="recomputed", frameon=False)


def script() -> None:
    default = Settings()
    shape = preset_in(sys.argv[1:], default.model)
    shape = replace(shape, vocab_size=shape.vocab_size or default.model.vocab_size)
    config = tyro.cli(Settings, default=replace(default, model=shape), description=__doc__)
    torch.set_num_threads(1)  # then processor time is time, whatever else the machine does
    c, N = config.model, count_parameters(Transformer(config.model))
    print(
        f"{c.arch}, {c.layers} blocks, {c.dim} wide, {N:,} parameters; {config.batch} rows of "
        f"{c.context} tokens in {config.dtype}; {machine(torch.device('cpu'))}"
    )
    show(found := measure(config))
    draw(found, path := RUNS / "recompute.png")
    print(f"picture: {path}")


if __name__ == "__main__":
    main(script)
