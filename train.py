"""Train a language model: raw text in, a model that writes out.

Idea: read text, cut it into tokens, and let a transformer guess each next token, a few thousand
times; after each guess move its weights a little towards what it should have said.

Run: python train.py                      Python's own documentation, a million weights, a few
minutes
     python train.py --data.path book.txt --steps 3000
     python train.py --model.arch encdec --objective spans     a small T5; encoder, masked: a BERT
     python train.py --resume             go on where the newest run was stopped
     python train.py --help               every setting

Everything that a run was, is in its folder: runs/<name>/config.json, metrics.jsonl, log.txt,
loss.png, tokenizer.json and checkpoints/. Ctrl-C saves and says how to go on.

Papers: Radford et al. 2019, GPT-2; Hoffmann et al. 2022 (arXiv 2203.15556) on how long to train.
"""

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from data import Corpus, DataConfig, TokenizerConfig, prepare
from generate import Sampling, generate, load_weights
from kernels.cross_entropy import IGNORE
from model import (
    ModelConfig,
    Transformer,
    count_parameters,
    preset_in,
)
from objectives import OBJECTIVES, Batch, Rows, objective_for, vocabulary_for
from optim import OPTIMIZERS, OptimConfig, learning_rate
from packing import Mixture, whole
from run import (
    Run,
    UserError,
    check_free,
    generator,
    load_tensors,
    main,
    plot_loss,
    read_json,
    settings,
    value_of,
)
from scaling import exact_flops, parameters
from step import (
    check_memory,
    commit,
    evaluate,
    machine,
    matmul_peak,
    pick_device,
    pick_dtype,
    to,
    update,
)


@dataclass(frozen=True)
class Train:
    """Train a language model."""

    name: str = ""  # the run's folder under runs/; empty: the next free run-001, run-002, …
    resume: bool = False  # go on with the run of this name (empty: the newest), with its settings
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optim: OptimConfig = OptimConfig()
    objective: Literal[tuple(OBJECTIVES)] = (
        "causal"  # what to predict: the next token, masked ones, hidden spans, …
    )
    steps: int = 1600  # updates
    batch: int = 8  # rows of model.context tokens that go through the model at once
    accumulate: int = 1  # such batches in one update
    evaluate_every: int = 200  # updates between measurements on the held-out documents
    save_every: int = 500  # updates between checkpoints
    seed: int = 0  # of weights, order and samples
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the arithmetic; the weights stay float32
    )

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "evaluate_every", "save_every"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, at most {MOST:,}")
        objective_for(self.objective, self.model.arch)


MOST = 10**9  # of whatever is counted here
# What may differ when a run is resumed; of the text it is proved that it is still the same.
MAY_CHANGE = {"name", "resume", "steps", "evaluate_every", "save_every", "device", "data.path"}


# --- settings -------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[Train, Run | None, list[str]]:
    """The settings, the run to resume if there is one, and what they change in it, in words.

    A preset is read first and then changed by the other flags, wherever it stands among them; a
    resumed run's own settings take the place of the defaults.
    """
    default, run = Train(), None
    default = replace(default, model=preset_in(arguments, default.model))
    if "--resume" in arguments:
        run = Run.resume(value_of("--name", arguments))
        default = stored(run)
    config = tyro.cli(Train, args=arguments, default=replace(default, resume=run is not None))
    if run is None:
        return config, None, []
    config = replace(config, name=default.name, resume=False)
    changed = changes(default, config)
    if fixed := unchangeable(changed):
        raise UserError(
            f"{run.folder} cannot go on with another setting of {fixed}: start a new run for that"
        )
    return config, run, list(changed.values())


def stored(run: Run) -> Train:
    """The settings that a run was made with."""
    return settings(Train, run.config(), str(run.folder / "config.json"))


def changes(old: object, new: object, prefix: str = "") -> dict[str, str]:
    """Which settings differ, each as "name old → new"."""
    found = {}
    for name, before in vars(old).items():
        after = getattr(new, name)
        if is_dataclass(before):
            found |= changes(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = f"{prefix}{name} {before!r} → {after!r}"
    if "steps" in found:
        found["steps"] += " (over which the learning rate's schedule now goes)"
    return found


def unchangeable(changed: dict[str, str]) -> str:
    """Those of `changes` that would make another run of it."""
    return ", ".join(text for name, text in changed.items() if name not in MAY_CHANGE)


def lasting(config: Train) -> dict:
    """The settings that make a run what it is, for its checkpoints."""
    values = asdict(config)
    for name in MAY_CHANGE:
        *outer, last = name.split(".")
        del (values[outer[0]] if outer else values)[last]
    return values


def complete(config: Train, tokens: int) -> Train:
    """The settings with what machine and text decide, so that what is written is what is done."""
    model, device = config.model, pick_device(config.device)
    if model.vocab_size not in (0, tokens):
        raise UserError(
            f"--model.vocab-size {model.vocab_size} does not fit the tokenizer, which knows "
            f"{tokens} tokens: give --model.vocab-size 0, or a --tokenizer.vocab-size that fits"
        )
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    return replace(config, model=replace(model, vocab_size=tokens), dtype=dtype)


# --- what the first lines say ---------------------------------------------------------------------


def introduce(run: Run, training: "Training", changed: list[str]) -> float:
    """Log the settings and every number derived from them; returns the measured peak in FLOP/s."""
    config, corpus, model = training.config, training.corpus, training.model
    meta, m, N = corpus.meta, config.model, count_parameters(model)
    train, held = meta["train"], meta["held"]
    tokens, flops = training.tokens, training.flops
    device = model.embedding.device
    peak = matmul_peak(device, training.dtype)
    path = "in Triton" if device.type == "cuda" else "in torch, attention in blocks"
    run.log(
        f"{shlex.join(['python', 'train.py', *sys.argv[1:]])}\n"
        f"run      {run.folder}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        + (f", commit {commit()}" if commit() else "")
        + "\n"
        f"text     {meta['source']}: {train['documents']:,} documents, {train['bytes']:,} bytes\n"
        f"held out {held['documents']:,} documents, {held['bytes']:,} bytes; "
        f"lzma writes them in {meta['lzma_bits_per_byte']:.3f} bits per byte\n"
        f"tokens   {m.vocab_size:,} known, {train['bytes'] / train['tokens']:.2f} bytes each\n"
        f"model    {m.layers} blocks, {m.dim} wide, {m.heads} heads of {m.head_dim}, feed-forward "
        f"{m.ffn_width}: {N:,} parameters\n"
        f"step     {config.accumulate} × {config.batch} rows × {training.width} = {tokens:,} "
        f"tokens; {config.steps:,} steps = {config.steps * tokens / train['tokens']:.1f} epochs\n"
        f"task     {m.arch}, {config.objective}\n"
        f"cost     {'6 N + 12 L C T' if training.plain else 'forward and backward'} = "
        f"{flops / tokens / 1e6:.1f} MFLOP per token, {flops * config.steps:.2e} FLOP in all\n"
        f"machine  {machine(device)}; {config.dtype}; "
        f"a matrix product reaches {peak / 1e9:,.0f} GFLOP/s; kernels {path}\n"
        + (f"resumed  after step {training.step:,}" if training.step else "")
        + (", the last one: more needs more --steps" if training.step == config.steps else "")
        + "".join(f"\nchanged  {text}" for text in changed)
        + "\n"
    )
    return peak


# --- the run --------------------------------------------------------------------------------------


class Interrupt:
    """While open, Ctrl-C, SIGTERM and SIGHUP, a terminal that closes, ask to stop after the step.

    A second one stops at once.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupt":
        names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
        self.before = {s: signal.signal(s, self.ask) for s in (getattr(signal, n) for n in names)}
        return self

    def __exit__(self, *error) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def ask(self, name, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Training:
    """The state of a run between two steps, which a checkpoint keeps and a resumed run takes up."""

    def __init__(self, config: Train, corpus: Corpus):
        self.config, self.corpus = config, corpus
        device = pick_device(config.device)
        self.dtype = getattr(torch, config.dtype)
        tokens = config.batch * config.model.context
        kept = 2 * 4 * tokens * config.model.dim * config.model.layers  # of what backward needs
        check_memory(16 * sum(parameters(config.model).values()) + kept, device)
        self.model = Transformer(config.model, config.seed).to(device)
        make = OPTIMIZERS[config.optim.name]
        self.optimizer = make(self.model.named_parameters(), config.optim, self.dtype)
        words, context, arch = corpus.tokenizer, config.model.context, config.model.arch
        self.objective = objective_for(config.objective, arch)
        self.vocabulary = vocabulary_for(
            self.objective, words.special, words.known_ids, words.end_of_text
        )
        self.width = self.objective.text_width(context, arch)
        self.plain = self.width == context and arch != "encdec"  # text goes in as it stands
        self.rows = Mixture(
            corpus.train, self.width, words.end_of_text, config.seed, corpus.parts,
            config.data.packing,
        )  # fmt: skip
        self.step = 0

    @property
    def tokens(self) -> int:
        """Of text, in one update."""
        return self.config.accumulate * self.config.batch * self.width

    @property
    def flops(self) -> int:
        """Of one update, forward and backward."""
        c = self.config
        S, T = self.objective.widths(self.width, c.model.arch)
        return c.accumulate * c.batch * exact_flops(c.model, T, source=S)

    def batch(self, rows: Rows, name: str, number: int) -> Batch:
        """What is asked of these rows, drawn from the stream of randomness of a name and number."""
        draws = generator(self.config.seed, name, number)
        batch = self.objective(rows, draws, self.vocabulary, self.config.model.arch)
        return to(batch, self.model.embedding.device)

    def advance(self) -> tuple[float, float]:
        """One update; (mean loss in nats per token, gradient norm)."""
        c = self.config
        batches = [
            self.batch(self.rows.take(c.batch), "objective", self.step * c.accumulate + i)
            for i in range(c.accumulate)
        ]
        lr = learning_rate(c.optim, self.step, c.steps)
        loss, _, norm = update(self.model, batches, self.optimizer, lr, c.optim.clip, self.dtype)
        self.step += 1
        self.check("loss", loss)
        self.check("gradient's norm", norm)
        return loss, norm

    def check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"the {what} is {value} at step {self.step}: the run has diverged; lower "
                f"--optim.lr from {self.config.optim.lr} and start again"
            )

    def held(self, rows: int) -> Iterator[Rows]:
        """The held-out documents, always cut alike."""
        return whole(self.corpus.held, self.width, rows, self.corpus.tokenizer.end_of_text)

    def held_out(self) -> dict[str, float]:
        """The loss of the held-out documents in nats per token asked, always of the same tokens.

        Where each token is asked once, also −log₂ p of the documents over their bytes: their ends
        are asked, too.
        """
        rows = self.held(4 * self.config.batch)
        batches = (self.batch(r, "held out", n) for n, r in enumerate(rows))
        nats, tokens = evaluate(self.model, batches, self.dtype)
        self.check("loss on the held-out documents", nats)
        found = {"held_out_loss": nats / max(1, tokens)}
        if self.config.objective == "causal":
            size = self.corpus.meta["held"]["bytes"]
            found["bits_per_byte"] = nats / math.log(2) / size
        return found

    def texts(self) -> dict[str, str]:
        """What the tokens are known by, those trained on and those held out."""
        meta = self.corpus.meta
        mark = f"{self.corpus.tokenizer.fingerprint}-{meta['train']['hash']}"
        return {"text": mark, "held_out": meta["held"]["hash"]}

    def save(self, run: Run) -> None:
        info = {"place": self.rows.place, **self.texts(), "settings": lasting(self.config)}
        run.save(self.step, self.model.state_dict(), self.optimizer.state(), info)

    def load(self, run: Run) -> None:
        """Take up the newest whole checkpoint; a run stopped before its first one starts anew."""
        if run.checkpoints():
            self.take_up(run.newest(), run)
        elif len(run.metrics()) > stored(run).save_every:  # the last may have come before its save
            raise UserError(
                f"the checkpoints of {run.folder} are gone, though it has some steps behind it: "
                "put them back, or start a new run"
            )
        else:
            run.log(f"{run.folder} was stopped before its first checkpoint: it starts anew")
        run.forget_after(self.step)

    def take_up(self, folder: Path, run: Run) -> None:
        info = read_json(folder / "train_state.json")
        step, place = info.get("step"), info.get("place")
        if type(step) is not int or step < 0 or not self.rows.knows(place):
            raise UserError(f"{folder} was not made by train.py: start a new run")
        if any(info.get(name, mark) != mark for name, mark in self.texts().items()):
            raise UserError(
                f"the text is not the one that {run.folder} was trained on: a file of "
                "--data.path, or this Python, has changed since; start a new run"
            )
        before = settings(Train, info.get("settings"), str(folder / "train_state.json"))
        if fixed := unchangeable(changes(before, self.config)):
            raise UserError(
                f"{folder} was made with another setting of {fixed}, as {run.folder} has it now: "
                "start a new run for that"
            )
        if step > self.config.steps:
            raise UserError(
                f"{run.folder} has done {step} steps already: give --steps {step} or more"
            )
        load_weights(self.model, folder / "model.safetensors")
        state = load_tensors(folder / "train_state.safetensors")
        own = self.optimizer.state()
        if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in own.items()}:
            raise UserError(f"{folder} was made by another optimizer: start a new run")
        self.optimizer.load(state)
        self.step = step
        self.rows.seek(place)

    def sample(self, count: int = 3, tokens: int = 100) -> Iterator[str]:
        """Texts; or, of what is held out, what is asked and what the model says to it."""
        tokenizer, seed = self.corpus.tokenizer, self.config.seed
        end, tokens = tokenizer.end_of_text, min(tokens, self.config.model.context)
        if self.config.objective == "causal":
            steps = list(generate(self.model, [[end]] * count, tokens, Sampling(), {end}, seed))
            for column in zip(*steps, strict=True):
                yield tokenizer.decode([t for t in column if t is not None and t != end])
            return
        batch = self.batch(next(self.held(count)), "held out", 0)
        for number in range(min(count, len(batch.inputs))):
            row = Batch(*(x[number : number + 1] for x in batch))
            asked, said = self.answer(row, tokens)
            yield f"{tokenizer.decode(asked)}\n→ {tokenizer.decode(said)}"

    @torch.no_grad()
    def answer(self, row: Batch, tokens: int) -> tuple[list[int], list[int]]:
        """What the first piece of a row (1 T) asks, and the model's likeliest answer."""
        arch, end = self.config.model.arch, self.corpus.tokenizer.end_of_text
        last = int((row.hi if row.source is None else row.source_hi)[0, 0])
        asked = (row.inputs if row.source is None else row.source)[0, : last + 1]
        if arch == "encoder":
            asked, targets = asked[:tokens], row.targets[0, : last + 1][:tokens]
            hidden = self.model(asked[None], dtype=self.dtype)[0]
            said = self.model.logits(hidden[targets != IGNORE]).argmax(-1)
            return asked.tolist(), said.tolist()
        asked = asked.tolist()
        prompt, sources = ([end], [asked]) if arch == "encdec" else (asked, None)
        how = Sampling(greedy=True)
        steps = generate(self.model, [prompt], tokens, how, {end}, 0, (), sources, True)
        return asked, [token for (token,) in steps if token not in (None, end)]


def loop(training: Training, run: Run, peak: float) -> bool:
    """Train to the last step; False if someone asked to stop before it."""
    c, meta = training.config, training.corpus.meta
    per_byte = meta["train"]["tokens"] / meta["train"]["bytes"] / math.log(2)
    tokens, flops = training.tokens, training.flops
    bar = tqdm(total=c.steps, initial=training.step, unit="step", disable=None, smoothing=0.05)
    with Interrupt() as interrupt, bar:
        while training.step < c.steps and not interrupt.asked:
            start = time.perf_counter()
            loss, norm = training.advance()
            seconds = time.perf_counter() - start
            row = {"step": training.step, "loss": loss, "norm": norm}
            if c.objective == "causal":
                row["train_bits_per_byte"] = loss * per_byte
            last = training.step == c.steps
            if last or training.step % c.evaluate_every == 0:
                found = training.held_out()
                row |= found
                try:
                    run.log(
                        f"step {training.step:6,}   loss {loss:.3f} nats per token   "
                        f"held out {in_words(found)}"
                    )
                except BrokenPipeError:  # whoever read this has gone, as after Ctrl-C
                    interrupt.asked = True
            run.measure(**row, seconds=seconds)
            if last or training.step % c.save_every == 0:
                training.save(run)
            bar.update()
            bar.set_postfix_str(
                f"loss {loss:.2f}, {tokens / seconds:,.0f} tokens/s, "
                f"{flops / seconds / peak:.0%} of peak"
            )
    if interrupt.asked and training.step < c.steps:
        training.save(run)
        return False
    return True


def in_words(held_out: dict[str, float]) -> str:
    bits = held_out.get("bits_per_byte")
    if bits is None:
        return f"{held_out['held_out_loss']:.3f} nats per token asked"
    return f"{bits:.3f} bits per byte"


EXAMPLES = {  # what generate.py can be asked after a run
    "causal": "--prompt 'Return the'",
    "masked": "--prompt 'Return the <|mask|> of the list.'",
    "prefix": "--prompt 'Return the'",
    "spans": "--special --prompt 'Return the <extra_id_0> of the list.'",
    "ul2": "--special --prompt '[S]Return the <extra_id_0>'",
}


def finish(training: Training, run: Run, seconds: float) -> None:
    """The numbers, a few words and, last because it may fail, the picture."""
    found, lzma = training.held_out(), training.corpus.meta["lzma_bits_per_byte"]
    said = in_words(found)
    if bits := found.get("bits_per_byte"):
        said = f"{bits:.3f} bits = {bits * math.log(2):.3f} nats per byte (lzma: {lzma:.3f} bits)"
    run.log(f"\nheld out: {said}, after {seconds:.0f} seconds of training")
    for number, text in enumerate(training.sample(), 1):
        run.log(f"\n--- sample {number} ---\n{text.strip()}")
    run.log(
        f"\npicture: {plot_loss(run, lzma)}\n"
        f"more:    {shlex.join(['python', 'generate.py', '--run', run.name])} "
        f"{EXAMPLES[training.config.objective]}"
    )


def script() -> None:
    config, run, changed = parse(sys.argv[1:])
    pick_device(config.device)  # before long work
    if run is None and config.name:
        check_free(config.name)
    special = objective_for(config.objective, config.model.arch).special
    corpus = prepare(config.data, config.tokenizer, special=special)
    config = complete(config, corpus.tokenizer.vocab_size)
    training = Training(config, corpus)  # before the folder: settings that cannot be leave nothing
    if run is None:
        run = Run.create(config.name, config)
    else:
        training.load(run)
        with run.writing(run.folder / "config.json"):
            run.keep(config)
    path = run.folder / corpus.tokenizer.file_name
    with run.writing(path):  # a resumed run may lack it, if it was killed
        corpus.tokenizer.save(path)
    peak = introduce(run, training, changed)
    start = time.perf_counter()
    if not loop(training, run, peak):
        run.log(f"stopped and saved after step {training.step}; go on with\n  {run.command}")
        sys.exit(130)
    finish(training, run, time.perf_counter() - start)


if __name__ == "__main__":
    main(script)
