"""Laws of run.py: a run's folder is whole whatever happens, and its mistakes are one sentence."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st

import run
from pictures import plot_loss, shade_of, smooth
from run import (
    KEEP,
    Run,
    UserError,
    generator,
    load_tensors,
    read_json,
    settings,
    write_json,
    write_whole,
)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    """Runs of a test are made in a folder of its own."""
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def fresh() -> Run:
    """A new run for each example that Hypothesis draws."""
    return Run.create("", {"steps": 3})


def refusal(action) -> str:
    """The one sentence of a UserError."""
    with pytest.raises(UserError) as error:
        action()
    sentence = str(error.value)
    assert sentence and "\n" not in sentence
    return sentence


# --- randomness -----------------------------------------------------------------------------------

names = st.sampled_from(["data", "init", "dropout", "1/2", "data/1"])
streams = st.tuples(st.integers(-5, 300), names, st.integers(0, 300))


def draw(stream: tuple[int, str, int]) -> list[float]:
    return torch.randn(8, generator=generator(*stream)).tolist()


@given(st.lists(streams, unique=True, min_size=2, max_size=6))
def test_each_purpose_has_a_stream_of_its_own_and_nothing_global_is_touched(drawn):
    state = torch.get_rng_state()
    first = [draw(stream) for stream in drawn]
    assert len(set(map(tuple, first))) == len(drawn)
    assert [draw(stream) for stream in reversed(drawn)] == first[::-1]
    assert torch.equal(torch.get_rng_state(), state)


def test_streams_are_independent():
    """Correlations of neighbours in seed, name and step are those of noise: below 6 / √n."""
    n = 4096
    drawn = [generator(s, name, t) for s in range(3) for name in ("a", "b") for t in range(3)]
    normal = np.stack([torch.randn(n, generator=g).double().numpy() for g in drawn])
    correlation = np.corrcoef(normal) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 6 / n**0.5


# --- the folder -----------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(["run-001", "run-007", "run-12", "run-x", "run-", "other", "7"])))
def test_a_run_without_a_name_gets_the_next_number(taken):
    with tempfile.TemporaryDirectory() as folder, patch.object(run, "RUNS", Path(folder) / "runs"):
        for name in taken:
            (run.RUNS / name).mkdir(parents=True)
        numbers = [n for n in (1, 7, 12) if {f"run-{n:03d}", f"run-{n}"} & taken]
        first = max(numbers, default=0) + 1
        for number in (first, first + 1):
            made = Run.create("", {"steps": 3})
            assert made.folder == run.RUNS / f"run-{number:03d}"
            assert made.config() == {"steps": 3} and made.checkpoints() == []


def test_a_name_that_is_taken_is_refused(runs):
    Run.create("mine", {"steps": 3})
    sentence = refusal(lambda: Run.create("mine", {"steps": 4}))
    assert str(runs / "mine") in sentence and "--resume" in sentence
    assert Run.open("mine").config() == {"steps": 3}
    (runs / "file").write_text("no folder")
    assert "exists already" in refusal(lambda: Run.create("file", {}))


def test_a_place_that_cannot_be_written_is_refused(runs):
    runs.write_text("a file in the folder's place")
    for name in ("", "mine"):
        assert f"cannot make the run folder {runs}" in refusal(lambda n=name: Run.create(n, {}))


@pytest.mark.parametrize(
    "name", ["-a", "a/b", "..", ".hidden", "/tmp/x", "a\nb", "\udcff", "x" * 201, "ü" * 101]
)
def test_a_name_that_is_no_folder_name_is_refused(name):
    assert "cannot be the name" in refusal(lambda: Run.create(name, {}))
    if len(name) > 3:
        assert "no run named" in refusal(lambda: Run.open(2 * name))


def test_runs_that_start_together_without_a_name_get_one_each(runs):
    """Also while another is still making its folder."""
    first, drafted = Run.create("", {}), Run(runs / ".run-002.draft")
    drafted.folder.mkdir()
    drafted.lock()
    assert Run.create("", {}).folder.name == "run-003" and first.folder.name == "run-001"

    def faster(self):
        (runs / "run-004").mkdir(exist_ok=True)
        (runs / "run-004" / "config.json").write_text("{}")
        lock(self)

    lock = Run.lock
    with patch.object(Run, "lock", faster):
        assert Run.create("", {}).folder.name == "run-005"


def test_a_run_that_was_killed_while_it_was_made_is_made_again(runs):
    """At each of its writes: it is there with all its settings, or its name is free."""
    k, made = 0, False
    while not made:
        with suppress(Killed), Plug(k):
            Run.create("mine", {"steps": 3})
            made = True
        if (runs / "mine").exists():
            assert Run.open("mine").config() == Run.open().config() == {"steps": 3}
            if not made:
                shutil.rmtree(runs / "mine")
        else:
            assert "no run" in refusal(lambda: Run.open("mine"))
            assert "no run" in refusal(Run.open)
            assert Run.create("", {}).folder.name == "run-001"
            shutil.rmtree(runs / "run-001")
        k += 1
    left = {p.name for p in (runs / "mine").iterdir()}
    assert left == {"checkpoints", "config.json", "lock"} and not list(runs.glob(".*")) and k > 5


ELSEWHERE = """
import sys, run
from pathlib import Path
run.RUNS = Path(sys.argv[1])
mine = run.Run.resume("mine") if sys.argv[2] == "resume" else run.Run.create(sys.argv[2], {})
print(mine.folder.name, flush=True)
sys.stdin.read()
"""


def elsewhere(runs: Path, what: str) -> subprocess.Popen:
    """Another process that makes or resumes a run, and holds it."""
    process = subprocess.Popen([sys.executable, "-c", ELSEWHERE, runs, what], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    process.name = process.stdout.readline().strip()
    return process


def test_a_run_has_one_writer(runs):
    """Until it ends or is killed; reading is free."""
    other = elsewhere(runs, "mine")
    assert "exists already" in refusal(lambda: Run.create("mine", {}))
    for _ in range(2):
        sentence = refusal(lambda: Run.resume("mine"))
        assert f"process {other.pid} is writing to {runs / 'mine'}" in sentence
    assert Run.open("mine").config() == {}
    other.kill()
    other.communicate()
    mine = Run.resume("mine")
    assert (mine.folder / "lock").read_text() == f"{os.getpid()}\n"
    assert str(os.getpid()) in refusal(lambda: Run.resume("mine"))
    del mine
    with elsewhere(runs, "resume") as third:
        assert str(third.pid) in refusal(lambda: Run.resume("mine"))


def test_two_processes_do_not_make_one_run(runs):
    """The name is taken from the moment on at which another process begins to make its folder."""
    first = Run(runs / ".mine.draft")
    first.folder.mkdir(parents=True)
    first.lock()
    assert f"process {os.getpid()}" in refusal(lambda: Run.create("mine", {}))
    first.file.close()

    def faster(self):
        (runs / "mine").mkdir()
        (runs / "mine" / "config.json").write_text("of another process")

    with patch.object(Run, "lock", faster):
        assert "exists already" in refusal(lambda: Run.create("mine", {}))
    assert (runs / "mine" / "config.json").read_text() == "of another process"


def test_where_there_are_no_locks_a_run_has_none(runs):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    for fcntl in (None, Mock(flock=no_locks, LOCK_EX=2, LOCK_NB=4)):
        with patch.object(run, "fcntl", fcntl):
            mine = fresh()
            assert Run.resume(mine.folder.name).config() == {"steps": 3}


def test_open_finds_a_run_by_its_name_its_path_or_as_the_newest(runs, tmp_path):
    for age, name in enumerate(["new", "old", "older"]):
        Run.create(name, {"name": name})
        os.utime(runs / name / "config.json", (10**9 - age, 10**9 - age))
    (runs / "cache").mkdir()
    assert Run.open().config() == {"name": "new"}
    assert Run.open("old").config() == {"name": "old"}
    assert Run.open(str(runs / "older")).config() == {"name": "older"}
    assert "is not a run" in refusal(lambda: Run.open("cache"))
    assert "is not a run" in refusal(lambda: Run.open(str(tmp_path)))
    sentence = refusal(lambda: Run.open("none"))
    assert "no run named 'none'" in sentence and str(runs / "none") in sentence
    assert "no run named" in refusal(lambda: Run.open(str(runs / "new" / "config.json")))


def test_open_without_any_run_says_how_to_make_one(runs):
    assert "python train.py" in refusal(Run.open)
    runs.mkdir()
    assert "python train.py" in refusal(Run.open)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b"3", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_settings_that_are_damaged_are_refused(runs, content):
    path = Run.create("mine", {}).folder / "config.json"
    path.write_bytes(content)
    assert f"cannot read {path}" in refusal(Run.open("mine").config)
    path.unlink()
    assert f"cannot read {path}" in refusal(lambda: read_json(path))


values = st.dictionaries(st.text(), st.integers() | st.text(st.characters()) | st.booleans())


@given(values)
def test_json_comes_back(value):
    path = fresh().folder / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_what_is_logged_is_printed_and_kept(capsys):
    mine = fresh()
    mine.log("step 1   loss 2.5 … naïve")
    mine.log()
    assert capsys.readouterr().out == "step 1   loss 2.5 … naïve\n\n"
    assert (mine.folder / "log.txt").read_text("utf-8") == "step 1   loss 2.5 … naïve\n\n"


numbers = st.floats(allow_nan=False) | st.integers() | st.text()


@given(st.lists(st.tuples(st.integers(0, 9), numbers), max_size=9), st.integers(-1, 9))
def test_measurements_come_back_and_those_after_a_step_are_forgotten(rows, step):
    mine = fresh()
    assert mine.metrics() == []
    for at, value in rows:
        mine.measure(step=at, loss=value)
    assert mine.metrics() == [{"step": at, "loss": value} for at, value in rows]
    mine.forget_after(step)
    kept = [{"step": at, "loss": value} for at, value in rows if at <= step]
    assert mine.metrics() == kept
    mine.measure(step=step + 1, loss=0.5)
    assert mine.metrics() == [*kept, {"step": step + 1, "loss": 0.5}]


@given(st.integers(0, 30))
def test_a_measurement_that_was_half_written_is_dropped(size):
    """Once a run that had been killed while it wrote this line could not be resumed."""
    mine = fresh()
    mine.measure(step=1, loss=2.5)
    half = json.dumps({"step": 2, "loss": 2.25, "norm": 1})[:size]
    with open(mine.folder / "metrics.jsonl", "a") as file:
        file.write(half)
    assert mine.metrics() == [{"step": 1, "loss": 2.5}]
    mine.forget_after(1)
    mine.measure(step=2, loss=2.0)
    assert mine.metrics() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]


NO_ROWS = [
    b"", b"x", b"\xff\xfe", b"3", b"[1]", b"null", b'{"loss": 1}', b'{"step": "1"}',
    b'{"step": 1.0}', b'{"step": null}', b'{"step": -1}', b'{"step": 1' + b"0" * 30 + b"}",
    b"[" * 100_000, b"9" * 5000, b'{"step": 1}{"step": 2}', b'{"step": [1]}', "{\u2028}".encode(),
]  # fmt: skip


@given(st.lists(st.sampled_from([*NO_ROWS, None]), max_size=9))
def test_a_damaged_line_hides_no_other(capsys, lines):
    """Once all measurements behind it were lost."""
    mine, rows = fresh(), []
    with open(mine.folder / "metrics.jsonl", "wb") as file:
        for step, line in enumerate(lines):
            if line is None:
                rows.append({"step": step, "loss": 0.5})
                line = json.dumps(rows[-1]).encode()
            file.write(line + b"\n")
    capsys.readouterr()
    assert mine.metrics() == rows
    lost, said = len(lines) - len(rows), capsys.readouterr().err
    assert (f"passed over {lost} of {len(lines)} lines in {mine.folder}" in said) == (lost > 0)
    mine.forget_after(99)
    capsys.readouterr()
    assert mine.metrics() == rows and capsys.readouterr().err == ""


WRITERS = {
    "log.txt": lambda mine: mine.log("text"),
    "metrics.jsonl": lambda mine: mine.measure(step=1),
    "loss.png": plot_loss,
    "checkpoints/step-000002": lambda mine: save(mine, 2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_be_written_is_one_sentence_that_says_how_to_go_on(runs, name):
    mine = Run.create("mine one", {})
    path = mine.folder / name
    if "checkpoints" in name:
        path = path.parent
        path.rmdir()
        path.write_text("a file in the folder's place")
    else:
        path.mkdir()
    sentence = refusal(lambda: WRITERS[name](mine))
    assert f"cannot write {mine.folder / name}: " in sentence
    assert "python train.py --name 'mine one' --resume" in sentence
    assert not list(mine.folder.rglob("*draft*"))
    away = Run(runs.parent / "moved")
    assert away.command == f"python train.py --name {runs.parent}/moved --resume"


def test_a_reader_of_the_log_that_has_seen_enough_is_no_full_disk():
    with patch("sys.stdout.write", side_effect=BrokenPipeError), pytest.raises(BrokenPipeError):
        fresh().log("text")
    with patch("sys.stdout.write", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert "cannot write the output: No space left" in refusal(lambda: fresh().log("text"))


# --- settings -------------------------------------------------------------------------------------


@given(values, values)
def test_settings_are_known_by_a_hash_of_themselves(value, other):
    """A change is refused, unless the hash is deleted; another layout is no change."""
    value.pop("hash", None)
    mine = Run.create("", value)
    path = mine.folder / "config.json"
    assert mine.config() == value
    written = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(written.items())), indent=7))
    assert mine.config() == value
    other = {**value, **other, "another": 1}
    path.write_text(json.dumps({**other, "hash": written["hash"]}))
    assert f"{path} is not what was written" in refusal(mine.config)
    for bad in (None, 0, "", [], "[" * 9):
        path.write_text(json.dumps({**value, "hash": bad}))
        assert "delete its hash" in refusal(mine.config)
    path.write_text(json.dumps(other))
    assert mine.config() == other
    mine.keep(value)
    assert mine.config() == value and path.read_text() == json.dumps(written, indent=1) + "\n"


def test_settings_that_are_nested_without_end_are_refused():
    mine = fresh()
    for depth in range(600, 1000, 7):
        text = '{"hash": "", "a": ' + "[" * depth + "]" * depth + "}"
        (mine.folder / "config.json").write_text(text)
        assert str(mine.folder / "config.json") in refusal(mine.config)
        text = '{"number": ' + "[" * depth + "]" * depth + "}"
        with pytest.raises((UserError, RecursionError)):
            settings(Outer, json.loads(text), "here")


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    share: float = 0.5

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise UserError(f"--inner.share {self.share} must lie between 0 and 1")


@dataclass(frozen=True)
class Outer:
    number: int = 3
    text: str = ""
    yes: bool = False
    names: tuple[str, ...] = ()
    inner: Inner = Inner()


inners = st.builds(Inner, st.sampled_from("ab"), st.floats(0, 1))
names_ = st.lists(st.text()).map(tuple)
outers = st.builds(Outer, st.integers(), st.text(), st.booleans(), names_, inners)


@given(outers, st.sets(st.sampled_from(["number", "text", "yes", "inner", "kind", "share"])))
def test_settings_come_back_and_what_an_old_run_lacks_has_its_default(outer, lacking):
    stored = json.loads(json.dumps(asdict(outer)))
    assert settings(Outer, stored, "here") == outer
    for name in lacking:
        stored.pop(name, None)
        stored.get("inner", {}).pop(name, None)
    made, default = settings(Outer, stored, "here"), Outer()
    if "inner" in lacking:
        assert made.inner == default.inner
    for name in ("number", "text", "yes"):
        assert getattr(made, name) == getattr(default if name in lacking else outer, name)
    assert settings(Outer, {"inner": {"share": 1}}, "here").inner.share == 1.0


WRONG = [
    ({"number": "3"}, "number cannot be '3'"),
    ({"number": True}, "number cannot be True"),
    ({"number": 3.0}, "number cannot be 3.0"),
    ({"number": None}, "number cannot be None"),
    ({"number": [[[[[[[[1]]]]]]]]}, "number cannot be [[[[[[[...]]]]]]]"),
    ({"text": 3}, "text cannot be 3"),
    ({"text": ["x" * 999]}, "text cannot be ["),
    ({"yes": 1}, "yes cannot be 1"),
    ({"names": "a"}, "names cannot be 'a'"),
    ({"names": ["a", 1]}, "names cannot be 1"),
    ({"inner": 3}, "inner cannot be 3"),
    ({"inner": {"kind": "c"}}, "inner.kind cannot be 'c'"),
    ({"inner": {"kind": ["a"]}}, "inner.kind cannot be ['a']"),
    ({"inner": {"share": "0.5"}}, "inner.share cannot be '0.5'"),
    ({"inner": {"share": 10**400}}, "inner.share cannot be 1000"),
    ({"inner": {"share": 7}}, "--inner.share 7.0 must lie between 0 and 1"),
    ({"inner": {"more": 1}}, "knows no setting 'inner.more'"),
    ({"b\n": 1, "a": 1}, "knows no setting 'a', 'b\\n'"),
    ([1], "it cannot be [1]"),
]


@pytest.mark.parametrize("values, said", WRONG)
def test_settings_of_another_kind_are_refused_by_name(values, said):
    sentence = refusal(lambda: settings(Outer, values, "here"))
    assert sentence.startswith("here: ") and said in sentence and len(sentence) < 200


# --- checkpoints ----------------------------------------------------------------------------------

FILES = ["model.safetensors", "train_state.safetensors", "train_state.json", "manifest.json"]
dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
)
shapes = st.lists(st.integers(0, 4), max_size=3)
layouts = st.sampled_from(["plain", "transposed", "part", "parameter"])
tensors = st.lists(st.tuples(dtypes, shapes, layouts), max_size=5)


def make_tensors(specs, seed: int) -> dict[str, torch.Tensor]:
    """Any bits at all, NaN included; some tensors are views, as those of a model may be."""
    out, rng = {}, np.random.default_rng(seed)
    for i, (dtype, shape, layout) in enumerate(specs):
        content = list(rng.bytes(int(np.prod([*shape, dtype.itemsize]))))
        x = torch.tensor(content, dtype=torch.uint8).view(dtype).reshape(shape)
        if layout == "transposed":
            x = x.mT if x.dim() > 1 else x
        elif layout == "part":
            x = torch.cat((x[None], x[None]))[1]
        elif layout == "parameter" and dtype.is_floating_point:
            x = torch.nn.Parameter(x)
        out[f"layer.{i}"] = x
    return out


def bits(tensors: dict[str, torch.Tensor]) -> dict:
    return {
        name: (x.dtype, x.shape, x.detach().contiguous().flatten().view(torch.uint8).tolist())
        for name, x in tensors.items()
    }


@given(tensors, tensors, seeds, st.integers(0, 10**7))
def test_a_checkpoint_gives_back_each_bit(model, state, seed, step):
    model, state = make_tensors(model, seed), make_tensors(state, seed + 1)
    mine = fresh()
    folder = mine.save(step, model, state, {"epoch": 2, "row": seed})
    assert mine.newest() == folder and sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert bits(load_tensors(folder / "model.safetensors")) == bits(model)
    assert bits(load_tensors(folder / "train_state.safetensors")) == bits(state)
    assert read_json(folder / "train_state.json") == {"step": step, "epoch": 2, "row": seed}


def save(mine: Run, step: int) -> Path:
    """A small checkpoint whose content tells its step."""
    return mine.save(step, {"w": torch.full((3,), float(step))}, {"m": torch.ones(2)}, {"row": 1})


def step_in(checkpoint: Path) -> int:
    step = read_json(checkpoint / "train_state.json")["step"]
    assert load_tensors(checkpoint / "model.safetensors")["w"].tolist() == [step] * 3
    return step


@given(st.lists(st.integers(0, 1_200_000), min_size=1, max_size=6, unique=True).map(sorted))
def test_only_the_newest_checkpoints_are_kept(steps):
    """Newest by number: from a million steps on the names are longer."""
    mine = fresh()
    for step in steps:
        save(mine, step)
        assert step_in(mine.newest()) == step
    assert [step_in(path) for path in mine.checkpoints()] == steps[::-1][:KEEP]
    assert len(list((mine.folder / "checkpoints").iterdir())) == min(len(steps), KEEP)


def test_a_checkpoint_that_an_interrupt_made_takes_no_other_ones_place():
    """Steps 0, 10, 20, … are kept as if nobody had stopped the run at 13 and at 27."""
    mine = fresh()
    for step in (10, 13, 20, 27):
        mine.save(step, {"w": torch.ones(3)}, {"m": torch.ones(2)}, {"row": 1}, every=10)
    assert [int(path.name[5:]) for path in mine.checkpoints()] == [27, 20, 10]


def harm(path: Path, kind: str, at: float) -> None:
    content = path.read_bytes()
    place = int(at * len(content))
    if kind == "delete":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "flip":
        flipped = content[place] ^ (1 << place % 8)
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
    else:
        path.write_bytes({"list": b"[]", "string": b'"model.safetensors"', "none": b"null"}[kind])


KINDS = ("delete", "cut", "flip", "list", "string", "none")


@given(st.floats(0, 1, exclude_max=True))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(capsys, at):
    mine = fresh()
    older, newer = save(mine, 1), save(mine, 2)
    for name, kind in product(FILES, KINDS):
        content = (newer / name).read_bytes()
        harm(newer / name, kind, at)
        capsys.readouterr()
        found = mine.newest()
        if found == newer:  # a flipped blank of the manifest, or its last line feed, is harmless
            assert name == "manifest.json" and kind in ("flip", "cut")
        else:
            assert found == older and step_in(found) == 1
            said = capsys.readouterr().err
            assert f"passed over {newer}: " in said and len(said.splitlines()) == 1
            assert name in said, (kind, said)
        (newer / name).write_bytes(content)
        assert mine.newest() == newer


@given(st.sampled_from(FILES), st.sampled_from(FILES))
def test_if_all_checkpoints_are_damaged_none_is_loaded(one, other):
    mine = fresh()
    older, newer = save(mine, 1), save(mine, 2)
    harm(older / one, "cut", 0.5)
    harm(newer / other, "delete", 0)
    sentence = refusal(mine.newest)
    assert f"{mine.folder} has no whole checkpoint" in sentence
    assert f"step-000002: {other}: No such file" in sentence and "step-000001: " in sentence


def test_without_a_checkpoint_there_is_nothing_to_load():
    sentence = refusal(fresh().newest)
    assert "no whole checkpoint" in sentence and "python train.py" in sentence


def test_a_damaged_checkpoint_is_not_one_of_those_kept():
    """Once it was, and the whole one before it went."""
    mine = fresh()
    for step in range(1, KEEP + 2):
        save(mine, step)
    harm(mine.checkpoints()[0] / "model.safetensors", "flip", 0.9)
    save(mine, 9)
    assert [step_in(p) for p in mine.checkpoints()] == [9, *range(KEEP, 0, -1)][:KEEP]


@pytest.mark.parametrize("kind", ["file", "link", "link to nowhere"])
def test_what_stands_in_a_checkpoint_s_place_is_passed_over_and_goes(runs, kind, capsys):
    mine = fresh()
    kept, place = save(mine, 1), mine.folder / "checkpoints" / "step-000002"
    precious = runs / "precious"
    precious.mkdir()
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to(precious if kind == "link" else runs / "nowhere")
    assert mine.newest() == kept and "step-000002" in capsys.readouterr().err
    save(mine, 2)
    assert step_in(mine.newest()) == 2 and precious.is_dir() and not place.is_symlink()
    place = mine.folder / "checkpoints" / "step-000009"
    place.write_text("")
    save(mine, 3)
    assert not place.exists()


def test_a_checkpoint_under_another_step_s_name_is_passed_over(capsys):
    mine = fresh()
    one, two = save(mine, 1), save(mine, 2)
    two.rename(two.with_name("step-000007"))
    assert mine.newest() == one and "it is that of step 2" in capsys.readouterr().err


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(monkeypatch):
    mine = fresh()
    save(mine, 1)
    locked = save(mine, 2)

    def forbidden(path):
        if path.parent == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return digest(path)

    digest = run.digest
    monkeypatch.setattr(run, "digest", forbidden)
    for action in (mine.newest, lambda: save(mine, 3)):
        assert "step-000002/model.safetensors: Permission denied" in refusal(action)
    assert locked.is_dir()


@pytest.mark.parametrize("how", ["gone", "a file", "a link to nowhere"])
def test_if_the_place_of_checkpoints_cannot_be_read_nothing_is_known(runs, how):
    mine = fresh()
    save(mine, 1)
    place = mine.folder / "checkpoints"
    place.rename(runs / "moved")
    if how == "a file":
        place.write_text("")
    elif how == "a link to nowhere":
        place.symlink_to("nowhere")
    assert f"cannot read {place}: " in refusal(mine.newest)
    assert f"cannot read {place}: " in refusal(mine.checkpoints)


def test_measurements_are_on_the_disk_before_the_checkpoint_that_follows_them():
    mine, synced = fresh(), []
    mine.measure(step=1)
    with patch.object(run, "sync", lambda path: synced.append(path.name)):
        final = save(mine, 1)
    last = synced.index("checkpoints")  # after the rename
    assert {"metrics.jsonl", f".{final.name}.draft", *FILES} <= {*synced[:last]}


def test_a_tensor_file_that_cannot_be_read_is_refused(tmp_path):
    for content in (b"", b"garbage", b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert "model.safetensors" in refusal(lambda: load_tensors(tmp_path / "model.safetensors"))
    assert "none.safetensors" in refusal(lambda: load_tensors(tmp_path / "none.safetensors"))


class Killed(BaseException):
    """As a signal: no `except Exception` sees it."""


class Plug:
    """Pulls the plug at the k-th call that writes: half of the bytes arrive, and nothing after."""

    CALLS = (
        (run, "save_file"), (Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir"),
        (Path, "rename"), (Path, "replace"), (os, "fsync"), (shutil, "rmtree"),
    )  # fmt: skip

    def __init__(self, k: int):
        self.left = k

    def __enter__(self):
        self.patches = [patch.object(owner, name, self.wrap(owner, name))
                        for owner, name in self.CALLS]  # fmt: skip
        for each in self.patches:
            each.start()

    def __exit__(self, *error):
        for each in self.patches:
            each.stop()

    def wrap(self, owner, name):
        real, write_bytes = getattr(owner, name), Path.write_bytes

        def call(*args, **kwargs):
            if self.left:
                self.left -= 1
                return real(*args, **kwargs)
            if name in ("save_file", "write_text", "write_bytes"):
                real(*args, **kwargs)
                path = next(arg for arg in args if isinstance(arg, Path))
                write_bytes(path, path.read_bytes()[: path.stat().st_size // 2])
            raise Killed

        return call


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "over a damaged one"])
def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(again):
    """Killed at the k-th write for every k: the newest is the one before, or the new one, whole."""
    step, k, finished = 2, 0, False
    outcomes = []
    while not finished:
        mine = fresh()
        save(mine, 1)
        if again:
            (save(mine, step) / "model.safetensors").write_bytes(b"")
        try:
            with Plug(k):
                save(mine, step)
            finished = True
        except Killed:
            outcomes.append(step_in(mine.newest()))
        names = {path.name for path in mine.checkpoints()}
        assert names <= {"step-000001", "step-000002"}
        save(mine, step)
        assert step_in(mine.newest()) == step
        assert sorted(p.name for p in (mine.folder / "checkpoints").iterdir()) == [
            "step-000001", "step-000002",
        ], "what was half-written must be gone"  # fmt: skip
        k += 1
    assert k > 10 and set(outcomes) == {1, 2}
    assert outcomes == sorted(outcomes)


def test_a_whole_checkpoint_is_not_written_again():
    mine = fresh()
    before = save(mine, 1).stat().st_mtime_ns
    assert save(mine, 1).stat().st_mtime_ns == before


def test_damaged_checkpoints_of_later_steps_go_with_the_next_save():
    mine = fresh()
    for step in (1, 5, 6):
        (save(mine, step) / "manifest.json").write_text("[" * 100_000 if step > 1 else "{}")
    save(mine, 2)
    assert step_in(mine.newest()) == 2
    assert [p.name for p in mine.checkpoints()] == ["step-000002"]


def test_a_draft_that_a_killed_process_left_is_ignored_and_goes():
    mine = fresh()
    draft = mine.folder / "checkpoints" / ".step-000002.draft"
    shutil.copytree(save(mine, 1), draft)
    (draft / "junk").write_text("left from before")
    assert [step_in(path) for path in mine.checkpoints()] == [1] and step_in(mine.newest()) == 1
    assert sorted(p.name for p in save(mine, 2).iterdir()) == sorted(FILES)
    assert not draft.exists()


@given(st.binary(max_size=99), st.binary(max_size=99))
def test_a_file_is_written_whole_or_not_at_all(old, new):
    path = fresh().folder / "file"
    write_whole(path, old)
    assert path.read_bytes() == old
    k, finished = 0, False
    while not finished:
        try:
            with Plug(k):
                write_whole(path, new)
            finished = True
        except Killed:
            assert path.read_bytes() == (old if k < 3 else new)
        k += 1
    assert path.read_bytes() == new and k == 5  # after the write, sync, rename and sync
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "checkpoints", "config.json", "file", "lock"
    ]  # fmt: skip


# --- the way out ----------------------------------------------------------------------------------


def leave(script, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run.main(script)
    out = capsys.readouterr()
    assert out.out == ""
    return stop.value.code, out.err


def test_a_mistake_is_one_sentence_and_exit_status_2(capsys):
    def script():
        raise UserError("--steps 0 is too few: choose 1 or more")

    assert leave(script, capsys) == (2, "error: --steps 0 is too few: choose 1 or more\n")


def test_ctrl_c_is_no_traceback(capsys):
    def script():
        raise KeyboardInterrupt

    assert leave(script, capsys) == (130, "\nstopped\n")


def test_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(ZeroDivisionError):
        run.main(lambda: 1 // 0)
    run.main(lambda: None)


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import run; run.main(lambda: [print(n) for n in range(10**5)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    process.stderr.close()


def run_main(code: str, **options) -> subprocess.CompletedProcess:
    """A script of its own, in which `run` is imported."""
    words = [sys.executable, "-c", f"import run; run.main(lambda: {code})"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT} | options
    return subprocess.run(words, timeout=60, check=False, **options)


def test_a_terminal_that_knows_only_ascii_shows_the_rest_as_escapes():
    done = run_main("print('Käse, 文')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, b"K\\xe4se, \\u6587\n")


def test_output_that_cannot_be_written_is_one_sentence():
    with open("/dev/full", "wb") as full:
        for code in ("print('x')", "[print('x' * 10**5), print('y')]"):
            done = run_main(code, stdout=full)
            want = (2, b"error: the output: No space left on device\n")
            assert (done.returncode, done.stderr) == want


MENDED = {
    "a file": ("open('/no/where')", "error: /no/where: No such file or directory"),
    "memory": ("bytes(1 << 62)", "error: this takes more memory than there is"),
    "tensors": ("run.torch.empty(1 << 50)", "error: this takes more memory than there is"),
    "a signal": ("[run.os.kill(run.os.getpid(), 15), run.signal.pause()]", ""),
}


@pytest.mark.parametrize("case", MENDED)
def test_what_the_machine_refuses_is_one_sentence(case):
    code, said = MENDED[case]
    done = run_main(code, text=True)
    assert done.returncode == (143 if case == "a signal" else 2) and done.stdout == ""
    assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == bool(said)


# --- pictures -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.floats(0, 0.99))
def test_smooth_is_the_weighted_mean_of_all_so_far(values, memory):
    got = smooth(tuple(values), memory)
    for t in range(len(values)):
        weights = memory ** np.arange(t, -1, -1.0)
        want = weights @ np.array(values[: t + 1]) / weights.sum()
        assert got[t] == pytest.approx(want, abs=1e-9)


ROWS = {
    "nothing": [],
    "training": [{"step": s, "train_bits_per_byte": 8 / (s + 1)} for s in range(50)],
    "held out": [{"step": s, "bits_per_byte": 3.0} for s in (10, 20)],
    "one step": [{"step": 1, "train_bits_per_byte": 2.0, "bits_per_byte": 2.1}],
    "beyond 8": [{"step": 1, "train_bits_per_byte": 30.0, "bits_per_byte": 20.0}],
    "damaged": [{"step": s, "bits_per_byte": x} for s, x in enumerate([1e30, "3", None, -1e30, 3])],
    "other rows": [{"step": 1, "seconds": 0.1}],
}


@pytest.mark.parametrize("lzma", [None, 2.5])
@pytest.mark.parametrize("rows", ROWS)
def test_the_loss_becomes_a_picture(rows, lzma):
    mine = fresh()
    for row in ROWS[rows]:
        mine.measure(**row)
    path = plot_loss(mine, lzma)
    content = path.read_bytes()
    assert path == mine.folder / "loss.png" and content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1040, 585) and 5_000 < len(content) < 500_000


def test_metrics_are_one_json_object_a_line():
    mine = fresh()
    mine.measure(step=1, loss=2.5)
    mine.measure(step=2, text="two\nlines")
    lines = (mine.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    assert list(map(json.loads, lines)) == mine.metrics() and len(lines) == 2


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_the_last_block_is_the_darkest_and_all_are_colors(blocks):
    shades = [shade_of(n, blocks) for n in range(blocks)]
    assert shades == sorted(shades, reverse=True) and len({*shades}) == blocks
    assert shades[-1] == pytest.approx((0.1, 0.25, 0.55))
    assert all(0 <= x <= 1 for shade in shades for x in shade)
