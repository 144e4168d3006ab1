"""From plain linears to quantized ones, layer after layer, by what calibration texts show them.

Idea: `quantize` goes through the linears in the order in which they compute. The inputs of each
come from the texts through all that is quantized already, so that a later layer can mend what an
earlier one does (true-sequential); then its weights become codes, and the next is looked at. Only
one layer's Hessian is in memory at a time, since the texts go through the model once for each, as
far as that layer. Embedding, norms and head stay as they are.

    int8       x and W in bytes, by the largest magnitude of each row (W8A8)
    zero-point the same, where a row of x has a zero point of its own
    llm-int8   as int8, but features whose inputs reach 6.0 in the calibration stay in 16 bits
    rtn        each weight to the nearest code, of 2 to 8 bits
    nf4        the same, to the 16 levels of QLoRA
    gptq, obq  errors of one weight are mended by the others of its row (gptq.py)

To add a method: a function of a linear, its inputs and the settings, an entry in METHODS, and its
name in READ_BY beside the settings that it looks at.

Run: python -m pytest tests/test_quant.py

Papers: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339); Frantar et al. 2022, GPTQ (arXiv
2210.17323) and Optimal Brain Compression (arXiv 2208.11580); Dettmers et al. 2023, QLoRA (arXiv
2305.14314).

Letters: N output features · K input features of a linear.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention import Linear
from gptq import Hessian, Rounded, gptq, loss, obq, round_to_nearest
from lora import LoraLinear, exchange, linears
from model import Transformer
from objectives import Batch
from quantized import Int8, Int8Linear, Packed, PackedLinear, Quantized, quantized
from run import UserError
from step import loss_sum

# --- settings -------------------------------------------------------------------------------------


READ_BY = {  # each setting, and the methods that look at it
    "bits": ("rtn", "gptq", "obq"), "group": ("rtn", "nf4", "gptq", "obq"),
    "symmetric": ("rtn", "gptq", "obq"), "act_order": ("gptq",), "dynamic": ("llm-int8",),
    "damping": ("gptq", "obq"),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How the weights of a model become a few bits."""

    # int8, zero-point, llm-int8: bytes; rtn, nf4: nearest codes; gptq, obq: errors are mended
    method: Literal["int8", "zero-point", "llm-int8", "rtn", "nf4", "gptq", "obq"] = "gptq"
    bits: int = 4  # of a weight: rtn, gptq, obq
    group: int = 64  # rtn, nf4, gptq, obq: weights of a row that share a step; 0: a whole row
    symmetric: bool = False  # rtn, gptq, obq: as many steps below 0 as above, no zero point
    act_order: bool = False  # gptq: features with the largest inputs first
    dynamic: bool = False  # llm-int8: outliers are chosen for each batch, not by the calibration
    damping: float = 0.01  # gptq, obq: of H's mean diagonal, added to it

    def __post_init__(self):
        Packed(self.bits, self.group)  # says what is wrong
        if not 0 <= self.damping <= 1:
            raise UserError(f"--damping {self.damping} must be from 0 to 1")
        for name, methods in READ_BY.items():
            if self.method not in methods and getattr(self, name) != getattr(Method, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"--method {self.method} has no {flag}: leave it out")

    def packed(self, K: int) -> Packed:
        """With a group that divides K: the one asked for, or the largest above half of it."""
        group = min(self.group, K)
        if group and K % group:
            fitting = [g for g in range(group // 2 + 1, group) if K % g == 0]
            if not fitting:
                raise UserError(
                    f"groups of {group} do not divide its {K} input features, nor does a number "
                    f"down to {group // 2 + 1}: choose one that does, or 0, a whole row"
                )
            group = fitting[-1]
        if self.method == "nf4":
            return Packed(4, group, levels="normal")
        return Packed(self.bits, group, self.symmetric)


# --- one layer ------------------------------------------------------------------------------------


class Inputs:
    """What the calibration has shown to a linear of K input features."""

    def __init__(self, K: int, device: torch.device):
        self.hessian = Hessian(K, device)
        self.largest = torch.zeros(K, device=device)

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        self.hessian.add(rows)
        self.largest = self.largest.maximum(rows.abs().amax(0).float())


def in_bytes(linear: Linear, seen: Inputs | None, how: Method) -> Int8Linear:
    """A feature is an outlier if an input of the calibration reaches the threshold."""
    plain = how.method != "llm-int8"
    kind = Int8(0.0, zero_point=how.method == "zero-point") if plain else Int8(dynamic=how.dynamic)
    columns = None if seen is None else (seen.largest >= kind.threshold).nonzero()[:, 0]
    return Int8Linear.of(linear.dense().float(), linear.bias, kind, columns)


def to_nearest(linear: Linear, seen: Inputs | None, how: Method) -> PackedLinear:
    return PackedLinear.of(linear.dense().float(), linear.bias, how.packed(linear.shape[1]))


def by_hessian(
    solve: Callable[..., Rounded], linear: Linear, seen: Inputs, how: Method
) -> PackedLinear:
    kind = how.packed(linear.shape[1])
    found = solve(linear.dense(), seen.hessian.value(), kind.grid, damp=how.damping)
    return PackedLinear.holding(found.codes, found.grid, linear.bias, kind)


def by_gptq(linear: Linear, seen: Inputs, how: Method) -> PackedLinear:
    return by_hessian(partial(gptq, order="act" if how.act_order else "plain"), linear, seen, how)


METHODS = {
    "int8": in_bytes, "zero-point": in_bytes, "llm-int8": in_bytes, "rtn": to_nearest,
    "nf4": to_nearest, "gptq": by_gptq, "obq": partial(by_hessian, obq),
}  # fmt: skip
CALIBRATED = ("llm-int8", "gptq", "obq")  # of these the inputs are looked at


# --- a model --------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer's error in shares of |W x|²; where x is rounded, too, that of W alone."""

    name: str
    error: float  # |(W − Ŵ) x|²
    nearest: float  # the same if each weight were rounded to the nearest code


class Enough(Exception):
    """The layer that was asked for has seen its inputs."""


def run_hooked(model: Transformer, names: Sequence[str], batches: Sequence[Batch], look) -> None:
    """The batches through the model, while look(name, x) is shown what goes into these linears.

    It ends a batch by raising Enough.
    """
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: look(name, *inputs)
        )
        for name in names
    ]
    try:
        for batch in batches:
            with suppress(Enough):
                loss_sum(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def in_order(model: Transformer, batch: Batch) -> list[list[str]]:
    """The linears as they compute; together those behind each other that read the same tensor."""
    found: list[list[str]] = []
    last: list[Tensor] = []

    def look(name: str, x: Tensor) -> None:
        if last and last[-1] is x:
            found[-1].append(name)
        else:
            found.append([name])
        last[:] = [x]

    run_hooked(model, list(linears(model)), [batch], look)
    return found


def inputs_of(model: Transformer, name: str, batches: Sequence[Batch]) -> Inputs:
    linear = model.get_submodule(name)
    seen = Inputs(linear.shape[1], model.embedding.device)

    def look(_, x: Tensor) -> None:
        seen.add(x)
        raise Enough

    run_hooked(model, [name], batches, look)
    return seen


def check(model: nn.Module, how: Method, batches: Sequence[Batch]) -> None:
    """UserError if a model cannot be quantized, or not with these texts."""
    if quantized(model):
        raise UserError("the model is quantized already: take the one that it was made of")
    for name, linear in linears(model).items():
        if isinstance(linear, LoraLinear):
            raise UserError(f"{name} has adapters: make one matrix of them first, by lora.plain")
        if type(linear) is not Linear:
            raise UserError(f"{name} is a {type(linear).__name__}, which nobody here can quantize")
    if how.method not in CALIBRATED or (how.method == "llm-int8" and how.dynamic):
        return
    widest = max(linear.shape[1] for linear in linears(model).values())
    tokens = sum(batch.inputs.numel() for batch in batches)
    if tokens < widest:
        raise UserError(
            f"the calibration has {tokens:,} tokens, and a layer {widest:,} input features: give "
            "at least as many tokens"
        )


@torch.no_grad()
def quantize(model: Transformer, how: Method, batches: Sequence[Batch] = ()) -> list[Layer]:
    """Put quantized linears in the place of all plain ones; what it cost each, if that is known.

    batches: texts of the calibration, needed by llm-int8, gptq and obq; their padding counts, too.
    UserError if the model has adapters or is quantized already, or where a layer does not fit.
    """
    check(model, how, batches)
    found, groups = [], [[name] for name in linears(model)]
    if batches:
        groups = in_order(model, batches[0])
    for names in tqdm(groups, "layers", leave=False, disable=None):
        seen = inputs_of(model, names[0], batches) if batches else None
        for name in names:
            old = model.get_submodule(name)
            try:
                new = METHODS[how.method](old, seen, how)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            if seen is not None:
                found.append(Layer(name, *errors(old.dense(), new, seen)))
            exchange(model, name, new)
    return found


def errors(W: Tensor, new: Quantized, seen: Inputs) -> tuple[float, float]:
    """Of Layer: |(W − Ŵ) x|² and that of the nearest codes, in |W x|²."""
    H, W = seen.hessian.value(), W.double()
    whole = loss(W, H).sum()
    own = (loss(W - new.dense().double(), H).sum() / whole).item()
    if isinstance(new, Int8Linear):
        return own, own
    return own, (round_to_nearest(W, H, new.how.grid).losses.sum() / whole).item()
