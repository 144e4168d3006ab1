"""Copies, near-copies and repeated passages: found, so that no text teaches twice or leaks.

Idea: equal things have equal hashes, so copies are found by sorting numbers. For near-copies a text
is the set of its runs of five words, its shingles; two texts are as alike as their sets, by
Jaccard's |A ∩ B| / |A ∪ B|. Under a random order of all shingles the smallest of A and of B is the
same one with just that probability: 112 such orders are a signature of the text (MinHash). Texts
whose signatures agree in a whole band of 8 are candidates, and what is far from alike hardly ever
meets (locality-sensitive hashing). Candidates are compared exactly before anything is linked.

    text_hashes -> first_copies                    copies, up to case and white space
    clusters                                       near-copies; the first of a cluster is kept
    repeated_spans, repeated_lines -> removed      passages, as intervals of characters
    clusters(…, SPLIT) -> split_by_cluster         what is held out, near-copies on one side
    shared_spans                                   the proof: runs of 13 words on both sides

What is decided depends on the texts and their order alone, not on the number of processes.

Run: python -m pytest tests/test_dedup.py

Papers: Broder 1997, "On the resemblance and containment of documents"; Indyk and Motwani 1998
(LSH); Dietzfelbinger et al. 1997 (multiply-shift); Raffel et al. 2020, section 2.2 (arXiv
1910.10683); Lee et al. 2022 (arXiv 2107.06499); Brown et al. 2020, section C (arXiv 2005.14165);
Penedo et al. 2024 (arXiv 2406.17557).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from unicodedata import category, normalize

import numpy as np
import regex
from tqdm import tqdm

from processes import in_processes
from run import UserError

Hashes = np.ndarray  # of uint64
Interval = tuple[int, int]  # characters of a text, from the first up to before the second
Unit = tuple[int, int, str]  # an interval, and what two of them must have in common to be equal
Units = Callable[[str], Iterator[Unit]]

# --- copies ---------------------------------------------------------------------------------------


def canonical(text: str) -> str:
    """What copies have in common: composed characters (NFC), no case, single blanks between words.

    Composed once more at the end, for without case a character may come in parts: "ΐ" of "Ϊ́".
    """
    return normalize("NFC", " ".join(normalize("NFC", text).casefold().split()))


def digest(text: str) -> bytes:
    """64 bits of BLAKE2b: among n different texts two agree by chance once in 2⁶⁵ / n² corpora."""
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def text_hashes(texts: Iterable[str], processes: int = 0) -> Hashes:
    """A hash of each text's canonical form, the same on every machine."""
    refuse_one(texts)

    def hashes_of(group: list[str]) -> bytes:
        return b"".join(digest(canonical(text)) for text in group)

    return numbers(b"".join(in_processes(hashes_of, texts, processes)))


def first_copies(hashes: Hashes) -> np.ndarray:
    """For each hash the index of the first that equals it; those that are their own are kept."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    return first[group]


def numbers(digests: bytes) -> Hashes:
    return np.frombuffer(digests, "<u8")


def refuse_one(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise UserError("texts must be several texts: write [text] for a single one")


def refuse_streams(*sides: Sequence[str]) -> None:
    """Most functions here read texts twice, so that they need not hold them."""
    for texts in sides:
        refuse_one(texts)
        if not isinstance(texts, Sequence):
            kind = type(texts).__name__
            raise UserError(f"texts are read more than once: give a list of them, not a {kind}")


# --- words and their runs -------------------------------------------------------------------------

# Letters, their marks, and digits; in scripts without blanks between words each letter is a word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
SPACED = rf"[[\p{{L}}\p{{N}}]--{UNSPACED}]"
WORD = regex.compile(rf"(?V1){UNSPACED}\p{{M}}*|{SPACED}(?:{SPACED}|\p{{M}})*")
# In UTF-8: ASCII letters become small, what is neither letter nor digit a blank, others remain.
IN_WORDS = bytes(b if b > 127 or chr(b).isalnum() else 32 for b in range(256)).lower()
REMEMBERED = 1 << 18  # parts of texts whose words are remembered: some 40 MB
LONG_PART = 64  # bytes; longer ones hardly come twice
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio


def words_of(text: str) -> list[str]:
    """The words of a text's canonical form, or the form itself if it has none, as "" and "?!"."""
    return WORD.findall(form := canonical(text)) or [form]


class WordHashes(dict):
    """Part of a text, in UTF-8 -> the digests of its words, joined, which are made when asked for.

    Parts end at ASCII signs, which no word goes across. Mostly they are words that came before.
    """

    def __missing__(self, part: bytes) -> bytes:
        form = canonical(part.decode(errors="surrogatepass"))
        digests = b"".join(map(digest, WORD.findall(form)))
        if len(part) < LONG_PART:
            if len(self) >= REMEMBERED:
                self.clear()
            self[part] = digests
        return digests

    def of(self, text: str) -> bytes:
        """The digests of `words_of(text)`, joined."""
        parts = text.encode(errors="surrogatepass").translate(IN_WORDS).split()
        return b"".join(map(self.__getitem__, parts)) or digest(canonical(text))


def runs(texts: Sequence[str], n: int, hashes: WordHashes) -> tuple[Hashes, np.ndarray]:
    """A hash of each run of n words of each text, one text behind the other; their numbers.

    Σ hⱼ ODDⁿ⁻ʲ mod 2⁶⁴ of the words' hashes, then mixed. A text of fewer words has one run, all of
    them; as zeros stand before it, it is never part of another.
    """
    digests = [hashes.of(text).rjust(8 * n, b"\0") for text in texts]
    words = numbers(b"".join(digests))
    lengths = np.array([len(d) // 8 for d in digests], np.int64)
    if not len(words):
        return words, lengths
    last = len(words) - n + 1
    run = words[:last].copy()
    for j in range(1, n):
        run = run * ODD + words[j : j + last]
    whole = np.ones(last, bool)
    ends = np.cumsum(lengths)[:-1]
    for j in range(1, n):
        whole[ends - j] = False  # begins in one text and ends in the next
    return mixed(run[whole]), lengths - n + 1


def mixed(x: Hashes) -> Hashes:
    """Each bit of x into every bit: the last steps of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingles(text: str, n: int, hashes: WordHashes | None = None) -> frozenset[int]:
    """The set of a text's runs of n words, as hashes."""
    run, _ = runs([text], n, WordHashes() if hashes is None else hashes)
    return frozenset(run.tolist())


def jaccard(a: frozenset, b: frozenset) -> float:
    """|a ∩ b| / |a ∪ b|"""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


# --- signatures and candidates --------------------------------------------------------------------

BLOCK = 1 << 15  # runs of words that go through all orders at once: they stay in the cache


@dataclass(frozen=True)
class Likeness:
    """When two texts are near-copies, and how they are looked for."""

    threshold: float = 0.7  # Jaccard similarity of the sets of shingles, from which on
    words: int = 5  # in a shingle
    bands: int = 14  # any of them can make two texts candidates
    rows: int = 8  # minima that must agree in a band
    seed: int = 0  # of the random orders

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold {self.threshold} of likeness must lie in 0 < … ≤ 1")
        for name in ("words", "bands", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} of likeness must be 1 or more")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} of likeness must be 0 or more")

    @property
    def multipliers(self) -> Hashes:
        """Of the bands · rows orders, one odd number each."""
        rng = np.random.Generator(np.random.PCG64(self.seed))
        return rng.integers(0, 2**64, self.bands * self.rows, dtype=np.uint64) | np.uint64(1)


NEAR = Likeness()  # Penedo et al. 2024: 112 minima
SPLIT = Likeness(threshold=0.5, bands=28, rows=4)  # as many, which find 84 % of what is half alike


def chance(s: float, bands: int = 14, rows: int = 8) -> float:
    """1 − (1 − sʳ)ᵇ: that two texts of Jaccard similarity s (or an array) become candidates."""
    return 1 - (1 - s**rows) ** bands


def signatures(run: Hashes, counts: np.ndarray, multipliers: Hashes) -> Hashes:
    """min over a text's runs x of a·x mod 2⁶⁴, for each odd a: (texts, multipliers).

    x ↦ a·x is a bijection, so that equal minima come from equal runs; on hashes that are mixed
    already it is random enough, without the sum and the prime modulus of the textbooks, which cost
    four times as much. Equal runs of one text do not matter to a minimum.
    """
    starts = np.cumsum(counts) - counts
    least = np.full((len(multipliers), len(counts)), 2**64 - 1, np.uint64)
    for at in range(0, len(run), BLOCK):
        block = run[at : at + BLOCK]
        first = np.searchsorted(starts, at, "right") - 1
        end = np.searchsorted(starts, at + len(block))
        begins = np.maximum(starts[first:end] - at, 0)
        for a, minima in zip(multipliers, least[:, first:end], strict=True):
            np.minimum(minima, np.minimum.reduceat(block * a, begins), out=minima)
    return least.T


def band_keys(signatures: Hashes, bands: int) -> np.ndarray:
    """One number for each band of a signature, (bands, texts), in 32 bits: memory is what counts.

    Keys of different bands are not compared, and chance agreement is found when texts are compared.
    """
    rows = signatures.T.reshape(bands, -1, len(signatures))
    key = rows[:, 0]
    for row in range(1, rows.shape[1]):
        key = mixed(key) * ODD + rows[:, row]
    return (mixed(key) >> np.uint64(32)).astype(np.uint32)


def keys_of_all(
    texts: Sequence[str], like: Likeness, hashes: WordHashes, processes: int
) -> np.ndarray:
    """The `band_keys` of all texts; signatures and shingles are held for a few texts only."""
    multipliers = like.multipliers
    weight = 8 * len(multipliers)  # a signature: a group of short texts is no larger than others

    def keys_of(group: list[str]) -> np.ndarray:
        run, counts = runs(group, like.words, hashes)
        return band_keys(signatures(run, counts, multipliers), like.bands)

    keys, done = np.empty((like.bands, len(texts)), np.uint32), 0
    with tqdm(
        total=len(texts), desc="near-copies", unit=" texts", leave=False, disable=None
    ) as bar:
        for part in in_processes(keys_of, texts, processes, lambda text: len(text) + weight):
            keys[:, done : done + part.shape[1]] = part
            done += part.shape[1]
            bar.update(part.shape[1])
    return keys


def buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Of each band the texts whose keys are equal, where there are two or more, in their order."""
    for band in keys:
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order])) + 1
        edges = np.concatenate([[0], edges, [len(order)]])
        for at in np.flatnonzero(np.diff(edges) > 1):
            yield order[edges[at] : edges[at + 1]]


# --- clusters -------------------------------------------------------------------------------------

HELD_SHINGLES = 1 << 20  # of candidates, that are held to be compared again: some 70 MB
HELD_PAIRS = 1 << 19  # found unlike, so that other bands need not ask again: some 70 MB


class Forest:
    """Union–find: disjoint sets of 0 … n − 1, each known by its smallest member."""

    def __init__(self, n: int):
        self.parent = array("q", range(n))

    def find(self, i: int) -> int:
        """The smallest member of i's set. On the way nodes come to skip one (path halving)."""
        parent = self.parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def unite(self, i: int, j: int) -> None:
        i, j = self.find(i), self.find(j)
        self.parent[max(i, j)] = min(i, j)


class Comparison:
    """Texts compared exactly; what was needed lately is remembered."""

    def __init__(self, texts: Sequence[str], like: Likeness, hashes: WordHashes):
        self.texts, self.like, self.hashes = texts, like, hashes
        self.sets: dict[int, frozenset[int]] = {}
        self.held = 0
        self.unlike: set[tuple[int, int]] = set()

    def shingles(self, i: int) -> frozenset[int]:
        if i not in self.sets:
            if self.held >= HELD_SHINGLES:
                self.sets.clear()
                self.held = 0
            self.sets[i] = shingles(self.texts[i], self.like.words, self.hashes)
            self.held += len(self.sets[i])
        return self.sets[i]

    def alike(self, i: int, j: int) -> bool:
        if (i, j) in self.unlike:
            return False
        if jaccard(self.shingles(i), self.shingles(j)) >= self.like.threshold:
            return True
        if len(self.unlike) >= HELD_PAIRS:
            self.unlike.clear()
        self.unlike.add((i, j))
        return False


def link(bucket: Sequence[int], forest: Forest, alike: Callable[[int, int], bool]) -> None:
    """Unite all of a bucket that are alike, as if each were compared with each.

    A text that is linked to a group already is not compared with the rest of it, so that a bucket
    of copies costs one comparison for each and not one for each pair.
    """
    groups: list[list[int]] = []  # linked inside; two that become linked stay two
    for new in bucket:
        home = None
        for group in groups:
            linked = forest.find(group[0]) == forest.find(new)
            if linked or any(alike(old, new) for old in group):
                forest.unite(group[0], new)
                home = group if home is None else home
        if home is None:
            groups.append(home := [])
        home.append(new)


def clusters(texts: Sequence[str], like: Likeness = NEAR, processes: int = 0) -> np.ndarray:
    """For each text the index of the first that it is linked to, over others maybe: keep that one.

    Two texts are linked if they are candidates and, compared exactly, as alike as `like.threshold`
    or more. Texts are read once in order, candidates again by their index; beside them 4 · bands +
    16 bytes are held for each text.
    """
    refuse_streams(texts)
    hashes = WordHashes()
    forest, comparison = Forest(len(texts)), Comparison(texts, like, hashes)
    for bucket in buckets(keys_of_all(texts, like, hashes, processes)):
        link(bucket.tolist(), forest, comparison.alike)
    return np.fromiter(map(forest.find, range(len(texts))), np.int64, len(texts))


# --- repeated passages ----------------------------------------------------------------------------

SPAN = 3  # sentences, as C4 has it
ABBREVIATIONS = r"Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Fig|Eq|Sec|Vol|cf|vs|al|approx|e\.g|i\.e|\p{Lu}"
# Up to the next sentence: . ! ? …, closing signs and white space, if what may begin one follows and
# no abbreviation or initial stands before; 。！？ without white space; an empty line.
SENTENCE_END = regex.compile(
    rf"[.!?…।؟](?<!\b(?:{ABBREVIATIONS})\.)[\"'”’»)\]]*+\s++"
    r"(?=[\"'“‘«(\[]*+[\p{Lu}\p{Lt}\p{Lo}\p{N}])|[。！？][”’」』）]*+\s*+|\n\s*\n"
)
NO_WORD = regex.compile(r"[^\p{L}\p{M}\p{N}]+")
PLAIN_ASCII = bytes(
    ord("0") if chr(b).isdigit() else ord(chr(b).lower()) if chr(b).isalpha() else ord(" ")
    for b in range(128)
).ljust(256)


def sentences(text: str) -> list[Interval]:
    """Sentences and the white space behind each, which together are the text again."""
    cuts = [match.end() for match in SENTENCE_END.finditer(text)]
    return [(a, b) for a, b in pairwise([0, *cuts, len(text)]) if a < b]


def plain(sentence: str) -> str:
    """In lower case, digits as 0, without diacritics; one blank for all between letters."""
    if sentence.isascii():
        return " ".join(sentence.encode().translate(PLAIN_ASCII).decode().split())
    parts = normalize("NFD", sentence)
    bare = "".join(c for c in parts if category(c) != "Mn").lower()
    zeros = "".join("0" if category(c) == "Nd" else c for c in bare)
    return NO_WORD.sub(" ", zeros).strip()


def spans_of(text: str, sentences_each: int = SPAN) -> Iterator[Unit]:
    """Each run of three sentences that are not all empty without signs."""
    places = sentences(text)
    forms = [plain(text[start:end]) for start, end in places]
    for i in range(len(forms) - sentences_each + 1):
        if any(run := forms[i : i + sentences_each]):
            yield places[i][0], places[i + sentences_each - 1][1], "\n".join(run)


def lines_of(text: str, shortest: int) -> Iterator[Unit]:
    """Each line with its line end whose canonical form is so long and holds a word, not a rule."""
    ends = [*accumulate(len(line) + 1 for line in text.split("\n"))]
    for start, end in pairwise([0, *ends]):
        form = canonical(text[start:end])
        if len(form) >= shortest and WORD.search(form):
            yield start, min(end, len(text)), form


def repeated_spans(texts: Sequence[str], processes: int = 0) -> Iterator[list[Interval]]:
    """C4's rule: of a span of three sentences that occurs again, all but the first are removed.

    Gives for each text the intervals to remove, disjoint and in order. Where spans overlap, their
    union goes. It is one pass: what is left may have new neighbours (Raffel et al. 2020).
    """
    return repeated(texts, spans_of, 1, processes)


def repeated_lines(
    texts: Sequence[str], shortest: int = 20, most: int = 5, processes: int = 0
) -> Iterator[list[Interval]]:
    """Lines that a text repeats, and all but the first of those in more than `most` texts.

    Lines are equal if their canonical forms are, which have at least `shortest` characters and a
    word. Gives for each text the intervals to remove, disjoint and in order.
    """
    if most < 1:
        raise UserError(f"a line must be allowed in 1 text or more, not {most}")
    return repeated(texts, lambda text: lines_of(text, shortest), most, processes)


def repeated(
    texts: Sequence[str], units: Units, most: int, processes: int = 0
) -> Iterator[list[Interval]]:
    """The texts are read twice: hashes of all units, then the places of those that are to go.

    Held are 8 bytes for each unit, and some 50 for a moment.
    """
    refuse_streams(texts)

    def hashes_of(group: list[str]) -> tuple[bytes, list[int]]:
        digests = [[digest(form) for _, _, form in units(text)] for text in group]
        return b"".join(map(b"".join, digests)), [*map(len, digests)]

    parts = [*in_processes(hashes_of, texts, processes)]
    counts = np.array([count for _, part in parts for count in part], np.int64)
    hashes = numbers(b"".join(digests for digests, _ in parts))
    del parts
    late, ends = later(hashes, counts, most), np.cumsum(counts)
    for i, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        gone = late[start:end]
        places = zip(units(texts[i]), gone, strict=True) if gone.any() else ()
        yield union(unit[:2] for unit, goes in places if goes)


def later(hashes: Hashes, counts: np.ndarray, most: int) -> np.ndarray:
    """Which units are not the first of their kind in their text, or at all if > most texts have it.

    Text i has the next counts[i] of the units.
    """
    order = np.argsort(hashes, kind="stable")
    text = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
    first = differs(hashes[order])  # of its kind
    first_here = first | differs(text)
    kinds = np.flatnonzero(first)
    common = np.add.reduceat(first_here, kinds, dtype=np.int64) > most
    late = np.empty(len(order), bool)
    late[order] = ~first_here
    late[order] |= ~first & np.repeat(common, np.diff(kinds, append=len(order)))
    return late


def differs(x: np.ndarray) -> np.ndarray:
    """Where x is not what stands before it."""
    return np.concatenate([np.ones(min(1, len(x)), bool), x[1:] != x[:-1]])


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals that come by their starts, those that touch as one: (0, 2), (1, 3) -> (0, 3)."""
    joined: list[Interval] = []
    for start, end in intervals:
        if joined and start <= joined[-1][1]:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end))
    return joined


def removed(text: str, intervals: Iterable[Interval]) -> str:
    """The text without these intervals, which are disjoint and in order."""
    edges = [0, *(edge for interval in intervals for edge in interval), len(text)]
    return "".join(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))


# --- no leak --------------------------------------------------------------------------------------


def split_by_cluster(clusters: np.ndarray, hashes: Hashes, share: float) -> np.ndarray:
    """Which texts to hold out: those of a cluster whose first has a hash below share · 2⁶⁴.

    So near-copies stay on one side, and texts that are added behind the others move none of them,
    unless they link two clusters to one.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share held out, {share}, must lie in 0 … 1")
    if len(clusters) != len(hashes):
        raise UserError(
            f"{len(clusters)} clusters and {len(hashes)} hashes are not of the same texts"
        )
    return (hashes[clusters] >> np.uint64(11)) / 2.0**53 < share


def shared_spans(
    train: Sequence[str], held: Sequence[str], n: int = 13, processes: int = 0
) -> np.ndarray:
    """For each held-out text, how many different runs of n words it shares with training texts.

    0 everywhere: nothing leaks (Brown et al. 2020, section C: n = 13). A text of fewer words is one
    run. Held are 8 bytes for each run of the side with fewer texts; the other one goes past.
    """
    if n < 1:
        raise UserError(f"a run must have 1 word or more, not {n}")
    refuse_streams(train, held)
    hashes = WordHashes()
    few, many = sorted((held, train), key=len)

    def distinct(group: list[str]) -> Hashes:
        return np.unique(runs(group, n, hashes)[0])

    wanted = np.unique(np.concatenate([numbers(b""), *in_processes(distinct, few, processes)]))
    met = np.zeros(len(wanted), bool)
    for places in in_processes(lambda group: found(distinct(group), wanted), many, processes):
        met[places] = True
    both = wanted[met]

    def shared(group: list[str]) -> list[int]:
        return [len(found(distinct([text]), both)) for text in group]

    return np.array([n for part in in_processes(shared, held, processes) for n in part], np.int64)


def found(x: Hashes, among: Hashes) -> np.ndarray:
    """The places in `among` of those x that are there; both are sorted and have no doubles."""
    places = np.searchsorted(among, x)
    inside = places < len(among)
    return places[inside][among[places[inside]] == x[inside]]
