"""What to predict: from rows of text to inputs, targets, and who may look where.

Idea: a language model learns by guessing what it cannot see. Causal modelling hides the future;
masking hides single tokens; span corruption hides stretches of text behind sentinels; a prefix
model sees the first part whole and guesses the rest; UL2 mixes spans short, long and at the end.
All but masking make of each piece of text a prompt, seen whole, and an answer, guessed token by
token: in a decoder one behind the other, in an encoder-decoder on its two sides.

    rows, a generator, the vocabulary, an architecture -> a batch

Run: python -m pytest tests/test_objectives.py

To add an objective: one function from Rows to a Batch, one entry in OBJECTIVES, and the law that
inputs and targets together rebuild the text.

Papers: Radford et al. 2018, GPT; Devlin et al. 2019, BERT (arXiv 1810.04805); Raffel et al. 2020,
T5 (arXiv 1910.10683), and its code, t5/data/preprocessors.py; Liu et al. 2018, prefix models (arXiv
1801.10198); Tay et al. 2022, UL2 (arXiv 2205.05131).

Letters: B batch · T places of a row · S places of its source · n tokens of a piece, of which
N are hidden in k spans.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kernels.cross_entropy import IGNORE
from run import UserError

MASK = "<|mask|>"
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))  # as many as T5 has
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # who speaks, and the end of a turn
MODES = ("[R]", "[S]", "[X]")  # UL2's words for short spans, the end, and long or many spans
SHORTEST = 8  # tokens; of a shorter piece nothing is hidden, or answers would outgrow the text
FAR = 1 << 40  # the key of what is not there: it goes to the end of a row


class Rows(NamedTuple):
    """Text packed into rows, each field (B T) int64: pieces of documents, and then padding."""

    ids: Tensor
    nexts: Tensor  # the token that follows in the document; IGNORE in the padding
    starts: Tensor  # where in the row the token's own piece begins; padding is its own piece


class Vocabulary(NamedTuple):
    """The ids that stand for no text, and those that do; see `vocabulary_for`."""

    end: int  # between documents; also what a decoder that has an encoder begins with
    mask: int | None
    sentinels: Tensor
    modes: dict[str, int]
    ordinary: Tensor
    roles: Tensor  # as ROLES


@dataclass
class Batch:
    """Rows ready for a step, int64: (B T), and of an encoder-decoder also its source (B S).

    A place sees those from lo to hi, none where lo > hi. Iteration gives the tensors that there
    are.
    """

    inputs: Tensor
    targets: Tensor  # IGNORE where nothing is asked
    lo: Tensor
    hi: Tensor | None = None  # None: its own place, which is causal
    source: Tensor | None = None  # (B S), as the next two
    source_lo: Tensor | None = None
    source_hi: Tensor | None = None
    cross_lo: Tensor | None = None  # (B T): what an input sees of the source
    cross_hi: Tensor | None = None
    draws: Tensor | None = None  # (B 3): what dropout is drawn from; None: nothing is dropped

    def __post_init__(self):
        if self.hi is None:
            self.hi = places(self.lo)

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x in vars(self).values() if x is not None)

    def each(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of f(x) for each of its tensors x."""
        return Batch(**{name: f(x) for name, x in vars(self).items() if x is not None})


def places(x: Tensor) -> Tensor:
    """0 … T − 1 in each row."""
    return torch.arange(x.shape[1], device=x.device).expand_as(x)


def lasts(starts: Tensor) -> Tensor:
    """Where each place's piece ends."""
    return torch.searchsorted(starts, starts, right=True) - 1


def only(x: Tensor | int, where: Tensor) -> Tensor:
    """x there, and nothing elsewhere."""
    return torch.where(where, x, IGNORE)


def per_piece(starts: Tensor, generator: Generator) -> Tensor:
    """Uniform in [0, 1), alike in all places of a piece."""
    return torch.rand(starts.shape, generator=generator, dtype=torch.float64).gather(1, starts)


# --- causal and masked ----------------------------------------------------------------------------


def causal(rows: Rows, generator=None, vocabulary=None, arch="decoder") -> Batch:
    """At every token, the next one: targets[t] = ids[t + 1] within a document (GPT)."""
    return Batch(rows.ids, rows.nexts, rows.starts)


def chat(rows: Rows, generator: Generator, vocabulary: Vocabulary, arch="decoder") -> Batch:
    """The next token where it is the assistant's, the end of its turn included, and nowhere else.

    A token is the assistant's if, of the tokens of roles and ends before it, the last is its role.
    """
    mark = torch.isin(rows.ids, vocabulary.roles)
    last = torch.where(mark, places(rows.ids), -1).cummax(1).values
    speaks = rows.ids.gather(1, last.clamp(min=0)) == vocabulary.roles[2]
    return Batch(rows.ids, only(rows.nexts, speaks & (last >= rows.starts)), rows.starts)


def masked(
    rows: Rows, generator: Generator, vocabulary: Vocabulary, arch="encoder",
    rate: float = 0.15,
) -> Batch:  # fmt: skip
    """15 % of the tokens are asked for; 80 % of these show a mask, 10 % a random token (BERT, 3.1).

    The last 10 % are shown as they are, so that the model cannot know where it is asked. What
    begins a document, as BERT's [CLS], is never chosen.
    """
    ids, shape = rows.ids, rows.ids.shape
    text = (rows.nexts != IGNORE) & (ids != vocabulary.end)
    chosen = text & (torch.rand(shape, generator=generator) < rate)
    how = torch.rand(shape, generator=generator)
    number = torch.randint(len(vocabulary.ordinary), shape, generator=generator)
    shown = torch.where(how < 0.9, vocabulary.ordinary[number], ids)
    shown = shown.masked_fill(how < 0.8, vocabulary.mask)
    inputs = torch.where(chosen, shown, ids)
    return Batch(inputs, only(ids, chosen), rows.starts, lasts(rows.starts))


# --- prompt and answer ----------------------------------------------------------------------------


def lined_up(keys: Tensor, width: int, *fields: Tensor) -> tuple[Tensor, ...]:
    """The keys in order and the fields with them, (B …) to (B width): what is FAR is cut off."""
    keys, order = keys.flatten(1).sort(stable=True)
    fields = keys, *(x.flatten(1).gather(1, order) for x in fields)
    return tuple(x[:, :width].contiguous() for x in fields)


def keyed(slots: Tensor, starts: Tensor, side: int) -> Tensor:
    """Where slots (B T slots) belong: 2 · piece + side, 0 in the prompt and 1 in the answer."""
    return (2 * starts[..., None] + side).expand_as(slots).masked_fill(slots == IGNORE, FAR)


def in_turn(prompt: Tensor, answer: Tensor, starts: Tensor, width: int, end: int) -> tuple:
    """For each piece the prompt and then the answer, each token of which the one before asks for.

    The last is only asked for. Returns keys, inputs, targets, lo and hi, each (B width): all see
    the prompt whole, and of the answer what came before.
    """
    keys = torch.cat([keyed(prompt, starts, 0), keyed(answer, starts, 1)], -1)
    keys, tokens = lined_up(keys, FAR, torch.cat([prompt, answer], -1))
    key, token = (F.pad(x[:, 1:], (0, 1), value=FAR) for x in (keys, tokens))
    asked = key % 2 == 1  # what follows is of the answer: of this piece, for each has a prompt
    last = (keys % 2 == 1) & ~asked
    keys = keys.masked_fill(last, FAR)
    keys, inputs, targets = lined_up(keys, width, tokens, only(token, asked))
    none, own = keys == FAR, places(keys)
    lo, hi = torch.searchsorted(keys, keys - keys % 2), lasts(keys)
    lo, hi = torch.where(none, own, lo), torch.where(none | (keys % 2 == 1), own, hi)
    return keys, inputs.masked_fill(none, end), targets, lo, hi


def posed(
    prompt: Tensor, answer: Tensor, starts: Tensor, end: int, arch: str, widths: tuple[int, ...]
) -> Batch:
    """Prompts and answers as a batch: behind one another, or on two sides (T5, 3.2.1).

    prompt and answer (B T slots): what each token of the text contributes to its piece's, IGNORE
    for nothing. widths: of the rows, `widths_for`. On its own side an answer begins with `end`.
    """
    if arch == "decoder":
        return Batch(*in_turn(prompt, answer, starts, widths[0], end)[1:])
    keys, source, _, *seen = in_turn(prompt, prompt[..., :0], starts, widths[0], end)
    answered = torch.zeros_like(starts).scatter_add(1, starts, (answer != IGNORE).sum(-1)) > 0
    own, *fields = in_turn(only(end, answered)[..., None], answer, starts, widths[1], end)
    piece = own - own % 2 + (own == FAR)  # padding is in no piece and sees nothing
    cross = torch.searchsorted(keys, piece), torch.searchsorted(keys, piece, right=True) - 1
    return Batch(*fields, source, *seen, *cross)


def prefix(rows: Rows, generator: Generator, vocabulary: Vocabulary, arch="decoder") -> Batch:
    """Of n tokens and the next, the first p are the prompt, p uniform in 1 … n (T5, 3.2.1)."""
    starts = rows.starts
    n = lasts(starts) - starts + 1
    p = 1 + (per_piece(starts, generator) * n).long()
    at = places(starts) - starts
    prompt = only(rows.ids, (at < p) & (rows.nexts != IGNORE))[..., None]
    answer = only(rows.nexts, at >= p - 1)[..., None]
    return posed(prompt, answer, starts, vocabulary.end, arch, 2 * starts.shape[1:])


# --- corrupted spans ------------------------------------------------------------------------------


class Denoiser(NamedTuple):
    """How much of a piece is hidden, and in how long spans."""

    rate: float
    mean: float  # tokens of a span; inf: a single span at the end
    mode: str = ""  # what the prompt begins with, so that the model knows


T5 = (Denoiser(0.15, 3),)  # section 3.1.4
UL2 = (  # table 1, in equal parts
    Denoiser(0.15, 3, "[R]"),
    Denoiser(0.15, 8, "[R]"),
    Denoiser(0.25, inf, "[S]"),
    Denoiser(0.5, 3, "[X]"),
    Denoiser(0.5, 8, "[X]"),
    Denoiser(0.15, 64, "[X]"),
    Denoiser(0.5, 64, "[X]"),
)


def amounts(n: Tensor, rate: Tensor, mean: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor]:
    """N tokens to hide in k spans, of n: T5's random_spans_noise_mask, u uniform in [0, 1).

    N = round(n · rate) in 1 … n − 1, k = round(N / mean) ≥ 1, halves to the even number, in fp32
    as there. At the end N is uniform in 1 … 2 n · rate − 1 (UL2, 3.1.2). If there would be more
    spans than sentinels, or than tokens to part them, they are fewer and longer. (UL2 draws lengths
    from a normal distribution of a width that it does not say: here they are drawn as T5's.)
    """
    n = n.float()
    N = (n * rate).round().clamp(min=1).minimum(n - 1)
    N = torch.where(mean.isinf(), 1 + (u * (2 * n * rate - 1).floor()).floor(), N)
    k = (N / mean).round().clamp(1, len(SENTINELS)).minimum(n - N)
    short = n < SHORTEST
    return N.masked_fill(short, 0).long(), k.masked_fill(short, 1).long()


def scattered(groups: Tensor, count: Tensor, generator: Generator) -> Tensor:
    """True at the first of each group of neighbours and at count − 1 others, any as likely."""
    first = torch.searchsorted(groups, groups)
    keys = groups + torch.rand(groups.shape, generator=generator, dtype=torch.float64)
    keys = torch.where(first == places(groups), groups, keys)
    return keys.argsort(stable=True).argsort() - first < count


def hide(starts: Tensor, N: Tensor, k: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Whether each token is hidden, and in which span of its piece, or behind how many.

    The n − N seen and the N hidden tokens are each cut into k spans, which then alternate, a seen
    one first; all ways are equally likely (T5's random_spans_noise_mask).
    """
    hidden = places(starts) > lasts(starts) - N  # in number right, in place only after the sort
    groups = 2 * starts + hidden
    span = scattered(groups, k, generator).cumsum(1)
    span = span - span.gather(1, torch.searchsorted(groups, groups))
    order = ((starts * starts.shape[1] + span) * 2 + hidden).argsort(stable=True)
    return hidden.gather(1, order), span.gather(1, order)


def widths_for(T: int, denoisers: tuple[Denoiser, ...], arch: str) -> tuple[int, ...]:
    """Of a decoder's row, or of source and decoder: room for all that T tokens can become.

    If n tokens become at most f(n), pieces of n₁ + n₂ + … ≤ T become Σ f(nᵢ) ≤ T · max f(n) / n;
    the maximum is over the pieces long enough to be corrupted, the others stay as they are.
    """
    rate, mean = torch.tensor([d[:2] for d in denoisers]).T[..., None]
    mode = any(d.mode for d in denoisers)
    n = torch.arange(SHORTEST, max(SHORTEST, T) + 1)
    (least, k), (most, _) = (amounts(n, rate, mean, u) for u in (0.0, 1 - 2**-20))
    if arch == "decoder":
        return (max(T, int((T * (n + 2 * k + mode) // n).max())),)
    source, answer = n - least + k + mode, most + k + 1
    return max(T, int((T * source // n).max())), max(1, int((T * answer // n).max()))


def denoise(
    rows: Rows, generator: Generator, vocabulary: Vocabulary, arch: str = "encdec",
    denoisers: tuple[Denoiser, ...] = T5,
) -> Batch:  # fmt: skip
    """Each span is one sentinel in the prompt; the answer is, for each, the sentinel and the span.

    "Thank you <0> me to your party <1> week." asks for "<0> for inviting <1> last <end>" (T5,
    figure 2). Each piece draws its denoiser, whose mode, if it has one, opens the prompt (UL2,
    3.1.3).
    """
    ids, _, starts = rows
    number = (per_piece(starts, generator) * len(denoisers)).long()
    rate, mean = torch.tensor([d[:2] for d in denoisers]).T[:, number]
    ends, own = lasts(starts), places(starts)
    N, k = amounts(ends - starts + 1, rate, mean, per_piece(starts, generator))
    hidden, span = hide(starts, N, k, generator)
    hidden_before = F.pad(hidden[:, :-1], (1, 0))
    sentinel = only(vocabulary.sentinels[span], hidden & ~hidden_before)
    modes = torch.tensor([vocabulary.modes[d.mode] if d.mode else IGNORE for d in denoisers])
    opening, closing = ((own == border) & (N > 0) for border in (starts, ends))
    seen = torch.where(hidden, sentinel, only(ids, rows.nexts != IGNORE))
    prompt = torch.stack([only(modes[number], opening), seen], -1)
    answer = torch.stack([sentinel, only(ids, hidden), only(vocabulary.end, closing)], -1)
    widths = widths_for(starts.shape[1], denoisers, arch)
    return posed(prompt, answer, starts, vocabulary.end, arch, widths)


# --- the table ------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """A function from rows to a batch, and what it needs."""

    make: Callable[..., Batch]
    fits: tuple[str, ...]  # architectures
    special: tuple[str, ...] = ()  # texts that stand for an id of their own
    denoisers: tuple[Denoiser, ...] = ()

    def __call__(
        self, rows: Rows, generator: Generator | None = None,
        vocabulary: Vocabulary | None = None, arch: str = "decoder",
    ) -> Batch:  # fmt: skip
        return self.make(rows, generator, vocabulary, arch)

    def widths(self, T: int, arch: str) -> tuple[int, int]:
        """Of the rows of source and decoder that T tokens of text become; alike if there is one."""
        found = widths_for(T, self.denoisers, arch) if self.denoisers else (T,)
        return found[0], found[-1]

    def text_width(self, context: int, arch: str) -> int:
        """The most tokens of text in a row of which no batch makes a row longer than the context.

        T5's random_spans_helper, for whom a row is a single piece. UserError if not one fits.
        """
        found = bisect_right(
            range(1, context + 1), context, key=lambda T: max(self.widths(T, arch))
        )
        if not found:
            raise UserError(f"--model.context {context} is too small for this objective")
        return found


BOTH = ("decoder", "encdec")
OBJECTIVES = {
    "causal": Objective(causal, ("decoder",)),
    "chat": Objective(chat, ("decoder",), ROLES),
    "masked": Objective(masked, ("encoder",), (MASK,)),
    "prefix": Objective(prefix, BOTH),
    "spans": Objective(partial(denoise, denoisers=T5), BOTH, SENTINELS, T5),
    "ul2": Objective(partial(denoise, denoisers=UL2), BOTH, SENTINELS + MODES, UL2),
}


def objective_for(name: str, arch: str) -> Objective:
    """The objective of this name; UserError if the architecture cannot learn by it."""
    objective = OBJECTIVES[name]
    if arch not in objective.fits:
        others = ", ".join(n for n, o in OBJECTIVES.items() if arch in o.fits)
        raise UserError(
            f"--objective {name} is for --model.arch {' or '.join(objective.fits)}, not {arch}: "
            f"choose one that is for it ({others}), or another architecture"
        )
    return objective


def vocabulary_for(
    objective: Objective, special: dict[str, int], known: Iterable[int], end: int
) -> Vocabulary:
    """A tokenizer's ids for an objective; UserError if it lacks some.

    special: its special tokens; known: all its ids; end: that of its end of text.
    """
    if missing := [text for text in objective.special if text not in special]:
        raise UserError(
            f"this tokenizer has no special token {missing[0]}, which the objective needs: train "
            f"one with the special tokens that objectives.py lists, {len(missing)} more"
        )
    return Vocabulary(
        end,
        special.get(MASK),
        torch.tensor([special[text] for text in SENTINELS if text in special]),
        {text: special[text] for text in MODES if text in special},
        torch.tensor(sorted({*known} - {*special.values(), end})),
        torch.tensor([special[text] for text in ROLES if text in special]),
    )
