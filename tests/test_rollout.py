"""Laws of rollout.py: the sampler and the whole text agree, and pads change nothing."""

from dataclasses import replace

import pytest
import torch
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DECODERS, SHAPES, shaken

from bpe import BPE
from model import Transformer
from rollout import Texts, likely, sample, states, upto
from run import UserError
from vocabulary import END_OF_TEXT
from writer import Writer

TOKENIZER = BPE.bytes((END_OF_TEXT,))
NONE = 257  # a row of the embedding that is no token
STOP = {256, *range(40)}


def writer(kind="llama", seed=0, context=40, dtype=torch.float64, sure=2):
    """sure: of some tokens so much that a wrong place shows."""
    config = replace(SHAPES[kind], vocab_size=258, context=context)
    model = shaken(Transformer(config), seed).to(dtype)
    for p in model.parameters():
        p.data *= sure
    return Writer(model.eval(), TOKENIZER, [256], STOP)


ids = st.integers(0, 255)
prompts = st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=5)


def whole(mine, texts, temperature=1.0):
    with torch.no_grad():
        return likely(mine.model, states(mine.model, texts), texts, temperature, [NONE])


@pytest.mark.parametrize("kind", DECODERS)
@given(seeds, prompts, st.floats(0.5, 2), st.integers(1, 12))
def test_the_sampler_and_the_whole_text_are_equally_sure(kind, seed, asked, temperature, tokens):
    mine = writer(kind, seed)
    drawn = sample(mine, asked, tokens, temperature, seed)
    assert torch.allclose(drawn.log_p, whole(mine, drawn.texts, temperature), rtol=0, atol=1e-12)
    there = drawn.texts.mask != 0
    assert not (drawn.texts.tokens[there] == NONE).any()
    assert (drawn.log_p[there] < 0).all() and not drawn.log_p[~there].any()


@given(seeds, prompts)
def test_also_in_single_precision(seed, asked):
    mine = writer("llama", seed, dtype=torch.float32, sure=1)
    drawn = sample(mine, asked, 12, 1.0, seed)
    far = (drawn.log_p - whole(mine, drawn.texts)).abs()
    assert (far / drawn.log_p.abs().clamp(min=1)).max() < 1e-6


@given(seeds, prompts, st.integers(1, 12))
def test_what_is_drawn_is_cut_at_its_end(seed, asked, tokens):
    mine = writer("llama", seed)
    texts, _, ended, replies = sample(mine, asked, tokens, 1.0, seed)
    for row, n, m, prompt, over, reply in zip(
        texts.ids.tolist(), texts.prompt, texts.response, asked, ended, replies, strict=True
    ):
        said = row[n : n + m]
        assert row[:n] == prompt and row[n + m :] == [0] * (len(row) - n - m)
        assert over == (said[-1] in STOP) and not STOP.intersection(said[:-1])
        assert over or len(said) == tokens
        assert reply == TOKENIZER.decode([t for t in said if t not in STOP])


@given(seeds, prompts)
def test_each_draws_from_its_own_stream(seed, asked):
    mine = writer("llama", seed)
    together = sample(mine, asked, 9, 1.0, seed)
    for i, prompt in enumerate(asked):
        alone = sample(mine, [prompt], 9, 1.0, seed, [i])
        assert alone.replies == together.replies[i : i + 1]


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=30)
@given(seeds, prompts, st.integers(0, 16), st.integers(0, 16))
def test_pads_change_nothing(kind, seed, asked, before, behind):
    """The same responses with pads on both sides, row by row others; and some rows alone."""
    mine, rng = writer(kind, seed, context=60), torch.Generator().manual_seed(seed)
    said = [torch.randint(256, (int(n),), generator=rng).tolist()
            for n in torch.randint(1, 12, (len(asked),), generator=rng)]  # fmt: skip
    plain, padded = (
        Texts.of(asked, said),
        Texts.of(asked, said, before=[(before + 5 * i) % 17 for i in range(len(asked))],
                 behind=behind),
    )  # fmt: skip
    right = whole(mine, plain)
    assert torch.equal(plain.tokens[plain.mask != 0], padded.tokens[padded.mask != 0])
    assert torch.allclose(whole(mine, padded), right, rtol=0, atol=1e-12)
    for i, (prompt, response) in enumerate(zip(asked, said, strict=True)):
        text = torch.tensor([prompt + response])
        logits = mine.model.logits(mine.model(text)).index_fill(-1, torch.tensor([NONE]), -9e99)
        by_hand = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        by_hand = by_hand.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert torch.allclose(right[i, : len(response)], by_hand, rtol=0, atol=1e-12)
        alone = padded.rows(torch.tensor([i]))
        assert torch.allclose(whole(mine, alone)[0], by_hand, rtol=0, atol=1e-12)
        assert alone.ids.shape[1] == int(padded.before[i]) + len(prompt) + len(response)


def test_a_prompt_that_fills_the_context_is_one_sentence():
    with pytest.raises(UserError, match="no room"):
        sample(writer(context=8), [[1] * 8], 4, 1.0, 0)


def test_upto():
    assert upto([5, 6, 7, 6], {6}) == [5, 6] and upto([5, 7], {6}) == [5, 7]
