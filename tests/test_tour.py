"""The tour ends, says what it has reached, and goes on from where it was stopped."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import tour
from data import sources_of
from train import parse

# Settings that make each stage tiny, added behind its own; the last of two flags holds.
LESSONS = "--asked 1 --steps 2 --batch 2 --lessons.count 60 --lessons.levels 1"
TINY = {
    "data.py": "--data.path book.txt --tokenizer.kind bytes",
    "train.py": (
        "--data.mix stories=world:60 facts=facts:60 --steps 2 --batch 2 --model.dim 32 "
        "--model.heads 2 --model.layers 1 --tokenizer.vocab-size 300"
    ),
    "align.py sft": LESSONS,
    "align.py reward": "--count 40 --epochs 1 --held 0.5 --levels 1",
    "align.py ppo": "--steps 1 --asked 1 --tokens 3 --levels 1",
    "quant.py save": "--calibration 1",
    "emergence.py thought": "--steps 2 --asked 1 --votes 1",
    "examine.py": "--count 1 --tokens 4",
    "generate.py": "--tokens 5",
}
# A `python` that adds them, and fails where it is told to.
SHIM = """#!{python}
import os, sys
words = sys.argv[1:]
script = os.path.basename(words[0])
name = " ".join([script, *words[1:2]])
if os.environ.get("FAIL", "-") in (script, name):
    sys.exit("error: the disk is full")
if script == "tour.py":
    more = ""
else:
    more = {tiny}.get(name, {tiny}.get(script, ""))
os.execv("{python}", ["{python}", *words, *more.split()])
"""


def go(folder, *arguments, fail="-"):
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "tour.sh"), *arguments], cwd=folder, text=True, capture_output=True,
        env={**os.environ, "PATH": path, "FAIL": fail, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_tour_goes_on_where_it_was_stopped_and_ends_with_its_page(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(SHIM.format(python=sys.executable, tiny=repr(TINY)))
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "book.txt").write_text((ROOT / "README.md").read_text())
    stopped = go(tmp_path, fail="align.py sft")
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert 'ends at the stage "sft"' in stopped.stderr and "disk is full" in stopped.stdout
    assert not (tmp_path / "runs/tour/reward.txt").exists()
    (tmp_path / "runs/tour/base.json").unlink()  # as if it had been stopped in there
    made = go(tmp_path)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr
    done = [line for line in made.stdout.splitlines() if line.endswith(": done")]
    assert done == ["== text: done"]
    page = (tmp_path / "runs/tour/report.md").read_text()
    for name, stage in tour.STAGES.items():
        kept = json.loads((tmp_path / f"runs/tour/{name}.json").read_text())
        assert f"| {name} | {stage.form.format(kept['number'])} |" in page
        assert f"-- {name}: " in made.stdout + stopped.stdout
    pictures = re.findall(r"\]\((.*?)\)", page)
    assert len(pictures) == sum(bool(stage.picture) for stage in tour.STAGES.values())
    assert all((tmp_path / "runs/tour" / name).is_file() for name in pictures)
    assert "> What is 27 plus 58?" in page and "> you  " in page and "9 of 9 stages" in page


def test_the_base_s_own_settings_can_be():
    """Those that the test above replaces."""
    line = (ROOT / "tour.sh").read_text().split("stage base train.py ")[1].split("\n\n")[0]
    words = shlex.split(line.replace("\\\n", "").replace("$it", "tour").replace("$seed", "0"))
    config, *_ = parse(words)
    names = [source.name for source in sources_of(config.data)]
    assert names == ["prose", "stories", "facts", "quiz"] and config.steps == 400


def test_a_number_outside_its_range_is_told():
    stage = tour.STAGES["sft"]
    assert "NOT" in tour.line(stage, {"number": 0.1, "seconds": 3})
    assert "NOT" not in tour.line(stage, {"number": stage.low, "seconds": 3})


@pytest.mark.parametrize("words, said", [
    (["tour.sh", "x"], "must be a whole number"), (["tour.py", "lunch"], "is none of text, base"),
    (["tour.py"], "no stage of runs/tour is done"),
])  # fmt: skip
def test_bad_input_gets_one_sentence(tmp_path, words, said):
    kind = "bash" if words[0].endswith(".sh") else sys.executable
    done = subprocess.run(
        [kind, str(ROOT / words[0]), *words[1:]], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
