"""What ranks hold and send, and how much a stage keeps, are the formulas', exactly."""

from dataclasses import replace

import pytest
import torch
from test_parallel import in_short

from certificate import MODEL, ROWS, miscounted, together
from mesh import Plan
from parallel import trained
from traffic import held, micro_batches, sizes

PLANS = [
    Plan(8, 1, 1), Plan(1, 8, 1), Plan(4, 1, 2, zero=1), Plan(2, 2, 2, zero=1),
    Plan(1, 2, 4, rows=2, schedule="gpipe"), Plan(2, 1, 4, rows=1),
    Plan(1, 3, 2, layers=(0, 5, 0), rows=3), Plan(2, 2, 2, sequence=True),
    Plan(2, 1, 4, rows=1, zero=2), Plan(8, zero=3), Plan(2, 1, 2, rows=2, zero=3),
    Plan(2, 1, 4, sequence=True, zero=2), Plan(4, 1, 2, sequence=True, rows=1, zero=3),
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=in_short)
def test_bytes_are_the_formula_s(ranks, plan):
    for config, dtype in (
        (MODEL, torch.float64), (replace(MODEL, vocab_size=51, layers=3), torch.float32)
    ):  # fmt: skip
        plan = plan if config is MODEL else replace(plan, layers=())
        found = [x for x in ranks.run(together, trained, config, plan, 2, dtype) if x]
        assert len(found) == plan.size
        assert miscounted(plan, found, 2, config, dtype.itemsize) == []
        wrong = found[0]._replace(sent=found[0].sent + found[0].sent, held=(0, 0, 0))
        said = miscounted(plan, [wrong], 2, config, dtype.itemsize)
        assert len(said) == 3 + len(wrong.sent), said


def test_a_feed_forward_s_usual_width_is_counted():
    config = replace(MODEL, ffn_dim=0)
    assert sizes(config, Plan(), (0, 0, 0)) == sizes(
        replace(config, ffn_dim=config.ffn_width), Plan(), (0, 0, 0)
    )


def test_all_ranks_together_hold_the_model():
    """C (V + 2) + L (4 C² + 3 C F + 9 C + 2 F) numbers, and what tensor ranks hold as copies."""
    C, F = MODEL.dim, MODEL.ffn_dim
    whole = C * (MODEL.vocab_size + 2) + MODEL.layers * (4 * C * C + 3 * C * F + 9 * C + 2 * F)
    assert sum(sizes(MODEL, Plan(), (0, 0, 0)).all) == whole
    for plan in (Plan(8, zero=3), Plan(2, 1, 4, zero=3)):
        places = [(r, 0, i) for r in range(plan.data) for i in range(plan.tensor)]
        copies = (plan.tensor - 1) * sum(sizes(MODEL, plan, (0, 0, 0)).whole)
        for state, each in zip(
            (1, 1, 2), zip(*(held(MODEL, plan, at, 4) for at in places), strict=True), strict=True
        ):
            assert sum(each) == 4 * state * (whole + copies)


KEEPING = [Plan(1, 4, 2, rows=1), Plan(2, 4, 1, rows=1), Plan(1, 8, 1, rows=2), Plan(2, 2, 1),
           Plan(1, 4, 1, rows=1, schedule="gpipe"), Plan(2, 4, 1, rows=2, schedule="gpipe"),
           Plan(4, 1, 1, rows=1), Plan(2, 1, 2, rows=1, schedule="gpipe")]  # fmt: skip


@pytest.mark.parametrize("plan", KEEPING, ids=in_short)
def test_a_stage_keeps_as_many_micro_batches_as_its_schedule_says(ranks, plan):
    """1F1B: min(M, p − s), GPipe: M."""
    M = micro_batches(plan, ROWS) // plan.data
    for said in filter(None, ranks.run(together, trained, MODEL, plan, 1)):
        most = M if plan.schedule == "gpipe" else min(M, plan.pipeline - said.at[1])
        assert said.in_flight == most, said.at
