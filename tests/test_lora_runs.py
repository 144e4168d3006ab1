"""Runs that train an adapter beside a base: small files, resumed, improved, refused on another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_align import TINY, folder, made, tune  # noqa: F401
from test_train import end_of, run

import tuning
import writer
from examine import Result
from lora import NONE, adapted, plain
from optim import learnt
from peft_files import load_adapter
from run import RUNS, Run

LORA = ["--adapter.kind", "lora", "--adapter.rank", "2", "--adapter.dropout", "0.1"]
IMPROVE = ["--tasks", "copy", "--levels", "1", "--steps", "2", "--asked", "2", "--tokens", "3",
           "--questions", "2", "--each", "2", "--save-every", "1", "--device", "cpu"]  # fmt: skip


def loaded(name: str) -> writer.Writer:
    return writer.load(Run.open(name), torch.device("cpu"))


def said(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(torch.arange(12)[None]))


def test_a_run_keeps_its_adapter_alone_and_goes_on_with_it(folder):  # noqa: F811
    status, out, err = tune("--name", "whole", "--steps", "6", *LORA)
    assert status == 0, err
    assert "lora of rank 2 on query value: 256 are trained" in out
    assert tune("--name", "part", "--steps", "6", *LORA)[0] == 0
    shutil.rmtree(RUNS / "part" / "checkpoints" / "step-000006")
    status, _, err = run("train.py", "--resume", "--name", "part")
    assert status == 0, err
    kept, again = (end_of(n)[1]["model"] for n in ("whole", "part"))
    assert kept.keys() == again.keys() and all(torch.equal(x, again[n]) for n, x in kept.items())
    assert all(n.endswith((".A", ".B")) for n in kept) and len(kept) == 8
    assert all(x.abs().sum() > 0 for x in kept.values())
    mine, base = loaded("whole"), writer.base_of("base")
    assert len(adapted(mine.model)) == 4 and set(learnt(mine.model)) == set(kept)
    known = {n: p for n, p in mine.model.named_parameters() if n not in kept}
    for name, x in base.model.state_dict().items():
        own = known.get(name, known.get(name.replace(".weight", ".base.weight")))
        assert torch.equal(own[: len(x)], x), name
    assert not torch.allclose(said(mine.model)[..., :250], said(base.model)[..., :250])


ROWS = {
    "prefix": ["--adapter.kind", "prefix", "--adapter.tokens", "3", "--adapter.hidden", "4"],
    "prompt": ["--adapter.kind", "prompt", "--adapter.tokens", "3", "--adapter.start", "text",
               "--adapter.text", "Why is it so?"],
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_so_does_one_with_a_prefix_or_a_prompt(folder, kind):  # noqa: F811
    status, out, err = tune("--name", "whole", "--steps", "6", *ROWS[kind])
    assert status == 0, err
    assert f"{kind} of 3: " in out
    assert tune("--name", "part", "--steps", "6", *ROWS[kind])[0] == 0
    shutil.rmtree(RUNS / "part" / "checkpoints" / "step-000006")
    status, _, err = run("train.py", "--resume", "--name", "part")
    assert status == 0, err
    kept, again = (end_of(n)[1]["model"] for n in ("whole", "part"))
    assert kept.keys() == again.keys() and all(torch.equal(x, again[n]) for n, x in kept.items())
    assert all("prefix." in n or "before." in n for n in kept) and kept
    assert run("generate.py", "--run", "whole", "--tokens", "5")[0] == 0
    command = ["align.py", "ppo", "--run", "whole", "--name", "better", *IMPROVE]
    status, _, err = run(*command)
    assert status == 0, err
    better = end_of("better")[1]["model"]
    assert better.keys() == kept.keys()
    assert not all(torch.equal(x, kept[n]) for n, x in better.items())
    status, _, err = run("writer.py", "--run", "whole", "--out", "merged")
    assert status == 2 and "cannot become part of the weights" in err
    assert run("writer.py", "--run", "whole", "--adapter", "--out", "folder")[0] == 0
    assert run("writer.py", "--run", "base", "--out", "their base")[0] == 0


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_learned_positions_must_have_room_for_it(folder, kind):  # noqa: F811
    """A row of text fills the context, and stands behind the tokens of a prefix or a prompt."""
    shape = ["--model.position", "learned", "--model.context", "32", "--model.dim", "16",
             "--model.heads", "2", "--model.layers", "1"]  # fmt: skip
    base = ["--data.mix", "stories=world:60", "--tokenizer.kind", "bytes", "--steps", "1"]
    assert run("train.py", *TINY, *base, *shape, "--name", "learned")[0] == 0
    how = ["--base", "learned", "--name", "mine", "--steps", "1"]
    for more in ([], ["--dry-run"]):
        status, _, err = tune(*how, *ROWS[kind], *more)
        assert status == 2 and err.count("\n") == 1, err
        assert "32 tokens and 3 before them are more than the 32 learned positions" in err
        assert "--adapter.kind lora" in err and not (RUNS / "mine").exists()
    assert tune("--base", "learned", "--name", "mine", "--steps", "1", *LORA)[0] == 0


def test_an_adapter_s_folder_goes_beside_its_base(folder):  # noqa: F811
    assert tune("--name", "mine", "--steps", "3", *LORA)[0] == 0
    assert run("writer.py", "--run", "mine", "--adapter", "--out", "folder")[0] == 0
    mine = loaded("mine").model
    with torch.device("cpu"):
        model = writer.first_model(mine.config, "base", NONE, 0)
    load_adapter(model, Path("folder"))
    assert torch.allclose(said(model), said(mine), atol=1e-6)
    status, _, err = run("generate.py", "--run", "base", "--adapter", "folder", "--tokens", "5")
    assert status in (0, 2) and ("other weights" in err) == bool(status)
    status, _, err = run("generate.py", "--run", "base", "--adapter", "nowhere")
    assert status == 2 and err.count("\n") == 1


def test_an_adapter_is_refused_on_another_base(folder):  # noqa: F811
    assert tune("--name", "mine", "--steps", "2", *LORA)[0] == 0
    here = next((RUNS / "base" / "checkpoints").glob("step-000004"))
    assert run("train.py", "--resume", "--name", "base", "--steps", "5")[0] == 0
    assert here.parent.exists()
    for command in (["generate.py", "--run", "mine"], ["train.py", "--resume", "--name", "mine"]):
        status, _, err = run(*command)
        assert status == 2 and err.count("\n") == 1 and "put that back" in err


def test_an_adapter_wants_a_base(folder):  # noqa: F811
    status, _, err = run("train.py", *LORA, *TINY)
    assert status == 2 and "needs a --base" in err


def test_a_run_with_an_adapter_is_a_base_and_an_export(folder):  # noqa: F811
    assert tune("--name", "mine", "--steps", "3", *LORA)[0] == 0
    assert run("writer.py", "--run", "mine", "--out", "folder")[0] == 0
    told = writer.load_folder(Path("folder"), torch.device("cpu"))
    assert torch.allclose(said(told.model), said(loaded("mine").model), atol=1e-5)
    again = ["train.py", "--base", "mine", "--objective", "chat", "--data.form", "chat",
             "--data.path", "talk.jsonl", *TINY, "--name", "next", "--steps", "1",
             "--optim.lr", "1e-9"]  # fmt: skip
    assert run(*again)[0] == 0
    assert torch.allclose(said(loaded("next").model), said(plain(loaded("mine").model)), atol=1e-4)


def test_without_full_tuning_nothing_is_a_share_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    RUNS.mkdir()
    cost = {"weights": 1, "of": 2, "bytes": 3, "seconds": 1.0}
    parts = {"tuned_run": lambda name: "base", "writer_of": lambda *_: None,
             "examined": lambda *_: [Result("sort", 1, 0.2, 0.1, 0.3, ("", "", ""))],
             "tuned": lambda *_: cost | {"right": 0.5, "low": 0.4, "high": 0.6}}  # fmt: skip
    for name, part in parts.items():
        monkeypatch.setattr(tuning, name, part)
    tuning.compare(tuning.Compare(tasks=("sort",), ways=("prompt",)))
    out = capsys.readouterr().out
    assert "+30" in out and "nan" not in out


@pytest.mark.parametrize("kind", ["ppo", "grpo", "dpo"])
@pytest.mark.parametrize("old", ["full", "lora"])
def test_every_stage_improves_an_adapter(folder, kind, old):  # noqa: F811
    """One of its own beside a run that has none, or that which the run has."""
    assert tune("--name", "mine", "--steps", "2", *(LORA if old == "lora" else []))[0] == 0
    better = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(9)]
    Path("better.jsonl").write_text("\n".join(map(json.dumps, better)))
    more = ["--preferences", "better.jsonl"] if kind == "dpo" else []
    more += LORA if old == "full" else []
    before = loaded("mine")
    command = ["align.py", kind, "--run", "mine", "--name", "better", *IMPROVE, *more]
    status, _, err = run(*command)
    assert status == 0, err
    kept = end_of("better")[1]["model"]
    assert len(kept) == 8 and all(n.endswith((".A", ".B")) for n in kept)
    after = loaded("better").model
    frozen = {n: p for n, p in after.named_parameters() if not p.requires_grad}
    for name, p in before.model.named_parameters():
        own = frozen.get(name, frozen.get(name.replace(".weight", ".base.weight")))
        if own is not None and ".adapters." not in name:
            assert torch.equal(own, p), name
    moved = any(x.abs().sum() > 0 for n, x in kept.items() if n.endswith(".B"))
    assert moved or (kind, old) == ("grpo", "full")  # whose answers were all worth the same


def test_a_reward_model_is_fitted_by_an_adapter_and_kept_whole(folder):  # noqa: F811
    assert tune("--name", "mine", "--steps", "2")[0] == 0
    asked = ["--run", "mine", "--tasks", "copy", "--levels", "1"]
    some = ["--out", "p.jsonl", "--count", "30", "--each", "2", "--tokens", "3"]
    assert run("align.py", "prefer", *asked, *some)[0] == 0
    more = ["--preferences", "p.jsonl", "--held", "0.4"]
    status, _, err = run("align.py", "reward", *asked, *more, *LORA)
    assert status == 0, err
    assert not any(".adapters." in n for n in end_of("reward")[1]["model"])
