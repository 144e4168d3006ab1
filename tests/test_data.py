"""Laws of data.py: nothing is lost, invented, seen across a border or found in the other part."""

import ast
import gzip
import json
import lzma
import shutil
import sys
import tempfile
from collections import Counter
from hashlib import blake2b
from itertools import accumulate, combinations, pairwise, product
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st

import data
import documents
import packing
from attention import document_mask
from bpe import BPE
from clean import Item, Step, Store, gather
from data import DataConfig, TokenizerConfig, held_out, prepare, read_all, split
from dedup import first_copies, text_hashes
from documents import Document, prose, python_files, standard_library
from kernels.mask import visible
from objectives import IGNORE, Rows
from packing import PACKINGS, Mixture, Part, Shards, ShardWriter, Stream, best_fit, cut, fill, whole
from run import UserError, read_json
from vocabulary import END_OF_TEXT

END = 0
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)  # tokens of documents, END included
widths = st.integers(1, 12)
GOOD = [topic for topic in topics.values() if 1500 < len(topic) < 9000][:3]
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")
texts = st.text(characters, max_size=30)
BYTES = TokenizerConfig("bytes")


def fresh(tmp_path: Path) -> Path:
    """A new folder for each example that Hypothesis draws."""
    return Path(tempfile.mkdtemp(dir=tmp_path))


# --- packing --------------------------------------------------------------------------------------


def numbered(sizes: list[int]) -> list[list[int]]:
    """Documents of these sizes in which no token occurs twice: END 1 2 3, END 4 5, …"""
    ends = accumulate(size - 1 for size in sizes)
    return [[END, *range(end - size + 2, end + 1)] for size, end in zip(sizes, ends, strict=True)]


def store(folder: Path, documents: list[list[int]], dtype=np.uint32) -> Shards:
    writer = ShardWriter(folder, "train", np.dtype(dtype), END)
    for document in documents:
        writer.write(document[1:], size=1)
    close = writer.close()
    assert close == {"documents": len(documents), "bytes": len(documents),
                     "tokens": sum(map(len, documents)), "hash": close["hash"]}  # fmt: skip
    return Shards(folder, "train", close | {"dtype": np.dtype(dtype).name})


def pairs_of(documents: list[list[int]]) -> Counter:
    """What an epoch must ask: each token with the next one, the last with END."""
    return Counter(pair for d in documents for pair in zip(d, [*d[1:], END], strict=True))


def pairs_in(*batches: Rows) -> Counter:
    """What rows do ask."""
    asked = Counter()
    for rows in batches:
        real = rows.nexts != IGNORE
        asked.update(zip(rows.ids[real].tolist(), rows.nexts[real].tolist(), strict=True))
    return asked


def same(a: Rows, b: Rows) -> bool:
    return all(map(torch.equal, a, b))


def joined(batches: list[Rows]) -> Rows:
    return Rows(*map(torch.cat, zip(*batches, strict=True)))


@given(lengths, widths, st.none() | seeds)
def test_packing_loses_no_pair_and_invents_none(tmp_path, sizes, T, seed):
    documents = numbered(sizes)
    shards = store(fresh(tmp_path), documents)
    rng = None if seed is None else np.random.default_rng(seed)
    rows = fill(best_fit(cut(shards.lengths, T, rng), T), shards, T, END)
    assert pairs_in(rows) == pairs_of(documents)


@given(lengths, widths, st.none() | seeds)
def test_a_document_is_cut_into_pieces_that_follow_each_other(sizes, T, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    pieces = sorted(cut(np.array(sizes), T, rng))
    assert all(1 <= piece.length <= T for piece in pieces)
    for i, size in enumerate(sizes):
        own = [piece for piece in pieces if piece.document == i]
        ends = list(accumulate(piece.length for piece in own))
        assert [piece.begin for piece in own] == [0, *ends[:-1]] and ends[-1] == size
        assert size > T or len(own) == 1


def test_a_long_document_is_cut_elsewhere_each_time():
    rng = np.random.default_rng(0)
    firsts = Counter(cut(np.array([100]), 8, rng)[0].length for _ in range(800))
    assert set(firsts) == set(range(1, 9)) and min(firsts.values()) > 50


@given(lengths, widths, st.none() | seeds)
def test_a_token_sees_its_own_piece_and_nothing_across_a_border(tmp_path, sizes, T, seed):
    """Tokens are different, so that ids[s + 1] = nexts[s] says: one text, without a gap."""
    shards = store(fresh(tmp_path), numbered(sizes))
    rng = None if seed is None else np.random.default_rng(seed)
    packed = best_fit(cut(shards.lengths, T, rng), T)
    rows = fill(packed, shards, T, END)
    sees = visible(document_mask(rows.starts), T)[:, 0]
    for b, t in np.ndindex(*rows.ids.shape):
        seen = sees[b, t].nonzero()[:, 0].tolist()
        assert seen == list(range(seen[0], t + 1))
        for s in seen[:-1]:
            assert rows.nexts[b, s] == rows.ids[b, s + 1] != END
        assert rows.nexts[b, t] != IGNORE or seen == [t]
    padding = int((rows.nexts == IGNORE).sum())
    before = sum(p.length * (p.length + 1) // 2 for row in packed for p in row)
    assert sees.sum() == before + padding, "a token must see all that stands before it in its piece"


def best_fit_obvious(sizes: list[int], T: int) -> list[int]:
    """Fills of the rows: each piece, the longest first, goes where it leaves the least room."""
    fills: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b, full in enumerate(fills) if full + size <= T]
        if fitting:
            fills[max(fitting, key=fills.__getitem__)] += size
        else:
            fills.append(size)
    return fills


@given(lengths, st.integers(1, 100), seeds)
def test_best_fit_is_the_obvious_best_fit(sizes, T, seed):
    pieces = cut(np.array(sizes), T, np.random.default_rng(seed))
    rows = best_fit(pieces, T)
    assert sorted(piece for row in rows for piece in row) == sorted(pieces)
    fills = [sum(piece.length for piece in row) for row in rows]
    assert sorted(fills) == sorted(best_fit_obvious([piece.length for piece in pieces], T))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 40))
def test_no_row_overflows_and_no_two_rows_would_fit_into_one(sizes, T):
    """So at most one row is half empty, and there are fewer than 2 · tokens / T + 1 rows.

    A later row was opened because its first piece fitted nowhere, so not into the earlier one.
    """
    fills = [sum(p.length for p in row) for row in best_fit(cut(np.array(sizes, int), T, None), T)]
    assert all(full <= T for full in fills)
    assert all(a + b > T for a, b in combinations(fills, 2))
    assert sum(2 * full <= T for full in fills) <= 1
    assert len(fills) < 2 * sum(sizes) / T + 1


@given(lengths, widths, st.integers(1, 7))
def test_whole_is_every_pair_once_and_always_the_same(tmp_path, sizes, T, B):
    documents = numbered(sizes)
    shards = store(fresh(tmp_path), documents)
    batches = list(whole(shards, T, B, END))
    assert pairs_in(*batches) == pairs_of(documents)
    assert sum(int((rows.nexts != IGNORE).sum()) for rows in batches) == shards.lengths.sum()
    assert all(len(rows.ids) == B for rows in batches[:-1]) and 1 <= len(batches[-1].ids) <= B
    assert all(map(same, batches, whole(shards, T, B, END)))
    assert same(joined(batches), next(whole(shards, T, 10**6, END)))


# --- the mixture ----------------------------------------------------------------------------------

long_enough = lengths.filter(lambda sizes: sum(sizes) > 12)


packings = st.sampled_from(sorted(PACKINGS))


def stream_of(sizes: list[int], T: int, seed: int, name: str, packing: str) -> Stream:
    return Stream(np.array(sizes), 0, T, seed, name, packing)


@given(long_enough, widths, seeds, st.integers(0, 3), packings)
def test_an_epoch_visits_everything_once(tmp_path, sizes, T, seed, epoch, packing):
    documents = numbered(sizes)
    mixture = Mixture(store(fresh(tmp_path), documents), T, END, seed, packing=packing)
    (stream,) = mixture.streams
    for number in range(epoch + 1):
        rows = mixture.take(len(stream.rows))
        assert pairs_in(rows) == pairs_of(documents) and stream.epoch == number
        mixture.take(1)  # the next epoch begins
        stream.seek(number + 1, 0)


@given(long_enough, widths, seeds)
def test_the_plain_stream_is_documents_one_behind_another_cut_every_width(sizes, T, seed):
    rows = packing.plain(np.array(sizes), T, np.random.default_rng(seed))
    fills = [sum(piece.length for piece in row) for row in rows]
    assert all(full == T for full in fills[1:-1]) and 1 <= min(fills) <= max(fills) <= T
    pieces = [piece for row in rows for piece in row]
    for one, two in pairwise(pieces):
        ended = one.begin + one.length == sizes[one.document]
        assert two.begin == (0 if ended else one.begin + one.length)
        assert ended or one.document == two.document
    assert sum(p.length for p in pieces) == sum(sizes)
    assert len({p.document for p in pieces if p.begin == 0}) == len(sizes)


@given(seeds, packings)
def test_each_epoch_seed_and_source_has_an_order_of_its_own(seed, packing):
    sizes, orders = [3, 5, 7, 20] * 8, []
    for more, epoch, name in product((0, 1), (0, 1), ("a", "b")):
        stream = stream_of(sizes, 8, seed + more, name, packing)
        stream.seek(epoch, 0)
        orders.append(str(stream.rows))
    assert len(set(orders)) == 8
    assert str(stream_of(sizes, 8, seed, "a", packing).rows) == orders[0]


weights = st.lists(st.floats(0, 9), min_size=1, max_size=5).filter(lambda w: sum(w) > 1e-3)


def mixed(
    folder: Path, sizes: list[int], T: int, seed: int, weights: list[float],
    packing: str = "best_fit",
) -> Mixture:  # fmt: skip
    """As many sources as weights, each with documents of these sizes."""
    shards = store(folder, numbered(sizes * len(weights)))
    parts = [Part(f"s{k}", k * len(sizes), len(sizes), w) for k, w in enumerate(weights)]
    return Mixture(shards, T, END, seed, parts, packing)


@given(
    long_enough, widths, seeds, weights, st.lists(st.integers(1, 9), min_size=1, max_size=5),
    packings,
)  # fmt: skip
def test_a_mixture_goes_on_from_its_place_whatever_the_batch(
    tmp_path, sizes, T, seed, weights, batches, packing
):
    folder = fresh(tmp_path)
    single = mixed(folder, sizes, T, seed, weights, packing)
    one_by_one = [single.take(1) for _ in range(sum(batches))]
    mixture, taken = mixed(folder, sizes, T, seed, weights, packing), 0
    for B in batches:
        resumed = mixed(folder, sizes, T, seed, weights, packing)
        assert resumed.knows(mixture.place)
        resumed.seek(json.loads(json.dumps(mixture.place)))
        rows = mixture.take(B)
        assert same(rows, joined(one_by_one[taken : taken + B]))
        assert same(rows, resumed.take(B)) and resumed.place == mixture.place
        taken += B


@given(long_enough, weights, st.integers(1, 300))
def test_each_source_has_its_share_at_every_moment(tmp_path, sizes, weights, n):
    """Never a row behind nor, of k sources, k − 1 ahead; what weighs nothing is not seen."""
    mixture = mixed(fresh(tmp_path), sizes, 12, 0, weights)
    share = np.array(mixture.weights)
    assert np.isclose(share.sum(), 1) and len(share) == sum(w > 0 for w in weights)
    for number in range(1, n + 1):
        row = mixture.next_row()
        lag = number * share - mixture.given
        assert (lag < 1 + 1e-9).all() and (lag > -max(1, len(share) - 1) - 1e-9).all()
        assert len({piece.document // len(sizes) for piece in row}) == 1


def test_epochs_of_each_source_are_counted(tmp_path):
    mixture = mixed(tmp_path, [5] * 10, 5, 0, [3, 1, 0])
    mixture.take(40)
    assert mixture.epochs == {"s0": 3.0, "s1": 1.0}


def test_a_place_behind_the_last_row_is_the_next_epoch(tmp_path):
    """Once an endless loop: a run resumed on a corpus that has shrunk asks for such a row."""
    lost, next_epoch = (mixed(tmp_path, [5] * 10, 5, 0, [1]) for _ in range(2))
    lost.seek([[0, 1000, 0]])
    next_epoch.seek([[1, 0, 0]])
    assert same(lost.take(3), next_epoch.take(3))


@pytest.mark.parametrize(
    "place", [None, 3, [], [1, 2, 3], [[0, 0]], [[0, 0, 0]] * 2, [[0, -1, 0]], [[0, 1.0, 0]],
              [[0, True, 0]], [[0, "0", 0]], [[0, 1 << 60, 0]]],
)  # fmt: skip
def test_what_is_no_place_is_not_known(tmp_path, place):
    assert not mixed(tmp_path, [5] * 10, 5, 0, [1]).knows(place)


@given(lengths)
def test_a_corpus_smaller_than_one_window_is_refused(tmp_path, sizes):
    shards = store(fresh(tmp_path), numbered(sizes))
    with pytest.raises(UserError, match=r"less than one window of --model\.context"):
        Mixture(shards, sum(sizes), END, 0)
    if sum(sizes) > 1:
        Mixture(shards, sum(sizes) - 1, END, 0).take(1)


# --- token files ----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.sampled_from([np.uint16, np.uint32]),
    st.integers(1, 20),
    seeds,
)
def test_shards_give_back_what_was_written(tmp_path, sizes, dtype, per_file, seed):
    folder, rng = fresh(tmp_path), np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    documents = [[END, *rng.integers(0, top, n, endpoint=True).tolist()] for n in sizes]
    with patch.object(packing, "SHARD_TOKENS", per_file):
        shards = store(folder, documents, dtype)
    assert len(shards) == len(documents)
    for i, document in enumerate(documents):
        assert shards.document(i).tolist() == document
    borders = set(accumulate(map(len, documents)))
    for i, file in enumerate(shards.files):
        inside = [d for d in shards.starts if shards.borders[i] <= d < shards.borders[i + 1]]
        assert len(file) <= per_file or len(inside) == 1, "only one long document may overfill"
        assert shards.borders[i + 1] in borders, "a document crosses from one file to the next"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_have_room_in_their_dtype(tmp_path, vocab_size, dtype):
    """The end of text is the last id: 65,535 fits into two bytes, 65,536 does not."""
    singles = [bytes([byte]) for byte in range(256)]
    pairs = [(i // 256, i % 256) for i in range(vocab_size - 257)]
    doubles = [singles[a] + singles[b] for a, b in pairs]
    big = BPE(singles + doubles, pairs, {END_OF_TEXT: vocab_size - 1})
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": f"text {i} ÿþ"}) for i in range(9)))
    corpus = prepare(DataConfig(str(tmp_path), held_out=0.5), BYTES, big, tmp_path / "cache")
    assert corpus.meta["dtype"] == dtype and corpus.tokenizer.fingerprint == big.fingerprint
    assert Counter(stored_texts(corpus)) == Counter(f"text {i} ÿþ" for i in range(9))


# --- holding out ----------------------------------------------------------------------------------

shares = st.floats(0.001, 0.999)


def sides(texts: list[str], share: float) -> np.ndarray:
    """Which of texts are held out that nobody cleaned: copies are known by their hash."""
    hashes = text_hashes(texts)
    return held_out(first_copies(hashes), hashes, share)


def items_of(texts: list[str]) -> list[Item]:
    return [Item(Document(text, str(i)), 0) for i, text in enumerate(texts)]


@given(st.lists(texts, max_size=12), shares, st.randoms())
def test_holding_out_depends_on_the_text_alone_not_on_the_order(contents, share, random):
    contents = contents + contents[:3]
    side = dict(zip(contents, sides(contents, share).tolist(), strict=True))
    assert [side[text] for text in contents] == sides(contents, share).tolist(), (
        "copies must lie on one side"
    )
    random.shuffle(contents)
    assert [side[text] for text in contents] == sides(contents, share).tolist()


@given(st.sets(texts, min_size=1, max_size=12), st.lists(texts, max_size=12), shares)
def test_documents_added_later_move_none_across(old, more, share):
    """Except when a side would have been empty, and one document was put there to fill it."""
    old = sorted(old)
    later = sides(old + more, share)[: len(old)]
    if later.any() and not later.all():
        assert (sides(old, share) == later).all()


@given(st.sets(texts, min_size=2, max_size=12), shares)
def test_each_side_gets_a_document(contents, share):
    """One document moves if the hashes leave a side empty, and none otherwise."""
    contents = sorted(contents)
    held = sides(contents, share)
    by_hash = np.array([sides([text], share)[0] for text in contents])
    assert held.dtype == bool and held.any() and not held.all()
    assert (held != by_hash).sum() == (by_hash.all() or not by_hash.any())


def test_the_share_held_out_is_what_was_asked_for():
    documents = [f"document {i}" for i in range(4000)]
    for share in (0.05, 0.3):
        deviation = (share * (1 - share) / len(documents)) ** 0.5
        assert abs(sides(documents, share).mean() - share) < 4 * deviation


@given(st.lists(texts, min_size=2, max_size=12), shares)
def test_split_sends_each_document_to_its_side(contents, share):
    items, held = items_of(contents), sides(contents, share)
    assert list(split(items, held)) == list(zip(items, held.tolist(), strict=True))


@given(st.integers(0, 200))
def test_of_a_single_document_the_last_tenth_is_held_out(n):
    text = "".join(chr(ord("a") + i % 26) for i in range(n))
    (train, in_train), (last, in_last) = split(items_of([text]), np.array([False]))
    assert (in_train, in_last) == (False, True)
    train, last = train.document.text, last.document.text
    assert train + last == text and len(last) == -(-n // 10)


# --- reading --------------------------------------------------------------------------------------

suffixes = st.sampled_from([".txt", ".md", ".py", ".txt.gz", ".md.gz", ".py.gz"])


def write(path: Path, content: str | bytes) -> Path:
    content = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def gathered(config: DataConfig) -> tuple[list[Document], Step]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder, "documents"))
        step = gather(read_all(config), store, config.strict)
        return [item.document for item in store], step


def read(path: Path | str) -> list[str]:
    return [document.text for document in gathered(DataConfig(str(path), strict=True))[0]]


@given(texts, suffixes, st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_a_file_is_one_document_as_it_stands(tmp_path, text, suffix, bom, newline):
    text = text.replace("a", newline)
    path = write(fresh(tmp_path) / f"a{suffix}", "\ufeff" * bom + text)
    assert read(path) == ([text] if text.strip() else [])


@given(st.lists(texts, min_size=2, max_size=5), suffixes, st.sampled_from(["", "\n", "\r\n"]))
def test_a_file_is_split_at_the_end_of_text(tmp_path, parts, suffix, newline):
    path = fresh(tmp_path) / f"a{suffix}"
    write(path, f"{newline}{END_OF_TEXT}{newline}".join(parts))
    assert read(path) == [part.strip("\r\n") for part in parts if part.strip()]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=6),
       st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]))  # fmt: skip
def test_jsonl_is_one_document_a_line(tmp_path, contents, packed, escaped, newline):
    """Only a line feed ends a line. Once splitlines() broke a text at U+2028 and U+0085."""
    contents = [*contents, "next\x85line\u2028in a string", f"a {END_OF_TEXT} in a string"]
    lines = [json.dumps({"id": 0, "text": t}, ensure_ascii=escaped) for t in contents]
    path = fresh(tmp_path) / ("a.jsonl.gz" if packed else "a.jsonl")
    write(path, newline.join(lines) + newline)
    assert read(path) == [text for text in contents if text.strip()]


def test_sources_say_where_a_document_stands(tmp_path):
    write(tmp_path / "a.txt", f"one{END_OF_TEXT}\n{END_OF_TEXT}three")
    write(tmp_path / "b.jsonl", '{"text": "one"}\n\n{"text": "three"}\n')
    sources = [d.source.rpartition("/")[2] for d in gathered(DataConfig(str(tmp_path)))[0]]
    assert sources == ["a.txt#1", "a.txt#3", "b.jsonl:1", "b.jsonl:3"]


def test_a_folder_or_a_pattern_is_read_in_a_fixed_order_each_file_once(tmp_path):
    folder = tmp_path / "odd [name] *?"
    names = ["b.txt", "a.md", "in/c.py", "in/deeper/d.jsonl.gz", "in/e.txt.gz"]
    for name in names:
        write(folder / name, json.dumps({"text": name}) if "jsonl" in name else name)
    for name in ("f.csv", "g", "in/h.gz", "i.txt.bz2", "txt"):
        write(folder / name, "not one of ours")
    in_order = ["a.md", "b.txt", "in/c.py", "in/deeper/d.jsonl.gz", "in/e.txt.gz"]
    assert read(folder) == in_order
    assert read(f"{tmp_path}/odd*/**/**/*") == in_order, "two ** find a file twice"
    assert read(f"{tmp_path}/odd*/?.*") == ["a.md", "b.txt"]
    assert read(folder / "b.txt") == ["b.txt"]


LINE = '{"text": "fine"}\n'
BROKEN = {  # name -> (content, what the sentence says)
    "picture.csv": ("a,b", "text files end in .txt, .md, .py, .jsonl"),
    "binary.txt": (b"some \0 byte", "binary, not text: there is a zero byte at 5"),
    "first.txt": (b"\0some bytes", "binary, not text: there is a zero byte at 0"),
    "binary.txt.gz": (b"some \0 byte", "binary"),
    "utf16.txt": ("text".encode("utf-16"), "binary"),
    "latin.md": ("caf\xe9 ".encode("latin-1"), "not UTF-8 text: byte 0xe9 at 3"),
    "marked.md": (b"\xef\xbb\xbfcaf\xe9 ", "not UTF-8 text: byte 0xe9 at 6"),
    "latin.jsonl": ('{"text": "\xe9"}'.encode("latin-1"), "not UTF-8 text: byte 0xe9"),
    "half.jsonl": (LINE + '{"text": "ha', "half.jsonl:2: each line must be a JSON object"),
    "nothing.jsonl": (LINE + "\n" + '{"txt": ""}', "nothing.jsonl:3: each line"),
    "number.jsonl": ('{"text": 3}', "number.jsonl:1: each line"),
    "null.jsonl": ('{"text": null}', "each line"),
    "list.jsonl": ('["text"]', "each line"),
    "string.jsonl": ('"text"', "each line"),
    "surrogate.jsonl": (r'{"text": "half a letter: \ud83d"}', "each line"),
    "deep.jsonl": ("[" * 100_000, "each line"),
    "python.jsonl": ("{'text': 'single quotes'}", "each line"),
}


def refusal(action) -> str:
    """The one sentence of a UserError."""
    with pytest.raises(UserError) as error:
        action()
    sentence = str(error.value)
    assert sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path, name):
    content, said = BROKEN[name]
    path = write(tmp_path / name, content)
    for action in (lambda: read(path), lambda: prepare_in(tmp_path, path, strict=True)):
        sentence = refusal(action)
        assert str(path) in sentence and said in sentence
    assert left_in(tmp_path / "cache") == []


def test_what_cannot_be_read_is_passed_over_and_counted(tmp_path):
    """The rest is not lost; all is said if nothing else is left."""
    for name, (content, _) in BROKEN.items():
        write(tmp_path / name, content)
    documents, step = gathered(DataConfig(str(tmp_path)))
    assert [d.text for d in documents] == ["fine", "fine"]
    assert step.documents == 2 and step.dropped == {"cannot be read": len(BROKEN) - 1}
    assert "binary.txt is binary" in step.examples["cannot be read"][0]
    path = write(tmp_path / "alone" / "latin.md", BROKEN["latin.md"][0])
    said = refusal(lambda: prepare_in(tmp_path, path))
    assert "there is no text in" in said and "byte 0xe9 at 3 has no meaning" in said


def test_a_line_of_a_hundred_megabytes_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "' + b"a" * 100_000_000 + b'"}\n' + LINE.encode())
    assert [len(text) for text in read(path)] == [100_000_000, 4]


def test_what_else_a_line_says_is_not_kept(tmp_path):
    """Once it went through every step, for nothing."""
    path = write(tmp_path / "a.jsonl", '{"id": 7, "text": "a", "more": {"b": [1]}}\n' + LINE)
    first, second = gathered(DataConfig(str(path)))[0]
    assert first == ("a", f"{path}:1", None) and second == ("fine", f"{path}:2", None)


MIXES = {  # what is mixed -> what the sentence says
    ("a",): "must be a name, =, and a path",
    ("=a",): "must be a name",
    ("a b=c",): "must be a name",
    ("a=x@1", "a=y@1"): "names a source twice",
    ("a=x@1", "b=y"): "each source a weight",
    ("a=x@0", "b=y@0"): "sum to nothing",
    ("a=x@-1",): "a number from 0 on",
    ("a=x@nan",): "a number from 0 on",
    ("a=x@inf",): "a number from 0 on",
}


@pytest.mark.parametrize("mix", MIXES)
def test_what_cannot_be_mixed_is_refused_in_a_sentence(mix):
    assert MIXES[mix] in refusal(lambda: DataConfig(mix=mix))
    assert "give one of them" in refusal(lambda: DataConfig("text", mix=("a=b",)))
    assert "temperature" in refusal(lambda: DataConfig(temperature=0))
    assert "cap" in refusal(lambda: DataConfig(cap=-1))


def test_sources_are_mixed_by_weight_or_size(tmp_path):
    for name, size in (("a@b", 40), ("c", 10)):
        lines = [json.dumps({"text": f"{name} {i} {'x' * 90}"}) for i in range(size)]
        write(tmp_path / name / "d.jsonl", "\n".join(lines))
    paths = f"first={tmp_path}/a@b", f"second={tmp_path}/c"
    for mix, how, want in (
        (paths, {}, 0.8), (paths, {"temperature": 2}, 2 / 3), (paths, {"cap": 300}, 0.5),
        (paths, {"cap": 1900}, 2 / 3), (paths, {"cap": 1900, "temperature": 2}, 0.586),
        ((f"{paths[0]}@1", f"{paths[1]}@3"), {"cap": 5}, 0.25),
    ):  # fmt: skip
        config = DataConfig(mix=mix, held_out=0.1, **how)
        corpus = prepare(config, BYTES, cache=tmp_path / "cache")
        mixture = Mixture(corpus.train, 60, corpus.tokenizer.end_of_text, 0, corpus.parts)
        assert mixture.weights[0] == pytest.approx(want, abs=0.05)
        for part, name in zip(corpus.parts, ("a@b", "c"), strict=True):
            for i in range(part.first, part.first + part.documents):
                ids = corpus.train.document(i)[1:].tolist()
                assert corpus.tokenizer.decode(ids).startswith(name)
        assert sum(part.documents for part in corpus.parts) == len(corpus.train)
    nowhere = DataConfig(mix=(f"a={tmp_path}/nowhere",))
    assert "is no file or folder" in refusal(lambda: prepare(nowhere, BYTES))


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_gz_is_refused_in_a_sentence_or_read(tmp_path, at, bits):
    packed = gzip.compress("".join(map(str, range(300))).encode(), mtime=0)
    folder = fresh(tmp_path)
    cut_off, flipped = folder / "cut.txt.gz", folder / "flipped.txt.gz"
    cut_off.write_bytes(packed[:at])
    assert not at or str(cut_off) in refusal(lambda: read(cut_off))
    flipped.write_bytes(packed[:at] + bytes([packed[at] ^ bits]) + packed[at + 1 :])
    try:
        read(flipped)
    except UserError as error:
        assert str(flipped) in str(error)


def test_what_is_not_there_is_refused_in_a_sentence(tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    write(other / "a.csv", "a,b")
    for path in (empty, other):
        assert f"--data.path {path} holds no .txt" in refusal(lambda p=path: read(p))
    long = "text in place of its path " * 400
    for path in (tmp_path / "a.txt", tmp_path / "*.txt", "~nobody-has-this-name/a.txt", long):
        sentence = refusal(lambda p=path: read(p))
        assert f"--data.path {path} is no file or folder and matches no .txt" in sentence


def test_files_without_text_are_passed_over_but_not_if_all_are(tmp_path):
    for name in ("a.txt", "b.md.gz", "c.jsonl"):
        write(tmp_path / name, "")
    write(tmp_path / "d.jsonl", '\n{"text": " \\n"}\n')
    write(tmp_path / "e.txt", f" {END_OF_TEXT}\n")
    assert read(tmp_path) == []
    assert "there is no text in" in refusal(lambda: prepare_in(tmp_path))
    write(tmp_path / "f.txt", "text")
    assert read(tmp_path) == ["text"]


# --- the standard library -------------------------------------------------------------------------

# kinds of source: (lines, index of the line at which prose begins, the prose)
KINDS = [
    (["# one line"], 0, "one line"),
    (["# two", "#", "## lines"], 0, "two\n\nlines"),
    (["    # indented", "    #   more"], 0, "indented\n  more"),
    (["\x0c", "# after a form feed"], 1, "after a form feed"),
    (["def f():", '    """A docstring."""'], 1, "A docstring."),
    (["async def f():", '    """Two', "", '    lines."""'], 1, "Two\n\nlines."),
    (["class C:", "    'A class.'", "    # with a comment"], 1, "A class."),
    (['"""', "# in a string", '"""'], 0, None),
    (['x = f"""{1}', "# in a template", '"""'], 0, None),
    (['x = b"""', "# in bytes", '"""'], 0, None),
    (["x = '\\x0c \\u2028 '  # behind code", "y = '#'"], 0, None),
    (["z = '\x0c\x1c\u2028'"], 0, None),
]


@given(st.lists(st.sampled_from(KINDS), max_size=12))
def test_prose_is_the_docstrings_and_comments_with_their_lines(kinds):
    """A form feed is no line end in Python. Once splitlines() took it for one: all lines moved."""
    lines, want = ['"""A module."""', ""], [(1, "A module.")]
    for source, at, text in kinds:
        if text is not None:
            want.append((len(lines) + at + 1, text))
        if source[-1] == "    # with a comment":
            want.append((len(lines) + len(source), "with a comment"))
        lines += [*source, ""]
    source = "\n".join(lines)
    assert sorted(prose(source, ast.parse(source))) == want


def test_the_standard_library_is_itself():
    files = python_files()
    assert len(files) > 100 and files == python_files()
    for path in files:
        assert not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts[-6:])
    some = [path for path in files if path.name in ("heapq.py", "calendar.py", "os.py")]
    with patch.object(documents, "python_files", lambda: some):
        found = list(standard_library())
        assert found == gathered(DataConfig())[0], "the order must be fixed"
    topics = [d for d in found if d.source.startswith("pydoc_data.topics[")]
    rest = found[len(topics) :]
    assert len(topics) > 50 and all(d.text.strip() for d in topics)
    assert [d.source.split(":")[0] for d in rest] == sorted(d.source.split(":")[0] for d in rest)
    assert {d.source.split(":")[0] for d in rest} == {"calendar.py", "heapq.py", "os.py"}
    assert all(len(d.text) >= documents.SHORTEST for d in rest)
    assert any("Heap queue algorithm" in d.text for d in rest)


def test_a_file_of_the_standard_library_that_is_no_python_is_passed_over(tmp_path):
    bad = [write(tmp_path / "a.py", "def"), write(tmp_path / "b.py", b"\xff"), tmp_path / "none.py"]
    bad.append(write(tmp_path / "d.py", b"x = '\0'"))
    with patch.object(documents, "python_files", lambda: bad):
        assert all(d.source.startswith("pydoc_data") for d in standard_library())


# --- the whole pipe -------------------------------------------------------------------------------


def prepare_in(
    folder: Path, path: Path | None = None, cutting=BYTES, held=0.5, tokenizer=None, strict=False
):
    config = DataConfig(str(path or folder), held_out=held, strict=strict)
    return prepare(config, cutting, tokenizer, folder / "cache")


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def stored_texts(corpus) -> list[str]:
    """All stored documents, decoded; END begins each and stands nowhere else."""
    out = []
    for shards in (corpus.train, corpus.held):
        for i in range(len(shards)):
            end, *ids = shards.document(i).tolist()
            assert end == corpus.tokenizer.end_of_text and end not in ids
            out.append(corpus.tokenizer.decode(ids))
    return out


def jsonl(path: Path, contents: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in contents))


@pytest.fixture
def corpus_path(tmp_path):
    return jsonl(tmp_path / "a.jsonl", [f"document {i} " * 5 for i in range(40)])


words = st.sampled_from([END_OF_TEXT, "<|endof", "text|>", " the", "é", "\0", "\U0001f600", "\r\n"])
rich = st.lists(words | texts, min_size=1, max_size=8).map("".join).filter(str.strip)


@given(st.lists(rich, min_size=2, max_size=8, unique=True), shares, st.sampled_from([0, 257, 300]))
def test_decoding_the_stored_documents_gives_the_corpus_back(tmp_path, contents, share, vocab_size):
    """The letters of a special token are letters: no text can forge the end of a document."""
    folder = fresh(tmp_path)
    jsonl(folder / "a.jsonl", contents)
    cutting = TokenizerConfig(vocab_size=vocab_size) if vocab_size else BYTES
    corpus = prepare_in(folder, cutting=cutting, held=share)
    held = sides(contents, share).tolist()
    train = [text for text, out in zip(contents, held, strict=True) if not out]
    kept = [text for text, out in zip(contents, held, strict=True) if out]
    assert stored_texts(corpus) == train + kept
    for side, part, shards in (("train", train, corpus.train), ("held", kept, corpus.held)):
        size = len("".join(part).encode())
        offsets = np.append(shards.starts, int(shards.lengths.sum()))
        stored = b"".join(part.tobytes() for part in (*shards.files, offsets))
        assert corpus.meta[side] == {
            "documents": len(part),
            "bytes": size,
            "tokens": int(shards.lengths.sum()),
            "hash": blake2b(stored, digest_size=8).hexdigest(),
        }
    packed = 8 * len(lzma.compress("".join(kept).encode())) / len("".join(kept).encode())
    assert corpus.meta["lzma_bits_per_byte"] == pytest.approx(packed)


def test_a_single_document_gives_both_parts(tmp_path):
    text = "".join(f"sentence {i}. " for i in range(100))
    write(tmp_path / "a.txt", text)
    train, last = stored_texts(prepare_in(tmp_path))
    assert train + last == text and len(last) == -(-len(text) // 10)


def test_copies_of_one_document_are_refused(tmp_path):
    """Nothing could be held out; once the evaluation divided by zero bytes."""
    jsonl(tmp_path / "a.jsonl", ["the same"] * 3)
    assert "3 copies of one document" in refusal(lambda: prepare_in(tmp_path))


def test_documents_too_alike_to_be_divided_are_refused(tmp_path):
    """Of cleaned ones the sentence says so: once it called them copies."""
    config = DataConfig(str(jsonl(tmp_path / "a.jsonl", GOOD)), clean="docs")
    with patch.object(data, "clusters", lambda texts, share: np.zeros(len(texts), int)):
        said = refusal(lambda: prepare(config, BYTES, cache=tmp_path / "cache"))
    assert "3 documents after cleaning, each with half" in said and "copies" not in said


def test_where_all_that_is_held_out_is_known_it_stays_and_this_is_said(tmp_path, capsys):
    config = DataConfig(str(jsonl(tmp_path / "a.jsonl", GOOD)), clean="docs", held_out=0.5)
    corpora = []
    for leaking in (0, 1, 2):  # of how many of two held-out documents is there a run in training
        spans = np.arange(2) < leaking
        with (
            patch.object(data, "held_out", lambda *_: np.array([False, True, True])),
            patch.object(data, "shared_spans", lambda train, test, spans=spans: spans),
        ):
            corpora.append(prepare(config, BYTES, cache=tmp_path / f"{leaking}"))
        said = capsys.readouterr().out
        assert ("all 2 documents held out" in said) == (leaking == 2)
    assert [len(corpus.held) for corpus in corpora] == [2, 1, 2]
    assert [len(corpus.train) for corpus in corpora] == [1, 1, 1]


def test_the_tokenizer_is_trained_on_the_training_part_only(tmp_path):
    """No token holds more of a word that stands only in held-out documents than its letters."""
    held = [t for t in (f"zyzzyva {i} " * 20 for i in range(40))
            if sides([t], 0.5)[0]]  # fmt: skip
    others = [f"common words {i} " * 20 for i in range(40)]
    jsonl(tmp_path / "a.jsonl", [t for pair in zip(held, others, strict=False) for t in pair])
    corpus = prepare_in(tmp_path, cutting=TokenizerConfig(vocab_size=320))
    assert any(b"words" in token for token in corpus.tokenizer.tokens)
    assert not any(b"z" in token for token in corpus.tokenizer.tokens if len(token) > 1)
    assert all("zyzzyva" not in text for text in stored_texts(corpus)[: len(corpus.train)])


def test_tokens_are_made_once_and_anew_when_something_changed(tmp_path, corpus_path):
    first = prepare_in(tmp_path)
    with patch.object(data, "tokenize", side_effect=AssertionError("made again")):
        again = prepare_in(tmp_path)
        assert stored_texts(again) == stored_texts(first) and again.meta == first.meta
        for change in (
            lambda: prepare_in(tmp_path, held=0.4),
            lambda: prepare_in(tmp_path, cutting=TokenizerConfig(vocab_size=300)),
            lambda: prepare_in(tmp_path, tokenizer=BPE.train(["some text"], 258)),
        ):
            with pytest.raises(AssertionError, match="made again"):
                change()
    assert len(left_in(tmp_path / "cache")) == 1, "what failed must leave nothing"
    jsonl(corpus_path, [f"another {i}" for i in range(40)])
    assert all("another" in text for text in stored_texts(prepare_in(tmp_path)))
    write(tmp_path / "b.txt", "one more")
    assert "one more" in stored_texts(prepare_in(tmp_path))
    assert len(left_in(tmp_path / "cache")) == 3


DECIDE_NO_TOKEN = {
    "run": "files, errors, seeds", "pictures": "figures",
    "tokenizer": "a table of kinds, and a demo",
    "objectives": "its names of roles alone do, which stand in the identity",
}  # fmt: skip


def test_what_decides_tokens_is_part_of_what_they_are_known_by():
    """All that data.py imports, and what that imports; once vocabulary.py was not."""
    found, waiting = set(), ["data"]
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += imports(ROOT / f"{name}.py") - found - {"kernels"}
    decide = found - DECIDE_NO_TOKEN.keys()
    assert list(data.MADE_BY) == sorted(decide) and len(decide) > 15
    config = DataConfig("world:9")
    *_, programs, roles = data.identity(config)
    assert len(programs) == len(decide) and roles == data.chat.SPECIAL


def imports(path: Path) -> set[str]:
    """The files of this repository's root that a file imports, and kernels."""
    nodes, found = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))], []
    found += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    found += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names = {name.split(".")[0] for name in found if name}
    return {name for name in names if (ROOT / f"{name}.py").is_file() or name == "kernels"}


class Killed(BaseException):
    """As a signal: no `except Exception` sees it."""


@pytest.mark.parametrize("point", ["held_out", "make_tokenizer", "write_tokens", "write_sealed"])
def test_a_stop_in_between_leaves_nothing_half_made(tmp_path, corpus_path, point):
    with patch.object(data, point, side_effect=Killed), pytest.raises(Killed):
        prepare_in(tmp_path)
    assert left_in(tmp_path / "cache") == []
    whole_corpus = prepare_in(tmp_path)
    assert len(stored_texts(whole_corpus)) == 40


def test_what_a_killed_process_left_is_ignored(tmp_path, corpus_path):
    """A draft in the cache, and a folder without its description, which is written last."""
    corpus = prepare_in(tmp_path)
    (key,) = left_in(tmp_path / "cache")
    folder = tmp_path / "cache" / key
    (folder / "meta.json").unlink()
    write(folder / "train-00007.bin", b"half")
    shutil.copytree(folder, tmp_path / "cache" / f".{key}.draft" / "tokens")
    shutil.copytree(folder, tmp_path / "cache" / f".{key}.x.draft" / "tokens")
    again = prepare_in(tmp_path)
    assert stored_texts(again) == stored_texts(corpus)
    assert not (folder / "train-00007.bin").exists()


def test_other_special_tokens_make_another_tokenizer(tmp_path, corpus_path):
    config = DataConfig(str(corpus_path))
    for kind in ("bytes", "wordpiece", "unigram"):
        found = [
            prepare(config, TokenizerConfig(kind, 400), cache=tmp_path / "c", special=special)
            for special in ((), ("<|mask|>",), ())
        ]
        assert ["<|mask|>" in corpus.tokenizer.special for corpus in found] == [False, True, False]
        assert END_OF_TEXT in found[1].tokenizer.special
        assert found[0].tokenizer.fingerprint == found[2].tokenizer.fingerprint


def test_processes_that_make_the_same_tokens_do_not_disturb_each_other(tmp_path, corpus_path):
    """The second begins and ends while the first is at work. Once they shared one draft folder."""
    real, inner = data.tokenize, []

    def slow(config, tokenizer_for, out, most):
        real(config, tokenizer_for, out)
        with patch.object(data, "tokenize", real):
            inner.append(prepare_in(tmp_path))
        assert (out / "meta.json").is_file(), "the other took the draft away"

    with patch.object(data, "tokenize", slow):
        outer = prepare_in(tmp_path)
    assert stored_texts(outer) == stored_texts(inner[0])
    assert len(left_in(tmp_path / "cache")) == 1


DAMAGES = ("cut", "flip", "delete", "empty", "garbage")
FILES = (
    "tokenizer.json", "meta.json", "train-offsets.int64", "train-00000.bin", "held-offsets.int64",
)  # fmt: skip


@given(seeds)
def test_a_damaged_cache_is_refused_in_a_sentence(tmp_path, seed):
    """Or made again, if its description is gone. A flipped bit is known, or changes nothing."""
    home = fresh(tmp_path)
    jsonl(home / "a.jsonl", [f"document {i} " * 5 for i in range(40)])
    corpus = prepare_in(home)
    want, known = stored_texts(corpus), corpus.tokenizer.fingerprint
    (key,) = left_in(home / "cache")
    for name, kind in product(FILES, DAMAGES):
        path = home / "cache" / key / name
        content = path.read_bytes()
        harm(path, kind, seed)
        if (name, kind) == ("meta.json", "delete"):
            assert stored_texts(prepare_in(home)) == want
        elif kind == "flip":
            try:
                again = prepare_in(home)
            except UserError as error:
                assert key in str(error) and "\n" not in str(error)
            else:
                assert stored_texts(again) == want and again.tokenizer.fingerprint == known
                assert again.meta | corpus.meta == again.meta
        else:
            assert key in refusal(lambda: prepare_in(home))
        path.write_bytes(content)
    assert stored_texts(prepare_in(home)) == want


def harm(path: Path, kind: str, seed: int) -> None:
    rng, content = np.random.default_rng(seed), path.read_bytes()
    at = int(rng.integers(len(content) - 2))  # a JSON file ends with } and a line feed
    path.write_bytes({
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ (1 << rng.integers(8))]) + content[at + 1 :],
        "garbage": rng.bytes(len(content) + 1),
    }.get(kind, b""))  # fmt: skip
    if kind == "delete":
        path.unlink()


def test_a_cache_that_cannot_be_written_is_refused_in_a_sentence(tmp_path, corpus_path):
    write(tmp_path / "cache", "a file in the folder's place")
    assert "cannot write the token files in" in refusal(lambda: prepare_in(tmp_path))
    (tmp_path / "cache").unlink()
    with patch.object(data, "write_sealed", side_effect=OSError(28, "No space left on device")):
        assert "No space left" in refusal(lambda: prepare_in(tmp_path))
    assert left_in(tmp_path / "cache") == []


@given(st.lists(rich, max_size=6))
def test_the_fast_encoder_gives_the_handmade_ids(contents):
    tokenizer = BPE.train(["the other text, the same text"], 290)
    want = [tokenizer.encode(text) for text in contents]
    assert data.Cutter(tokenizer).of_texts(contents) == want


def test_a_field_of_that_name_makes_no_conversation_of_a_text(tmp_path):
    """Lines of JSON may say anything beside their text."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"number {i} of them", "turns": 3}) for i in range(40)]
    path.write_text("\n".join(lines))
    corpus = prepare(DataConfig(str(path)), BYTES, cache=tmp_path / "cache")
    assert {*stored_texts(corpus)} == {f"number {i} of them" for i in range(40)}


@pytest.mark.slow
def test_a_million_blanks_in_a_row_are_encoded():
    """Once tiktoken's regex panicked, past every `except Exception`."""
    tokenizer = BPE.bytes()
    text = " " * 1_100_000 + "x"
    (ids,) = data.Cutter(tokenizer).of_texts([text])
    assert tokenizer.decode(ids) == text


def test_where_the_fast_encoder_gives_up_the_handmade_one_takes_over():
    tokenizer = BPE.train(["the other text"], 260)
    with patch("tiktoken.Encoding.encode_batch", side_effect=ValueError("Regex error")):
        ids = data.Cutter(tokenizer).of_texts([END_OF_TEXT, ""])
    assert ids == [tokenizer.encode(END_OF_TEXT), []] and tokenizer.end_of_text not in ids[0]


def test_a_vocabulary_that_tiktoken_cannot_have_is_used_all_the_same():
    """Once preparing ended in a ValueError."""
    singles = [bytes([byte]) for byte in range(256)]
    tokenizer = BPE([*singles, b"abc", b"ab"], [(97, 98), (257, 99)], {END_OF_TEXT: 258})
    with pytest.raises(ValueError, match="order of the merges"):
        tokenizer.to_tiktoken()
    assert data.Cutter(tokenizer).of_texts(["abcab", ""]) == [[256, 257], []]


# --- conversations --------------------------------------------------------------------------------


def talks(path: Path, count: int = 40) -> Path:
    lines = [json.dumps({"instruction": f"Say {i}.", "output": f"{i}."}) for i in range(count)]
    return write(path, "\n".join(lines))


def test_conversations_are_prepared_from_a_path_and_from_a_mix(tmp_path):
    """As align.py asks for them."""
    one, two = talks(tmp_path / "one.jsonl"), talks(tmp_path / "two.jsonl.gz", 50)
    for how in ({"path": str(one)}, {"mix": (f"lessons={one}", f"more={two}"), "cap": 500}):
        corpus = prepare(DataConfig(form="chat", **how), BYTES, cache=tmp_path / "cache",
                         special=data.chat.SPECIAL)  # fmt: skip
        assert len(corpus.train) + len(corpus.held) == 40 + 50 * ("mix" in how)


@pytest.mark.parametrize("recipe", ["docs", "web"])
def test_conversations_are_not_cleaned_in_vain(recipe):
    """Once an address was told to be replaced, and stayed in the tokens."""
    for how in ({"path": "a.jsonl"}, {"mix": ("a=a.jsonl",)}):
        said = refusal(lambda how=how: DataConfig(form="chat", clean=recipe, **how))
        assert f"--data.clean {recipe}" in said and "leave it out" in said
        assert data.recipe_of(DataConfig(form="chat", **how)) == "none"


@pytest.mark.parametrize("how", [{}, {"path": "facts:9"}, {"mix": ("a=",)}, {"mix": ("a=quiz:",)}])
def test_what_holds_no_conversation_is_refused_in_a_sentence(tmp_path, how):
    said = refusal(lambda: prepare(DataConfig(form="chat", **how), BYTES, cache=tmp_path))
    assert "--data.form chat needs" in said


# --- settings and demo ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    assert "--data.held-out" in refusal(lambda: DataConfig(held_out=share))


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    assert "--tokenizer.vocab-size 256" in refusal(lambda: TokenizerConfig(vocab_size=256))
    assert TokenizerConfig(vocab_size=257).vocab_size == 257


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_vocabulary_without_room_for_the_letters_is_refused(tmp_path, corpus_path, kind):
    """The sentence names no setting that is no flag."""
    said = refusal(lambda: prepare_in(tmp_path, cutting=TokenizerConfig(kind, 9)))
    assert "--tokenizer.vocab-size does not suit this text: vocab_size must be" in said
    assert said.endswith(", not 9")


@pytest.mark.parametrize("context", [0, -3])
def test_rows_without_a_token_are_refused(context):
    assert f"--context {context} must be at least 1" in refusal(lambda: data.Show(context=context))


def test_the_demo_shows_conversations(tmp_path, monkeypatch, capsys):
    """Once a KeyError: nobody had asked for the tokens of the roles."""
    monkeypatch.chdir(tmp_path)
    talks(tmp_path / "a.jsonl")
    monkeypatch.setattr(sys, "argv", ["data.py", "--data.path", "a.jsonl", "--data.form", "chat",
                                      "--tokenizer.kind", "bytes"])  # fmt: skip
    data.show()
    out = capsys.readouterr().out
    assert "<|assistant|>" in out and "text of yours" not in out


def test_the_demo_shows_a_corpus(tmp_path, monkeypatch, capsys, corpus_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--data.path", "a.jsonl", "--data.clean",
                                      "none", "--context", "40"])  # fmt: skip
    data.show()
    out = capsys.readouterr().out
    (meta,) = (read_json(path) for path in (tmp_path / data.CACHE).glob("*/meta.json"))
    assert f"{meta['train']['tokens']:,} tokens" in out and "% full" in out
    rows = [line[2:] for line in out.splitlines() if line.startswith("  a")]
    assert len(rows) == 6 and all(len(row) == 40 for row in rows)
