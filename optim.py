"""How weights move: AdamW and Muon by hand, and the schedule of the learning rate.

Idea: AdamW divides each weight's smoothed gradient by its usual size, so that every weight moves at
about the learning rate. Muon does the same for a whole matrix: it replaces the smoothed gradient by
the nearest orthogonal matrix, so that every direction of the matrix moves alike; embeddings, norms
and biases, which are not maps from a space to a space, stay with AdamW.

Run: python -m pytest tests/test_optim.py

Papers: Kingma and Ba 2015, Adam (arXiv 1412.6980); Loshchilov and Hutter 2019, decoupled decay
(arXiv 1711.05101) and cosine schedule (arXiv 1608.03983); Jordan et al. 2024, Muon
(https://kellerjordan.github.io/posts/muon); Liu et al. 2025, Muon's scale (arXiv 2502.16982).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from kernels.adamw import Table, adamw_triton
from run import UserError

CHUNK = 1 << 16  # weights at a time on a CPU: all five arrays of an AdamW update stay in the cache
BELOW_1 = math.nextafter(1, 0)
RANGES = {  # of settings: beyond them weights are no numbers any more
    "lr": (0, 1e30), "weight_decay": (0, 1e3), "beta1": (0, BELOW_1), "beta2": (0, BELOW_1),
    "eps": (1e-30, 1.0), "clip": (0, 1e30), "warmup": (0, 1), "final": (0, 1),
}  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["muon", "adamw"] = "muon"  # which optimizer moves the matrices inside the blocks
    lr: float = 0.01  # highest learning rate; one for both optimizers, whose updates have one size
    weight_decay: float = 0.1  # decay of the matrices inside the blocks, per step and learning rate
    beta1: float = 0.9  # memory of the gradient
    beta2: float = 0.95  # memory of its square
    eps: float = 1e-10  # added to the root of the square
    clip: float = 1.0  # largest norm of all gradients together; 0: no clipping
    schedule: Literal["cosine", "linear", "constant"] = (
        "linear"  # from the highest rate to the last
    )
    warmup: float = 0.05  # share of the steps in which the rate rises from 0
    final: float = 0.0  # last learning rate, as a share of the highest

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                flag = f"--optim.{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {getattr(self, name)} must lie between {low:g} and {high:g}"
                )


# --- schedules ------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,  # Loshchilov and Hutter 2017, eq. 5
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (0 … steps − 1): up in a line, then down along the schedule.

    The first update has lr/warm, update warm − 1 has lr, and update `steps` would have final·lr.
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    x = (step - warm) / max(1, steps - warm)
    return config.lr * (config.final + (1 - config.final) * SCHEDULES[config.schedule](x))


# --- which weight is what -------------------------------------------------------------------------


def is_block_matrix(name: str, p: Tensor) -> bool:
    """A matrix that maps stream to stream: not an embedding, a position table or the head."""
    return p.dim() == 2 and name.startswith("layers.")


# --- AdamW ----------------------------------------------------------------------------------------


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float, c) -> None:
    """One update in place (Loshchilov and Hutter 2019, algorithm 2), t = 1, 2, …:

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − lr·(m̂ / (√v̂ + ε) + decay·p),
    with m̂ = m/(1−β₁ᵗ) and v̂ = v/(1−β₂ᵗ).
    """
    m.lerp_(g, 1 - c.beta1)
    v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
    root = v.sqrt().div_(math.sqrt(1 - c.beta2**t)).add_(c.eps)
    p.mul_(1 - lr * decay).addcdiv_(m, root, value=-lr / (1 - c.beta1**t))


class AdamW:
    """AdamW over named parameters; only matrices inside the blocks decay."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], config: OptimConfig):
        self.config, self.t = config, 0
        self.params = dict(named)
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.table = Table()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.t += 1
        c, params = self.config, list(self.params.values())
        decays = [c.weight_decay if is_block_matrix(n, p) else 0.0 for n, p in self.params.items()]
        if any(p.is_cuda for p in params):
            grads, ms, vs = [p.grad for p in params], [*self.m.values()], [*self.v.values()]
            adamw_triton(
                params, grads, ms, vs, self.t, lr, decays, c.beta1, c.beta2, c.eps, 1.0, self.table
            )
            return
        for (name, p), decay in zip(self.params.items(), decays, strict=True):
            arrays = [x.view(-1) for x in (p, p.grad, self.m[name], self.v[name])]
            size = CHUNK if p.device.type == "cpu" else p.numel()
            for chunk in zip(*(x.split(size) for x in arrays), strict=True):
                adamw(*chunk, self.t, lr, decay, self.config)

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, as named tensors."""
        arrays = {f"{kind}/{n}": x for kind in "mv" for n, x in getattr(self, kind).items()}
        return {"t": torch.tensor(self.t), **arrays}

    def load(self, state: dict[str, Tensor]) -> None:
        self.t = int(state["t"])
        for kind in "mv":
            for name, x in getattr(self, kind).items():
                x.copy_(state[f"{kind}/{name}"])


# --- Muon -----------------------------------------------------------------------------------------

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0 among those that keep values near 1
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # the root mean square of AdamW's updates, measured by Liu et al. 2025, section 2.2


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ for G = U S Vᵀ: X ← aX + b(XXᵀ)X + c(XXᵀ)²X pulls all singular values towards 1.

    G (… rows columns), whole stacks at once. After five steps the singular values of an ordinary
    gradient lie in about 0.7 … 1.2, which is as good as 1 for training (Jordan et al. 2024).
    """
    a, b, c = NEWTON_SCHULZ
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon:
    """Muon for the matrices inside the blocks, AdamW for the rest, under one learning rate.

    B ← μB + (1−μ)g;  p ← p − lr·(0.2·√max(rows, columns)·orthogonalize((1−μ)g + μB) + decay·p):
    the factor gives the update AdamW's size (Liu et al. 2025, eq. 4).
    Matrices of one shape are orthogonalized as one stack.
    """

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], config: OptimConfig, dtype: torch.dtype
    ):
        self.config, self.dtype = config, dtype  # dtype: of the products inside orthogonalize
        named = list(named)
        self.matrices = {n: p for n, p in named if is_block_matrix(n, p)}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.rest = AdamW([(n, p) for n, p in named if n not in self.matrices], config)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.rest.step(lr)

        def shape(name: str) -> tuple[int, ...]:
            return tuple(self.matrices[name].shape)

        for (rows, columns), names in groupby(sorted(self.matrices, key=shape), key=shape):
            names = list(names)
            G = torch.stack([self.matrices[n].grad for n in names])
            B = torch.stack([self.momentum[n] for n in names]).lerp_(G, 1 - MUON_MOMENTUM)
            update = orthogonalize(G.lerp_(B, MUON_MOMENTUM).to(self.dtype))
            scale = lr * MUON_RMS * max(rows, columns) ** 0.5
            for n, momentum, u in zip(names, B, update, strict=True):
                self.momentum[n].copy_(momentum)
                p = self.matrices[n]
                p.mul_(1 - lr * self.config.weight_decay).sub_(u, alpha=scale)

    def state(self) -> dict[str, Tensor]:
        return {**self.rest.state(), **{f"momentum/{n}": x for n, x in self.momentum.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        self.rest.load(state)
        for name, x in self.momentum.items():
            x.copy_(state[f"momentum/{name}"])


OPTIMIZERS = {"adamw": lambda named, config, dtype: AdamW(named, config), "muon": Muon}
