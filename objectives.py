"""What to predict: from rows of text to inputs, targets, and who may look where.

Idea: a language model learns by guessing what it cannot see. Causal language modelling hides the
future: at every token, guess the next one.

Run: python -m pytest tests/test_objectives.py

To add an objective: one function from Rows to a Batch, one entry in OBJECTIVES, and the law that
inputs and targets together rebuild the text.

Papers: Radford et al. 2018, GPT; Shannon 1951, Prediction and Entropy of Printed English.
"""

from typing import NamedTuple

from torch import Tensor

from kernels.cross_entropy import IGNORE


class Rows(NamedTuple):
    """Text packed into rows, each field (B T) int64: pieces of documents, and then padding."""

    ids: Tensor
    nexts: Tensor  # the token that follows in the document; IGNORE in the padding
    starts: Tensor  # where in the row the token's own piece begins; padding is its own piece


class Batch(NamedTuple):
    """Rows ready for a step, each field (B T) int64."""

    inputs: Tensor
    targets: Tensor  # IGNORE where nothing is asked
    starts: Tensor  # the first place in the row that each token may look at


def causal(rows: Rows) -> Batch:
    """At every token, the next one: targets[t] = ids[t + 1] within a document (GPT)."""
    return Batch(rows.ids, rows.nexts, rows.starts)


OBJECTIVES = {"causal": causal}

__all__ = ["IGNORE", "OBJECTIVES", "Batch", "Rows", "causal"]
