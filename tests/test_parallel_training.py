"""Laws of train.py under a plan: the same run, saved and taken up under any other plan."""

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from test_train import write_texts

import parallel_training
import train
from instruct import Lessons, lessons, write
from lora import Adapter
from mesh import Group, Mesh, Plan
from model import ModelConfig
from parallel import Part, check
from parallel_training import (
    ParallelTraining,
    after_restart,
    agree,
    check_copies,
    check_fits,
)
from plan import Plan as AutomaticPlan
from quant import Save, save
from run import RUNS, Run, UserError, load_tensors
from training import Train, least_bytes

TINY = [
    *("--model.dim", "16", "--model.heads", "8", "--model.layers", "3", "--model.context", "16"),
    *("--tokenizer.kind", "bytes", "--data.path", "text", "--batch", "8", "--save-every", "3"),
    *("--evaluate-every", "6", "--device", "cpu", "--dtype", "float32", "--model.dropout", "0.1"),
]


MODEL = ModelConfig(dim=16, heads=8, layers=3, context=16, vocab_size=97)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(plan: Plan) -> list[str]:
    exact = ["--plan.exact"] if plan.exact else []
    names = ("data", "pipeline", "tensor", "zero")
    return [w for n in names for w in (f"--plan.{n}", str(getattr(plan, n)))] + exact


def trained(folder: Path, plan: Plan, arguments: list[str]) -> str:
    """What train.py says to the user on each rank that the plan has, if it is a UserError."""
    os.chdir(folder)
    world = Group(range(plan.size), "world", Counter())
    if world.index < 0:  # these only help to make the groups
        Mesh(plan.data, plan.pipeline, plan.tensor, plan.exact)
        return ""
    try:
        train.begin_or_go_on([*TINY, *flags(plan), *arguments], world)
    except UserError as error:
        return str(error)
    finally:
        torch.use_deterministic_algorithms(False)
    return ""


def short(plan: Plan) -> str:
    return f"{plan.data}-{plan.pipeline}-{plan.tensor}"


def go(ranks, folder, plan: Plan, *arguments: str) -> None:
    said = ranks.run(trained, folder, plan, list(arguments), timeout=120)
    assert not any(said), said


def ended(name: str, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    place = RUNS / name / "checkpoints" / f"step-{step:06d}"
    return load_tensors(place / "model.safetensors") | load_tensors(
        place / "train_state.safetensors"
    )


def losses(name: str) -> list[float]:
    return [row["loss"] for row in Run.open(name).metrics()]


PLANS = [
    Plan(), Plan(data=2), Plan(tensor=2), Plan(pipeline=2), Plan(2, 2, 2), Plan(data=8),
    Plan(tensor=8), Plan(1, 3, 2), Plan(4, 1, 2, zero=1),
]  # fmt: skip


@pytest.mark.parametrize("plan, more", [
    (Plan(2, 2, 2), []),
    (Plan(2, 2, 2), ["--recompute", "blocks"]),
    (Plan(1, 1, 8), ["--recompute", "attention"]),
    (Plan(1, 3, 2), ["--model.arch", "encoder", "--objective", "masked"]),
    (Plan(2, 1, 4), ["--model.arch", "encdec", "--objective", "spans"]),
    (Plan(2, 2, 2), ["--dtype", "bfloat16"]),
    (Plan(2, 1, 2), ["--model.attention", "performer"]),
    (Plan(2, 1, 4, zero=3), ["--optim.name", "muon"]),
    (Plan(4, 1, 2, zero=2), ["--optim.name", "adafactor", "--recompute", "blocks"]),
    (Plan(2, 2, 2, zero=1), ["--optim.name", "muon"]),
], ids=str)  # fmt: skip
def test_a_run_under_a_plan_is_the_plain_run(ranks, folder, plan, more):
    """The same losses, checkpoints by the same names and shapes, and one set of files.

    Muon for fewer steps: it makes a gradient's smallest directions, which are rounding, as large
    as the others, and the next gradients hang on them. AdamW does so to a Performer's keys.
    """
    steps = 2 if {"muon", "performer"} & set(more) else 6
    arguments = ["--steps", str(steps), *ADAMW, *more]
    train.begin_or_go_on([*TINY, "--name", "plain", *arguments], Group([0], "", Counter()))
    go(ranks, folder, plan, "--name", "many", *arguments)
    close = 2e-3 if "bfloat16" in more else 1e-5
    assert losses("many") == pytest.approx(losses("plain"), rel=close)
    held = [[r["held_out_loss"] for r in Run.open(n).metrics()[-1:]] for n in ("plain", "many")]
    assert held[0] == pytest.approx(held[1], rel=close)
    plain, many = ended("plain", steps), ended("many", steps)
    assert plain.keys() == many.keys()
    for name, x in plain.items():
        assert many[name].dtype == x.dtype
        assert many[name].shape == x.shape
        if (
            close == 1e-5 and name != "past"
        ):  # in fp32; tests/test_zero.py and test_parallel.py are strict
            assert (many[name] - x).abs().max() <= 5e-3 * x.abs().max(), name


def test_tuning_under_a_plan_is_the_plain_tuning(ranks, folder):
    alone = Group([0], "", Counter())
    train.begin_or_go_on([*TINY, "--name", "base", "--steps", "3"], alone)
    write(list(lessons(Lessons(("copy",), (1,), 60, turns=1))), Path("talk.jsonl"))
    tune = ["--base", "base", "--objective", "chat", "--data.form", "chat", "--data.path",
            "talk.jsonl", "--steps", "4", *ADAMW]  # fmt: skip
    train.begin_or_go_on([*TINY, "--name", "plain", *tune], alone)
    go(ranks, folder, Plan(2, 2, 2), "--name", "many", *tune)
    assert losses("many") == pytest.approx(losses("plain"), rel=1e-5)


def test_a_quantized_base_is_for_one_process(ranks, folder):
    alone = Group([0], "", Counter())
    train.begin_or_go_on([*TINY, "--name", "base", "--steps", "1"], alone)
    save(Save(run="base", device="cpu", method="rtn", group=0, name="small"))
    tune = ["--base", "small", "--adapter.kind", "lora", "--name", "many"]
    said = ranks.run(trained, folder, Plan(2), tune, timeout=120)
    assert all("the base small is quantized" in words for words in said[:2]), said
    assert not (RUNS / "many").exists()


ADAMW = ["--optim.name", "adamw", "--optim.schedule", "constant", "--optim.warmup", "0"]
PAIRS = [pair for i, pair in enumerate(permutations(PLANS, 2)) if i % 9 < 5]  # 40


@pytest.mark.parametrize(
    "first, then", [pytest.param(a, b, marks=[] if i in (9, 20) else pytest.mark.slow)
                    for i, (a, b) in enumerate(PAIRS)], ids=short)  # fmt: skip
def test_saved_under_one_plan_resumed_under_another(ranks, folder, first, then):
    """In exact mode all bits are those of a run that one process makes to its end."""
    exact = ["--plan.exact", *ADAMW]
    train.begin_or_go_on(
        [*TINY, "--steps", "6", "--name", "plain", *exact], Group([0], "", Counter())
    )
    torch.use_deterministic_algorithms(False)
    go(ranks, folder, first, "--steps", "3", "--name", "many", *exact)
    go(ranks, folder, then, "--steps", "6", "--name", "many", "--resume", *exact)
    plain, many = ended("plain", 6), ended("many", 6)
    assert plain.keys() == many.keys()
    assert [n for n, x in plain.items() if not torch.equal(x, many[n])] == []


# --- what goes wrong ------------------------------------------------------------------------------


def one_bit_off(plan: Plan, rank: int, name: str) -> str:
    """What check_copies says when one rank has one other bit in its first weight of this name."""
    mesh = Mesh(plan.data, plan.pipeline, plan.tensor)
    part = Part(MODEL, plan, mesh)
    part.initialize(0)
    p = next((p for p in part.parameters() if p.place.name == name), None)
    if dist.get_rank() == rank:
        p.data.view(torch.int32).view(-1)[0] ^= 1
    try:
        check_copies(part)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("plan, rank, name, said", [
    (Plan(2, 2, 2), -1, "", ""), (Plan(8, 1, 1), -1, "", ""),
    (Plan(2, 2, 2), 5, "layers.0.attention.query.weight", r"\[1, 5\].*query"),
    (Plan(1, 2, 4), 6, "norm.weight", r"\[4, 5, 6, 7\].*norm"),
    (Plan(1, 8, 1), 7, "embedding", r"\[0, 7\].*embedding"),
])  # fmt: skip
def test_copies_that_differ_in_a_bit_are_found_by_all(ranks, plan, rank, name, said):
    found = ranks.run(one_bit_off, plan, rank, name)
    assert len(set(found)) == 1
    assert re.search(said, found[0]) if said else not found[0]


class Pair:
    """Two ranks as one of them sees them. What is sent is a copy of what was, as on a GPU."""

    size, device = 2, torch.float64

    def __init__(self, index: int, failing: set[int]):
        self.index, self.failing = index, failing

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        x[1 - self.index] += 1 - self.index in self.failing
        return x

    def tell(self, text: str, source: int) -> str:
        return f"rank {source} fails"


@pytest.mark.parametrize("failing", [set(), {0}, {1}, {0, 1}])
def test_all_agree_on_who_has_failed(failing):
    """The first that has, though another one's own copy of the answers says nothing of it."""
    for index in range(2):

        def function(index=index) -> str:
            if index in failing:
                raise UserError("as each says")
            return "fine"

        if not failing:
            assert agree(Pair(index, failing), function) == "fine"
            continue
        with pytest.raises(UserError, match=f"rank {min(failing)} fails"):
            agree(Pair(index, failing), function)


def other_settings(folder: Path) -> str:
    os.environ["RANK"] = str(dist.get_rank())
    seed = "5" if dist.get_rank() == 3 else "0"
    return trained(folder, Plan(data=8), ["--steps", "3", "--name", "other", "--seed", seed])


def test_ranks_with_other_settings_are_found_at_the_start(ranks, folder):
    found = set(ranks.run(other_settings, folder, timeout=60))
    assert found == {
        "rank 3 has other settings or files than the first: seed 5, not 0; start all with the same"
    }
    assert not (RUNS / "other").exists()


@pytest.mark.parametrize("arguments, said", [
    (["--plan.tensor", "3"], "torchrun --nproc-per-node 3"),
    (["--watch-every", "2", "--plan.exact"], "for one process"),
])  # fmt: skip
def test_what_one_process_cannot_do_is_told(folder, arguments, said):
    with pytest.raises(UserError, match=said):
        train.begin_or_go_on([*TINY, *arguments], Group([0], "", Counter()))


@pytest.mark.parametrize("memory, said", [
    (1e9, None), (90e6, "--plan.data 2 --plan.pipeline 1 --plan.tensor 1 --plan.zero 1"),
    (60e6, "--plan.data 2 --plan.pipeline 1 --plan.tensor 1 --plan.zero 3"), (45e6, "none for"),
])  # fmt: skip
@pytest.mark.parametrize("here", [1, 2])
def test_a_plan_that_does_not_fit_is_told_with_the_nearest_that_does(
    monkeypatch, memory, said, here
):
    """On a machine whose processors share the memory, each of its processes has a part."""
    model = ModelConfig(dim=256, heads=8, layers=8, context=16, vocab_size=257)
    config = Train(model=model, plan=Plan(data=2), batch=2, device="cpu")
    monkeypatch.setattr(parallel_training, "device_memory", lambda device: here * memory)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    if said is None:
        return check_fits(config, torch.device("cpu"))
    with pytest.raises(UserError, match=said):
        check_fits(config, torch.device("cpu"))


@pytest.mark.parametrize("how, recompute", [
    (Adapter("prompt"), "none"), (Adapter("lora", dropout=0.1), "blocks"),
])  # fmt: skip
def test_what_is_recommended_can_be(monkeypatch, how, recompute):
    """With the adapter and all else that the run has."""
    model = ModelConfig(dim=256, heads=8, layers=8, context=16, vocab_size=257)
    config = Train(model=model, plan=Plan(4), batch=4, device="cpu", adapter=how, base="base",
                   recompute=recompute)  # fmt: skip
    need = least_bytes(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        monkeypatch.setattr(parallel_training, "device_memory", lambda _, n=share * need: n)
        with pytest.raises(UserError) as error:
            check_fits(config, torch.device("cpu"))
        if found := re.findall(r"--plan\.(\w+) (\d+)", str(error.value)):
            plan = Plan(**{name: int(n) for name, n in found})
            check(replace(config, plan=plan).model, plan, how)
        else:
            assert "none for as many processes does" in str(error.value)


def test_only_the_first_rank_builds_the_whole_model():
    it = SimpleNamespace(skeleton=lambda: (torch.nn.Linear(1, 1), {}), whole=lambda *_: {})
    assert ParallelTraining.whole_model(it) is None


def test_a_plan_s_file_is_taken_and_changed_by_other_flags(folder):
    AutomaticPlan(2, 1, 4, zero=1, rows=2, layers=(3,), recompute="blocks").save(Path("plan.json"))
    config, *_ = train.parse([*TINY, "--plan.file", "plan.json", "--plan.zero", "3"])
    assert config.plan == Plan(2, 1, 4, zero=3, rows=2, layers=(3,), file="plan.json")
    assert config.recompute == "blocks"
    with pytest.raises(UserError, match=r"other\.json"):
        train.parse(["--plan.file", "other.json"])


def test_a_restart_goes_on_with_the_run_of_its_name(folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="--name"):
        after_restart([])
    assert after_restart(["--name", "a"]) == ["--name", "a"]
    Run.create("a", {})
    assert after_restart(["--name", "a"]) == ["--name", "a", "--resume"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert after_restart(["--name", "a"]) == ["--name", "a"]


STEPS, SIZE = 60, 4
HARM = ["SIGKILL", "SIGSTOP", "SIGINT"]  # two of the last are an exception wherever it is just then


def launched(folder: Path, name: str) -> subprocess.Popen:
    """A run under torchrun, of four processes that find each other silent after some seconds."""
    arguments = [
        *TINY, *flags(Plan(2, 1, 2, exact=True)), *ADAMW, "--plan.timeout", "6",
        "--steps", str(STEPS), "--name", name,
    ]  # fmt: skip
    start = ["torchrun", "--nproc-per-node", str(SIZE), "--max-restarts", "3"]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [*start, "--monitor-interval", "0.2", ROOT / "train.py", *arguments],
            cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def lines(folder: Path, name: str) -> int:
    path = folder / "runs" / name / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def harmed(folder: Path, name: str, draw: random.Random) -> tuple[str, float]:
    """Do harm to a process of a run at a random moment; what, and the seconds until it goes on."""
    process = launched(folder, name)
    while lines(folder, name) < 1 + draw.randrange(STEPS - 10) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(draw.random() / 10)
    victim, what, done = draw.choice(children(process)), draw.choice(HARM), lines(folder, name)
    for _ in range(1 + (what == "SIGINT")):
        os.kill(victim, getattr(signal, what))
        time.sleep(0.001)
    start, again = time.monotonic(), 0.0
    while process.poll() is None:
        time.sleep(0.02)
        workers = children(process)
        if not again and workers and victim not in workers and lines(folder, name) != done:
            again = time.monotonic() - start
        assert time.monotonic() < start + 200, (what, (folder / f"{name}.log").read_text()[-2000:])
    assert process.returncode == 0, (what, (folder / f"{name}.log").read_text()[-3000:])
    return what, again


def assert_ends_in_the_same_bits(folder: Path, count: int, seed: int) -> None:
    assert launched(folder, "whole").wait() == 0
    whole = ended("whole", STEPS)
    for n in range(count):
        what, again = harmed(folder, f"run{n}", random.Random(seed + n))
        print(f"{what:8} goes on after {again:.1f} s", flush=True)
        found = ended(f"run{n}", STEPS)
        assert [name for name, x in whole.items() if not torch.equal(x, found[name])] == []


@pytest.mark.slow
def test_harmed_runs_end_in_the_same_bits(folder, capsys):
    with capsys.disabled():
        assert_ends_in_the_same_bits(folder, 50, 0)
