"""How tokens look at each other.

Idea: every token asks a question (query), offers an answer to a kind of question (key) and carries
a message (value); it takes the messages of the tokens whose keys fit its query. Everybody may look
at everybody, which costs T², or at some: at neighbours, at a pattern of blocks, or, in Performers,
at a sum in which all keys are melted together beforehand.

Run: python -m pytest tests/test_attention.py

To add a kind of attention: a function that narrows the mask, or one with the signature of
`kernels.attention.attend`, and one entry in ATTENTIONS.

Papers: Vaswani et al. 2017 (arXiv 1706.03762); Ainslie et al. 2023, grouped-query attention (arXiv
2305.13245); Henry et al. 2020, query-key normalization (arXiv 2010.04245); Beltagy et al. 2020,
sliding windows (arXiv 2004.05150). Patterns of blocks are in sparse.py, Performers in performer.py.

Letters: B batch · T positions that look · S positions looked at · C model width · H heads ·
K key-value heads · D head width · P positions already in the cache.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Mask, attend
from kernels.decode import decode
from kernels.norm import rmsnorm
from performer import Performer, Running, whole_documents
from positions import Rotation, Shaw
from sparse import PATTERNS

UNIT_EPS = 1e-6  # in the norm of queries and keys


class KeyValue(NamedTuple):
    """Keys and values of one layer, each (B K S D)."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor) -> "KeyValue":
        """These, then k and v: what the tokens of k and v look at, if these are their past."""
        return KeyValue(torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2))

    def places(self, T: int) -> tuple[Tensor, int]:
        """Where T more tokens come to stand among the keys, and how many keys there are then."""
        P = self.keys.shape[2]
        return torch.arange(P, P + T, device=self.keys.device), P + T


class Linear(nn.Module):
    """y = x Wᵀ + b, where W (out in) is kept in fp32 and cast to the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    # Every kind of linear has what follows, and so adapters and tensor parallelism look no deeper.

    @property
    def shape(self) -> tuple[int, int]:
        """(out in)"""
        return tuple(self.weight.shape)

    def dense(self) -> Tensor:
        """The matrix (out in) that it stands for."""
        return self.weight.detach()

    def like(self, matrix: Tensor) -> "Linear":
        """One of the same kind, with the same bias, that stands for this matrix."""
        new = copy.copy(self)
        weight = nn.Parameter(matrix, self.weight.requires_grad)
        new._parameters = {**self._parameters, "weight": weight}
        return new

    def split(self, dim: int, share: Callable[[nn.Parameter, int], nn.Parameter]) -> "Linear":
        """The part of the rows (dim 0) or columns (1) that `share` takes of a weight.

        One of columns has no bias: it is added once, to the sum of all parts.
        """
        part = copy.copy(self)
        bias = None if self.bias is None or dim else share(self.bias, 0)
        part._parameters = {"weight": share(self.weight, dim), "bias": bias}
        return part


# --- masks ----------------------------------------------------------------------------------------


def causal_mask(T: int, past: int = 0, device: torch.device | str = "cpu") -> Mask:
    """Token t sees itself and all before it, the cache's `past` tokens too: 0 ≤ s ≤ P + t."""
    hi = torch.arange(past, past + T, device=device)[None]
    return Mask(torch.zeros_like(hi), hi)


def full_mask(T: int, S: int, device: torch.device | str = "cpu") -> Mask:
    """T tokens see S: bidirectional, or what looks at an encoder."""
    lo = torch.zeros((1, T), dtype=torch.long, device=device)
    return Mask(lo, lo + S - 1)


def prefix_mask(prefixes: Tensor, T: int) -> Mask:
    """Causal, but the first tokens of each row, prefixes (B), see each other (a prefix LM)."""
    at = torch.arange(T, device=prefixes.device)
    hi = torch.maximum(at, prefixes[:, None] - 1)
    return Mask(torch.zeros_like(hi), hi)


def document_mask(starts: Tensor) -> Mask:
    """Causal inside each document of a packed row: starts (B T) holds where t's document begins."""
    hi = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return Mask(starts, hi)


# --- kinds of attention ---------------------------------------------------------------------------


def full(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """Attention to all keys of the mask; a single query has its own kernel."""
    single = q.shape[2] == 1 and mask.layout is None and not torch.is_grad_enabled()
    return (decode if single else attend)(q, k, v, mask, scale)


def everything(mask: Mask, S: int, config) -> Mask:
    return mask


def sliding(mask: Mask, S: int, config) -> Mask:
    """Only keys nearer than `window`: |at − s| < window  (Beltagy et al. 2020; Mistral)."""
    lo = torch.maximum(mask.lo, mask.at - config.window + 1)
    return replace(mask, lo=lo, hi=torch.minimum(mask.hi, mask.at + config.window - 1))


class Kind(NamedTuple):
    """A kind of attention: which keys of S are looked at, and how; see ATTENTIONS."""

    narrow: Callable[..., Mask] = everything  # (mask, S, config), once for all layers
    attend: Callable[..., Callable] = lambda config: full  # what each layer attends with


ATTENTIONS = {
    "full": Kind(),
    "sliding": Kind(sliding),
    **{name: Kind(narrow) for name, narrow in PATTERNS.items()},
    "performer": Kind(whole_documents, Performer),
}


# --- the layer ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with H query heads that share K key-value heads.

    Its number of heads follows from the width of its own projections, so a part of the heads
    (tensor parallelism) is a smaller layer of the same kind.
    """

    def __init__(self, config, cross: bool = False):
        """cross: queries look at another stack's tokens, wherever these stand."""
        super().__init__()
        C, D = config.dim, config.head_dim
        self.head_dim, self.scale = D, config.score_scale or D**-0.5
        self.attend = full if cross else ATTENTIONS[config.attention].attend(config)
        self.query = Linear(C, config.heads * D, config.bias)
        self.key = Linear(C, config.kv_heads_or_heads * D, config.bias)
        self.value = Linear(C, config.kv_heads_or_heads * D, config.bias)
        self.output = Linear(config.heads * D, C, config.bias)
        relative = config.position == "relative" and not cross
        self.relative = Shaw(config.reach, D) if relative else None
        self.prefix: nn.Module | None = None  # for adapters: what all texts see first
        self.qk_norm = config.qk_norm

    def heads(self, linear: Linear, x: Tensor) -> Tensor:
        """x (B T C) projected to (B T heads D), of mean square 1 if that is wished.

        That is length √D, without the weights that Qwen3's files have there; Henry et al. have
        length 1 and learn how large scores are.
        """
        x = linear(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm and linear is not self.value:
            x = rmsnorm(x, x.new_ones(self.head_dim), UNIT_EPS)
        return x

    def keys_and_values(self, x: Tensor) -> KeyValue:
        """What x (B S C) offers to another stack's queries."""
        return KeyValue(*(self.heads(f, x).transpose(1, 2) for f in (self.key, self.value)))

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """x (B T C) looks at the past and itself; the result (B T C), and its own new k, v.

        The past is a `KeyValue`, whatever else takes k and v by `append` and gives all of them, or
        a Performer's running sums.
        """
        q, k, v = (self.heads(f, x) for f in (self.query, self.key, self.value))  # B T H D
        if rotation is not None:
            q, k = rotation(q, k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # B H T D
        new = KeyValue(k, v)
        if past is not None:
            k, v = past.append(k, v)
        if self.prefix is not None:
            k, v = self.prefix.before(k, v)
        return self.look(q, k, v, mask, past), new

    def look_at(self, x: Tensor, memory: KeyValue, mask: Mask) -> Tensor:
        """x (B T C) looks at what another stack offers: cross attention."""
        return self.look(self.heads(self.query, x).transpose(1, 2), *memory, mask)

    def look(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, past: object = None) -> Tensor:
        if self.relative is not None:
            mask = self.relative(q, mask, k.shape[2], self.scale)
        sums = isinstance(past, Running)
        attend = partial(past.attend, self.attend) if sums else self.attend
        out = attend(q, k, v, mask, self.scale)
        return self.output(out.transpose(1, 2).flatten(2))
