"""The laws of ZeRO and of optimizers that look at whole matrices: what one process computes."""

from dataclasses import replace

import pytest
import torch
from test_parallel import assert_same, in_mesh, in_short, some
from torch import nn

import zero
from certificate import MODEL, OPTIM, batches_of, plans, same_bits, together
from mesh import Plan
from model import Transformer
from parallel import Part, accumulate, trained, update
from recompute import recompute
from split import Place
from step import LossScale, NotFinite

ZEROS = [plan for plan in plans() if plan.zero]


@pytest.mark.parametrize("plan", some(ZEROS, 3), ids=in_short)
def test_zero_computes_what_one_process_computes(ranks, plan):
    assert_same(ranks, MODEL, plan, 3)


@pytest.mark.parametrize("plan", [
    Plan(2, 1, 2, zero=2, rows=3), Plan(4, 1, 2, zero=3, rows=3), Plan(2, 1, 1, zero=3, rows=1),
    Plan(2, 1, 4, zero=3, rows=2, sequence=True), Plan(2, 1, 2, zero=2, sequence=True, bucket=0),
], ids=in_short)  # fmt: skip
@pytest.mark.parametrize("change", [{}, {"tied": False, "position": "learned"}], ids=str)
def test_several_micro_batches_that_do_not_share_out_evenly(ranks, plan, change):
    assert_same(ranks, replace(MODEL, **change), plan, 2)


@pytest.mark.parametrize("change", [
    {"position": "t5"}, {"position": "relative"}, {"order": "post", "arch": "encoder"},
    {"arch": "encdec", "position": "t5"}, {"attention": "performer", "ffn_dim": 41},
], ids=str)  # fmt: skip
def test_every_architecture(ranks, change):
    """With few numbers in some weights, so that shards are uneven and empty."""
    assert_same(ranks, replace(MODEL, **change), Plan(8, zero=3), 2)


WHOLE = [
    Plan(2, 2, 2), Plan(2), Plan(1, 2, 2), Plan(tensor=4), Plan(4, zero=1), Plan(2, 1, 2, zero=2),
    Plan(2, 1, 4, zero=3), Plan(2, 2, 2, zero=1),
]  # fmt: skip


@pytest.mark.parametrize("name", ["muon", "adafactor"])
@pytest.mark.parametrize("plan", some(WHOLE, 2), ids=in_short)
def test_optimizers_that_look_at_whole_matrices(ranks, plan, name):
    assert_same(ranks, MODEL, plan, 3, replace(OPTIM, name=name))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("stage", some([3, 1, 2], 3))
def test_weights_of_fewer_numbers_than_ranks(ranks, stage, name):
    config = replace(MODEL, dim=4, heads=2, kv_heads=1, layers=1, ffn_dim=3, vocab_size=11)
    how = replace(OPTIM, name=name, clip=0.1, clip_by="value")
    assert_same(ranks, config, Plan(8, zero=stage), 2, how)


EXACT = [Plan(), Plan(4, zero=1), Plan(2, 2, 2, zero=1), Plan(1, 2, 4), Plan(2, 1, 4, zero=1)]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_exact_plans_end_in_the_same_bits(ranks, name):
    config, how, first = replace(MODEL, position="learned"), replace(OPTIM, name=name), None
    for plan in EXACT:
        settings = config, replace(plan, exact=True), 3, torch.float32, how
        found = [said for said in ranks.run(together, trained, *settings) if said]
        first = first or found
        assert same_bits(first, found), plan


# --- what is not there ----------------------------------------------------------------------------


def most_at_once(part, plan):
    """The most bytes of gradients and of weights at any time of an update."""
    zero.build(part, OPTIM, None, plan)
    grads, weights, params = [], [], list(part.parameters())

    def look(*_):
        grads.append(sum(p.grad.nbytes for p in params if p.grad is not None))
        weights.append(sum(p.untyped_storage().nbytes() for p in params))

    for p in params:
        p.register_post_accumulate_grad_hook(look)
    for block in part.layers:
        block.register_forward_pre_hook(look)
        block.ffn.register_forward_hook(look)
    accumulate(part, batches_of(part.config, 0), plan, torch.float32, 1.0)
    sizes = [sum(p.nbytes for p in unit.params) for unit in part.shards.units]
    return (
        max(grads),
        max(weights),
        sizes,
        weights and sum(p.untyped_storage().nbytes() for p in params),
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_weights_and_gradients_are_really_gone(ranks, rows):
    """ZeRO 3 has the weights of one block beside those of none, and no gradient of any other."""
    for said in filter(None, ranks.run(in_mesh, most_at_once, MODEL, Plan(2, rows=rows, zero=3))):
        grads, weights, (*blocks, rest), left = said
        assert weights == max(blocks) + rest
        assert 0 < grads <= max(max(blocks), rest) + 4 * MODEL.vocab_size * MODEL.dim
        assert left == 0


def test_gradients_leave_in_buckets(ranks):
    """ZeRO 2 holds no more of them than a bucket, and what is too large for one."""
    plan = Plan(2, zero=2, bucket=0.01)
    for grads, _, buckets, _ in filter(None, ranks.run(in_mesh, most_at_once, MODEL, plan)):
        assert 0 < grads <= 2 * max(buckets) < sum(buckets) / 2


# --- where all is not well ------------------------------------------------------------------------


def with_a_spare(config, plan, mesh, batches, optim, dtype):
    """Trained with a weight in a block that nobody uses."""
    part = Part(config, plan, mesh)
    part.initialize(0)
    part.to(dtype)
    spare = part.layers[1].spare = nn.Parameter(torch.ones(5, dtype=dtype))
    spare.place = Place("layers.1.spare", (5,))
    part.numbers["layers.1.spare"] = len(part.numbers)
    optimizer = zero.build(part, optim, dtype, plan)
    made = [update(part, b, optimizer, optim.lr, optim, plan, dtype) for b in batches]
    kinds = {place.name: x for kind, place, x in zero.held(part, optimizer) if kind == "weight"}
    assert (kinds["layers.1.spare"] == 1).all()
    place = next(p for p in zero.holders(part) if p.place.name == "layers.1.spare")
    assert not place.grad.any()
    del part.layers[1].spare
    return part, optimizer, made


@pytest.mark.parametrize("stage", range(4))
def test_a_weight_that_nobody_uses(ranks, stage):
    """It gets no gradient, keeps no bucket waiting, and stays as it is."""
    found = ranks.run(together, with_a_spare, MODEL, Plan(4, zero=stage), 2)
    plain = ranks.run(together, trained, MODEL, Plan(4, zero=stage), 2)
    assert [x.made for x in found if x] == [x.made for x in plain if x]


def poisoned(part, plan):
    """An update of weights of which one is infinite, which only the last row asks for."""
    optimizer = zero.build(part, OPTIM, None, plan)
    whole = Transformer(part.config, 0).embedding.detach()
    whole[-1, 3] = torch.inf
    for kind, place, x in zero.held(part, optimizer):
        if (kind, place.name) == ("weight", "embedding"):
            x.copy_(place.read(whole))
    (batch,) = batches_of(part.config, 0)
    batch.inputs.clamp_(max=part.config.vocab_size - 2)
    batch.inputs[-1, -1] = part.config.vocab_size - 1
    before = [x.clone() for _, _, x in zero.held(part, optimizer)]
    said = ""
    try:
        update(part, [batch], optimizer, 0.01, OPTIM, plan, torch.float32)
    except NotFinite as error:
        said = str(error)
    after = [x for _, _, x in zero.held(part, optimizer)]
    return said, all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def overflown(part, plan):
    """Two updates, of which the first one's gradient overflows: (moved, same weights, scale)."""
    optimizer, scale, made = zero.build(part, OPTIM, None, plan), LossScale(2.0**127), []
    for _ in range(2):
        before = [x.clone() for _, _, x in zero.held(part, optimizer)]
        done = update(part, batches_of(part.config, 0), optimizer, 0.01, OPTIM, plan,
                      torch.float32, scale)  # fmt: skip
        after = [x for _, _, x in zero.held(part, optimizer)]
        same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        made.append((done.moved, same, scale.scale))
        scale.scale = 2.0**10
    return made


@pytest.mark.parametrize("plan", [*(Plan(4, zero=stage) for stage in range(4)), Plan(2, 2, 2)],
                         ids=in_short)  # fmt: skip
def test_what_is_no_number_moves_nothing(ranks, plan):
    for said, same in filter(None, ranks.run(in_mesh, poisoned, MODEL, plan)):
        assert "nan" in said and same
    for made in filter(None, ranks.run(in_mesh, overflown, MODEL, plan)):
        assert made == [(False, True, 2.0**126), (True, False, 2.0**10)]


def recomputed(config, plan, mesh, batches, optim, dtype):
    part = Part(config, plan, mesh)
    part.initialize(0)
    part.to(dtype)
    recompute(part, "blocks")
    optimizer = zero.build(part, optim, dtype, plan)
    return (
        part,
        optimizer,
        [update(part, b, optimizer, optim.lr, optim, plan, dtype) for b in batches],
    )


@pytest.mark.parametrize("plan", [Plan(2, 1, 2, zero=3), Plan(2, 2, 2), Plan(4, 1, 2, zero=2)],
                         ids=in_short)  # fmt: skip
def test_blocks_computed_twice(ranks, plan):
    assert_same(ranks, MODEL, plan, 2, train=recomputed)
