"""The laws of bpe.py: nothing is lost, and trusted implementations give the same ids."""

import base64
import json
import os
import pickle
import random
import re
import resource
import sys
import time
from dataclasses import replace
from itertools import count, islice, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from subprocess import PIPE, Popen
from unicodedata import category

import pytest
import regex
import tiktoken
import tokenizers
from conftest import ROOT
from helpers import assert_one_sentence, limited, mutated_text
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

import pieces
import processes
from bench import own_source
from bpe import BLOCK, BPE, count_pieces
from merges import (
    apply_merges,
    apply_merges_to_long,
    learn_merges,
    learn_obviously,
    merge,
    pair_counts,
    seams,
)
from pieces import NEXT_CUT, SPLIT_PATTERNS, splitter
from tokenizer_files import to_chars
from vocabulary import END_OF_TEXT, Memory

# tiktoken 0.14's own cl100k_base: the oracle of SPLIT_PATTERNS["gpt4"]
AGAIN = "write this one again with BPE.save"
TIKTOKEN_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TIKTOKEN_O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
TRICKY = "aZſéßΩ中१²'sSltvre019 \t\n\r\v\x1c\x85\xa0\u2028\u3000\u200b_.!-<|>😀\u0301"
SPECIALS = (END_OF_TEXT, "<|a|>", "<|a|><|b|>", "<|b|>")
MANUAL, UNSEEN = list(topics.values())[:30], list(topics.values())[30:33]

# Characters that this Python knows: of newer ones tiktoken and regex may not know the same.
assigned = st.text(st.characters(exclude_categories=("Cn", "Cs")))
texts = st.one_of(assigned, st.text(TRICKY), st.text("ab ' \n1"))
seeds = st.integers(0, 2**32 - 1)
marked = st.lists(st.one_of(texts, st.sampled_from((*SPECIALS, "<|a", "|>")))).map("".join)

TRAINED = BPE.train(MANUAL, 800, special=SPECIALS)
PAIRS = BPE.train([a + b for a in TRICKY for b in TRICKY], 3000, r"[\s\S]+", SPECIALS)
PAIRS = BPE(PAIRS.tokens, PAIRS.merges, PAIRS.special)  # two letters of a piece are always a token
ALL = {
    "gpt4": TRAINED,
    "pairs": PAIRS,
    "gpt2": BPE.train(MANUAL, 600, "gpt2", SPECIALS),
    "unsplit": BPE.train([text[:999] for text in MANUAL], 500, r"[\s\S]+", SPECIALS),
    "bytes": BPE.bytes(SPECIALS),
    "characters": BPE.characters([TRICKY[:20], *MANUAL], 270, SPECIALS),
}
IN_TIKTOKEN = {bpe.fingerprint: bpe.to_tiktoken() for bpe in ALL.values()}
every_tokenizer = pytest.mark.parametrize("bpe", ALL.values(), ids=ALL)

many = settings(max_examples=20 * settings().max_examples)  # for laws that take no time


def permuted(bpe: BPE, seed: int) -> tuple[BPE, list[int]]:
    """The same tokenizer with other ids, special ones among the ordinary, and old id -> new id."""
    new = list(range(bpe.vocab_size))
    random.Random(seed).shuffle(new)
    tokens = [b""] * bpe.vocab_size
    for old, token in enumerate(bpe.tokens):
        tokens[new[old]] = token
    merges = [(new[left], new[right]) for left, right in bpe.merges]
    return BPE(tokens, merges, {s: new[id] for s, id in bpe.special.items()}, bpe.pattern), new


# --- splitting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
@many
@given(texts)
def test_pieces_joined_are_the_text(pattern, text):
    assert "".join(splitter(pattern)(text)) == text


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
@many
@given(st.text(st.characters(max_codepoint=127)) | st.text("aS'sl1 \t\n\r\x1c."))
@example("'Sa")  # a contraction in capitals
def test_the_patterns_for_ascii_say_the_same(pattern, text):
    assert splitter(pattern)(text) == regex.findall(SPLIT_PATTERNS[pattern], text)


@many
@given(texts)
@example("a\n ")
@example("don'ſ 'S")
@example("'Sa")
@example("é'Sa")
def test_gpt4_pattern_cuts_as_tiktoken_cl100k(text):
    """In Python's regex, where the pieces show, and in tiktoken, where the merges show them."""
    assert splitter("gpt4")(text) == regex.findall(TIKTOKEN_CL100K, text)
    theirs = tiktoken.Encoding(
        "pairs", pat_str=TIKTOKEN_CL100K, mergeable_ranks=PAIRS._ids, special_tokens={}
    )
    assert PAIRS.encode(text) == theirs.encode_ordinary(text)


@many
@given(texts)
def test_o200k_pattern_is_that_of_tiktoken(text):
    assert splitter("o200k")(text) == regex.findall(TIKTOKEN_O200K, text)


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_letters_and_numbers_are_those_of_tiktoken(kind):
    """Of all characters that both know: one may have a newer version of Unicode."""
    known = "".join(c for c in map(chr, range(0x110000)) if category(c) not in ("Cn", "Cs"))
    ranks = {bytes([byte]): byte for byte in range(256)}
    theirs = tiktoken.Encoding(kind, pat_str=kind, mergeable_ranks=ranks, special_tokens={})
    ids = theirs.encode_ordinary(known)
    assert "".join(regex.findall(kind, known)) == bytes(ids).decode()


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
@many
@given(texts | st.text("aZ中1 '\n\t./s\u0301", min_size=9))
@example("don't 'll x's.\n\n  a1 b\u0301.c")
def test_a_cut_is_a_border_between_pieces_whatever_stands_beside_it(pattern, text):
    split = splitter(pattern)
    for cut in (match.start() for match in NEXT_CUT.finditer(text)):
        assert split(text[:cut]) + split(text[cut:]) == split(text)


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
@many
@given(st.text("aZ中1 '\n\t./s", max_size=60), st.integers(1, 9))
def test_pieces_of_parts_are_the_pieces_of_the_text(pattern, text, length):
    """Parts in ASCII go through another engine; here they are a few characters long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PARAGRAPH", length)
        assert splitter(pattern)(text) == regex.findall(SPLIT_PATTERNS[pattern], text)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [("(", "wrong"), (r"(\w)|\W", "captures"), (r"\w+", "leaves out"), ("a{2", "leaves out")],
)
def test_a_pattern_that_cannot_split_is_refused(pattern, problem):
    with pytest.raises(ValueError, match=problem):
        BPE.train(["a b"], 300, pattern)


def test_a_pattern_made_to_take_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr(pieces, "PATIENCE", 0.1)
    with pytest.raises(ValueError, match="comes to no end"):
        splitter(r"(?:a|a)*b|.")("a" * 60)
    assert splitter(r"(?:a|a)*b|.")("aab") == ["aab"]


# --- training -------------------------------------------------------------------------------------


def test_worked_examples_of_the_docstrings():
    assert pair_counts({(1, 1, 1, 2): 5}) == {(1, 1): 10, (1, 2): 5}
    assert merge((1, 1, 1, 2), (1, 1), 9) == (9, 1, 2)
    assert list(seams(["x", "y"], "ab", "N")) == [("xa", "xN"), ("by", "Ny")]
    assert list(seams(["", "", ""], "ab", "N")) == [("ba", "NN")]


every_tie = pytest.mark.parametrize("tie", ["lowest ids", "greatest bytes"])


@every_tie
@many
@given(st.dictionaries(st.text("ab#", max_size=12), st.integers(1, 9), max_size=9))
@example({"aaaaa": 3, "aaa": 1, "baaab": 2})
@example({"abababab": 1})
def test_the_fast_trainer_learns_what_the_obvious_one_learns(tie, counts):
    learnt = list(learn_merges(counts, tie))
    assert learnt == list(learn_obviously(counts, tie))
    tokens = [bytes([byte]) for byte in range(256)]
    for (left, right), _ in learnt:
        tokens.append(tokens[left] + tokens[right])
    assert len(set(tokens)) == len(tokens)


@every_tie
@given(st.lists(st.text(" ab\né", max_size=40), max_size=9), st.sampled_from(["gpt2", "gpt4"]))
def test_the_fast_trainer_learns_the_same_on_split_text(tie, texts, pattern):
    counts = count_pieces(texts, pattern)
    assert list(learn_merges(counts, tie)) == list(learn_obviously(counts, tie))


@every_tie
def test_the_fast_trainer_learns_the_same_on_real_text(tie):
    counts = count_pieces(MANUAL[:3])
    slow, fast = learn_obviously(counts, tie), learn_merges(counts, tie)
    assert list(islice(fast, 60)) == list(islice(slow, 60))


@given(st.lists(marked, max_size=9), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=10)  # each starts some processes
def test_processes_count_and_encode_as_one_does(texts, number, group):
    one = count_pieces(texts, special=SPECIALS, processes=1)
    ids = [TRAINED.encode(text, "ids") for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "GROUP", group)
        assert count_pieces(texts, special=SPECIALS, processes=number) == one
        assert [*TRAINED.encode_batch(texts, "ids", number)] == ids


def test_processes_get_their_texts_a_few_at_a_time(monkeypatch):
    """An endless stream is no trouble, nor is a reader who stops, nor a text that is none."""
    monkeypatch.setattr(processes, "GROUP", 1)
    read = []
    endless = (read.append(n) or f"text {n}" for n in count())
    ids = TRAINED.encode_batch(endless, processes=2)
    assert [next(ids) for _ in range(3)] == [TRAINED.encode(f"text {n}") for n in range(3)]
    assert len(read) < 12
    ids.close()
    with pytest.raises(ValueError, match="surrogates"):
        list(TRAINED.encode_batch(["fine", "\ud800", "fine"], processes=2))


@pytest.mark.skipif(sys.platform != "linux", reason="there is only one process")
def test_processes_end_with_the_one_that_asked(tmp_path):
    """Even when it is killed: they hold copies of its files, and of their locks."""
    script = """
import os, processes
from itertools import repeat
processes.GROUP = 1
for pid in processes.in_processes(lambda texts: os.getpid(), repeat("text"), 2):
    print(pid, flush=True)
"""
    with Popen([sys.executable, "-c", script], cwd=ROOT, stdout=PIPE, text=True) as process:
        pids = {int(process.stdout.readline()) for _ in range(20)}
        process.kill()
    assert pids and process.pid not in pids
    deadline = time.monotonic() + 10
    while any(map(running, pids)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_greatest_bytes_learn_the_worked_example_of_cs336():
    """Stanford's assignment 1, section 2.4; Sennrich's words. (e, s) and (s, t) begin with 9 each.

    Its last three merges are as common as any other pair left: only the rule decides.
    """
    counts = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    tokens = [bytes([byte]) for byte in range(256)]
    merges = []
    for (left, right), _ in islice(learn_merges(counts, "greatest bytes"), 12):
        merges.append(f"{tokens[left].decode()} {tokens[right].decode()}")
        tokens.append(tokens[left] + tokens[right])
    assert merges == [
        "s t", "e st", "o w", "l ow", "w est", "n e", "ne west", "w i", "wi d", "wid est",
        "low e", "lowe r",
    ]  # fmt: skip


@given(seeds)
def test_merges_equal_those_of_hugging_face(seed):
    """With blank as ~ and newline as }, so that byte order is the order of HF's alphabet."""
    draw = random.Random(seed)
    text = draw.choice(MANUAL).encode("ascii", "ignore").decode().translate({32: "~", 10: "}"})
    start, pattern = draw.randrange(len(text)), r"~?[^~}]+|[~}]"
    text = text[start : start + draw.randrange(9999)]
    theirs = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    merges = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    ours = BPE.train([text], 500, pattern)
    pairs = [(ours.tokens[a].decode(), ours.tokens[b].decode()) for a, b in ours.merges]
    assert pairs == merges


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [4096, 32768])
def test_merges_of_40_megabytes_equal_those_of_rustbpe(vocab_size):
    rustbpe = pytest.importorskip("rustbpe")
    texts = own_source(40_000_000)
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERNS["gpt4"])
    ranks = sorted(theirs.get_mergeable_ranks(), key=lambda item: item[1])
    assert BPE.train(texts, vocab_size).tokens == [bytes(token) for token, _ in ranks]


def test_special_tokens_are_not_trained_on():
    apart = BPE.train(["ab", "cd"] * 9, 300)
    assert BPE.train([f"ab{END_OF_TEXT}cd"] * 9, 300) == apart
    assert not any(b"|" in token and len(token) > 1 for token in apart.tokens)


@given(st.lists(texts), st.integers(256, 300), st.sets(st.sampled_from(SPECIALS)))
def test_vocab_size_counts_bytes_merges_and_specials(texts, size, special):
    if size < 256 + len(special):
        with pytest.raises(ValueError, match=f"must be {256 + len(special)} or more"):
            BPE.train(texts, size, special=special)
        return
    bpe = BPE.train(texts, size, special=special)
    assert bpe.vocab_size == 256 + len(bpe.merges) + len(special) <= size
    learnable = len(list(learn_merges(count_pieces(texts, special=special))))
    assert len(bpe.merges) == min(learnable, size - 256 - len(special))


def test_one_text_instead_of_several_is_refused():
    with pytest.raises(ValueError, match=r"write \[text\]"):
        BPE.train("abc", 300)


# --- encoding and decoding ------------------------------------------------------------------------


@every_tokenizer
@many
@given(marked)
def test_decoding_undoes_encoding(bpe, text):
    for policy in ("text", "ids"):
        assert bpe.decode(bpe.encode(text, policy)) == text
    assert bpe.decode_bytes(bpe.encode(text)) == text.encode()


@many
@given(texts)
def test_the_byte_tokenizer_is_utf8(text):
    assert ALL["bytes"].encode(text) == list(text.encode())


@every_tokenizer
@many
@given(texts)
def test_ids_equal_tiktoken(bpe, text):
    theirs = IN_TIKTOKEN[bpe.fingerprint]
    assert bpe.encode(text) == theirs.encode_ordinary(text)


@every_tokenizer
def test_ids_equal_tiktoken_on_source_code(bpe):
    theirs = bpe.to_tiktoken()
    for module in (processes, json, re, random, regex):
        text = Path(module.__file__).read_text("utf-8")
        assert bpe.encode(text) == theirs.encode_ordinary(text)


@st.composite
def ranked_pieces(draw):
    """Any merges whatever, even such as no training would learn, and ids to apply them to."""
    pair = st.tuples(st.integers(0, 5), st.integers(0, 5))
    pairs = draw(st.lists(pair, unique=True, max_size=15))
    made = draw(st.lists(st.integers(0, 5), min_size=15, max_size=15))
    ranks = {pair: draw(st.sampled_from([rank, rank // 2])) for rank, pair in enumerate(pairs)}
    return draw(st.lists(st.integers(0, 5), max_size=30)), ranks, made


def merge_as_defined(ids, ranks, made):
    """The pair of lowest rank, of these the leftmost, until there is none."""
    while found := [(ranks[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in ranks]:
        rank, at = min(found)
        ids = [*ids[:at], made[rank], *ids[at + 2 :]]
    return ids


@many
@given(ranked_pieces())
@pytest.mark.parametrize("apply", [apply_merges, apply_merges_to_long])
def test_merges_are_applied_as_defined(apply, piece):
    """Pairs may share a rank, as they do where ids are the ranks."""
    ids, ranks, made = piece
    assert apply([*ids], ranks, made) == merge_as_defined(ids, ranks, made)


@given(st.lists(st.text("abc", min_size=1, max_size=3)), st.integers(1, 9))
def test_memory_is_bounded_and_keeps_what_was_asked_for_last(asked, half):
    """Nothing asked for again within `half` other pieces is made again."""
    made = []
    memory = Memory(lambda piece: made.append(piece) or [*piece.encode()], 2 * half)
    for at, piece in enumerate(asked):
        before = len(made)
        assert memory[piece] == tuple(piece.encode())
        assert len(memory) <= half and len(memory.old) <= half
        if piece in asked[max(0, at - half) : at]:
            assert len(made) == before


def test_long_pieces_are_not_remembered():
    memory = Memory(lambda piece: [1], 8)
    assert memory["a" * 1000] == (1,) and not memory


class CountedRanks(dict):
    looked_up = 0

    def get(self, pair, default=None):
        self.looked_up += 1
        assert self.looked_up < 600_000, "one look-up a place, one a pop and two a merge are enough"
        return super().get(pair, default)


@pytest.mark.parametrize("letters", ["a", "the", "etaoinshrdlu"])
def test_a_piece_of_100_000_letters_takes_linear_work(letters):
    """To look at every pair again after each merge takes 10^9 look-ups, as in old tiktoken."""
    text = "".join(random.Random(0).choices(letters, k=100_000))
    assert len(splitter("gpt4")(text)) == 1
    bpe = pickle.loads(pickle.dumps(TRAINED))
    bpe._ranks = CountedRanks(bpe._ranks)
    assert bpe.encode(text) == TRAINED.to_tiktoken().encode_ordinary(text)


@pytest.mark.parametrize("policy", ["text", "ids", "refuse"])
def test_a_lone_surrogate_is_refused(policy):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        TRAINED.encode("a\ud800", policy)


def test_special_tokens_three_ways():
    text, end = f"a{END_OF_TEXT}", TRAINED.end_of_text
    assert TRAINED.encode(text, "ids") == [*TRAINED.encode("a"), end]
    assert TRAINED.encode(text) == TRAINED.to_tiktoken().encode_ordinary(text)
    assert end not in TRAINED.encode(text)
    with pytest.raises(ValueError, match=re.escape(f"the special token {END_OF_TEXT!r}")):
        TRAINED.encode(text, "refuse")
    assert TRAINED.encode("a <|c|>", "refuse") == TRAINED.encode("a <|c|>")
    with pytest.raises(ValueError, match="special must be"):
        TRAINED.encode(text, "all")


def test_of_overlapping_special_tokens_the_longest_wins():
    assert TRAINED.encode("<|a|><|b|>", "ids") == [TRAINED.special["<|a|><|b|>"]]
    ids = [TRAINED.special[text] for text in ("<|a|>", "<|a|><|b|>", "<|b|>")]
    assert TRAINED.encode("<|a|><|a|><|b|><|b|>", "ids") == ids


@given(marked)
def test_special_as_text_gives_no_special_id(text):
    assert not set(TRAINED.encode(text)) & set(TRAINED.special.values())


@many
@given(st.lists(st.integers(0, TRAINED.vocab_size - 1)))
def test_a_decoded_stream_joined_is_the_text(ids):
    """Any ids, so also cut letters and bytes that are no UTF-8."""
    assert "".join(TRAINED.decode_stream(ids)) == TRAINED.decode(ids)


def test_a_stream_gives_a_letter_with_its_last_byte():
    assert list(ALL["bytes"].decode_stream("aé".encode())) == ["a", "", "é", ""]


@pytest.mark.parametrize("id", [-1, TRAINED.vocab_size, 10**30])
def test_an_unknown_id_is_refused(id):
    for decode in (
        TRAINED.decode,
        TRAINED.decode_bytes,
        lambda ids: list(TRAINED.decode_stream(ids)),
    ):
        with pytest.raises(ValueError, match=f"id {id} is not among the 800"):
            decode([5, id])


def test_end_of_text_must_be_there():
    assert TRAINED.end_of_text == TRAINED.special[END_OF_TEXT]
    with pytest.raises(ValueError, match=re.escape(f"no {END_OF_TEXT}")):
        _ = BPE.bytes(()).end_of_text


@given(marked, seeds)
def test_other_ids_change_nothing_else(text, seed):
    """Nothing is computed from an id: bytes may be shuffled, special tokens come first."""
    other, new = permuted(TRAINED, seed)
    for policy in ("text", "ids"):
        assert other.encode(text, policy) == [new[id] for id in TRAINED.encode(text, policy)]
    assert other.decode(other.encode(text, "ids")) == text


def test_tiktoken_is_refused_where_it_would_give_other_ids():
    with pytest.raises(ValueError, match="order of the merges"):
        permuted(TRAINED, 0)[0].to_tiktoken()


def test_fingerprint_differs_where_anything_differs():
    kinds = [*ALL.values(), BPE.bytes(), BPE.bytes(("<|x|>",)), permuted(TRAINED, 1)[0]]
    kinds.append(BPE(TRAINED.tokens, TRAINED.merges[:-1], TRAINED.special))
    kinds.append(BPE(TRAINED.tokens, TRAINED.merges, TRAINED.special, "gpt2"))
    assert len({bpe.fingerprint for bpe in kinds}) == len(kinds)
    assert BPE.train(MANUAL, 800, special=SPECIALS).fingerprint == TRAINED.fingerprint


def test_a_tokenizer_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(TRAINED)) == TRAINED


# --- places and characters ------------------------------------------------------------------------


@many
@given(marked, st.sampled_from(["text", "ids"]))
@every_tokenizer
def test_spans_are_the_places_of_tokens(bpe, text, special):
    """They cover the text in order; a token that is whole characters is its part of the text."""
    ids, spans = bpe.encode(text, special), bpe.spans(text, special)
    assert len(ids) == len(spans)
    covered = 0
    for id, (start, end) in zip(ids, spans, strict=True):
        assert covered - 1 <= start <= covered < end or covered - 1 <= start < end == covered
        covered = end
        token = bpe.decode_bytes([id])
        assert token in text[start:end].encode()
        assert token == text[start:end].encode() or not is_utf8(token)
    assert covered == len(text)


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


@given(assigned)
@pytest.mark.parametrize("name", ["gpt4", "gpt2", "bytes", "characters"])
def test_spans_are_those_of_hugging_face(saved, name, text):
    theirs = tokenizers.Tokenizer.from_file(str(saved[name]))
    assert ALL[name].spans(text) == theirs.encode(text).offsets


@given(st.text("aé中😀\u0301", max_size=30))
def test_each_known_character_is_a_token_and_others_are_bytes(text):
    bpe = BPE.characters(["ééé中中", "é", "a"], 259)
    assert bpe.tokens[256:] == ["é".encode(), "中".encode()] and bpe.vocab_size == 259
    want = [256 + "é中".index(c) if c in "é中" else [*c.encode()] for c in text]
    flat = [id for part in want for id in (part if isinstance(part, list) else [part])]
    assert bpe.encode(text) == flat and bpe.decode(flat) == text
    assert bpe.to_tiktoken().encode_ordinary(text) == flat
    again = replace(bpe, merges=[pair for pair, _ in bpe._splits()])  # as a file has it
    assert again.encode(text) == again.to_tiktoken().encode_ordinary(text) == flat


# --- streams --------------------------------------------------------------------------------------


@every_tokenizer
@many
@given(marked, seeds, st.sampled_from(["text", "ids", "refuse"]))
def test_a_stream_has_the_ids_of_its_text(bpe, text, seed, policy):
    """However it is cut into chunks, empty ones too, and though it is encoded bit by bit."""
    draw, chunks = random.Random(seed), []
    at = 0
    while at < len(text):
        chunks.append(text[at : at + draw.randrange(4)])
        at += len(chunks[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bpe.BLOCK", draw.randrange(9))
        try:
            want = bpe.encode(text, policy)
        except ValueError:
            with pytest.raises(ValueError, match="contains the special token"):
                list(bpe.encode_iterable(chunks, policy))
            return
        assert list(bpe.encode_iterable(chunks, policy)) == want


def test_a_stream_is_encoded_while_it_comes_in():
    read = []
    words = (read.append(i) or f"word{i} " for i in range(100_000))
    ids = TRAINED.encode_iterable(words)
    assert not read
    next(ids)
    assert 0 < len(read) < 5000


def test_little_of_a_stream_waits():
    came, waits, gone = 0, [], 0

    def words():
        nonlocal came
        for i in range(20_000):
            came += len(word := f"word{i} ")
            yield word

    for id in TRAINED.encode_iterable(words()):
        waits.append(came - gone)
        gone += len(TRAINED.decode([id]))
    assert gone == came > 10 * BLOCK and max(waits) < 2 * BLOCK


def test_a_stream_without_a_place_to_cut_takes_linear_work(monkeypatch):
    looked = []
    monkeypatch.setattr(BPE, "_last_cut", lambda self, text, tail: looked.append(len(text)) or 0)
    list(TRAINED.encode_iterable("a" * 100 for _ in range(20_000)))
    assert sum(looked) < 3 * 2_000_000


@pytest.mark.slow
def test_a_stream_of_a_gigabyte_takes_no_memory():
    """Python's own source again and again, with words that never come twice."""
    sources = [Path(m.__file__).read_text("utf-8") for m in (json, re, random, regex, processes)]
    size = 0

    def stream():
        nonlocal size
        number = 0
        while size < 1 << 30:
            for line in sources[number % len(sources)].splitlines(keepends=True):
                number += 1
                size += len(line) + 12
                yield f"{line}word{number * 7919 % 10**7} "

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    ids = BPE.train(MANUAL, 4096).encode_iterable(stream())
    sizes = [resident()]
    while sum(1 for _ in islice(ids, 1_000_000)):
        sizes.append(resident())
    grown = max(sizes) - sizes[0]
    print(f"{size:,} bytes, {len(sizes)} million ids, {grown:,} bytes more")
    assert len(sizes) > 100 and grown < 16_000_000


# --- other files ----------------------------------------------------------------------------------


def as_gpt2(bpe: BPE, folder: Path, names=("encoder.json", "vocab.bpe")) -> None:
    """The two files of GPT-2's release, for a tokenizer of ours."""
    chars = [to_chars(token) for token in bpe.tokens]
    vocab = {char: id for id, char in enumerate(chars) if char} | bpe.special
    merges = [f"{chars[left]} {chars[right]}\n" for left, right in bpe.merges]
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("".join(["#version: 0.2\n", *merges]), "utf-8")


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_s_files_are_read(names, tmp_path):
    bpe = ALL["gpt2"]
    as_gpt2(bpe, tmp_path, names)
    for path in (tmp_path, *(tmp_path / name for name in names)):
        assert BPE.load(path) == bpe
    from transformers import GPT2Tokenizer

    as_gpt2(bpe, tmp_path, ("vocab.json", "merges.txt"))
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in (*UNSEEN, "It's naïve\n\n  \t😀 1234"):
        assert bpe.encode(text) == theirs.encode(text)


@st.composite
def rank_files(draw):
    """Bytes and other tokens in any order: many that no merges reach, many cut in several ways."""
    token = st.text(draw(st.sampled_from(["a", "ab", " a", "aé"])), min_size=2, max_size=9)
    more = draw(st.lists(token.map(str.encode), unique=True, max_size=30))
    tokens = [bytes([byte]) for byte in range(256)] + [t for t in more if len(t) > 1]
    random.Random(draw(seeds)).shuffle(tokens)
    gaps = draw(st.sets(st.integers(0, len(tokens)), max_size=3))
    ids = [id for id in range(len(tokens) + len(gaps)) if id not in gaps][: len(tokens)]
    return dict(zip(tokens, ids, strict=True))


@many
@given(rank_files(), seeds, texts)
def test_rank_files_give_tiktoken_s_ids(tmp_path_factory, ranks, seed, text):
    path = tmp_path_factory.getbasetemp() / "drawn.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    special = {END_OF_TEXT: max(ranks.values()) + 5}
    ours = BPE.load(path, "gpt2", special)
    theirs = tiktoken.Encoding(
        "drawn", pat_str=SPLIT_PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=special
    )
    for text in [text, "".join(random.Random(seed).choices("aaabbb é", k=300))]:  # noqa: B020
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text + END_OF_TEXT, "ids")) == text + END_OF_TEXT


@pytest.mark.parametrize("name", ["gpt4", "gpt2", "unsplit", "bytes"])
def test_tiktoken_reads_the_ranks_that_were_written(name, tmp_path, monkeypatch):
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    bpe, path = ALL[name], tmp_path / "ours.tiktoken"
    bpe.save_ranks(path)
    assert load_tiktoken_bpe(str(path)) == bpe._ids
    again = BPE.load(path, bpe.pattern, bpe.special)
    assert again.tokens == bpe.tokens and again.vocab_size == bpe.vocab_size
    for text in (*UNSEEN, TRICKY):
        assert again.encode(text) == bpe.encode(text)
    again.save(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*UNSEEN, TRICKY):
        assert theirs.encode(text).ids == bpe.encode(text)
    again.save_ranks(path)
    assert load_tiktoken_bpe(str(path)) == bpe._ids
    with pytest.raises(ValueError, match="order of the merges"):
        permuted(TRAINED, 0)[0].save_ranks(path)


def test_special_tokens_of_a_rank_file_stand_behind_it(tmp_path):
    TRAINED.save_ranks(tmp_path / "ranks")
    assert BPE.load(tmp_path / "ranks").special == {END_OF_TEXT: len(TRAINED.tokens)}


OTHER_FILES = {
    "no number": ("ranks", b"YQ== a\n", "line 1"),
    "three words": ("ranks", b"YQ== 0\nYg== 1 2\n", "line 2"),
    "no base64": ("ranks", b"Y 0\n", "base64"),
    "not only base64": ("ranks", b"Y$Q== 0\n", "base64"),
    "rank twice": ("ranks", b"YWI= 300\n", "rank 300 again"),
    "token twice": ("ranks", b"YQ== 600\n", "same token"),
    "rank far": ("ranks", b"YWI= 99999999\n", "far beyond"),
    "rank endless": ("ranks", b"YWI= " + b"9" * 5000, "line 257"),
    "byte missing": ("alone", b"YQ== 0\n", "no token"),
    "empty": ("alone", b"\n", "empty"),
    "merge of one": ("vocab.bpe", b"#version: 0.2\n\xc4\xa0\n", "two tokens"),
    "merge unknown": ("vocab.bpe", b"#version: 0.2\na qqqq\n", "two tokens"),
    "merges lost": ("vocab.bpe", b"#version: 0.2\n", "do not lead"),
    "no UTF-8": ("vocab.bpe", b"\xff", "decode"),
    "id a text": ("encoder.json", b'{"a": "0"}', "no number"),
    "special id null": ("encoder.json", b'{"<|x|>": null}', "no number"),
    "special id a list": ("encoder.json", b'{"<|x|>": [1]}', "no number"),
    "special id a float": ("encoder.json", b'{"<|x|>": 1.0}', "no number"),
    "special id true": ("encoder.json", b'{"<|x|>": true}', "no number"),
    "no vocabulary": ("other.json", b'{"a": 0}', "has no model"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_broken_files_are_refused_with_one_sentence(name, tmp_path):
    which, content, problem = OTHER_FILES[name]
    as_gpt2(ALL["gpt2"], tmp_path)
    if which == "ranks":
        lines = [base64.b64encode(bytes([b])) + f" {300 + b}\n".encode() for b in range(256)]
        content = b"".join(lines) + content if name.startswith(("rank", "token")) else content
    (tmp_path / which).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        BPE.load(tmp_path / which)
    assert_one_sentence(error.value, tmp_path / which, AGAIN)


def test_a_folder_without_a_tokenizer_and_a_missing_partner_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        BPE.load(tmp_path)
    as_gpt2(ALL["gpt2"], tmp_path)
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(OSError, match=r"vocab\.bpe"):
        BPE.load(tmp_path)


@pytest.mark.slow
def test_real_files():
    """GPT-2's released files and real text, where REAL_DATA names a folder that holds them.

    gpt2/encoder.json, gpt2/vocab.bpe, text/**/*.txt
    """
    if "REAL_DATA" not in os.environ:
        pytest.skip("REAL_DATA names no folder")
    folder = Path(os.environ["REAL_DATA"])
    ours = BPE.load(folder / "gpt2")
    assert ours.vocab_size == 50257 and ours.end_of_text == 50256
    theirs = ours.to_tiktoken()
    paths = sorted((folder / "text").rglob("*.txt"))
    for path in paths:
        text = path.read_text("utf-8")
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids, path
        chunks = (text[i : i + 999] for i in range(0, len(text), 999))
        assert list(ours.encode_iterable(chunks)) == ids, path
    draw = random.Random(0)
    known = [c for c in map(chr, range(0x110000)) if category(c) not in ("Cn", "Cs")]
    for _ in range(100_000):
        among = draw.choice([known, known[:600], known[:140]])
        text = "".join(draw.choices(among, k=draw.randrange(40)))
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert paths


# --- tokenizer.json -------------------------------------------------------------------------------

SHUFFLED = permuted(TRAINED, 7)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Every tokenizer's tokenizer.json."""
    folder = tmp_path_factory.mktemp("saved")
    for name, bpe in (ALL | {"shuffled": SHUFFLED}).items():
        bpe.save(folder / f"{name}.json")
    return {path.stem: path for path in folder.iterdir()}


def test_what_was_saved_is_loaded(saved):
    """The pattern too, which minbpe once did not keep."""
    assert len(saved) == len(ALL) + 1  # and no temporary file
    for name, bpe in ALL.items():
        loaded = BPE.load(saved[name])  # where ids are the ranks, all merges are written out
        assert replace(loaded, merges=bpe.merges) == bpe
        assert (loaded.merges == bpe.merges) == (bpe.merges is not None)
    loaded = BPE.load(saved["shuffled"])
    assert loaded.fingerprint == BPE(loaded.tokens, *list(vars(SHUFFLED).values())[1:4]).fingerprint


def test_a_piece_that_is_a_token_is_that_token(tmp_path):
    """Though no merges lead there: tiktoken does so, Hugging Face where ignore_merges is set."""
    bpe = BPE([*TRAINED.tokens[:256], b"abc"], [], {})
    bpe.save(tmp_path / "whole.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "whole.json"))
    for text, ids in {"abc": [256], "abcd": list(b"abcd"), "abc.abc": [256, 46, *b"abc"]}.items():
        assert bpe.encode(text) == theirs.encode(text).ids == ids


def test_saving_over_a_file_replaces_it_whole(saved, tmp_path):
    path = tmp_path / "tokenizer.json"
    for bpe in (TRAINED, ALL["bytes"]):
        bpe.save(path)
        assert BPE.load(path) == bpe
    impossible = BPE(TRAINED.tokens, [], TRAINED.special, "\ud800|[\\s\\S]")
    with pytest.raises(ValueError, match="surrogates"):
        impossible.save(path)
    assert BPE.load(path) == ALL["bytes"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [*ALL, "shuffled"])
def test_hugging_face_gives_the_same_ids(name, saved):
    bpe, theirs = (ALL | {"shuffled": SHUFFLED})[name], None
    theirs = tokenizers.Tokenizer.from_file(str(saved[name]))
    assert theirs.get_vocab_size() == bpe.vocab_size

    @many
    @given(marked)
    def law(text):
        ids = bpe.encode(text, "ids")
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text

    law()


def test_transformers_gives_the_same_ids(saved):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(saved["gpt4"]))
    assert len(theirs) == TRAINED.vocab_size
    for text in (*MANUAL[:5], "naïve\n\n  \t😀 1234", f"a{END_OF_TEXT} b<|a|><|b|>"):
        ids = TRAINED.encode(text, "ids")
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_hugging_face_trained_is_loaded(listed, tmp_path):
    """GPT-2's layout: ByteLevel does the splitting, special ids come first, merges are strings."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    theirs.train_from_iterator(MANUAL, trainer)
    file = json.loads(theirs.to_str())
    if not listed:
        file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    (tmp_path / "theirs.json").write_text(json.dumps(file))
    ours = BPE.load(tmp_path / "theirs.json")
    assert ours.end_of_text == 0 and ours.vocab_size == 700
    assert ours.pattern == SPLIT_PATTERNS["gpt2"]
    for text in (*UNSEEN, TRICKY, f"x{END_OF_TEXT}y"):
        assert ours.encode(text, "ids") == theirs.encode(text).ids


def edit(path: str, value):
    """Sets model.vocab.a, say, to a value, or to what a function makes of the old one."""

    def do(file):
        *parents, last = path.split("/")
        for key in parents:
            file = file[int(key) if isinstance(file, list) else key]
        last = int(last) if isinstance(file, list) else last
        file[last] = value(file.get(last)) if callable(value) else value

    return do


def drop(path: str):
    *parents, last = path.split("/")
    return edit("/".join(parents), lambda old: {k: v for k, v in old.items() if k != last})


BROKEN = {
    "no model": (edit("model", None), "no model"),
    "no vocab": (drop("model/vocab"), "no vocab"),
    "merges in a dict": (edit("model/merges", {}), "no merges"),
    "no added tokens": (edit("added_tokens", None), "no added_tokens"),
    "WordPiece": (edit("model/type", "WordPiece"), "not BPE"),
    "normalizer": (edit("normalizer", {"type": "NFC"}), "normalizer"),
    "dropout": (edit("model/dropout", 0.1), "dropout"),
    "word end": (edit("model/end_of_word_suffix", "</w>"), "end_of_word_suffix"),
    "no byte": (drop("model/vocab/ÿ"), "0xff"),
    "byte renamed": (
        edit("model/vocab", lambda v: {"zzzz" if k == "ÿ" else k: v[k] for k in v}),
        "0xff",
    ),
    "huge id": (edit("model/vocab/a", 10**18), "far beyond"),
    "negative id": (edit("model/vocab/a", -1), "no number"),
    "double id": (edit("model/vocab/a", 98), "doubles"),
    "id a list": (edit("model/vocab/a", [97]), "no number"),
    "id a text": (edit("model/vocab/a", "97"), "no number"),
    "not in bytes": (
        edit("model/vocab", lambda v: {"a b" if v[k] == 300 else k: v[k] for k in v}),
        "byte alphabet",
    ),
    "merge of unknown": (edit("model/merges/5", ["a", "qqqq"]), "does not name two tokens"),
    "merge of one": (edit("model/merges/5", ["a"]), "does not name two tokens"),
    "merge of numbers": (edit("model/merges/5", [97, 98]), "does not name two tokens"),
    "merge makes unknown": (edit("model/merges/5", ["q", "x"]), "needs or makes"),
    "merge of special": (edit("model/merges/5", ["a", END_OF_TEXT]), "needs or makes"),
    "merge twice": (edit("model/merges", lambda merges: merges[:1] + merges), "listed twice"),
    "special twice": (edit("added_tokens", lambda added: added + added[:1]), "listed twice"),
    "special no text": (edit("added_tokens/0/content", 5), "is not a text"),
    "special empty": (edit("added_tokens/0/content", ""), "empty"),
    "special strips": (edit("added_tokens/0/lstrip", True), "nothing more"),
    "special id taken": (edit("added_tokens/0/id", 97), "clashes"),
    "special is ordinary": (edit("added_tokens/0/content", "a"), "clashes"),
    "new special far": (
        edit("added_tokens", lambda added: [*added, {"id": 10**18, "content": "<|new|>"}]),
        "far more",
    ),
    "special id far": (edit("added_tokens/0/id", 10**18), "clashes"),
    "pre_tokenizer": (edit("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer"),
    "prefix space": (
        edit("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        "Split",
    ),
    "pattern": (edit("pre_tokenizer/pretokenizers/0/pattern/Regex", "("), "split pattern"),
    "unreachable": (
        lambda f: (edit("model/merges", [])(f), drop("model/ignore_merges")(f)),
        "lead",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_one_sentence(name, saved, tmp_path):
    breaks, problem = BROKEN[name]
    file, path = json.loads(saved["gpt4"].read_text("utf-8")), tmp_path / "broken.json"
    breaks(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=problem) as error:
        BPE.load(path)
    assert_one_sentence(error.value, path, AGAIN)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\xff\xfe", b"{", b"null", b"[]", b'"a"', b"5", b"[" * 100_000]
)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        BPE.load(path)
    assert_one_sentence(error.value, path, AGAIN)


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> Path:
    """A folder with a small tokenizer in every format."""
    folder, bpe = tmp_path_factory.mktemp("formats"), BPE.train(MANUAL[:1], 400)
    as_gpt2(bpe, folder)
    bpe.save(folder / "tokenizer.json")
    bpe.save_ranks(folder / "ranks.tiktoken")
    return folder


def loaded_or_refused(folder: Path, seed: int) -> bool:
    draw = random.Random(seed)
    path = draw.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    path.write_bytes(mutated_text(content, draw))
    try:
        bpe = BPE.load(path)
    except ValueError as error:
        assert_one_sentence(error, path, AGAIN)
        return False
    finally:
        path.write_bytes(content)
    if bpe.pattern == SPLIT_PATTERNS["gpt4"]:  # another may not match every text
        assert bpe.decode(bpe.encode("any text")) == "any text"
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


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tokens": [bytes([b]) for b in range(255)]}, "byte 0xff"),
        ({"tokens": [bytes([b]) for b in range(256)] + [b"a"]}, "same token"),
        ({"merges": [(97, 98)]}, "needs or makes"),
        ({"merges": [(97, 999)]}, "needs or makes"),
        ({"special": {"": 256}}, "empty"),
        ({"special": {"\ud800": 256}}, "unprintable"),
        ({"special": {"<|x|>": 255}}, "clashes"),
        ({"special": {"<|x|>": 256, "<|y|>": 256}}, "clashes"),
        ({"special": {"a": 256}}, "clashes"),
        ({"special": {"<|x|>": 2000}}, "far more"),
        ({"special": {"<|x|>": -1}}, "clashes"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(fields, problem):
    whole = {"tokens": [bytes([b]) for b in range(256)], "merges": [], "special": {}}
    with pytest.raises(ValueError, match=problem):
        BPE(**whole | fields)
