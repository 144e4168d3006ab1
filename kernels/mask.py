"""Who sees whom, as data: the one `Mask` that all kinds of attention share.

Causal, windowed, packed, padded and bidirectional attention are intervals; ALiBi, learnt biases and
block-sparse patterns are further fields. `visible` and `dense` write a mask out in full: they are
for the obvious versions and for tests.

Papers: Press et al. 2022, ALiBi (arXiv 2108.12409); Raffel et al. 2020, T5's bias (arXiv
1910.10683); Zaheer et al. 2020, block-sparse layouts (arXiv 2007.14062).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Query t of sample b sees the keys s with lo[b, t] ≤ s ≤ hi[b, t]; none where lo > hi.

    lo, hi: int64, (B T), or (1 T) when all samples are alike. Optional, each further field changes
    what is seen or adds to the scores:
    at, (B T) or (1 T): the place of query t among the keys, for whoever needs distances.
    slopes (H), with at: ALiBi adds −slope·|at[b, t] − s|. Constants, without a gradient.
    bias (B H T S), B and H may be 1: added to the scores, with a gradient.
    layout (H ⌈T/block⌉ ⌈S/block⌉), bool, H may be 1: a query sees a key only where its block is
    true; empty blocks are skipped.
    """

    lo: Tensor
    hi: Tensor
    slopes: Tensor | None = None
    at: Tensor | None = None
    bias: Tensor | None = None
    layout: Tensor | None = None
    block: int = 64

    @property
    def plain(self) -> bool:
        """Whether the interval is all there is."""
        return self.slopes is None and self.bias is None and self.layout is None


def visible(mask: Mask, keys: int) -> Tensor:
    """True where query t sees key s: (B H T S), B and H may be 1."""
    s = torch.arange(keys, device=mask.lo.device)
    seen = ((mask.lo[..., None] <= s) & (s <= mask.hi[..., None]))[:, None]
    if mask.layout is None:
        return seen
    per_query = mask.layout.repeat_interleave(mask.block, 1)[:, : seen.shape[2]]
    return seen & per_query.repeat_interleave(mask.block, 2)[:, :, :keys]


def dense(mask: Mask, keys: int, dtype: torch.dtype) -> Tensor:
    """The mask written out as what is added to the scores: (B H T S), B and H may be 1."""
    seen = visible(mask, keys)
    added = torch.zeros((), dtype=dtype, device=seen.device)
    if mask.slopes is not None:
        distance = (mask.at[..., None] - torch.arange(keys, device=seen.device)).abs()  # B T S
        added = -mask.slopes.to(dtype)[:, None, None] * distance[:, None]
    if mask.bias is not None:
        added = added + mask.bias.to(dtype)
    return torch.where(seen, added, -torch.inf)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """ValueError, one sentence, unless q (B H T D), k and v (B K S D) and the mask fit together."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (B, D):
        raise ValueError(
            f"attend: k {tuple(k.shape)} and v {tuple(v.shape)} must both be (B K S D) "
            f"with the B = {B} and D = {D} of q"
        )
    if H % K:
        raise ValueError(f"attend: {H} query heads cannot be shared out over {K} key-value heads")
    tiles = (-(-T // mask.block), -(-S // mask.block))
    allowed = {
        "lo": ((B, T), (1, T)),
        "hi": (tuple(mask.lo.shape),),
        "slopes": ((H,),),
        "at": ((B, T), (1, T)),
        "bias": tuple((b, h, T, S) for b in (B, 1) for h in (H, 1)),
        "layout": tuple((h, *tiles) for h in (H, 1)),
    }
    for name, shapes in allowed.items():
        field = getattr(mask, name)
        if field is not None and tuple(field.shape) not in shapes:
            raise ValueError(
                f"attend: mask.{name} {tuple(field.shape)} must be "
                + " or ".join(str(shape) for shape in dict.fromkeys(shapes))
            )
    if mask.slopes is not None and mask.at is None:
        raise ValueError("attend: mask.slopes need mask.at")
