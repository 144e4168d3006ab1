"""Prefix and prompt tuning: a few learnt vectors before every text, and not one weight changed.

Idea: a good instruction before a text makes a model do better. An instruction that is learnt need
not be words. Prompt tuning learns P rows of embeddings; prefix tuning learns, for each layer, the
keys and values that P tokens would have had there, which can say more than any tokens.

    prefix    K, V of each layer ← [K_prefix; K], [V_prefix; V]     in every stack's own attention
    prompt    x ← [rows; x], at the entrance of what reads: the encoder, or a decoder alone

Tokens of the text see all P and stand behind them, at positions P, P + 1, …, each document of a
packed row too. In a decoder nobody sees the text before the text, so a prompt is a prefix: the keys
and values of its rows are computed once and stand before all texts of a batch. In an encoder the
rows see the text, and stand in the stream.

A prefix can be trained through an MLP, K = K₀ + W tanh(W' E): many paths to the same numbers, which
stay when `settle` drops it. The paper has one MLP for all layers; here each layer has its own, so
that it goes where its layer goes.

Run: python -m pytest tests/test_prefix.py

Papers: Li and Liang 2021, prefix tuning (arXiv 2101.00190); Lester et al. 2021, prompt tuning
(arXiv 2104.08691).

Letters: P tokens of the prefix · B batch · T tokens · S keys · K key-value heads · D head width ·
C model width · M width of the MLP.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from attention import KeyValue, causal_mask
from kernels.mask import Mask, dense
from lora import Adapter
from model import ModelConfig, Stack, Transformer
from positions import NoPosition, Rotation
from run import UserError, generator

# --- keys and values of one layer -----------------------------------------------------------------


class Prefix(nn.Module):
    """Keys and values (K·D P) of one layer that all its tokens see."""

    def __init__(self, shape: tuple[int, int], hidden: int, draw: torch.Generator):
        """shape: (K·D P). hidden: the MLP's width M, 0 for none; it adds nothing at first."""
        super().__init__()
        rows, P = shape

        def normal(*shape: int, std: float) -> Parameter:
            return Parameter(torch.randn(shape, generator=draw) * std)

        self.keys, self.values = normal(*shape, std=0.02), normal(*shape, std=0.02)
        self.hidden = hidden
        if hidden:
            self.places = normal(hidden, P, std=1.0)
            self.inner = normal(hidden, hidden, std=hidden**-0.5)
            self.to_keys = Parameter(torch.zeros(rows, hidden))
            self.to_values = Parameter(torch.zeros(rows, hidden))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values (K·D P), with what the MLP adds."""
        if not self.hidden:
            return self.keys, self.values
        h = (self.inner @ self.places).tanh()
        return self.keys + self.to_keys @ h, self.values + self.to_values @ h

    def before(self, k: Tensor, v: Tensor) -> KeyValue:
        """[K_prefix; k], [V_prefix; v] for k, v (B K S D)."""
        B, K, _, D = k.shape
        own = (x.view(K, D, -1).transpose(1, 2).to(k.dtype) for x in self.rows())  # K P D
        return KeyValue(*(x.expand(B, -1, -1, -1) for x in own)).append(k, v)

    def split(self, dim: int, share: Callable[[Parameter, int], Parameter]) -> "Prefix":
        """With some heads; what is inside the MLP is shared by all parts."""
        part = copy.copy(self)
        cut = [n for n in ("keys", "values", "to_keys", "to_values") if n in self._parameters]
        part._parameters = {**self._parameters, **{n: share(getattr(self, n), 0) for n in cut}}
        return part


class Given(nn.Module):
    """Where a prompt's keys and values (1 K P D) in one layer are told, once it is read."""

    kv: KeyValue | None = None

    def before(self, k: Tensor, v: Tensor) -> KeyValue:
        if self.kv is None:
            return KeyValue(k, v)
        return KeyValue(*(x.expand(len(k), -1, -1, -1) for x in self.kv)).append(k, v)

    def split(self, dim: int, share: Callable[[Parameter, int], Parameter]) -> "Given":
        return Given()


# --- a stack whose texts stand behind something ---------------------------------------------------


class Before(nn.Module):
    """P keys that every text of a stack sees, whatever layers keep there."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def enter(self, stack: Stack, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B T C) and positions of a text, before positions are added."""
        return x, positions + self.tokens

    def seen(
        self, position: NoPosition, positions: Tensor, mask: Mask, S: int, dtype: torch.dtype
    ) -> tuple[Mask, Rotation | None]:
        """Who sees whom of P + S keys, and how queries and keys of the text are turned.

        A token's distance to the prefix is P and its place in its own document, wherever in the row
        that stands: mask.lo says where it begins.
        """
        P, own = self.tokens, self.tokens + (mask.at - mask.lo).clamp(min=0)  # B T
        all = Mask(torch.zeros_like(own), torch.full_like(own, P - 1), at=own)
        wide = torch.promote_types(dtype, torch.float32)
        parts = dense(position.scored(all, P), P, wide), dense(position.scored(mask, S), S, wide)
        B, H = (max(x.shape[i] for x in parts) for i in range(2))
        bias = torch.cat([x.expand(B, H, -1, -1) for x in parts], -1)
        return Mask(all.lo, all.lo + P + S - 1, at=own, bias=bias), position.rotation(own)

    def crossed(self, mask: Mask | None) -> Mask | None:
        """What a decoder's tokens see of an encoder's."""
        return mask

    def leave(self, x: Tensor) -> Tensor:
        """What the last block wrote, without what is not the text's."""
        return x


class Prompt(Before):
    """Rows (P C) before a decoder's texts, each layer's keys and values of which are a prefix."""

    def __init__(self, rows: Parameter):
        super().__init__(len(rows))
        self.rows = rows

    def enter(self, stack: Stack, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        tell(stack, [None] * len(stack.layers))
        stack.before = None  # the prompt itself stands behind nothing
        at = torch.arange(self.tokens, device=x.device)[None]
        h = stack.enter(self.rows[None].to(x.dtype), at)
        tell(stack, stack.blocks(h, at, causal_mask(self.tokens, device=x.device))[1])
        stack.before = self
        return x, positions + self.tokens


def tell(stack: Stack, known: Sequence[KeyValue | None]) -> None:
    """Give each layer, or each of its parts, its keys and values."""
    for block, kv in zip(stack.layers, known, strict=True):
        parts = getattr(block.attention, "parts", [block.attention])
        for i, part in enumerate(parts):
            part.prefix.kv = kv and KeyValue(*(x.chunk(len(parts), 1)[i] for x in kv))


class Inside(Before):
    """Rows (P C) before an encoder's texts, in its stream."""

    def __init__(self, rows: Parameter, whole: bool):
        """whole: what the rows become is part of what the encoder gives, as in an encdec."""
        super().__init__(len(rows))
        self.rows, self.whole = rows, whole

    def enter(self, stack: Stack, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.expand(len(x), -1)
        first = torch.arange(self.tokens, device=x.device).expand(len(x), -1)
        x = torch.cat((self.rows.to(x.dtype).expand(len(x), -1, -1), x), 1)
        return x, torch.cat((first, positions + self.tokens), 1)

    def seen(
        self, position: NoPosition, positions: Tensor, mask: Mask, S: int, dtype: torch.dtype
    ) -> tuple[Mask, Rotation | None]:
        P = self.tokens
        hi = behind(mask, P).hi  # the rows see what the text's first token sees
        hi = torch.cat((hi[:, :1].expand(-1, P), hi), 1)
        at = torch.arange(P + S, device=hi.device)[None]
        mask = Mask(torch.zeros_like(hi), hi, at=at)
        return position.scored(mask, P + S), position.rotation(at)

    def leave(self, x: Tensor) -> Tensor:
        return x if self.whole else x[:, self.tokens :]


class Crossed(Before):
    """For the decoder behind an encoder whose texts have P more tokens."""

    def enter(self, stack: Stack, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return x, positions

    def seen(
        self, position: NoPosition, positions: Tensor, mask: Mask, S: int, dtype: torch.dtype
    ) -> tuple[Mask, Rotation | None]:
        return position.scored(mask, S), position.rotation(positions)

    def crossed(self, mask: Mask | None) -> Mask | None:
        return behind(mask, self.tokens)


def behind(mask: Mask, P: int) -> Mask:
    """P more keys that all see; UserError where several texts share a row."""
    if mask.lo.any():
        raise UserError(
            "prompt tuning of an encoder needs rows with one text each: use prefix tuning or LoRA"
        )
    return replace(mask, hi=mask.hi + P)


# --- a model --------------------------------------------------------------------------------------


def check(model: Transformer, how: Adapter) -> None:
    """UserError where there can be no prefix or prompt."""
    c = model.config
    if any(stack.before is not None for stack in stacks(model)):
        raise UserError("the model has a prefix or a prompt already: there can be one")
    if c.attention != "full" or c.position == "relative":
        raise UserError(
            f"--adapter.kind {how.kind} needs --model.attention full and another "
            "--model.position than relative"
        )
    if how.kind == "prompt" and c.dropout and c.arch != "decoder":
        raise UserError("prompt tuning of an encoder needs --model.dropout 0: use prefix tuning")


def check_room(c: ModelConfig, how: Adapter, widths: tuple[int, int]) -> None:
    """UserError if rows of so many tokens, of source and decoder, run out of learned positions."""
    if how.kind not in ("prefix", "prompt") or c.position != "learned":
        return
    longest = widths[0] if how.kind == "prompt" else max(widths)
    if longest + how.tokens > c.context:
        raise UserError(
            f"rows of {longest} tokens and {how.tokens} before them are more than the {c.context} "
            "learned positions of the base: use --adapter.kind lora, or a base with another "
            "--model.position"
        )


def stacks(model: Transformer) -> list[Stack]:
    return [model] if model.encoder is None else [model.encoder, model]


def add_prefix(model: Transformer, how: Adapter, seed: int, ids: Sequence[int] = ()) -> None:
    """Keys and values before all texts of every stack: those of real tokens, or random ones."""
    check(model, how)
    like, P = next(model.parameters()), how.tokens
    known = caches(model, ids) if ids and not like.is_meta else []
    for stack in stacks(model):
        stack.before = Before(P)
        for i, block in enumerate(stack.layers):
            draw = generator(seed, f"init/prefix/{stack is model}/{i}")
            prefix = Prefix((block.attention.key.shape[0], P), how.hidden, draw)
            block.attention.prefix = prefix.to(like)
    for attention, kv in zip(attentions(model) if known else [], known, strict=True):
        put(attention.prefix, kv)


def attentions(model: Transformer) -> list[nn.Module]:
    return [block.attention for stack in stacks(model) for block in stack.layers]


@torch.no_grad()
def caches(model: Transformer, ids: Sequence[int]) -> list[KeyValue]:
    """What each layer of each stack keeps of a text, as if there were nothing before it."""
    text, found = torch.tensor([list(ids)], device=model.embedding.device), []
    at, memory = torch.arange(len(ids), device=text.device)[None], None
    if model.encoder is not None:
        mask = Mask(torch.zeros_like(at), torch.full_like(at, len(ids) - 1))
        found += model.encoder.through(model.embed(text, None, None), at, mask)[1]
        memory = model.encode(text)
    return found + model.extend(text, None, memory=memory)[1]


@torch.no_grad()
def put(prefix: Prefix, kv: KeyValue) -> None:
    """Let a prefix be these keys and values (1 K P D)."""
    for own, x in zip((prefix.keys, prefix.values), kv, strict=True):
        own.copy_(x[0].transpose(1, 2).flatten(0, 1))


def add_prompt(model: Transformer, how: Adapter, seed: int, ids: Sequence[int] = ()) -> None:
    """Rows before all texts: the embeddings of real tokens, or random ones."""
    check(model, how)
    draw = generator(seed, "init/prompt")
    rows = torch.randn(how.tokens, model.config.dim, generator=draw) * 0.02
    if ids:
        rows = F.embedding(torch.tensor(list(ids), device=model.embedding.device), model.embedding)
    rows = Parameter(rows.detach().to(model.embedding))
    if model.config.arch == "decoder":
        model.before = Prompt(rows)
        for block in model.layers:
            block.attention.prefix = Given()
        return
    reader = model if model.encoder is None else model.encoder
    reader.before = Inside(rows, whole=model.encoder is not None)
    if model.encoder is not None:
        model.before = Crossed(how.tokens)


@torch.no_grad()
def settle(model: Transformer) -> None:
    """Drop the MLPs of a prefix: keys and values are now what these made them."""
    for attention in attentions(model):
        prefix = attention.prefix
        if isinstance(prefix, Prefix) and prefix.hidden:
            keys, values = prefix.rows()
            prefix.keys.copy_(keys), prefix.values.copy_(values)
            prefix.hidden = 0
            for name in ("places", "inner", "to_keys", "to_values"):
                delattr(prefix, name)
