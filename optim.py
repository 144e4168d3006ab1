"""How weights move: five optimizers by hand, and what follows a schedule: learning rate and batch.

Idea: SGD walks down the smoothed gradient. Adam divides it, weight by weight, by its usual size, so
that every weight moves at about the learning rate. Adafactor keeps of those sizes only the means of
a matrix's rows and columns, and so needs next to no memory. Muon does for a whole matrix what Adam
does for a weight: it replaces the smoothed gradient by the nearest orthogonal matrix, so that every
direction moves alike; embeddings, norms and biases, which are not maps from a space to a space,
stay with AdamW.

Each is a torch.optim.Optimizer: parameters or groups of them in, `step()` after `backward()`.

Run: python optim.py                      the schedules drawn; memory and time of each optimizer

Papers: Sutskever et al. 2013, momentum; Kingma and Ba 2015, Adam (arXiv 1412.6980); Loshchilov and
Hutter 2019, decoupled decay (arXiv 1711.05101) and 2017, cosine (arXiv 1608.03983); Shazeer and
Stern 2018, Adafactor (arXiv 1804.04235); Jordan et al. 2024, Muon
(https://kellerjordan.github.io/posts/muon); Liu et al. 2025, Muon's scale (arXiv 2502.16982);
Vaswani et al. 2017, inverse square root (arXiv 1706.03762); Hu et al. 2024, warm-up, stable, decay
(arXiv 2404.06395); Brown et al. 2020, GPT-3's growing batch (arXiv 2005.14165, appendix B).
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.adamw import Table, adamw_triton
from pictures import picture, table
from run import RUNS, UserError, main

CHUNK = 1 << 16  # weights at a time on a CPU: all five arrays of an AdamW update stay in the cache
BELOW_1 = math.nextafter(1, 0)
RANGES = {  # of settings: beyond them weights are no numbers any more
    "lr": (0, 1e30), "weight_decay": (0, 1e3), "beta1": (0, BELOW_1), "beta2": (0, BELOW_1),
    "eps": (1e-30, 1.0), "clip": (0, 1e30), "warmup": (0, BELOW_1), "decay": (0, 1),
    "final": (0, 1),
}  # fmt: skip
KINDS = ("muon", "adamw", "adam", "adafactor", "sgd")  # what `build` makes
TABLES = ("embedding", "segment", "position.table", "relative.table")  # whose rows are looked up


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    # what moves the matrices inside the blocks; muon leaves the rest to adamw
    name: Literal[KINDS] = "muon"
    lr: float = 0.01  # highest learning rate; sgd wants 0.1: its updates are as large as gradients
    weight_decay: float = 0.1  # decay of the matrices inside the blocks, per step and learning rate
    beta1: float = 0.9  # memory of the gradient
    beta2: float = 0.95  # memory of its square
    eps: float = 1e-10  # added to the root of the square
    clip: float = 1.0  # largest gradient; 0: no clipping
    clip_by: Literal["norm", "value"] = "norm"  # of all gradients together, or of each number
    # from the highest rate to the last; wsd: warm-up, stable, decay
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "linear"
    warmup: float = 0.05  # share of the steps in which the rate rises from 0
    decay: float = 0.2  # wsd: share of the steps in which it falls
    final: float = 0.0  # last learning rate, as a share of the highest

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                flag = f"--optim.{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {getattr(self, name)} must lie between {low:g} and {high:g}"
                )
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise UserError(
                "--optim.schedule inverse_sqrt falls from its --optim.warmup on: give one"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise UserError(
                f"--optim.warmup {self.warmup} and --optim.decay {self.decay} are more than the "
                "whole schedule together"
            )


# --- schedules ------------------------------------------------------------------------------------

# What share of the highest rate is left when a share x of the time after the warm-up is over.
SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "cosine": lambda x, c: (1 + math.cos(math.pi * x)) / 2,  # Loshchilov and Hutter 2017, eq. 5
    "linear": lambda x, c: 1 - x,
    "constant": lambda x, c: 1.0,
    # √(warm/step), Vaswani et al. 2017, eq. 3
    "inverse_sqrt": lambda x, c: math.sqrt(c.warmup / (c.warmup + x * (1 - c.warmup))),
    # 1 until the last c.decay of all steps, Hu et al. 2024, eq. 1
    "wsd": lambda x, c: min(1.0, (1 - x) * (1 - c.warmup) / max(c.decay, 1e-30)),
}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (0 … steps − 1): up in a line, then down along the schedule.

    The first update has lr/warm, update warm − 1 has lr, and one with number `steps` would have
    final·lr, if the schedule goes down to 0.
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    x = (step - warm) / max(1, steps - warm)
    share = SCHEDULES[config.schedule](x, config)
    return config.lr * (config.final + (1 - config.final) * share)


@dataclass(frozen=True)
class Ramp:
    """A batch that grows in a line over the first rows of a run (Brown et al. 2020, appendix B).

    An update that begins when `seen` rows are behind it has
    min(full, first + ⌊(full − first)·seen/over⌋) rows. Few rows are enough in the beginning, where
    all gradients agree, and each update with fewer is sooner done.
    """

    full: int  # rows of an update in the end
    first: int  # of the first update
    over: int  # rows in which it grows

    def rows(self, step: int) -> int:
        """Of update number `step`."""
        return self.at(self.seen(step))

    def seen(self, step: int) -> int:
        """Rows of all updates before it."""
        known = begun(self)
        while len(known) <= step and self.at(known[-1]) < self.full:
            known.append(known[-1] + self.at(known[-1]))
        last = min(step, len(known) - 1)
        return known[last] + (step - last) * self.full

    def at(self, seen: int) -> int:
        """Of an update that begins when so many rows are behind it."""
        grown = (self.full - self.first) * seen // self.over if self.over else self.full
        return min(self.full, self.first + grown)


@cache
def begun(ramp: Ramp) -> list[int]:
    """The rows before each update of a ramp, as far as they were asked for."""
    return [0]


# --- what all optimizers have in common -----------------------------------------------------------


class Optimizer(torch.optim.Optimizer):
    """Named groups of weights, a count t of the steps of each, and a few tensors for each weight.

    A kind of optimizer says what a weight's tensors are at first, and moves the weights of a group.
    """

    def fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Step number group["t"] = 1, 2, … of weights that all have a gradient."""
        raise NotImplementedError

    def add_param_group(self, group: dict[str, Any]) -> None:
        super().add_param_group({"t": 0, **group})
        group = self.param_groups[-1]
        for p in group["params"]:
            self.state[p] = self.fresh(p, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["t"] += 1
            if params := [p for p in group["params"] if p.grad is not None]:
                self.move(params, group)
        return loss

    def held(self, params: list[Tensor], kind: str) -> list[Tensor]:
        """One of the tensors of each of these weights."""
        return [self.state[p][kind] for p in params]

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by name: t/0, t/1, … and m/<weight>, v/<weight>, …"""
        found = {f"t/{i}": torch.tensor(g["t"]) for i, g in enumerate(self.param_groups)}
        for group in self.param_groups:
            names = group.get("param_names") or range(len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                found |= {f"{kind}/{name}": x for kind, x in self.state[p].items()}
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        for i, group in enumerate(self.param_groups):
            group["t"] = int(tensors[f"t/{i}"])


def learnt(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that training moves, by name: all that are not frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def is_block_matrix(name: str, p: Tensor) -> bool:
    """A matrix that maps stream to stream: not an embedding, a position table or the head."""
    return p.dim() == 2 and "layers." in name and not name.endswith(TABLES)


def build(
    named: Iterable[tuple[str, Tensor]], config: OptimConfig, dtype: torch.dtype | None = None
) -> Optimizer:
    """The optimizer of a model's named parameters, but for frozen ones.

    Only matrices inside the blocks decay. dtype: of the products inside Muon, default fp32.
    """
    c, named = config, [(n, p) for n, p in named if p.requires_grad]
    groups = [
        {"params": params, "weight_decay": c.weight_decay if inside else 0.0, "inside": inside}
        for inside in (True, False)
        if (params := [(n, p) for n, p in named if is_block_matrix(n, p) == inside])
    ] or [{"params": [], "inside": False}]  # a stage of a pipeline may be empty
    adam = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps}
    match c.name:
        case "sgd":
            return SGD(groups, c.lr, c.beta1)
        case "adam":
            return Adam(groups, **adam)
        case "adamw":
            return AdamW(groups, **adam)
        case "adafactor":
            return Adafactor(groups, c.lr)
    return Muon(groups, **adam, dtype=dtype or torch.float32)


# --- SGD ------------------------------------------------------------------------------------------


class SGD(Optimizer):
    """Momentum, and the decay as a part of the gradient, as torch has it:

    m ← μm + g + decay·p,  p ← p − lr·m.
    """

    def __init__(
        self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p)} if group["momentum"] else {}

    def move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        g = [p.grad for p in params]
        if group["weight_decay"]:
            g = torch._foreach_add(g, params, alpha=group["weight_decay"])
        if group["momentum"]:
            m = self.held(params, "m")
            torch._foreach_mul_(m, group["momentum"])
            torch._foreach_add_(m, g)
            g = m
        torch._foreach_add_(params, g, alpha=-group["lr"])


# --- Adam -----------------------------------------------------------------------------------------


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One update in place (Loshchilov and Hutter 2019, algorithm 2), t = 1, 2, …:

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − lr·(m̂ / (√v̂ + ε) + decay·p),
    with m̂ = m/(1−β₁ᵗ) and v̂ = v/(1−β₂ᵗ).
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
    p.mul_(1 - lr * decay).addcdiv_(m, root, value=-lr / (1 - beta1**t))


class AdamW(Optimizer):
    """Each weight moves by its mean gradient over the root of its mean square, and decays."""

    decoupled = True

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10, weight_decay: float = 0.1, **more: Any,
    ):  # fmt: skip
        self.table = Table()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | more)

    def fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """On CUDA the groups that differ only in their decay move together, in one launch."""
        self.waiting: dict[tuple, tuple[list, ...]] = {}
        loss = super().step(closure)
        for (t, lr, *rest), (*arrays, decays) in self.waiting.items():
            adamw_triton(*arrays, t, lr, decays, *rest, 1.0, self.table)
        return loss

    def move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        t, lr, decay, betas, eps = (group[k] for k in ("t", "lr", "weight_decay", "betas", "eps"))
        g, m, v = [p.grad for p in params], self.held(params, "m"), self.held(params, "v")
        if decay and not self.decoupled:
            g, decay = torch._foreach_add(g, params, alpha=decay), 0.0
        if all(p.is_cuda and p.dtype == torch.float32 for p in params):
            lists = self.waiting.setdefault((t, lr, *betas, eps), ([], [], [], [], []))
            for known, more in zip(lists, (params, g, m, v, [decay] * len(params)), strict=True):
                known.extend(more)
            return
        for arrays in zip(params, g, m, v, strict=True):
            if arrays[0].device.type == "cpu" and all(x.is_contiguous() for x in arrays):
                chunks = zip(*(x.view(-1).split(CHUNK) for x in arrays), strict=True)
            else:
                chunks = [arrays]
            for chunk in chunks:
                adamw(*chunk, t, lr, decay, betas, eps)


class Adam(AdamW):
    """As AdamW, but the decay is a part of the gradient, and so is divided with it."""

    decoupled = False


# --- Adafactor ------------------------------------------------------------------------------------

EPS1, EPS2 = 1e-30, 1e-3  # added to the square; least size that a weight is held for
THRESHOLD = 1.0  # of the update's root mean square
FORGET = 0.8  # β₂ of step t is 1 − t⁻ᶠ


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def adafactor(p: Tensor, g: Tensor, v: dict[str, Tensor], t: int, lr: float, decay: float) -> None:
    """One update in place (Shazeer and Stern 2018, algorithms 4 and 5), t = 1, 2, …:

    V̂ = R Cᵀ/mean(R) with R, C the running means over columns and rows of g² + ε₁,
    U = g/√V̂,  p ← p − α·(U / max(1, RMS(U)/d) + decay·p)  with α = lr·max(ε₂, RMS(p)).

    If V is of rank one, V̂ is V itself. Vectors keep all of V. (… R C): stacks of matrices.
    """
    beta2 = 1 - t**-FORGET
    square = g.square().add_(EPS1)
    if "v" in v:
        U = g / v["v"].lerp_(square, 1 - beta2).sqrt()
    else:
        R = v["rows"].lerp_(square.mean(-1, keepdim=True), 1 - beta2)
        C = v["columns"].lerp_(square.mean(-2, keepdim=True), 1 - beta2)
        U = g * (R / R.mean(-2, keepdim=True)).rsqrt() * C.rsqrt()
    step = lr * rms(p).clamp(min=EPS2)
    p.mul_(1 - step * decay).sub_(U.mul_(step / (rms(U) / THRESHOLD).clamp(min=1)))


class Adafactor(Optimizer):
    """Adam without a mean of the gradient, and of its squares only the means of rows and columns.

    Steps are relative to the size of what they move. The paper's rate of step t is
    min(10⁻², 1/√t): our default lr under `inverse_sqrt`.
    """

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if p.dim() < 2:
            return {"v": torch.zeros_like(p)}
        *stack, rows, columns = p.shape
        return {"rows": p.new_zeros(*stack, rows, 1), "columns": p.new_zeros(*stack, 1, columns)}

    def move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            adafactor(p, p.grad, self.state[p], group["t"], group["lr"], group["weight_decay"])


# --- Muon -----------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0 among those that keep values near 1
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # the root mean square of AdamW's updates, measured by Liu et al. 2025, section 2.2


def orthogonalize(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """About U Vᵀ for G = U S Vᵀ: X ← aX + b(XXᵀ)X + c(XXᵀ)²X pulls all singular values towards 1.

    G (… rows columns), whole stacks at once. After five steps the singular values of an ordinary
    gradient lie in about 0.7 … 1.2, which is as good as 1 for training (Jordan et al. 2024). The
    products are in `dtype`; the norm is not, since fp16 has no number as small as a gradient's.
    """
    a, b, c = NEWTON_SCHULZ
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = (X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-12)).to(dtype or G.dtype)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(AdamW):
    """Groups that are `inside` move as matrices, the others by AdamW, under one learning rate.

    B ← μB + (1−μ)g;  p ← p − lr·(0.2·√max(rows, columns)·orthogonalize((1−μ)g + μB) + decay·p):
    the factor gives the update AdamW's size (Liu et al. 2025, eq. 4).
    Matrices of one shape are orthogonalized as one stack.
    """

    def __init__(self, params: Any, *options: Any, dtype: torch.dtype = torch.float32, **more: Any):
        self.dtype = dtype  # of the products inside orthogonalize
        super().__init__(params, *options, inside=True, **more)

    def fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not group["inside"]:
            return super().fresh(p, group)
        if p.dim() != 2:
            raise ValueError(f"Muon moves matrices, not a weight of shape {tuple(p.shape)}")
        return {"momentum": torch.zeros_like(p)}

    def move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not group["inside"]:
            return super().move(params, group)
        keep = 1 - group["lr"] * group["weight_decay"]
        for shape, alike in groupby(sorted(params, key=lambda p: p.shape), key=lambda p: p.shape):
            alike = list(alike)
            G = torch.stack([p.grad for p in alike])
            B = torch.stack(self.held(alike, "momentum")).lerp_(G, 1 - MUON_MOMENTUM)
            update = orthogonalize(G.lerp_(B, MUON_MOMENTUM), dtype=self.dtype)
            scale = group["lr"] * MUON_RMS * max(shape) ** 0.5
            torch._foreach_copy_(self.held(alike, "momentum"), list(B))
            torch._foreach_mul_(alike, keep)
            for p, u in zip(alike, update, strict=True):
                p.sub_(u, alpha=scale)


# --- the script -----------------------------------------------------------------------------------


def costs(name: str, width: int = 512, blocks: int = 4, rounds: int = 5) -> tuple[float, float]:
    """(bytes of state per weight, seconds per step and million weights) in blocks as GPT-2's."""
    sizes = {"attention.in": (3, 1), "attention.out": (1, 1), "up": (4, 1), "down": (1, 4)}
    named = [(f"layers.{i}.{kind}", torch.randn(rows * width, columns * width))
             for i in range(blocks) for kind, (rows, columns) in sizes.items()]  # fmt: skip
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer, N = build(named, OptimConfig(name)), sum(p.numel() for _, p in named)
    state = sum(x.nbytes for n, x in optimizer.tensors().items() if not n.startswith("t/"))
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        optimizer.step()
        best = min(best, time.perf_counter() - start)
    return state / N, best / N * 1e6


def script() -> None:
    """Draw the schedules; print what each optimizer costs."""
    steps, config = 1000, OptimConfig(lr=1.0, warmup=0.1, decay=0.3, final=0.1)
    with picture(path := RUNS / "schedules.png", 2, (11, 4.5)) as (rates, batch):
        for name in SCHEDULES:
            own = replace(config, schedule=name)
            rates.plot([learning_rate(own, step, steps) for step in range(steps)], label=name)
        rates.set(xlabel="step", title="learning rate, as a share of the highest")
        rates.legend(frameon=False)
        ramp = Ramp(full=512, first=16, over=128 * steps)
        batch.plot([ramp.rows(step) for step in range(steps)], color="#c8442d")
        batch.set(xlabel="step", title="rows of an update that grows from 16 to 512")
    lines = [("", "bytes of state per weight", "milliseconds per 10⁶ weights")]
    for name in KINDS:
        size, seconds = costs(name)
        lines.append((name, f"{size:.3f}", f"{1e3 * seconds:.2f}"))
    print(f"{table(*lines)}\n\npicture: {path}")


if __name__ == "__main__":
    main(script)
