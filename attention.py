"""How tokens look at each other, and how they know where they are.

Idea: every token asks a question (query), offers an answer to a kind of question (key) and carries
a message (value); it takes the messages of the tokens whose keys fit its query. That sum knows no
order, so a position scheme tells each token its place: added to what goes in (learned), or by
turning queries and keys by an angle that grows with the position (RoPE), so that a product of two
of them depends on their distance only.

Run: python -m pytest tests/test_attention.py

To add a position scheme: one subclass of `NoPosition`, one entry in POSITIONS, one oracle in
tests/reference.py. To stretch RoPE over longer texts in another way: one function of its
frequencies, one entry in SCALINGS. To add a kind of attention: one function with the signature of
`kernels.attention.attend`, one entry in ATTENTIONS.

Papers: Vaswani et al. 2017 (arXiv 1706.03762); Su et al. 2021, RoPE (arXiv 2104.09864); Chen et
al. 2023, its linear scaling (arXiv 2306.15595); Grattafiori et al. 2024, Llama 3 (arXiv
2407.21783); Ainslie et al. 2023, grouped-query attention (arXiv 2305.13245); Henry et al. 2020,
query-key normalization (arXiv 2010.04245).

Letters: B batch · T positions that look · S positions looked at · C model width · H heads ·
K key-value heads · D head width · P positions already in the cache.
"""

from collections.abc import Callable
from functools import partial
from math import tau
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Mask, attend
from kernels.decode import decode
from kernels.elementwise import rotate_pair
from kernels.norm import rmsnorm

Rotation = tuple[Tensor, Tensor]  # cosine and sine of RoPE's angles, each (B T D/2)

UNIT_EPS = 1e-6  # in the norm of queries and keys


class KeyValue(NamedTuple):
    """Keys and values of one layer, each (B K S D)."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor) -> "KeyValue":
        """These, then k and v: what the tokens of k and v look at, if these are their past."""
        return KeyValue(torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2))


def full(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """Attention to all keys of the mask; a single query has its own kernel."""
    single = q.shape[2] == 1 and mask.layout is None and not torch.is_grad_enabled()
    return (decode if single else attend)(q, k, v, mask, scale)


ATTENTIONS = {"full": full}


class Linear(nn.Module):
    """y = x Wᵀ + b, where W (out in) is kept in fp32 and cast to the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


# --- masks ----------------------------------------------------------------------------------------


def causal_mask(T: int, past: int = 0, device: torch.device | str = "cpu") -> Mask:
    """Token t sees itself and all before it, the cache's `past` tokens too: 0 ≤ s ≤ P + t."""
    hi = torch.arange(past, past + T, device=device)[None]
    return Mask(torch.zeros_like(hi), hi)


def document_mask(starts: Tensor) -> Mask:
    """Causal inside each document of a packed row: starts (B T) holds where t's document begins."""
    hi = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return Mask(starts, hi)


# --- positions ------------------------------------------------------------------------------------


class NoPosition(nn.Module):
    """No position at all; the hooks through which every scheme acts."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What is added to the embeddings x (B T C) of tokens at positions (B T)."""
        return x

    def rotation(self, positions: Tensor) -> Rotation | None:
        """The angles by which queries and keys are turned, or None."""
        return None


class Learned(NoPosition):
    """x + table[position]  (Gehring et al. 2017, arXiv 1705.03122; GPT-2)."""

    def __init__(self, dim: int, context: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(context, dim))

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        last = positions.shape[1] - 1  # or more, but to ask a GPU would mean to wait for it
        if not positions.is_cuda and positions.numel():
            last = int(positions.max())
        if last >= len(self.table):
            raise ValueError(
                f"position {last} lies beyond the {len(self.table)} learned positions: "
                "shorten the text, or train with a larger --model.context"
            )
        return x + self.table[positions].to(x.dtype)


def unscaled(theta: Tensor, config) -> Tensor:
    return theta


def linear(theta: Tensor, config) -> Tensor:
    """θ / factor: positions of a longer text are pressed into the known ones (Chen et al. 2023)."""
    return theta / config.rope_factor


def llama3(theta: Tensor, config) -> Tensor:
    """(1 − s) θ / factor + s θ, where s = (n − low) / (high − low), cut to 0 … 1.

    n = context / wavelength is how often an angle turned in the context of the first training. What
    turned often tells near from far and stays (s = 1); what turned less than `low` times is slowed
    down as in `linear` (s = 0). From `apply_scaling` in Meta's code of Llama 3.1.
    """
    wavelength = tau / theta  # in positions
    n = config.rope_context / wavelength
    s = ((n - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return (1 - s) * theta / config.rope_factor + s * theta


SCALINGS = {"none": unscaled, "linear": linear, "llama3": llama3}


class Rope(NoPosition):
    """θ_i = base^(−2i/D); query and key at position m are turned by the angles m·θ_i (eq. 15).

    The pair that is turned together is (i, i + D/2), as in Hugging Face's Llama files; the paper's
    (2i, 2i + 1) is the same up to a permutation of the channels. `scale` may change the θ_i.
    """

    def __init__(
        self, head_dim: int, base: float, scale: Callable[[Tensor], Tensor] = lambda theta: theta
    ):
        super().__init__()
        self.head_dim, self.base, self.scale = head_dim, base, scale

    def rotation(self, positions: Tensor) -> Rotation:
        """In fp32, and θ as 1 / base^…, in the steps of the code that published files come from.

        Far out that matters: θ's last bit, times a position of 100,000, is an angle of 0.006.
        """
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim
        angles = positions[..., None] * self.scale(1 / self.base**exponent)  # B T D/2
        return angles.cos(), angles.sin()


def rope(config) -> Rope:
    scale = partial(SCALINGS[config.rope_scaling], config=config)
    return Rope(config.head_dim, config.rope_base, scale)


POSITIONS = {
    "rope": rope,
    "learned": lambda config: Learned(config.dim, config.context),
    "none": lambda config: NoPosition(),
}


# --- the layer ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with H query heads that share K key-value heads.

    Its number of heads follows from the width of its own projections, so a part of the heads
    (tensor parallelism) is a smaller layer of the same kind.
    """

    def __init__(self, config):
        super().__init__()
        C, D = config.dim, config.head_dim
        self.head_dim = D
        self.attend = ATTENTIONS[config.attention]
        self.query = Linear(C, config.heads * D, config.bias)
        self.key = Linear(C, config.kv_heads_or_heads * D, config.bias)
        self.value = Linear(C, config.kv_heads_or_heads * D, config.bias)
        self.output = Linear(config.heads * D, C, config.bias)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Tensor, mask: Mask, rotation: Rotation | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """x (B T C) looks at the past and itself; the result (B T C), and its own new k, v.

        The past is a `KeyValue`, or whatever else takes k and v by `append` and gives all of them.
        """
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim))  # B T H D
            for linear in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            q, k = (rmsnorm(part, part.new_ones(self.head_dim), UNIT_EPS) for part in (q, k))
        if rotation is not None:
            q, k = rotate_pair(q, k, *rotation)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # B H T D
        new = KeyValue(k, v)
        if past is not None:
            k, v = past.append(k, v)
        out = self.attend(q, k, v, mask, self.head_dim**-0.5)
        return self.output(out.transpose(1, 2).flatten(2)), new
