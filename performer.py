"""Performer: attention whose cost grows with T, by random features of queries and keys.

Idea: exp(q·k) is an average over random directions w of a product, one factor of the query and one
of the key. With M directions it is φ(q)·φ(k), and a sum over keys can be taken before the query is
known: Σ_s (φ(q)·φ(k_s)) v_s = φ(q)·(Σ_s φ(k_s) v_sᵀ). That sum, the state, has M (D + 1) numbers,
however long the text; a causal model lets it grow token by token.

Exponentials overflow and vanish, so each is divided by the largest there is, which cancels in the
end. The largest over all keys would tell a token about its future, if only in the last bits: the
state keeps, for each feature, the largest so far; a token's own chunk, which is in no state yet, is
summed pair by pair. So nothing overflows, a token never loses all its keys, and what comes later
changes no bit of it.

Run: python -m pytest tests/test_performer.py    (its cost: python sparse.py)

Papers: Choromanski et al. 2021, Performer (arXiv 2009.14794); Katharopoulos et al. 2020, causal
linear attention (arXiv 2006.16236); Milakov and Gimelshein 2018, a running maximum (arXiv
1805.02867).

Letters: B batch · T positions that look · S positions looked at · H heads · K key-value heads ·
G = H/K heads that share keys · D head width · M features · N tokens of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.linear_attention import WIDEST, divided, linear_attention
from kernels.mask import Mask, dense
from run import generator

CHUNK = 16  # tokens between two states: within a chunk the cost is quadratic
SEGMENT = 128  # tokens whose features exist at a time; the backward pass computes them again
HEADROOM = 60  # of an fp32 exponential's 88: the rest is for the sum over keys

# --- features -------------------------------------------------------------------------------------


def directions(features: int, D: int, stream: torch.Generator) -> Tensor:
    """w (M D), each N(0, I), and of every D of them all orthogonal (section 2.4, and 3 "ORF").

    A direction is uniform on the sphere (from QR, made unique by the signs of R's diagonal), its
    length that of an independent normal vector. Unbiased as independent ones are, but less spread
    out (theorem 2).
    """

    def normal() -> Tensor:
        return torch.randn(D, D, generator=stream, dtype=torch.float64, device="cpu")

    blocks = []
    for _ in range(0, features, D):
        q, r = torch.linalg.qr(normal())
        lengths = normal().norm(dim=1)
        blocks.append(lengths[:, None] * (q * r.diagonal().sign()).T)
    return torch.cat(blocks)[:features]


def key_exponents(y: Tensor, w: Tensor) -> Tensor:
    """a = w·y − |y|²/2 (… M), as exp(x·y) = E_w exp(w·x − |x|²/2) exp(w·y − |y|²/2)  (lemma 1).

    The factor exp(−|x|²/2) of a query is common to all its weights and left out. a ≤ |w|²/2, which
    it reaches at y = w.
    """
    return y @ w.T - y.square().sum(-1, keepdim=True) / 2


def performer_obvious(
    w: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> Tensor:
    """Σ_s ω_ts v_s / Σ_s ω_ts with ω_ts = φ(q_t)·φ(k_s), all T × S of them and their M terms.

    q (B H T D) looks at k, v (B K S D); a query that sees nothing gets zeros. The weights stand as
    logarithms where attention has its scores.
    """
    group = q.shape[1] // k.shape[1]
    x = scale**0.5 * q @ w.T  # B H T M
    a = key_exponents(scale**0.5 * k, w).repeat_interleave(group, 1)  # B H S M
    scores = (x[:, :, :, None] + a[:, :, None]).logsumexp(-1)  # B H T S
    scores = scores + dense(mask, k.shape[2], scores.dtype)
    blind = scores.detach().amax(-1, keepdim=True) == -torch.inf
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return weights @ v.repeat_interleave(group, 1)


# --- the state ------------------------------------------------------------------------------------


class State(NamedTuple):
    """Σ_s exp(a_s − top) [v_s 1]ᵀ (B K M D+1), and top (B K M): the largest a_s of each feature."""

    top: Tensor
    sums: Tensor


def nothing(k: Tensor, w: Tensor) -> State:
    """The state of no key at all; its top is finite, so that no difference is ∞ − ∞."""
    B, K, _, D = k.shape
    lowest = torch.finfo(w.dtype).min / 4
    return State(w.new_full((B, K, len(w)), lowest), w.new_zeros(B, K, len(w), D + 1))


def remember(state: State, a: Tensor, ones: Tensor) -> State:
    """The state with more keys, a (B K N M), −∞ for those to leave out, and values [v 1]."""
    top = torch.maximum(state.top, a.detach().amax(2))
    sums = state.sums * (state.top - top).exp()[..., None]
    return State(top, sums + (a - top[:, :, None]).exp().mT @ ones)


def recall(state: State, x: Tensor) -> Tensor:
    """Σ_s (φ(q)·φ(k_s)) [v_s 1] (B K G N D+1), up to a factor; x = w·q (B K G N M)."""
    x = x + state.top[:, :, None, None]
    return (x - x.detach().amax(-1, keepdim=True)).exp() @ state.sums[:, :, None]


def kept(state: State, own: Tensor) -> State:
    """The state where `own` (B 1) is true, and that of no key elsewhere."""
    other = ~own[:, None]
    top = state.top.masked_fill(other, torch.finfo(state.top.dtype).min / 4)
    return State(top, state.sums.masked_fill(other[..., None], 0))


def with_one(v: Tensor, w: Tensor) -> Tensor:
    return torch.cat((v.to(w.dtype), w.new_ones(*v.shape[:3], 1)), -1)


# --- all queries look at the same keys ------------------------------------------------------------


def forget_features(function: Callable, *args) -> Tensor | tuple:
    """function(*args), whose inner results the backward pass computes again: none is kept."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def pieces(size: int, *tensors: tuple[Tensor, int]) -> Iterator[tuple[Tensor, ...]]:
    """Each tensor in pieces of this size along the axis given with it, all of them side by side.

    By `split`, whose backward pass puts the pieces together once; that of a slice fills all of it.
    """
    return zip(*(x.split(size, axis) for x, axis in tensors), strict=True)


def remember_part(w: Tensor, k: Tensor, v: Tensor, unseen: Tensor, *state: Tensor) -> State:
    """The state with the keys k (B K N D); unseen (B N) is true for those to leave out."""
    a = key_exponents(k, w).masked_fill(unseen[:, None, :, None], -torch.inf)
    return remember(State(*state), a, with_one(v, w))


def remember_all(
    w: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, state: State | None = None
) -> State:
    """A state, default that of no key, with the keys lo ≤ s ≤ hi, each (B 1)."""
    state = state or nothing(k, w)
    if not k.shape[2]:
        return state
    s = torch.arange(k.shape[2], device=k.device)
    unseen = (s < lo) | (s > hi)
    for part in pieces(SEGMENT, (k, 2), (v, 2), (unseen, 1)):
        state = forget_features(remember_part, w, *part, *state)
    return State(*state)


def recall_part(w: Tensor, q: Tensor, *state: Tensor) -> Tensor:
    return divided(recall(State(*state), q @ w.T))


def recall_all(w: Tensor, q: Tensor, state: State) -> Tensor:
    """Every query of q (B K G T D) looks at the state."""
    parts = pieces(SEGMENT, (q, 3))
    return torch.cat([forget_features(recall_part, w, *part, *state) for part in parts], 3)


# --- each query looks at its own past -------------------------------------------------------------

Place = int | Tensor  # a Tensor (), where a GPU shall not be waited for


def causal_chunk(
    state: State, x: Tensor, a: Tensor, ones: Tensor, start: Tensor, t: Tensor
) -> tuple[Tensor, State]:
    """Tokens t (N), exponents x (B K G N M) and a (B K N M), values ones (B K N D+1).

    start (B N) is where each one's document begins. Inside the chunk the terms of each pair of
    tokens are divided by their own largest; what the state says of earlier tokens, and all of it
    together, by exp(most).
    """
    seen = (t[:, None] >= t) & (t >= start[..., None])  # B N N
    terms = x[:, :, :, :, None] + a[:, :, None, None]  # B K G N N M, logarithms
    largest = terms.detach().amax(-1)
    pairs = terms.sub_(largest[..., None]).exp_().sum(-1)  # B K G N N
    largest = largest.masked_fill(~seen[:, None, None], -torch.inf)
    before = x + state.top[:, :, None, None]  # B K G N M
    before = before.masked_fill((start >= t[0])[:, None, None, :, None], -torch.inf)
    most = torch.maximum(largest.amax(-1), before.detach().amax(-1))[..., None]
    most = most.clamp(min=torch.finfo(x.dtype).min)  # −∞ for a query that sees nothing
    both = (pairs * (largest - most).exp()) @ ones[:, :, None]
    both = both + (before - most).exp() @ state.sums[:, :, None]
    last = start[:, -1:, None]  # (B 1 1) where the document begins that goes on
    state = kept(state, last[..., 0] < t[0])
    left_out = (t < last)[..., None]  # B 1 N 1
    return divided(both), remember(state, a.masked_fill(left_out, -torch.inf), ones)


def causal_part(
    w: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, place: Place, *state: Tensor
) -> tuple[Tensor, ...]:
    """As `causal`, for a few tokens whose features may all exist at once."""
    x, a, ones = q @ w.T, key_exponents(k, w), with_one(v, w)
    t = place + torch.arange(k.shape[2], device=k.device)
    outs = []
    for part in pieces(CHUNK, (x, 3), (a, 2), (ones, 2), (starts, 1), (t, 0)):
        out, state = causal_chunk(State(*state), *part)
        outs.append(out)
    return torch.cat(outs, 3), *state


def causal(
    w: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, place: Place, state: State
) -> tuple[Tensor, State]:
    """Token t of q (B K G T D) looks at the state, at itself and all before it in its document.

    k, v (B K T D) are those of the same tokens, which stand at place, place + 1, …; a document that
    starts[t] (B T) says to begin at `place` or later does not look at the state.
    """
    outs = []
    for part in pieces(SEGMENT, (q, 3), (k, 2), (v, 2), (starts, 1)):
        out, *state = forget_features(causal_part, w, *part, place, *state)
        outs.append(out)
        place = place + SEGMENT
    return torch.cat(outs, 3), State(*state)


def causal_fused(w: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """The same from place 0 on, in the Triton kernels on CUDA, which know no running maximum.

    They need none while norms are ordinary: a_s ≤ |w|²/2, so exp(a_s − |w|²/2 + HEADROOM) cannot
    overflow in fp32, whatever the keys; it vanishes where |w − y|² > 290, and about D + |y|² is
    usual. A query of which all weights vanish gives zeros.
    """
    bound = w.square().sum(-1) / 2 - HEADROOM
    x = q @ w.T + bound
    phi_q = (x - x.detach().amax(-1, keepdim=True)).exp().flatten(1, 2)
    phi_k = (key_exponents(k, w) - bound).exp()
    out, _ = linear_attention(phi_q, phi_k, v.to(w.dtype), starts.contiguous())
    return out.unflatten(1, q.shape[1:3])


def fits_fused(w: Tensor, q: Tensor) -> bool:
    return q.is_cuda and w.dtype == torch.float32 and len(w) <= WIDEST


# --- a kind of attention --------------------------------------------------------------------------


def whole_documents(mask: Mask, S: int, config) -> Mask:
    """The mask as `Performer` takes it: causal, or (B 1) if all queries see the same keys.

    ValueError, one sentence, for any other. It is looked at once for all layers.
    """
    lo, hi = mask.lo, mask.hi
    T = lo.shape[1]
    if T == 1:
        return mask
    same = ((lo == lo[:, :1]) & (hi == hi[:, :1])).all()
    place = hi[0, 0] + torch.arange(T, device=hi.device)
    document = (lo[:, 1:] == lo[:, :-1]) | (lo[:, 1:] >= place[1:])  # goes on, or begins later
    past = (hi == place).all() & document.all() & (hi[0, 0] >= 0) & (hi[0, -1] < S)
    same, past = torch.stack((same, past)).tolist()
    if same:
        return replace(mask, lo=lo[:, :1], hi=hi[:, :1])
    if not past:
        raise ValueError(
            "performer: tokens must see all of their document so far, or all the same keys; for "
            "windows, prefixes and other masks choose another --model.attention"
        )
    return mask


class Performer(nn.Module):
    """Attention with weights φ(q)·φ(k) in place of exp(scale · q·k); see `whole_documents`."""

    def __init__(self, config):
        super().__init__()
        drawn = directions(config.features, config.head_dim, generator(0, "performer"))
        self.register_buffer("directions", drawn.float(), persistent=False)  # M D, for all heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """q (B H T D) looks at k, v (B K S D); a mask from `whole_documents`, out (B H T D).

        Features are fp32 or wider. The error of a weight falls as 1/√M, and grows as exp(|x|²).
        """
        w, x, y = self.scaled(q, k, mask, scale)
        T = q.shape[2]
        if mask.lo.shape[1] == 1:
            out = recall_all(w, x, remember_all(w, y, v, mask.lo, mask.hi))
        else:
            place = int(mask.hi[0, 0]) if k.shape[2] > T else 0  # a GPU is waited for with a past
            now = slice(place, place + T)
            if not place and fits_fused(w, q):
                out = causal_fused(w, x, y[:, :, now], v[:, :, now], mask.lo)
            else:
                before = mask.lo[:, :1], torch.full_like(mask.lo[:, :1], place)
                state = remember_all(w, y[:, :, :place], v[:, :, :place], *before)
                out, _ = causal(w, x, y[:, :, now], v[:, :, now], mask.lo, place, state)
        return out.flatten(1, 2).to(q.dtype)

    def go_on(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, state: State
    ) -> tuple[Tensor, State]:
        """As `forward` for tokens that stand behind those of a state, with their own k, v alone.

        Returns the state with them, too. mask.at says where they stand; where a text begins there
        or later, nothing of the state is its own, whatever that holds.
        """
        w, x, y = self.scaled(q, k, mask, scale)
        T, place = q.shape[2], mask.at[0, 0]
        if mask.lo.shape[1] < T:
            own = kept(state, mask.lo < place)
            state = remember_all(w, y, v, mask.lo - place, mask.hi - place, own)
            out = recall_all(w, x, state)
        elif T > 1 and fits_fused(w, q) and not place:
            last = mask.lo[:, -1:], mask.hi[:, -1:]
            out, state = causal_fused(w, x, y, v, mask.lo), remember_all(w, y, v, *last)
        else:
            out, state = causal(w, x, y, v, mask.lo, place, state)
        return out.flatten(1, 2).to(q.dtype), state

    def scaled(
        self, q: Tensor, k: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Directions (M D), queries x (B K G T D), keys y (B K S D): weights are exp(x·y)."""
        if not mask.plain:
            raise ValueError(
                "performer: nothing can be added to scores that are never computed: choose a "
                "--model.position that turns or adds to the tokens, as rope or sinusoidal"
            )
        w = self.directions.to(torch.promote_types(q.dtype, torch.float32))
        x, y = (part.to(w.dtype) * scale**0.5 for part in (q, k))
        return w, x.unflatten(1, (k.shape[1], -1)), y


class Running(NamedTuple):
    """One layer's room in a cache, where T more tokens come to stand: the state of all before.

    However long the text, it has M (D + 2) numbers for each key-value head.
    """

    state: Tensor  # B K M D+2: top, and behind it the sums
    place: Tensor  # T
    shown: int

    def places(self, T: int) -> tuple[Tensor, int]:
        """Where the tokens come to stand, and up to where others may."""
        return self.place, self.shown

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """No earlier keys and values are there any more: `attend` meets their sums."""
        return k, v

    def attend(
        self, layer: Performer, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
    ) -> Tensor:
        """What the layer makes of new tokens; the state then holds them, too."""
        rooms = State(self.state[..., 0], self.state[..., 1:])
        out, new = layer.go_on(q, k, v, mask, scale, rooms)
        for room, x in zip(rooms, new, strict=True):
            room.copy_(x)
        return out
