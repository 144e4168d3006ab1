"""Laws of clean.py: each document is kept or dropped for a reason, and nothing is known twice."""

import json
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics
from subprocess import DEVNULL, PIPE, Popen

import pytest
from conftest import ROOT
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st

import clean
import data
import processes
from clean import RECIPES, Item, Step, Store, gather
from data import DataConfig, TokenizerConfig, prepare
from dedup import jaccard, shared_spans, shingles
from documents import Document, Problem

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
GOOD = [topic for topic in topics.values() if 1500 < len(topic) < 9000][:12]
ADDRESS = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")


def stored(folder: Path, documents: list[str]) -> Store:
    store = Store(folder / "documents")
    for i, text in enumerate(documents):
        store.append(Item(Document(text, f"document {i}"), 0))
    return store


@given(st.lists(st.tuples(texts, texts, st.none() | st.dictionaries(texts, st.integers())),
                max_size=9))  # fmt: skip
def test_a_store_gives_back_what_was_put_in(tmp_path, contents):
    store = Store(tmp_path / "store")
    items = [Item(Document(*fields), i) for i, fields in enumerate(contents)]
    for item in items:
        store.append(item)
        assert store[len(store) - 1] == item
    assert list(store) == items and list(store.texts) == [text for text, _, _ in contents]
    with pytest.raises(IndexError):
        store[len(items)]


def test_gathering_counts_what_is_no_document(tmp_path):
    found = [Document("a", "here"), Problem("b.txt is bad"), Document(" \n", "there")]
    store = Store(tmp_path / "store")
    step = gather(((thing, 3) for thing in found), store, strict=False)
    assert list(store) == [Item(found[0], 3)]
    assert (step.documents, step.bytes) == (1, 1)
    assert step.dropped == {"cannot be read": 1, "empty": 1}
    assert step.examples == {"cannot be read": ["b.txt is bad", ""], "empty": ["there", ""]}


def planted(seed: int) -> tuple[list[str], Counter[str]]:
    """Good texts, shuffled with one or more of everything that is to go, and how much of it."""
    rng = random.Random(seed)
    good = rng.sample(GOOD, 6)
    words = good[0].split()
    middle = len(words) // 2
    near = " ".join([*words[:middle], "another", *words[middle:]])
    seen = "Whoever reads this has read it before. It says nothing at all. It does so at length."
    ends = "But this is new.", "Yet that one differs."
    again = [f"{text}\n\n{seen} {end}" for text, end in zip(good[1:3], ends, strict=True)]
    mail = f"{good[3]}\n\nQuestions go to jane.doe{seed}@mail.example.net, or to nobody at all."
    junk = ["%$ &/ () == ?? ## ++ ** ~~ ;; :: " * 9] * rng.randint(1, 3)
    documents = [good[0], *again, mail, *good[4:], good[4].upper(), *junk]
    rng.shuffle(documents)
    return [*documents, near], Counter(junk=len(junk))


@pytest.mark.parametrize("recipe", ["docs", "web"])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_planted_goes_and_the_rest_stays(tmp_path, recipe, seed):
    documents, count = planted(seed)
    store, steps = clean.clean(stored(tmp_path, documents), recipe)
    by_name = {step.name: step for step in steps}
    assert list(by_name) == list(RECIPES[recipe])
    of_junk = (by_name[name] for name in ("language", "quality") if name in by_name)
    assert sum(n for step in of_junk for n in step.dropped.values()) >= count["junk"]
    if recipe == "docs":
        assert sum(by_name["quality"].dropped.values()) == count["junk"]
        assert by_name["copies"].dropped == {"copy": 1}
        assert by_name["near-copies"].dropped == {"near-copy": 1}
        assert by_name["repeated sentences"].dropped["three sentences seen before"] >= 1
        assert by_name["privacy"].dropped == {"EMAIL": 1}
        left = "\n".join(store.texts)
        counts = [*map(left.count, ("Whoever reads this", "But this is new", "Yet that one"))]
        assert counts == [1, 1, 1]
        assert "<EMAIL>" in left and not ADDRESS.search(left)


def test_web_pages_are_english(tmp_path):
    german = (
        "Das Haus steht am Fluss, und niemand hat es seit dem Winter noch einmal betreten. " * 9
    )
    _, steps = clean.clean(stored(tmp_path, [*GOOD[:3], german]), "web")
    assert steps[0].dropped == {"language de": 1} and steps[0].documents == 3


def test_lines_of_web_pages_go_for_a_reason_and_paragraphs_stay(tmp_path):
    halves = GOOD[1].split("\n\n", 1)
    text = "\n\n".join(["Home Contact", halves[0], "We use cookies on this page.", halves[1]])
    store, step = clean.one_step(stored(tmp_path, [text]), "quality", clean.quality("web"))
    assert step.documents == 1 and store[0].document.text.count("\n\n") > 3
    before = [clean.c4_keeps(line, False) for line in text.split("\n") if line.strip()]
    assert step.dropped == {"line that C4 drops": before.count(False)}
    assert step.examples["line that C4 drops"] == ["document 0", "Home Contact"]


def test_every_document_is_kept_or_dropped_for_a_reason(tmp_path):
    documents, _ = planted(5)
    store, steps = clean.clean(stored(tmp_path, documents), "docs")
    before = len(documents)
    parts = {"three sentences seen before", "line seen before", "EMAIL"}
    for step in steps:
        whole = sum(n for reason, n in step.dropped.items() if reason not in parts)
        assert step.documents == before - whole
        assert step.dropped.keys() == step.examples.keys()
        before = step.documents
    assert before == len(store)
    assert steps[-1].bytes == sum(len(text.encode()) for text in store.texts)
    assert not any(ADDRESS.search(" ".join(e)) for s in steps for e in s.examples.values())


@given(seeds, st.integers(1, 3), st.integers(1, 20_000))
def test_neither_processes_nor_groups_change_anything(tmp_path_factory, seed, number, group):
    documents, _ = planted(seed)
    outcomes = []
    for changed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if changed:
                patch.setattr(processes, "GROUP", group)
                patch.setattr("os.sched_getaffinity", lambda pid: range(number))
            folder = tmp_path_factory.mktemp("run")
            store, steps = clean.clean(stored(folder, documents), "docs")
        outcomes.append(([*store], steps))
    assert outcomes[0] == outcomes[1]


def written(folder: Path, documents: list[str]) -> DataConfig:
    lines = [json.dumps({"text": text}) for text in documents]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return DataConfig(str(folder / "corpus.jsonl"), clean="docs", held_out=0.4)


def sides(corpus) -> list[list[str]]:
    decode = corpus.tokenizer.decode
    return [[decode(side.document(i)[1:].tolist()) for i in range(len(side))]
            for side in (corpus.train, corpus.held)]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_out_is_not_known(tmp_path, seed):
    """Half-alike texts lie on one side, and no 13 words in a row on both."""
    rng = random.Random(seed)
    documents = []
    for text in GOOD:
        words = text.split()
        half = " ".join([*words[: int(0.8 * len(words))], *(rng.choice(words) for _ in range(30))])
        documents += [text, half]
    corpus = prepare(written(tmp_path, documents), TokenizerConfig("bytes"), cache=tmp_path / "c")
    train, held = sides(corpus)
    assert train and held and not shared_spans(train, held).any()
    for text in held:
        assert all(jaccard(shingles(text, 5), shingles(other, 5)) < 0.5 for other in train)
    step = Step(**corpus.meta["steps"][-1])
    assert step.name == "leak check" and step.documents == len(train) + len(held)


def test_the_same_text_gives_the_same_files_byte_for_byte(tmp_path, monkeypatch):
    """Whether made at once or after a kill, and with any number of processes."""
    config = written(tmp_path, planted(0)[0])
    contents = []
    for number in (1, 2):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, n=number: range(n))
        monkeypatch.setattr(processes, "GROUP", 9000 // number)
        prepare(config, TokenizerConfig(vocab_size=300), cache=tmp_path / f"cache{number}")
        files = sorted((tmp_path / f"cache{number}").rglob("*.*"))
        contents.append({path.name: path.read_bytes() for path in files if path.is_file()})
    assert contents[0] == contents[1] and len(contents[0]) >= 6


def test_a_corpus_of_which_nothing_is_left_is_told_why(tmp_path):
    config = written(tmp_path, ["%$ &/ () == ?? ## " * 9, "?" * 200])
    with pytest.raises(data.UserError, match=r"there is no text .* × .*see --data\.clean"):
        prepare(config, TokenizerConfig("bytes"), cache=tmp_path / "cache")


def test_the_funnel_says_what_went_and_why():
    read, step = Step("read"), Step("quality")
    read.keep("x" * 100)
    step.keep("x" * 50)
    step.drop("too dull", "here.txt", "one two", 3)
    lines = data.funnel([read, step]).splitlines()
    assert lines[1].split()[:3] == ["read", "1", "100"] and lines[1].count("█") == 24
    assert lines[2].count("█") == 12
    assert lines[3].strip() == "3 × too dull, as in here.txt 'one two'"


MAKE_TOKENS = """
import sys
from data import DataConfig, TokenizerConfig, prepare
from pathlib import Path
corpus = prepare(DataConfig(sys.argv[1], clean="docs"), TokenizerConfig(), cache=Path(sys.argv[2]))
print(corpus.meta["train"], corpus.meta["steps"])
"""


IN_PIECES = """
import os, sys, processes
os.sched_setaffinity(0, range(int(sys.argv[3])))
processes.GROUP = int(sys.argv[4])
"""


def made(folder: Path, rng: random.Random) -> Popen:
    """A process that makes token files, with some number of its own, in groups of some size."""
    words = [folder / "corpus.jsonl", folder / "cache", rng.randint(1, 2), rng.randint(9000, 99000)]
    code = IN_PIECES + MAKE_TOKENS
    return Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, stdout=DEVNULL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="os.sched_setaffinity")
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_token_files_made_by_killed_processes_are_the_same_byte_for_byte(tmp_path, kills):
    """kill -9 at any moment, then again: what is there at last does not tell."""
    rng, (whole, folder) = random.Random(0), (tmp_path / "whole", tmp_path / "killed")
    for place in (whole, folder):
        place.mkdir()
        written(place, planted(0)[0])
    start = time.monotonic()
    assert made(whole, rng).wait(120) == 0
    seconds, hits = time.monotonic() - start, 0
    while hits < kills:
        process = made(folder, rng)
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.kill()
        hits += process.wait() == -signal.SIGKILL
        assert all((key / "meta.json").exists() for key in (folder / "cache").glob("[!.]*"))
        if process.returncode == 0:  # it was faster; the next one begins anew
            assert files_in(folder) == files_in(whole)
            shutil.rmtree(folder / "cache")
    assert made(folder, rng).wait(120) == 0
    assert files_in(folder) == files_in(whole)


def files_in(folder: Path) -> dict[str, bytes]:
    """The token files; of their description all but where the text stood."""
    (key,) = (folder / "cache").glob("[!.]*")
    contents = {path.name: path.read_bytes() for path in key.iterdir()}
    assert len(contents) >= 6
    place = str(folder).encode()
    meta = json.loads(contents["meta.json"].replace(place, b""))
    return contents | {"meta.json": json.dumps({k: v for k, v in meta.items() if k != "hash"})}


def memory_of(pid: int) -> int:
    """Bytes of a process and its children, what they share counted once."""
    pids, total = {str(pid)}, 0
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            pids.update(path.read_text().split())
    for one in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_gigabyte_of_text_goes_through_less_than_a_gigabyte_of_memory(tmp_path):
    """Read, cleaned, compared, divided, cut and written; a tenth are near-copies."""
    rng = random.Random(0)
    words = sorted({word for topic in topics.values() for word in topic.split() if word.isalpha()})
    often = [*accumulate(1 / (1 + i) for i in range(len(words)))]
    rng.shuffle(words)
    size = 0
    with open(tmp_path / "corpus.jsonl", "w") as file:
        while size < 1e9:
            drawn = rng.choices(words, cum_weights=often, k=360)
            text = "".join(f"The {' '.join(drawn[i : i + 12])} of it. " for i in range(0, 360, 12))
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if rng.random() < 0.1:
                file.write(json.dumps({"text": f"{text} {text[:100]}"}) + "\n")
    command = [sys.executable, "-c", MAKE_TOKENS, tmp_path / "corpus.jsonl", tmp_path / "cache"]
    with Popen(command, cwd=ROOT, stdout=PIPE, text=True) as process:
        most = 0
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.2)
        print(f"{size:,} bytes of text, {most:,} of memory; {process.stdout.read()}")
    assert process.returncode == 0 and most < 1e9
