"""Laws of dropout.py, and of dropout in models and runs."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from helpers import assert_close, normals, seeds
from hypothesis import given
from hypothesis import strategies as st
from models import shaken
from test_model import random_ids, random_model

from dropout import WORD, Drop, drawn_from, dropped, of_65536, philox
from model import ModelConfig, Transformer
from objectives import Batch
from recompute import KINDS, random_batch, recompute
from run import UserError
from step import accumulate, evaluate, loss_sum, replay, write_replay

SMALL = ModelConfig(dim=16, layers=2, heads=4, context=12, vocab_size=11, dropout=0.3)
shares = st.floats(0.05, 0.95)
words = st.integers(0, WORD)


# --- the generator --------------------------------------------------------------------------------

PI = "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0"
KNOWN = [  # of the file kat_vectors of Random123: rounds, counter and key, result
    (7, "00000000 " * 6, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff " * 6, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 " * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff " * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("rounds, given, want", KNOWN)
def test_philox_gives_the_published_words(rounds, given, want):
    given, want = ([int(word, 16) for word in text.split()] for text in (given, want))
    each = [torch.tensor([word, 1]) for word in given]  # beside another counter
    got = philox(each[:4], each[4:], rounds)
    assert [word[0].item() for word in got] == want
    if rounds == 10:
        assert [word[0].item() for word in philox(each[:4], each[4:])] == want


def philox_of_numbers(counter, key):
    """As the paper has it, in whole numbers of any size."""
    r0, l0, r1, l1 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * r0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * r1, 2**32)
        r0, l0, r1, l1 = high1 ^ l0 ^ k0, low1, high0 ^ l1 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return r0, l0, r1, l1


@given(st.tuples(*[words] * 4), st.tuples(words, words))
def test_philox_is_the_paper(counter, key):
    got = philox([torch.tensor(word) for word in counter], key)
    assert tuple(int(word) for word in got) == philox_of_numbers(counter, key)


@given(words, words, words, st.integers(0, 1000), words, st.integers(0, 4000), st.floats(0, 0.999))
def test_a_number_is_dropped_by_its_own_coordinates(seed, step, row, place, at, channel, share):
    word = philox_of_numbers((row, place, at, channel // 8), (seed, step))[channel % 8 // 2]
    half = word // 2**16 if channel % 2 else word % 2**16
    draws, positions = drawn_from(seed, step, row, 1), torch.tensor([at])
    got = dropped(share, draws, place, positions, 1, channel)
    assert got.shape == (1, 1, 1) and got.item() == (half < round(share * 2**16))


def test_seeds_and_rows_of_any_size_have_draws():
    assert drawn_from(-1, 3, 2**32 - 1, 2).tolist() == [[WORD, 3, WORD], [WORD, 3, 0]]
    assert drawn_from(2**70 + 5, 0, 0, 1).tolist() == [[5, 0, 0]]


# --- the mask -------------------------------------------------------------------------------------


@given(seeds, shares, st.data())
def test_a_part_s_mask_is_the_part_of_the_mask(seed, share, data):
    """Of rows, positions and channels at once, wherever the part begins and ends."""
    sizes = [data.draw(st.integers(1, most)) for most in (5, 9, 23)]
    parts = []
    for size in sizes:
        start = data.draw(st.integers(0, size - 1))
        parts.append(slice(start, data.draw(st.integers(start + 1, size))))
    B, T, C = sizes
    rows, at, channels = parts
    whole = dropped(share, drawn_from(seed, 7, 90, B), 5, torch.arange(T), C)
    some = drawn_from(seed, 7, 90 + rows.start, rows.stop - rows.start)
    width = channels.stop - channels.start
    got = dropped(share, some, 5, torch.arange(T)[at], width, channels.start)
    assert torch.equal(got, whole[rows, at, channels])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
@given(seeds, shares, words, st.integers(1, 40))
def test_cuda_draws_the_same_mask(seed, share, step, C):
    draws, at = drawn_from(seed, step, 90, 3), torch.arange(5)
    got = dropped(share, draws.cuda(), 6, at.cuda(), C, 3)
    assert torch.equal(got.cpu(), dropped(share, draws, 6, at, C, 3))


SIZE = (8, 64, 64)  # rows, positions, channels of the masks below: 32,768 numbers


def mask(seed=0, step=0, row=0, place=0, share=0.5):
    B, T, C = SIZE
    return dropped(share, drawn_from(seed, step, row, B), place, torch.arange(T), C)


def assert_like(count, trials, share):
    """Within 5 standard errors of a binomial distribution: once in two million by chance."""
    assert abs(count - trials * share) <= 5 * (trials * share * (1 - share)) ** 0.5 + 1


@given(seeds, words, words, st.integers(0, 1000), st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.999]))
def test_the_share_is_dropped_in_all_and_along_each_index(seed, step, row, place, share):
    got = mask(seed, step, row, place, share)
    assert_like(got.sum().item(), got.numel(), share)
    for axis in range(3):
        sums = got.sum([a for a in range(3) if a != axis])
        for count in sums.tolist():
            assert_like(count, got.numel() // len(sums), share)


@given(seeds, words, words, st.integers(0, 1000))
def test_neighbours_know_nothing_of_each_other(seed, step, row, place):
    """Two numbers, some places apart along any indices, differ as often as not."""
    got = mask(seed, step, row, place)
    B, T, C = SIZE
    for b, t, c in product(range(4), (0, 1, 2, 32), (0, 1, 2, 3, 4, 8, 32)):
        if (b, t, c) != (0, 0, 0):
            differ = got[b:, t:, c:] ^ got[: B - b, : T - t, : C - c]
            assert_like(differ.sum().item(), differ.numel(), 0.5)


@given(seeds, st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 500))
def test_seeds_steps_rows_and_places_have_masks_of_their_own(seed, step, row, place):
    """Of neighbours, of such that are a power of 2 apart, and of exchanged numbers."""
    places = [mask(seed, step, row, place + n) for n in range(12)]  # of three layers
    others = [mask(step, seed, row, place), mask(seed, row, step, place), mask(seed, step, place)]
    others += [mask(seed, step, row + n, place) for n in (8, 64, 2**16)]
    others += [mask(seed, step + n, row, place) for n in (1, 2, 8, 2**16)]
    others += [mask(seed + n, step, row, place) for n in (1, 2, 8, 2**16)]
    everyone = {tuple(x.flatten().tolist()[:200]): x for x in places + others}
    for one, two in combinations(everyone.values(), 2):
        assert_like((one ^ two).sum().item(), one.numel(), 0.5)
    assert len({tuple(x.flatten().tolist()[:200]) for x in places}) == 12


# --- what is dropped ------------------------------------------------------------------------------


def drop_of(seed, B, T, share):
    return Drop(share, drawn_from(seed, 1, 2, B), torch.arange(T))


@given(seeds, shares)
def test_what_is_left_is_divided_by_its_share(seed, share):
    (x,) = normals(seed, (2, 3, 10))
    gone = dropped(share, drawn_from(seed, 1, 2, 2), 6, torch.arange(3), 10)
    left = 1 - of_65536(share) / 65536
    assert abs(left - (1 - share)) <= 2**-17
    assert_close(drop_of(seed, 2, 3, share)(x, 6), torch.where(gone, 0, x / left))


def test_the_largest_share_leaves_something():
    assert of_65536(1 - 1e-9) == 65535 and of_65536(1e-9) == 0
    got = drop_of(0, 1, 1, 1 - 1e-9)(torch.ones(1, 1, 2**18), 0)
    assert {0.0, 65536.0} == {*got.flatten().tolist()}


@given(seeds, shares)
def test_the_gradient_goes_the_same_way(seed, share):
    (x,) = normals(seed, (2, 3, 10))
    drop = drop_of(seed, 2, 3, share)
    assert torch.autograd.gradcheck(lambda x: drop(x, 6), x)
    (dx,) = torch.autograd.grad(drop(x, 6).sum(), x)
    assert torch.equal(dx, drop(torch.ones_like(x), 6))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_mean_over_many_steps_is_the_number_itself(share):
    steps = 4000
    (x,) = normals(3, (1, 2, 9))
    draws = torch.cat([drawn_from(5, step, 0, 1) for step in range(steps)])
    share = of_65536(share) / 65536
    mean = Drop(share, draws, torch.arange(2))(x.expand(steps, -1, -1), 0).mean(0)
    error = x[0].abs() * (share / (1 - share) / steps) ** 0.5
    assert ((mean - x[0]).abs() <= 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays(dtype):
    assert drop_of(0, 2, 3, 0.5)(torch.ones(2, 3, 4, dtype=dtype), 0).dtype == dtype


# --- in a model -----------------------------------------------------------------------------------

architectures = st.sampled_from(["decoder", "encoder", "encdec"])
orders = st.sampled_from(["pre", "post", "deepnorm"])


@given(architectures, orders, seeds)
def test_without_draws_or_a_share_every_bit_is_as_before(arch, order, seed):
    config = replace(SMALL, arch=arch, order=order)
    model, plain = (random_model(replace(config, dropout=p), seed) for p in (0.3, 0.0))
    batch = random_batch(config, 3, seed)
    still = replace(batch, draws=None)
    want = loss_sum(plain, still)
    assert batch.draws is not None
    assert torch.equal(loss_sum(plain, batch), want)
    assert torch.equal(loss_sum(model, still), want)
    assert torch.equal(loss_sum(model.train(), still), want)
    assert not torch.equal(loss_sum(model, batch), want)
    assert not torch.equal(loss_sum(model.eval(), batch), want)  # draws are all that decides
    assert evaluate(model, [still])[0] == want.item()


@pytest.mark.parametrize("arch, branches", [("decoder", 2), ("encoder", 2), ("encdec", 5)])
def test_each_branch_has_a_place_of_its_own(arch, branches, monkeypatch):
    """In all layers of both stacks; and the rest of what is asked is that of the batch."""
    asked = []
    monkeypatch.setattr(Drop, "__call__", lambda drop, x, n: asked.append((n, *drop)) or x)
    model = random_model(replace(SMALL, arch=arch, layers=3), 0)
    batch = random_batch(model.config, 2)
    loss_sum(model, batch)
    assert len({place for place, *_ in asked}) == len(asked) == 3 * branches
    for _, share, draws, positions in asked:
        assert share == 0.3 and draws is batch.draws
        assert positions.tolist() == [*range(model.config.context)]


@given(seeds, orders)
def test_a_branch_is_dropped_behind_its_last_matrix(seed, order):
    """A block by hand, with masks in the place of dropout."""
    model = random_model(replace(SMALL, layers=1, order=order, dropout=0.4), seed)
    ids, block = random_ids(SMALL, seed, 2, 9), model.layers[0]
    draws, x = drawn_from(4, 2, 6, 2), torch.nn.functional.embedding(ids, model.embedding)
    left = 1 - of_65536(0.4) / 65536
    kept = [(~dropped(0.4, draws, n, torch.arange(9), 16)).double() / left for n in (0, 1)]
    seen = {}
    hook = block.attention.register_forward_pre_hook(lambda _, given: seen.update(given=given[1:]))
    got = model(ids, draws=draws)
    hook.remove()

    def looked(h):
        return kept[0] * block.attention(h, *seen["given"])[0]

    if order == "pre":
        x = x + looked(block.attention_norm(x))
        want = model.norm(x + kept[1] * block.ffn(block.ffn_norm(x)))
    else:
        x = block.attention_norm(block.alpha * x + looked(x))
        want = block.ffn_norm(block.alpha * x + kept[1] * block.ffn(x))
    assert_close(got, want, 1e-11)


def test_a_part_of_the_layers_draws_what_the_whole_does():
    """Two stages of a pipeline, each with its own blocks, are the model."""
    model = random_model(replace(SMALL, layers=4), 1)
    ids, draws = random_ids(SMALL, 2, 2, 9), drawn_from(3, 1, 0, 2)
    want = model(ids, draws=draws)
    layers, norm = model.layers, model.norm
    model.layers, model.norm = layers[:3], None
    x = model(ids, draws=draws)
    model.layers, model.norm = layers[3:], norm
    model.embed = lambda *_: x
    assert torch.equal(model(ids, draws=draws), want)


@given(seeds)
def test_behind_a_past_positions_go_on(seed):
    model = random_model(SMALL, seed)
    ids, draws = random_ids(SMALL, seed, 2, 9), drawn_from(seed, 1, 0, 2)
    want = model(ids, draws=draws)
    first, past = model.extend(ids[:, :4], None, draws=draws)
    rest, _ = model.extend(ids[:, 4:], past, draws=draws)
    assert_close(torch.cat((first, rest), 1), want, 1e-11)


@given(seeds, architectures, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_however_rows_are_cut_into_batches_the_masks_are_the_same(seed, arch, sizes):
    """Loss and gradient of the parts, with draws of their own rows, are those of the whole."""
    config = replace(SMALL, arch=arch)
    whole = replace(
        random_batch(config, sum(sizes), seed), draws=drawn_from(seed, 4, 100, sum(sizes))
    )
    parts, first = [], 0
    for size in sizes:
        part = whole.each(lambda x, a=first, n=size: x[a : a + n])
        parts.append(replace(part, draws=drawn_from(seed, 4, 100 + first, size)))
        first += size
    found = []
    for batches in ([whole], parts, parts[::-1]):
        model = random_model(config, seed)
        loss, _ = accumulate(model, batches)
        found.append((loss, [p.grad for p in model.parameters()]))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        for got, want in zip(grads, found[0][1], strict=True):
            assert_close(got, want, 1e-12)


@given(seeds, architectures, st.sampled_from([w for w in KINDS if w != "none"]))
def test_what_is_computed_again_is_dropped_again(seed, arch, what):
    """Though other rows and steps have gone through the model since."""
    model = random_model(replace(SMALL, arch=arch), seed)
    one, two = (random_batch(model.config, 2, seed + n) for n in (0, 1))
    two = replace(two, draws=drawn_from(seed, 9, 50, 2))
    found = []
    for kind in ("none", what):
        recompute(model, kind)
        model.zero_grad()
        losses = [loss_sum(model, batch) for batch in (one, two)]
        with torch.no_grad():
            loss_sum(model, replace(one, draws=None))
        sum(losses).backward()
        found.append([*losses, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))


def test_a_replay_drops_the_same(tmp_path):
    model = shaken(Transformer(SMALL), 0)
    batches = [replace(random_batch(SMALL, 2, n), draws=drawn_from(3, n, 7, 2)) for n in range(2)]
    write_replay(path := tmp_path / "step.safetensors", model, batches, None)
    loss, _ = accumulate(model, batches)
    still, _ = accumulate(model, [replace(batch, draws=None) for batch in batches])
    assert f"loss {loss:.4f}" in replay(path) and f"{loss:.4f}" != f"{still:.4f}"


def test_a_batch_is_rebuilt_with_its_draws():
    batch = random_batch(SMALL, 3)
    again = batch.each(torch.clone)
    assert isinstance(again, Batch) and torch.equal(again.draws, batch.draws)
    assert again.source is None and len([*again]) == len([*batch]) == 5


@pytest.mark.parametrize("share", [1.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"--model.dropout .* must be 0 or more, below 1"):
        ModelConfig(dropout=share)


def test_a_saved_model_does_not_tell_of_dropout(tmp_path):
    config = replace(SMALL, qk_norm=False)
    for name, share in (("with", 0.3), ("without", 0.0)):
        Transformer(replace(config, dropout=share)).save(tmp_path / name)
    files = [(tmp_path / name / "config.json").read_text() for name in ("with", "without")]
    assert files[0] == files[1]
    assert Transformer.load(tmp_path / "with").config.dropout == 0
