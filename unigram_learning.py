"""A unigram language model learnt: which pieces to keep, and how likely each one is.

Idea: begin with all substrings that are often seen. Count each by how likely it is in all ways to
cut each word (forward-backward), make probabilities of these counts, drop the pieces that are
missed least, repeat (expectation maximization). All words of a text go through it at once.

    required_characters, seeds -> Lattice.expected, maximized, pruned, and again -> final_pieces

Run: python -m pytest tests/test_unigram.py

Papers: Kudo 2018, "Subword Regularization" (arXiv 1804.10959), section 3.2.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import regex
from tqdm import tqdm

from sentencepiece_files import SPACE

MOST_SEEDS = 1_000_000
UNKNOWN_PENALTY = 10.0  # how much less likely than the rarest piece a character without one is

# --- text -> runs, which no piece crosses ---------------------------------------------------------

LONGEST_RUN = 256  # characters
END = (
    "\0"  # of a word in a text of many; no piece may hold it, for SentencePiece's tries end with it
)
SCRIPTS = (  # a piece has letters of one of these, or none; letters of others stay single
    "Latin Greek Cyrillic Armenian Georgian Hebrew Arabic Syriac Thaana Devanagari Bengali "
    "Gurmukhi Gujarati Oriya Tamil Telugu Kannada Malayalam Sinhala Thai Lao Tibetan Myanmar "
    "Hangul Ethiopic Cherokee Khmer Mongolian Bopomofo Yi Inherited"
)
ALPHABETS = [
    r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc]",  # Japanese mixes them in one word
    rf"[^\P{{Common}}{SPACE}{END}]",  # digits and punctuation
    *(rf"\p{{{script}}}" for script in SCRIPTS.split()),
]
RUNS = regex.compile(
    f"{SPACE}?(?:{'|'.join(f'{a}{{1,{LONGEST_RUN}}}' for a in ALPHABETS)}|[^{SPACE}{END}])|{SPACE}"
)


def required_characters(counts: Mapping[str, int], coverage: float) -> set[str]:
    """The commonest characters that make up this part of the text."""
    chars: Counter[str] = Counter()
    for word, times in counts.items():
        for char in word:
            chars[char] += times
    del chars[END]
    kept, seen, total = set(), 0, chars.total()
    for char, times in sorted(chars.items(), key=lambda item: (-item[1], item[0])):
        if seen >= coverage * total:
            break
        kept.add(char)
        seen += times
    return kept


# --- words -> seeds -------------------------------------------------------------------------------


@dataclass
class Seeds:
    """The pieces that training begins with, and all places where they fit.

    table[m - 1, i] is the piece that begins at the text's character i and has m characters, or -1;
    piece n is the text at starts[n] with lengths[n] characters.
    """

    text: str
    table: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray

    def pieces(self) -> list[str]:
        ends = self.starts + self.lengths
        return [self.text[a:b] for a, b in zip(self.starts.tolist(), ends.tolist(), strict=True)]

    def keep(self, kept: np.ndarray) -> "Seeds":
        """Only some of the pieces, with new numbers in the same order."""
        new = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1).astype(np.int32)  # -1 stays -1
        rest = (x[kept] for x in (self.starts, self.lengths, self.counts))
        return Seeds(self.text, new[self.table], *rest)


def seeds(text: str, runs: np.ndarray, times: np.ndarray, longest: int, most: int) -> Seeds:
    """All characters, and the `most` best of all substrings by count × length.

    text: different words, each with END behind it; runs (start, end) that no piece crosses; how
    often the word of each character occurs. A substring must occur in two places, and is dropped
    if the same character always follows, for the longer one stands for it; as in SentencePiece
    also if that character is END, where no longer one is a piece and nothing stands for it.
    Substrings of m + 1 characters are told apart by the number of their first m and the last, so
    that all are counted without making any.
    """
    _, chars = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    chars[:-1][(chars[:-1] == 0) & (chars[1:] == 0)] = chars.max() + 1  # a text's end
    left = np.zeros(len(text), np.int64)
    lengths = runs[:, 1] - runs[:, 0]
    offset = ranges(lengths)
    left[np.repeat(runs[:, 0], lengths) + offset] = np.repeat(lengths, lengths) - offset
    at = np.flatnonzero(left)
    number = chars[at]
    table, found, size = np.full((longest, len(text)), -1, np.int32), [], 0
    for length in range(1, longest + 1):
        _, first, longer = np.unique(
            number * (chars.max() + 1) + chars[at + length],
            return_index=True,
            return_inverse=True,
        )
        count = np.bincount(number, times[at])
        fine = (np.bincount(number[first], minlength=len(count)) > 1) | (
            (count > 0) & (length == 1)
        )
        new = np.where(fine, np.cumsum(fine) - 1 + size, -1)
        table[length - 1, at] = new[number]
        place = np.zeros(len(count), np.int64)
        place[number[::-1]] = at[::-1]
        found.append((place[fine], np.full(fine.sum(), length), count[fine]))
        size += len(found[-1][0])
        on = (left[at] > length) & (count[number] > 1)
        at, number = at[on], longer[on]
    out = Seeds(text, table, *map(np.concatenate, zip(*found, strict=True)))
    score = np.where(out.lengths == 1, np.inf, out.counts * out.lengths)
    return out if size <= most else out.keep(score >= np.partition(score, -most)[-most])


def ranges(lengths: np.ndarray) -> np.ndarray:
    """0 1 … n - 1 for each length n, one behind the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


# --- expectation maximization ---------------------------------------------------------------------


def digamma(x: np.ndarray) -> np.ndarray:
    """ψ(x) = d/dx log Γ(x), for x > 0.

    ψ(x) = ψ(x + 1) - 1/x until x ≥ 10; from there Stirling's series log x - 1/2x - Σ B₂ₙ / 2n x²ⁿ.
    """
    x, out = np.array(x, float), 0.0
    for _ in range(10):
        out = out - np.where(x < 10, 1 / x, 0)
        x = np.where(x < 10, x + 1, x)
    y = 1 / x**2
    series = 1 / 252 - y * (1 / 240 - y / 132)  # what follows is below 1e-13
    return out + np.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * series))


class Lattice:
    """All ways to cut all words at once.

    A word of n characters has n + 1 nodes, the places where it may be cut; each piece that fits is
    an edge from its start to its end. Words go forward together, character by character: an edge
    that ends k characters behind its word's beginning needs only nodes nearer to it.
    """

    def __init__(self, start, end, piece, lengths, times):
        """Edges as node, node, piece; how long the words are and how often they occur."""
        self.start, self.end, self.piece, self.times = start, end, piece, times
        self.last = np.cumsum(lengths + 1) - 1
        self.first = self.last - lengths
        self.word = np.repeat(np.arange(len(lengths)), lengths + 1)  # of each node
        depth = np.arange(len(self.word)) - self.first[self.word]
        self.forth = steps(depth[end], end)
        self.back = steps(-depth[start], start)

    def reach(self, log_p: np.ndarray, join: np.ufunc, back: bool = False) -> np.ndarray:
        """Of each node: join (a sum or a maximum) over all paths from the word's beginning, or end.

        With np.logaddexp the α of the forward-backward algorithm, and back its β.
        """
        order, groups = self.back if back else self.forth
        source, target = (self.end, self.start) if back else (self.start, self.end)
        source, target, value = source[order], target[order], log_p[self.piece[order]]
        out = np.full(len(self.word), -np.inf)
        out[self.last if back else self.first] = 0
        for low, high, cuts in groups:
            paths = out[source[low:high]] + value[low:high]
            out[target[low + cuts]] = join.reduceat(paths, cuts)
        return out

    def expected(self, log_p: np.ndarray) -> tuple[float, np.ndarray]:
        """The E-step: log-likelihood of all words, and how often each piece is expected in them.

        Σ times · log P(word), P(word) = Σ Π p over its segmentations (Kudo, eq. 3 and 4). The
        posterior of an edge is exp(α(start) + log p + β(end)) / P(word).
        """
        alpha = self.reach(log_p, np.logaddexp)
        beta = self.reach(log_p, np.logaddexp, back=True)
        total = alpha[self.last]
        word = self.word[self.start]
        posterior = np.exp(alpha[self.start] + log_p[self.piece] + beta[self.end] - total[word])
        counts = np.bincount(self.piece, posterior * self.times[word], len(log_p))
        return float(self.times @ total), counts

    def best(self, log_p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each word the log-probability of its best path, and the edges of all these paths.

        A word that cannot be cut has -inf and no edges.
        """
        alpha = self.reach(log_p, np.maximum)
        best = np.flatnonzero(alpha[self.start] + log_p[self.piece] == alpha[self.end])
        came = np.zeros(len(self.word), np.int64)
        came[self.end[best]] = best
        nodes, edges = self.last[np.isfinite(alpha[self.last])], []
        while len(nodes):
            nodes = nodes[nodes != self.first[self.word[nodes]]]
            edges.append(came[nodes])
            nodes = self.start[edges[-1]]
        return alpha[self.last], np.concatenate([*edges, np.empty(0, np.int64)])


def steps(depth: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, list]:
    """Edges in order of depth, then of node; each depth as (from, to, where a node begins)."""
    order = np.lexsort((node, depth))
    depth, node = depth[order], node[order]
    bounds = [0, *np.flatnonzero(np.diff(depth)) + 1, len(depth)] if len(depth) else []
    new = np.flatnonzero(np.diff(node, prepend=-1))
    cuts = np.searchsorted(new, bounds)
    parts = [
        (low, high, new[a:b] - low)
        for low, high, a, b in zip(bounds, bounds[1:], cuts, cuts[1:], strict=False)
    ]
    return order, parts


def ways(seeds: Seeds, starts, lengths, times, whole: bool = True) -> Lattice:
    """The lattice of words, each a part of the seeds' text; or without words that are one piece."""
    word = np.repeat(np.arange(len(starts)), lengths)
    offset = ranges(lengths)
    place, left, node = starts[word] + offset, lengths[word] - offset, np.arange(len(word)) + word
    parts = []
    for length, row in enumerate(seeds.table, 1):
        piece = row[place]
        fits = (piece >= 0) & (length <= left)
        fits = np.flatnonzero(fits if whole else fits & (length < lengths[word]))
        parts.append((node[fits], node[fits] + length, piece[fits]))
    return Lattice(*map(np.concatenate, zip(*parts, strict=True)), lengths, times)


def maximized(expected: np.ndarray, single: np.ndarray, bayesian: bool = True) -> np.ndarray:
    """The M-step: log p = ψ(c) - ψ(Σ c), or the maximum of the likelihood, log c - log Σ c.

    Bayesian (SentencePiece): what a sparse Dirichlet prior makes of counts; ψ(c) < log c, most so
    where c is small, so that rare pieces get rarer. It does not maximize the likelihood. Pieces
    expected less than half a time go; single characters stay, as unlikely as unknown ones.
    """
    if not bayesian:
        with np.errstate(divide="ignore"):
            return np.log(expected / expected.sum())
    alive = expected >= 0.5
    log_p = np.full(len(expected), -np.inf)
    log_p[alive] = digamma(expected[alive]) - digamma(expected[alive].sum())
    log_p[single & ~alive] = log_p[alive].min(initial=0) - UNKNOWN_PENALTY
    return log_p


def pruned(seeds: Seeds, lattice: Lattice, log_p: np.ndarray, size: int) -> np.ndarray:
    """The `size` pieces that the likelihood would miss most (and characters, which always stay).

    A piece that occurs f times in the best segmentations, of S pieces in all, would be replaced by
    the k pieces of its own second best one. The loss, for Kudo's L (section 3.2), is
    f · [log f/S - Σ log (f' + f) / (S + f (k - 1))] over these, with f' as they occur now. Pieces
    that occur in none, as those that are better cut themselves, go; those without an alternative
    stay.
    """
    _, edges = lattice.best(log_p)
    times = lattice.times[lattice.word[lattice.start[edges]]]
    f = np.bincount(lattice.piece[edges], times, len(log_p))
    total = f.sum()
    others = ways(seeds, seeds.starts, seeds.lengths, np.ones(len(f)), whole=False)
    second, edges = others.best(log_p)
    mine = others.word[others.start[edges]]  # the piece whose alternative this edge is in
    k = np.bincount(mine, minlength=len(f))
    with np.errstate(divide="ignore", invalid="ignore"):
        joined = np.bincount(mine, np.log(f[others.piece[edges]] + f[mine]), len(f))
        loss = f * (np.log(f / total) - joined + k * np.log(total + f * (k - 1)))
    fixed = (f > 0) & np.isneginf(second)
    candidates = np.flatnonzero(~fixed & (f > 0))
    room = max(0, size - int(fixed.sum()))
    fixed[candidates[np.argsort(-loss[candidates], kind="stable")[:room]]] = True
    return fixed


def learn(
    counts: Mapping[str, int], size: int, room: int, longest: int = 16, progress: bool = False
) -> dict[str, float]:
    """Words and their counts -> pieces and their log-probabilities.

    EM, twice, and pruning by a quarter, down to 1.1 · size; then all single characters, and of the
    others the likeliest that there is room for.
    """
    text = "".join(word + END for word in counts)
    runs = np.array([match.span() for match in RUNS.finditer(text)])
    if not len(runs):
        return {}
    times = np.repeat([*counts.values()], [len(word) + 1 for word in counts])
    found = seeds(text, runs, times, longest, MOST_SEEDS)
    where: dict[str, int] = {}
    same = [where.setdefault(text[a:b], at) for at, (a, b) in enumerate(runs.tolist())]
    runs, times = runs[[*where.values()]], np.bincount(same, times[runs[:, 0]])[[*where.values()]]
    single, score = found.lengths == 1, found.counts * found.lengths
    log_p = np.log(score / score.sum())
    bar = tqdm(desc="prune", unit=" rounds", disable=None if progress else True)
    while True:
        lattice = ways(found, runs[:, 0], runs[:, 1] - runs[:, 0], times)
        for _ in range(2):
            expected = lattice.expected(log_p)[1]
            log_p = maximized(expected, single)
        alive = int((expected >= 0.5).sum())
        bar.update()
        bar.set_postfix(pieces=alive)
        if alive <= 1.1 * size:
            break
        keep = pruned(found, lattice, log_p, int(max(1.1 * size, 0.75 * alive)))
        log_p[single & ~keep] = log_p[keep].min() - UNKNOWN_PENALTY
        found, log_p, single = (
            found.keep(keep | single),
            log_p[keep | single],
            single[keep | single],
        )
        if keep.sum() == alive:
            break
    bar.close()
    return final_pieces(dict(zip(found.pieces(), log_p.tolist(), strict=True)), room)


def final_pieces(log_p: dict[str, float], room: int) -> dict[str, float]:
    """Every character, the rare ones like the rarest, and of the others the likeliest; in order."""
    likely = sorted((-p, text) for text, p in log_p.items() if math.isfinite(p))
    chars = [text for _, text in likely if len(text) == 1]
    others = [text for _, text in likely if len(text) > 1][: max(0, room - len(chars))]
    least = min((log_p[text] for text in others), default=-math.inf)
    scores = {text: max(log_p[text], least) for text in chars + others}
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))
