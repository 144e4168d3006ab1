"""Dropout, drawn by counting: a mask is a function of what is dropped, not of what came before.

Idea: a step of training forgets a share p of what each residual branch says, other numbers in every
step, so that no number can rely on another. A generator with a state would make the mask depend on
who drew before: on batches, processes and what is computed twice. So there is no state. Whether a
number is dropped is the hash of its own coordinates,

    Philox(key: seed, step; counter: row, place, position, channel // 8), its 16 bits channel % 8,

and whoever holds a part of the rows, blocks, positions or channels draws the mask of that part.
A row is counted through the whole run, a position within its row; a place is a branch of a block.

Only residual branches are dropped, behind their last matrix. Vaswani et al. and GPT-2 drop sums of
embeddings, too: that is the stream itself, which no branch can say again. GPT-2 also drops weights
of attention, which here never lie in memory.

Run: python -m pytest tests/test_dropout.py

Papers: Srivastava et al. 2014 (JMLR 15); Vaswani et al. 2017 (arXiv 1706.03762, section 5.4);
Salmon et al. 2011, Philox (Parallel Random Numbers: As Easy as 1, 2, 3, SC11).

Letters: B batch · T tokens · C model width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WORD, HALF = 0xFFFFFFFF, 0xFFFF  # all bits of one
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # golden ratio, √3 − 1: what the key grows by
ROUNDS = 10  # Salmon et al.'s choice; from 7 on all tests of BigCrush are passed

Words = tuple[Tensor | int, ...]


def philox(counter: Words, key: Words, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four random words of a counter of four and a key of two (Salmon et al. 2011).

    One round: (a, b, c, d) ← (hi(m₁c) ⊕ b ⊕ k₀, lo(m₁c), hi(m₀a) ⊕ d ⊕ k₁, lo(m₀a)).
    Words are int64 below 2³². The product of two wraps around 2⁶⁴ to the right bits, on every
    device. Second and fourth word are cut to 32 bits only at the end: until then nothing but ⊕
    meets them. Where words broadcast, the first rounds cost little.
    """
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(rounds):
        m0a, m1c = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = ((m1c >> 32) ^ (b ^ k0)) & WORD, m1c
        c, d = ((m0a >> 32) ^ (d ^ k1)) & WORD, m0a
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return a, b & WORD, c, d & WORD


def drawn_from(seed: int, step: int, first: int, rows: int) -> Tensor:
    """(B 3) int64: seed, step and number of each of so many rows, counted from `first`."""
    number = torch.arange(first, first + rows)
    words = torch.broadcast_tensors(torch.tensor(seed & WORD), torch.tensor(step), number)
    return torch.stack(words, 1) & WORD


def of_65536(share: float) -> int:
    """A share of numbers of 16 bits: the nearest, at most all but one."""
    return min(round(share * 65536), HALF)


def dropped(
    share: float, draws: Tensor, place: int, positions: Tensor, C: int, first: int = 0
) -> Tensor:
    """Which numbers go, (B T C), of draws (B 3), positions (T) and C channels from `first`.

    Those of any part of rows, positions and channels are that part of the whole.
    """
    seed, step, row = draws[:, :, None, None].unbind(1)  # each B 1 1
    start, end = first // 8, -(-(first + C) // 8)
    eights = torch.arange(start, end, device=draws.device)
    words = philox((row, place, positions[:, None], eights), (seed, step))  # each B T C/8
    halves = [half for word in words for half in (word & HALF, word >> 16)]
    gone = torch.stack([half < of_65536(share) for half in halves], -1).flatten(-2)
    return gone[..., first - 8 * start :][..., :C]


class Drop(NamedTuple):
    """What a forward pass drops: a share p of numbers, by draws (B 3) and positions (T)."""

    share: float
    draws: Tensor
    positions: Tensor

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """x / (1 − p), but 0 with probability p: its mean is x (B T C)  (Srivastava et al. 2014).

        p is rounded to 2⁻¹⁶, here as there. For the backward pass a byte a number is kept.
        """
        gone = dropped(self.share, self.draws, place, self.positions, x.shape[-1])
        return x * ~gone / (1 - of_65536(self.share) / 65536)

    def behind(self, branch: Callable[[Tensor], Tensor], place: int) -> Callable[[Tensor], Tensor]:
        """The branch, dropped."""
        return lambda h: self(branch(h), place)
