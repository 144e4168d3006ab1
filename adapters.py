"""Adapters: the few weights that are trained beside a frozen model, of whatever kind.

    adapt(model, settings)     LoRA, a prefix or a prompt on a model, all else frozen
    frozen_mark(model)         what it stands beside: a hash

Run: python -m pytest tests/test_prefix.py tests/test_lora.py
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from lora import Adapter, add_lora, plain_name
from model import Transformer
from prefix import add_prefix, add_prompt
from run import UserError, generator
from vocabulary import Tokenizer


def in_block(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter's part in a block."""
    return ".adapters." in name or ".prefix." in name


def of_adapter(name: str) -> bool:
    """Whether it belongs to an adapter."""
    return in_block(name) or name.startswith(("before.", "encoder.before."))


def adapt(
    model: Transformer, how: Adapter, seed: int = 0, name: str = "default", ids: Sequence[int] = ()
) -> None:
    """Put an adapter on a model, and freeze all that is none.

    ids: tokens of which a prefix or prompt is made at first, as `first_ids` finds them.
    """
    if how.kind == "none":
        return
    freeze(model)
    if how.kind == "lora":
        add_lora(model, how, seed, name)
    else:
        {"prefix": add_prefix, "prompt": add_prompt}[how.kind](model, how, seed, ids)


def freeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def first_ids(how: Adapter, tokenizer: Tokenizer, seed: int) -> list[int]:
    """P tokens whose embeddings, or keys and values, a prompt or a prefix begins with.

    Random ones of the vocabulary, or those of a text, repeated or cut (Lester et al. 2021, 3.2).
    """
    if how.kind not in ("prefix", "prompt") or how.start == "random":
        return []
    if how.start == "vocabulary":
        ordinary = sorted(set(tokenizer.known_ids) - set(tokenizer.special.values()))
        draw = torch.randint(len(ordinary), (how.tokens,), generator=generator(seed, "init/prompt"))
        return [ordinary[i] for i in draw]
    if not (ids := tokenizer.encode(how.text, "text")):
        raise UserError(f"--adapter.text {how.text!r} has no token")
    return [ids[i % len(ids)] for i in range(how.tokens)]


def frozen_mark(model: nn.Module) -> str:
    """A hash of all frozen weights, by which an adapter knows its base; "" if there are none.

    Adapters are not part of it, frozen or not.
    """
    sum = hashlib.blake2b(digest_size=16)
    kept = model.state_dict(keep_vars=True)  # with the codes of quantized linears
    frozen = {n: p for n, p in kept.items() if not p.requires_grad}
    base = {plain_name(n): p for n, p in frozen.items() if not of_adapter(n)}
    for name, p in sorted(base.items()):
        bits = p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        sum.update(f"{name} {tuple(p.shape)} ".encode() + bits)
    return sum.hexdigest() if frozen else ""
