"""The laws of ZeRO and of optimizers that look at whole matrices: what one process computes."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from ranks import Ranks
from test_parallel import MODEL, alone, assert_same, batches_of, together

import zero
from mesh import Mesh, Plan
from optim import OptimConfig
from parallel import Part, update

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


@pytest.mark.parametrize("plan", [
    Plan(2, 1, 2, zero=2, rows=3), Plan(4, 1, 2, zero=3, rows=3), Plan(2, 1, 1, zero=3, rows=1),
    Plan(2, 1, 4, zero=3, rows=2, sequence=True), Plan(2, 1, 2, zero=2, sequence=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("change", [{}, {"tied": False, "position": "learned"}], ids=str)
def test_several_micro_batches_that_do_not_share_out_evenly(ranks, plan, change):
    config = replace(MODEL, **change)
    assert_same(alone(config, 2), ranks.run(together, config, plan, 2))


@pytest.mark.parametrize("change", [
    {"position": "t5"}, {"position": "relative"}, {"order": "post", "arch": "encoder"},
    {"arch": "encdec", "position": "t5"}, {"attention": "performer", "ffn_dim": 41},
], ids=str)  # fmt: skip
def test_every_architecture(ranks, change):
    """With few numbers in some weights, so that shards are uneven and empty."""
    config, plan = replace(MODEL, **change), Plan(8, zero=3)
    assert_same(alone(config, 2), ranks.run(together, config, plan, 2))


WHOLE = [
    Plan(2), Plan(tensor=4), Plan(1, 2, 2), Plan(2, 2, 2), Plan(4, zero=1), Plan(2, 1, 2, zero=2),
    Plan(2, 1, 4, zero=3), Plan(2, 2, 2, zero=1),
]  # fmt: skip


@pytest.mark.parametrize("name", ["muon", "adafactor"])
@pytest.mark.parametrize("plan", some(WHOLE, 2), ids=str)
def test_optimizers_that_look_at_whole_matrices(ranks, plan, name):
    how = replace(ADAMW, name=name)
    assert_same(
        alone(MODEL, 3, torch.float64, how),
        ranks.run(together, MODEL, plan, 3, torch.float64, how),
    )


EXACT = [Plan(), Plan(4, zero=1), Plan(2, 2, 2, zero=1), Plan(1, 2, 4), Plan(2, 1, 4, zero=1)]


def exactly(config, plan, steps, how):
    torch.use_deterministic_algorithms(True)
    return together(config, replace(plan, exact=True), steps, torch.float32, how)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_exact_plans_end_in_the_same_bits(ranks, name):
    config, how = replace(MODEL, position="learned", dropout=0.1), replace(ADAMW, name=name)
    first, *rest = (ranks.run(exactly, config, plan, 3, how) for plan in EXACT)
    known = {(place.name, place.part): w for place, w in first[0][2]}
    for plan, found in zip(EXACT[1:], rest, strict=True):
        for said in filter(None, found):
            assert said[0] == first[0][0], plan
            for place, weight in said[2]:
                assert torch.equal(weight, known[place.name, place.part]), (plan, place)


# --- bytes ----------------------------------------------------------------------------------------


def counted(plan: Plan, how: OptimConfig) -> tuple:
    """After a step: bytes of weights, gradients and optimizer; bytes sent among copies."""
    mesh = Mesh(plan.data, plan.pipeline, plan.tensor)
    if not mesh.inside:
        return None
    part = Part(MODEL, plan, mesh)
    part.initialize(0)
    optimizer = zero.build(part, how, None, plan)
    mesh.traffic.clear()
    update(part, batches_of(MODEL, 0), optimizer, 0.01, how, plan, torch.float32)
    tensors = [
        *part.parameters(),
        *zero.holders(part),
        *(part.shards.of.values() if part.shards else ()),
    ]
    weights = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    held = {x.grad.untyped_storage() for x in tensors if x.grad is not None}
    grads = {x.data_ptr(): x.nbytes() for x in held}
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values())
    sent = {kind: n for (name, kind), n in mesh.traffic.items() if name == "data"}
    sizes = [p.numel() for p in part.parameters()]
    blocks = [[p.numel() for p in b.parameters()] for b in part.layers]
    mesh.close()
    return sum(weights.values()), sum(grads.values()), state, sent, sizes, blocks


def shards_of(sizes: list[int], N: int) -> list[int]:
    """Numbers that each of N ranks holds of weights of these sizes."""
    return [sum(n * (r + 1) // N - n * r // N for n in sizes) for r in range(N)]


@pytest.mark.parametrize("N", [2, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_held_and_sent_are_those_of_the_formulas(ranks, N, stage):
    """AdamW in fp32, one micro-batch: 4 bytes for weight and gradient each, 8 for the state.

    All-reduce sends 2(N−1)/N of a tensor, reduce-scatter (N−1)/N, all-gather N−1 times a share;
    shares are filled up to the largest.
    """
    how = OptimConfig("adamw", lr=0.01)
    for r, said in enumerate(ranks.run(counted, Plan(N, rows=8 // N, zero=stage), how)[:N]):
        weights, grads, state, sent, sizes, blocks = said
        all_of, own = sum(sizes), shards_of(sizes, N)[r]
        root = list(sizes)
        for n in chain(*blocks):
            root.remove(n)
        units = [*blocks, root] if stage == 3 else [sizes]
        most = [max(shards_of(unit, N)) for unit in units]
        assert state == 8 * (own if stage else all_of)
        assert grads == 4 * (own if stage > 1 else all_of)
        assert weights == 4 * (own if stage == 3 else all_of)
        want = {"sum": 2 * 4 * all_of * (N - 1) / N} if stage < 2 else {
            "scatter": 4 * (N - 1) * sum(most)
        }  # fmt: skip
        if stage in (1, 2):  # once, behind the step
            want["gather"] = 4 * (N - 1) * sum(most)
        if stage == 3:  # each block forward and backward, the rest once
            want["gather"] = 4 * (N - 1) * (2 * sum(most[:-1]) + most[-1])
        assert sent == pytest.approx(want), (r, sent, want)
