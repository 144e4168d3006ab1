"""Laws of objectives.py: inputs and targets rebuild the text; what is not asked teaches nothing."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import normals, seeds
from hypothesis import given
from hypothesis import strategies as st

from kernels.cross_entropy import cross_entropy, cross_entropy_obvious
from objectives import IGNORE, OBJECTIVES, Batch, Rows, causal
from packing import Piece, best_fit, cut, fill

END = 0
V = 13
sizes = st.lists(st.integers(1, 20), min_size=1, max_size=10)
widths = st.integers(1, 12)


class Documents:
    """What `fill` asks of Shards: random tokens of 1 … V − 1, END before each document."""

    def __init__(self, lengths: list[int], seed: int):
        rng = np.random.default_rng(seed)
        self.texts = [np.array([END, *rng.integers(1, V, n - 1)]) for n in lengths]

    def document(self, i: int) -> np.ndarray:
        return self.texts[i]


def packed(lengths: list[int], T: int, seed: int) -> tuple[Rows, Documents, list[Piece]]:
    pieces = cut(np.array(lengths), T, np.random.default_rng(seed))
    documents = Documents(lengths, seed)
    return fill(best_fit(pieces, T), documents, T, END), documents, pieces


def rebuild_causal(batch: Batch) -> Counter:
    """A piece is its first input and all its targets."""
    texts = Counter()
    for inputs, targets, starts in zip(*(field.tolist() for field in batch), strict=True):
        for start in sorted(set(starts)):
            places = [t for t, s in enumerate(starts) if s == start and targets[t] != IGNORE]
            if places:
                text = (inputs[start], *(targets[t] for t in places))
                assert [inputs[t] for t in places] == list(text[:-1])
                texts[text] += 1
    return texts


REBUILD = {"causal": rebuild_causal}


def test_each_objective_has_its_law():
    assert REBUILD.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
@given(sizes, widths, seeds)
def test_inputs_and_targets_rebuild_the_text(name, lengths, T, seed):
    rows, documents, pieces = packed(lengths, T, seed)
    want = Counter()
    for i, begin, length in pieces:
        text = [*documents.document(i).tolist(), END][begin : begin + length + 1]
        want[tuple(text)] += 1
    assert REBUILD[name](OBJECTIVES[name](rows)) == want


@pytest.mark.parametrize("name", OBJECTIVES)
@given(sizes, widths, seeds)
def test_what_is_not_asked_has_no_loss_and_no_gradient(name, lengths, T, seed):
    batch = OBJECTIVES[name](packed(lengths, T, seed)[0])
    embedding, head = normals(seed, (V, 5), (V, 5))
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


@given(sizes, widths, seeds)
def test_causal_asks_for_the_next_token(lengths, T, seed):
    rows = packed(lengths, T, seed)[0]
    inputs, targets, starts = causal(rows)
    inside = starts[:, 1:] == starts[:, :-1]
    assert torch.equal(targets[:, :-1][inside], inputs[:, 1:][inside])
    assert int((targets != IGNORE).sum()) == sum(lengths)
