"""What a rank holds and sends under a plan, by formula: certificate.py counts, and finds the same.

Idea: memory and traffic of a plan follow from a few sums, which this file spells out for a decoder
with biases, LayerNorm, a gated feed-forward and one matrix for embedding and head. Of N members

    all-reduce       each sends 2(N − 1)/N of the bytes that are summed
    reduce-scatter   (N − 1)/N of them
    all-gather       N − 1 times what it holds itself

Run: python -m pytest tests/test_traffic.py

Papers: Shoeybi et al. 2019 (arXiv 1909.08053); Rajbhandari et al. 2020 (arXiv 1910.02054);
Korthikanti et al. 2022 (arXiv 2205.05198); Thakur et al. 2005 on the costs of collectives.

Letters: B rows of an update · T tokens · C model width · K width of all keys · F feed-forward
width · V vocabulary · M micro-batches of a copy · w bytes of a number · d × p × t ranks, of which
this one is at (r, s, i): copy, stage, and place in its tensor group.
"""

from typing import NamedTuple

from mesh import Plan
from model import ModelConfig

BLOCK = 18  # weights and biases of a block: 2 norms, 4 linears of attention, 3 of feed-forward

Place = tuple[int, int, int]  # (r, s, i)


class Sizes(NamedTuple):
    """Numbers in each weight that a rank has a part of, before ZeRO."""

    blocks: list[list[int]]
    rest: list[int]  # final norm, embedding
    whole: list[int]  # of both those of which each tensor rank has a copy

    @property
    def all(self) -> list[int]:
        return [n for block in self.blocks for n in block] + self.rest


def sizes(c: ModelConfig, plan: Plan, at: Place) -> Sizes:
    """A block has C² + 2 C K + C² + 3 C F weights, of which a tensor rank holds 1/t."""
    (_, s, i), t, C, V = at, plan.tensor, c.dim, c.vocab_size
    K, F, last = c.kv_heads_or_heads * c.head_dim, c.ffn_width, s == plan.pipeline - 1
    copies = [C] * 6  # weights and biases of two norms, and the biases behind two sums
    rows = [n // t for n in (C * C, C, K * C, K, K * C, K, F * C, F, F * C, F)]
    block = [*copies, *rows, C * C // t, C * F // t]
    here = plan.layers_of(c.layers)[s]
    norm = [C, C] * last
    words = [C * (V * (i + 1) // t - V * i // t)] * (s == 0 or last)
    return Sizes([block] * here, norm + words, copies * here + norm)


def shard(numbers: list[int], N: int, r: int) -> int:
    """Σ ⌊n (r + 1)/N⌋ − ⌊n r/N⌋: what the r-th of N holds of weights of n numbers each."""
    return sum(n * (r + 1) // N - n * r // N for n in numbers)


def longest(numbers: list[int], N: int) -> int:
    return max(shard(numbers, N, r) for r in range(N))


def held(c: ModelConfig, plan: Plan, at: Place, w: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and AdamW's two states behind an update: w, w and 2 w a number.

    ZeRO 1 divides the last by d, ZeRO 2 the last two, ZeRO 3 all (table 1 of its paper).
    """
    numbers = sizes(c, plan, at).all
    full, own = sum(numbers), shard(numbers, plan.data, at[0])
    weights, gradients, state = (own if plan.zero >= stage else full for stage in (3, 2, 1))
    return w * weights, w * gradients, 2 * w * state


def ring(members: int) -> float:
    return 2 * (members - 1) / members


def sent(c: ModelConfig, plan: Plan, at: Place, w: int, B: int) -> dict[tuple[str, str], float]:
    """Bytes that a rank sends in an update, by group and kind; weights fit into one bucket.

    A block sums its stream four times: behind attention and feed-forward, and backward before
    them. The embedding is summed forward, the head's input backward, and of each token's loss the
    maximum, Σ exp and the target's score. Micro-batches change nothing of this, but ZeRO 2 and 3
    send with each.
    """
    (r, s, _), d, p, t = at, plan.data, plan.pipeline, plan.tensor
    first, last, n = s == 0, s == p - 1, B * c.context / d  # n tokens of a copy
    own = sizes(c, plan, at)
    stream = w * n * c.dim * (4 * len(own.blocks) + first + last)
    between = w * n * c.dim / (t if plan.sequence else 1)
    sums, parts = 2 * w * n * last, 0.0
    if plan.sequence:  # each sum in two halves, of as many bytes as before
        parts = ring(t) / 2 * stream
        sums += w * (shard(own.whole, d, r) if plan.zero > 1 else sum(own.whole))
    else:
        sums += stream
    M = micro_batches(plan, B) / d
    squares = 8 * (BLOCK * c.layers + 3) * t  # of each weight's parts, for the norm
    made = {
        ("tensor", "sum"): ring(t) * sums,
        ("tensor", "gather"): parts,
        ("tensor", "scatter"): parts,
        ("tensor", "max"): ring(t) * w * n * last,
        ("up", "send"): between * (not last),
        ("down", "send"): between * (not first),
        ("ends", "sum"): ring(2) * w * own.rest[-1] * (p > 1) if first or last else 0.0,
        ("model", "sum"): ring(p * t) * squares * (plan.zero < 2),
        ("world", "sum"): ring(d * p * t) * (8 * M * d + squares * (plan.zero > 1)),
        **among_copies(own, plan, w, M),
    }
    return {key: x for key, x in made.items() if x}


def among_copies(own: Sizes, plan: Plan, w: int, M: float) -> dict[tuple[str, str], float]:
    """Of gradients and weights; rows are filled up to the longest of the d.

    plain   an all-reduce: 2 (d − 1)/d
    ZeRO 1  the same, and behind the step a gather of the weights (d − 1)/d
    ZeRO 2  a reduce-scatter for each micro-batch instead of the all-reduce
    ZeRO 3  and a gather of each block forward and backward, of the rest once
    """
    d, zero = plan.data, plan.zero
    everything = longest(own.all, d)
    blocks, rest = sum(longest(block, d) for block in own.blocks), longest(own.rest, d)
    gathered = [0, everything, everything, 2 * M * blocks + rest][zero]
    scattered = [0, 0, M * everything, M * (blocks + rest)][zero]
    return {
        ("data", "sum"): ring(d) * w * sum(own.all) * (zero < 2),
        ("data", "scatter"): (d - 1) * w * scattered,
        ("data", "gather"): (d - 1) * w * gathered,
    }


def micro_batches(plan: Plan, B: int) -> int:
    """Of all copies; by default each stage of each copy has one."""
    return -(-B // (plan.rows or B // (plan.data * plan.pipeline)))
