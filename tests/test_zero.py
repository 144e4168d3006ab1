"""The laws of ZeRO and of optimizers that look at whole matrices: what one process computes."""

import pytest
from ranks import Ranks
from test_parallel import MODEL, alone, assert_same, together

from mesh import Plan
from optim import OptimConfig

ADAMW = OptimConfig("adamw", lr=0.01, clip=0.5)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(8)
    yield ranks
    ranks.close()


def some(plans, every):
    """All of them in -m slow, a few in each run."""
    return [pytest.param(p, marks=[] if i % every == 0 else pytest.mark.slow)
            for i, p in enumerate(plans)]  # fmt: skip


PLANS = [
    Plan(d, p, t, zero)
    for n in (2, 4, 8) for d in (8, 4, 2) for p in (1, 2, 4) for t in (1, 2, 4)
    if d * p * t == n for zero in ((1, 2, 3) if p == 1 else (1,))
]  # fmt: skip


@pytest.mark.parametrize("plan", some(PLANS, 3), ids=str)
def test_zero_computes_what_one_process_computes(ranks, plan):
    assert_same(alone(MODEL, 3), ranks.run(together, MODEL, plan, 3))
