"""Every pair of variants works together: a step, causality, padding, cache; or is refused by name.

A model is a choice on each axis. There are too many models to try, but mistakes mostly need two
choices that do not get on, so that a few dozen models in which each pair of choices meets suffice.
"""

from dataclasses import replace
from itertools import combinations, product
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import assert_close
from test_model import random_ids, random_model

from attention import causal_mask, full_mask
from generate import Cache, next_logits
from kernels.mask import Mask
from model import ModelConfig, Transformer
from run import UserError

B, T = 2, 10
BASE = ModelConfig(
    dim=16, layers=2, heads=4, context=16, vocab_size=13, reach=8, buckets=6, window=4,
    rope_context=6,
)  # fmt: skip
NAMED = ("arch", "attention", "position", "norm", "order", "activation", "rope_scaling")
AXES = {
    **{name: get_args(get_type_hints(ModelConfig)[name]) for name in NAMED},
    "kv_heads": (0, 1, 2), "head_width": (0, 6), "rope_interleaved": (False, True),
    **dict.fromkeys(("bias", "tied", "qk_norm", "embed_norm", "scaled_head"), (False, True)),
    "segments": (0, 2), "score_scale": (0.0, 1.0),
}  # fmt: skip


def allowed(choices: dict) -> bool:
    try:
        replace(BASE, **choices)
    except UserError:
        return False
    return True


def pairs_of(choices: dict) -> set:
    return {*combinations(sorted(choices.items()), 2)}


def covering() -> list[dict]:
    """Models in which every pair of choices that is allowed meets: greedily, pair by pair."""
    left = {
        pair
        for one, two in combinations(sorted(AXES), 2)
        for pair in product(((one, x) for x in AXES[one]), ((two, y) for y in AXES[two]))
        if allowed(dict(pair))
    }
    models = []
    while left:
        model = dict(min(left, key=repr))
        for name, values in AXES.items():
            if name not in model:
                ways = [model | {name: value} for value in values]
                ways = [way for way in ways if allowed(way)]
                model = max(ways, key=lambda way: len(pairs_of(way) & left))
        models.append(model)
        left -= pairs_of(model)
    return models


MODELS = covering()


def test_every_axis_is_here():
    """A setting that is no size and no rate is an axis: its values meet all others."""
    axes = {
        name for name, kind in get_type_hints(ModelConfig).items() if get_args(kind) or kind is bool
    }
    assert axes - {"preset"} == {n for n in AXES if n not in ("kv_heads", "head_width", "segments",
                                                             "score_scale")}  # fmt: skip
    assert 20 <= len(MODELS) <= 100


def name_of(model: dict) -> str:
    return "-".join(str(model[name]) for name in NAMED)


@pytest.fixture(params=MODELS, ids=name_of)
def config(request) -> ModelConfig:
    return replace(BASE, **request.param)


def hidden(model: Transformer, ids, source, mask=None, source_mask=None):
    """The model's hidden states of ids, which in an encdec stand behind a source."""
    if model.config.arch != "encdec":
        return model(ids, mask=mask)
    memory = model.encode(source, source_mask)
    return model(ids, mask=mask, memory=memory, cross_mask=source_mask and cross(source_mask, ids))


def cross(source_mask: Mask, ids) -> Mask:
    """The decoder sees of the source what its first token sees."""
    lo, hi = (x[:, :1].expand(-1, ids.shape[1]) for x in (source_mask.lo, source_mask.hi))
    return Mask(lo, hi)


def test_a_step_lowers_the_loss(config):
    """And every weight has a finite gradient."""
    model = random_model(config, 0)
    ids, source, targets = (random_ids(config, n, B, T) for n in range(3))

    def loss():
        logits = model.logits(hidden(model, ids, source))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    before = loss()
    before.backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p -= 1e-4 * p.grad / norm
    assert loss() < before


def test_who_sees_whom(config):
    """A changed token changes itself; in a decoder no bit before it, elsewhere what sees it."""
    model = random_model(config, 1)
    ids, source = (random_ids(config, n, B, T) for n in (3, 4))
    assert not hasattr(model.position, "causal") or model.position.causal != (
        config.arch == "encoder"
    )
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % config.vocab_size
    before, after = hidden(model, ids, source), hidden(model, other, source)
    assert (before[:, 5] != after[:, 5]).any()
    if config.arch == "encoder":
        assert (before[:, 4] != after[:, 4]).any()
    else:
        assert torch.equal(before[:, :5], after[:, :5])
    if config.arch == "encdec":
        changed = hidden(model, ids, other)
        assert all((before[:, t] != changed[:, t]).any() for t in range(T))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_padding_and_cache_change_nothing(config, dtype, bound):
    model = random_model(config, 2).to(dtype)
    ids, source, pads = (random_ids(config, n, 1, size) for n, size in ((5, T), (6, T), (7, 3)))
    want = model.logits(hidden(model, ids, source))
    if config.arch == "encoder":
        padded = torch.cat((ids, pads), 1)
        mask = full_mask(T + 3, T)
        got = model.logits(model(padded, mask=mask))[:, :T]
        return assert_close(got, want, bound)
    if config.arch == "encdec":
        padded = torch.cat((source, pads), 1)
        mask = full_mask(T + 3, T)
        assert_close(model.logits(hidden(model, ids, padded, None, mask)), want, bound)
        memory = model.encode(source)
        _, past = model.extend(ids[:, :4], None, memory=memory)
        rest, _ = model.extend(ids[:, 4:], past, memory=memory)
        return assert_close(model.logits(rest), want[:, 4:], bound)
    cache = Cache(model, 1, T + 3)
    padded, place = torch.cat((pads, ids), 1), torch.arange(T + 3)
    for part in (slice(0, 7), slice(7, 12), slice(12, 13)):
        got = next_logits(model, cache, padded[:, part], place[part], torch.tensor([3]))
        assert_close(got, want[:, part.stop - 4], bound)


def test_a_mask_says_the_same_as_its_default(config):
    model, ids, source = random_model(config, 3), *(random_ids(config, n, B, T) for n in (8, 9))
    mask = full_mask(T, T) if config.arch == "encoder" else causal_mask(T)
    source_mask = full_mask(T, T) if config.arch == "encdec" else None
    assert torch.equal(hidden(model, ids, source), hidden(model, ids, source, mask, source_mask))
