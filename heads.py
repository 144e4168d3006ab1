"""Heads: what is read off the hidden states, beside the next token.

Idea: a transformer turns tokens into states; what these are asked is a small module's business. A
head is attached from outside, hidden states in and scores out, so that one model carries many:

    MaskedHead          which token was here?                     BERT's first task
    Pooler              one vector for a whole text               read off its first token
    NextSentenceHead    does the second text follow the first?    BERT's second task
    Classifier          which of a few labels?                    of a text
    ScalarHead          one number                                a reward, a value

`load_heads` reads those beside a BERT of Hugging Face, `model.save(folder, heads=…)` writes them.

Run: python -m pytest tests/test_heads.py

Papers: Devlin et al. 2019, BERT (arXiv 1810.04805); Radford et al. 2018, GPT; Stiennon et al. 2020,
reward and value models (arXiv 2009.01325).

Letters: B batch · T tokens · C model width · V vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from attention import Linear
from model import ACTIVATIONS, NORMS, ModelConfig, fill
from model_files import read_folder
from run import UserError, generator, settings


def drawn(head: nn.Module, seed: int | None, wide: float = 1.0) -> None:
    """Matrices normal with variance wide / fan_in, each from its own stream; biases stay at 0.

    Without a seed they are left as memory was.
    """
    for name, p in head.named_parameters() if seed is not None else ():
        if p.dim() == 2:
            stream = generator(seed, f"init/{type(head).__name__}/{name}")
            p.data.copy_(torch.randn(p.shape, generator=stream) * (wide / p.shape[1]) ** 0.5)


def last(hidden: Tensor, lengths: Tensor) -> Tensor:
    """hidden (B T C), lengths (B) to the state of each text's last token (B C)  (GPT, section 3.2).

    It is the only one that has seen the whole text, if each token sees those before it.
    """
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


class Pooler(nn.Module):
    """tanh(W h₀ + b): the first token's state, which speaks for the text (Devlin et al.'s code)."""

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__()
        self.dense = Linear(config.dim, config.dim, bias=True)
        drawn(self, seed)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (B T C) to (B C)."""
        return self.dense(hidden[:, 0]).tanh()


class MaskedHead(nn.Module):
    """E norm(bend(W h + b)) + c: scores of the token behind a mask (Devlin et al., section 3.1).

    E is the model's embedding, which the head does not own.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__()
        self.dense = Linear(config.dim, config.dim, bias=True)
        self.bend = ACTIVATIONS[config.activation].bend
        self.norm = NORMS[config.norm](config.dim, config.norm_eps, config.bias)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        drawn(self, seed)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden (… C), embedding (V C) to scores (… V), in fp32 or wider."""
        h = self.norm(self.bend(self.dense(hidden)))
        scores = h @ embedding.to(h.dtype).T + self.bias.to(h.dtype)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Classifier(nn.Module):
    """W h + b: a score for each label, h a pooled or a last state (Devlin et al., section 4.1)."""

    def __init__(self, config: ModelConfig, labels: int, seed: int | None = 0):
        super().__init__()
        self.dense = Linear(config.dim, labels, bias=True)
        drawn(self, seed)

    def forward(self, state: Tensor) -> Tensor:
        """state (… C) to (… labels)."""
        return self.dense(state)


class NextSentenceHead(Classifier):
    """Does the second text follow the first? Score 0 says yes, 1 no (Devlin et al., task 2)."""

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__(config, 2, seed)


class ScalarHead(nn.Module):
    """w h + b: one number of each state (Stiennon et al. 2020, section 3.4).

    Of all of a text's tokens these are values, of its `last` it is a reward. w is drawn with
    variance 1 / (C + 1), as there.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0):
        super().__init__()
        self.dense = Linear(config.dim, 1, bias=True)
        drawn(self, seed, wide=config.dim / (config.dim + 1))

    def forward(self, state: Tensor) -> Tensor:
        """state (… C) to (…)."""
        return self.dense(state).squeeze(-1)


HEADS = {"pooler": Pooler, "masked": MaskedHead, "next_sentence": NextSentenceHead}


def load_heads(folder: str | Path) -> nn.ModuleDict:
    """The heads of HEADS that stand beside the model in a Hugging Face folder, by their names.

    UserError where there is none, or one does not fit.
    """
    values, weights = read_folder(Path(folder), heads=True)
    config = settings(ModelConfig, values, f"{folder}/config.json")
    found = {name.split(".")[0] for name in weights.load("meta")}
    if not found:
        raise UserError(f"{folder} has no head beside its model")
    with torch.device("meta"):
        heads = nn.ModuleDict({n: make(config, None) for n, make in HEADS.items() if n in found})
    fill(heads, weights)
    return heads
