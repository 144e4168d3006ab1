"""WordPiece, BERT's tokenizer: words are cut into the longest pieces that a vocabulary holds.

Idea: a text is normalized (no accents, lower case), cut at blanks and punctuation into words, and
each word into pieces from left to right, always the longest that fits. A piece inside a word is
written with ## before it: `unable` becomes `un ##able`. A word with a place where no piece fits is
[UNK] as a whole. So text is lost, and the law is that of what remains:

    decode(encode(text)) is the normalized text, up to blanks, where nothing is unknown

    count_words -> learn_pieces -> WordPiece.encode, decode, spans -> WordPiece.save, load

`normalize` and `max_match` are the definitions. Their fast versions are a table (each character
becomes others, whatever stands beside it) and a trie with failure links, which reads a character
once (LinMaxMatch). Unicode's tables are those of this Python.

Run: python -m pytest tests/test_wordpiece.py

Papers: Schuster and Nakajima 2012, "Japanese and Korean Voice Search" (learn what makes the text
most likely); Devlin et al. 2018, BERT (arXiv 1810.04805); Song et al. 2021 (arXiv 2012.15524).
"""

import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, count, pairwise
from operator import add
from pathlib import Path
from reprlib import repr as short
from string import punctuation
from typing import Any, Self
from unicodedata import category, combining
from unicodedata import normalize as unicode_form

import numpy as np

from merges import seams
from run import write_whole
from tokenizer_files import read_special
from vocabulary import (
    CACHED_PIECES,
    END_OF_TEXT,
    Memory,
    Span,
    Tokenizer,
    counted,
    loading,
    room_for,
    up_to,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", END_OF_TEXT)
INSIDE = "##"  # before a piece that does not begin a word
LONGEST_WORD = 100  # characters; a longer word is unknown
EQUAL = 1e-12  # relative; scores nearer than this are equal, so that no rounding decides

# --- text -> words --------------------------------------------------------------------------------

# Unicode's White_Space; Python's isspace has four more.
BLANKS = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000")
BLANKS |= {chr(code) for code in range(0x2000, 0x200B)}
CHINESE = (  # first and last of the ideographs that BERT sets apart; 2B820 to 2B91F it forgot
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
HIDDEN = ("Cc", "Cf", "Co")  # kinds of characters that clean_text drops: control, format, private
CHUNKS = re.compile(r"[^ \t\n\r]+")  # cut where words always end, whatever the normalizer

Placed = tuple[str, int]  # a character, and the place in the original text that it comes from


def is_punctuation(char: str) -> bool:
    """Unicode's, and all of ASCII that is neither letter, digit nor blank, such as $ and +."""
    return char in punctuation or category(char)[0] == "P"


@dataclass(frozen=True)
class Normalizer:
    """What BERT does to a text before it is cut, named as in Hugging Face's BertNormalizer."""

    clean_text: bool = True  # drop what cannot be seen; tabs, line ends and the like become blanks
    handle_chinese_chars: bool = True  # a blank on both sides of an ideograph: each is a word
    strip_accents: bool | None = None  # é becomes e; None: if lowercase
    lowercase: bool = True

    def sets_apart(self, char: str) -> bool:
        return self.handle_chinese_chars and any(a <= ord(char) <= b for a, b in CHINESE)


def normalize(text: str, rules: Normalizer) -> list[Placed]:
    """The characters that a text becomes, each with the place of the one it was made from."""
    placed = [(char, at) for at, char in enumerate(text)]
    if rules.clean_text:
        placed = [(c, at) for c, at in placed if c in "\t\n\r" or category(c) not in HIDDEN]
        placed = [(" " if c in BLANKS else c, at) for c, at in placed if c != "\ufffd"]
    placed = [(d, at) for c, at in placed for d in (f" {c} " if rules.sets_apart(c) else c)]
    if rules.lowercase if rules.strip_accents is None else rules.strip_accents:
        placed = [(d, at) for c, at in placed for d in unicode_form("NFD", c)]
        bases = accumulate(combining(c) == 0 for c, _ in placed)  # NFD sorts the marks behind each
        keys = [(base, combining(c)) for base, (c, _) in zip(bases, placed, strict=True)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        placed = [placed[at] for at in order if category(placed[at][0]) != "Mn"]
    if rules.lowercase:  # one by one: in Python "ΑΣ".lower() knows that Σ ends a word
        placed = [(d, at) for c, at in placed for d in c.lower()]
    return placed


def cut(placed: Iterable[Placed]) -> Iterator[list[Placed]]:
    """Words: what stands between blanks, and each punctuation mark for itself."""
    word: list[Placed] = []
    for char, at in chain(placed, [(" ", -1)]):
        apart = is_punctuation(char)
        if word and (apart or char in BLANKS):
            yield word
            word = []
        if apart:
            yield [(char, at)]
        elif char not in BLANKS:
            word.append((char, at))


def as_text(placed: Iterable[Placed]) -> str:
    return "".join(char for char, _ in placed)


class Words(dict):
    """text -> its words, fast: code point -> what it becomes, with blanks where words end.

    Only marks that NFD sorts depend on what stands beside them. Most are accents, which are then
    stripped; a text with one of the few others goes the long way.
    """

    def __init__(self, rules: Normalizer):
        self.rules, self.sorted = rules, set()

    def __missing__(self, code: int) -> str:
        marks = filter(combining, unicode_form("NFD", chr(code)))
        self.sorted.update(chr(code) for mark in marks if category(mark) != "Mn")
        text = as_text(normalize(chr(code), self.rules))
        words = [f" {c} " if is_punctuation(c) else " " if c in BLANKS else c for c in text]
        return self.setdefault(code, "".join(words))

    def of(self, text: str) -> list[str]:
        words = [word for word in text.translate(self).split(" ") if word]
        if not self.sorted.isdisjoint(text):
            words = [as_text(word) for word in cut(normalize(text, self.rules))]
        return words


def count_words(
    texts: Iterable[str],
    normalizer: Normalizer,
    special: Iterable[str] = (),
    progress: bool = False,
    processes: int = 0,
) -> Counter[str]:
    """How often each word occurs; special tokens separate texts and are not counted."""
    words = Words(normalizer)

    def cut(parts: Iterable[str]) -> Counter[str]:
        chunks = Counter(chain.from_iterable(map(CHUNKS.findall, parts)))
        return weighed((words.of(chunk), times) for chunk, times in chunks.items())

    return counted(texts, cut, special, progress, processes)


def weighed(groups: Iterable[tuple[Iterable[Any], int]]) -> Counter[Any]:
    """How often each thing occurs in groups that occur several times."""
    counts: Counter[Any] = Counter()
    for things, times in groups:
        for thing in things:
            counts[thing] += times
    return counts


# --- words -> pieces ------------------------------------------------------------------------------

SCORES: dict[str, Callable] = {  # c(ab), c(a), c(b), N = Σ c -> how much it is worth to join ab
    # What it adds to the log-likelihood of the text as long as no other probability changes: all of
    # them do a little, for a and b get rarer and N smaller.
    "likelihood": lambda ab, a, b, total: ab * np.log(total * ab / (a * b)),
    # e to the power of that for each ab, over N: rare pairs win, unless min_count is high.
    "ratio": lambda ab, a, b, total: ab / (a * b),
}


def letters(word: str) -> list[str]:
    """letters("cab") is ["c", "##a", "##b"]."""
    return [word[0], *(INSIDE + char for char in word[1:])]


def first_pieces(words: Iterable[str]) -> list[str]:
    """Letters that begin words, in the order of their codes, and then those inside."""
    found = {piece for word in words for piece in letters(word)}
    return sorted(found, key=lambda piece: (len(piece), piece))


def learn_pieces(
    counts: Mapping[str, int], score: str = "likelihood", min_count: int = 2
) -> Iterator[tuple[str, float]]:
    """Join the best pair of neighbours, repeat: yields (new piece, its score).

    c counts pieces, or pairs of neighbours; pairs rarer than min_count stay apart. Between equal
    scores the smallest (left id, right id) wins: ids are given to `first_pieces` and then to each
    new piece. The definition, which counts everything each time, is in tests/test_wordpiece.py;
    here only the words that hold the pair are touched.

    A word is a string whose characters are ids, as in merges.learn_merges. All pairs are scored
    at once, in arrays with a place for each. There is no heap: a merge makes its two parts rarer,
    so that scores rise as well as fall. The count of a pair can only fall (one that gains holds the
    new piece), so a pair that is too rare when it comes up gets no place.
    """
    pieces, times = first_pieces(counts), list(counts.values())
    ids = {piece: chr(id) for id, piece in enumerate(pieces)}
    words = ["".join([ids[piece] for piece in letters(word)]) for word in counts]
    single = np.zeros(len(pieces))  # id -> how often
    change: Counter[str] = Counter()  # pair -> how much more often than before
    where: defaultdict[str, list[int]] = defaultdict(list)  # pair -> words that held it once
    for index, word in enumerate(words):
        np.add.at(single, [*map(ord, word)], times[index])
        for pair in map(add, word, word[1:]):
            change[pair] += times[index]
            where[pair].append(index)
    places: dict[str, int] = {}  # pair -> its place in the arrays
    together, parts = np.zeros(0), np.zeros((2, 0), int)  # how often, and the ids
    while True:
        known = [pair for pair in change if pair in places]
        together[[places[pair] for pair in known]] += [change[pair] for pair in known]
        new = [pair for pair, n in change.items() if pair not in places and n >= min_count]
        places.update(zip(new, count(len(places))))
        together = np.append(together, [change[pair] for pair in new])
        parts = np.hstack([parts, np.array([[ord(p[i]) for p in new] for i in (0, 1)], int)])
        alive = np.flatnonzero(together >= min_count)
        if not alive.size:
            return
        left, right = parts[:, alive]
        scores = SCORES[score](together[alive], single[left], single[right], single.sum())
        equal = np.flatnonzero(scores >= scores.max() - EQUAL * abs(scores.max()))
        best = equal[np.lexsort((right[equal], left[equal]))[0]]
        left, right = left[best], right[best]
        pair, new_id, merged = chr(left) + chr(right), chr(len(pieces)), 0
        pieces.append(pieces[left] + pieces[right][len(INSIDE) :])
        yield pieces[-1], float(scores[best])
        change = Counter()
        for index in where.pop(pair):
            rest = words[index].split(pair)
            words[index] = new_id.join(rest)
            merged += times[index] * (len(rest) - 1)
            for old_pair, new_pair in seams(rest, pair, new_id):
                change[old_pair] -= times[index]
                change[new_pair] += times[index]
                where[new_pair].append(index)
        change[pair] -= merged
        np.add.at(single, [left, right], -merged)
        single = np.append(single, merged)


# --- pieces of a word -----------------------------------------------------------------------------


def max_match(word: str, pieces: Collection[str]) -> list[str] | None:
    """The longest piece that begins the rest, again and again; None where none does (BERT).

    Quadratic in the length of the word, and more: each try copies and hashes what it looks up.
    """
    found, start = [], 0
    while start < len(word):
        mark = INSIDE if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if mark + word[start:end] in pieces), None)
        if end is None:
            return None
        found.append(mark + word[start:end])
        start = end
    return found


BEGIN, REST, NOWHERE = 0, 1, -1  # the two roots, and where a link leads that is none
Trie = tuple[Mapping[str, int], list[dict[str, int]], list[int], list[tuple[int, ...]]]


def build_trie(pieces: Mapping[str, int]) -> Trie:
    """All pieces, letter by letter, and at each node v what to do if no edge goes on.

    (pieces, edges, link, pops): edges[v] leads from a letter to the next node; pops[v] are the
    pieces that MaxMatch takes off the front of the letters that lead to v; link[v] is the node of
    the letters then left, or NOWHERE if MaxMatch fails among them. Algorithm 2 of Song et al. 2021,
    with two roots: pieces that begin a word hang from BEGIN, the others, without ##, from REST. In
    the paper ## is a path like others: a word that itself begins with ## is taken for a rest.
    """
    edges, ends = [{}, {}], {}  # ends: node -> the id of the piece that ends there
    ways = [(BEGIN, piece, id) for piece, id in pieces.items()]
    ways += [(REST, piece[len(INSIDE) :], id) for _, piece, id in ways if piece.startswith(INSIDE)]
    for node, rest, id in ways:
        for char in rest:
            node = edges[node].setdefault(char, len(edges))
            if node == len(edges):
                edges.append({})
        ends[node] = id
    link, pops = [NOWHERE] * len(edges), [()] * len(edges)
    queue = deque([BEGIN, REST])  # breadth first: links lead to nodes nearer to a root
    while queue:
        parent = queue.popleft()
        for char, node in edges[parent].items():
            queue.append(node)
            if node in ends:
                link[node], pops[node] = REST, (ends[node],)
                continue
            at, popped = link[parent], pops[parent]
            while at != NOWHERE and char not in edges[at]:
                at, popped = link[at], popped + pops[at]
            if at != NOWHERE:
                link[node], pops[node] = edges[at][char], popped
    return pieces, edges, link, pops


def match(word: str, trie: Trie) -> list[int] | None:
    """The ids of `max_match`, in linear time: LinMaxMatch, algorithm 1 of Song et al. 2021.

    Each character goes down one edge; each failure outputs at least one piece and moves up.
    """
    pieces, edges, link, pops = trie
    if word in pieces:  # MaxMatch's first try, beyond which most words of a text need not go
        return [pieces[word]]
    node, found = BEGIN, []
    for char in word:
        while char not in edges[node]:
            found += pops[node]
            node = link[node]
            if node == NOWHERE:
                return None
        node = edges[node][char]
    while node != REST:
        found += pops[node]
        node = link[node]
        if node == NOWHERE:
            return None if word else []
    return found


# --- the tokenizer --------------------------------------------------------------------------------

TIDY = {  # what Hugging Face's decoder writes instead, in each token with the blank before it
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m",
    " do not": " don't", " 's": "'s", " 've": "'ve", " 're": "'re",
}  # fmt: skip


@dataclass
class WordPiece(Tokenizer):
    """A WordPiece vocabulary; everything else is derived from these six fields."""

    tokens: list[str]  # id -> its piece; "" where the id belongs to a special token or to none
    special: dict[str, int]  # texts that stand for one id each, such as [CLS]
    normalizer: Normalizer = Normalizer()
    unknown: str = SPECIAL[1]  # the token of a word that pieces do not make
    longest_word: int = LONGEST_WORD  # characters; a longer word is unknown
    cleanup: bool = True  # whether decode leaves out the blank before . , ? and !

    def __post_init__(self):
        self._set_tokens(self.tokens)
        self._add_special(str)
        "".join(self._tokens.values()).encode()  # a lone surrogate is a ValueError
        self.unknown_id = self._ids.get(self.unknown, self.special.get(self.unknown))
        if self.unknown_id is None:
            raise ValueError(f"it lacks the token {short(self.unknown)} for words that are unknown")
        if not 1 <= self.longest_word <= 1000:  # links of longer pieces may need any memory
            raise ValueError(f"words of {self.longest_word} letters are not among 1 to 1000")
        longest = self.longest_word + len(INSIDE)
        self._trie = build_trie({t: id for t, id in self._ids.items() if len(t) <= longest})
        words_of = Words(self.normalizer).of
        self._words = Memory(self._encode_word, CACHED_PIECES)
        known = self._words.__getitem__
        self._chunks = Memory(lambda c: chain.from_iterable(map(known, words_of(c))), CACHED_PIECES)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special: Iterable[str] = SPECIAL,
        normalizer: Normalizer = Normalizer(),
        score: str = "likelihood",
        min_count: int = 2,
        alphabet: int = 1000,
        progress: bool = False,
        processes: int = 0,
    ) -> Self:
        """Learn pieces until there are vocab_size ids: special tokens, letters, then pieces.

        Fewer if no pair occurs min_count times. Of all characters the commonest `alphabet` are
        kept, each to begin a word and to go on with one, so that no word of them is unknown; words
        with others are not learnt from. score: a name in SCORES.
        """
        if score not in SCORES or min_count < 1:
            known = " or ".join(SCORES)
            raise ValueError(f"score must be {known}, not {score!r}, and min_count 1 or more")
        special = list(dict.fromkeys(special))
        counts = count_words(texts, normalizer, special, progress, processes)
        kept = [char for char, _ in weighed(counts.items()).most_common(alphabet)]
        apart = {c for c in kept if is_punctuation(c) or normalizer.sets_apart(c)}
        tokens = [*[""] * len(special), *sorted(kept), *sorted(INSIDE + c for c in {*kept} - apart)]
        room = room_for(vocab_size, len(tokens))
        usable = frozenset(kept).issuperset
        words = {w: n for w, n in counts.items() if len(w) <= LONGEST_WORD and usable(w)}
        learnt = up_to(room, learn_pieces(words, score, min_count), progress)
        tokens += [piece for piece, _ in learnt]
        return cls(tokens, {text: id for id, text in enumerate(special)}, normalizer)

    def _encode(self, text: str) -> Iterable[int]:
        return chain.from_iterable(map(self._chunks.__getitem__, CHUNKS.findall(text)))

    def _spans(self, text: str) -> Iterable[Span]:
        """From the first to the last character that left something.

        An accent or a control character that was dropped is inside at most.
        """
        for word in cut(normalize(text, self.normalizer)):
            ids = self._words[as_text(word)]
            inside = [len(self.tokens[id]) - len(INSIDE) for id in ids[1:]]
            lengths = [len(word) - sum(inside), *inside]  # of an unknown word, that of all
            for a, b in pairwise(accumulate(lengths, initial=0)):
                places = [place for _, place in word[a:b]]
                yield min(places), max(places) + 1

    def _encode_word(self, word: str) -> list[int]:
        ids = match(word, self._trie) if len(word) <= self.longest_word else None
        return [self.unknown_id] if ids is None else ids

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """ids -> text: words behind blanks, except before . , ? and ! if `cleanup`."""
        for at, id in enumerate(ids):
            token = self.token(id)
            if at:
                token = token[len(INSIDE) :] if token.startswith(INSIDE) else " " + token
            for untidy, tidy in TIDY.items() if self.cleanup else ():
                token = token.replace(untidy, tidy)
            yield token

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json, whole or not at all."""
        write_whole(Path(path), json.dumps(to_json(self), ensure_ascii=False).encode())

    def save_vocab(self, path: str | Path) -> None:
        """Write BERT's vocab.txt, a token a line, which holds neither the normalizer nor more."""
        tokens = [self._tokens.get(id, "") for id in range(self.vocab_size)]
        check_lines(tokens)
        write_whole(Path(path), "".join(token + "\n" for token in tokens).encode())

    @classmethod
    def load(cls, path: str | Path, normalizer: Normalizer = Normalizer()) -> Self:
        """Read a tokenizer, ours or another's, or say why the ids would not be the same.

        path: a tokenizer.json, a vocab.txt, or a folder with one of them. Only for a vocab.txt,
        which does not tell: the normalizer; it has the special tokens that it has of SPECIAL, and a
        tokenizer.json all added tokens. What surrounds, cuts off or pads the ids of a text
        (post_processor, truncation, padding) is ignored.
        """
        path = Path(path)
        if path.is_dir():
            path = next((p for p in map(path.joinpath, FILES) if p.is_file()), path / FILES[0])
        with loading(path, cls.__name__):
            data = path.read_bytes()
            if data.lstrip().startswith(b"{"):
                return cls(*from_json(json.loads(data)))
            return cls(*from_lines(data), normalizer)


# --- files ----------------------------------------------------------------------------------------

FILES = ("tokenizer.json", "vocab.txt")
WANTED = {  # what stands where in a tokenizer.json: a value, or a type for what may differ
    "normalizer": {
        "type": "BertNormalizer", "clean_text": bool, "handle_chinese_chars": bool,
        "lowercase": bool,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"}, "added_tokens": {"all": list},
    "decoder": {"type": "WordPiece", "prefix": INSIDE, "cleanup": bool},
    "model": {
        "type": "WordPiece", "vocab": dict, "unk_token": str, "continuing_subword_prefix": INSIDE,
        "max_input_chars_per_word": int,
    },
}  # fmt: skip


def check_lines(tokens: Sequence[str]) -> None:
    """A token a line must be read again as the same token, by every program."""
    first: dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if not token or token != token.rstrip() or "\n" in token or "\r" in token:
            raise ValueError(f"its line {number}, {short(token)}, is blank or ends in a blank")
        if first.setdefault(token, number) != number:
            raise ValueError(f"its lines {first[token]} and {number} are both {short(token)}")


def from_lines(data: bytes) -> tuple[list[str], dict[str, int]]:
    """The tokens and special tokens of a vocab.txt; line ends may be Windows', the last missing."""
    lines = [line.removesuffix("\r") for line in data.decode().rstrip("\r\n").split("\n")]
    check_lines(lines)
    found = {text: id for id, text in enumerate(lines) if text in SPECIAL}
    return ["" if line in found else line for line in lines], found


def to_json(ours: WordPiece) -> dict[str, Any]:
    """What Hugging Face's `tokenizers` reads as the same tokenizer."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = sorted((id, text) for text, id in ours.special.items())
    added = [{"id": id, "content": text, "special": True} | plain for id, text in special]
    model = {"type": "WordPiece", "unk_token": ours.unknown, "continuing_subword_prefix": INSIDE}
    model["max_input_chars_per_word"] = ours.longest_word
    model["vocab"] = dict(zip(ours._tokens.values(), ours._tokens, strict=True))
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer"} | asdict(ours.normalizer),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": INSIDE, "cleanup": ours.cleanup},
        "model": model,
    }


def from_json(file: dict[str, Any]) -> tuple:
    """The fields of a WordPiece that a tokenizer.json tells; ValueError for what is not ours."""
    if file.get("normalizer") is None:
        file["normalizer"] = {"type": "BertNormalizer"} | asdict(Normalizer(*[False] * 4))
    if isinstance(model := file.get("model"), dict) and "merges" not in model:
        model.setdefault("type", "WordPiece")  # in old files only BPE tells
    for step, key, wanted in ((s, key, kind) for s in WANTED for key, kind in WANTED[s].items()):
        found = file.get(step)
        found = found.get(key) if isinstance(found, dict) else found
        if type(found) is not wanted and found != wanted:
            wanted = wanted.__name__ if isinstance(wanted, type) else wanted
            raise ValueError(f"its {step}, {key}, is {short(found)}, not {wanted}")
    rules = {name: value for name, value in file["normalizer"].items() if name != "type"}
    accents = rules.setdefault("strip_accents", None)
    if accents not in (None, False, True) or rules.keys() != asdict(Normalizer()).keys():
        raise ValueError(f"its normalizer is not BERT's: {rules}")
    special = dict(map(read_special, added := file["added_tokens"]))
    if len(special) != len(added) or any(token.get("normalized") for token in added):
        raise ValueError("an added token is listed twice, or is looked for in normalized text")
    tokens = by_id({text: id for text, id in model["vocab"].items() if special.get(text) != id})
    fixed = model["unk_token"], model["max_input_chars_per_word"], file["decoder"]["cleanup"]
    return tokens, special, Normalizer(**rules), *fixed


def by_id(vocab: Mapping[str, Any]) -> list[str]:
    """text -> id becomes id -> text, "" where there is none."""
    if "" in vocab or not all(type(id) is int and id >= 0 for id in vocab.values()):
        raise ValueError("a token of its vocab is empty, or its id is no number from 0 on")
    texts = {id: text for text, id in vocab.items()}
    last = max(texts, default=-1)
    if len(texts) < len(vocab) or last > 2 * len(texts) + 1024:  # real ones have gaps of a few ids
        raise ValueError(f"its vocab has an id twice, or {last} is far beyond the number of tokens")
    return [texts.get(id, "") for id in range(last + 1)]
