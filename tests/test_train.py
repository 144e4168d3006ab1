"""Laws of train.py: resuming, interrupting, settings, and what bad input gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from model import PRESETS
from run import Run, load_tensors
from train import Train, parse

TINY = [
    *("--model.dim", "16", "--model.heads", "2", "--model.layers", "1", "--model.context", "16"),
    *("--tokenizer.kind", "bytes", "--data.path", "text", "--batch", "2"),
    *("--evaluate-every", "4", "--save-every", "3", "--device", "cpu", "--dtype", "float32"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a little text in it."""
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i:02}.txt").write_text(
            f"Document {i}: " + "so on and so forth. " * (i % 5 + 1)
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(script, *arguments, cwd="."):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(script, *arguments, cwd="."):
    process = start(script, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def end_of(name):
    """What a run ended with: weights, optimizer and place, metrics without their times."""
    this = Run.open(name)
    newest = this.newest()
    tensors = {
        part: load_tensors(newest / f"{part}.safetensors") for part in ("model", "train_state")
    }
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in this.metrics()]
    return newest.name, tensors, json.loads((newest / "train_state.json").read_text()), metrics


def assert_same_end(one, two):
    assert one[0] == two[0] and one[2:] == two[2:]
    for part, tensors in one[1].items():
        assert tensors.keys() == two[1][part].keys()
        for name, x in tensors.items():
            assert torch.equal(x, two[1][part][name]), name


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(folder, optimizer):
    """2N steps = N steps, then --resume to 2N: weights, optimizer, place in the data, metrics."""
    flags = [
        *TINY,
        "--optim.name",
        optimizer,
        "--optim.schedule",
        "constant",
        "--optim.warmup",
        "0",
    ]
    assert run("train.py", *flags, "--name", "one", "--steps", "10")[0] == 0
    assert run("train.py", *flags, "--name", "two", "--steps", "5")[0] == 0
    code, out, err = run("train.py", "--name", "two", "--resume", "--steps", "10")
    assert code == 0, err
    assert "resumed  after step 5" in out
    one, two = end_of("one"), end_of("two")
    # step 5 was the last of its run, so it was measured on held-out text there, and only there
    measured = [
        [{**row, "bits_per_byte": None} if row["step"] == 5 else row for row in m]
        for m in (one[3], two[3])
    ]
    assert measured[0] == measured[1]
    assert_same_end(one[:3], two[:3])


def test_the_same_command_gives_the_same_bits(folder):
    for name in ("one", "two"):
        assert run("train.py", *TINY, "--name", name, "--steps", "4")[0] == 0
    assert_same_end(end_of("one"), end_of("two"))


def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    flags = [*TINY, "--steps", "400", "--save-every", "1000", "--evaluate-every", "100"]
    assert run("train.py", *flags, "--name", "one")[0] == 0
    process = start("train.py", *flags, "--name", "two")
    metrics = Path("runs/two/metrics.jsonl")
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 20):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "python train.py --name two --resume" in out
    assert Run.open("two").newest().name != "step-000400"
    assert run("train.py", "--name", "two", "--resume")[0] == 0
    assert_same_end(end_of("one"), end_of("two"))


def test_a_run_killed_before_its_first_checkpoint_starts_anew(folder):
    flags = [*TINY, "--steps", "6"]
    assert run("train.py", *flags, "--name", "one")[0] == 0
    assert run("train.py", *flags, "--name", "two")[0] == 0
    shutil.rmtree("runs/two/checkpoints")
    with open("runs/two/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # the line at which it was killed
    code, _, err = run("train.py", "--name", "two", "--resume")
    assert code == 0, err
    assert_same_end(end_of("one"), end_of("two"))


def test_a_run_leaves_everything_behind_that_it_was(folder):
    code, out, err = run("train.py", *TINY, "--steps", "5")
    assert code == 0, err
    assert "bits per byte" in out and "--- sample 3 ---" in out
    left = Path("runs/run-001")
    assert {p.name for p in left.iterdir()} == {
        "config.json", "metrics.jsonl", "log.txt", "tokenizer.json", "checkpoints", "loss.png"
    }  # fmt: skip
    assert json.loads((left / "config.json").read_text())["dtype"] == "float32"
    assert (left / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[0].startswith("python train.py --model.dim 16")
    assert [p.name for p in Run.open("").checkpoints()] == ["step-000005", "step-000003"]
    code, out, _ = run(
        "generate.py", "--prompt", "Document", "--tokens", "5", "--samples", "2", "--device", "cpu"
    )
    assert code == 0 and out.count("Document") == 2


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_a_preset_is_changed_by_other_flags_in_either_order(order):
    flags = [["--model.preset", "gpt2"], ["--model.layers", "3"]][::order]
    config, _ = parse([*flags[0], *flags[1]])
    assert config.model.layers == 3 and config.model.dim == 768
    assert config.model.position == "learned"


def test_every_preset_can_be_named():
    for name, model in PRESETS.items():
        assert parse(["--model.preset", name])[0].model == model
        assert parse([f"--model.preset={name}"])[0].model == model
    assert parse([])[0] == Train()


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "an unknown flag": (["--optim.lrr", "1"], "--optim.lr"),
    "heads that do not divide": (["--model.dim", "30", "--model.heads", "4"], "not divisible"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "an empty file": (["--data.path", "empty.txt"], "there is no text in empty.txt"),
    "a binary file": (["--data.path", "binary.txt"], "is binary"),
    "an undecodable file": (["--data.path", "latin.txt"], "not UTF-8"),
    "a missing file": (["--data.path", "nowhere.txt"], "nowhere.txt"),
    "a corpus shorter than a window": (["--data.path", "short.txt"], "less than one window"),
    "a folder that is no run": (["--resume", "--name", "text"], "not a run"),
    "a run that is not there": (["--resume", "--name", "nobody"], "there is no run named 'nobody'"),
    "no run at all": (["--resume"], "there is no run"),
    "a device that is not there": (["--device", "tpu"], "--device tpu"),
    "a vocabulary without the bytes": (["--tokenizer.vocab-size", "100"], "257"),
    "a model smaller than the vocabulary": (["--model.vocab-size", "10"], "--model.vocab-size 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(folder, case):
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "short.txt").write_text("too short")
    before = files(folder)
    flags, named = BAD[case]
    code, out, err = run("train.py", *TINY, *flags)
    assert code == 2, (out, err)
    assert named in out + err and "Traceback" not in err
    if not err.startswith("╭"):  # tyro's own boxes
        assert len(err.strip().splitlines()) == 1
    left = [name for name in files(folder) if name not in before]
    assert not any("draft" in name for name in left)
    assert all(name.startswith("runs/cache") for name in left if name != "runs")  # tokens, whole


def test_a_taken_name_is_refused_and_the_old_run_kept(folder):
    assert run("train.py", *TINY, "--steps", "1", "--name", "mine")[0] == 0
    before = end_of("mine")
    code, _, err = run("train.py", *TINY, "--steps", "2", "--name", "mine")
    assert code == 2 and "runs/mine exists already" in err
    assert_same_end(before, end_of("mine"))
    code, _, err = run("train.py", "--resume", "--name", "mine", "--model.layers", "2")
    assert code == 2 and "cannot go on with another model" in err
    code, _, err = run("train.py", "--resume", "--steps", "0")
    assert code == 2 and "--steps must be at least 1" in err
    code, _, err = run("generate.py", "--run", "mine", "--prompt", "x" * 50)
    assert code == 2 and "more than the model's context of 16" in err
    code, _, err = run("generate.py", "--run", "mine", "--prompt", b"\xff")
    assert code == 2 and "--prompt is not text" in err
    code, _, err = run("generate.py", "--run", "text")
    assert code == 2 and "not a run" in err


def test_a_run_does_not_go_on_with_another_text(folder):
    assert run("train.py", *TINY, "--steps", "2", "--name", "mine")[0] == 0
    code, _, err = run("train.py", "--name", "mine", "--resume", "--steps", "1")
    assert code == 2 and "runs/mine has done 2 steps already" in err
    with open("text/00.txt", "a") as file:
        file.write("One more sentence.")
    code, _, err = run("train.py", "--name", "mine", "--resume", "--steps", "4")
    assert code == 2 and "the text is not the one that runs/mine was trained on" in err


def test_a_damaged_config_is_refused(folder):
    assert run("train.py", *TINY, "--steps", "1", "--name", "mine")[0] == 0
    path = Path("runs/mine/config.json")
    path.write_text(path.read_text()[:50])
    for script, flags in (("train.py", ["--resume"]), ("generate.py", ["--samples", "1"])):
        code, _, err = run(script, *flags)
        assert code == 2 and "cannot read runs/mine/config.json" in err


def test_a_diverged_run_stops_with_a_sentence(folder):
    code, _, err = run(
        "train.py", *TINY, "--steps", "60", "--optim.lr", "1e30", "--optim.warmup", "0"
    )
    assert code == 2 and "has diverged; lower --optim.lr" in err


def test_the_settings_of_every_part_have_one_default():
    config = Train()
    parts = (config.model, config.data, config.tokenizer, config.optim)
    assert all(part == type(part)() for part in parts)


@pytest.mark.slow
def test_generating_without_a_run_trains_a_small_model_first(folder):
    code, out, err = run("generate.py", "--tokens", "5")
    assert code == 0, err
    assert "there is no run yet" in out and out.count("--- 3 ---") == 1
