"""Tensor parallelism: one layer's matrices cut among ranks that compute it together.

Idea: of y = W₂ f(W₁ x), W₁ is cut by rows and W₂ by columns: every part computes its own f without
a word to the others, and the parts' results only have to be added. Attention is cut by heads,
feed-forward by hidden units, embedding and head by tokens of the vocabulary. Two functions stand
at the ends of such a piece (Shoeybi et al. 2019, figure 3):

    f   x goes to every part;          backward: the parts' gradients are added
    g   the parts' results are added;  backward: the gradient goes to every part

A rank may hold several parts. Then sums over parts and ranks form one binary tree, and since each
part's products have the same shapes wherever it lives, so do all bits: that is exact mode.

With sequence parallelism the stream between f and g is cut, too, by tokens: f gathers it and g
leaves each rank its own tokens of the sum (Korthikanti et al. 2022, figure 5).

Run: python -m pytest tests/test_parallel.py

Papers: Shoeybi et al. 2019, Megatron (arXiv 1909.08053); Korthikanti et al. 2022 (arXiv
2205.05198).

Letters: B batch · T tokens · C model width · H heads · V vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from attention import Attention, KeyValue, Linear, Mask
from kernels.cross_entropy import IGNORE, wide
from mesh import Group, tree
from model import Block, FeedForward

# --- which part of which matrix -------------------------------------------------------------------


class Place(NamedTuple):
    """What of a plain model's weight a parameter here is: rows lo … hi−1 of dimension `dim`."""

    name: str
    shape: tuple[int, ...]  # of the whole weight
    dim: int = 0
    lo: int = 0
    hi: int = -1  # −1: all of it
    part: int = 0  # the number of this part among all
    several: int = 1  # so many parts side by side
    here: bool = True  # is it this rank that counts and saves it, of all that hold a copy?
    first: int = 0  # ZeRO: of its numbers in a row, first … last−1
    last: int = -1  # −1: all of them

    def of(self, whole: Tensor) -> Tensor:
        """The part of the whole weight, or of what an optimizer keeps for it; not yet the shard."""
        return whole if self.hi < 0 else whole.narrow(self.dim, self.lo, self.hi - self.lo)

    def read(self, whole: Tensor) -> Tensor:
        """What this rank holds of it."""
        part = self.of(whole)
        return part if self.last < 0 else part.flatten()[self.first : self.last]

    def write(self, whole: Tensor, own: Tensor) -> None:
        """Put what this rank holds into its place."""
        part = self.of(whole)
        if self.last < 0:
            part.copy_(own)
        else:
            flat = part.flatten()
            flat[self.first : self.last] = own
            part.copy_(flat.view_as(part))


class Cut(NamedTuple):
    """Into how many parts a layer is cut, and which of them are here."""

    group: Group
    parts: int  # of all ranks together
    sequence: bool = False  # is the stream cut by tokens, too?

    @property
    def own(self) -> range:
        each = self.parts // self.group.size
        return range(each * self.group.index, each * (self.group.index + 1))

    def bounds(self, size: int, part: int) -> tuple[int, int]:
        return size * part // self.parts, size * (part + 1) // self.parts


def share(p: Parameter, dim: int, cut: Cut, part: int, last: int | None = None) -> Parameter:
    """A parameter that is a part of another one, or several from `part` to `last`."""
    place: Place = p.place
    last = part if last is None else last
    lo, hi = cut.bounds(p.shape[dim], part)[0], cut.bounds(p.shape[dim], last)[1]
    new = Parameter(
        p.detach().narrow(dim, lo, hi - lo).clone(memory_format=torch.contiguous_format),
        p.requires_grad,
    )
    new.place = place._replace(dim=dim, lo=lo, hi=hi, part=part, several=last - part + 1, here=True)
    return new


# --- f and g --------------------------------------------------------------------------------------


class Spread(torch.autograd.Function):
    """f: x for each of n parts; backward, the sum of what all parts of all ranks say of it."""

    @staticmethod
    def forward(ctx, x: Tensor, cut: Cut):
        ctx.cut = cut
        if cut.sequence:
            x = along_tokens(cut.group.gather, x)
        return tuple(x.view_as(x) for _ in cut.own)

    @staticmethod
    def backward(ctx, *dx: Tensor):
        total = tree(dx)
        if ctx.cut.sequence:
            return along_tokens(ctx.cut.group.scatter, total), None
        return ctx.cut.group.sum_(total.clone()), None


class Collect(torch.autograd.Function):
    """g: the sum of all parts' results; backward, its gradient for each part."""

    @staticmethod
    def forward(ctx, cut: Cut, *parts: Tensor):
        ctx.cut = cut
        if cut.sequence:
            return along_tokens(cut.group.scatter, tree(parts))
        return cut.group.sum_(tree(parts).clone())

    @staticmethod
    def backward(ctx, dy: Tensor):
        if ctx.cut.sequence:
            dy = along_tokens(ctx.cut.group.gather, dy)
        return None, *(dy for _ in ctx.cut.own)


def along_tokens(move, x: Tensor) -> Tensor:
    """A gather or scatter along T of (B T C)."""
    return move(x.transpose(0, 1).contiguous()).transpose(0, 1)


# --- layers in parts ------------------------------------------------------------------------------


def pieces(whole: nn.Module, cut: Cut, rows: tuple[str, ...], columns: str) -> nn.ModuleList:
    """Modules like `whole`, with a part of some linears' rows, and of another one's columns.

    The bias behind the sum of all parts is nobody's part: it must be added once.
    """
    found = []
    for i in cut.own:
        own = partial(share, cut=cut, part=i)
        part = copy.copy(whole)
        part._modules = dict(whole._modules)
        for name in rows:
            linear: Linear | None = getattr(whole, name)
            if linear is not None:
                setattr(part, name, linear.split(0, own))
        setattr(part, columns, getattr(whole, columns).split(1, own))
        found.append(part)
    return nn.ModuleList(found)


class SplitAttention(nn.Module):
    """Attention in parts, each with its own heads."""

    def __init__(self, whole: Attention, cut: Cut):
        super().__init__()
        self.cut = cut
        self.parts = pieces(whole, cut, ("query", "key", "value", "prefix"), "output")
        self.bias = whole.output.bias
        self.table = None
        if whole.relative is not None:  # one table for the heads of all parts
            self.table = whole.relative.table
            for part in self.parts:
                part.relative = copy.copy(whole.relative)
                part.relative._parameters = {}

    def own(self, mask: Mask) -> Iterator[Mask]:
        """The mask of each part: slopes and bias are those of its heads."""
        n = len(self.parts)
        slopes, bias = (
            [x] * n if x is None or x.shape[dim] == 1 else x.chunk(n, dim)
            for x, dim in ((mask.slopes, 0), (mask.bias, 1))
        )
        for s, b in zip(slopes, bias, strict=True):
            yield mask if n == 1 else replace(mask, slopes=s, bias=b)

    def spread(self, x: Tensor) -> Iterator[tuple[Attention, Tensor]]:
        tables = () if self.table is None else spread_weight(self.table, self.cut)
        for part, table in zip(self.parts, tables, strict=False):
            part.relative.table = table
        yield from zip(self.parts, Spread.apply(x, self.cut), strict=True)

    def collect(self, parts: list[Tensor]) -> Tensor:
        y = Collect.apply(self.cut, *parts)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, x: Tensor, mask: Mask, rotation=None, past=None) -> tuple[Tensor, KeyValue]:
        found = [
            part(h, m, rotation)
            for (part, h), m in zip(self.spread(x), self.own(mask), strict=True)
        ]
        outs, new = zip(*found, strict=True)
        return self.collect(outs), joined(new)

    def keys_and_values(self, x: Tensor) -> KeyValue:
        return joined([part.keys_and_values(h) for part, h in self.spread(x)])

    def look_at(self, x: Tensor, memory: KeyValue, mask: Mask) -> Tensor:
        n = len(self.parts)
        each = zip(*(m.chunk(n, 1) for m in memory), strict=True)
        return self.collect(
            [part.look_at(h, KeyValue(*kv), mask)
             for (part, h), kv in zip(self.spread(x), each, strict=True)]
        )  # fmt: skip


def joined(parts: list[KeyValue]) -> KeyValue:
    return (
        parts[0]
        if len(parts) == 1
        else KeyValue(*(torch.cat(kv, 1) for kv in zip(*parts, strict=True)))
    )


def spread_weight(p: Tensor, cut: Cut) -> tuple[Tensor, ...]:
    """A weight that all parts use: f again, and never cut by tokens."""
    return Spread.apply(p, cut._replace(sequence=False))


class SplitFeedForward(nn.Module):
    """A feed-forward in parts, each with its own hidden units."""

    def __init__(self, whole: FeedForward, cut: Cut):
        super().__init__()
        self.cut = cut
        self.parts = pieces(whole, cut, ("up", "gate"), "down")
        self.bias = whole.down.bias

    def forward(self, x: Tensor) -> Tensor:
        spread = Spread.apply(x, self.cut)
        y = Collect.apply(self.cut, *(part(h) for part, h in zip(self.parts, spread, strict=True)))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def split_block(block: Block, cut: Cut) -> None:
    """Put layers in parts in the place of plain ones."""
    block.attention = SplitAttention(block.attention, cut)
    if block.cross is not None:
        block.cross = SplitAttention(block.cross, cut)
    block.ffn = SplitFeedForward(block.ffn, cut)


# --- vocabulary -----------------------------------------------------------------------------------


def split_embedding(ids: Tensor, parts: list[Parameter], cut: Cut) -> Tensor:
    """ids (B T) to embeddings (B T C): each part knows some tokens and says 0 of all others."""
    found = []
    for p in parts:
        inside = (ids >= p.place.lo) & (ids < p.place.hi)
        rows = F.embedding((ids - p.place.lo).where(inside, 0), p)
        found.append(torch.where(inside[..., None], rows, 0.0))
    return Collect.apply(cut, *found)


def split_cross_entropy(
    hidden: Tensor, parts: list[Parameter], targets: Tensor, cut: Cut
) -> Tensor:
    """Σ −log softmax(h Wᵀ)[target], of whose scores no rank ever has all.

    hidden (B T C), targets (B T). log Σ exp(s) − s[target], where the maximum, Σ exp and the
    target's score are each put together of all parts' numbers, one per token (Shoeybi et al. 2019,
    section 3).
    """
    targets = targets.flatten()
    asked = targets != IGNORE
    scores = [
        (h.flatten(0, 1) @ p.to(h.dtype).T).to(wide(h.dtype))  # N V/parts
        for h, p in zip(Spread.apply(hidden, cut), parts, strict=True)
    ]
    most = cut.group.max_(torch.stack([s.detach().amax(-1) for s in scores]).amax(0))
    sums, hits = [], []
    for s, p in zip(scores, parts, strict=True):
        sums.append((s - most[:, None]).exp().sum(-1))
        inside = asked & (targets >= p.place.lo) & (targets < p.place.hi)
        at = (targets - p.place.lo).where(inside, 0)[:, None]
        hits.append(torch.where(inside, s.gather(-1, at)[:, 0] - most, 0.0))
    plain = cut._replace(sequence=False)
    loss = Collect.apply(plain, *sums).log() - Collect.apply(plain, *hits)
    return torch.where(asked, loss, 0.0).sum()
