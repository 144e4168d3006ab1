"""Adapters in the layout of Hugging Face's PEFT, both ways.

Idea: an adapter is a folder of some kilobytes, adapter_config.json and adapter_model.safetensors,
beside a model in Hugging Face's layout. PEFT loads ours, we load PEFT's:

    base_model.model.<their module>.lora_A.weight, lora_B.weight      of each adapted matrix
    prompt_embeddings       rows (P C) of a prompt, or (P 2·L·K·D) keys and values of a prefix

Where their module holds several of our matrices (GPT-2's c_attn: query, key and value) the adapters
of these become one, whose A are those of all below each other, and whose B a row of blocks. Ours
say in the file of which weights they are the adapter, by a hash, and go on no others.

Run: python writer.py --run tuned --adapter --out adapter    an adapter that was trained here
     python generate.py --run base --adapter adapter            and what its base says with it

Letters: R rank · P tokens · L layers · K key-value heads · D head width · C model width.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from adapters import freeze, frozen_mark
from attention import KeyValue
from families import BARE
from lora import TABLES, Adapter, LowRank, adapted, linears, put, shape_of
from model import Transformer
from model_files import cut, joined, new_folder, opened, read_small, write_settings
from prefix import Inside, Prefix, Prompt, add_prefix, add_prompt, attentions, settle
from prefix import put as put_prefix
from run import UserError, write_json

TASKS = {"decoder": "CAUSAL_LM", "encdec": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}


class Theirs(NamedTuple):
    """A matrix of their model: its module, our linears that it holds, and how these lie in it."""

    module: str  # its name, before which there may stand a prefix
    prefix: str
    ours: tuple[str, ...]
    groups: int
    in_out: bool  # whether it lies transposed

    @property
    def looked_up(self) -> bool:
        """An embedding's A and B are those of its transposed matrix."""
        return self.ours == ("embedding",)

    def tensors(self, letter: str) -> list[str]:
        """What A or B may be called: as in a model with heads, or in one without."""
        kind = f"lora_embedding_{letter}" if self.looked_up else f"lora_{letter}.weight"
        return [f"base_model.model.{p}{self.module}.{kind}" for p in (self.prefix, "")]


def theirs(model: Transformer) -> Iterator[Theirs]:
    """The matrices of a model as its files have them; UserError if no family is such a model."""
    c = model.config
    family, _ = write_settings({**vars(c), "kv_heads": c.kv_heads_or_heads, "ffn_dim": c.ffn_width},
                               None)  # fmt: skip
    tables = TABLES if c.arch == "decoder" and not c.tied else ()
    known, groups = {*linears(model), *tables}, c.heads if family.by_head else 1
    for name, ours in family.names.items():
        for n in range(c.layers if ".N." in name else 1):
            here = tuple(x.replace(".N.", f".{n}.").removesuffix(".weight") for x in ours)
            if name.endswith(".weight") and all(x in known for x in here):
                module = name.removesuffix(".weight").replace(".N.", f".{n}.")
                bare = c.arch == "encoder" or name.startswith(BARE)
                prefix = "" if bare else family.prefix
                yield Theirs(module, prefix, here, groups, family.transposed)


# --- writing --------------------------------------------------------------------------------------


def save_adapter(model: Transformer, folder: Path, base: str = "") -> None:
    """Write what was trained beside a model's weights; base: the name of their folder."""
    settle(model)
    many = len({name for linear in adapted(model).values() for name in linear.adapters})
    if many + (model.before is not None) != 1:
        raise UserError(f"{many} adapters are on the model: a folder holds one")
    values, tensors = (lora_files if many else prompt_files)(model)
    more = {"base_model_name_or_path": base or None, "inference_mode": True,
            "task_type": TASKS[model.config.arch], "peft_version": "0.21.2"}  # fmt: skip
    mark = {"format": "pt", "base": frozen_mark(model)}
    with new_folder(folder) as draft:
        write_json(draft / "adapter_config.json", values | more)
        tensors = {name: x.detach().float().contiguous() for name, x in tensors.items()}
        save_file(tensors, draft / "adapter_model.safetensors", metadata=mark)


def lora_files(model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's settings and tensors of LoRA; of several adapted matrices in one, one A and one B.

    PEFT's s is α/r, which our s stays: for rank R in all, α is s R.
    """
    found, ranks, alphas, tensors = adapted(model), {}, {}, {}
    if found.keys() & set(TABLES) and (model.config.tied or model.config.arch != "decoder"):
        raise UserError("PEFT adapts one use of an embedding, and this one has two: leave it out")
    for one in theirs(model):
        each = [found[x].adapters if x in found else None for x in one.ours]
        lows = [None if x is None else next(iter(x.values())) for x in each]
        some = [low for low in lows if low is not None]
        if not some:
            continue
        A = torch.cat([low.A for low in some])
        rows, at = [], 0
        for name, low in zip(one.ours, lows, strict=True):
            wide = A.new_zeros(shape_of(model, name)[0], len(A))
            if low is not None:
                wide[:, at : at + len(low.A)] = low.B
                at += len(low.A)
            rows.append(wide)
        B = joined(rows, one.groups)
        A, B = (B.T, A.T) if one.looked_up else (A, B)
        tensors |= {one.tensors("A")[0]: A, one.tensors("B")[0]: B}
        ranks[one.module], alphas[one.module] = len(A), some[0].scale * len(A)
    first = next(iter(ranks))
    values = {"peft_type": "LORA", "r": ranks[first], "lora_alpha": alphas[first],
              "lora_dropout": 0.0, "target_modules": sorted(ranks), "rank_pattern": ranks,
              "alpha_pattern": alphas, "use_rslora": False, "bias": "none",
              "fan_in_fan_out": one.in_out}  # fmt: skip
    return values, tensors


def prompt_files(model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's settings and tensors of a prompt, or of a prefix (whose layout is a decoder's)."""
    c, before = model.config, model.before
    values = {"num_layers": c.layers, "num_transformer_submodules": 1, "num_virtual_tokens": None}
    if isinstance(before, Prompt | Inside):
        values |= {"peft_type": "PROMPT_TUNING", "token_dim": c.dim, "num_attention_heads": c.heads,
                   "prompt_tuning_init": "RANDOM"}  # fmt: skip
        rows = before.rows
    elif c.arch == "decoder":
        K, D = c.kv_heads_or_heads, c.head_dim
        values |= {"peft_type": "PREFIX_TUNING", "token_dim": K * D, "num_attention_heads": K,
                   "encoder_hidden_size": K * D, "prefix_projection": False}  # fmt: skip
        kept = [(a.prefix.keys, a.prefix.values) for a in attentions(model)]
        rows = torch.cat([x.T for kv in kept for x in kv], 1)
    else:
        raise UserError("PEFT's prefixes are those of decoders, and its prompts not of an encdec")
    return values | {"num_virtual_tokens": len(rows)}, {"prompt_embeddings": rows}


# --- reading --------------------------------------------------------------------------------------


def load_adapter(model: Transformer, folder: Path, name: str = "default") -> None:
    """Put the adapter of a folder on a model, which is frozen; several may stand on it.

    UserError if it fits not, or says that it belongs to other weights.
    """
    values, path = read_small(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    kind, config = values.get("peft_type"), folder / "adapter_config.json"
    if kind not in LOADERS:
        raise UserError(f"{config}: peft_type {kind!r} is not known here: {', '.join(LOADERS)}")
    for key, plain in PLAIN.items():
        if values.get(key) not in (None, *plain):
            raise UserError(f"{config}: {key} {values[key]!r} is not known here")
    with opened(path) as file:
        mark = (file.metadata() or {}).get("base")
        tensors = {n: file.get_tensor(n).float() for n in file.keys()}  # noqa: SIM118
    freeze(model)
    if mark and mark != frozen_mark(model):
        raise UserError(f"{folder} is an adapter of other weights than those of this model")
    LOADERS[kind](model, values, tensors, path, name)


PLAIN = {  # of PEFT's settings those that would change the function, and what they must be
    "bias": ("none",), "use_dora": (False,), "modules_to_save": ([],), "layer_replication": ([],),
    "fan_in_fan_out": (False, True), "prefix_projection": (False,),
    "trainable_token_indices": ([],),
    "lora_bias": (False,), "num_transformer_submodules": (1,),
    # variants of LoRA, and beginnings that take from the base what they add
    "use_qalora": (False,), "use_bdlora": (), "alora_invocation_tokens": (), "kasa_config": (),
    "monteclora_config": (), "arrow_config": (), "velora_config": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip


def of_module(values: dict, pattern: str, plain: str, module: str, path: Path) -> float:
    """A setting of one matrix: what a pattern says of its name, as PEFT matches them, or of all."""
    given, config = values.get(pattern) or {}, path.parent / "adapter_config.json"
    try:
        value = next((x for name, x in given.items() if re.match(rf"(.*\.)?({name})$", module)),
                     values.get(plain))  # fmt: skip
    except (AttributeError, re.error):
        raise UserError(f"{config}: {pattern} {given!r} is no table of patterns") from None
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{config}: {plain} cannot be {value!r}")
    return value


def load_lora(
    model: Transformer, values: dict, tensors: dict[str, Tensor], path: Path, name: str
) -> None:
    left = dict(tensors)
    for one in theirs(model):
        A, B = (
            next((left.pop(n) for n in one.tensors(letter) if n in left), None) for letter in "AB"
        )
        if A is None or B is None:
            continue
        A, B = (B.T, A.T) if one.looked_up else (A, B)
        shapes = [shape_of(model, x) for x in one.ours]
        rows = sum(out for out, _ in shapes)
        if A.dim() != 2 or A.shape[1] != shapes[0][1] or B.shape != (rows, len(A)):
            raise UserError(
                f"{path} does not fit the model: {one.module} has {tuple(A.shape)} and "
                f"{tuple(B.shape)} beside a matrix ({rows}, {shapes[0][1]})"
            )
        alpha = of_module(values, "alpha_pattern", "lora_alpha", one.prefix + one.module, path)
        scale = alpha / (len(A) ** 0.5 if values.get("use_rslora") else len(A))
        parts = cut(B, len(one.ours), one.groups)
        for linear, shape, part in zip(one.ours, shapes, parts, strict=True):
            low = LowRank(shape, len(A), scale)
            low.A, low.B = Parameter(A.clone()), Parameter(part.contiguous())
            put(model, linear, name, low)
    if left or not tensors:
        what = min(left) if left else "nothing"
        raise UserError(f"{path} has {what}, which is no adapter of a linear of this model")


def rows_in(tensors: dict[str, Tensor], values: dict, width: int, path: Path) -> Tensor:
    rows = tensors.get("prompt_embeddings")
    shape = None if rows is None else tuple(rows.shape)
    if len(tensors) != 1 or shape is None or shape != (values.get("num_virtual_tokens"), width):
        raise UserError(
            f"{path} does not fit the model: prompt_embeddings is {shape}, "
            f"not ({values.get('num_virtual_tokens')}, {width})"
        )
    return rows


def load_prefix(
    model: Transformer, values: dict, tensors: dict[str, Tensor], path: Path, name: str
) -> None:
    c = model.config
    if c.arch != "decoder":
        raise UserError(f"{path} is a prefix of a decoder, which this model is not")
    K, D = c.kv_heads_or_heads, c.head_dim
    rows = rows_in(tensors, values, 2 * c.layers * K * D, path)
    add_prefix(model, Adapter("prefix", tokens=len(rows)), 0)
    parts = rows.view(len(rows), 2 * c.layers, K, D).permute(1, 2, 0, 3)[:, None]  # 2L 1 K P D
    for attention, k, v in zip(attentions(model), parts[::2], parts[1::2], strict=True):
        prefix: Prefix = attention.prefix
        put_prefix(prefix, KeyValue(k, v))


def load_prompt(
    model: Transformer, values: dict, tensors: dict[str, Tensor], path: Path, name: str
) -> None:
    rows = rows_in(tensors, values, model.config.dim, path)
    add_prompt(model, Adapter("prompt", tokens=len(rows)), 0)
    reader = model if model.encoder is None else model.encoder
    reader.before.rows.data.copy_(rows)


LOADERS = {"LORA": load_lora, "PREFIX_TUNING": load_prefix, "PROMPT_TUNING": load_prompt}
