"""Laws of objectives.py: inputs and targets rebuild the text; what is not asked teaches nothing."""

from dataclasses import replace
from itertools import combinations
from math import comb, inf, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from attention import prefix_mask
from kernels.cross_entropy import cross_entropy, cross_entropy_obvious
from model import ModelConfig, Transformer
from objectives import (
    IGNORE,
    MASK,
    MODES,
    OBJECTIVES,
    ROLES,
    SENTINELS,
    SHORTEST,
    T5,
    UL2,
    Batch,
    Denoiser,
    Rows,
    amounts,
    causal,
    denoise,
    hide,
    masked,
    objective_for,
    prefix,
    vocabulary_for,
    widths_for,
)
from packing import best_fit, cut, fill
from run import UserError
from step import loss_sum

END = 0
V = 13  # of which all but END are ordinary
SPECIAL = {text: V + i for i, text in enumerate((MASK, *MODES, *SENTINELS, *ROLES))}
KNOWN = V + len(SPECIAL)
VOCABULARY = vocabulary_for(OBJECTIVES["ul2"], SPECIAL, range(KNOWN), END)
SENTINEL = {SPECIAL[text]: i for i, text in enumerate(SENTINELS)}
MODE = {SPECIAL[text]: text for text in MODES}
# Conversations have roles, which these texts lack: tests/test_chat.py.
PAIRS = [(name, arch) for name, o in OBJECTIVES.items() for arch in o.fits if name != "chat"]
DENOISERS = sorted({*T5, *UL2})

sizes = st.lists(st.integers(1, 70), min_size=1, max_size=10)
widths = st.integers(1, 100)
each_pair = pytest.mark.parametrize("name, arch", PAIRS)


class Documents:
    """What `fill` asks of Shards: random tokens of 1 … V − 1, END before each document."""

    def __init__(self, lengths: list[int], seed: int):
        rng = np.random.default_rng(seed)
        self.texts = [np.array([END, *rng.integers(1, V, n - 1)]) for n in lengths]

    def document(self, i: int) -> np.ndarray:
        return self.texts[i]


def packed(lengths: list[int], T: int, seed: int) -> Rows:
    pieces = cut(np.array(lengths), T, np.random.default_rng(seed))
    return fill(best_fit(pieces, T), Documents(lengths, seed), T, END)


def alike(n: int, count: int, B: int = 1) -> Rows:
    """B rows of `count` pieces of n tokens."""
    starts = (torch.arange(count) * n).repeat_interleave(n).expand(B, -1).contiguous()
    ids = torch.randint(1, V, starts.shape, generator=stream(n))
    nexts = torch.cat([ids[:, 1:], torch.full((B, 1), END)], 1)
    nexts[:, n - 1 :: n] = END
    return Rows(ids, nexts, starts)


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: str, arch: str, rows: Rows, seed: int = 0) -> Batch:
    return OBJECTIVES[name].make(rows, stream(seed), VOCABULARY, arch)


# --- what comes back from a batch, one token at a time --------------------------------------------


def runs(lo: list[int]) -> list[range]:
    """Neighbours with the same lo, which must be where they begin."""
    borders = [t for t, first in enumerate(lo) if first == t]
    found = [range(a, b) for a, b in zip(borders, [*borders[1:], len(lo)], strict=True)]
    assert lo == [run[0] for run in found for _ in run]
    return found


def conversations(batch: Batch) -> list[list[tuple[list[int], list[int]]]]:
    """For each row its pieces in order, each as prompt and answer; padding as (END) and nothing.

    On the way: what sees what, that nothing of a prompt is asked, and all of an answer once.
    """
    fields = zip(*(field.tolist() for field in batch), strict=True)
    return [(two_sided if batch.source is not None else one_sided)(*row) for row in fields]


def one_sided(inputs, targets, lo, hi):
    found = []
    for run in runs(lo):
        last = hi[run[0]]  # of the prompt
        assert last in run
        assert [hi[t] for t in run] == [max(t, last) for t in run]
        assert all(targets[t] == IGNORE for t in range(run[0], last))
        answer = [targets[t] for t in range(last, run[-1] + 1)]
        assert IGNORE not in answer or answer == [IGNORE]
        assert [inputs[t] for t in range(last + 1, run[-1] + 1)] == answer[:-1]
        found.append((inputs[run[0] : last + 1], answer if answer != [IGNORE] else []))
    return found


def two_sided(inputs, targets, lo, hi, source, source_lo, source_hi, cross_lo, cross_hi):
    answers = {}
    for run in runs(lo):
        answer = [targets[t] for t in run]
        seen = {(cross_lo[t], cross_hi[t]) for t in run}
        assert [hi[t] for t in run] == [*run] and len(seen) == 1
        assert [inputs[t] for t in run] == [END, *answer[:-1]]
        (seen,) = seen
        if answer == [IGNORE]:
            assert seen[0] > seen[1]
        else:
            assert IGNORE not in answer and seen not in answers
            answers[seen] = answer
    found = []
    for run in runs(source_lo):
        assert {source_hi[s] for s in run} == {run[-1]}
        answer = answers.pop((run[0], run[-1]), [])
        found.append((source[run[0] : run[-1] + 1], answer))
    assert not answers
    return found


def unhidden(prompt: list[int], answer: list[int]) -> tuple[str, list[int], list[list[int]]]:
    """Mode, text and spans of a conversation in T5's language, read as its paper shows it."""
    if not answer:
        return "", prompt, []
    mode = MODE.get(prompt[0], "")
    assert answer[-1] == END
    spans = []
    for token in answer[:-1]:
        if token in SENTINEL:
            assert SENTINEL[token] == len(spans)
            spans.append([])
        else:
            spans[-1].append(token)
    assert all(spans)
    text, used = [], 0
    for token in prompt[1:] if mode else prompt:
        if token in SENTINEL:
            assert SENTINEL[token] == used and text and text[-1] not in SENTINEL
            text += spans[used]
            used += 1
        else:
            text.append(token)
    assert used == len(spans)
    return mode, text, spans


def texts(name: str, batch: Batch) -> list[list[list[int]]]:
    """The pieces of each row, rebuilt from inputs and targets."""
    if name == "masked":
        shown = torch.where(batch.targets == IGNORE, batch.inputs, batch.targets).tolist()
        ends = zip(shown, map(runs, batch.lo.tolist()), batch.hi.tolist(), strict=True)
        for _, found, hi in ends:
            assert hi == [run[-1] for run in found for _ in run]
        found = map(runs, batch.lo.tolist())
        return [[s[r[0] : r[-1] + 1] for r in rs] for s, rs in zip(shown, found, strict=True)]
    told = conversations(batch)
    if name in ("spans", "ul2"):
        return [[unhidden(*piece)[1] for piece in row] for row in told]
    return [[prompt + answer for prompt, answer in row] for row in told]


def pieces(rows: Rows, with_next: bool) -> list[list[list[int]]]:
    """What `texts` must give: the tokens of each piece, and the one that follows."""
    found = []
    for ids, nexts, starts in zip(*(x.tolist() for x in rows), strict=True):
        text = [run for run in runs(starts) if nexts[run[0]] != IGNORE]
        found.append([[*(ids[t] for t in r), *[nexts[r[-1]]] * with_next] for r in text])
    return found


# --- laws of all ----------------------------------------------------------------------------------


@each_pair
@given(sizes, widths, seeds)
def test_inputs_and_targets_rebuild_the_text(name, arch, lengths, T, seed):
    rows = packed(lengths, T, seed)
    found = texts(name, made(name, arch, rows, seed))
    want = pieces(rows, with_next=name in ("causal", "prefix"))
    assert len(found) == len(want)
    for row, text in zip(found, want, strict=True):
        assert row[: len(text)] == text
        assert all(padding == [END] for padding in row[len(text) :])


@each_pair
@pytest.mark.parametrize("n", [1, 2, 3, SHORTEST - 1, SHORTEST, SHORTEST + 1, 10, 15, 16])
def test_the_fullest_rows_lose_nothing(name, arch, n):
    """Rows of equal pieces, those lengths among them that need the most room for each token."""
    rows = alike(n, 60, 2)
    want = pieces(rows, with_next=name in ("causal", "prefix"))
    batches = [made(name, arch, rows)]
    for d in OBJECTIVES[name].denoisers:
        batches.append(denoise(rows, stream(n), VOCABULARY, arch, (d,)))
    for batch in batches:
        found = texts(name, batch)
        assert [row[: len(text)] for row, text in zip(found, want, strict=True)] == want


@each_pair
@given(sizes, widths, seeds)
def test_a_batch_is_a_pure_function(name, arch, lengths, T, seed):
    rows = packed(lengths, T, seed)
    before = [x.clone() for x in rows]
    one, two = (made(name, arch, rows, seed) for _ in range(2))
    assert all(map(torch.equal, one, two)) and all(map(torch.equal, rows, before))
    assert all(x.dtype == torch.long for x in one)
    assert all(0 <= int(ids.min()) <= int(ids.max()) < KNOWN for ids in (one.inputs, *[*one][4:5]))
    other = packed([T], T, seed)
    assert [x.shape[1] for x in one] == [x.shape[1] for x in made(name, arch, other)]


@each_pair
def test_another_seed_gives_another_batch(name, arch):
    rows = alike(50, 2)
    same = all(map(torch.equal, made(name, arch, rows, 1), made(name, arch, rows, 2)))
    assert same == (name == "causal")


@each_pair
@given(sizes, widths, seeds)
def test_what_is_not_asked_has_no_loss_and_no_gradient(name, arch, lengths, T, seed):
    batch = made(name, arch, packed(lengths, T, seed), seed)
    embedding, head = normals(seed, (KNOWN, 5), (KNOWN, 5))
    targets = batch.targets.flatten()
    hidden = embedding[batch.inputs.flatten()].detach().requires_grad_()
    loss = cross_entropy(hidden, head, targets)
    loss.backward()
    asked = targets != IGNORE
    assert (hidden.grad[~asked] == 0).all()
    assert (hidden.grad[asked] != 0).any(-1).all()
    only = cross_entropy_obvious(hidden[asked], head, targets[asked])
    assert torch.allclose(loss, only, rtol=1e-12)
    other = torch.where(asked[:, None], hidden, normals(seed + 1, hidden.shape)[0])
    assert torch.equal(cross_entropy(other.detach(), head, targets), loss)


def test_a_batch_is_rebuilt_from_its_tensors():
    for name, arch in PAIRS:
        batch = made(name, arch, alike(20, 3))
        again = Batch(*(x.clone() for x in batch))
        assert len([*batch]) == (9 if arch == "encdec" else 4)
        assert all(map(torch.equal, batch, again))
        assert torch.equal(replace(batch, targets=batch.inputs).hi, batch.hi)


# --- causal, masked, prefix -----------------------------------------------------------------------


@given(sizes, widths, seeds)
def test_causal_asks_for_the_next_token(lengths, T, seed):
    rows = packed(lengths, T, seed)
    inputs, targets, lo, hi = causal(rows)
    inside = lo[:, 1:] == lo[:, :-1]
    assert torch.equal(targets[:, :-1][inside], inputs[:, 1:][inside])
    assert int((targets != IGNORE).sum()) == sum(lengths)
    assert torch.equal(hi, torch.arange(T).expand_as(hi))


def near(found: float, wanted: float, draws: int) -> bool:
    """Within five standard deviations of a share of so many draws."""
    return abs(found - wanted) < 5 * sqrt(wanted * (1 - wanted) / draws)


def test_masked_has_bert_s_rates():
    """15 % are asked; of these 80 % masked, 10 % random, 10 % as they were (BERT, 3.1)."""
    rows = alike(100, 10, 1000)
    batch = masked(rows, stream(1), VOCABULARY)
    chosen = batch.targets != IGNORE
    assert near(chosen.double().mean().item(), 0.15, chosen.numel())
    shown, true = batch.inputs[chosen], rows.ids[chosen]
    assert len(true) > 100_000
    assert torch.equal(batch.targets[chosen], true)
    assert torch.equal(batch.inputs[~chosen], rows.ids[~chosen])
    is_mask = shown == SPECIAL[MASK]
    assert near(is_mask.double().mean().item(), 0.8, len(true))
    by_chance = 0.1 / (V - 1)  # random, and yet the same
    assert near((shown == true).double().mean().item(), 0.1 + by_chance, len(true))
    random = shown[~is_mask & (shown != true)]
    assert sorted(set(random.tolist())) == [*range(1, V)]
    for token in range(1, V):
        assert near((random == token).double().mean().item(), 1 / (V - 1), len(random))


@given(sizes, widths, seeds)
def test_what_begins_a_document_is_never_masked(lengths, T, seed):
    rows = packed(lengths, T, seed)
    rows = rows._replace(ids=rows.ids.masked_fill(rows.nexts == IGNORE, 1))  # whatever pads
    batch = masked(rows, stream(seed), VOCABULARY, rate=1.0)
    assert torch.equal(batch.targets != IGNORE, (rows.ids != END) & (rows.nexts != IGNORE))


def test_a_prefix_ends_anywhere():
    rows = alike(10, 100, 1000)
    batch = prefix(rows, stream(0), VOCABULARY)
    lengths = (batch.hi - batch.lo)[rows.starts == torch.arange(1000)] + 1
    assert len(lengths) == 100_000
    for p in range(1, 11):
        assert near((lengths == p).double().mean().item(), 0.1, len(lengths))


# --- spans ----------------------------------------------------------------------------------------


def t5_amounts(n: int, rate: float, mean: float) -> tuple[int, int]:
    """The first half of random_spans_noise_mask, number by number in fp32."""
    hidden = int(np.round(np.float32(n) * np.float32(rate)))
    hidden = min(max(hidden, 1), n - 1)
    spans = max(int(np.round(np.float32(hidden) / np.float32(mean))), 1)
    return hidden, min(spans, len(SENTINELS), n - hidden)


@pytest.mark.parametrize("rate, mean", [(0.15, 3.0), (0.15, 8), (0.5, 3), (0.15, 64), (0.96, 1)])
def test_amounts_are_t5_s(rate, mean):
    n = torch.arange(SHORTEST, 3000)
    N, k = amounts(n, torch.tensor(rate), torch.tensor(float(mean)), 0.0)
    want = [t5_amounts(int(length), rate, mean) for length in n]
    assert [*zip(N.tolist(), k.tolist(), strict=True)] == want


def test_the_end_is_of_any_length():
    """Uniform in 1 … n / 2 − 1, whose mean is the rate of a quarter (UL2, table 1)."""
    n = torch.full((100_000,), 24)
    u = torch.rand(n.shape, generator=stream(2), dtype=torch.float64)
    N, _ = amounts(n, torch.tensor(0.25), torch.tensor(inf), u)
    assert set(N.tolist()) == {*range(1, 12)}
    for length in range(1, 12):
        assert near((length == N).double().mean().item(), 1 / 11, len(n))


@pytest.mark.parametrize("d", DENOISERS, ids=str)
def test_rates_and_lengths_are_the_papers(d):
    """Over 10⁵ pieces, as long as there are sentinels for; what rounding does goes both ways."""
    longest = 4096 if d.mean == inf else min(20_000, int(95 * d.mean / d.rate))
    n = torch.randint(longest // 2, longest, (100_000,), generator=stream(3))
    u = torch.rand(n.shape, generator=stream(4), dtype=torch.float64)
    N, k = amounts(n, torch.tensor(d.rate), torch.tensor(float(d.mean)), u)
    assert abs(N.sum() / n.sum() / d.rate - 1) < 0.01
    if d.mean == inf:
        assert set(k.tolist()) == {1} and int(N.min()) >= 1
        assert near((n * d.rate > N).double().mean().item(), 0.5, len(n))
        assert near((n * d.rate / 2 > N).double().mean().item(), 0.25, len(n))
    else:
        assert abs(N.sum() / k.sum() / d.mean - 1) < 0.01


@given(st.integers(SHORTEST, 90), st.integers(1, 5), st.sampled_from(DENOISERS), seeds)
def test_as_much_is_hidden_as_was_said(n, count, d, seed):
    rows = alike(n, count)
    for arch in ("decoder", "encdec"):
        batch = denoise(rows, stream(seed), VOCABULARY, arch, (d,))
        for prompt, answer in conversations(batch)[0]:
            if prompt == [END] and not answer:
                continue
            mode, text, spans = unhidden(prompt, answer)
            assert mode == d.mode and len(text) == n
            hidden = sum(map(len, spans))
            if d.mean == inf:
                assert text[n - hidden :] == spans[0] and 1 <= hidden <= 2 * d.rate * n - 1
            else:
                assert (hidden, len(spans)) == t5_amounts(n, d.rate, d.mean)


def test_all_masks_are_equally_likely():
    """12 tokens, 6 of them hidden in 2 spans: 5 · 5 masks, as T5's code promises."""
    n, N, k = 12, 6, 2
    want = set()
    for hidden in combinations(range(n), N):
        mask = [t in hidden for t in range(n)]
        begins = [t for t in hidden if t - 1 not in hidden]
        if len(begins) == k and not mask[0] and mask[-1]:
            want.add(tuple(mask))
    assert len(want) == comb(N - 1, k - 1) * comb(n - N - 1, k - 1)
    starts = alike(n, 10, 10_000).starts
    ones = torch.ones_like(starts)
    hidden, span = hide(starts, N * ones, k * ones, stream(0))
    hidden, span = hidden.view(-1, n), span.view(-1, n)
    masks, counts = hidden.unique(dim=0, return_counts=True)
    assert set(map(tuple, masks.tolist())) == want
    for count in counts.tolist():
        assert near(count / len(hidden), 1 / len(want), len(hidden))
    turns = (hidden[:, 1:] & ~hidden[:, :-1]).cumsum(1)
    assert torch.equal(span[:, 1:][hidden[:, 1:]] + 1, turns[hidden[:, 1:]])


def test_a_span_is_as_long_as_three_tokens_on_average():
    """Over 10⁵ spans; of N tokens in k spans, l come in one with C(N−l−1, k−2) / C(N−1, k−1)."""
    n = 400
    N, k = t5_amounts(n, 0.15, 3)
    rows = alike(n, 1, 5_000)
    batch = denoise(rows, stream(5), VOCABULARY, "encdec")
    lengths = [len(s) for row in conversations(batch) for s in unhidden(*row[0])[2]]
    assert (N, k) == (60, 20) and len(lengths) == 100_000 and sum(lengths) == 300_000
    for length in range(1, 10):
        share = comb(N - length - 1, k - 2) / comb(N - 1, k - 1)
        assert near(lengths.count(length) / len(lengths), share, len(lengths))


def test_ul2_draws_its_denoisers_alike():
    """Seven denoisers, 10⁵ pieces, two neighbours drawn apart: R 2/7, S 1/7, X 4/7."""
    rows = alike(SHORTEST, 100, 1000)
    batch = denoise(rows, stream(6), VOCABULARY, "encdec", UL2)
    openings = batch.source[(batch.source_lo == torch.arange(batch.source.shape[1]))]
    modes = [MODE[id] for id in openings.tolist() if id != END]
    assert len(modes) == 100_000
    for mode, share in (("[R]", 2 / 7), ("[S]", 1 / 7), ("[X]", 4 / 7)):
        assert near(modes.count(mode) / len(modes), share, len(modes))
    pairs = sum(a == b == "[X]" for a, b in zip(modes[::2], modes[1::2], strict=True))
    assert near(pairs / 50_000, 16 / 49, 50_000)


def test_the_tables_are_those_of_the_papers():
    assert T5 == ((0.15, 3, ""),)
    assert [d[1::-1] for d in UL2 if d.mode == "[R]"] == [(3, 0.15), (8, 0.15)]
    assert [d[1::-1] for d in UL2 if d.mode == "[S]"] == [(inf, 0.25)]
    extreme = [(3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)]
    assert [d[1::-1] for d in UL2 if d.mode == "[X]"] == extreme


def test_more_spans_than_sentinels_are_fewer_and_longer():
    rows = alike(1024, 1)
    for arch in ("decoder", "encdec"):
        batch = denoise(rows, stream(0), VOCABULARY, arch, (Denoiser(0.5, 3, "[X]"),))
        _, text, spans = unhidden(*conversations(batch)[0][0])
        assert [text] == pieces(rows, False)[0]
        assert len(spans) == len(SENTINELS) and sum(map(len, spans)) == 512


@pytest.mark.parametrize("n", range(1, SHORTEST))
@pytest.mark.parametrize("arch", ["decoder", "encdec"])
def test_of_a_short_piece_nothing_is_hidden(n, arch):
    rows = alike(n, 3)
    for name in ("spans", "ul2"):
        batch = made(name, arch, rows)
        assert (batch.targets == IGNORE).all()
        told = conversations(batch)[0]
        assert [prompt for prompt, _ in told[:3]] == pieces(rows, False)[0]


# --- how wide rows become -------------------------------------------------------------------------


@each_pair
@given(st.integers(1, 300))
def test_no_row_is_longer_than_the_context(name, arch, context):
    objective = OBJECTIVES[name]
    T = objective.text_width(context, arch)
    assert 1 <= T <= context
    batch = made(name, arch, packed([T], T, 0))
    assert max(x.shape[1] for x in batch) <= context
    if context > T:
        assert max(widths_for(T + 1, objective.denoisers, arch)) > context


@pytest.mark.parametrize("d", DENOISERS, ids=str)
def test_a_row_of_the_hungriest_pieces_fits(d):
    """As many equal pieces as T tokens make, with as little or as much hidden as there can be."""
    T = 240
    for n in range(SHORTEST, T + 1):
        hidden, k = t5_amounts(n, d.rate, d.mean)
        for N in (1, int(2 * d.rate * n - 1)) if d.mean == inf else (hidden,):
            prompt, answer = n - N + k + bool(d.mode), N + k + 1
            assert T // n * (prompt + answer - 1) <= widths_for(T, (d,), "decoder")[0]
            source, own = widths_for(T, (d,), "encdec")
            assert T // n * prompt <= source and T // n * answer <= own


@pytest.mark.parametrize("arch", ["decoder", "encdec"])
def test_padding_comes_to_nothing(arch):
    ids = torch.ones(2, 20, dtype=torch.long)
    rows = Rows(ids, torch.full_like(ids, IGNORE), torch.arange(20).expand(2, -1).contiguous())
    for name in ("prefix", "spans", "ul2"):
        batch = made(name, arch, rows)
        assert (batch.targets == IGNORE).all() and (batch.inputs == END).all()
        assert batch.source is None or (batch.source == END).all()


def test_little_of_a_row_is_padding():
    """T5 with 512 tokens needs 77 + 26 + 1 for its targets: 114 in the paper, whose text is 568."""
    source, answer = widths_for(512, T5, "encdec")
    assert source == 512 and 104 <= answer <= 0.4 * 512
    assert widths_for(512, T5, "decoder")[0] <= 1.25 * 512


# --- what is refused ------------------------------------------------------------------------------


def test_an_objective_that_does_not_fit_is_refused():
    for name, objective in OBJECTIVES.items():
        for arch in ("decoder", "encoder", "encdec"):
            if arch in objective.fits:
                assert objective_for(name, arch) is objective
            else:
                with pytest.raises(UserError, match=rf"^--objective {name} is for .*, not {arch}:"):
                    objective_for(name, arch)


def test_a_tokenizer_without_special_tokens_is_refused():
    for name, objective in OBJECTIVES.items():
        if objective.special:
            lacking = {text: id for text, id in SPECIAL.items() if text != objective.special[-1]}
            with pytest.raises(UserError, match=r"no special token .*: train one"):
                vocabulary_for(objective, lacking, range(KNOWN), END)
        else:
            vocabulary = vocabulary_for(objective, {}, range(V), END)
            assert vocabulary.ordinary.tolist() == [*range(1, V)]
            OBJECTIVES[name].make(alike(9, 2), stream(0), vocabulary, objective.fits[0])


def test_a_random_token_is_an_ordinary_one():
    special = {"<|endoftext|>": 3, "<|user|>": 7, MASK: 20}
    vocabulary = vocabulary_for(OBJECTIVES["masked"], special, {1, 3, 5, 7, 20}, 3)
    assert vocabulary.ordinary.tolist() == [1, 5] and vocabulary.mask == 20


# --- a step ---------------------------------------------------------------------------------------


def alone(model: Transformer, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """−log p of an answer, the prompt and it being all there is."""
    if model.config.arch == "encdec":
        memory = model.encode(torch.tensor([prompt]))
        hidden = model(torch.tensor([[END, *answer[:-1]]]), memory=memory)[0]
    else:
        text = torch.tensor([prompt + answer[:-1]])
        mask = prefix_mask(torch.tensor([len(prompt)]), text.shape[1])
        hidden = model(text, mask=mask)[0, len(prompt) - 1 :]
    return F.cross_entropy(model.logits(hidden), torch.tensor(answer), reduction="sum")


@pytest.mark.parametrize("name, arch", [p for p in PAIRS if p[0] not in ("causal", "masked")])
@given(sizes, st.integers(9, 60), seeds)
def test_the_loss_of_a_batch_is_that_of_each_answer_alone(name, arch, lengths, T, seed):
    """No piece sees another, on either side, and each sees its own prompt whole."""
    config = ModelConfig(
        dim=8, layers=2, heads=2, context=200, vocab_size=KNOWN, arch=arch,
        position="t5",  # of distances alone: RoPE's angles are in fp32, and differ along a row
    )  # fmt: skip
    model = Transformer(config, seed).double()
    for p, x in zip(
        model.parameters(), normals(seed, *(p.shape for p in model.parameters())), strict=True
    ):
        p.data.copy_(0.5 * x.detach())
    batch = made(name, arch, packed(lengths, T, seed), seed)
    pieces = [piece for row in conversations(batch) for piece in row if piece[1]]
    want = sum(alone(model, *piece).item() for piece in pieces)
    assert loss_sum(model, batch).item() == pytest.approx(want, rel=1e-10, abs=1e-10)
