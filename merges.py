"""Byte-pair encoding: merges learnt from counted pieces, and replayed on the ids of a piece.

Idea: give the commonest pair of neighbours an id of its own, again and again. To encode, the merges
are replayed in the order in which they were learnt.

`learn_obviously` is the definition of learning, `learn_merges` gives the same, fast;
`apply_merges_to_long` gives the same as `apply_merges` in less time where pieces are long.

Run: python -m pytest tests/test_tokenizer.py

Papers: Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016 (arXiv 1508.07909).
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import add
from typing import Literal

from tokenizer_files import Pair

Ranks = Mapping[Pair, int]  # of two neighbours; the lower merges first
Tie = Literal["lowest ids", "greatest bytes"]  # which of equally common pairs is merged first

# --- pieces -> merges -----------------------------------------------------------------------------


def pair_counts(words: Mapping[tuple[int, ...], int]) -> Counter[Pair]:
    """How often two ids are neighbours: {(1, 1, 1, 2): 5} -> {(1, 1): 10, (1, 2): 5}."""
    counts: Counter[Pair] = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times
    return counts


def merge(ids: Sequence[int], pair: Pair, new: int) -> tuple[int, ...]:
    """pair becomes new, from left to right: merge((1, 1, 1, 2), (1, 1), 9) -> (9, 1, 2)."""
    out, at = [], 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        out.append(new if found else ids[at])
        at += 2 if found else 1
    return tuple(out)


def learn_obviously(
    counts: Mapping[str, int], tie: Tie = "lowest ids"
) -> Iterator[tuple[Pair, int]]:
    """The definition: count every pair, merge the commonest, repeat. Yields (pair, its count).

    Between equal counts the smallest (left id, right id) wins, or the pair with the greatest
    (left bytes, right bytes). No two merges give the same bytes: between borders that merges did
    not cross, equal bytes are always cut alike.
    """
    words = {tuple(piece.encode()): times for piece, times in counts.items()}
    tokens = [bytes([byte]) for byte in range(256)]
    while pairs := pair_counts(words):
        most = max(pairs.values())
        tied = [pair for pair, count in pairs.items() if count == most]
        if tie == "lowest ids":
            best = min(tied)
        else:
            best = max(tied, key=lambda pair: (tokens[pair[0]], tokens[pair[1]]))
        yield best, most
        words = {merge(word, best, len(tokens)): times for word, times in words.items()}
        tokens.append(tokens[best[0]] + tokens[best[1]])


TIES: dict[str, tuple[Callable[[int], str], Callable[[str, str, int], str]]] = {
    "lowest ids": (chr, lambda left, right, id: chr(id)),
    # Complements turn the greatest into the smallest; a mark behind the end, above all of them,
    # puts the shorter of two behind the longer, and keeps left and right apart in their sum.
    "greatest bytes": (lambda byte: chr(255 - byte) + "\u0100", lambda a, b, id: a[:-1] + b),
}


def learn_merges(counts: Mapping[str, int], tie: Tie = "lowest ids") -> Iterator[tuple[Pair, int]]:
    """The same as `learn_obviously`, but only the words that hold the pair are touched.

    A word is a string whose characters are token ids, chr(id): a merge is then str.replace. The
    heap is lazy: the count of an old pair can only fall (a pair that gains holds the new token), so
    a stale entry is put right when it comes up. Between equal counts the smallest key wins, which
    is the sum of two strings that `tie` gives to tokens.
    """
    first_key, joined_key = TIES[tie]
    keys = {chr(byte): first_key(byte) for byte in range(256)}  # token -> its part of a pair's key
    words = [piece.encode().decode("latin-1") for piece in counts]  # byte b -> chr(b)
    times = list(counts.values())
    pairs: defaultdict[str, int] = defaultdict(int)
    where: defaultdict[str, list[int]] = defaultdict(list)  # pair -> words that held it once
    for index, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pairs[pair] += times[index]
            where[pair].append(index)
    heap = [(-count, keys[pair[0]] + keys[pair[1]], pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    new = chr(256)
    while heap:
        count, key, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], key, pair))
            continue
        yield (ord(pair[0]), ord(pair[1])), -count
        keys[new] = joined_key(keys[pair[0]], keys[pair[1]], ord(new))
        gained = set()
        for index in where.pop(pair):
            parts = words[index].split(pair)
            words[index] = new.join(parts)
            for old_pair, new_pair in seams(parts, pair, new):
                pairs[old_pair] -= times[index]
                pairs[new_pair] += times[index]
                where[new_pair].append(index)
                gained.add(new_pair)
        for left, right in gained:
            heapq.heappush(heap, (-pairs[left + right], keys[left] + keys[right], left + right))
        new = chr(ord(new) + 1)


def seams(parts: list[str], pair: str, new: str) -> Iterator[tuple[str, str]]:
    """Old and new pairs beside a merged pair: x|ab|y -> xa xN, by Ny. parts = word.split(pair).

    Two merged pairs side by side share one seam: ab|ab -> ba NN. Pairs are counted in windows, as
    in `pair_counts`: "aa" twice in "aaa", of which the seam aa|a -> aa Na takes one away.
    """
    last = len(parts) - 1
    for at, part in enumerate(parts):
        if part:
            if at > 0:
                yield pair[1] + part[0], new + part[0]
            if at < last:
                yield part[-1] + pair[0], part[-1] + new
        elif 0 < at < last:
            yield pair[1] + pair[0], new + new


# --- merges -> ids of a piece ---------------------------------------------------------------------


def apply_merges(ids: list[int], ranks: Ranks, made: Sequence[int]) -> list[int]:
    """Merge the pair of lowest rank, and of these the leftmost, until no pair has a rank.

    made[rank] is the id that such a pair becomes. Only the pairs beside it are looked up again.
    """
    none = len(made)
    found = [ranks.get(pair, none) for pair in pairwise(ids)]
    while found and (best := min(found)) < none:
        at = found.index(best)
        ids[at : at + 2] = [made[best]]
        del found[at]
        for beside in range(max(0, at - 1), min(at + 1, len(found))):
            found[beside] = ranks.get((ids[beside], ids[beside + 1]), none)
    return ids


def apply_merges_to_long(ids: list[int], ranks: Ranks, made: Sequence[int]) -> list[int]:
    """The same in O(n log n): a linked list of ids, and a heap of (rank, place)."""
    n = len(ids)
    ids = [*ids, None]  # None, the end and whatever was swallowed, is in no pair with a rank
    before, after = [*range(-1, n)], [*range(1, n + 1), n]
    heap: list[tuple[int, int]] = []

    def offer(at: int) -> None:
        rank = ranks.get((ids[at], ids[after[at]]))
        if rank is not None:
            heapq.heappush(heap, (rank, at))

    for at in range(n):
        offer(at)
    while heap:
        rank, at = heapq.heappop(heap)
        swallowed = after[at]
        if ranks.get((ids[at], ids[swallowed])) != rank:
            continue  # the pair that was offered is gone
        ids[at], ids[swallowed] = made[rank], None
        after[at] = after[swallowed]
        before[after[at]] = at
        offer(at)
        offer(before[at])  # place -1 before the first is the None at the end
    return [id for id in ids if id is not None]
