"""What is shown as emerging: exams are unseen, the best possible is that, settings are checked."""

from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import emergence
from emergence import ANSWERS, PAIRS, SYMBOLS, Shots, best_possible, by_shots, rows, shape_of
from kernels.cross_entropy import IGNORE
from model import Transformer
from run import UserError


def mappings_of(batch):
    """Each row's mapping, as far as it is shown; ValueError if a row is none."""
    found = []
    for ids in batch.inputs.tolist():
        shown = {}
        for x, y in zip(ids[::2], ids[1::2], strict=True):
            if shown.setdefault(x, y) != y or not (x < SYMBOLS <= y < SYMBOLS + ANSWERS):
                raise ValueError(ids)
        found.append(tuple(sorted(shown.items())))
    return found


def test_rows_are_mappings_and_ask_for_each_answer():
    batch = rows(200, 0, 0, "train")
    assert batch.inputs.shape == (200, 2 * PAIRS)
    assert len({*mappings_of(batch)}) == 200
    assert (batch.targets[:, 1::2] == IGNORE).all()
    assert torch.equal(batch.targets[:, ::2], batch.inputs[:, 1::2])
    assert torch.equal(rows(200, 0, 0, "train").inputs, batch.inputs)


def test_no_mapping_of_the_exam_was_learnt():
    learnt = {m for step in range(20) for m in mappings_of(rows(200, 0, step, "train"))}
    assert not learnt & {*mappings_of(rows(1000, 0, 0, "test"))}


class Rememberer(torch.nn.Module):
    """Says what stood behind the same symbol before, and otherwise answer 0."""

    def forward(self, ids):
        return ids

    def logits(self, ids):
        same = (ids[:, :, None] == ids[:, None, :]).tril(-1)
        last = torch.where(same, torch.arange(ids.shape[1]), -1).amax(-1)
        said = torch.where(last >= 0, ids.gather(1, (last + 1).clamp(min=0)), SYMBOLS)
        return torch.nn.functional.one_hot(said, SYMBOLS + ANSWERS) * 50.0


def test_who_remembers_is_as_good_as_can_be():
    batch = rows(20_000, 3, 0, "test")
    right, _ = by_shots(Rememberer(), batch)
    for shots in range(PAIRS):
        assert right[shots] == pytest.approx(best_possible(shots), abs=0.015)


def test_a_model_learns_its_exam_from_a_few_updates():
    config = Shots(steps=3, batch=4, asked=20, every=2, device="cpu")
    found = emergence.learn_mappings(config, "1x16", 0, tqdm(disable=True))
    assert found.steps == [0, 2, 3] and len(found.right[0]) == PAIRS
    assert found.loss[-1] != found.loss[0]
    assert Transformer(shape_of("2x32"), 0).config.layers == 2


@pytest.mark.parametrize("make", [
    lambda: Shots(sizes=("big",)), lambda: Shots(steps=0), lambda: emergence.Thought(votes=0),
    lambda: emergence.Tuning(counts=(1000,)),
])  # fmt: skip
def test_settings_are_checked(make):
    with pytest.raises(UserError):
        make()


def test_one_seed_has_no_interval():
    assert emergence.with_interval([0.5]) == (0.5, 0.0)
    middle, half = emergence.with_interval([0.4, 0.5, 0.6])
    assert middle == pytest.approx(0.5) and half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)


def test_a_larger_curriculum_holds_the_smaller():
    for count in (4, 10, 20):
        assert {*emergence.curriculum(count, 0)} < {*emergence.curriculum(40, 0)}
    assert emergence.curriculum(10, 0) != emergence.curriculum(10, 1)


def test_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    emergence.of_shots(Shots(("1x16", "1x24"), steps=2, batch=2, seeds=2, asked=8, every=1))
    assert (tmp_path / "runs" / "shots.png").exists()
    assert "best possible" in capsys.readouterr().out
    writer = SimpleNamespace()
    monkeypatch.setattr(emergence, "taught", lambda config, seed: "run")
    monkeypatch.setattr(emergence, "writer_of", lambda *_: writer)
    result = SimpleNamespace(right=0.5)
    monkeypatch.setattr(emergence, "examined", lambda *_: [result])
    emergence.of_thought(emergence.Thought(seeds=2))
    assert (tmp_path / "runs" / "thought.png").exists()
    assert "step by step" in capsys.readouterr().out
