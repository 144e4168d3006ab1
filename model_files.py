"""Model files: the GPT-2 and Llama folders that people have, read into our names and written back.

Idea: such a folder is a config.json, which says what the model is, and *.safetensors files, which
hold its tensors: a table of names, types, shapes and places, then nothing but numbers. A `Family`
is two tables, of settings and of names; the rest is the same for all.

    config.json        -> settings of a ModelConfig
    model.safetensors  -> `Weights`: first the shapes of our tensors, then the numbers
    model.safetensors.index.json, where they stand in several files: the file of each

A file may come from anywhere. Shapes are known before a number is read, so that they are compared
with the model before memory is taken; nothing is ever unpickled; what this program cannot compute
is refused by its name.

Run: python -m pytest tests/test_model_files.py

Formats: https://github.com/huggingface/safetensors; transformers' LlamaConfig and GPT2Config.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from run import UserError, plain, read_json, setting, sync, write_json

LARGEST_JSON = 1 << 26  # bytes; a config has a thousand, an index of 100,000 tensors ten million
DTYPES = ("F32", "F16", "BF16")  # fp32 holds their numbers without loss

# --- the families ---------------------------------------------------------------------------------


class Family(NamedTuple):
    """A kind of model: what its files call our settings and tensors, and what it cannot be."""

    always: dict[str, Any]  # settings of ours that all its models share
    settings: dict[str, tuple[str, Any]]  # ours -> theirs; its value where config.json is silent
    activations: dict[str, str]  # theirs -> ours
    only: dict[str, Any]  # theirs that would change the function, and the one value known here
    written: dict[str, Any]  # theirs that say nothing to us, but something to transformers
    prefix: str  # may stand before every name but the head's
    names: dict[str, tuple[str, ...]]  # theirs -> ours; several stand side by side in this order
    transposed: bool  # the matrices of its blocks are (in out)


def named(whole: dict[str, str], block: str, modules: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Names with N for a block's number; what is no weight, such as a mask, is nothing of ours.

    Each module of a block has a weight and perhaps a bias.
    """
    return {theirs: tuple(ours.split()) for theirs, ours in whole.items()} | {
        f"{block}.N.{theirs}.{kind}": tuple(f"layers.N.{name}.{kind}" for name in ours.split())
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    }


ALWAYS = {  # what neither family can be
    "arch": "decoder", "order": "pre", "attention": "full", "window": 128, "qk_norm": False,
    "head_width": 0, "scaled_head": False, "score_scale": 0.0, "embed_norm": False, "segments": 0,
    "buckets": 32, "reach": 128, "rope_interleaved": False,
}  # fmt: skip
LLAMA = Family(
    always={**ALWAYS, "position": "rope", "norm": "rmsnorm"},
    settings={
        "dim": ("hidden_size", None), "ffn_dim": ("intermediate_size", None),
        "heads": ("num_attention_heads", None), "kv_heads": ("num_key_value_heads", 0),
        "layers": ("num_hidden_layers", None), "context": ("max_position_embeddings", 2048),
        "vocab_size": ("vocab_size", None), "tied": ("tie_word_embeddings", False),
        "norm_eps": ("rms_norm_eps", 1e-6), "bias": ("attention_bias", False),
        "activation": ("hidden_act", "silu"),
    },
    activations={"silu": "swiglu"},
    only={
        "partial_rotary_factor": 1.0, "original_max_position_embeddings": None,
        "sliding_window": None, "quantization_config": None,
    },
    written={"architectures": ["LlamaForCausalLM"]},
    prefix="model.",
    names=named(
        {
            "embed_tokens.weight": "embedding", "lm_head.weight": "head",
            "norm.weight": "norm.weight", "layers.N.self_attn.rotary_emb.inv_freq": "",
        },
        "layers",
        {
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
            "self_attn.v_proj": "attention.value", "self_attn.o_proj": "attention.output",
            "mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down",
        },
    ),
    transposed=False,
)  # fmt: skip
GPT2 = Family(
    always={**ALWAYS, "position": "learned", "norm": "layernorm", "bias": True},
    settings={
        "dim": ("n_embd", None), "ffn_dim": ("n_inner", 0), "heads": ("n_head", None),
        "layers": ("n_layer", None), "context": ("n_positions", None),
        "vocab_size": ("vocab_size", None), "tied": ("tie_word_embeddings", True),
        "norm_eps": ("layer_norm_epsilon", 1e-5), "activation": ("activation_function", "gelu_new"),
    },
    activations={"gelu_new": "gelu_tanh", "gelu": "gelu"},
    only={
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "quantization_config": None,
    },
    written={
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    prefix="transformer.",
    names=named(
        {
            "wte.weight": "embedding", "wpe.weight": "position.table", "lm_head.weight": "head",
            "ln_f.weight": "norm.weight", "ln_f.bias": "norm.bias",
            "h.N.attn.bias": "", "h.N.attn.masked_bias": "",  # masks
        },
        "h",
        {
            "ln_1": "attention_norm", "ln_2": "ffn_norm",
            "attn.c_attn": "attention.query attention.key attention.value",
            "attn.c_proj": "attention.output", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down",
        },
    ),
    transposed=True,
)  # fmt: skip
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}

ROPE = {  # ours -> theirs
    "rope_factor": ("factor", float),
    "rope_context": ("original_max_position_embeddings", int),
    "rope_low": ("low_freq_factor", float),
    "rope_high": ("high_freq_factor", float),
}
SCALINGS = {"none": (), "linear": ("rope_factor",), "llama3": tuple(ROPE)}  # what they have of it

# --- config.json ----------------------------------------------------------------------------------


def read_small(path: Path) -> dict:
    """A JSON object from a file that anybody may have made."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} is too large: {path.stat().st_size:,} bytes")
    return read_json(path)


def taken(values: dict, key: str, kind: type, where: Path, silent: Any = None) -> Any:
    """values[key], which must be of this kind; `silent` where it is missing or null."""
    value = values.get(key)
    return silent if value is None and silent is not None else setting(kind, value, where, key)


def check(key: str, value: object, known: Sequence, where: Path | str) -> None:
    if value not in known:
        known = " or ".join(dict.fromkeys(map(json.dumps, known)))
        raise UserError(f"{where}: {key} {short(value)} is not supported, only {known}")


def read_settings(hf: dict, where: Path) -> dict[str, Any]:
    """config.json as settings of a ModelConfig; UserError where our model would be another."""
    check("model_type", hf.get("model_type"), list(FAMILIES), where)
    family = FAMILIES[hf["model_type"]]
    out, only = dict(family.always), dict(family.only)
    for ours, (theirs, silent) in family.settings.items():
        out[ours] = taken(hf, theirs, int if silent is None else type(silent), where, silent)
    check(family.settings["activation"][0], out["activation"], list(family.activations), where)
    out["activation"] = family.activations[out["activation"]]
    if family is LLAMA:
        out |= read_rope(hf, where)
        check("mlp_bias", hf.get("mlp_bias") or False, [out["bias"]], where)
        only["head_dim"] = out["dim"] // max(out["heads"], 1)
    for key, value in only.items():
        check(key, hf.get(key), [value, None], where)
    return out


def read_rope(hf: dict, where: Path) -> dict[str, Any]:
    """rope_parameters, or rope_theta and rope_scaling, as it was before transformers 5."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    if not isinstance(rope := hf.get(key) or {}, dict):
        raise UserError(f"{where}: {key} cannot be {short(rope)}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check("rope_type", kind, ["default", "linear", "llama3"], where)
    for key in rope:
        known = [theirs for theirs, _ in ROPE.values()]
        check("RoPE's", key, ["rope_type", "type", "rope_theta", *known], where)
    kind = "none" if kind == "default" else kind
    base = taken({"rope_theta": hf.get("rope_theta"), **rope}, "rope_theta", float, where, 1e4)
    scaled = {ours: taken(rope, *ROPE[ours], where) for ours in SCALINGS[kind]}
    return {"rope_scaling": kind, "rope_base": base, **scaled}


def write_settings(settings: dict[str, Any], end: int | None) -> tuple[Family, dict[str, Any]]:
    """A family and its config.json; UserError where it has no word for a setting of ours."""
    kind = "llama" if settings["position"] == "rope" else "gpt2"
    family = FAMILIES[kind]
    theirs = {ours: theirs for theirs, ours in family.activations.items()}
    check("activation", settings["activation"], list(theirs), f"a {kind} file")
    for name, value in {"kv_heads": settings["heads"], **family.always}.items():
        if name not in family.settings:
            check(name, settings[name], [value], f"a {kind} file")
    hf = {key: settings[ours] for ours, (key, _) in family.settings.items()}
    hf[family.settings["activation"][0]] = theirs[settings["activation"]]
    if family is LLAMA:
        scaling = settings["rope_scaling"]
        rope = {ROPE[ours][0]: settings[ours] for ours in SCALINGS[scaling]}
        rope |= {"rope_type": "default" if scaling == "none" else scaling}
        hf["rope_parameters"] = rope | {"rope_theta": settings["rope_base"]}
        hf["mlp_bias"] = settings["bias"]
    ends = {"bos_token_id": end, "eos_token_id": end}  # null: none; silence: transformers' default
    return family, {"model_type": kind, **family.written, "dtype": "float32", **hf, **ends}


def begin_and_ends(folder: Path) -> list[set[int]]:
    """The ids that begin a text and those that end one, so far as config.json says."""
    hf = read_small(folder / "config.json")
    ids = (hf.get(key) for key in ("bos_token_id", "eos_token_id"))
    lists = (x if isinstance(x, list) else [x] for x in ids)
    return [{id for id in some if type(id) is int} for some in lists]


# --- tensors --------------------------------------------------------------------------------------


def our_names(family: Family | None, name: str, where: Path) -> tuple[str, ...]:
    """What stands in a tensor of theirs; without a family names are ours already."""
    if family is None:
        return (name,)
    number = re.search(r"\.(0|[1-9][0-9]*)\.", name)
    n = number[0] if number else ".N."
    ours = family.names.get(name.removeprefix(family.prefix).replace(n, ".N."))
    if ours is None:
        raise UserError(f"{where}: {short(name)} is no tensor of such a model")
    return tuple(full.replace(".N.", n) for full in ours)


def turned(family: Family | None, ours: str, x: Tensor) -> Tensor:
    """A tensor of theirs as ours lies, or the other way round."""
    in_out = family is not None and family.transposed and ours.startswith("layers.")
    return x.T if in_out and x.dim() == 2 else x


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    try:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}") from None


def outline(file: safe_open, name: str, where: Path) -> Tensor:
    """A tensor's shape, as a tensor on the meta device, which takes no memory."""
    x = file.get_slice(name)
    check(short(name), x.get_dtype(), DTYPES, where)
    shape = tuple(x.get_shape())
    if not shape or 0 in shape:  # beside a 0 any other length is believed
        raise UserError(f"{where}: {short(name)} of shape {shape} is no weight")
    return torch.empty(shape, device="meta")


@dataclass(frozen=True)
class Weights:
    """Tensors that stand in files, under the names of a family or, without one, under ours."""

    files: list[Path]
    family: Family | None = None
    tied: bool = False  # a head can only be the embedding once more

    def load(self, device: str = "cpu") -> dict[str, Tensor]:
        """All by our names, in fp32, in memory of their own; on the meta device only the shapes."""
        meta, out = device == "meta", {}
        for path in self.files:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    names = our_names(self.family, name, path)
                    if not names:
                        continue
                    x = outline(file, name, path) if meta else file.get_tensor(name)
                    if not meta and not x.isfinite().all():
                        raise UserError(f"{path}: {name} holds a number that is not finite")
                    x = turned(self.family, names[0], x)
                    for ours, part in zip(names, x.chunk(len(names)), strict=False):
                        if ours in out:
                            raise UserError(f"{path}: {short(name)} is there twice")
                        out[ours] = part if meta else torch.empty(part.shape).copy_(part)
        head = out.pop("head", None) if self.tied else None
        if head is not None and not meta and not head.equal(out["embedding"]):
            raise UserError(
                f"{self.files[0].parent}: the head is not the embedding, as config.json says"
            )
        return out


def shards(folder: Path) -> list[Path]:
    """The files of a folder's tensors; each holds what the index, if there is one, says."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt*")]
        more = f", and {pickles[0].name} is never unpickled: convert it" if pickles else ""
        raise UserError(f"{folder} has no model.safetensors{more}")
    home = read_small(index).get("weight_map")
    if not isinstance(home, dict) or not home:
        raise UserError(f"{index}: weight_map is no table of tensors and their files")
    names: dict[str, set[str]] = {}
    for name, file in home.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII):
            raise UserError(f"{index}: {short(name)} cannot stand in {short(file)}")
        names.setdefault(file, set()).add(name)
    for file, expected in names.items():
        with opened(folder / file) as tensors:
            for name in sorted(expected ^ set(tensors.keys())):
                what = "lacks" if name in expected else "holds"
                raise UserError(f"{folder / file} {what} {short(name)}, against {index.name}")
    return [folder / file for file in names]


def read_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Settings of a ModelConfig, and the weights, of which nothing is loaded yet."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    hf = read_small(folder / "config.json")
    settings = read_settings(hf, folder / "config.json")
    return settings, Weights(shards(folder), FAMILIES[hf["model_type"]], settings["tied"])


# --- writing --------------------------------------------------------------------------------------


def exported(family: Family, tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our tensors under their names, in fp32."""
    out, left = {}, dict(tensors)
    for theirs, ours in family.names.items():
        prefix = "" if ours == ("head",) else family.prefix
        for n in range(layers) if ".N." in theirs else (0,):
            parts = [left.pop(name.replace(".N.", f".{n}."), None) for name in ours]
            if parts and parts[0] is not None:
                x = torch.cat(parts) if len(parts) > 1 else parts[0]
                out[prefix + theirs.replace(".N.", f".{n}.")] = turned(family, ours[0], x.float())
    if left:
        raise UserError(f"a model file has no place for {min(left)}")
    return plain(out)


def write_folder(
    folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], end: int | None, most: int
) -> None:
    """A folder that transformers loads, whole or not at all, with at most so many bytes a file.

    The token `end`, if there is one, begins and ends a text.
    """
    family, hf = write_settings(settings, end)
    theirs = exported(family, tensors, settings["layers"])
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: choose another folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    try:
        draft.mkdir(parents=True)
        write_json(draft / "config.json", hf)
        write_tensors(draft, theirs, most)
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_tensors(folder: Path, tensors: dict[str, Tensor], most: int) -> None:
    """model.safetensors, or several files and their index."""
    files: list[dict[str, Tensor]] = [{}]
    for name, x in tensors.items():
        if files[-1] and sum(y.nbytes for y in files[-1].values()) + x.nbytes > most:
            files.append({})
        files[-1][name] = x
    if len(files) == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    home = {}
    for number, part in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(part, file)
    total = {"total_size": sum(x.nbytes for x in tensors.values())}
    write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": home})
