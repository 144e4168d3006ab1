"""How tokens know where they are: six schemes behind one set of hooks.

Idea: attention is a sum and knows no order, so a token's place must enter somewhere:

    added to what goes in          sinusoidal, learned         x + p(position)
    turned into queries and keys   RoPE                        (R_m q)·(R_n k) depends on m − n only
    added to the scores            T5's bias, ALiBi, Shaw      q·k + b(n − m)

A scheme of the last kind says nothing about absolute places, so that it can be asked about a longer
text than it was trained on; whether that goes well is another matter (`evaluate.py`).

Run: python -m pytest tests/test_positions.py

To add a scheme: one subclass of `NoPosition`, one entry in POSITIONS, one oracle in
tests/reference.py. To stretch RoPE over longer texts in another way: one function of its
frequencies, one entry in SCALINGS.

Papers: Vaswani et al. 2017, sinusoidal (arXiv 1706.03762, section 3.5); Gehring et al. 2017,
learned (arXiv 1705.03122); Shaw et al. 2018, relative (arXiv 1803.02155); Raffel et al. 2020, T5's
bias (arXiv 1910.10683); Su et al. 2021, RoPE (arXiv 2104.09864); Press et al. 2022, ALiBi (arXiv
2108.12409); Chen et al. 2023, RoPE's linear scaling (arXiv 2306.15595); bloc97 2023, NTK-aware
scaling; Grattafiori et al. 2024, Llama 3 (arXiv 2407.21783).

Letters: B batch · T positions that look · S positions looked at · C model width · H heads ·
D head width.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log, log2, tau

import torch
from torch import Tensor, nn

from kernels.elementwise import rotate_pair
from kernels.mask import Mask

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # queries and keys (B T H D), turned


class NoPosition(nn.Module):
    """No position at all; the hooks through which every scheme acts."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What is added to the embeddings x (B T C) of tokens at positions (B T)."""
        return x

    def rotation(self, positions: Tensor) -> Rotation | None:
        """How queries and keys at these positions are turned, or None."""
        return None

    def scored(self, mask: Mask, S: int) -> Mask:
        """The mask with what the scheme adds to the scores of S keys; mask.at says who looks."""
        return mask


# --- added to what goes in ------------------------------------------------------------------------


class Learned(NoPosition):
    """x + table[position]  (Gehring et al. 2017; GPT-2, BERT)."""

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


class Sinusoidal(NoPosition):
    """x + p, p_2i = sin(m / 10000^(2i/C)), p_2i+1 = cos of the same (Vaswani et al., section 3.5).

    Waves of all lengths: p at m + k is a rotation of p at m that depends on k alone.
    """

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        C = x.shape[-1]
        even = torch.arange(0, C, 2, device=x.device)
        angles = positions[..., None] / 10_000.0 ** (even / C)  # B T ⌈C/2⌉
        waves = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
        return x + waves[..., :C].to(x.dtype)


# --- turned into queries and keys -----------------------------------------------------------------


def unscaled(theta: Tensor, config) -> Tensor:
    return theta


def linear(theta: Tensor, config) -> Tensor:
    """θ / factor: positions of a longer text are pressed into the known ones (Chen et al. 2023)."""
    return theta / config.rope_factor


def ntk(theta: Tensor, config) -> Tensor:
    """θ_i · factor^(−2i/(D−2)): the base grows so that the slowest angle is slowed by the factor.

    The fastest stays as it is: near places are told apart as before (bloc97 2023, "NTK-aware").
    """
    exponent = torch.arange(len(theta), device=theta.device) / max(1, len(theta) - 1)
    return theta * config.rope_factor**-exponent


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


SCALINGS = {"none": unscaled, "linear": linear, "ntk": ntk, "llama3": llama3}


class Rope(NoPosition):
    """θ_i = base^(−2i/D); query and key at position m are turned by the angles m·θ_i (eq. 15).

    The pair that is turned together is (i, i + D/2), as in Hugging Face's Llama files, or the
    paper's (2i, 2i + 1) if interleaved: the same up to a permutation of the channels. `scale` may
    change the θ_i.
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        scale: Callable[[Tensor], Tensor] = lambda theta: theta,
        interleaved: bool = False,
    ):
        super().__init__()
        self.head_dim, self.base, self.scale = head_dim, base, scale
        self.interleaved = interleaved

    def angles(self, positions: Tensor) -> Tensor:
        """m·θ_i (B T D/2), in fp32, and θ as 1 / base^…, in the steps of published files' code.

        Far out that matters: θ's last bit, times a position of 100,000, is an angle of 0.006.
        """
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim
        return positions[..., None] * self.scale(1 / self.base**exponent)

    def rotation(self, positions: Tensor) -> Rotation:
        angles = self.angles(positions)
        turn = partial(rotate_pair, cos=angles.cos(), sin=angles.sin())
        if not self.interleaved:
            return turn

        def turn_neighbours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            q, k = turn(*(torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in (q, k)))
            q, k = (torch.stack(x.chunk(2, -1), -1).flatten(-2) for x in (q, k))
            return q, k

        return turn_neighbours


def rope(config) -> Rope:
    scale = partial(SCALINGS[config.rope_scaling], config=config)
    return Rope(config.head_dim, config.rope_base, scale, config.rope_interleaved)


# --- added to the scores --------------------------------------------------------------------------


def alibi_slopes(heads: int) -> Tensor:
    """2^(−8h/H), h = 1 … H, for a power of two; else those of the next lower power n, and then
    every other one of 2n's  (Press et al. 2022, section 3, and their code)."""

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * h / n) for h in range(1, n + 1)]

    n = 1 << int(log2(heads))
    slopes = powers(n) + powers(2 * n)[::2][: heads - n]
    return torch.tensor(slopes, device="cpu")  # a constant: it has its numbers on meta's models too


class Alibi(NoPosition):
    """q·k − slope_h · |m − n|: what is far away weighs less, for each head at its own rate."""

    def __init__(self, heads: int):
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(heads), persistent=False)

    def scored(self, mask: Mask, S: int) -> Mask:
        return replace(mask, slopes=self.slopes)


def t5_bucket(distance: Tensor, buckets: int, furthest: int, causal: bool) -> Tensor:
    """The bucket of n − m (Raffel et al. 2020, section 2.1, and T5's code).

    Of the buckets (a half for keys behind the query if it may look there) half are for one distance
    each; the others grow with the logarithm up to `furthest`, beyond which all is one.
    """
    first = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        first = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = distance.clamp(min=1).float().div(exact).log() / log(furthest / exact)
    far = exact + (far * (buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class T5Bias(NoPosition):
    """q·k + table[bucket(n − m), h]: one learnt number for a head and a bucket of distances.

    One table serves all layers of a stack.
    """

    def __init__(self, heads: int, buckets: int, furthest: int, causal: bool):
        super().__init__()
        self.table = nn.Parameter(torch.empty(buckets, heads))
        self.furthest, self.causal = furthest, causal

    def scored(self, mask: Mask, S: int) -> Mask:
        distance = torch.arange(S, device=mask.at.device) - mask.at[..., None]  # 1 T S
        bucket = t5_bucket(distance, len(self.table), self.furthest, self.causal)
        return replace(mask, bias=self.table[bucket].permute(0, 3, 1, 2))


class Shaw(nn.Module):
    """q·(k + a[clip(n − m, −R, R)]): a learnt key for each distance up to R (Shaw et al., eq. 4).

    Each layer has its own, shared by its heads; of the paper's two terms this is that of the keys.
    """

    def __init__(self, reach: int, head_dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(2 * reach + 1, head_dim))

    def forward(self, q: Tensor, mask: Mask, S: int, scale: float) -> Mask:
        """q (B H T D): the mask with scale · q·a added to the scores."""
        reach = len(self.table) // 2
        distance = torch.arange(S, device=q.device) - mask.at[..., None]  # 1 T S
        place = (distance.clamp(-reach, reach) + reach)[:, None].expand(*q.shape[:3], -1)
        scores = scale * q @ self.table.to(q.dtype).T  # B H T 2R+1
        return replace(mask, bias=scores.gather(-1, place))


# --- the table ------------------------------------------------------------------------------------

POSITIONS: dict[str, Callable[..., NoPosition]] = {  # (config, does each token see only the past?)
    "rope": lambda config, causal: rope(config),
    "learned": lambda config, causal: Learned(config.dim, config.context),
    "sinusoidal": lambda config, causal: Sinusoidal(),
    "relative": lambda config, causal: NoPosition(),  # in each layer: Shaw
    "t5": lambda config, causal: T5Bias(config.heads, config.buckets, config.reach, causal),
    "alibi": lambda config, causal: Alibi(config.heads),
    "none": lambda config, causal: NoPosition(),
}
