"""LoRA: a few new weights beside frozen ones, which learn what all of them would have learnt.

Idea: what tuning adds to a matrix W has a low rank, so let it be a product of two thin matrices,

    y = W x + b + (α/r) B A x,        W (out in) frozen,  A (r in) drawn,  B (out r) zero at first

and train only A and B: at the start nothing has changed, the optimizer has little to hold, and a
tuned model is a file of some kilobytes beside its base. When it is to be fast, W + (α/r) B A is one
matrix again. Several such adapters can stand on one base, and be switched or added up.

    add_lora(model, settings)       put adapters on the linears that settings name
    use(model, {"a": 1, "b": 0.5})  which adapters count, and how much
    merge(model), unmerge(model)    compute with W + Δ; the bits of W stay aside and come back
    plain(model)                    the model without adapters, whose matrices are the merged ones
    survival(model)                 how much of Δ is left if W is quantized, and so W + Δ

Nothing in model.py knows of this: a linear is exchanged for one that has another inside.

Run: python lora.py              one base, three tasks, an adapter for each (tuning.py)
     python lora.py compare      a run tuned on three tasks by every method

Papers: Hu et al. 2021, LoRA (arXiv 2106.09685); Kalajdzievski 2023, rsLoRA (arXiv 2312.03732);
Dettmers et al. 2023, QLoRA (arXiv 2305.14314).

Letters: R rank · C model width · V vocabulary.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import register_parametrization

from dropout import dropped
from model import Transformer
from run import UserError, generator, main, start

# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What is trained: all weights, or a few new ones beside frozen ones."""

    kind: Literal["none", "lora", "prefix", "prompt"] = "none"  # none: all weights are trained
    rank: int = 8  # lora: of what is added to a matrix
    alpha: float = 16.0  # what is added counts alpha / rank
    root: bool = False  # alpha / √rank instead (rsLoRA)
    on: tuple[str, ...] = ("query", "value")  # matrices: ends of their names, or patterns with *
    dropout: float = 0.0  # share of its input that training forgets
    tokens: int = 16  # prefix, prompt: how many stand before every text
    start: Literal["vocabulary", "text", "random"] = "vocabulary"  # of what they are made at first
    text: str = ""  # start text: what they say then, repeated or cut
    hidden: int = 0  # prefix: width of the MLP that it is trained through; 0: none

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise UserError("--adapter.rank must be at least 1, and --adapter.alpha above 0")
        if self.kind == "lora" and not self.on:
            raise UserError("--adapter.on must name at least one matrix")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--adapter.dropout {self.dropout} must be from 0 to below 1")
        if self.tokens < 1 or self.hidden < 0:
            raise UserError("--adapter.tokens must be at least 1, --adapter.hidden at least 0")
        if self.kind == "prompt" and self.hidden:
            raise UserError("--adapter.kind prompt has no MLP: leave --adapter.hidden out")
        if (self.start == "text") != bool(self.text):
            raise UserError("--adapter.start text needs an --adapter.text, and only that one")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.root else self.rank)


NONE = Adapter()


def flags(how: Adapter) -> list[str]:
    """As a command line has it."""
    if how == NONE:
        return []
    words = ["--adapter.on", *how.on] + ["--adapter.root"] * how.root
    for name in ("kind", "rank", "alpha", "dropout", "tokens", "start", "text", "hidden"):
        words += [f"--adapter.{name}", str(getattr(how, name))]
    return words


# --- one matrix -----------------------------------------------------------------------------------


class LowRank(nn.Module):
    """x ↦ s B A x, A (R in), B (out R); 0 at the start, as B is."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, share: float = 0.0):
        super().__init__()
        self.A = Parameter(torch.empty(rank, shape[1]))
        self.B = Parameter(torch.zeros(shape[0], rank))
        self.scale, self.share = scale, share
        self.first = 0  # the channel of the whole input that its own begin with

    def forward(self, x: Tensor, gone: Callable[[float, Tensor, int], Tensor] | None) -> Tensor:
        if self.share and gone is not None:
            x = x.masked_fill(gone(self.share, x, self.first), 0) / (1 - self.share)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale

    def delta(self) -> Tensor:
        """s B A (out in), in fp32 or wider."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return self.scale * (self.B.to(wide) @ self.A.to(wide))

    def split(self, dim: int, share: Callable[[Parameter, int], Parameter]) -> "LowRank":
        """With some rows of B, or some columns of A; the other one is shared by all parts."""
        part = copy.copy(self)
        cut = {"A": share(self.A, 1)} if dim else {"B": share(self.B, 0)}
        part._parameters = {**self._parameters, **cut}
        part.first = cut["A"].place.lo if dim else 0
        return part


class LoraLinear(nn.Module):
    """y = W x + b + Σ w s B A x over the adapters that are in use, each with its weight w."""

    def __init__(self, base: nn.Module, place: int):
        """base: any linear that has shape, bias, split and dense. place: a number of its own."""
        super().__init__()
        self.base, self.place = base, place
        self.adapters = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.merged: Tensor | None = None
        self.told: list[Tensor] = []  # of dropout: what it is drawn from, and where; see Stack

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.merged.to(x.dtype), bias)
        y = self.base(x)
        gone = self.gone if self.told else None
        for name, weight in self.weights.items():
            y = y + weight * self.adapters[name](x, gone)
        return y

    def gone(self, share: float, x: Tensor, first: int) -> Tensor:
        """What of the input x (B T in) is forgotten; its channels begin with number `first`."""
        draws, at = self.told
        return dropped(share, draws, self.place, at, x.shape[-1], first)

    def dense(self) -> Tensor:
        return changed(self.base.dense(), self)

    def split(self, dim: int, share: Callable[[Parameter, int], Parameter]) -> "LoraLinear":
        part = copy.copy(self)
        part._modules = {
            "base": self.base.split(dim, share),
            "adapters": nn.ModuleDict({n: a.split(dim, share) for n, a in self.adapters.items()}),
        }
        return part


class LoraMatrix(nn.Module):
    """W ↦ W + Σ w s B A, for a matrix that is no linear's: the embedding, an untied head.

    It is made anew for each use, and its input, which is token ids, has nothing to forget.
    """

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.merged: Tensor | None = None

    def forward(self, W: Tensor) -> Tensor:
        return changed(W, self) if self.merged is None else self.merged


def changed(W: Tensor, by: LoraLinear | LoraMatrix) -> Tensor:
    """W + Σ w s B A, added in fp32 or wider."""
    wide = torch.promote_types(W.dtype, torch.float32)
    delta = sum(w * by.adapters[name].delta() for name, w in by.weights.items())
    return (W.to(wide) + delta).to(W.dtype)


# --- a model --------------------------------------------------------------------------------------

TABLES = ("embedding", "head")  # matrices of a model that no linear has
PLACE = 1 << 20  # places of dropout from here on are those of adapters; blocks have those below


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear of a model by its name: what has a matrix, plain, adapted or quantized."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if hasattr(type(module), "dense") and not inside:
            found[name] = module
    return found


def chosen(model: nn.Module, on: Iterable[str]) -> list[str]:
    """The linears whose names end with a word of `on`, or fit its pattern; UserError if none."""
    tables = [n for n in TABLES if getattr(model, n) is not None]
    names, found = [*tables, *linears(model)], set()
    for word in on:
        fits = [n for n in names if n == word or n.endswith(f".{word}") or fnmatchcase(n, word)]
        if not fits:
            known = sorted({n.split(".")[-1] for n in names})
            raise UserError(
                f"--adapter.on {word!r} names no matrix of the model: choose among "
                f"{', '.join(known)}, or give a pattern such as 'layers.0.*'"
            )
        found |= set(fits)
    return [n for n in names if n in found]


def exchange(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one with this name."""
    above, _, last = name.rpartition(".")
    setattr(model.get_submodule(above), last, new)


def add_lora(model: Transformer, how: Adapter, seed: int = 0, name: str = "default") -> None:
    """Put an adapter on the linears that `how` names.

    At the start it changes no bit: A is uniform in ±1/√in, as PEFT and loralib draw it, and B zero.
    It counts at once, beside those that are there already. UserError if its name is taken.
    """
    for linear in chosen(model, how.on):
        shape = shape_of(model, linear)
        new = LowRank(shape, how.rank, how.scale, how.dropout)
        draw = generator(seed, f"init/{linear}.{name}")
        bound = shape[1] ** -0.5
        new.A.data.copy_(torch.rand(new.A.shape, generator=draw) * 2 * bound - bound)
        put(model, linear, name, new)


def shape_of(model: Transformer, name: str) -> tuple[int, int]:
    """(out in) of a linear, (V C) of a table."""
    above, _, last = name.rpartition(".")
    return tuple(getattr(model.get_submodule(above), last).shape)


def put(model: Transformer, linear: str, name: str, new: LowRank) -> None:
    """Let a linear have an adapter of this name, too; UserError if the name is taken."""
    old = adapted(model).get(linear)
    if old is None and linear in TABLES:
        old = LoraMatrix()
        register_parametrization(model, linear, old, unsafe=True)  # a sum over no adapters yet
    elif old is None:
        old = LoraLinear(model.get_submodule(linear), PLACE + len(adapted(model)))
        old.told = told_by(model, linear)
        exchange(model, linear, old)
    if name in old.adapters:
        raise UserError(f"there is an adapter {name!r} already: give another name")
    old.adapters[name] = new.to(next(iter(model.parameters())))
    old.weights = {**old.weights, name: 1.0}


def told_by(model: Transformer, linear: str) -> list[Tensor]:
    """Where the stack whose tokens this linear reads says what dropout is drawn from.

    Keys and values of cross attention are made of the encoder's tokens.
    """
    of_encoder = linear.startswith("encoder.") or linear.endswith((".cross.key", ".cross.value"))
    stack = model.encoder if of_encoder else model
    stack.told = [] if stack.told is None else stack.told
    return stack.told


def adapted(model: nn.Module) -> dict[str, LoraLinear | LoraMatrix]:
    """What has adapters, by its name in the plain model."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear | LoraMatrix)}
    return {plain_name(n): m for n, m in found.items()}


def plain_name(name: str) -> str:
    """What a weight or module is called where there are no adapters."""
    name = name.removesuffix(".original").removesuffix(".0").removeprefix("parametrizations.")
    return name.replace(".base.", ".")


def use(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Let these adapters count, each so much, and no others; {} is the base. Nothing stays merged.

    UserError if there is none of a name.
    """
    there = {name for linear in adapted(model).values() for name in linear.adapters}
    if unknown := sorted(weights.keys() - there):
        names = ", ".join(sorted(there)) or "none"
        raise UserError(f"there is no adapter {unknown[0]!r} on the model: it has {names}")
    unmerge(model)
    for linear in adapted(model).values():
        linear.weights = {name: w for name, w in weights.items() if name in linear.adapters}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Compute with one matrix instead of three; what the adapters say now is taken."""
    for name, one in adapted(model).items():
        one.merged = one.dense() if isinstance(one, LoraLinear) else getattr(model, name)


def unmerge(model: nn.Module) -> None:
    """As before `merge`, to the bit: W has not been touched."""
    for linear in adapted(model).values():
        linear.merged = None


@torch.no_grad()
def survival(model: nn.Module) -> float:
    """The share of what adapters add that merging would keep: ⟨Q(W + Δ) − Q(W), Δ⟩ / ⟨Δ, Δ⟩.

    1 for plain weights; where W is a few bits, most of a small Δ can be less than half a step.
    """
    kept = whole = 0.0
    for linear in adapted(model).values():
        if isinstance(linear, LoraLinear):
            W, merged = linear.base.dense().double(), linear.dense()
            delta = merged.double() - W
            kept += ((linear.base.like(merged).dense().double() - W) * delta).sum().item()
            whole += delta.square().sum().item()
    return kept / whole if whole else 1.0


@torch.no_grad()
def plain(model: Transformer, force: bool = False) -> Transformer:
    """The same function without adapters: a model of its own, every weight of which can be trained.

    A model that has none is given back as it is. A base that is quantized is quantized again:
    UserError if less than half of what was learnt survives it, unless forced; and for a model with
    a prefix or a prompt, which no weights can stand for.
    """
    if model.before is not None:
        raise UserError("a prefix or a prompt cannot become part of the weights beside it")
    if not (found := adapted(model)):
        return model
    if (left := survival(model)) < 0.5 and not force:
        raise UserError(
            f"merged into its quantized base, {max(0, left):.0%} of what the adapter adds would be "
            "left: keep it beside the base, or force the merge"
        )
    model = copy.deepcopy(model)
    tables = {name: Parameter(getattr(model, name).detach()) for name in found if name in TABLES}
    if tables:  # torch's own way back would change the class, which the copy shares
        del model.parametrizations
        model.__class__ = type(model).__mro__[1]
        for name, W in tables.items():
            setattr(model, name, W)
    for name in found.keys() - tables.keys():
        linear = model.get_submodule(name)
        exchange(model, name, linear.base.like(linear.dense()))
    for p in model.parameters():
        p.requires_grad_(True)
    return model


def script() -> None:
    """The demonstrations use what stands on this file, and so stand in another."""
    start("tuning.py", *sys.argv[1:], told=False)


if __name__ == "__main__":
    main(script)
