"""Model files: folders of GPT-2, Llama, Mistral, Qwen3, BERT, T5, BLOOM in our names, and back.

Idea: such a folder is a config.json, which says what the model is, and *.safetensors files, which
hold its tensors: a table of names, types, shapes and places, then nothing but numbers. What each
family of models calls its settings and tensors, families.py says; the rest is the same for all.

    config.json        -> settings of a ModelConfig
    model.safetensors  -> `Weights`: first the shapes of our tensors, then the numbers
    model.safetensors.index.json, where they stand in several files: the file of each

A file may come from anywhere. Shapes are known before a number is read, so that they are compared
with the model before memory is taken; nothing is ever unpickled; what this program cannot compute
is refused by its name.

Run: python -m pytest tests/test_model_files.py

Format: https://github.com/huggingface/safetensors
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from families import BARE, FAMILIES, IMPLIED, Family, check, taken
from run import UserError, plain, read_json, sync, write_json

LARGEST_JSON = 1 << 26  # bytes; a config has a thousand, an index of 100,000 tensors ten million
DTYPES = ("F32", "F16", "BF16")  # fp32 holds their numbers without loss
Ids = int | list[int] | None  # of tokens, as config.json has them

# --- config.json ----------------------------------------------------------------------------------


def read_small(path: Path) -> dict:
    """A JSON object from a file that anybody may have made."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size > LARGEST_JSON:
        raise UserError(f"{path} is too large: {path.stat().st_size:,} bytes")
    return read_json(path)


def clashes(family: Family, hf: dict) -> list[str]:
    """Keys of what the family cannot be. A null says as much as silence, or no."""

    def fits(key: str, known: Any) -> bool:
        value = hf.get(key, known)
        return value == known or (value is None and known is not True)

    return [key for key, known in family.only.items() if not fits(key, known)]


def read_settings(hf: dict, where: Path) -> tuple[Family, dict[str, Any]]:
    """config.json as a family and settings; UserError where our model would be another."""
    types = dict.fromkeys(family.written["model_type"] for family in FAMILIES.values())
    check("model_type", hf.get("model_type"), list(types), where)
    kinds = [f for f in FAMILIES.values() if f.written["model_type"] == hf["model_type"]]
    family = min(kinds, key=lambda kind: len(clashes(kind, hf)))
    for key in clashes(family, hf):
        known = [kind.only[key] for kind in kinds if kind.only[key] != hf[key]]
        check(key, hf[key], known, where)
    for theirs, usual in family.also:
        if hf.get(theirs) is not None:
            check(usual, hf.get(usual, hf[theirs]), [hf[theirs]], where)
            hf = hf | {usual: hf[theirs]}
    out = dict(family.always)
    for ours, (theirs, silent) in family.settings.items():
        implied = ours in IMPLIED and silent is not None and theirs in hf
        default = 0 if implied else silent  # of null
        out[ours] = taken(hf, theirs, int if silent is None else type(silent), where, default)
        if ours in family.choices:
            check(theirs, out[ours], list(family.choices[ours]), where)
            out[ours] = family.choices[ours][out[ours]]
    for part in family.parts:
        out |= part.read(hf, out, where)
    return family, out


def misfits(family: Family, settings: dict[str, Any]) -> list[tuple[str, list]]:
    """Settings of ours for which a family has no word, and what it could say."""
    dim, heads = settings["dim"], settings["heads"]
    implied = dict(zip(IMPLIED, (heads, dim // heads, 4 * dim), strict=True))
    placed = {*family.settings, *(name for part in family.parts for name in part.ours)}
    fixed = {name: value for name, value in family.always.items() if name not in placed}
    known = {name: [implied.get(name, value)] for name, value in fixed.items()}
    known |= {name: list(choices.values()) for name, choices in family.choices.items()}
    if not family.free_width and dim % heads:
        known["heads"] = [gcd(dim, heads)]
    return [(name, values) for name, values in known.items() if settings[name] not in values]


def write_settings(
    settings: dict[str, Any], end: Ids, begin: int | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that fits and its config.json; UserError where none has all that is needed."""
    s = settings | {"head_width": settings["head_width"] or settings["dim"] // settings["heads"]}

    def distance(kind: str) -> tuple[bool, int]:
        other = FAMILIES[kind].always["position"] != s["position"]
        return other, len(misfits(FAMILIES[kind], s))

    kind = min(FAMILIES, key=distance)
    family = FAMILIES[kind]
    for name, known in misfits(family, s):
        check(name, s[name], known, f"a {kind} file")
    spelt = s | {
        name: next(theirs for theirs, ours in choices.items() if ours == s[name])
        for name, choices in family.choices.items()
    }
    hf = {theirs: spelt[ours] for ours, (theirs, _) in family.settings.items()}
    for part in family.parts:
        hf |= part.write(s)
    # null: none; silence: transformers' default
    ids = {"bos_token_id": begin, "eos_token_id": end}
    if begin is not None and "decoder_start_token_id" in family.written:
        ids["decoder_start_token_id"] = begin
    return family, {**family.written, "dtype": "float32", **hf, **ids}


def special_ids(folder: Path) -> list[set[int]]:
    """The ids that begin a text, end one, and begin an answer, so far as config.json says."""
    hf = read_small(folder / "config.json")
    ids = (hf.get(key) for key in ("bos_token_id", "eos_token_id", "decoder_start_token_id"))
    lists = (x if isinstance(x, list) else [x] for x in ids)
    return [{id for id in some if type(id) is int} for some in lists]


# --- tensors --------------------------------------------------------------------------------------


def our_names(family: Family | None, name: str, where: Path) -> tuple[str, ...]:
    """What stands in a tensor of theirs; without a family names are ours already."""
    if family is None:
        return (name,)
    bare = name.removeprefix(family.prefix)
    number = re.search(r"\.(0|[1-9][0-9]*)\.", bare)
    n = number[0] if number else ".N."
    ours = family.names.get(bare, family.names.get(bare.replace(n, ".N.", 1)))
    if ours is None:
        raise UserError(f"{where}: {short(name)} is no tensor of such a model")
    return tuple(full.replace(".N.", n) for full in ours)


def turned(family: Family | None, ours: str, x: Tensor) -> Tensor:
    """A tensor of theirs as ours lies, or the other way round."""
    in_out = family is not None and family.transposed and ours.startswith("layers.")
    return x.T if in_out and x.dim() == 2 else x


def cut(x: Tensor, parts: int, groups: int) -> list[Tensor]:
    """Parts whose rows lie side by side in each group of rows: q k v, or q₁ k₁ v₁ q₂ k₂ v₂ …"""
    if parts == 1:
        return [x]
    return [part.flatten(0, 1) for part in x.unflatten(0, (groups, parts, -1)).unbind(1)]


def joined(parts: list[Tensor], groups: int) -> Tensor:
    """What `cut` cuts."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 2)


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
    groups: int = 1  # of rows, in what is fused

    def each(self, meta: bool) -> Iterator[tuple[Path, str, tuple[str, ...], Tensor]]:
        """A file, a name in it, its names here, and the tensor as it lies there, or its shape."""
        for path in self.files:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if names := our_names(self.family, name, path):
                        x = outline(file, name, path) if meta else file.get_tensor(name)
                        yield path, name, names, turned(self.family, names[0], x)

    def load(self, device: str = "cpu") -> dict[str, Tensor]:
        """All by our names, in fp32, in memory of their own; on the meta device only the shapes."""
        meta, out, again = device == "meta", {}, []
        for path, name, names, x in self.each(meta):
            if names[0].startswith("=") or (self.tied and names[0] == "head"):
                again.append((path, name, names[0].removeprefix("="), x))
                continue
            if len(names) > 1 and len(x) % (len(names) * self.groups):
                alike = f"{len(names)} × {self.groups}" if self.groups > 1 else len(names)
                raise UserError(f"{path}: {name} has {len(x)} rows, which are not {alike} alike")
            for ours, part in zip(names, cut(x, len(names), self.groups), strict=True):
                if ours in out:
                    raise UserError(f"{path}: {short(name)} is there twice")
                out[ours] = part if meta else torch.empty(part.shape).copy_(part)
                if not meta and not torch.stack(out[ours].aminmax()).isfinite().all():  # or NaN
                    raise UserError(f"{path}: {name} holds a number that is not finite")
        for path, name, ours, x in () if meta else again:
            ours = "embedding" if ours == "head" else ours
            own = torch.ones(x.shape) if ours == "1" else out.get(ours)
            if own is None or own.shape != x.shape or not own.equal(x.float()):
                if ours == "1":
                    raise UserError(
                        f"{path}: {name} is not all ones, and our models have no learnt norm of "
                        "queries and keys"
                    )
                raise UserError(f"{path}: {name} is not the {ours}, as it should be")
        return out

    def has_own_head(self, shape: tuple[int, int]) -> bool:
        """Whether a head of this shape stands there that is another matrix than the embedding."""
        found = {names[0]: x.shape for _, _, names, x in self.each(meta=True)}
        if {found.get("head"), found.get("embedding")} != {shape}:
            return False
        views = {names[0]: x for _, _, names, x in self.each(meta=False)}
        return not views["head"].float().equal(views["embedding"].float())


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


def read_folder(folder: Path, heads: bool = False) -> tuple[dict[str, Any], Weights]:
    """Settings of a ModelConfig, and the weights, of which nothing is loaded yet.

    The weights are those of the model or, if that is wished, those of the heads beside it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    family, settings = read_settings(read_small(folder / "config.json"), folder / "config.json")
    wanted, other = (family.heads, family.names) if heads else (family.names, family.heads)
    family = family._replace(names={**wanted, **dict.fromkeys(other, ())})
    groups = settings["heads"] if family.by_head else 1
    weights = Weights(shards(folder), family, settings["tied"], groups)
    shape = (settings["vocab_size"], settings["dim"])
    if family.own_head and settings["tied"] and weights.has_own_head(shape):
        settings, weights = settings | {"tied": False}, replace(weights, tied=False)
    return settings, weights


# --- writing --------------------------------------------------------------------------------------


def exported(
    family: Family, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Our tensors under their names, in fp32, and transformers' class of such a model."""
    out, left = {}, dict(tensors)
    groups = settings["heads"] if family.by_head else 1
    for theirs, ours in {**family.names, **family.heads}.items():
        prefix = "" if theirs.startswith(BARE) else family.prefix
        for n in range(settings["layers"]) if ".N." in theirs else (0,):
            parts = [left.pop(name.replace(".N.", f".{n}."), None) for name in ours]
            if ours == ("=1",):
                parts = [torch.ones(settings["head_width"] or settings["dim"] // settings["heads"])]
            if parts and parts[0] is not None:
                x = turned(family, ours[0], joined(parts, groups).float())
                out[prefix + theirs.replace(".N.", f".{n}.")] = x
    if left:
        raise UserError(f"a model file has no place for {min(left)}")
    heads = {names[0].split(".")[0] for names in family.heads.values()}
    beside = tuple(sorted(heads & {name.split(".")[0] for name in tensors}))
    if beside not in family.architectures:
        raise UserError(f"transformers has no model with the heads {' and '.join(beside)} alone")
    return plain(out), family.architectures[beside]


def write_folder(
    folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], end: Ids, most: int,
    begin: int | None = None,
) -> str:  # fmt: skip
    """A folder that transformers loads, whole or not at all, with at most so many bytes a file.

    Texts, and an encdec's answers, begin with the token `begin`, and end with `end`, one or several
    of them. Returns transformers' class of the model.
    """
    family, hf = write_settings(settings, end, begin)
    theirs, architecture = exported(family, settings, tensors)
    with new_folder(folder) as draft:
        write_json(draft / "config.json", {"architectures": [architecture], **hf})
        write_tensors(draft, theirs, most)
    return architecture


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A draft to be filled, which then is the folder: whole, or not at all."""
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: choose another folder")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    try:
        draft.mkdir(parents=True)
        yield draft
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
