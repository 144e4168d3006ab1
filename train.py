"""Train a language model: raw text in, a model that writes out.

Idea: read text, cut it into tokens, and let a transformer guess each next token, a few thousand
times; after each guess move its weights a little towards what it should have said.

Run: python train.py                      Python's own documentation, a million weights, a few
minutes
     python train.py --data.path book.txt --steps 3000
     python train.py --resume             go on where the newest run was stopped
     python train.py --help               every setting

Everything that a run was, is in its folder: runs/<name>/config.json, metrics.jsonl, log.txt,
loss.png, tokenizer.json and checkpoints/. Ctrl-C saves and says how to go on.

Papers: Radford et al. 2019, GPT-2; Hoffmann et al. 2022 (arXiv 2203.15556) on how long to train.
"""

import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from data import Corpus, DataConfig, Stream, TokenizerConfig, prepare, whole
from generate import Sampling, generate, load_weights
from model import PRESETS, ModelConfig, Transformer, count_parameters, training_flops
from objectives import OBJECTIVES
from optim import OPTIMIZERS, OptimConfig, learning_rate
from run import Run, UserError, load_tensors, main, plot_loss, read_json, timestamp
from step import commit, evaluate, machine, matmul_peak, pick_device, pick_dtype, to, update


@dataclass(frozen=True)
class Train:
    """Train a language model."""

    name: str = ""  # the run's folder under runs/; empty: the next free run-001, run-002, …
    resume: bool = False  # go on with the run of this name (empty: the newest), with its settings
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optim: OptimConfig = OptimConfig()
    objective: Literal["causal"] = "causal"  # what to predict
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
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")


MAY_CHANGE = {"name", "resume", "steps", "evaluate_every", "save_every", "device"}  # on resuming


# --- settings -------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[Train, Run | None]:
    """The settings, and the run to resume if there is one.

    A preset is read first and then changed by the other flags, wherever it stands among them; a
    resumed run's own settings take the place of the defaults.
    """
    default, run = Train(), None
    name = re.search(r"--model\.preset[ =](\S+)", " ".join(arguments))
    if name and name[1] in PRESETS:
        default = replace(default, model=PRESETS[name[1]])
    if "--resume" in arguments:
        named = re.search(r"--name[ =](\S+)", " ".join(arguments))
        run = Run.open(named[1] if named else "")
        default = replace(stored(run), resume=True)
    config = tyro.cli(Train, args=arguments, default=default)
    if run is None:
        return config, None
    for name in sorted({f for f in asdict(config) if f not in MAY_CHANGE}):
        if getattr(config, name) != getattr(default, name):
            raise UserError(
                f"{run.folder} cannot go on with another {name} than "
                f"{getattr(default, name)!r}: start a new run for that"
            )
    return config, run


def stored(run: Run) -> Train:
    """The settings that a run was made with."""
    path, values = run.folder / "config.json", run.config()
    try:
        parts = {
            "model": ModelConfig,
            "data": DataConfig,
            "tokenizer": TokenizerConfig,
            "optim": OptimConfig,
        }
        values |= {name: kind(**values[name]) for name, kind in parts.items()}
        return Train(**values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the settings of a run: {error}") from None


def sized(model: ModelConfig, known: int) -> ModelConfig:
    """The model's settings with as many tokens as the tokenizer knows."""
    if model.vocab_size not in (0, known):
        raise UserError(
            f"--model.vocab-size {model.vocab_size} does not fit the tokenizer, which knows "
            f"{known} tokens: give --model.vocab-size 0, or a --tokenizer.vocab-size that fits"
        )
    return replace(model, vocab_size=known)


def command(arguments: list[str]) -> str:
    return shlex.join(["python", "train.py", *arguments])


# --- what the first lines say ---------------------------------------------------------------------


def introduce(run: Run, training: "Training") -> float:
    """Log the settings and every number derived from them; returns the measured peak in FLOP/s."""
    config, corpus, model = training.config, training.corpus, training.model
    meta, m, N = corpus.meta, config.model, count_parameters(model)
    train, held = meta["train"], meta["held"]
    tokens = config.accumulate * config.batch * m.context
    flops = training_flops(model, m.context)
    device = model.embedding.device
    peak = matmul_peak(device, training.dtype)
    path = "in Triton" if device.type == "cuda" else "in torch, attention in blocks"
    run.log(
        f"{command(sys.argv[1:])}\n"
        f"run      {run.folder}, {timestamp()}"
        + (f", commit {commit()}" if commit() else "")
        + "\n"
        f"text     {meta['source']}: {train['documents']:,} documents, {train['bytes']:,} bytes\n"
        f"held out {held['documents']:,} documents, {held['bytes']:,} bytes; "
        f"lzma writes them in {meta['lzma_bits_per_byte']:.3f} bits per byte\n"
        f"tokens   {m.vocab_size:,} known, {train['bytes'] / train['tokens']:.2f} bytes each\n"
        f"model    {m.layers} blocks, {m.dim} wide, {m.heads} heads of {m.head_dim}, feed-forward "
        f"{m.ffn_width}: {N:,} parameters\n"
        f"step     {config.accumulate} × {config.batch} rows × {m.context} = {tokens:,} tokens; "
        f"{config.steps:,} steps = {config.steps * tokens / train['tokens']:.1f} epochs\n"
        f"cost     6 N + 12 L C T = {flops / 1e6:.1f} MFLOP per token, "
        f"{flops * tokens * config.steps:.2e} FLOP in all\n"
        f"machine  {machine(device)}; {config.dtype}; "
        f"a matrix product reaches {peak / 1e9:,.0f} GFLOP/s; kernels {path}\n"
        + (f"resumed  after step {training.step}\n" if training.step else "")
    )
    return peak


# --- the run --------------------------------------------------------------------------------------


class Interrupt:
    """While open, Ctrl-C and SIGTERM ask to stop after the step; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
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
        self.model = Transformer(config.model, config.seed).to(device)
        make = OPTIMIZERS[config.optim.name]
        self.optimizer = make(self.model.named_parameters(), config.optim, self.dtype)
        end = corpus.tokenizer.end_of_text
        self.stream = Stream(corpus.train, config.model.context, end, config.seed)
        self.objective = OBJECTIVES[config.objective]
        self.step = 0

    def advance(self) -> tuple[float, float]:
        """One update; (mean loss in nats per token, gradient norm)."""
        c = self.config
        device = self.model.embedding.device
        batches = [
            to(self.objective(self.stream.take(c.batch)), device) for _ in range(c.accumulate)
        ]
        lr = learning_rate(c.optim, self.step, c.steps)
        loss, _, norm = update(self.model, batches, self.optimizer, lr, c.optim.clip, self.dtype)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step + 1}: the run has diverged; lower "
                f"--optim.lr from {c.optim.lr} and start again"
            )
        self.step += 1
        return loss, norm

    def bits_per_byte(self) -> float:
        """−log₂ p of the held-out documents, ends included, over their bytes."""
        c, tokenizer, device = self.config, self.corpus.tokenizer, self.model.embedding.device
        rows = whole(self.corpus.held, c.model.context, 4 * c.batch, tokenizer.end_of_text)
        nats, _ = evaluate(self.model, (to(self.objective(r), device) for r in rows), self.dtype)
        return nats / math.log(2) / self.corpus.meta["held"]["bytes"]

    def save(self, run: Run) -> None:
        place = {"epoch": self.stream.epoch, "row": self.stream.row, "text": self.text()}
        run.save(self.step, self.model.state_dict(), self.optimizer.state(), place)

    def text(self) -> str:
        """What the tokens trained on are known by."""
        return f"{self.corpus.tokenizer.fingerprint}-{self.corpus.meta['train']['hash']}"

    def load(self, run: Run) -> None:
        """Take up the newest whole checkpoint; a run stopped before its first one starts anew."""
        if not run.checkpoints():
            return run.forget_after(0)
        folder = run.newest()
        load_weights(self.model, folder / "model.safetensors")
        self.optimizer.load(load_tensors(folder / "train_state.safetensors"))
        info = read_json(folder / "train_state.json")
        if info["text"] != self.text():
            raise UserError(
                f"the text is not the one that {run.folder} was trained on: a file of "
                "--data.path, or this Python, has changed since; start a new run"
            )
        self.step = info["step"]
        if self.step > self.config.steps:
            raise UserError(
                f"{run.folder} has done {self.step} steps already: give --steps {self.step} or more"
            )
        self.stream.seek(info["epoch"], info["row"])
        run.forget_after(self.step)

    def sample(self, count: int = 3, tokens: int = 100) -> Iterator[str]:
        tokenizer = self.corpus.tokenizer
        end = tokenizer.end_of_text
        tokens = min(tokens, self.config.model.context)
        steps = list(
            generate(self.model, [[end]] * count, tokens, Sampling(), {end}, self.config.seed)
        )
        for column in zip(*steps, strict=True):
            yield tokenizer.decode([t for t in column if t is not None and t != end])


def loop(training: Training, run: Run, peak: float) -> bool:
    """Train to the last step; False if someone asked to stop before it."""
    c, meta = training.config, training.corpus.meta
    per_byte = meta["train"]["tokens"] / meta["train"]["bytes"] / math.log(2)
    tokens = c.accumulate * c.batch * c.model.context
    flops = tokens * training_flops(training.model, c.model.context)
    bar = tqdm(total=c.steps, initial=training.step, unit="step", disable=None, smoothing=0.05)
    with Interrupt() as interrupt, bar:
        while training.step < c.steps and not interrupt.asked:
            start = time.perf_counter()
            loss, norm = training.advance()
            seconds = time.perf_counter() - start
            row = {
                "step": training.step,
                "loss": loss,
                "train_bits_per_byte": loss * per_byte,
                "norm": norm,
            }
            last = training.step == c.steps
            if last or training.step % c.evaluate_every == 0:
                row["bits_per_byte"] = training.bits_per_byte()
                run.log(
                    f"step {training.step:6,}   loss {loss:.3f} nats per token   "
                    f"held out {row['bits_per_byte']:.3f} bits per byte"
                )
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


def finish(training: Training, run: Run, seconds: float) -> None:
    """The picture, the numbers and a few words."""
    meta = training.corpus.meta
    picture = plot_loss(run, meta["lzma_bits_per_byte"])
    bits = run.metrics()[-1].get("bits_per_byte") or training.bits_per_byte()
    run.log(
        f"\nheld out: {bits:.3f} bits = {bits * math.log(2):.3f} nats per byte "
        f"(lzma: {meta['lzma_bits_per_byte']:.3f} bits), after {seconds:.0f} seconds of training"
    )
    for number, text in enumerate(training.sample(), 1):
        run.log(f"\n--- sample {number} ---\n{text.strip()}")
    run.log(
        f"\npicture: {picture}\n"
        f"more:    python generate.py --run {run.folder.name} --prompt 'Return the'"
    )


def script() -> None:
    config, run = parse(sys.argv[1:])
    dtype = str(pick_dtype(config.dtype, pick_device(config.device))).removeprefix("torch.")
    corpus = prepare(config.data, config.tokenizer)
    model = sized(config.model, corpus.tokenizer.vocab_size)
    config = replace(config, model=model, dtype=dtype)  # what is written is what was computed
    training = Training(config, corpus)  # before the folder: settings that cannot be leave nothing
    if run is None:
        run = Run.create(config.name, config)
        corpus.tokenizer.save(run.folder / "tokenizer.json")
    else:
        training.load(run)
    peak = introduce(run, training)
    start = time.perf_counter()
    if not loop(training, run, peak):
        run.log(
            f"stopped and saved after step {training.step}; go on with\n"
            f"  python train.py --name {run.folder.name} --resume"
        )
        sys.exit(130)
    finish(training, run, time.perf_counter() - start)


if __name__ == "__main__":
    main(script)
