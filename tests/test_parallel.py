"""The law of parallelism: under any plan, what one process computes."""

from contextlib import closing
from dataclasses import asdict, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from certificate import (
    LAWS,
    MODEL,
    OPTIM,
    Certificate,
    Line,
    alone,
    batches_of,
    broken,
    certify,
    differences,
    plans,
    same_bits,
    together,
)
from data_parallel import Buckets, in_buckets
from mesh import Mesh, Plan, tree
from parallel import Part, check, own_share, trained
from run import UserError


def in_short(value) -> str:
    """A plan, or what is changed, as the name of a test."""
    if not isinstance(value, Plan):
        return str(value)
    changed = {k: v for k, v in asdict(value).items() if v != getattr(Plan, k)}
    return ",".join(f"{k}={v}" for k, v in changed.items())


def assert_same(ranks, config, plan, steps, optim=OPTIM, train=trained) -> None:
    how = torch.float64, optim
    found = [said for said in ranks.run(together, train, config, plan, steps, *how) if said]
    assert len(found) == plan.size
    apart = differences(alone(config, steps, *how), found)
    assert all(apart[what] <= law for what, law in LAWS.items()), apart


def in_mesh(do, config, plan):
    """do(part, plan) on each rank that the plan has, in float32."""
    mesh = Mesh(plan.data, plan.pipeline, plan.tensor)
    if not mesh.inside:
        return None
    with closing(mesh):
        part = Part(config, plan, mesh)
        part.initialize(0)
        return do(part, plan)


def some(cases, every):
    """A few in each run, and all of them in -m slow."""
    return [pytest.param(case, marks=[] if i % every == 0 else pytest.mark.slow)
            for i, case in enumerate(cases)]  # fmt: skip


@pytest.mark.parametrize("plan", some(plans(zero=False), 2), ids=in_short)
def test_any_plan_computes_what_one_process_computes(ranks, plan):
    assert_same(ranks, MODEL, plan, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [Plan(2, 2, 2), Plan(1, 4, 2), Plan(4, 1, 2, zero=3)], ids=in_short
)
def test_twenty_steps(ranks, plan):
    assert_same(ranks, MODEL, plan, 20)


@pytest.mark.parametrize("bucket", [0, 0.01])
def test_gradients_may_be_sent_one_by_one_or_in_many_buckets(ranks, bucket):
    assert_same(ranks, MODEL, Plan(4, 1, 2, bucket=bucket), 2)


def test_a_bucket_holds_as_much_as_it_may_the_last_first():
    first, *others = (torch.nn.Parameter(torch.zeros(1)) for _ in range(5))  # 4 bytes each
    b, c, d, e = others
    found = [[id(p) for p in some] for some in in_buckets([first, *others], 8)]
    assert found == [[id(e), id(d)], [id(c), id(b)], [id(first)]]
    assert len(in_buckets([first, *others], 0)) == 5 and in_buckets([], 8) == []


def groups_now():
    return len(dist.distributed_c10d._world.pg_map)


def test_groups_of_earlier_calls_are_given_up(ranks):
    """gloo's threads for hundreds of groups had left no processor time for anything else."""
    ranks.run(left_open)
    assert set(ranks.run(groups_now)) == {1}


def left_open():
    Mesh(2, 2, 2)


def test_tokens_are_divided_within_a_pipeline(ranks):
    """What a stage makes of its own tokens lies in memory in another order than what is sent."""
    assert_same(ranks, replace(MODEL, position="learned"), Plan(2, 2, 2, sequence=True), 2)


@pytest.mark.parametrize("plan", [Plan(2, 2, 1, rows=3), Plan(4, 1, 2, rows=3)], ids=in_short)
def test_copies_may_have_unlike_shares(ranks, plan):
    """Three micro-batches for two copies, and for four, of which one has none."""
    assert_same(ranks, MODEL, plan, 2)


def on_their_way(part, plan):
    """Of how many buckets some are sent when the backward pass has come to the first block."""
    (batch,), seen = batches_of(part.config, 0), []
    buckets = Buckets(part.in_order(), part.mesh.data, plan.bucket * 10**6)
    (part.encoder or part).layers[0].attention_norm.weight.register_post_accumulate_grad_hook(
        lambda _: seen.append(len(buckets.waiting))
    )
    buckets.open()
    part.run(batch, None, torch.float32).backward()
    buckets.finish()
    return seen, len(buckets.buckets)


@pytest.mark.parametrize("change", [{}, {"tied": False}, {"arch": "encdec"}], ids=str)
def test_buckets_leave_while_the_backward_pass_goes_on(ranks, change):
    config = replace(MODEL, **change)
    for bucket in (0.02, 0):
        plan = Plan(2, bucket=bucket)
        for (sent,), count in filter(None, ranks.run(in_mesh, on_their_way, config, plan)):
            assert count > 4 and (count - 3 <= sent < count if bucket else sent == 0)


def test_an_empty_stage_is_where_its_machine_is():
    world = SimpleNamespace(device=torch.device("cuda"))
    part = SimpleNamespace(parameters=lambda: iter(()), mesh=SimpleNamespace(world=world))
    assert Part.device.fget(part) == torch.device("cuda")


MIXED = [Plan(1, 1, 1), Plan(2, 2, 2), Plan(8, 1, 1), Plan(1, 8, 1), Plan(1, 1, 8), Plan(4, 1, 2),
         Plan(1, 2, 4, schedule="gpipe"), Plan(2, 1, 4)]  # fmt: skip


def test_whoever_adds_does_so_in_the_order_of_one_tree():
    """The sums of copies, added up, are the sum of one process, parenthesis by parenthesis."""

    def add(a: str, b: str) -> str:
        return f"({a}{b})"

    assert tree("abcdefg", add) == "(((ab)(cd))((ef)g))"
    micros = "abcdefghijklmnopqrs"
    for count, data in product(range(1, len(micros)), (1, 2, 4, 8)):
        shares = [own_share(count, Plan(data, exact=True), index) for index in range(data)]
        assert [i for share in shares for i in share] == list(range(count))
        sums = [tree([micros[i] for i in share], add) for share in shares if share]
        assert tree(sums, add) == tree(micros[:count], add)


@pytest.mark.parametrize("rows, tried", [(0, MIXED), (3, [MIXED[0], Plan(2, 1, 1)]),
                                         (1, [MIXED[0], Plan(4, 1, 2)])])  # fmt: skip
def test_exact_plans_end_in_the_same_bits(ranks, rows, tried):
    """Three micro-batches do not share themselves out evenly."""
    config, first = replace(MODEL, position="learned"), None
    for plan in tried:
        exact = replace(plan, rows=rows, exact=True)
        found = [x for x in ranks.run(together, trained, config, exact, 4, torch.float32) if x]
        first = first or found
        assert same_bits(first, found), plan


@pytest.mark.parametrize("position", ["t5", "alibi"])
def test_an_encoder_decoder(ranks, position):
    config = replace(MODEL, arch="encdec", layers=2, position=position)
    for plan in (Plan(2, 1, 4), Plan(1, 1, 2)):
        assert_same(ranks, config, plan, 2)


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
    ({"pipeline": 2, "layers": (5,)}, "each of 2 stages, not 1"),
    ({"pipeline": 2, "layers": (5, -1)}, "a stage cannot have -1"),
    ({"sequence": True, "exact": True}, "order"), ({"exact": True, "zero": 3}, "0 or 1"),
    ({"exact": True, "data": 3}, "powers of 2"),
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


@pytest.mark.parametrize("plan, change", CASES, ids=in_short)
def test_every_architecture(ranks, change, plan):
    config = replace(MODEL, **change)
    assert_same(ranks, config, plan, 2)


# --- the certificate ------------------------------------------------------------------------------


def too_fast(config, plan, mesh, batches, optim, dtype):
    """A rate that is wrong by a millionth where there are several processes."""
    wrong = replace(optim, lr=optim.lr * (1 + 1e-6 * (plan.size > 1)))
    return trained(config, plan, mesh, batches, wrong, dtype)


def test_what_breaks_a_law_is_said():
    """Micro-batches beyond the schedule's, other bits, a weight that nobody holds, no number."""
    line = Line(Plan(), dict.fromkeys(LAWS, 0.0), True, 0, {}, [], [1])
    assert not broken(line) and not broken(line._replace(bits=None))
    assert broken(line._replace(counted=["one byte", "another"])) == ["one byte"]
    assert broken(line._replace(in_flight=[2])) == ["its stages keep [2] micro-batches, not [1]"]
    assert broken(line._replace(bits=False)) == ["exact mode ends in other bits than one process"]
    lost, nan = differences(alone(MODEL, 1), []), dict.fromkeys(LAWS, float("nan"))
    assert len(broken(line._replace(apart=lost))) == len(LAWS)
    assert len(broken(line._replace(apart=nan))) == len(LAWS)


def test_a_broken_law_is_a_sentence_and_exit_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sentence = r"^broken under 6 of 7 plans, first under 1 × 1 × 2: its weights differ by 1\.\de-08"
    with pytest.raises(SystemExit, match=sentence) as end:
        certify(Certificate(ranks=2, steps=1), too_fast)
    assert "other bits" in end.value.code and "1 × 1 × 2" in capsys.readouterr().out
    assert (tmp_path / "runs" / "certificate.png").exists()


@pytest.mark.parametrize("values, said", [
    ({"ranks": 3}, "1, 2, 4 or 8"), ({"steps": 0}, "1000"),
    ({"exact": True, "ranks": 4}, "--exact tries plans of 8 processes, not of 4"),
])  # fmt: skip
def test_a_certificate_s_settings_are_checked(values, said):
    with pytest.raises(UserError, match=said):
        Certificate(**values)
