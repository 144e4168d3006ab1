"""A model that writes, with its tokenizer: from a run, or from a folder in Hugging Face's layout.

Idea: whoever asks a model must know how a text begins for it and what ends one, which tokens stand
for nothing, and that weights, settings and tokenizer belong together.

Run: python writer.py --run base --out folder       the run as such a folder; --adapter: of a run
                                                    with an adapter only that

What it writes other programs read: `transformers`, or EleutherAI's harness by
`lm_eval --model hf --model_args pretrained=folder,add_bos_token=True --tasks arc_easy`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

import quantized
from adapters import adapt, first_ids, frozen_mark
from chat import END as END_OF_TURN
from chat import keep_template, knows_roles
from heads import load_heads
from lora import Adapter, exchange, plain
from model import NORMS, ModelConfig, Transformer, assembled, fill
from model_files import Weights, special_ids
from peft_files import load_adapter, save_adapter
from run import Run, UserError, main, read_json, settings
from step import pick_device
from tokenizer import load as read_tokenizer
from vocabulary import END_OF_TEXT, Tokenizer


def load_weights(model: Transformer, path: Path) -> None:
    """Fill a model from model.safetensors; UserError if names or shapes are others."""
    fill(model, Weights([path]))


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """UserError if it is damaged, or has ids that a model of vocab_size tokens does not know."""
    try:
        tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens but the model knows {vocab_size}: "
            "this is not its tokenizer"
        )
    return tokenizer


class Writer(NamedTuple):
    """A model, and how texts become ids that it knows."""

    model: Transformer
    tokenizer: Tokenizer
    begin: list[int]  # what stands before every text
    stop: set[int]  # what ends one
    close: Sequence[int] = ()  # what stands behind a text that an encoder reads
    answer: Sequence[int] = ()  # what a text begins with that answers another, in an encdec
    whole: bool = False  # a prompt was seen whole in training
    head: Callable[[Tensor], Tensor] | None = None  # of an encoder: hidden states to scores


def model_of(run: Run) -> ModelConfig:
    return settings(ModelConfig, run.config().get("model"), f"{run.folder}/config.json", "model.")


def base_of(name: str) -> Writer:
    """The model and the tokenizer with which a run begins: another run's, or a folder's."""
    path = Path(name) / "config.json"
    if path.is_file() and "model_type" in read_json(path):
        return load_folder(Path(name), torch.device("cpu"))
    return load(Run.open(name), torch.device("cpu"))


def first_model(config: ModelConfig, base: str, how: Adapter, seed: int) -> Transformer:
    """What a run begins with: drawn weights, or its base's and adapters.

    Rows of the embedding that the base lacks, for new special tokens, are drawn anew.
    """
    model, ids = Transformer(config, seed), []
    if base:
        writer = base_of(base)
        begun = plain(writer.model)
        if (fixed := quantized.quantized(begun)) and how.kind == "none":
            raise UserError(f"the codes of {base} cannot be trained: give --adapter.kind lora")
        for name, linear in fixed.items():
            exchange(model, name, linear)
        found = model.state_dict()
        for name, x in begun.state_dict().items():
            found[name][tuple(slice(n) for n in x.shape)] = x
        ids = first_ids(how, writer.tokenizer, seed)
    adapt(model, how, seed, ids=ids)
    return model


def adapter_of(run: Run) -> Adapter:
    """With what a run was trained beside its base, if it was not all its weights."""
    values = run.config().get("adapter", {})
    return settings(Adapter, values, f"{run.folder}/config.json", "adapter.")


def with_adapter(run: Run, config: ModelConfig, how: Adapter, path: Path) -> Transformer:
    """The base of a run with the adapters of a checkpoint; UserError if it is another base now."""
    base = run.config()["base"]
    model = first_model(config, base, how, run.config()["seed"])
    if read_json(path / "train_state.json").get("base") != frozen_mark(model):
        raise UserError(
            f"{run.folder} is an adapter of another {base} than the one that is there now: put "
            "that back"
        )
    load_weights(model, path / "model.safetensors")
    return model


def load(run: Run, device: torch.device) -> Writer:
    """A run's newest whole checkpoint, and the tokenizer that it was trained with."""
    config, where = model_of(run), f"{run.folder}/config.json"
    if run.config().get("objective") == "reward":
        raise UserError(f"{run.folder} is a reward model, which judges texts and writes none")
    newest = run.newest()
    tokenizer = load_tokenizer(run.folder, config.vocab_size)
    trained = read_json(newest / "train_state.json")
    if not str(trained.get("text")).startswith(f"{tokenizer.fingerprint}-"):
        raise UserError(f"the tokenizer in {run.folder} is not the one that it was trained with")
    kept = trained.get("settings", {"model": asdict(config)})  # older runs have none
    shape = kept.get("model") if isinstance(kept, dict) else kept
    if settings(ModelConfig, shape, f"{newest}/train_state.json", "model.") != config:
        raise UserError(f"the model of {where} is not the one that {newest} was trained with")
    if "quantization" in trained:
        model = quantized.assembled(config, newest / "model.safetensors", trained["quantization"])
    elif (how := adapter_of(run)).kind != "none":
        model = with_adapter(run, config, how, newest)
    else:
        model = assembled(config, Weights([newest / "model.safetensors"]))
    model, end = model.to(device).eval(), tokenizer.end_of_text
    whole = run.config().get("objective", "causal") not in ("causal", "chat")
    stop = {end} | {tokenizer.special[t] for t in (END_OF_TURN,) if t in tokenizer.special}
    return Writer(model, tokenizer, [end], stop, [], [end], whole, model.logits)


def load_folder(folder: Path, device: torch.device) -> Writer:
    """The model of a Hugging Face folder, such as GPT-2, T5 or BERT, with its tokenizer.

    What begins and what ends a text, config.json says, or else the tokenizer's end of text. BERT's
    texts stand between [CLS] and [SEP], T5's before </s>; an end that also begins texts, as in our
    runs, closes none.
    """
    model = Transformer.load(folder).to(device).eval()
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    end = {id for text, id in tokenizer.special.items() if text == END_OF_TEXT}
    begin, stop, answer = (ids & tokenizer.known_ids for ids in special_ids(folder))
    match model.config.arch:
        case "decoder":
            return Writer(model, tokenizer, sorted(begin or end), stop or end)
        case "encdec":
            ends, answer = stop or end, sorted(answer or begin or end)
            close = [] if begin & ends else sorted(ends)
            return Writer(model, tokenizer, sorted(begin), ends, close, answer)
    around = ([tokenizer.special[t]] if t in tokenizer.special else [] for t in ("[CLS]", "[SEP]"))
    heads = load_heads(folder).to(device)
    if "masked" not in heads:
        raise UserError(f"{folder} has no head that says which token was masked")
    head = partial(heads["masked"], embedding=model.embedding)
    return Writer(model, tokenizer, next(around), set(), next(around), head=head)


def writer_of(run: str, model: str, device: torch.device | str, adapter: str = "") -> Writer:
    """A run, or the folder of a model, and the folder of an adapter beside it."""
    where = pick_device(device) if isinstance(device, str) else device
    writer = load_folder(Path(model), where) if model else load(Run.open(run), where)
    if adapter:
        load_adapter(writer.model, Path(adapter))
        writer.model.to(where)
    return writer


def cast(model: Transformer, dtype: torch.dtype) -> None:
    """Matrices and biases in dtype, once instead of for every token; norms stay in fp32."""
    for module in model.modules():
        if not isinstance(module, tuple(NORMS.values())):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(dtype)


def unknown(writer: Writer) -> list[int]:
    """Rows of the embedding that stand for no token."""
    return sorted({*range(writer.model.config.vocab_size)} - writer.tokenizer.known_ids)


# --- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """Write a run as a folder that transformers loads."""

    run: str = ""  # a run's name or folder; empty: the newest
    out: str = "exported"  # a new folder
    adapter: bool = False  # what was trained beside its base, alone, as PEFT has it
    force: bool = False  # merge an adapter into a quantized base though most of it is lost


def script() -> None:
    config = tyro.cli(Export, description=__doc__)
    run, folder = Run.open(config.run), Path(config.out)
    writer = load(run, torch.device("cpu"))
    if config.adapter:
        save_adapter(writer.model, folder, run.config().get("base", ""))
        print(f"{folder}/ is the adapter of {run.folder}, for PeftModel.from_pretrained")
        return
    ends = sorted(writer.stop)
    end, begin = ends if len(ends) > 1 else ends[0], writer.tokenizer.end_of_text
    kind = plain(writer.model, config.force).save(folder, end=end, begin=begin)
    writer.tokenizer.save(folder / writer.tokenizer.file_name)
    if knows_roles(writer.tokenizer):
        keep_template(folder)
    print(f"{run.folder} is now also {folder}/, for {kind}.from_pretrained")


if __name__ == "__main__":
    main(script)
