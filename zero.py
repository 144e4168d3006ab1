"""ZeRO: copies of a model that divide among them what each would hold as well as the others.

Idea: with data parallelism every rank holds the same optimizer state, gradients and weights. So let
each of N ranks hold of every weight only the i-th N-th of its numbers in a row, its shard, and what
is needed whole is gathered and dropped again (Rajbhandari et al. 2020, section 5):

    1   the optimizer knows shards only; behind its step the weights are gathered
    2   gradients, too: what a backward pass has made is summed into the shards and dropped
    3   weights, too: those of a block are gathered before the block, forward and backward

The sums are those of data parallelism in other portions, and elementwise optimizers do not care
where a number lives. Muon and Adafactor move whole matrices: these are put together from all who
hold a part of them, shards or the rows and columns of tensor parallelism, moved, and cut again.

Run: python -m pytest tests/test_zero.py

Papers: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054); Zhao et al. 2023, FSDP (arXiv 2304.11277).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import optim
from data_parallel import in_buckets
from mesh import Group, Plan
from model import Transformer
from optim import Adafactor, Muon, OptimConfig, Optimizer, learnt
from split import Place

# `part` is everywhere a Part of parallel.py: what one rank has of a Transformer.

# --- shards ---------------------------------------------------------------------------------------


def border(size: int, rank: int, ranks: int) -> int:
    """Where the shard of a rank begins."""
    return size * rank // ranks


class Unit:
    """Weights that travel together, and this rank's shards of them.

    On the way the shards of a rank lie one behind the other in a row, filled up to the length of
    the longest row.
    """

    def __init__(self, params: list[Parameter], shards: list[Parameter], group: Group):
        self.params, self.shards, self.group = params, shards, group
        self.moved = [(p, s) for p, s in zip(params, shards, strict=True) if p.requires_grad]
        self.frozen = len(self.moved) < len(params)
        self.ready = 0  # weights whose gradient the backward pass has finished
        self.bounds = bounds(params, group.size)
        self.moved_bounds = bounds([p for p, _ in self.moved], group.size)

    def gather(self) -> None:
        """Fill the weights with what all ranks hold of them."""
        row = torch.cat([s.detach() for s in self.shards])
        row = torch.nn.functional.pad(row, (0, longest(self.bounds) - len(row)))
        for p in self.params:
            p.untyped_storage().resize_(p.nbytes)
        for theirs, bounds in zip(self.group.gather(row[None]), self.bounds, strict=True):
            sizes = [hi - lo for lo, hi in bounds]
            pieces = theirs[: sum(sizes)].split(sizes)
            for p, piece, (lo, hi) in zip(self.params, pieces, bounds, strict=True):
                p.data.view(-1)[lo:hi] = piece

    def free(self) -> None:
        """Give the memory of the weights back; their shards stay."""
        for p in self.params:
            p.untyped_storage().resize_(0)

    def scatter(self) -> None:
        """Add to the gradient of each shard what all ranks have of it, and drop the gradients."""
        grads = [
            torch.zeros(p.numel(), dtype=p.dtype, device=p.device) if p.grad is None
            else p.grad.flatten() for p, _ in self.moved
        ]  # fmt: skip
        rows = grads[0].new_zeros(self.group.size, longest(self.moved_bounds))
        for row, bounds in zip(rows, self.moved_bounds, strict=True):
            own = torch.cat([g[lo:hi] for g, (lo, hi) in zip(grads, bounds, strict=True)])
            row[: len(own)] = own
        own, sizes = self.group.scatter(rows)[0], [len(s) for _, s in self.moved]
        for (p, s), g in zip(self.moved, own[: sum(sizes)].split(sizes), strict=True):
            p.grad = None
            s.grad = g.clone() if s.grad is None else s.grad + g


def bounds(params: list[Parameter], ranks: int) -> list[list[tuple[int, int]]]:
    """For each rank which numbers of each weight are its own."""
    return [
        [(border(p.numel(), r, ranks), border(p.numel(), r + 1, ranks)) for p in params]
        for r in range(ranks)
    ]


def longest(bounds: list[list[tuple[int, int]]]) -> int:
    return max(sum(hi - lo for lo, hi in row) for row in bounds)


class Shards:
    """What ZeRO makes of a part of a model."""

    def __init__(self, part: Transformer, stage: int, bucket: float):
        self.stage, group = stage, part.mesh.data
        params = part.parameters() if stage == 3 else part.in_order()
        self.of = {p: shard(p, group, own=stage == 3) for p in params}
        divided = blocks_and_root(part) if stage == 3 else in_buckets(list(self.of), bucket)
        self.units = [Unit(params, [self.of[p] for p in params], group) for params in divided]
        self.moving = [unit for unit in self.units if unit.moved]
        self.sent = 0  # units whose gradients have left in this backward pass
        if stage >= 2:
            for unit in self.moving:
                for p, _ in unit.moved:
                    p.register_post_accumulate_grad_hook(lambda _, unit=unit: self.ready(unit))
        if stage == 3:
            for i, (unit, block) in enumerate(zip(self.units, blocks_of(part), strict=False)):
                first = i in (0, len(part.layers))  # of the decoder, of the encoder
                follow(block, unit, None if first else self.units[i - 1])
            for unit in self.units:
                unit.free()

    def ready(self, unit: Unit) -> None:
        """A gradient of a unit is there: units leave when full, on every rank in the same order."""
        unit.ready += 1
        while self.sent < len(self.moving) and (
            self.moving[self.sent].ready == len(self.moving[self.sent].moved)
        ):
            self.send()

    def send(self) -> None:
        unit = self.moving[self.sent]
        unit.scatter()
        if self.stage == 3 and unit is not self.units[-1] and not unit.frozen:
            unit.free()
        self.sent += 1

    def end(self) -> None:
        """Behind a backward pass: send what no gradient has come for, free what is only frozen."""
        while self.stage >= 2 and self.sent < len(self.moving):
            self.send()
        for unit in self.units[:-1] if self.stage == 3 else ():
            if unit.frozen:
                unit.free()
        self.sent = 0
        for unit in self.units:
            unit.ready = 0

    def before_step(self) -> None:
        """Show the optimizer the gradients of the shards."""
        for p, s in self.of.items() if self.stage == 1 else ():
            s.grad = p.grad.view(-1)[s.place.first : s.place.last]

    def after_step(self) -> None:
        """Let all have the weights again that all hold."""
        for unit in self.units if self.stage < 3 else ():
            unit.gather()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, what lies outside the blocks is there."""
        if self.stage == 3:
            self.units[-1].gather()
        yield
        if self.stage == 3:
            self.units[-1].free()


def shard(p: Parameter, group: Group, own: bool) -> Parameter:
    """Its numbers first … last−1 in a row, as a view, or in memory of their own."""
    first, last = (border(p.numel(), group.index + i, group.size) for i in (0, 1))
    piece = p.data.view(-1)[first:last]
    made = Parameter(piece.clone() if own else piece, p.requires_grad)
    made.place = p.place._replace(first=first, last=last)
    return made


def blocks_of(part: Transformer) -> list[nn.Module]:
    """In the order in which the backward pass comes to them."""
    encoder = [] if part.encoder is None else list(part.encoder.layers)
    return [*reversed(part.layers), *reversed(encoder)]


def blocks_and_root(part: Transformer) -> list[list[Parameter]]:
    """The weights of each block, and last those of no block.

    A decoder's look at an encoder computes keys before the block begins: that part belongs to none.
    """
    inside = [
        [p for name, p in block.named_parameters() if not name.startswith("cross.")]
        for block in blocks_of(part)
    ]
    taken = {p for params in inside for p in params}
    return [*inside, [p for p in part.parameters() if p not in taken]]


def follow(block: nn.Module, unit: Unit, last: Unit | None) -> None:
    """Gather a block's weights before it computes, forward or backward, and free them behind.

    Backward, trained weights are done with when their gradients are there, but frozen ones only
    when the gradient has come through: then those of the block that was the last to compute go.
    """

    def back(gradient: Tensor) -> None:
        if last is not None and last.frozen:
            last.free()
        unit.gather()

    def behind(module: nn.Module, inputs: tuple, output: tuple) -> None:
        if output[0].requires_grad:
            output[0].register_hook(back)
        unit.free()

    block.register_forward_pre_hook(lambda module, inputs: unit.gather())
    block.register_forward_hook(behind)


# --- optimizers -----------------------------------------------------------------------------------


def build(
    part: Transformer, config: OptimConfig, dtype: torch.dtype | None, plan: Plan
) -> Optimizer:
    """The optimizer of what this rank holds; afterwards `part.shards` is what ZeRO made of it."""
    optimizer = optim.build(part.named(), config, dtype)
    part.shards = Shards(part, plan.zero, plan.bucket * 10**6) if plan.zero else None
    for group in optimizer.param_groups if part.shards else ():
        whole, group["params"] = group["params"], [part.shards.of[p] for p in group["params"]]
        for p, s in zip(whole, group["params"], strict=True):
            optimizer.state[s] = {kind: torch.zeros_like(s) for kind in optimizer.state.pop(p)}
    if isinstance(optimizer, Muon | Adafactor) and (plan.exact or plan.size > 1):
        by_whole_weights(part, optimizer, plan.exact)
    return optimizer


def by_whole_weights(part: Transformer, optimizer: Optimizer, exact: bool) -> None:
    """Let an optimizer that looks at whole matrices see them, one by one.

    Adafactor's means of rows and columns, which are small, are kept whole.
    """
    move, adafactor = optimizer.move, isinstance(optimizer, Adafactor)

    def whole(params: list[Parameter], group: dict[str, Any]) -> None:
        if not adafactor and not group["inside"]:
            return move(params, group)
        divided = [p for p in params if exact or is_divided(p)]
        if together := [p for p in params if not exact and not is_divided(p)]:
            move(together, group)
        for some in by_weight(divided):
            move_whole(part, optimizer, move, some, group)

    optimizer.move = whole
    for group in optimizer.param_groups if adafactor else ():
        for first, *others in by_weight([p for p in group["params"] if is_divided(p)]):
            like = torch.zeros(first.place.shape, dtype=first.dtype, device=first.device)
            optimizer.state[first] = optimizer.fresh(like, group)
            for p in others:
                optimizer.state[p] = {}


def is_divided(p: Parameter) -> bool:
    return p.place.hi >= 0 or p.place.last >= 0


def by_weight(params: list[Parameter]) -> list[list[Parameter]]:
    """Those of one weight of the plain model together, tied copies of it, too."""
    found: dict[str, list[Parameter]] = {}
    for p in params:
        found.setdefault(p.place.name, []).append(p)
    return list(found.values())


def move_whole(
    part: Transformer, optimizer: Optimizer, move, params: list[Parameter], group: dict[str, Any]
) -> None:
    """Move one weight of the plain model, of which `params` are this rank's parts."""
    state, adafactor = optimizer.state, isinstance(optimizer, Adafactor)
    W = Parameter(assembled(part, params, [p.detach() for p in params]))
    W.grad = assembled(part, params, [p.grad for p in params])
    state[W] = state[params[0]] if adafactor else {
        kind: assembled(part, params, [state[p][kind] for p in params]) for kind in state[params[0]]
    }  # fmt: skip
    move([W], group)
    for p in params:
        p.copy_(p.place.read(W))
        for kind, x in () if adafactor else state[p].items():
            x.copy_(p.place.read(state[W][kind]))
    del state[W]


def assembled(part: Transformer, params: list[Parameter], own: list[Tensor]) -> Tensor:
    """A tensor of the plain model's shape, from those who hold a part each: all others say 0."""
    place: Place = params[0].place
    whole = torch.zeros(place.shape, dtype=own[0].dtype, device=own[0].device)
    for p, x in zip(params, own, strict=True):
        p.place.write(whole, x)
    bits = whole.view(torch.uint8)
    if place.hi >= 0:
        part.mesh.tensor.sum_(bits)
    if place.last >= 0:
        part.mesh.data.sum_(bits)
    return whole


def holders(part: Transformer) -> list[Parameter]:
    """Of each weight that is trained what has its gradient: itself, or the shard that took it."""
    shards = part.shards
    params = learnt(part).values()
    return [shards.of[p] if shards and shards.stage > 1 else p for p in params]


def held(part: Transformer, optimizer: Optimizer) -> Iterator[tuple[str, Place, Tensor]]:
    """What this rank holds: "weight" or the kind of an optimizer's tensor, its place, its numbers.

    Of all ranks that hold a number, one's place is `here`.
    """
    shards, first = part.shards, part.mesh.data.index == 0
    for p in part.parameters():
        s = shards.of.get(p, p) if shards else p
        weight = s if shards and shards.stage == 3 else p
        for kind, x in (("weight", weight.data), *optimizer.state.get(s, {}).items()):
            place = (weight if kind == "weight" else s).place
            if kind != "weight" and isinstance(optimizer, Adafactor):
                lead = place.here and place.part == 0
                place = Place(place.name, tuple(x.shape), here=lead)
            yield kind, place._replace(here=place.here and (first or place.last >= 0)), x
