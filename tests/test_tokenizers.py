"""The laws that hold for every tokenizer, and the door to all of them, tokenizer.py."""

import io
import json
import pickle
import random
import re
import sys
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from unicodedata import category

import pytest
import sentencepiece as spm
from helpers import assert_one_sentence, mutated_text, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

import processes
import tokenizer
from bpe import BPE
from run import UserError
from sentencepiece_files import read_model
from tokenizer import KINDS, load
from unigram import SentencePieceBPE, Unigram
from vocabulary import END_OF_TEXT, MOST_LEARNT, Tokenizer
from wordpiece import SPECIAL, Normalizer, WordPiece, as_text, normalize

MANUAL = list(topics.values())[:30]
LINES = [line for text in MANUAL for line in text.splitlines()]
TRICKY = "aZſéßΩ中१²'sS019 \t\n\r\x1c\x85\xa0\u2028\u3000\u200b_.!-<|>#[]😀\u0301▁ﬁ\0"
SPECIALS = (END_OF_TEXT, "<|a|>", "<|a|><|b|>", "<|b|>")

KNOWN = [c for c in map(chr, range(0x110000)) if category(c) not in ("Cn", "Cs")]
texts = st.one_of(st.text(st.sampled_from(KNOWN)), st.text(TRICKY), st.text("abe ' \n1"))
marked = st.lists(st.one_of(texts, st.sampled_from((*SPECIALS, "<|a", "[UNK]")))).map("".join)
policies = st.sampled_from(["text", "ids"])
many = settings(max_examples=10 * settings().max_examples)  # for laws that take no time


def sentencepiece_bpe() -> SentencePieceBPE:
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES[:2000]), model_writer=out, vocab_size=600, model_type="bpe",
        byte_fallback=True, control_symbols=list(SPECIALS), minloglevel=2, num_threads=1,
        normalization_rule_name="identity",
    )  # fmt: skip
    return SentencePieceBPE(*read_model(out.getvalue()))


ALL: dict[str, Tokenizer] = {
    "bpe": BPE.train(MANUAL, 800, special=SPECIALS),
    "gpt2": BPE.train(MANUAL, 600, "gpt2", SPECIALS),
    "bytes": BPE.bytes(SPECIALS),
    "characters": BPE.characters([TRICKY, *MANUAL], 300, SPECIALS),
    "wordpiece": WordPiece.train([TRICKY, *MANUAL], 900, (*SPECIAL, *SPECIALS)),
    "cased": WordPiece.train(MANUAL, 900, (*SPECIAL, *SPECIALS), Normalizer(lowercase=False)),
    "unigram": Unigram.train(LINES[:2000], 800, SPECIALS),
    "nfkc": Unigram.train(LINES[:2000], 800, SPECIALS, normalizer="nfkc"),
    "unknowns": Unigram.train(LINES[:2000], 500, SPECIALS, byte_fallback=False),
    "sentencepiece bpe": sentencepiece_bpe(),
}
LOSSLESS = ("bpe", "gpt2", "bytes", "characters", "unigram")
every = pytest.mark.parametrize("name", ALL)


# --- text -> ids -> text --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
@many
@given(marked, policies)
def test_a_lossless_tokenizer_gives_every_text_back(name, text, special):
    """But for SentencePiece's special tokens, which are invisible, and its sign for blank."""
    ours = ALL[name]
    if name == "unigram":
        special, text = "text", text.replace("▁", " ")
    assert ours.decode(ours.encode(text, special)) == text


@pytest.mark.parametrize("name", ["wordpiece", "cased"])
@many
@given(texts)
def test_wordpiece_gives_the_normalized_text_back_but_for_blanks(name, text):
    ours = ALL[name]
    ids = ours.encode(text)
    if ours.unknown_id not in ids:
        normal = as_text(normalize(text, ours.normalizer))
        assert "".join(ours.decode(ids).split()) == "".join(normal.split())


@pytest.mark.parametrize("name", [name for name in ALL if name != "nfkc"])
@many
@given(texts)
def test_what_was_decoded_is_encoded_to_the_same_ids(name, text):
    """Where nothing is unknown, and where normalizing twice does no more than once.

    NFKC as in SentencePiece may: where it drops what stood between a letter and an accent.
    """
    ours = ALL[name]
    ids = ours.encode(text.replace("▁", ""))
    if ours.unknown_id not in ids:
        assert ours.encode(ours.decode(ids)) == ids


@every
@many
@given(st.data())
def test_a_decoded_stream_joined_is_the_text(name, data):
    """Any ids, so also bytes that are no UTF-8, blanks before the first letter, unknown ones."""
    ours = ALL[name]
    some = sorted(ours.known_ids)
    ids = data.draw(st.lists(st.sampled_from(some) | st.sampled_from(some[:40])))
    assert "".join(ours.decode_stream(ids)) == ours.decode(ids)


@every
def test_a_stream_is_decoded_while_it_comes_in(name):
    """All that the ids read so far say has been given out, but for bytes of half a letter."""
    ours, read = ALL[name], []
    ids = ours.encode("a text, é and so on.\n" * 20)
    written = ""
    for text in ours.decode_stream(read.append(id) or id for id in ids):
        written += text
        assert written == ours.decode(ids[: len(read)]).rstrip("\ufffd")
    assert written == ours.decode(ids)


@every
def test_each_known_id_stands_for_something_and_no_other(name):
    ours = ALL[name]
    known = ours.known_ids
    assert max(known) + 1 == ours.vocab_size and min(known) >= 0
    assert {*ours.special.values(), ours.end_of_text} <= known
    assert {*ours.encode("".join(MANUAL))} <= known - {*ours.special.values()} | {ours.unknown_id}
    for id in known:
        assert ours.token(id) and isinstance(ours.decode([id]), str)
    for id in {-1, ours.vocab_size, 10**30, *range(ours.vocab_size)} - known:
        for give in (ours.token, lambda id: ours.decode([id])):
            with pytest.raises(ValueError, match=f"id {id} is not among the {ours.vocab_size}"):
                give(id)


@every
@many
@given(marked, policies)
def test_spans_lie_in_the_text_in_order_and_leave_no_letter_out(name, text, special):
    ours = ALL[name]
    ids, spans = ours.encode(text, special), ours.spans(text, special)
    assert len(ids) == len(spans)
    covered, last = set(), 0
    for id, (start, end) in zip(ids, spans, strict=True):
        assert 0 <= start <= end <= len(text) and end >= last
        covered.update(range(start, end))
        last = end
        if id in ours.special.values() and id != ours.unknown_id:
            assert special == "ids" and ours.special[text[start:end]] == id
    letters = {at for at, char in enumerate(text) if name in LOSSLESS or char.isalnum()}
    assert letters <= covered


# --- special tokens -------------------------------------------------------------------------------


@every
@many
@given(marked)
def test_special_as_text_is_never_a_special_id(name, text):
    ours = ALL[name]
    assert not {*ours.encode(text)} & {*ours.special.values()} - {ours.unknown_id}


@every
@many
@given(marked)
def test_special_as_ids_cuts_the_text_there_and_nowhere_else(name, text):
    ours = ALL[name]
    longest_first = sorted(ours.special, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    want = []
    for at, part in enumerate(parts):
        want += [ours.special[part]] if at % 2 else ours.encode(part)
    assert ours.encode(text, "ids") == want
    if len(parts) == 1:
        assert ours.encode(text, "refuse") == ours.encode(text)
        return
    for method in (ours.encode, ours.spans):
        with pytest.raises(ValueError, match=re.escape(repr(parts[1]))):
            method(text, "refuse")


@every
@pytest.mark.parametrize("special", ["text", "ids", "refuse", "all"])
def test_a_lone_surrogate_and_an_unknown_policy_are_refused(name, special):
    problem = "special must be" if special == "all" else "surrogates not allowed"
    for method in (ALL[name].encode, ALL[name].spans):
        with pytest.raises(ValueError, match=problem):
            method("a\ud800", special)


# --- training, processes, files -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_alike(kind):
    ours = KINDS[kind].train(MANUAL, 700, progress=True, processes=1)
    assert ours.vocab_size == 700 and END_OF_TEXT in ours.special
    assert ours.fingerprint == KINDS[kind].train(iter(MANUAL), 700, processes=2).fingerprint
    apart = [*MANUAL[:5], END_OF_TEXT.join(MANUAL[5:])]
    assert KINDS[kind].train(apart, 700) == ours
    for size in (0, -5, 99):
        with pytest.raises(ValueError, match=rf"vocab_size must be \d+ or more, not {size}"):
            KINDS[kind].train(MANUAL, size)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        KINDS[kind].train("a text", 700)
    with pytest.raises(ValueError, match="surrogates"):
        KINDS[kind].train(["\ud800"], 700)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [10**9, 10**400])
def test_a_vocabulary_ends_where_nothing_is_left_to_learn(kind, size):
    ours = KINDS[kind].train(MANUAL[:3], size)
    assert 300 < ours.vocab_size < MOST_LEARNT
    assert ours == KINDS[kind].train(MANUAL[:3], ours.vocab_size + 1000)


@every
@given(st.lists(marked, max_size=9), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=4)  # each starts some processes
def test_processes_encode_as_one_does(name, texts, number, group):
    ours = ALL[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "GROUP", group)
        assert [*ours.encode_batch(texts, "ids", number)] == [ours.encode(t, "ids") for t in texts]


def test_no_two_have_the_same_fingerprint():
    assert len({ours.fingerprint for ours in ALL.values()}) == len(ALL)
    same = ALL["unigram"]
    assert SentencePieceBPE(*same._values()).fingerprint != same.fingerprint


@every
def test_what_was_saved_or_pickled_is_the_same(name, tmp_path):
    ours = ALL[name]
    path = tmp_path / ours.file_name
    ours.save(path)
    assert [*tmp_path.iterdir()] == [path]
    for again in (load(path), load(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        for text in (*MANUAL[:5], TRICKY, "".join(SPECIALS)):
            assert again.encode(text, "ids") == ours.encode(text, "ids")
            assert again.spans(text) == ours.spans(text)
        assert again.known_ids == ours.known_ids and again.unknown_id == ours.unknown_id
        if name != "characters":  # whose file lists merges
            assert again == ours and again.fingerprint == ours.fingerprint


def write_formats(folder: Path) -> dict[str, tuple[Path, Tokenizer]]:
    """Every format in a folder of its own: name -> (file, the tokenizer that it holds)."""
    out = {}

    def place(name: str, file: str, ours: Tokenizer) -> Path:
        (folder / name).mkdir()
        out[name] = folder / name / file, ours
        return folder / name / file

    bpe, gpt2, wordpiece, unigram = (ALL[n] for n in ("bpe", "gpt2", "wordpiece", "unigram"))
    for ours in (bpe, wordpiece):
        ours.save(path := place(f"{type(ours).__name__} json", "tokenizer.json", ours))
        file = json.loads(path.read_text("utf-8"))
        del file["model"]["type"]
        path = place(f"{type(ours).__name__} without type", "tokenizer.json", ours)
        path.write_text(json.dumps(file))
    plain = WordPiece.train(MANUAL, 500)
    plain.save_vocab(place("vocab.txt", "vocab.txt", plain))
    for name in ("unigram", "sentencepiece bpe"):
        ALL[name].save(place(name, "spiece.model", ALL[name]))
    ranks = BPE(bpe.tokens, None, {END_OF_TEXT: len(bpe.tokens)})
    ranks.save_ranks(place("ranks", "ours.tiktoken", ranks))
    gpt2.save(folder / "gpt2.json")
    model = json.loads((folder / "gpt2.json").read_text("utf-8"))["model"]
    (folder / "gpt2.json").unlink()
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        for which in (0, 1):
            path = place(names[which], names[which], gpt2)
            path.with_name(names[0]).write_text(json.dumps(model["vocab"]))
            merges = ["#version: 0.2", *map(" ".join, model["merges"])]
            path.with_name(names[1]).write_text("\n".join(merges), "utf-8")
    # The original counts, and a .model that is none is passed over.
    unigram.save(path := place("model beside json", "spiece.model", unigram))
    bpe.save(path.with_name("tokenizer.json"))
    bpe.save(path := place("ranks called model", "tokenizer.json", bpe))
    ranks.save_ranks(path.with_name("tokenizer.model"))
    return out


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> dict[str, tuple[Path, Tokenizer]]:
    return write_formats(tmp_path_factory.mktemp("formats"))


def test_whatever_lies_at_a_path_is_loaded(formats):
    assert len(formats) == 14
    for name, (path, ours) in formats.items():
        for again in (load(path), load(path.parent), load(str(path))):
            assert again == ours, name


NONE = {
    "empty": (b"", "none of those"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0", "none of those"),
    "prose": (b"It was the best of times, it was the worst of times.\n", "none of those"),
    "two words": (b"Chapter one\n", "line 1"),
    "null": (b"null", "none of those"),
    "list": (b'["model"]', "none of those"),
    "cut off": (b'{"model": ', "Expecting"),
    "deep": (b'{"a":' * 100_000, "recursion"),
    "settings": (b'{"model_type": "llama"}', "has no model"),
    "number": (b'{"model": 5}', "has no model"),
    "zeros": (b"\n\0\0\0", "SentencePiece"),
    "unigram": (b'{"model": {"type": "Unigram", "vocab": []}}', "its model is 'Unigram'"),
    "no name": (b'{"model": {"type": ["BPE"]}}', r"its model is \['BPE'\]"),
    "words": (b"[PAD]\n\n[UNK]\n", "its line 2"),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_tokenizer_is_told_in_one_sentence(name, tmp_path):
    content, problem = NONE[name]
    path = tmp_path / "some.file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        load(path)
    assert_one_sentence(error.value, path, "")


def test_a_folder_without_a_tokenizer_and_a_file_that_is_not_there_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"it has none of \*\.model, tokenizer\.json") as error:
        load(tmp_path)
    assert_one_sentence(error.value, tmp_path, "")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_a_mutated_file_is_loaded_or_refused(formats):
    @many
    @given(seeds)
    def law(seed):
        draw = random.Random(seed)
        path, _ = draw.choice([*formats.values()])
        content = path.read_bytes()
        path.write_bytes(mutated_text(content, draw))
        try:
            ours = load(path)
        except ValueError as error:
            assert_one_sentence(error, path, "")
            return
        finally:
            path.write_bytes(content)
        with suppress(ValueError):  # a pattern that leaves out parts of a text
            assert len(ours.spans("any text")) == len(ours.encode("any text"))

    law()


# --- the script -----------------------------------------------------------------------------------


def run(monkeypatch, tmp_path, *arguments: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", *arguments])
    tokenizer.script()


def test_the_script_shows_three_ways_to_cut_and_draws(capsys, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--vocab-size", "400", "--text", "the naïve", "")
    out = capsys.readouterr().out
    assert "' the'" in out and "| " in out and "the|n|##a" in out and "drawn" in out
    assert all(re.search(rf"^{kind} +400 .* s$", out, re.M) for kind in KINDS)
    picture = tmp_path / "runs" / "tokenizers.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture.relative_to(tmp_path)) in out


def test_the_script_cuts_with_a_tokenizer_of_a_file(capsys, monkeypatch, tmp_path, formats):
    for path, ours in formats.values():
        run(monkeypatch, tmp_path, "--file", str(path), "--text", "é\n")
        out = capsys.readouterr().out
        assert re.search(rf"^{type(ours).__name__} +{ours.vocab_size:,} ", out, re.M)
    run(monkeypatch, tmp_path, "--file", str(formats["BPE json"][0]), "--text", "€\n")
    assert r"  4  \xe2|\x82|\xac|\n" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--vocab-size", "256"], "--vocab-size is too small for bpe: vocab_size must be 257"),
        (["--vocab-size", "-9"], "too small"),
        (["--text", "fine", "\ud800"], "--text cannot be written as UTF-8"),
        (["--file", __file__], "holds no tokenizer"),
        (["--file", "."], "it has none of"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, problem, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        run(monkeypatch, tmp_path, *arguments)
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
