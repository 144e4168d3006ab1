"""The law of parallelism: under any plan, what one process computes."""

from dataclasses import replace

import pytest
import torch
from ranks import Ranks

import zero
from mesh import Mesh, Plan
from model import ModelConfig, Transformer
from objectives import IGNORE, Batch
from optim import OptimConfig, build
from parallel import Part, check, update
from run import UserError, generator
from step import update as plain_update

MODEL = ModelConfig(
    dim=32, layers=5, heads=8, kv_heads=8, context=12, vocab_size=97, ffn_dim=40, bias=True,
    norm="layernorm",
)  # fmt: skip
OPTIM = OptimConfig("adamw", lr=0.01, clip=0.5)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(8)
    yield ranks
    ranks.close()


def batches_of(config: ModelConfig, step: int, rows: int = 8, count: int = 1) -> list[Batch]:
    """Random rows, of whose targets some are not asked, in some rows most."""
    made = []
    for n in range(count):
        rng = generator(0, "batch", count * step + n)
        ids, targets = torch.randint(0, config.vocab_size, (2, rows, config.context), generator=rng)
        hidden = torch.rand(rows, config.context, generator=rng) < torch.rand(
            rows, 1, generator=rng
        )
        lo = torch.zeros_like(ids)
        hi = torch.full_like(ids, config.context - 1) if config.arch == "encoder" else None
        source = ()
        if config.arch == "encdec":
            last = torch.full_like(ids, config.context - 1)
            source = torch.randint_like(ids, config.vocab_size, generator=rng), lo, last, lo, last
        made.append(Batch(ids, targets.masked_fill(hidden, IGNORE), lo, hi, *source))
    return made


def alone(config: ModelConfig, steps: int, dtype=torch.float64, how=OPTIM):
    """Loss and norm of each step of one process; the last gradients and weights."""
    model = Transformer(config, 0).to(dtype)
    optimizer = build(model.named_parameters(), how, dtype)
    made = [
        plain_update(model, batches_of(config, s), optimizer, 0.01, how, dtype)
        for s in range(steps)
    ]
    return ([(m.loss, m.norm) for m in made], {n: p.grad for n, p in model.named_parameters()},
            {n: p.detach() for n, p in model.named_parameters()})  # fmt: skip


def together(config: ModelConfig, plan: Plan, steps: int, dtype=torch.float64, how=OPTIM):
    """The same of this rank's part: of gradients and weights (place, number) each."""
    mesh = Mesh(plan.data, plan.pipeline, plan.tensor, plan.exact)
    if not mesh.inside:
        return None
    try:
        return in_mesh(mesh, config, plan, steps, dtype, how)
    finally:
        mesh.close()


def in_mesh(mesh: Mesh, config: ModelConfig, plan: Plan, steps: int, dtype: torch.dtype, how):
    part = Part(config, plan, mesh)
    part.initialize(0)
    part.to(dtype)
    optimizer = zero.build(part, how, dtype, plan)
    made = [
        update(part, batches_of(config, s), optimizer, 0.01, how, plan, dtype) for s in range(steps)
    ]
    held = [(place, x.clone()) for kind, place, x in zero.held(part, optimizer) if kind == "weight"]
    grads = [(p.place, p.grad) for p in zero.holders(part)]
    return [(m.loss, m.norm) for m in made], grads, held


PLANS = [
    Plan(d, p, t)
    for n in (1, 2, 4, 8) for d in (1, 2, 4, 8) for p in (1, 2, 4, 8) for t in (1, 2, 4, 8)
    if d * p * t == n
]  # fmt: skip


def assert_same(plain, found) -> None:
    (made, grads, weights) = plain
    seen = set()
    for said in filter(None, found):
        assert torch.tensor(said[0]).sub(torch.tensor(made)).abs().max() < 1e-12
        for place, grad in said[1]:
            off = (grad - place.read(grads[place.name])).abs()
            assert not len(off) or off.max() <= 1e-10 * (grads[place.name].abs().max() + 1e-3), (
                place
            )
            seen.add(place.name)
        for place, weight in said[2]:
            off = (weight - place.read(weights[place.name])).abs()
            assert not len(off) or off.max() < 1e-9, place
    assert seen == set(grads)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_any_plan_computes_what_one_process_computes(ranks, plan):
    assert_same(alone(MODEL, 3), ranks.run(together, MODEL, plan, 3))


MIXED = [Plan(1, 1, 1), Plan(2, 2, 2), Plan(8, 1, 1), Plan(1, 8, 1), Plan(1, 1, 8), Plan(4, 1, 2),
         Plan(1, 2, 4, schedule="gpipe"), Plan(2, 1, 4)]  # fmt: skip


def together_exactly(config, plan, steps):
    torch.use_deterministic_algorithms(True)
    return together(config, replace(plan, exact=True), steps, torch.float32)


@pytest.mark.parametrize("rows, plans", [(0, MIXED), (3, [MIXED[0], Plan(2, 1, 1)]),
                                         (1, [MIXED[0], Plan(4, 1, 2)])])  # fmt: skip
def test_exact_plans_end_in_the_same_bits(ranks, rows, plans):
    """Three micro-batches do not share themselves out evenly."""
    config = replace(MODEL, position="learned", dropout=0.1)
    plans = [replace(plan, rows=rows) for plan in plans]
    first, *rest = (ranks.run(together_exactly, config, plan, 4) for plan in plans)
    known = {(p.name, p.part): w for p, w in first[0][2]}
    for plan, found in zip(plans[1:], rest, strict=True):
        for said in filter(None, found):
            assert said[0] == first[0][0], plan
            for place, weight in said[2]:
                assert torch.equal(weight, known[place.name, place.part]), (plan, place)


@pytest.mark.parametrize("position", ["t5", "alibi"])
def test_an_encoder_decoder(ranks, position):
    config = replace(MODEL, arch="encdec", layers=2, position=position)
    for plan in (Plan(2, 1, 4), Plan(1, 1, 2)):
        assert_same(alone(config, 2), ranks.run(together, config, plan, 2))


@pytest.mark.parametrize("plan, change, said", [
    (Plan(tensor=3), {}, "does not divide the 8"), (Plan(pipeline=2), {"arch": "encdec"}, "line"),
    (Plan(pipeline=2, layers=(1, 1)), {}, "has 5"), (Plan(tensor=8), {"vocab_size": 7}, "too few"),
    (Plan(tensor=4, sequence=True), {"context": 10}, "does not divide --model.context"),
    (Plan(tensor=2, sequence=True), {"arch": "encdec"}, "not for both"),
    (Plan(pipeline=2, exact=True), {"position": "t5"}, "pipeline 1"),
    (Plan(tensor=4, exact=True), {"kv_heads": 2}, "does not divide the 2"),
])  # fmt: skip
def test_a_plan_that_cannot_be_is_told_in_a_sentence(plan, change, said):
    with pytest.raises(UserError, match=said):
        check(replace(MODEL, **change), plan)


@pytest.mark.parametrize("wrong, said", [
    ({"data": 0}, "at least 1"), ({"zero": 4}, "0, 1, 2 or 3"),
    ({"zero": 2, "pipeline": 2}, "0 or 1"),
    ({"pipeline": 2, "layers": (5,)}, "each of 2"), ({"sequence": True, "exact": True}, "order"),
    ({"exact": True, "zero": 3}, "0 or 1"), ({"exact": True, "data": 3}, "powers of 2"),
])  # fmt: skip
def test_a_plan_is_checked(wrong, said):
    with pytest.raises(UserError, match=said):
        Plan(**wrong)


ARCHES = [  # what is cut in another way each
    {"position": "t5"}, {"position": "alibi"}, {"position": "relative"}, {"position": "learned"},
    {"position": "sinusoidal", "order": "deepnorm", "activation": "relu"},
    {"arch": "encoder", "embed_norm": True, "segments": 2, "order": "post", "position": "learned"},
    {"attention": "performer"}, {"attention": "bigbird", "block": 16}, {"tied": False},
    {"scaled_head": True, "norm": "rmsnorm", "bias": False, "kv_heads": 4},
]  # fmt: skip


CUTS = [Plan(2, 2, 2), Plan(1, 2, 4), Plan(2, 1, 4, sequence=True),
        Plan(1, 3, 2, layers=(0, 5, 0), rows=3)]  # fmt: skip
CASES = [
    pytest.param(plan, change, marks=[] if (i + j) % 4 == 0 else pytest.mark.slow)
    for i, plan in enumerate(CUTS) for j, change in enumerate(ARCHES)
]  # fmt: skip


@pytest.mark.parametrize("plan, change", CASES, ids=str)
def test_every_architecture(ranks, change, plan):
    config = replace(MODEL, **change)
    assert_same(alone(config, 2), ranks.run(together, config, plan, 2))
