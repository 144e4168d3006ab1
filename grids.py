"""The numbers that a few bits can stand for: uniform steps, or those that a normal variable likes.

Idea: a weight becomes a small integer, its code, and neighbours share what turns codes back into
numbers. On a uniform grid that is a step s and the code z that means 0:

    w ≈ s (code − z),    code = round(w / s) + z,    |w − s (code − z)| ≤ s / 2

Fewer weights that share a step make it smaller, and cost more bits for steps. NF4 has 16 levels
instead, denser where a normal variable has more of its values, and the largest magnitude of 64
weights as their scale; these scales can be put into 8 bits once more.

    absmax(W, bits, per)        symmetric: z = 0, codes ± (2ᵇ⁻¹ − 1)
    zero_point(W, bits, per)    asymmetric: codes 0 … 2ᵇ − 1 from the smallest to the largest weight
    nf4(W)                      the 16 levels of QLoRA
    grid.codes(W), grid.values(codes), grid.at(k)   for whole matrices, or one input feature
    double_quantize(scale)      scales in 8 bits
    pack(codes, bits), unpack(bytes, bits, K)

Run: python -m pytest tests/test_grids.py

Papers: Jacob et al. 2018 (arXiv 1712.05877, section 2.1) on s and z; Dettmers et al. 2022,
LLM.int8() (arXiv 2208.07339, section 2); Dettmers et al. 2023, QLoRA (arXiv 2305.14314, section 3).

Letters: N output features · K input features · G groups · g input features of a group · b bits.
"""

from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from run import UserError

NF4_BLOCK, SCALE_BLOCK = 64, 256  # QLoRA's: weights of a scale, scales of a scale


class Grid(NamedTuple):
    """s (code − z), with s and z of shape (N G), (1 G) or (1 1); zero has the dtype of codes."""

    scale: Tensor
    zero: Tensor
    low: int  # the smallest code
    high: int  # and the largest
    group: int  # neighbouring input features that share a column of scale and zero

    reach = 0.5  # scales: no value between the ends is further from its code's

    def codes(self, W: Tensor) -> Tensor:
        """The nearest codes to W (N K), halves to even; where a scale is 0, that of 0."""
        scale, zero = spread(self.scale, self.group).to(wide(W)), spread(self.zero, self.group)
        codes = (W.to(scale) / scale).where(scale > 0, 0).round() + zero
        return codes.clamp(self.low, self.high).to(self.zero.dtype)

    def values(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes (N K) stand for."""
        scale, zero = spread(self.scale, self.group), spread(self.zero, self.group)
        return (codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)

    def at(self, k: int) -> "Grid":
        """That of input feature k alone, for matrices (N 1)."""
        column = slice(k // self.group, k // self.group + 1)
        return Grid(self.scale[:, column], self.zero[:, column], self.low, self.high, 1)


def absmax(
    W: Tensor, bits: int = 8, per: str | int = "row", dtype: torch.dtype = torch.float32
) -> Grid:
    """s = max |w| / (2ᵇ⁻¹ − 1), z = 0: one step `per` "tensor", "row", "column" or g features.

    W (N K); per = g: one step for each g neighbouring input features of a row. dtype: of the step.
    """
    parts, group = shared(W, bits, per)
    high = 2 ** (bits - 1) - 1
    scale = steps(parts.abs().amax(2) / high, dtype)
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int8), -high, high, group)


def zero_point(
    W: Tensor, bits: int = 8, per: str | int = "row", dtype: torch.dtype = torch.float32
) -> Grid:
    """s = (max w − min w) / (2ᵇ − 1), z = round(−min w / s), where 0 counts as a weight.

    Arguments as for `absmax`. 0 stays 0. With 4 bits these are the steps of `kernels.int4`.
    """
    parts, group = shared(W, bits, per)
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    # A step that was rounded down would not reach the ends.
    scale = steps((high - low) / (2**bits - 1) * (1 + torch.finfo(dtype).eps), dtype)
    zero = (-low / scale.where(scale > 0, 1)).round().to(torch.uint8)
    return Grid(scale, zero, 0, 2**bits - 1, group)


def shared(W: Tensor, bits: int, per: str | int) -> tuple[Tensor, int]:
    """W as (rows of s, columns of s, weights that share it), and g."""
    if bits not in range(2, 9):
        raise UserError(f"a code has 2 to 8 bits, not {bits}")
    finite(W)
    N, K = W.shape
    W = W.to(wide(W))
    if per == "column":
        return W.T[None], 1
    if per in ("tensor", "row"):
        return W.reshape(1 if per == "tensor" else N, 1, -1), K
    if isinstance(per, str):
        raise UserError(f'one step per "{per}" is unknown; take "tensor", "row", "column" or g')
    if per < 1 or K % per:
        raise UserError(
            f"groups of {per} do not divide the {K} input features of a {N} × {K} matrix"
        )
    return W.unflatten(1, (K // per, per)), per


def steps(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to dtype, those above 0 to its normal numbers."""
    scale = scale.clamp(min=torch.finfo(dtype).tiny).where(scale > 0, 0).to(dtype)
    if not scale.isfinite().all():
        raise UserError(f"weights are too large: their step is infinite in {dtype}")
    return scale


def finite(W: Tensor) -> None:
    """UserError unless W is a matrix of finite numbers."""
    if W.dim() != 2 or not W.numel():
        raise UserError(f"only matrices are quantized, and this has the shape {tuple(W.shape)}")
    if not W.isfinite().all():
        raise UserError("weights that are infinite or NaN cannot be quantized")


def wide(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


def spread(x: Tensor, group: int) -> Tensor:
    """(N G) → (N K)."""
    return x.repeat_interleave(group, 1) if group > 1 else x


# --- normal floats --------------------------------------------------------------------------------


def normal_levels() -> Tensor:
    """NF4's 16 levels: quantiles of a normal variable, divided by the largest (fp32).

    8 above 0 and 7 below it are evenly spaced in probability, so that 0 is one of them; they end at
    the mean of 1 − 1/30 and 1 − 1/32, where one more step would have half its probability.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2
    side = {n: [NormalDist().inv_cdf(0.5 + (end - 0.5) * i / n) for i in range(1, n + 1)]
            for n in (7, 8)}  # fmt: skip
    levels = [-x for x in reversed(side[7])] + [0.0] + side[8]
    return (torch.tensor(levels, dtype=torch.float64) / levels[-1]).float()


NF4 = normal_levels()


class NormalFloat(NamedTuple):
    """s · level[code], codes 0 … 15, scale (N G)."""

    scale: Tensor
    group: int

    reach = (NF4[1:] - NF4[:-1]).max().item() / 2  # as that of a Grid

    def codes(self, W: Tensor) -> Tensor:
        """The nearest levels' numbers to W (N K), uint8; where a scale is 0, that of 0."""
        scale, levels = spread(self.scale, self.group).to(wide(W)), NF4.to(W.device, wide(W))
        share = (W.to(scale) / scale).where(scale > 0, 0)
        return torch.bucketize(share, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)

    def values(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes (N K) stand for."""
        return NF4.to(codes.device, dtype)[codes.int()] * spread(self.scale, self.group).to(dtype)

    def at(self, k: int) -> "NormalFloat":
        """That of input feature k alone, for matrices (N 1)."""
        return NormalFloat(self.scale[:, k // self.group, None], 1)


def nf4(W: Tensor, per: int = NF4_BLOCK, dtype: torch.dtype = torch.float32) -> NormalFloat:
    """s = max |w| of each `per` neighbouring input features of a row of W (N K)."""
    parts, group = shared(W, 4, per)
    return NormalFloat(steps(parts.abs().amax(2), dtype), group)


class Doubled(NamedTuple):
    """Scales in 8 bits: mean + s₂ code, one s₂ for 256 of them."""

    codes: Tensor  # n, int8
    scale: Tensor  # ⌈n / 256⌉
    mean: Tensor  # ()

    def restored(self, shape: tuple[int, ...]) -> Tensor:
        """The scales, in fp32."""
        return (self.codes * spread(self.scale[None], SCALE_BLOCK)[0, : len(self.codes)]
                + self.mean).view(shape)  # fmt: skip


def double_quantize(scale: Tensor) -> Doubled:
    """Scales of any shape, less their mean, in 8 bits (Dettmers et al. 2023, eq. 6).

    By absmax, where QLoRA has floats of 8 bits. Take what is `restored` for the scale before codes
    are chosen: these then fit what is read.
    """
    flat = scale.float().flatten()
    mean = flat.mean()
    blocks = F.pad(flat - mean, (0, -len(flat) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    grid = absmax(blocks, 8)
    return Doubled(grid.codes(blocks).flatten()[: len(flat)], grid.scale[:, 0], mean)


# --- parts of grids -------------------------------------------------------------------------------


def of_rows(grid: Grid | NormalFloat, which: slice) -> Grid | NormalFloat:
    """For these rows of the matrix."""
    return type(grid)(*(x[which] if isinstance(x, Tensor) and len(x) > 1 else x for x in grid))


def beside(grids: list[Grid] | list[NormalFloat]) -> Grid | NormalFloat:
    """One grid from those of neighbouring groups."""
    fields = zip(*grids, strict=True)
    return type(grids[0])(*(torch.cat(x, 1) if isinstance(x[0], Tensor) else x[0] for x in fields))


# --- bits -----------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int, low: int = 0) -> Tensor:
    """Codes low … low + 2ᵇ − 1 (N K) → uint8 (N ⌈b K / 8⌉): each row is one stream of bits.

    Eight codes fill b bytes, the first code their lowest bits; a row's end is filled with zeros.
    """
    N, K = codes.shape
    codes = codes.long() - low
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise UserError(
            f"codes from {low} on in {bits} bits are below {low + 2**bits}; these are not"
        )
    eight = torch.arange(8, device=codes.device)
    words = (F.pad(codes, (0, -K % 8)).view(N, -1, 8) << bits * eight).sum(2)
    stream = words[:, :, None] >> 8 * eight[:bits] & 255
    return stream.to(torch.uint8).flatten(1)[:, : -(-K * bits // 8)]


def unpack(stream: Tensor, bits: int, K: int, low: int = 0) -> Tensor:
    """The inverse: codes (N K), int8 if low is below 0, else uint8."""
    eight = torch.arange(8, device=stream.device)
    parts = F.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits)).long()
    words = (parts << 8 * eight[:bits]).sum(2)
    codes = (words[:, :, None] >> bits * eight & (1 << bits) - 1).flatten(1)[:, :K] + low
    return codes.to(torch.int8 if low < 0 else torch.uint8)
