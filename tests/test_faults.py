"""No way to lose a run: processes that are killed, disks that fill up, files that are damaged.

Each campaign has a small sample here, which takes seconds; all of it, some 20 minutes:

Run: pytest tests/test_faults.py -m slow
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import ROOT
from helpers import limited
from test_train import TINY, assert_same_end, end_of, start, write_texts

import run as run_module
from data import Corpus, DataConfig, TokenizerConfig, prepare
from model import ModelConfig
from run import Run, UserError, digest, load_tensors, read_json
from train import Train, Training, complete, loop, stored
from writer import load


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A working folder with a little text in it."""
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- processes that are killed --------------------------------------------------------------------

LONG = [*TINY, "--steps", "300", "--save-every", "1", "--evaluate-every", "50"]


def kill_at_random(name: str, rng: random.Random, kills: int) -> Counter:
    """Start a run, kill -9, resume, kill -9 …, and in the end let it finish.

    One kill in four falls anywhere into the start; the others into training, half of whose time
    goes into saves. After each, what is newest is whole.
    """
    place, seen = Path("runs") / name, Counter()
    while True:
        again = (place / "config.json").exists()
        process = start("train.py", "--name", name, *(["--resume"] if again else LONG))
        if seen["kills"] < kills:
            wait_a_little(process, place / "metrics.jsonl", rng)
        else:
            process.wait(120)
        process.kill()
        _, err = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, err
            return seen
        seen["kills"] += 1
        seen["before there was a run"] += not place.exists()
        seen["into a save"] += any(place.glob("checkpoints/.*.draft"))
        if place.exists() and Run.open(name).checkpoints():
            load_tensors(Run.open(name).newest() / "model.safetensors")


def wait_a_little(process: subprocess.Popen, metrics: Path, rng: random.Random) -> None:
    """Up to four seconds from the start, or until a step was made and a moment longer."""
    if rng.random() < 0.25:
        return time.sleep(rng.uniform(0, 4))
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None:
        time.sleep(0.01)
        if metrics.exists() and metrics.stat().st_mtime_ns > before and metrics.stat().st_size:
            return time.sleep(rng.uniform(0, 0.6))


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_an_uninterrupted_one(texts, kills):
    """Weights, optimizer, place in the text and metrics, their times aside."""
    rng, seen = random.Random(0), Counter()
    assert start("train.py", *LONG, "--name", "whole").wait(120) == 0
    for number in range(kills):
        seen += kill_at_random(f"run-{number}", rng, min(10, kills - seen["kills"]))
        assert_same_end(end_of("whole"), end_of(f"run-{number}"))
        if seen["kills"] == kills:
            break
    print(dict(seen))
    assert seen["kills"] == kills and (seen["into a save"] > kills // 10 or kills < 9)


# --- the writer, killed or refused at each of its calls -------------------------------------------

STARTS = ("nothing", "a run that was killed", "a damaged checkpoint")
KINDS = ("kill", "half", *map(str, (5, 27, 28, 30, 122)))  # EIO, EFBIG, ENOSPC, EROFS, EDQUOT
NO_SPACE = "28"


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(step)), "step": torch.tensor(step)}


def work(report) -> None:
    """What train.py does with a run, without the training: begin or go on, and save three times."""
    if (run_module.RUNS / "it" / "config.json").exists():
        run = Run.resume("it")
    else:
        run = Run.create("it", {"steps": 3})
    done = int(run.newest().name[5:]) if run.checkpoints() else 0
    run.forget_after(done)
    with run.writing(run.folder / "config.json"):
        run.keep({"steps": 3})
    for step in range(done + 1, 4):
        run.log(f"step {step}")
        run.measure(step=step, loss=1 / step)
        run.save(step, tensors(step), {"m": tensors(step)["w"] / 2}, {"row": 7 * step})
        report(f"{step}")


def begin(place: Path, kind: str) -> None:
    """runs/it as one of STARTS."""
    if kind == "nothing":
        return place.mkdir()
    run_module.RUNS = place
    work(lambda _: None)
    run = Run(place / "it")
    if kind == "a damaged checkpoint":
        (run.newest() / "model.safetensors").write_bytes(b"")
    else:
        shutil.rmtree(run.newest())
        shutil.copytree(run.newest(), run.folder / "checkpoints" / ".step-000003.draft")
        run.measure(step=3, loss="of a step that was not saved")
        (run.folder / ".metrics.jsonl.draft").write_text("half")


def content(place: Path) -> dict[str, bytes]:
    """All files of a folder; which process wrote them, and what it said, aside."""
    files = (p for p in sorted(place.rglob("*")) if p.is_file())
    return {
        str(p.relative_to(place)): p.read_bytes()
        for p in files
        if p.name not in ("lock", "log.txt")
    }


def child(place: Path, at: int, kind: str) -> tuple[int, list[int], str]:
    """`work` in a process of its own, with a fault at call `at`: status, saved steps, words."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with open(read) as file:
            said = file.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        steps = [int(line) for line in said if line.isdigit()]
        return status, steps, "\n".join(said[len(steps) :])
    run_module.RUNS = place
    os.environ |= {"FAULT_UNDER": str(place), "FAULT_KIND": kind, "FAULT_AT": str(at)}
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    report = lambda text: os.write(write, f"{text}\n".encode())  # noqa: E731
    try:
        work(report)
        os._exit(0)
    except UserError as error:
        report(error)
        os._exit(2)
    except BaseException as error:
        report(repr(error))
        os._exit(1)


def try_call(origin: Path, start: str, at: int, kind: str, end: dict[str, bytes]) -> None:
    """With a fault at this call nothing is lost that was there, and the next process ends well."""
    place = origin.with_name("runs")
    shutil.rmtree(place)
    shutil.copytree(origin, place)
    run_module.RUNS, run = place, Run(place / "it")
    before = run.folder.exists() and run.checkpoints()
    status, saved, words = child(place, at, kind)
    if kind in ("kill", "half"):
        assert status == -signal.SIGKILL, (status, words)
    elif status:  # 0: all that was left to do was to delete
        assert status == 2 and "\n" not in words, words
        assert str(place) in words and os.strerror(int(kind)) in words, words
    if run.folder.exists():
        assert run.config() == {"steps": 3}
        if saved or before:
            newest = run.newest()
            step = read_json(newest / "train_state.json")["step"]
            assert newest.name == f"step-{step:06d}" and step >= max(saved, default=1)
            assert load_tensors(newest / "model.safetensors")["w"].tolist() == [step] * 300
    if kind == NO_SPACE and start == "nothing":
        assert not any("draft" in name for name in content(place))
    work(lambda _: None)
    left = content(place)
    assert {name: left.get(name) for name in end} == end
    old = "it/checkpoints/step-000001/"  # killed while it dropped this, after the last save
    assert all(name.startswith(old) for name in left.keys() - end.keys()), left.keys()


def try_calls(start: str, part: int) -> dict[str, int]:
    """Every `part`-th call that writes, with each kind of fault; how many were tried."""
    with TemporaryDirectory() as folder:
        origin, place = Path(folder, "origin"), Path(folder, "runs")
        begin(origin, start)
        shutil.copytree(origin, place)

        def survives(at: int) -> bool:
            status = child(place, at, "kill")[0]
            shutil.rmtree(place)
            shutil.copytree(origin, place)
            return status == 0

        calls = bisect_left(range(1, 4096), True, key=survives)
        run_module.RUNS = place
        work(lambda _: None)
        end = content(place)
        tried = Counter(calls=calls)
        for number, kind in enumerate(KINDS):
            for at in range(1 + number % part, calls + 1, part):
                try:
                    try_call(origin, start, at, kind, end)
                except Exception as error:
                    error.add_note(f"from {start}, {kind} at call {at} of {calls}")
                    raise
                tried[kind] += 1
        return dict(tried)


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = ROOT / "tests" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("part", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_at_any_writing_call_loses_nothing(faults, part):
    """Killed before a call or in its middle; a full, broken or read-only disk from a call on."""
    done = subprocess.run(
        [sys.executable, __file__, str(part)], text=True, capture_output=True, timeout=3600,
        env={**os.environ, "LD_PRELOAD": str(faults), "PYTHONPATH": str(ROOT),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]


# --- files that are damaged -----------------------------------------------------------------------

CHECKPOINT = ("model.safetensors", "train_state.safetensors", "train_state.json", "manifest.json")
NASTY = (
    "null", "true", "-1", "0", "7", "3.5", "1e999", "NaN", "[]", "{}", '""', '"3"', '"../../x"',
    '"\\ud800"', "9" * 30, "9" * 5000, "[" * 100_000 + "]" * 100_000, '"' + "x" * 100_000 + '"',
)  # fmt: skip
MEMORY, SECONDS = 1 << 30, 20  # more than a sound file needs, for one damaged one


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, the end cut off, bytes put in, taken out or set to zero."""
    at, size = sorted(rng.choices(range(len(data) + 1), k=2))
    match rng.randrange(5):
        case 0:
            data = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(data)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + rng.randbytes(rng.choice((1, 8, 1000))) + data[at:]
        case 3:
            return data[:at] + data[size:]
        case _:
            return data[:at] + bytes(size - at) + data[size:]


def swapped(text: str, rng: random.Random) -> str:
    """A JSON object with another value in one place, or a key lost, renamed, added or doubled."""
    whole = json.loads(text)
    place, key = whole, rng.choice(list(whole))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    value = rng.choice(NASTY)
    match rng.randrange(6):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[f"{key}s"] = place.pop(key)
        case 2 if isinstance(place, dict):
            return '{"' + str(key) + '": ' + value + "," + text.lstrip()[1:]
        case _:
            place[key] = "@@"
    return json.dumps(whole).replace('"@@"', value, 1)


def harm(folder: Path, rng: random.Random) -> str:
    """Damage one file of a run, perhaps one of each checkpoint; what was done."""
    name = rng.choice((*CHECKPOINT, "config.json", "tokenizer.json", "metrics.jsonl"))
    places = [folder]
    if name in CHECKPOINT:
        places = rng.choice((["step-000006"], ["step-000006"], ["step-000006", "step-000003"]))
        places = [folder / "checkpoints" / place for place in places]
    how = "bytes" if name.endswith(("safetensors", "jsonl")) else rng.choice(("bytes", "values"))
    for place in places:
        path, data = place / name, (place / name).read_bytes()
        new = damaged(data, rng) if how == "bytes" else swapped(data.decode(), rng).encode()
        path.write_bytes(new)
    if name == "config.json" and how == "values" and rng.random() < 0.5:  # a change by hand
        with suppress(ValueError, RecursionError):
            values = json.loads(path.read_bytes())
            values.pop("hash", None)
            path.write_text(json.dumps(values))
            how += ", no hash"
    if name in CHECKPOINT[:3] and rng.random() < 0.3:  # by someone who knows about hashes
        for place in places:
            hashes = {name: digest(place / name) for name in CHECKPOINT[:3]}
            (place / "manifest.json").write_text(json.dumps(hashes))
        how += ", new hashes"
    return f"{name}: {how}"


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def finished(texts) -> tuple[Run, Corpus]:
    """A small run of six steps, with checkpoints at three and six."""
    corpus = prepare(DataConfig("text"), TokenizerConfig("bytes"), cache=texts / "cache")
    model = ModelConfig(dim=16, heads=2, layers=1, context=16, vocab_size=257)
    config = Train(model=model, steps=6, batch=2, save_every=3, device="cpu", dtype="float32")
    run, training = Run.create("it", config), Training(config, corpus)
    corpus.tokenizer.save(run.folder / "tokenizer.json")
    loop(training, run, 1.0)
    return run, corpus


@pytest.mark.parametrize("files", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damage_is_passed_over_or_is_one_sentence(finished, capsys, files):
    """train.py --resume and generate.py take the newest whole one, within time and memory."""
    run, corpus = finished
    sound = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    steps = {int(p.name[5:]): [load_tensors(p / part) for part in CHECKPOINT[:2]]
             for p in run.checkpoints()}  # fmt: skip
    metrics, outcomes = run.folder / "metrics.jsonl", Counter()
    for number in range(files):
        for path, data in sound.items():
            if path.read_bytes() != data:
                path.write_bytes(data)
        done = harm(run.folder, random.Random(number))
        left = set(metrics.read_bytes().splitlines()) & set(sound[metrics].splitlines())
        for action in (resume, write):
            try:
                with limited(MEMORY, SECONDS):
                    step, *parts, mark = action(run, corpus)
            except UserError as error:
                assert "\n" not in str(error), (number, done, error)
                outcomes[f"{done}: refused"] += 1
                continue
            except BaseException as error:
                error.add_note(f"file {number}, {done}, {action.__name__}")
                raise
            outcomes[f"{done}: step {step}"] += 1
            assert mark == corpus.tokenizer.fingerprint
            if "hashes" not in done:
                assert all(map(same, parts, steps[step])), (number, done)
                assert step == 6 or done.startswith(CHECKPOINT), (number, done)
            if action is resume:
                rows = [row for row in map(json.loads, left) if row["step"] <= step]
                kept = run.metrics()
                assert all(row in kept for row in rows), (number, done)
        capsys.readouterr()
    with capsys.disabled():
        print(*(f"{n:6} {what}" for what, n in sorted(outcomes.items())), sep="\n")


def resume(run: Run, corpus: Corpus) -> tuple:
    """What train.py --resume starts from: step, weights, optimizer, tokenizer."""
    training = Training(complete(stored(run), corpus.tokenizer.vocab_size), corpus)
    training.load(run)
    parts = training.model.state_dict(), training.optimizer.tensors() | training.more()
    return training.step, *parts, corpus.tokenizer.fingerprint


def write(run: Run, corpus: Corpus) -> tuple:
    """The same of what generate.py writes with."""
    step = int(run.newest().name[5:])
    writer = load(run, torch.device("cpu"))
    return step, writer.model.state_dict(), writer.tokenizer.fingerprint


if __name__ == "__main__":
    for start_ in STARTS:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            tried_ = try_calls(start_, int(sys.argv[1]))
        print(start_, tried_, flush=True)
