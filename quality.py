"""Which texts are worth training on: rules with published bounds, and a guess of the language.

Idea: most of a crawl is menus, lists and noise. Each rule here is one number about a text and a
bound that it must keep; a preset is a list of rules, and the first that fails is the reason why a
text was dropped. Rules see form alone. Which language it is, a model of letters guesses by naive
Bayes: how probable is each letter behind the two before it, under each label?

Bounds mean nothing without these definitions:

    word         what stands between white space; with no letter or digit in it, it is a symbol
    line         what stands between line feeds, without the blanks around it; empty ones are none
    paragraph    what stands between empty lines
    duplicate    a line, paragraph or n-gram that stood in the same text before: the first is none
    n-gram       n neighbouring words as they are written, whatever lines they stand on
    characters   of lines and paragraphs as above; of words those of all words, without blanks
    sentence     ends in . ! or ?, perhaps closing quotes or brackets, and then white space

Run: python -m pytest tests/test_quality.py

Papers: Rae et al. 2021, section A.1.1 and table A1 (Gopher, arXiv 2112.11446); Raffel et al. 2020,
section 2.2 (C4, arXiv 1910.10683); Penedo et al. 2024 (FineWeb, arXiv 2406.17557).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from run import UserError

# --- a text, counted ------------------------------------------------------------------------------

SYMBOLS = re.compile(r"[^\w\s]+|_+")
BARE_ASCII = str.maketrans(string.ascii_uppercase, string.ascii_lowercase, string.punctuation)
PARAGRAPH = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"[.!?。！？][\"')\]”’]*\s|[。！？]")
TERMINAL = (".", "!", "?", '"', "'", "”", "’", "…", "。", "！", "？", "」")
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
BULLETS, DOTS = ("•", "-"), ("...", "…")
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses no bit
MANY_WORDS = 400  # from here on arrays beat dictionaries


class Statistics:
    """What the rules ask about a text, counted once."""

    def __init__(self, text: str):
        self.text = text
        self.lines = [*filter(None, map(str.strip, text.split("\n")))]
        self.words = text.split()
        self.bare = bare(text).split()
        self.repetition = Repetition(self.words)

    def lines_that(self, test: Callable[..., bool], argument: object) -> float:
        """The share of lines for which test(line, argument) holds."""
        return share(sum(test(line, argument) for line in self.lines), len(self.lines))

    @property
    def paragraphs(self) -> list[str]:
        return [*filter(None, map(str.strip, PARAGRAPH.split(self.text)))]

    @property
    def with_letter(self) -> int:
        """Words with at least one letter."""
        return sum(word.isalpha() or any(map(str.isalpha, word)) for word in self.bare)


def bare(text: str) -> str:
    """A text in lower case, of whose words only letters and digits are left."""
    if text.isascii():
        return text.translate(BARE_ASCII)
    if "\n" in text:
        return "\n".join(map(bare, text.split("\n")))
    return SYMBOLS.sub("", text).lower()


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing is nothing."""
    return part / whole if whole else 0.0


def duplicates(parts: Sequence[str]) -> float:
    """The share of parts that stood there before."""
    return share(len(parts) - len(set(parts)), len(parts))


def duplicate_text(parts: Sequence[str]) -> float:
    """The share of all parts' characters that is in parts which stood there before."""
    whole = sum(map(len, parts))
    return share(whole - sum(map(len, set(parts))), whole)


# --- repeated n-grams -----------------------------------------------------------------------------


def grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def top_obviously(words: Sequence[str], n: int) -> float:
    """The share of characters covered by the commonest n-gram; 0 if none occurs twice.

    Of equally common ones that which stands first. What two of its places share counts once.
    """
    found = grams(words, n)
    if len(set(found)) == len(found):
        return 0.0
    counts = Counter(found)
    top = max(counts, key=counts.__getitem__)
    return covered_obviously(words, [i for i, gram in enumerate(found) if gram == top], n)


def repeated_obviously(words: Sequence[str], n: int) -> float:
    """The share of characters covered by n-grams that stood there before."""
    found = grams(words, n)
    if len(set(found)) == len(found):
        return 0.0
    first: dict[tuple[str, ...], int] = {}
    return covered_obviously(
        words, [i for i, gram in enumerate(found) if first.setdefault(gram, i) < i], n
    )


def covered_obviously(words: Sequence[str], places: Iterable[int], n: int) -> float:
    inside = {i + k for i in places for k in range(n)}
    return share(sum(len(words[i]) for i in inside), sum(map(len, words)))


class Repetition:
    """`top_obviously` and `repeated_obviously` of one text for several n, fast for long texts too.

    An n-gram of a long text is known by a hash of its words' numbers, of 64 bits less those that
    its place takes: of 16,000 words (100 kB) two different ones are taken for one with a
    probability of 1e-7. Only what a shorter n-gram that occurs twice begins with is looked at.
    """

    def __init__(self, words: Sequence[str]):
        self.words = words
        self.longest = len(words)  # no n-gram of more words than this occurs twice
        self.sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def top(self, n: int) -> float:
        return self._share(n, top_obviously, self._top)

    def repeated(self, n: int) -> float:
        return self._share(n, repeated_obviously, self._repeated)

    def _share(self, n: int, obvious: Callable, fast: Callable) -> float:
        if n > self.longest:
            return 0.0
        value = obvious(self.words, n) if len(self.words) < MANY_WORDS else fast(n)
        if not value:
            self.longest = n - 1  # a longer n-gram that occurs twice holds one of n that does
        return value

    @cached_property
    def _ids(self) -> np.ndarray:
        number = {word: i for i, word in enumerate(dict.fromkeys(self.words), 1)}
        return np.fromiter(map(number.__getitem__, self.words), np.uint64, len(self.words))

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    def _twice(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of n-grams that occur twice, equal ones together; which is first of its kind."""
        if n not in self.sorted:
            places = np.sort(self._twice(n - 1)[0]) if n > 1 else np.arange(len(self.words))
            places = places[places <= len(self.words) - n]
            mask = np.uint64((1 << len(self.words).bit_length()) - 1)
            keys = hash_windows(self._ids, places, n) & ~mask | places.astype(np.uint64)
            keys.sort()  # much faster than argsort
            places, kinds = (keys & mask).astype(np.int64), keys & ~mask
            first = np.ones(len(places), bool)
            first[1:] = kinds[1:] != kinds[:-1]
            alone = first.copy()
            alone[:-1] &= first[1:]
            self.sorted[n] = places[~alone], first[~alone]
        return self.sorted[n]

    def _top(self, n: int) -> float:
        places, first = self._twice(n)
        if not len(places):
            return 0.0
        starts = np.flatnonzero(first)
        times = np.diff(starts, append=len(places))
        most = times.max()
        start = min(starts[times == most], key=places.__getitem__)
        return self._covered(places[start : start + most], n)

    def _repeated(self, n: int) -> float:
        places, first = self._twice(n)
        return self._covered(places[~first], n)

    def _covered(self, places: np.ndarray, n: int) -> float:
        inside = np.zeros(len(self.words), bool)
        for k in range(n):
            inside[places + k] = True
        return share(int(self._lengths[inside].sum()), int(self._lengths.sum()))


def hash_windows(numbers: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """Σ numbers[i + k] · m^(n−k) mod 2^64 for each place i (uint64); high bits are mixed best."""
    hashes = np.zeros(len(places), np.uint64)
    for k in range(n):
        hashes += numbers[places + k]
        hashes *= MIX
    return hashes


# --- rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """least ≤ measure(statistics) ≤ most, or the text is dropped for `name`."""

    name: str
    measure: Callable[[Statistics], float]
    least: float = 0
    most: float = float("inf")


GOPHER = (  # Rae et al., section A.1.1, "Quality Filtering"
    Rule("number of words", lambda s: len(s.bare), 50, 100_000),
    Rule("mean word length", lambda s: share(sum(map(len, s.bare)), len(s.bare)), 3, 10),
    Rule("# per word", lambda s: share(s.text.count("#"), len(s.bare)), most=0.1),
    Rule("ellipses per word", lambda s: share(sum(map(s.text.count, DOTS)), len(s.bare)), most=0.1),
    Rule("lines with a bullet", lambda s: s.lines_that(str.startswith, BULLETS), most=0.9),
    Rule("lines that end in an ellipsis", lambda s: s.lines_that(str.endswith, DOTS), most=0.3),
    Rule("words with a letter", lambda s: share(s.with_letter, len(s.words)), 0.8),
    Rule("different stop words", lambda s: len(STOP_WORDS.intersection(s.bare)), 2),
)


def top(n: int, most: float) -> Rule:
    return Rule(f"commonest {n}-gram", lambda s: s.repetition.top(n), most=most)


def repeated(n: int, most: float) -> Rule:
    return Rule(f"duplicate {n}-grams", lambda s: s.repetition.repeated(n), most=most)


GOPHER_REPETITION = (  # Rae et al., table A1
    Rule("duplicate lines", lambda s: duplicates(s.lines), most=0.3),
    Rule("duplicate paragraphs", lambda s: duplicates(s.paragraphs), most=0.3),
    Rule("characters in duplicate lines", lambda s: duplicate_text(s.lines), most=0.2),
    Rule("characters in duplicate paragraphs", lambda s: duplicate_text(s.paragraphs), most=0.2),
    top(2, 0.20),
    top(3, 0.18),
    top(4, 0.16),
    repeated(5, 0.15),
    repeated(6, 0.14),
    repeated(7, 0.13),
    repeated(8, 0.12),
    repeated(9, 0.11),
    repeated(10, 0.10),
)
# Raffel et al., section 2.2, as printed in JMLR 21: 5 sentences a page, 3 words a line. The later
# text on arXiv and the authors' code (TensorFlow Datasets, c4_utils.py) have 3 and 5.
C4_SENTENCES, C4_WORDS = 5, 3
C4 = (  # what drops a page; `clean_c4` drops lines
    Rule("lorem ipsum", lambda s: s.text.lower().count("lorem ipsum"), most=0),
    Rule("curly brackets", lambda s: s.text.count("{"), most=0),
    Rule("number of sentences", lambda s: len(SENTENCE.findall(s.text + " ")), C4_SENTENCES),
)
FINEWEB = (  # Penedo et al., section 3.6; 0.01 is that of their code
    Rule("lines with terminal punctuation", lambda s: s.lines_that(str.endswith, TERMINAL), 0.12),
    Rule("short lines", lambda s: s.lines_that(lambda line, n: len(line) <= n, 30), most=0.67),
    Rule(
        "characters in duplicate lines, FineWeb",
        lambda s: duplicate_text(s.lines),
        most=0.01,
    ),
    Rule("line feeds per word", lambda s: share(s.text.count("\n"), len(s.words)), most=0.3),
)
WEB = GOPHER + GOPHER_REPETITION + C4 + FINEWEB


INFINITY = float("inf")
# Docstrings, comments and manuals are short, and full of code, options and tables. Behind each rule
# stands the share of 7,558 docstrings, comments and manual pages of Python 3.11 (80 characters or
# more) that fails it as published: nearly all of these are as good as text of their kind gets.
FOR_DOCS = {
    "number of words": (10, 100_000),  # 77 %: one sentence is a document; below 10 mostly titles
    "different stop words": (1, INFINITY),  # 20 %: one sentence has few
    "words with a letter": (0.7, INFINITY),  # 3.6 %: examples hold numbers and operators
    "commonest 2-gram": (0, 0.3),  # 1.7 %: in one sentence "the process" may well stand twice
    "commonest 3-gram": (0, 0.27),  # 2.1 %
    "commonest 4-gram": (0, 0.24),  # 1.8 %
    "curly brackets": None,  # 1.4 %: sets and dictionaries, which is what they explain
    "number of sentences": None,  # 87 %: a comment often ends without a full stop
    "lines with terminal punctuation": None,  # 17 %: lines are broken where they are full
    "characters in duplicate lines, FineWeb": None,  # 3.1 %: examples repeat; Gopher's bound holds
    "line feeds per word": (0, 0.5),  # 2.9 %: lists of arguments
}
DOCS = tuple(
    replace(rule, least=FOR_DOCS[rule.name][0], most=FOR_DOCS[rule.name][1])
    if rule.name in FOR_DOCS
    else rule
    for rule in WEB
    if FOR_DOCS.get(rule.name, rule) is not None
)
PRESETS: dict[str, tuple[Rule, ...]] = {"web": WEB, "docs": DOCS, "none": ()}


class Verdict(NamedTuple):
    """Whether a text is kept; if not the rule that it fails, its value, and the bound."""

    kept: bool
    rule: str = ""
    value: float = 0.0
    bound: float = 0.0


def check(text: str, preset: str = "web") -> Verdict:
    """The first rule of the preset, in its order, that the text fails; UserError if unknown."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r} of rules: choose {', '.join(PRESETS)}")
    statistics = Statistics(text)
    for rule in PRESETS[preset]:
        value = rule.measure(statistics)
        if not rule.least <= value <= rule.most:
            bound = rule.least if value < rule.least else rule.most
            return Verdict(False, rule.name, value, bound)
    return Verdict(True)


# --- lines, as C4 ---------------------------------------------------------------------------------

C4_TERMINAL = (".", "!", "?", '"', "'", "”", "’")
C4_CITATION = re.compile(r"\[(?:[0-9]{0,9}|edit|citation needed)\]")
C4_POLICY = re.compile(
    "javascript|terms of use|privacy policy|cookie policy|uses? cookies|use of cookies"
)


def clean_c4(text: str, terminal: bool = True) -> str:
    """The lines that C4 keeps, without citations such as [1] (Raffel et al., section 2.2).

    A line goes if it has fewer than C4_WORDS or one of more than 1000 characters, names javascript
    or a policy on cookies or privacy, or (unless terminal is False, as in FineWeb) does not end in
    a full stop, question or exclamation mark or closing quote, or ends in "...". Of blank lines,
    which C4 drops too, one stays between paragraphs. Pages are dropped by the rules of `check`.
    """
    kept: list[str] = []
    for line in text.split("\n"):
        between = not line.strip() and kept and kept[-1]
        if between or c4_keeps(line, terminal):
            kept.append(uncited(line))
    return "\n".join(kept).rstrip("\n")


def uncited(line: str) -> str:
    """A line without citations, and without the blanks around it."""
    return C4_CITATION.sub("", line).strip()


def c4_keeps(line: str, terminal: bool = True) -> bool:
    """Whether something of a line stays, as `clean_c4` says."""
    line = uncited(line)
    words = line.split()
    if len(words) < C4_WORDS or (len(line) > 1000 and max(map(len, words)) > 1000):
        return False
    if terminal and (not line.endswith(C4_TERMINAL) or line.endswith("...")):
        return False
    return not C4_POLICY.search(line.lower())


# --- a model of letters ---------------------------------------------------------------------------

ORDERS = (1, 2, 3)  # letters that are looked at together
BITS = 15  # of a bucket's number
BUCKETS = 1 << BITS  # of each order; n-grams that share one are taken for the same
SMOOTHING = 0.05  # what an n-gram that was never seen counts
# Letters after which a guess gets no surer. With 16 one of the language is as sure as it is right:
# 98 % of held-out sentences (98 % sure), 90 % of pieces of 30 letters (92 %), 86 % of 20 (91 %).
STRETCH = 16


class Guess(NamedTuple):
    """A label and how sure it is, from 0 to 1."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Letters:
    """Naive Bayes over letters: log P(label | text) = Σᵢ log p(n-gramᵢ | label) + constant.

    The sum is a mean over n = 1, 2, 3, which see the same letters, and over places, times STRETCH:
    neighbours are not independent, and a book is no surer than its sentences are.
    """

    labels: tuple[str, ...]
    log: np.ndarray  # orders, buckets, labels: log p(n-gram | label)

    @classmethod
    def train(cls, texts: Mapping[str, Iterable[str]]) -> "Letters":
        """From texts of each label, all of which are taken to be equally common."""
        counts = np.full((len(ORDERS), BUCKETS, len(texts)), SMOOTHING)
        for label, some in enumerate(texts.values()):
            if isinstance(some, str):
                raise ValueError("give several texts a label: write [text] for a single one")
            for text in some:
                for order, grams in enumerate(buckets(text)):
                    counts[order, :, label] += np.bincount(grams, minlength=BUCKETS)
        logs = np.log(counts / counts.sum(1, keepdims=True)).astype(np.float32)
        return cls(tuple(texts), logs)

    def probabilities(self, text: str) -> np.ndarray:
        """P(label | text) of each label; all the same if the text is empty."""
        places, mean = 0, np.zeros(len(self.labels))
        for order, grams in enumerate(buckets(text)):
            if len(grams):
                mean += self.log[order].take(grams, axis=0).mean(0) / len(ORDERS)
                places = max(places, len(grams))
        weights = np.exp((mean - mean.max()) * min(places, STRETCH))
        return weights / weights.sum()

    def guess(self, text: str) -> Guess:
        found = self.probabilities(text)
        return Guess(self.labels[found.argmax()], float(found.max()))


def buckets(text: str) -> list[np.ndarray]:
    """The bucket of each n-gram of the text, for each of ORDERS."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes, found = np.zeros(len(letters) + 1, np.uint64), []
    for n in ORDERS:  # as in `hash_windows`, one letter more at a time
        hashes = (hashes[:-1] + letters[n - 1 :]) * MIX
        found.append((hashes >> np.uint64(64 - BITS)).astype(np.int64))
    return found


# --- which language -------------------------------------------------------------------------------

# Written for this file: no text in several languages lies on every machine.
SEEDS = {
    "en": """The people who lived in the small house by the river had not seen their neighbours for
        more than a week. When the rain stopped, they went out to look for them, but there was
        nothing left of the old bridge, and what they found on the other side was not what they
        had expected. It is said that each of us should know where he comes from; however, this
        would have been too much for me, because I was still a child. You can ask her whether she
        will come with us to the city tomorrow, or if it would be better to wait until the end of
        the year. Every government has to show that its laws are good for most of those who work,
        and this has been one of the great questions of our time. They could not have done it
        without the help of their friends. The first thing that he thought about was how to make
        some money, which is often very hard.""",
    "de": """Die Leute, die in dem kleinen Haus am Fluss wohnten, hatten ihre Nachbarn seit mehr
        als einer Woche nicht gesehen. Als der Regen aufhörte, gingen sie hinaus, um nach ihnen zu
        suchen, aber von der alten Brücke war nichts mehr übrig, und was sie auf der anderen Seite
        fanden, war nicht das, was sie erwartet hatten. Man sagt, dass jeder von uns wissen
        sollte, woher er kommt; das wäre mir jedoch zu viel gewesen, weil ich noch ein Kind war.
        Du kannst sie fragen, ob sie morgen mit uns in die Stadt kommt oder ob es besser wäre, bis
        zum Ende des Jahres zu warten. Jede Regierung muss zeigen, dass ihre Gesetze für die
        meisten derer, die arbeiten, gut sind, und dies ist eine der großen Fragen unserer Zeit
        geworden. Ohne die Hilfe ihrer Freunde hätten sie es nicht geschafft. Zuerst dachte er
        daran, wie man etwas Geld verdient, was oft sehr schwer ist. Ich habe auch schon zwischen
        den Bäumen gesessen und nach oben geschaut.""",
    "fr": """Les gens qui habitaient dans la petite maison au bord de la rivière n'avaient pas vu
        leurs voisins depuis plus d'une semaine. Quand la pluie s'est arrêtée, ils sont sortis
        pour les chercher, mais il ne restait rien du vieux pont, et ce qu'ils ont trouvé de
        l'autre côté n'était pas ce qu'ils avaient attendu. On dit que chacun de nous devrait
        savoir d'où il vient ; cependant, cela aurait été trop pour moi, parce que j'étais encore
        un enfant. Tu peux lui demander si elle viendra avec nous en ville demain, ou s'il
        vaudrait mieux attendre la fin de l'année. Chaque gouvernement doit montrer que ses lois
        sont bonnes pour la plupart de ceux qui travaillent, et c'est une des grandes questions de
        notre temps. Ils n'auraient pas pu le faire sans l'aide de leurs amis. La première chose à
        laquelle il a pensé, c'est comment gagner un peu d'argent, ce qui est souvent très
        difficile. Vous êtes aussi allés aux mêmes endroits.""",
    "es": """La gente que vivía en la pequeña casa junto al río no había visto a sus vecinos desde
        hacía más de una semana. Cuando dejó de llover, salieron a buscarlos, pero no quedaba nada
        del viejo puente, y lo que encontraron al otro lado no era lo que habían esperado. Se dice
        que cada uno de nosotros debería saber de dónde viene; sin embargo, eso habría sido
        demasiado para mí, porque todavía era un niño. Puedes preguntarle si vendrá con nosotros a
        la ciudad mañana, o si sería mejor esperar hasta el final del año. Todo gobierno tiene que
        mostrar que sus leyes son buenas para la mayoría de los que trabajan, y esta ha sido una
        de las grandes cuestiones de nuestro tiempo. No lo habrían podido hacer sin la ayuda de
        sus amigos. Lo primero en que pensó fue cómo ganar algo de dinero, lo cual es a menudo muy
        difícil. Ella también ha hecho muchas cosas buenas desde entonces, y ya no quiere hablar
        de ello con el hombre que llegó ayer.""",
    "it": """La gente che abitava nella piccola casa vicino al fiume non vedeva i suoi vicini da
        più di una settimana. Quando smise di piovere, uscirono a cercarli, ma del vecchio ponte
        non era rimasto nulla, e quello che trovarono dall'altra parte non era ciò che si erano
        aspettati. Si dice che ognuno di noi dovrebbe sapere da dove viene; tuttavia questo
        sarebbe stato troppo per me, perché ero ancora un bambino. Puoi chiederle se verrà con noi
        in città domani, o se sarebbe meglio aspettare fino alla fine dell'anno. Ogni governo deve
        mostrare che le sue leggi sono buone per la maggior parte di quelli che lavorano, e questa
        è stata una delle grandi questioni del nostro tempo. Non avrebbero potuto farlo senza
        l'aiuto dei loro amici. La prima cosa a cui pensò fu come guadagnare un po' di soldi, il
        che è spesso molto difficile. Anche lei ha fatto molte cose belle da allora, gli uomini
        che sono arrivati ieri non ne vogliono più parlare.""",
    "pt": """As pessoas que moravam na pequena casa junto ao rio não viam os seus vizinhos há mais
        de uma semana. Quando a chuva parou, saíram para os procurar, mas não restava nada da
        velha ponte, e o que encontraram do outro lado não era o que tinham esperado. Diz-se que
        cada um de nós deveria saber de onde vem; no entanto, isso teria sido demais para mim,
        porque eu ainda era uma criança. Você pode perguntar se ela virá conosco à cidade amanhã,
        ou se seria melhor esperar até ao fim do ano. Todo governo tem de mostrar que as suas leis
        são boas para a maioria dos que trabalham, e esta tem sido uma das grandes questões do
        nosso tempo. Não o teriam conseguido fazer sem a ajuda dos seus amigos. A primeira coisa
        em que pensou foi como ganhar algum dinheiro, o que é muitas vezes muito difícil. Ela
        também fez muitas coisas boas desde então, e já não quer falar com o homem que chegou
        ontem. Foram feitas várias alterações pelas mãos.""",
    "nl": """De mensen die in het kleine huis aan de rivier woonden, hadden hun buren al meer dan
        een week niet gezien. Toen de regen ophield, gingen ze naar buiten om hen te zoeken, maar
        van de oude brug was niets meer over, en wat ze aan de andere kant vonden, was niet wat ze
        hadden verwacht. Men zegt dat ieder van ons zou moeten weten waar hij vandaan komt; dat
        zou echter te veel voor mij zijn geweest, omdat ik nog een kind was. Je kunt haar vragen
        of ze morgen met ons meegaat naar de stad, of dat het beter zou zijn om tot het einde van
        het jaar te wachten. Elke regering moet laten zien dat haar wetten goed zijn voor de
        meeste mensen die werken, en dit is een van de grote vragen van onze tijd geworden. Zonder
        de hulp van hun vrienden hadden zij het niet kunnen doen. Het eerste waar hij aan dacht
        was hoe je wat geld verdient, wat vaak heel moeilijk is. Zij heeft sindsdien ook veel
        goede dingen gedaan en wil er niet over spreken.""",
}  # fmt: skip
# Where letters decide: the language with most readers in each script. Han without kana is Chinese.
SCRIPTS = {
    "ja": "\u3040-\u30ff",
    "zh": "\u3400-\u4dbf\u4e00-\u9fff",
    "ru": "\u0400-\u04ff",
    "ko": "\u1100-\u11ff\uac00-\ud7af",
    "ar": "\u0600-\u06ff",
    "el": "\u0370-\u03ff",
    "hi": "\u0900-\u097f",
}
SCRIPT = {label: re.compile(f"[{letters}]") for label, letters in SCRIPTS.items()}
NO_LETTERS = re.compile(r"[\W\d_]+")
KANA = 0.1  # share of kana from which Japanese and Chinese characters are Japanese


def language(text: str) -> Guess:
    """The language of a text: one of SEEDS or SCRIPTS, or "" of a text without letters.

    Only these are known: Swedish is taken for one of them, and Ukrainian for Russian.
    """
    words = " ".join(NO_LETTERS.split(text.lower())).strip()
    letters = len(words) - words.count(" ")
    if not letters:
        return Guess("", 0.0)
    if not words.isascii():
        counts = {label: len(script.findall(words)) for label, script in SCRIPT.items()}
        if counts["ja"] > KANA * (counts["ja"] + counts["zh"]):
            counts["ja"], counts["zh"] = counts["ja"] + counts["zh"], 0
        best = max(counts, key=counts.__getitem__)
        if counts[best] * 2 >= letters:
            return Guess(best, counts[best] / letters)
    return languages().guess(f" {words} ")


@cache
def languages() -> Letters:
    return Letters.train(
        {label: [" " + " ".join(NO_LETTERS.split(text.lower()))] for label, text in SEEDS.items()}
    )
