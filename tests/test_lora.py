"""LoRA: nothing at first, one matrix in the end, and nothing but adapters moves."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st

from adapters import adapt, frozen_mark
from attention import Linear
from certificate import LAWS, MODEL, OPTIM, Alone, batches_of, differences, together
from lora import (
    Adapter,
    adapted,
    exchange,
    linears,
    merge,
    plain,
    plain_name,
    survival,
    unmerge,
    use,
)
from mesh import Plan
from model import PRESETS, ModelConfig, Transformer
from objectives import Batch
from optim import build, learnt
from parallel import Part, check, update
from recompute import recompute
from run import UserError, generator
from step import accumulate
from step import update as plain_update
from zero import build as build_parts

EVERY = ("query", "key", "value", "output", "up", "gate", "down")
SMALL = ModelConfig(dim=24, layers=2, heads=4, kv_heads=2, context=12, vocab_size=19)
ARCHS = {
    "decoder": SMALL,
    "biased": replace(SMALL, bias=True, norm="layernorm", activation="gelu", position="learned"),
    "encoder": replace(SMALL, arch="encoder", kv_heads=0),
    "encdec": replace(SMALL, arch="encdec", position="t5", kv_heads=0),
}
hows = st.builds(
    Adapter,
    kind=st.just("lora"),
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 32),
    root=st.booleans(),
    on=st.lists(st.sampled_from(EVERY[:4] + EVERY[6:] + ("layers.0.*", "embedding")), min_size=1,
                max_size=3)
    .map(tuple),
)  # fmt: skip
kinds = st.sampled_from(sorted(ARCHS))


def drawn(config: ModelConfig, seed: int, dtype=torch.float64) -> Transformer:
    """No weight is 0, as some are at a model's start."""
    model = Transformer(config, seed).to(dtype)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator(seed, f"noise/{name}")).to(p)
        p.data += 0.2 * noise
    return model


def tuned(model: Transformer, how: Adapter, seed: int, name: str = "default") -> Transformer:
    """With an adapter that says something."""
    adapt(model, how, seed, name)
    for at, linear in adapted(model).items():
        if name in linear.adapters:
            B = linear.adapters[name].B
            B.data.copy_(torch.randn(B.shape, generator=generator(seed, f"B/{name}/{at}")) / 4)
    return model


def logits(model: Transformer, seed: int = 0) -> torch.Tensor:
    c = model.config
    ids = torch.randint(c.vocab_size, (2, c.context), generator=generator(seed, "ids"))
    memory = model.encode(ids) if c.arch == "encdec" else None
    return model.logits(model(ids, memory=memory))


# --- what an adapter is ---------------------------------------------------------------------------


@given(kinds, hows, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_at_the_start_no_bit_changes(kind, how, seed, dtype):
    model = drawn(ARCHS[kind], seed, dtype)
    before = logits(model)
    adapt(model, how, seed)
    assert adapted(model) and torch.equal(logits(model), before)


@given(kinds, hows, hows, seeds, st.floats(-2, 2))
def test_the_matrix_is_w_plus_what_each_adapter_adds(kind, one, two, seed, weight):
    """Against a plain model whose matrices are added up by hand; α/r, or α/√r."""
    model = drawn(ARCHS[kind], seed)
    by_hand = Transformer(model.config, None).double()
    by_hand.load_state_dict(model.state_dict())
    tuned(tuned(model, one, seed, "a"), two, seed + 1, "b")
    use(model, {"a": 1.0, "b": weight})
    for name, linear in adapted(model).items():
        for key, how, w in (("a", one, 1.0), ("b", two, weight)):
            if key in linear.adapters:
                scale = how.alpha / (how.rank**0.5 if how.root else how.rank)
                A, B = linear.adapters[key].A, linear.adapters[key].B
                assert A.shape[0] == B.shape[1] == how.rank
                W = by_hand.embedding if name == "embedding" else by_hand.get_submodule(name).weight
                W.data += w * scale * B.detach() @ A.detach()
    right = logits(by_hand)
    assert_close(logits(model), right)
    merge(model)
    assert_close(logits(model), right)
    assert_close(logits(plain(model)), right)
    assert plain(model).state_dict().keys() == by_hand.state_dict().keys()
    assert all(p.requires_grad for p in plain(model).parameters())


@given(kinds, hows, seeds)
def test_merged_is_unmerged_in_fp32_and_the_bits_come_back(kind, how, seed):
    model = tuned(drawn(ARCHS[kind], seed, torch.float32), how, seed)
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    x = torch.randn(5, 128, generator=generator(seed, "x"))
    some = [one for name, one in adapted(model).items() if name != "embedding"]
    unmerged = [linear(x[:, : linear.shape[1]]) for linear in some]
    merge(model)
    for linear, y in zip(some, unmerged, strict=True):
        apart = (linear(x[:, : linear.shape[1]]) - y).abs().max()
        assert apart <= 5e-6 * max(1, y.abs().max())
    unmerge(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_merged_is_unmerged_at_the_bar_of_a_wide_matrix():
    """512 × 512, r = 8: 5e-6 in fp32, 1e-12 in float64."""
    for dtype, bar in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
        config = replace(SMALL, dim=512, layers=1, heads=8, kv_heads=0)
        model = tuned(Transformer(config, 0).to(dtype), Adapter("lora"), 0)
        linear = next(iter(adapted(model).values()))
        x = torch.randn(64, 512, generator=generator(0, "x")).to(dtype)
        y = linear(x)
        merge(model)
        assert (linear(x) - y).abs().max() <= bar * max(1, y.abs().max())


def test_adapters_are_switched_and_added_up():
    model = drawn(SMALL, 0)
    base = logits(model)
    tuned(tuned(model, Adapter("lora", 2), 1, "a"), Adapter("lora", 3, on=("up",)), 2, "b")
    both = logits(model)
    use(model, {"a": 1})
    a = logits(model)
    use(model, {})
    assert torch.equal(logits(model), base)
    use(model, {"b": 1, "a": 1})
    assert_close(logits(model), both)
    assert not torch.allclose(a, both) and not torch.allclose(a, base)
    for weights, said in (({}, base), ({"a": 1}, a)):  # what is merged is merged no more
        merge(model)
        use(model, weights)
        assert torch.equal(logits(model), said)
    with pytest.raises(UserError, match="no adapter 'c' on the model: it has a, b"):
        use(model, {"c": 1})
    with pytest.raises(UserError, match="an adapter 'a' already"):
        adapt(model, Adapter("lora"), 0, "a")


@pytest.mark.parametrize("word", ["norm", "layers.7.*", "attention", "head"])
def test_what_is_no_linear_has_no_adapter(word):
    with pytest.raises(
        UserError, match="names no matrix of the model: choose among down, embedding, gate"
    ):
        adapt(Transformer(SMALL), Adapter("lora", on=(word,)))


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"on": ()}])
def test_settings_that_make_no_sense(values):
    with pytest.raises(UserError):
        Adapter("lora", **values)


def test_gpt3_s_adapters_are_counted():
    """r = 1 and 8 on queries and values: Hu et al. 2021, table 4 and section 4.2."""
    for rank, count in ((1, 4_718_592), (8, 37_748_736)):
        with torch.device("meta"):
            model = Transformer(replace(PRESETS["gpt3-175b"], vocab_size=64), None)
            adapt(model, Adapter("lora", rank))
        assert sum(p.numel() for p in learnt(model).values()) == count


# --- training -------------------------------------------------------------------------------------


def batch_of(config: ModelConfig, rows: int = 6) -> Batch:
    return batches_of(config, 0, rows)[0]


@given(kinds, hows, seeds)
def test_nothing_but_adapters_moves(kind, how, seed):
    model = drawn(ARCHS[kind], seed)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapt(model, how, seed)
    mark, optimizer = frozen_mark(model), build(model.named_parameters(), OPTIM)
    for _ in range(2):
        plain_update(model, [batch_of(model.config)], optimizer, 0.1, OPTIM)
    assert frozen_mark(model) == mark
    named = dict(model.named_parameters())
    assert set(learnt(model)) == {n for n in named if n.endswith((".A", ".B"))}
    assert all(p.grad is None for n, p in named.items() if n not in learnt(model))
    named |= {plain_name(n): p for n, p in named.items()}
    assert all(torch.equal(named[n], p)
               for n, p in before.items() if not n.endswith("bias"))  # fmt: skip
    moved = sum(not p.eq(0).all() for n, p in learnt(model).items() if n.endswith(".B"))
    assert moved == len(adapted(model))
    kept = {n.split("/", 1)[1] for n in optimizer.tensors() if "/" in n and n[0] != "t"}
    assert kept == set(learnt(model))


def test_a_base_is_known_by_its_bits_and_not_by_its_adapters():
    one, two = (tuned(drawn(SMALL, 0), Adapter("lora"), seed) for seed in (1, 2))
    assert frozen_mark(one) == frozen_mark(two) != ""
    next(iter(adapted(two).values())).base.weight.data[0, 0] += 1e-15
    assert frozen_mark(one) != frozen_mark(two)
    assert frozen_mark(Transformer(SMALL)) == ""


def gradients(model: Transformer, batches: list[Batch]) -> dict[str, torch.Tensor]:
    for p in model.parameters():
        p.grad = None
    accumulate(model, batches, torch.float64)
    return {n: p.grad for n, p in learnt(model).items()}


@pytest.mark.parametrize("what", ["attention", "blocks"])
@pytest.mark.parametrize("kind", sorted(ARCHS))
def test_recomputation_changes_no_gradient(kind, what):
    """Though what goes into the first block has no gradient, and its weights have none."""
    how = Adapter("lora", on=("query", "down", "cross.key")[: 2 + (kind == "encdec")], dropout=0.3)
    model = tuned(drawn(ARCHS[kind], 0), how, 0)
    batches = [batch_of(model.config)]
    plain_way = gradients(model, batches)
    recompute(model, what)
    again = gradients(model, batches)
    assert plain_way.keys() == again.keys() and len(again) > 4
    for name, g in again.items():
        assert_close(g, plain_way[name], 1e-12)


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ARCHS))
def test_what_is_forgotten_depends_on_rows_and_not_on_batches(kind):
    on = ("query", "value", "down") + (("cross.key",) if kind == "encdec" else ())
    model = tuned(drawn(ARCHS[kind], 0), Adapter("lora", on=on, dropout=0.5), 0)
    batch = batch_of(model.config)
    parts = [batch.each(lambda x, i=i: x[i : i + 2]) for i in (0, 2, 4)]
    whole, cut = gradients(model, [batch]), gradients(model, parts)
    for name, g in whole.items():
        assert_close(cut[name], g, 1e-12)
    other = replace(batch, draws=batch.draws + torch.tensor([0, 1, 0]))
    assert not all(torch.allclose(g, whole[n]) for n, g in gradients(model, [other]).items())
    none = replace(batch, draws=None)
    sure = gradients(model, [none])
    assert not all(torch.allclose(g, whole[n]) for n, g in sure.items())
    use(model, {})
    assert torch.equal(logits(model), logits(plain(model)))


def test_dropout_keeps_what_is_expected_and_each_adapter_forgets_for_itself():
    model = tuned(drawn(replace(SMALL, layers=1), 0), Adapter("lora", dropout=0.25), 0)
    linear = model.layers[0].attention.query
    x = torch.ones(4000, 12, 24).double()
    linear.told[:] = [torch.stack([torch.arange(4000)] * 3, 1), torch.arange(12)]
    gone = linear.gone(0.25, x, 0)
    other = model.layers[0].attention.value.gone(0.25, x, 0)
    assert gone.double().mean().item() == pytest.approx(0.25, abs=0.002)
    pairs = ((gone, other), (gone[:, 1:], gone[:, :-1]), (gone[1:], gone[:-1]))
    for one, two in pairs:  # of two adapters, of neighbours, of two rows
        assert (one == two).double().mean().item() == pytest.approx(0.625, abs=0.002)
    low = linear.adapters["default"]
    assert_close(low(x, linear.gone).mean((0, 1)), low(x, None)[0, 0], 0.05)


# --- many processes -------------------------------------------------------------------------------

HOW = Adapter("lora", 3, on=("query", "value", "output", "down", "layers.1.ffn.up"), dropout=0.2)


def first(config: ModelConfig, how: Adapter) -> Transformer:
    return tuned(drawn(config, 0), how, 0)


def alone_with(how: Adapter, config: ModelConfig, steps: int) -> Alone:
    model = first(config, how)
    optimizer = build(model.named_parameters(), OPTIM, torch.float64)
    made = [plain_update(model, batches_of(config, s), optimizer, OPTIM.lr, OPTIM, torch.float64)
            for s in range(steps)]  # fmt: skip
    return Alone(
        [(m.loss, m.norm) for m in made],
        {n: p.grad for n, p in learnt(model).items()},
        {n: p.detach() for n, p in model.named_parameters()},
    )


def part_with(how, config, plan, mesh, batches, optim, dtype):
    """As parallel.trained, with adapters on a base."""
    part = Part(config, plan, mesh, how)
    whole = dict(first(config, how).named_parameters())
    part.to(dtype)
    for p in part.parameters():
        p.data.copy_(p.place.of(whole[p.place.name].data))
    optimizer = build_parts(part, optim, dtype, plan)
    made = [update(part, b, optimizer, optim.lr, optim, plan, dtype) for b in batches]
    return part, optimizer, made


PLANS = [Plan(), Plan(2), Plan(1, 2), Plan(1, 1, 2), Plan(2, 2, 2), Plan(1, 1, 4), Plan(2, zero=1),
         Plan(2, zero=2), Plan(2, zero=3), Plan(2, 1, 2, zero=3), Plan(2, 2, zero=1),
         Plan(1, 1, 2, sequence=True), Plan(2, 1, 2, zero=2, sequence=True)]  # fmt: skip


def in_short(plan) -> str:
    return f"{plan.data}x{plan.pipeline}x{plan.tensor}z{plan.zero}{'s' * plan.sequence}"


@pytest.mark.parametrize("plan", PLANS, ids=in_short)
def test_any_plan_computes_what_one_process_computes(ranks, plan):
    found = ranks.run(together, partial(part_with, HOW), MODEL, plan, 3, torch.float64, OPTIM)
    found = [said for said in found if said]
    assert len(found) == plan.size
    apart = differences(alone_with(HOW, MODEL, 3), found)
    assert all(apart[what] <= law for what, law in LAWS.items()), apart


BARE = [Plan(1, 2), Plan(2, 2), Plan(2, 2, zero=1), Plan(2, zero=3), Plan(1, 1, 2)]


@pytest.mark.parametrize("plan", BARE, ids=in_short)
def test_a_block_or_a_stage_may_have_nothing_that_is_trained(ranks, plan):
    how = replace(HOW, on=("layers.3.*",))
    found = ranks.run(together, partial(part_with, how), MODEL, plan, 2, torch.float64, OPTIM)
    apart = differences(alone_with(how, MODEL, 2), [said for said in found if said])
    assert all(apart[what] <= law for what, law in LAWS.items()), apart


@pytest.mark.parametrize("plan", [Plan(2, zero=3), Plan(2, 1, 2, zero=1)], ids=in_short)
def test_so_does_an_encoder_decoder(ranks, plan):
    config = replace(MODEL, arch="encdec", position="t5", layers=2)
    how = replace(HOW, on=("query", "cross.key", "cross.value", "layers.1.ffn.down"))
    found = ranks.run(together, partial(part_with, how), config, plan, 2, torch.float64, OPTIM)
    apart = differences(alone_with(how, config, 2), [said for said in found if said])
    assert all(apart[what] <= law for what, law in LAWS.items()), apart


def test_exact_plans_are_for_all_weights():
    with pytest.raises(UserError, match="leave one of them out"):
        check(MODEL, Plan(exact=True), HOW)


def test_embedding_and_head_are_for_one_process():
    with pytest.raises(UserError, match="for one process, not for a --plan"):
        Part(SMALL, Plan(), None, Adapter("lora", on=("embedding",)))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_each_have_their_own(tied):
    """A tied matrix is one, with one adapter in both of its uses."""
    model = drawn(replace(SMALL, tied=tied), 0)
    before, plain_model = logits(model), drawn(replace(SMALL, tied=tied), 0)
    on = ("embedding",) if tied else ("embedding", "head")
    adapt(model, Adapter("lora", 2, on=on), 0)
    assert torch.equal(logits(model), before)
    assert sum(p.numel() for p in learnt(model).values()) == len(on) * 2 * (19 + 24)
    for name, one in adapted(model).items():
        low = one.adapters["default"]
        low.B.data.normal_(generator=generator(0, name))
        getattr(plain_model, name).data += low.delta().detach()
    assert_close(logits(model), logits(plain_model), 1e-12)
    assert not torch.allclose(logits(model), before)
    assert_close(logits(plain(model)), logits(plain_model), 1e-12)
    mark = frozen_mark(model)
    use(model, {})
    assert torch.equal(logits(model), before) and frozen_mark(model) == mark


# --- a base of few bits ---------------------------------------------------------------------------


class Stepped(Linear):
    """A linear whose weights are whole multiples of a step."""

    step = 0.1

    def like(self, matrix):
        return super().like((matrix / self.step).round() * self.step)


def stepped(delta: float) -> Transformer:
    """Weights of queries are multiples of the step, and an adapter adds `delta` to each."""
    model = drawn(SMALL, 0)
    for name, linear in list(linears(model).items()):
        if name.endswith("query"):
            new = Stepped(*reversed(linear.shape)).double()
            exchange(model, name, new.like(linear.weight.data))
    adapt(model, Adapter("lora", 1, alpha=1.0, on=("query",)), 0)
    for linear in adapted(model).values():
        low = linear.adapters["default"]
        low.A.data.fill_(delta), low.B.data.fill_(1.0)
    return model


@pytest.mark.parametrize(("delta", "left"), [(0.04, 0.0), (0.06, 0.1 / 0.06), (0.1, 1.0)])
def test_what_of_a_change_survives_coarse_steps(delta, left):
    """Below half a step nothing; above it a whole step, which here is more than was asked for."""
    assert survival(stepped(delta)) == pytest.approx(left, abs=1e-9)


def test_a_merge_that_loses_what_was_learnt_is_refused():
    model = stepped(0.04)
    with pytest.raises(UserError, match="0% of what the adapter adds would be left"):
        plain(model)
    assert torch.equal(logits(plain(model, force=True)), logits(use(model, {}) or model))
    assert survival(tuned(drawn(SMALL, 0), Adapter("lora"), 0)) == pytest.approx(1, abs=1e-12)
    adapt(fresh := drawn(SMALL, 0), Adapter("lora"), 0)
    assert survival(fresh) == 1.0  # of nothing, all
    plain(stepped(0.1))
