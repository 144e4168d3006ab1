"""Laws of train.py under a plan: the same run, saved and taken up under any other plan."""

import os
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from test_train import write_texts

import train
from mesh import Group, Mesh, Plan
from run import RUNS, Run, UserError, load_tensors

TINY = [
    *("--model.dim", "16", "--model.heads", "8", "--model.layers", "3", "--model.context", "16"),
    *("--tokenizer.kind", "bytes", "--data.path", "text", "--batch", "8", "--save-every", "3"),
    *("--evaluate-every", "6", "--device", "cpu", "--dtype", "float32", "--model.dropout", "0.1"),
]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(8)
    yield ranks
    ranks.close()


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
    Plan(tensor=8), Plan(1, 3, 2), Plan(4, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("plan", [Plan(2, 2, 2), Plan(1, 3, 2)], ids=short)
def test_a_run_under_a_plan_is_the_plain_run(ranks, folder, plan):
    """The same losses, checkpoints by the same names and shapes, and one set of files."""
    train.begin_or_go_on(
        [*TINY, "--steps", "6", "--name", "plain", *ADAMW], Group([0], "", Counter())
    )
    go(ranks, folder, plan, "--steps", "6", "--name", "many", *ADAMW)
    assert losses("many") == pytest.approx(losses("plain"), rel=1e-5)
    held = [[r["held_out_loss"] for r in Run.open(n).metrics()[-1:]] for n in ("plain", "many")]
    assert held[0] == pytest.approx(held[1], rel=1e-5)
    plain, many = ended("plain", 6), ended("many", 6)
    assert plain.keys() == many.keys()
    for name, x in plain.items():
        assert many[name].dtype == x.dtype
        assert torch.allclose(many[name], x, rtol=1e-4, atol=1e-6), name


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
