"""The laws of wordpiece.py: what remains of a text is its normalized words, cut as others cut."""

import json
import math
import os
import pickle
import random
import re
from collections import Counter
from itertools import islice, pairwise, product
from pathlib import Path
from pydoc_data.topics import topics
from unicodedata import category, combining, ucd_3_2_0
from unicodedata import normalize as unicode_form

import pytest
import tokenizers
from helpers import assert_one_sentence, limited, mutated_text, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import processes
import wordpiece
from vocabulary import END_OF_TEXT
from wordpiece import (
    BLANKS,
    NOWHERE,
    REST,
    SPECIAL,
    Normalizer,
    WordPiece,
    Words,
    as_text,
    build_trie,
    count_words,
    cut,
    first_pieces,
    learn_pieces,
    letters,
    match,
    max_match,
    normalize,
)

MANUAL, UNSEEN = list(topics.values())[:30], list(topics.values())[30:33]
AGAIN = "write this one again with WordPiece.save"
MARKS = "\u0301\u0327\u302e\u302f\U0001d165\u0345"  # NFD sorts them; not all are accents
TRICKY = (
    "aBéÉİΣςßſÅ각中々カが\U0002b820ﷺ1²$_.,?!'#-«\0\ufffd\x07\x1c\x85\xa0\u200b\u2028\u3000 \t\n\r"
)
SPECIALS = (*SPECIAL, "<|a|>", "<|a|><|b|>", "<|b|>")
ALL_RULES = [
    Normalizer(*rules)
    for rules in product((True, False), (True, False), (None, True, False), (True, False))
]

many = settings(max_examples=20 * settings().max_examples)  # for laws that take no time
every_score = pytest.mark.parametrize("score", ["likelihood", "ratio"])
rules = st.sampled_from(ALL_RULES)

# --- Unicode, in Python and in Hugging Face -------------------------------------------------------

MARK = "☃"  # no rule does anything to it: it keeps characters apart
# All else that this Python knows; of the last two planes, which are private, only a few.
KNOWN = [chr(code) for code in (*range(0xF0100), 0x10FFFD) if chr(code) != MARK]
KNOWN = [c for c in KNOWN if category(c) not in ("Cn", "Cs")]
# Assigned long ago, but of another kind since Unicode 9, 12 or 14; Hugging Face's tables are older.
RECLASSIFIED = {"\u166d", "\u1734", "\u1885", "\u1886"}


def theirs(rules: Normalizer) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        rules.clean_text, rules.handle_chinese_chars, rules.strip_accents, rules.lowercase
    )


def one_by_one(rules: Normalizer, chars: list[str]) -> list[str]:
    """What Hugging Face makes of each character, by one call."""
    return theirs(rules).normalize_str(MARK.join(chars)).split(MARK)


def their_words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


def new_here(rules: Normalizer) -> set[str]:
    """Characters that are normalized otherwise than in Hugging Face."""
    they = one_by_one(rules, KNOWN)
    return {c for c, want in zip(KNOWN, they, strict=True) if as_text(normalize(c, rules)) != want}


def cut_otherwise() -> set[str]:
    """Characters that end words here but not in Hugging Face, or the other way round."""
    they = their_words(MARK + MARK.join(f"a{c}b" for c in KNOWN) + MARK)
    they = " ".join(they).split(MARK)[1:-1]
    return {
        c
        for c, want in zip(KNOWN, they, strict=True)
        if [as_text(word) for word in cut(normalize(f"a{c}b", RAW))]
        != [word for word in want.split(" ") if word]
    }


RAW = Normalizer(False, False, False, False)
ONE_RULE = [Normalizer(*(at == rule for at in range(4))) for rule in range(4)]
UNALIKE = set().union(cut_otherwise(), *map(new_here, ONE_RULE))
AGREED = sorted(set(KNOWN) - UNALIKE)


def test_all_of_unicode_is_treated_as_in_hugging_face():
    """Except what came, or became something else, after Unicode 8, from which its tables are."""
    assert len(KNOWN) > 140_000 and len(UNALIKE) < 700
    for char in UNALIKE - RECLASSIFIED:
        assert ucd_3_2_0.category(char) == "Cn", hex(ord(char))
        assert one_by_one(ONE_RULE[0], [char]) == [char]  # which they do not know, and so leave
        assert category(char)[0] in "PM" or category(char) == "Cf"
    assert not any(char <= "\u061c" for char in UNALIKE)


def drawn(seed: int, length: int = 30, among: str = TRICKY) -> str:
    """A text from all of Unicode, from its first part, or of tricky characters and words."""
    draw = random.Random(seed)
    chars = draw.choice([AGREED, AGREED[:600], AGREED[:140], among, among + "abc" * 9])
    return "".join(draw.choices(chars, k=draw.randrange(length)))


@many
@given(seeds, rules)
def test_normalizing_is_that_of_hugging_face(seed, rules):
    for seed in range(seed, seed + 5):  # noqa: B020
        text = drawn(seed, among=TRICKY + MARKS)
        got = normalize(text, rules)
        assert as_text(got) == theirs(rules).normalize_str(text)
        assert all(0 <= at < len(text) for _, at in got)


@many
@given(st.text("a中" + MARKS))
def test_marks_are_sorted_as_in_nfd(text):
    got = as_text(normalize(text, Normalizer(False, False, True, False)))
    assert got == "".join(c for c in unicode_form("NFD", text) if category(c) != "Mn")


@given(st.text(TRICKY), rules)
def test_each_character_comes_from_its_place(text, rules):
    """What a character becomes, it becomes alone; accents aside, nothing is moved."""
    want = [(c, at) for at, char in enumerate(text) for c, _ in normalize(char, rules)]
    assert normalize(text, rules) == want


@many
@given(seeds)
def test_words_are_those_of_hugging_face(seed):
    text = drawn(seed)
    words = list(cut((char, at) for at, char in enumerate(text)))
    spans = [(word[0][1], word[-1][1] + 1) for word in words]
    want = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)
    assert list(zip(map(as_text, words), spans, strict=True)) == want


@many
@given(seeds, rules)
def test_the_table_gives_the_words_of_the_definition(seed, rules):
    words = Words(rules)
    for seed in range(seed, seed + 5):  # noqa: B020
        text = drawn(seed, among=TRICKY + MARKS)
        assert words.of(text) == [as_text(word) for word in cut(normalize(text, rules))]


def test_the_table_sorts_marks_that_are_no_accents():
    text, rules = "a\u302e\U0001d165", Normalizer(False, False, True, False)
    assert Words(rules).of(text) == ["a\U0001d165\u302e"] == [as_text(normalize(text, rules))]


def test_the_last_letter_of_a_greek_word_is_like_others():
    """Python's lower() turns a Σ at the end of a word into ς, Rust's to_lowercase of a char not."""
    assert as_text(normalize("ΑΣ", Normalizer())) == "ασ"


# --- training -------------------------------------------------------------------------------------


def learn_obviously(counts, score="likelihood", min_count=2):
    """The definition: count everything, join the best pair of neighbours, repeat."""
    pieces = first_pieces(counts)
    words = [([pieces.index(p) for p in letters(word)], n) for word, n in counts.items()]
    while True:
        single, pairs = Counter(), Counter()
        for word, n in words:
            single.update({id: n * word.count(id) for id in word})
            for pair in pairwise(word):
                pairs[pair] += n
        total, scores = single.total(), {}
        for (a, b), n in pairs.items():
            if n >= min_count:
                ratio = n / (single[a] * single[b])
                scores[a, b] = n * math.log(total * ratio) if score == "likelihood" else ratio
        if not scores:
            return
        most = max(scores.values())
        best = min(pair for pair, value in scores.items() if value >= most - 1e-12 * abs(most))
        pieces.append(pieces[best[0]] + pieces[best[1]].removeprefix("##"))
        yield pieces[-1], scores[best]
        for word, _ in words:
            for at in range(len(word) - 1):
                if tuple(word[at : at + 2]) == best:
                    word[at : at + 2] = [len(pieces) - 1]


def assert_learnt_alike(got, want):
    assert [piece for piece, _ in got] == [piece for piece, _ in want]
    for (_, ours), (_, obvious) in zip(got, want, strict=True):
        assert math.isclose(ours, obvious, rel_tol=1e-9, abs_tol=1e-12)


@every_score
@many
@given(seeds, st.integers(1, 4))
def test_the_fast_trainer_learns_what_the_obvious_one_learns(score, seed, min_count):
    draw = random.Random(seed)
    for _ in range(2):
        among = draw.choice(["a", "ab", "abc", "abcdefgh"])
        words = ("".join(draw.choices(among, k=draw.randrange(1, 10))) for _ in range(9))
        counts = {word: draw.randrange(1, 6) for word in words}
        got = list(learn_pieces(counts, score, min_count))
        assert_learnt_alike(got, list(learn_obviously(counts, score, min_count)))
        assert len({piece for piece, _ in got}) == len(got)


@every_score
def test_the_fast_trainer_learns_the_same_from_real_text(score):
    counts = count_words(MANUAL[:3], Normalizer())
    got, want = (learn(counts, score, 3) for learn in (learn_pieces, learn_obviously))
    assert_learnt_alike(list(islice(got, 60)), list(islice(want, 60)))


def test_the_ratio_learns_the_worked_example_of_hugging_face_s_course():
    counts = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    assert next(learn_pieces(counts, "ratio", 1)) == ("##gs", 1 / 20)


@pytest.mark.parametrize(("a", "b", "c", "d"), ["abcd", "cdab"])
def test_scores_that_differ_by_rounding_are_equal(a, b, c, d):
    """1 · log(125) and 3 · log(5), of which numpy finds the first greater: the lower ids win."""
    counts = {a + b: 1, a: 1, c + d: 3, c: 12, "z" + b: 1, "z" + d: 17, "z": 443}
    assert next(learn_pieces(counts, min_count=1))[0] == "ab"


def test_the_likelihood_learns_longer_pieces_than_the_ratio():
    """The ratio swallows rare words whole: with min_count 2, text takes far more tokens."""
    tokens = {}
    for score in ("likelihood", "ratio"):
        ours = WordPiece.train(MANUAL, 1500, score=score)
        tokens[score] = sum(len(ours.encode(text)) for text in UNSEEN)
    assert 1.5 * tokens["likelihood"] < tokens["ratio"]


def test_words_are_counted_normalized_and_between_special_tokens():
    counts = count_words(["É e.\u0301 E\tÈ[SEP]x", "[X]x"], Normalizer(), ["[SEP]"])
    assert counts == {"e": 4, ".": 1, "x": 3, "[": 1, "]": 1}


@given(st.lists(seeds, max_size=9), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=10)  # each starts some processes
def test_processes_count_as_one_does(text_seeds, number, group):
    texts = list(map(drawn, text_seeds))
    one = count_words(texts, Normalizer(), processes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "GROUP", group)
        assert count_words(texts, Normalizer(), processes=number) == one


@given(seeds, rules, st.integers(0, 60), st.integers(0, 20), st.integers(1, 3))
def test_vocab_size_counts_specials_letters_and_pieces(seed, rules, room, alphabet, min_count):
    texts = [drawn(seed + n, 60) for n in range(4)]
    counts = count_words(texts, rules)
    common = Counter("".join(counts.elements())).most_common()
    kept = {char for char, _ in common[:alphabet]}

    def train(size):
        return WordPiece.train(
            texts, size, ["[UNK]", "[X]"], rules, alphabet=alphabet, min_count=min_count
        )

    apart = {c for c in kept if words_of(f"a{c}a", rules) != [f"a{c}a"]}
    least = 2 + 2 * len(kept) - len(apart)
    with pytest.raises(ValueError, match=f"must be {least} or more"):
        train(least - 1)
    ours = train(least + room)
    assert ours.vocab_size == len(ours.tokens) <= least + room
    known = {w: n for w, n in counts.items() if len(w) <= 100 and {*w} <= {*ours.tokens}}
    learnt = [piece for piece, _ in islice(learn_pieces(known, "likelihood", min_count), room)]
    assert ours.tokens[least:] == learnt
    assert ours.special == {"[UNK]": 0, "[X]": 1} and ours.tokens[:2] == ["", ""]
    letters_of = {t for t in ours.tokens[2:least] if len(t) == 1}
    assert len(letters_of) == len(kept)
    assert {*ours.tokens[2:least]} - letters_of == {"##" + c for c in letters_of} - {
        "##" + c for c in letters_of if words_of(f"a{c}a", rules) != [f"a{c}a"]
    }


def words_of(text: str, rules: Normalizer) -> list[str]:
    """A normalized text cut, as the rules have it that set ideographs apart."""
    spaced = normalize(text, Normalizer(False, rules.handle_chinese_chars, False, False))
    return [as_text(word) for word in cut(spaced)]


@many
@given(seeds, rules)
def test_no_word_of_the_alphabet_is_unknown_and_all_others_are(seed, rules):
    ours = WordPiece.train([drawn(seed, 60)], 500, normalizer=rules, alphabet=5)
    kept = {token for token in ours.tokens if len(token) == 1}
    for word in count_words([drawn(seed + 1, 60), "".join(kept)], rules):
        unknown = ours._encode_word(word) == [ours.special["[UNK]"]]
        assert unknown == (not {*word} <= kept)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"texts": "abc"}, r"write \[text\]"),
        ({"score": "count"}, "likelihood or ratio"),
        ({"min_count": 0}, "1 or more"),
        ({"vocab_size": 5}, "must be 9 or more"),
        ({"special": ["[PAD]"]}, r"lacks the token '\[UNK\]'"),
        ({"special": ["[UNK]", "\n"]}, "unprintable"),
        ({"texts": ["\ud800"]}, "surrogates"),
        ({"texts": ["aab", "\ud800"], "alphabet": 1}, "surrogates"),
    ],
)
def test_training_that_cannot_be_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        WordPiece.train(**{"texts": ["ab."], "vocab_size": 99, "special": SPECIAL[:4]} | settings)


# --- matching -------------------------------------------------------------------------------------


def drawn_vocabulary(draw: random.Random) -> tuple[dict[str, int], str]:
    """Any pieces whatever, with and without ##, also such as begin with # themselves; letters."""
    among = draw.choice(["a", "ab", "ab#", "a#", "abc"])
    most = draw.choice([3, 5, 12])
    count = draw.randrange(1, 14)
    words = ("".join(draw.choices(among, k=draw.randrange(1, most))) for _ in range(count))
    pieces = [draw.choice(["", "##"]) + word for word in words]
    if draw.random() < 0.5:
        pieces += draw.sample(["#", "##", "##b", "###b", "###", "b", "####"], 3)
    return {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}, among


def assert_matched_alike(seed: int) -> int:
    draw = random.Random(seed)
    ids, among = drawn_vocabulary(draw)
    trie = build_trie(ids)
    for _ in range(10):
        word = "".join(draw.choices(among, k=draw.randrange(14)))
        want = max_match(word, ids)
        assert match(word, trie) == (want and [ids[piece] for piece in want]), (word, ids)
    return 10


@many
@given(seeds)
def test_lin_max_match_is_max_match(seed):
    for at in range(10):
        assert_matched_alike(seed + at)


@pytest.mark.slow
def test_lin_max_match_is_max_match_300_000_times():
    assert sum(map(assert_matched_alike, range(30_000))) == 300_000


@many
@given(seeds)
def test_max_match_is_that_of_hugging_face(seed):
    draw = random.Random(seed)
    ids, among = drawn_vocabulary(draw)
    ids["?"] = len(ids)
    model = models.WordPiece(ids, unk_token="?")
    for _ in range(10):
        word = "".join(draw.choices(among, k=draw.randrange(1, 14)))
        want = [token.value for token in model.tokenize(word)]
        assert (max_match(word, ids) or ["?"]) == want


def test_worked_example_of_the_paper():
    """Section 3.2 and table 1 of Song et al. 2021."""
    ids = {piece: at for at, piece in enumerate(["a", "abcdx", "##b", "##c", "##cdy", "##dz"])}
    trie = _, edges, link, pops = build_trie(ids)
    node, seen = 0, []
    for letter in "abcdx":
        node = edges[node][letter]
        seen.append(([list(ids)[id] for id in pops[node]], link[node] == NOWHERE))
    assert seen == [
        (["a"], False), (["a"], False), (["a", "##b"], False), (["a", "##b"], False),
        (["abcdx"], False),
    ]  # fmt: skip
    assert match("abcdz", trie) == [ids[p] for p in ("a", "##b", "##c", "##dz")]
    assert match("abcz", trie) is None


@given(seeds)
def test_each_link_leads_nearer_to_a_root_and_takes_something_off(seed):
    _, edges, link, pops = build_trie(drawn_vocabulary(random.Random(seed))[0])
    depth, todo = {0: 0, REST: 0}, [0, REST]
    for node in todo:
        for child in edges[node].values():
            depth[child] = depth[node] + 1
            todo.append(child)
    for node in todo:
        assert (link[node] == NOWHERE) == (not pops[node])
        assert link[node] == NOWHERE or depth[link[node]] < depth[node]
    assert link[0] == link[REST] == NOWHERE and len(todo) == len(edges)


class Counted(dict):
    looked_up = 0

    def __contains__(self, key):
        Counted.looked_up += 1
        return super().__contains__(key)


@pytest.mark.parametrize("piece", ["a" * 61, "a" * 30 + "b", "ab" * 30])
def test_matching_takes_linear_work(piece):
    """MaxMatch tries some thousand pieces for such a word of 100 letters."""
    ids = {p: at for at, p in enumerate(["a", "##a", "##b", piece, "##" + piece])}
    pieces, edges, link, pops = build_trie(ids)
    edges = [Counted(edge) for edge in edges]
    for word in ("a" * 100, "ab" * 50, "a" * 99 + "b", "b" * 100):
        Counted.looked_up = 0
        match(word, (pieces, edges, link, pops))
        assert Counted.looked_up <= 2 * len(word)


# --- encoding and decoding ------------------------------------------------------------------------

TRAINED = WordPiece.train(MANUAL, 1200, SPECIALS)
# Pieces of tricky letters; what lies on the way to some of them is no piece.
FEW = ["a", "##a", "##b", "abab", "e", "##e", "eeb", "##eb", "中", "が", "か", "ᄀ", "##ᅡ", "##ᆨ"]
FEW += ["ss", "##ss", "##σ", ".", ",", "1", "'", "s", "t", "##st", "カ", "##カ", "##か", "É", "İ"]


def few(rules: Normalizer, longest: int = 100, cleanup: bool = True) -> WordPiece:
    ids = {text: at for at, text in enumerate(SPECIALS)}
    return WordPiece([""] * len(ids) + FEW, ids, rules, "[UNK]", longest, cleanup)


def in_hugging_face(ours: WordPiece) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(wordpiece.to_json(ours)))


def marked(seed: int) -> str:
    """A text with special tokens and parts of some."""
    draw = random.Random(seed)
    marks = [*SPECIALS, "<|a", "|>", "[cls]", "[ CLS]", "[", "]"]
    parts = [draw.choice([drawn(seed + n, 12), draw.choice(marks)]) for n in range(6)]
    return "".join(parts)


def assert_as_there(ours: WordPiece, there: tokenizers.Tokenizer, text: str) -> None:
    for policy in ("text", "ids"):
        there.encode_special_tokens = policy == "text"
        want = there.encode(text)
        assert ours.encode(text, policy) == want.ids, (text, want.tokens)
        assert ours.spans(text, policy) == want.offsets, (text, want.tokens)
        assert ours.decode(want.ids) == there.decode(want.ids, skip_special_tokens=False)


THERE = in_hugging_face(TRAINED)
FEW_OF_ALL = [few(rules, longest) for rules in ALL_RULES for longest in (4, 100)]
FEW_THERE = list(map(in_hugging_face, FEW_OF_ALL))


@many
@given(seeds)
@example(0)
def test_ids_and_spans_are_those_of_hugging_face(seed):
    """Without marks that NFD sorts: their place in the original is a matter of taste."""
    for at in range(5):
        assert_as_there(TRAINED, THERE, marked(seed + at))
        which = (seed + at) % len(FEW_OF_ALL)
        assert_as_there(FEW_OF_ALL[which], FEW_THERE[which], marked(seed + at))


@many
@given(seeds)
def test_ids_of_sorted_marks_are_those_of_hugging_face(seed):
    which, text = seed % len(FEW_OF_ALL), drawn(seed, among="aé か" + MARKS)
    assert FEW_OF_ALL[which].encode(text) == FEW_THERE[which].encode(text).ids
    spans = FEW_OF_ALL[which].spans(text)
    assert len(spans) == len(FEW_OF_ALL[which].encode(text))
    assert all(0 <= start < end <= len(text) for start, end in spans)


def test_ids_are_those_of_hugging_face_on_text():
    for text in (*UNSEEN, *MANUAL[:5]):
        assert_as_there(TRAINED, THERE, text)


@pytest.mark.parametrize("length", [3, 4, 5, 99, 100, 101, 200])
def test_a_word_that_is_too_long_is_unknown(length):
    for longest in (4, 100):
        ours = few(Normalizer(), longest)
        ids = ours.encode("a" * length)
        assert (ids == [ours.special["[UNK]"]]) == (length > longest)
        assert_as_there(ours, in_hugging_face(ours), "b " + "a" * length + ".")


@pytest.mark.parametrize(("length", "learnt"), [(100, True), (101, False)])
def test_nothing_is_learnt_from_words_that_are_unknown_for_their_length(length, learnt):
    ours = WordPiece.train(["a" * length], 99)
    assert (len(ours.tokens) > len([*SPECIAL, "a", "##a"])) == learnt


def test_the_longest_word_may_end_in_a_piece_of_nearly_its_length():
    ours = WordPiece(["a", "##bbb"], {"[UNK]": 2}, longest_word=4)
    assert ours.encode("abbb") == [0, 1]


def test_of_an_unknown_word_all_is_unknown():
    ours, unknown = few(Normalizer()), SPECIALS.index("[UNK]")
    assert ours.encode("abab.ababx") == [ours._ids["abab"], ours._ids["."], unknown]
    assert ours.spans("abab.É\u0301babx") == [(0, 4), (4, 5), (5, 11)]


@many
@given(seeds, rules)
def test_decoding_gives_the_normalized_text_up_to_blanks(seed, rules):
    text = drawn(seed, 60, TRICKY + MARKS)
    ours = WordPiece.train([text], 10_000, normalizer=rules, min_count=1)
    ids = ours.encode(text)
    assert ours.special["[UNK]"] not in ids
    decoded, blank = ours.decode(ids), dict.fromkeys(map(ord, BLANKS))
    assert decoded.translate(blank) == as_text(normalize(text, rules)).translate(blank)
    if not any(map(combining, text)):
        for token, (start, end) in zip(
            map(ours.tokens.__getitem__, ids), ours.spans(text), strict=True
        ):
            inside = token[2:] if token[:2] == "##" and len(token) > 2 else token
            assert inside in as_text(normalize(text[start:end], rules))


@given(st.lists(st.integers(0, TRAINED.vocab_size - 1)), st.booleans())
def test_any_ids_are_decoded_as_in_hugging_face(ids, cleanup):
    fields = [*TRAINED.tokens[:-3], "do not", "n't", "'s"], TRAINED.special
    ours = WordPiece(*fields, cleanup=cleanup)
    there = in_hugging_face(ours)
    ids += [ours._ids[token] for token in (".", "do not", "n't", "'s", "?", ",", "!", "'")]
    for order in (ids, ids[::-1]):
        assert ours.decode(order) == there.decode(order, skip_special_tokens=False)
    assert ours.decode([]) == ""


def test_special_tokens_three_ways():
    text, sep = "a[SEP]", TRAINED.special["[SEP]"]
    assert TRAINED.encode(text, "ids") == [*TRAINED.encode("a"), sep]
    assert TRAINED.spans(text, "ids") == [(0, 1), (1, 6)]
    assert sep not in TRAINED.encode(text) and TRAINED.decode(TRAINED.encode(text)) == "a [ sep ]"
    for method in (TRAINED.encode, TRAINED.spans):
        with pytest.raises(ValueError, match=re.escape("the special token '[SEP]'")):
            method(text, "refuse")
        assert method("a [sep]", "refuse") == method("a [sep]")
        with pytest.raises(ValueError, match="special must be"):
            method(text, "all")
        with pytest.raises(ValueError, match="surrogates not allowed"):
            method("a\ud800", "ids")


def test_of_overlapping_special_tokens_the_longest_wins():
    assert TRAINED.encode("<|a|><|b|>", "ids") == [TRAINED.special["<|a|><|b|>"]]


@pytest.mark.parametrize("id", [-1, TRAINED.vocab_size, 10**30])
def test_an_unknown_id_is_refused(id):
    with pytest.raises(ValueError, match=f"id {id} is not among the 1200"):
        TRAINED.decode([5, id])


def test_a_tokenizer_can_be_sent_to_another_process():
    for ours in (TRAINED, few(Normalizer(lowercase=False), 7, False)):
        again = pickle.loads(pickle.dumps(ours))
        assert again == ours and again.encode(UNSEEN[0]) == ours.encode(UNSEEN[0])


def test_fingerprint_differs_where_anything_differs():
    rest = TRAINED.tokens, TRAINED.special
    kinds = [TRAINED, few(Normalizer()), few(Normalizer(), 7), few(Normalizer(), cleanup=False)]
    kinds += [few(rules) for rules in ALL_RULES[1:]]
    kinds += [WordPiece(*rest, unknown="[PAD]"), WordPiece(rest[0] + ["zzz"], rest[1])]
    kinds += [WordPiece(rest[0], rest[1] | {"[X]": 1200})]
    assert len({ours.fingerprint for ours in kinds}) == len(kinds)
    assert WordPiece.train(MANUAL, 1200, SPECIALS).fingerprint == TRAINED.fingerprint


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tokens": ["a", "b", "a"]}, "same token"),
        ({"special": {"": 9}}, "empty"),
        ({"special": {"\ud800": 9}}, "unprintable"),
        ({"special": {"[X]": 1}}, "clashes"),
        ({"special": {"[X]": 9, "[Y]": 9}}, "clashes"),
        ({"special": {"a": 9}}, "clashes"),
        ({"special": {"[X]": -1}}, "clashes"),
        ({"special": {"[X]": 5000}}, "far more"),
        ({"unknown": "[X]"}, "lacks the token"),
        ({"longest_word": 0}, "not among 1 to 1000"),
        ({"longest_word": 1001}, "not among 1 to 1000"),
        ({"tokens": ["a", "\ud800"]}, "surrogates"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(fields, problem):
    whole = {"tokens": ["a", "b"], "special": {}, "unknown": "a"}
    with pytest.raises(ValueError, match=problem):
        WordPiece(**whole | fields)


# --- files ----------------------------------------------------------------------------------------

CASED = WordPiece.train(MANUAL[:5], 400, normalizer=Normalizer(lowercase=False))
KINDS = {
    "trained": TRAINED,
    "cased": CASED,
    "few": few(Normalizer(False, False, True, False), 7, False),
    "gaps": WordPiece(["", "a", "", "##b"], {"[UNK]": 0, "[X]": 9}),
    "unknown has another name": WordPiece(["a"], {"<unk>": 1}, unknown="<unk>"),
    "unknown is ordinary": WordPiece(["a", "[UNK]", "##b"], {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_gives_the_same_tokenizer_here_and_there(name, tmp_path):
    ours, path = KINDS[name], tmp_path / "tokenizer.json"
    ours.save(path)
    assert WordPiece.load(path) == WordPiece.load(tmp_path) == ours
    there = tokenizers.Tokenizer.from_file(str(path))
    for seed in range(30):
        assert_as_there(ours, there, marked(seed))
    there.save(str(path))
    assert WordPiece.load(path) == ours
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_reads_and_writes_the_same(lowercase, tmp_path):
    from transformers import AutoTokenizer, BertTokenizer, BertTokenizerFast

    ours = TRAINED if lowercase else CASED
    ours.save(tmp_path / "tokenizer.json")
    ours.save_vocab(tmp_path / "vocab.txt")
    for kind in (BertTokenizer, BertTokenizerFast):
        from_vocab = kind(str(tmp_path / "vocab.txt"), do_lower_case=lowercase)
        whole = kind.from_pretrained(tmp_path, do_lower_case=lowercase)
        for text in (*UNSEEN, "[CLS] naïve\tÉcole 中文 don't [MASK]."):
            want = ours.encode(text, "ids")
            assert from_vocab.encode(text, add_special_tokens=False) == want
            assert whole.encode(text, add_special_tokens=False) == want
    whole.save_pretrained(tmp_path / "theirs")
    again = WordPiece.load(tmp_path / "theirs")
    assert again.tokens == ours.tokens and again.normalizer.lowercase == lowercase
    assert again.encode(UNSEEN[0]) == ours.encode(UNSEEN[0])
    auto = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert auto.encode(UNSEEN[0], add_special_tokens=False) == ours.encode(UNSEEN[0])


@given(seeds, rules)
def test_what_hugging_face_trains_is_read(tmp_path_factory, seed, rules):
    there = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=50))
    there.normalizer, there.pre_tokenizer = theirs(rules), pre_tokenizers.BertPreTokenizer()
    there.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    there.train_from_iterator([random.Random(seed).choice(MANUAL)], trainer)
    path = tmp_path_factory.getbasetemp() / "theirs.json"
    there.save(str(path))
    ours = WordPiece.load(path)
    assert ours.normalizer == rules and ours.longest_word == 50
    for text in (UNSEEN[0][:3000], marked(seed)):
        assert_as_there(ours, there, text)


def test_an_old_file_without_a_type_and_one_without_a_normalizer_are_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    file = wordpiece.to_json(few(Normalizer(False, False, False, False)))
    del file["model"]["type"], file["normalizer"]
    path.write_text(json.dumps(file | {"normalizer": None, "truncation": None}))
    assert WordPiece.load(path).normalizer == RAW
    there = tokenizers.Tokenizer.from_file(str(path))
    assert_as_there(WordPiece.load(path), there, "Éa\x1cb a\u2028b")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"])
@pytest.mark.parametrize("between", ["\n", "\r\n"])
def test_line_ends_of_a_vocabulary_may_be_any(between, end, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes((between.join([*SPECIALS, *FEW]) + end).encode())
    ours = WordPiece.load(tmp_path, Normalizer(lowercase=False))
    assert ours.special == {text: id for id, text in enumerate(SPECIAL)}
    assert ours.normalizer == Normalizer(lowercase=False)
    assert list(ours._tokens.values()) == [*SPECIALS, *FEW] or set(ours._ids) >= set(FEW)
    assert models.WordPiece.read_file(str(path)).items() >= ours._ids.items()
    ours.save_vocab(path)
    assert path.read_bytes() == "".join(t + "\n" for t in [*SPECIALS, *FEW]).encode()


VOCABULARIES = {
    "a blank line": (b"[UNK]\na\n\nb\n", "line 3"),
    "a line of blanks": (b"[UNK]\n \nb\n", "line 2"),
    "blank behind": (b"[UNK]\na \n", "line 2"),
    "carriage return inside": (b"[UNK]\na\rb\n", "line 2"),
    "double": (b"[UNK]\na\nb\na\n", "lines 2 and 4 are both 'a'"),
    "no unknown": (b"[PAD]\na\nb\n", r"lacks the token '\[UNK\]'"),
    "empty": (b"", "line 1"),
    "no UTF-8": (b"[UNK]\n\xff\n", "decode"),
    "picture": (b"\x89PNG\r\n\xff\xfe", "decode"),
    "null": (b"null", r"lacks the token"),
    "cut off": (b"{", "Expecting"),
    "no model": (b"{}", "its pre_tokenizer"),
    "deep": (b'{"a":' * 100_000, "recursion"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_broken_vocabulary_is_refused_with_one_sentence(name, tmp_path):
    content, problem = VOCABULARIES[name]
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        WordPiece.load(path)
    assert_one_sentence(error.value, path, AGAIN)


def edit(path: str, value):
    """A function that puts a value, or what it makes of the old one, at a place in a JSON."""

    def edited(file):
        *way, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in way:
            file = file[key]
        file[last] = value(file[last]) if callable(value) else value

    return edited


def drop(path: str):
    def dropped(file):
        *way, last = path.split("/")
        for key in way:
            file = file[key]
        del file[last]

    return dropped


BROKEN = {
    "no model": (drop("model"), "its model"),
    "BPE": (edit("model/type", "BPE"), "its model, type, is 'BPE'"),
    "old BPE": (lambda f: (drop("model/type")(f), edit("model/merges", [])(f)), "its model, type"),
    "vocab a list": (edit("model/vocab", []), "vocab"),
    "prefix": (edit("model/continuing_subword_prefix", "@@"), "'@@', not ##"),
    "no prefix": (drop("model/continuing_subword_prefix"), "None, not ##"),
    "longest a text": (edit("model/max_input_chars_per_word", "9"), "max_input_chars_per_word"),
    "longest a bool": (edit("model/max_input_chars_per_word", True), "max_input_chars_per_word"),
    "longest huge": (edit("model/max_input_chars_per_word", 10**9), "not among 1 to 1000"),
    "unknown lost": (edit("model/unk_token", "[?]"), "lacks the token"),
    "unknown a number": (edit("model/unk_token", 1), "unk_token"),
    "id a text": (edit("model/vocab/a", "1"), "no number"),
    "id a bool": (edit("model/vocab/a", True), "no number"),
    "id negative": (edit("model/vocab/a", -1), "no number"),
    "id far": (edit("model/vocab/a", 10**12), "far beyond"),
    "id twice": (edit("model/vocab/a", 12), "twice"),
    "id of a special": (edit("model/vocab/a", 0), "clashes"),
    "empty token": (edit("model/vocab/", 3000), "empty"),
    "surrogate": (edit("model/vocab/\ud800", 1200), "surrogates"),
    "normalizer": (edit("normalizer", {"type": "NFC"}), "its normalizer, type, is 'NFC'"),
    "sequence": (edit("normalizer", {"type": "Sequence", "normalizers": []}), "'Sequence'"),
    "rule lost": (drop("normalizer/lowercase"), "lowercase, is None"),
    "rule a number": (edit("normalizer/clean_text", 1), "clean_text"),
    "accents a text": (edit("normalizer/strip_accents", "yes"), "not BERT's"),
    "new rule": (edit("normalizer/nfc", True), "not BERT's"),
    "pre_tokenizer": (edit("pre_tokenizer", {"type": "Whitespace"}), "'Whitespace'"),
    "no pre_tokenizer": (edit("pre_tokenizer", None), "pre_tokenizer"),
    "decoder": (edit("decoder", {"type": "ByteLevel"}), "'ByteLevel'"),
    "no decoder": (edit("decoder", None), "decoder"),
    "decoder's prefix": (edit("decoder/prefix", ""), "prefix"),
    "decoder's cleanup": (edit("decoder/cleanup", None), "cleanup"),
    "no added": (drop("added_tokens"), "added_tokens"),
    "added a text": (edit("added_tokens/0", "[PAD]"), "not a text with its id"),
    "added twice": (edit("added_tokens", lambda added: added + added[:1]), "listed twice"),
    "added strips": (edit("added_tokens/0/lstrip", True), "nothing more"),
    "added a word": (edit("added_tokens/0/single_word", True), "nothing more"),
    "added normalized": (edit("added_tokens/0/normalized", True), "normalized text"),
    "added elsewhere": (edit("added_tokens/0/id", 1300), "clashes"),
    "added far": (
        edit("added_tokens", lambda added: [*added, {"id": 10**18, "content": "[X]"}]),
        "far more",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_one_sentence(name, tmp_path):
    breaks, problem = BROKEN[name]
    file, path = wordpiece.to_json(TRAINED), tmp_path / "tokenizer.json"
    breaks(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=problem) as error:
        WordPiece.load(path)
    assert_one_sentence(error.value, path, AGAIN)


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [(["a", "", "b"], "line 2"), (["a\nb"], "line 1"), (["a "], "line 1"), (["a\r"], "line 1")],
)
def test_a_vocabulary_that_lines_cannot_hold_is_refused(tokens, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        WordPiece(tokens, {"[UNK]": 5}, unknown="[UNK]").save_vocab(tmp_path / "vocab.txt")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("tokenizer.json")):
        WordPiece.load(tmp_path)


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    CASED.save(folder / "tokenizer.json")
    CASED.save_vocab(folder / "vocab.txt")
    return folder


def loaded_or_refused(folder: Path, seed: int) -> bool:
    draw = random.Random(seed)
    path = draw.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    path.write_bytes(mutated_text(content, draw))
    try:
        ours = WordPiece.load(path)
    except ValueError as error:
        assert_one_sentence(error, path, AGAIN)
        return False
    finally:
        path.write_bytes(content)
    ids = ours.encode("any Text, [SEP]", "ids")
    assert len(ours.spans("any Text, [SEP]", "ids")) == len(ids) and ours.decode(ids)
    return True


@many
@given(seeds)
def test_a_mutated_file_is_loaded_or_refused(formats, seed):
    loaded_or_refused(formats, seed)


@pytest.mark.slow
def test_ten_thousand_mutated_files_cost_neither_time_nor_memory(formats):
    with limited(memory=1 << 28, seconds=600):
        loaded = sum(loaded_or_refused(formats, seed) for seed in range(10_000))
    print(f"{loaded:,} loaded, the others refused")
    assert 100 < loaded < 9_900


# --- campaigns ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ids_of_100_000_random_words_are_those_of_hugging_face():
    THERE.encode_special_tokens = True
    draw, common = random.Random(0), [t.removeprefix("##") for t in TRAINED.tokens if t]
    for _ in range(100_000):
        if draw.random() < 0.5:
            word = "".join(draw.choices(common, k=draw.randrange(1, 9)))
        else:
            word = "".join(draw.choices(draw.choice([AGREED, AGREED[:600]]), k=draw.randrange(20)))
        want = THERE.encode(word)
        assert (TRAINED.encode(word), TRAINED.spans(word)) == (want.ids, want.offsets) or any(
            map(combining, word)
        )
        assert TRAINED.encode(word) == want.ids


def test_real_files():
    """Real text, where REAL_DATA names a folder that holds it: text/**/*.txt."""
    if "REAL_DATA" not in os.environ:
        pytest.skip("REAL_DATA names no folder")
    paths = sorted((Path(os.environ["REAL_DATA"]) / "text").rglob("*.txt"))
    assert paths
    texts = {path: path.read_text("utf-8").replace(END_OF_TEXT, "") for path in paths}
    for rules in (Normalizer(), Normalizer(lowercase=False)):
        ours = WordPiece.train(texts.values(), 16_384, normalizer=rules, alphabet=10_000)
        there = in_hugging_face(ours)
        there.encode_special_tokens = True
        for path, text in texts.items():
            want = there.encode(text)
            assert ours.encode(text) == want.ids, path
            assert ours.spans(text) == want.offsets, path
            too_long = sum(len(word) > 100 for word in count_words([text], rules).elements())
            assert want.ids.count(ours.special["[UNK]"]) == too_long, path


def test_specials_by_default_are_bert_s_and_the_end_of_text():
    assert SPECIAL == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", END_OF_TEXT)
    assert WordPiece.train([], 6).special == {text: id for id, text in enumerate(SPECIAL)}
