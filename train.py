"""Train a language model: raw text in, a model that writes out.

Idea: read text, cut it into tokens, and let a transformer guess each next token, a few thousand
times; after each guess move its weights a little towards what it should have said.

Run: python train.py                      Python's own documentation, a million weights, minutes
     python train.py --data.path book.txt --steps 3000
     python train.py --model.arch encdec --objective spans     a small T5; encoder, masked: a BERT
     python train.py --name a --seeds 3   three runs, whose seeds differ; then evaluate.py compare
     python train.py --resume             go on where the newest run was stopped
     python train.py --help               every setting

Everything that a run was, is in its folder: runs/<name>/config.json, metrics.jsonl, log.txt,
loss.png (drawn anew as it runs), tokenizer.json and checkpoints/. Ctrl-C saves and says how to go
on.

Papers: Radford et al. 2019, GPT-2; Hoffmann et al. 2022 (arXiv 2203.15556) on how long to train.
"""

import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import dry_run
import forecast
from adapters import adapt
from chat import keep_template, knows_roles, with_roles
from clean import Step
from data import CUT, Corpus, prepare
from guard import failing
from mesh import Group, Plan, join
from model import ModelConfig, Transformer, preset_in
from objectives import objective_for
from optim import learnt
from parallel_training import after_restart, begin, check_size, lead, one_voice, shared
from pictures import plot_loss, plot_scales
from plan import Plan as AutomaticPlan
from run import Run, UserError, check_free, main, value_of
from scaling import parameters
from step import (
    NotFinite,
    commit,
    machine,
    matmul_peak,
    peak_memory,
    pick_device,
    pick_dtype,
    watched,
)
from training import WORLD_STEPS, Train, Training, changes, stored, unchangeable
from vocabulary import Tokenizer
from world import judged
from writer import base_of, load_tokenizer

# --- settings -------------------------------------------------------------------------------------


def parse(
    arguments: list[str], resume: Callable[[str], Run] = Run.resume
) -> tuple[Train, Run | None, list[str]]:
    """The settings, the run to resume if there is one, and what they change in it, in words.

    A preset is read first and then changed by the other flags, wherever it stands among them; a
    resumed run's own settings take the place of the defaults.
    """
    default, run = Train(), None
    default = replace(default, model=preset_in(arguments, default.model))
    if value_of("--data.source", arguments) == "world":
        default = replace(default, steps=WORLD_STEPS)
    if "--resume" in arguments:
        run = resume(value_of("--name", arguments))
        default = stored(run)
    if file := value_of("--plan.file", arguments):
        plan = AutomaticPlan.load(Path(file))
        default = replace(default, plan=plan.shape, recompute=plan.recompute)
    config = tyro.cli(Train, args=arguments, description=__doc__,
                      default=replace(default, resume=run is not None))  # fmt: skip
    if run is None:
        if config.seeds > 1 and not config.name:
            raise UserError(f"--seeds {config.seeds} are as many runs, which need a --name")
        return config, None, []
    if config.seeds > 1:
        raise UserError("--resume goes on with one run: give the --name of one, and no --seeds")
    config = replace(config, name=default.name, resume=False)
    changed = changes(default, config)
    if fixed := unchangeable(changed):
        raise UserError(
            f"{run.folder} cannot go on with another setting of {fixed}: start a new run for that"
        )
    return config, run, list(changed.values())


def with_base(config: Train, run: Run | None) -> tuple[Train, Tokenizer | None]:
    """The settings with the model of the base, and its tokenizer, if there is a base.

    A run that goes on has both itself.
    """
    if not config.base:
        return config, None
    if run is not None and run.checkpoints():
        return config, load_tokenizer(run.folder, config.model.vocab_size)
    base = base_of(config.base)
    model = replace(base.model.config, dropout=config.model.dropout)
    asked, own = (replace(c, vocab_size=0) for c in (config.model, model))
    if run is None and asked not in (own, replace(ModelConfig(), dropout=model.dropout)):
        raise UserError(
            f"with --base {config.base} the model is its own: leave --model out, but for "
            f"--model.dropout ({', '.join(changes(own, asked).values())})"
        )
    tokenizer = with_roles(base.tokenizer) if config.objective == "chat" else base.tokenizer
    model = replace(model, vocab_size=max(model.vocab_size, tokenizer.vocab_size))
    return replace(config, model=model), tokenizer


def complete(config: Train, tokens: int) -> Train:
    """The settings with what machine and text decide, so that what is written is what is done."""
    model, device = config.model, pick_device(config.device)
    if config.base:
        tokens = model.vocab_size
    if model.vocab_size not in (0, tokens):
        raise UserError(
            f"--model.vocab-size {model.vocab_size} does not fit the tokenizer, which knows "
            f"{tokens} tokens: give --model.vocab-size 0, or a --tokenizer.vocab-size that fits"
        )
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    return replace(config, model=replace(model, vocab_size=tokens), dtype=dtype)


# --- what the first lines say ---------------------------------------------------------------------


def introduction(
    training: Training, peak: float, where: str = "", changed: Sequence[str] = ()
) -> str:
    """The settings and every number derived from them, in words; peak in FLOP/s."""
    config, corpus, plan = training.config, training.corpus, training.config.plan
    meta, m, N = corpus.meta, config.model, sum(parameters(config.model).values())
    train, held, rows = meta["train"], meta["held"], training.ramp.seen(config.steps)
    tokens, flops, width = rows * training.width, training.flops, training.width
    device = training.device
    plain = training.plain and m.position != "relative"  # Shaw's table meets each query, too
    formula = "6 W + 12 L H D T, W what multiplies," if plain else "forward and backward"
    path = "in Triton" if device.type == "cuda" else "in torch, attention in blocks"
    return (
        f"{shlex.join(['python', 'train.py', *sys.argv[1:]])}\n"
        f"run      {where}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        + (f", commit {commit()}" if commit() else "")
        + "\n"
        f"text     {meta['source']}: {train['documents']:,} documents, {train['bytes']:,} bytes\n"
        f"held out {held['documents']:,} documents, {held['bytes']:,} bytes; "
        f"lzma writes them in {meta['lzma_bits_per_byte']:.3f} bits per byte\n"
        + left_out(meta["steps"])
        + f"tokens   {m.vocab_size:,} known, {train['bytes'] / train['tokens']:.2f} bytes each\n"
        f"model    {m.layers} blocks, {m.dim} wide, {m.heads} heads of {m.head_dim}, feed-forward "
        f"{m.ffn_width}: {N:,} parameters{moving(training)}\n"
        f"step     {config.accumulate} × {config.batch} rows × {width} = "
        f"{training.ramp.full * width:,} tokens"
        + (f", at first {config.ramp_from} rows" if config.ramp_from else "")
        + f"; {config.steps:,} steps = {tokens / train['tokens']:.1f} epochs\n"
        f"task     {m.arch}, {config.objective}\n"
        f"cost     {formula} = {flops / width / 1e6:.1f} MFLOP per token, "
        f"{flops * rows:.2e} FLOP in all\n"
        f"machine  {machine(device)}; {config.dtype}; "
        f"a matrix product reaches {peak / 1e9:,.0f} GFLOP/s; kernels {path}\n"
        + (
            f"plan     data {plan.data} × pipeline {plan.pipeline} × tensor {plan.tensor}"
            f"{f', ZeRO {plan.zero}' if plan.zero else ''}{', exact' if plan.exact else ''}\n"
            if plan.size > 1 or plan.exact
            else ""
        )
        + (f"resumed  after step {training.step:,}" if training.step else "")
        + (", the last one: more needs more --steps" if training.step == config.steps else "")
        + "".join(f"\nchanged  {text}" for text in changed)
        + "\n"
    )


def moving(training: Training) -> str:
    """How many parameters an adapter has, if it is all that is trained."""
    how = training.config.adapter
    if how.kind == "none":
        return ""
    with torch.device("meta"):
        model = Transformer(training.config.model, None)
        adapt(model, how)
    many = sum(p.numel() for p in learnt(model).values())
    what = f"of rank {how.rank} on {' '.join(how.on)}" if how.kind == "lora" else f"of {how.tokens}"
    return f"; {how.kind} {what}: {many:,} are trained"


def left_out(steps: list[dict]) -> str:
    """What could not be read, and what was too long, with an example of each."""
    found = ""
    for step in (Step(**step) for step in steps):
        for reason, times in step.dropped.items() if step.name in ("read", CUT) else ():
            if reason != "empty":
                source, example = step.examples[reason]
                found += f"left out {times:,} × {reason}, as in {source} {example}\n"
    return found


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


def loop(training: Training, run: Run, peak: float) -> bool:
    """Train to the last step; False if someone asked to stop before it."""
    c, drawn = training.config, time.monotonic()
    bar = tqdm(total=c.steps, initial=training.step, unit="step", disable=None, smoothing=0.05)
    stop = False
    with Interrupt() as interrupt, bar:
        while training.step < c.steps and not (stop := training.agreed(interrupt.asked)):
            row, why = one_step(training, run, peak)
            if why:
                training.go_back(why, run)
                bar.n = training.step
                continue
            last = training.step == c.steps
            if last or training.step % c.evaluate_every == 0:
                row |= (found := training.held_out())
                try:
                    run.log(
                        f"step {training.step:6,}   loss {row['loss']:.3f} nats per token   "
                        f"held out {in_words(found)}"
                    )
                except BrokenPipeError:  # whoever read this has gone, as after Ctrl-C
                    interrupt.asked = True
            run.measure(**row)
            if last or training.step % c.save_every == 0:
                training.save(run)
            if "held_out_loss" in row and not last:
                stop_if_failing(training, run)
            if training.first and "held_out_loss" in row and time.monotonic() > drawn + REDRAWN:
                draw(training, run)
                drawn = time.monotonic()
            bar.update()
            bar.set_postfix_str(
                f"loss {row['loss']:.2f}, {row['tokens_per_second']:,} tokens/s, "
                f"{row['utilization']:.0%} of peak"
            )
    if stop and training.step < c.steps:
        training.save(run)
        return False
    return True


REDRAWN = 30  # seconds that a picture of a run stays as it is


def one_step(training: Training, run: Run, peak: float) -> tuple[dict, str]:
    """An update: what metrics.jsonl says of it; why the run must go back, in words, or nothing."""
    c, start = training.config, time.perf_counter()
    looked = c.watch_every and (training.step + 1) % c.watch_every == 0
    try:
        with watched(training.model) if looked else nullcontext([]) as scales:
            made = training.advance()
    except NotFinite as error:
        return {}, training.reported(error, run)
    seconds, rows = time.perf_counter() - start, sum(len(b.targets) for b in training.batches)
    row = {"step": training.step, "tokens": training.tokens, "loss": made.loss}
    row |= {"norm": made.norm, "lr": training.lr} if made.moved else {"skipped": True}
    if training.scale:
        row["loss_scale"] = training.scale.scale
    if c.objective == "causal":
        meta = training.corpus.meta["train"]
        row["train_bits_per_byte"] = made.loss * meta["tokens"] / meta["bytes"] / math.log(2)
    if scales:
        row["scales"] = scales[0]._asdict()
    return row | {
        "seconds": seconds,
        "tokens_per_second": round(rows * training.width / seconds),
        "utilization": round(rows * training.flops / seconds / peak / c.plan.size, 4),
        "memory_bytes": peak_memory(training.device),
    }, training.jumped(made)


def draw(training: Training, run: Run) -> Path:
    """The run's pictures as they are now; the path of the first."""
    if training.config.forecast:
        forecast.plot(run, training.config.steps)
    if training.config.watch_every:
        plot_scales(run)
    return plot_loss(run, training.corpus.meta["lzma_bits_per_byte"])


def stop_if_failing(training: Training, run: Run) -> None:
    """A UserError, behind a checkpoint, if the held-out loss has left its forecast: that of small
    runs, if there is one, and that of its own past."""
    c = training.config

    def look() -> str:
        if c.forecast and c.guard.patience:
            told, (step, loss) = forecast.read(run.folder / forecast.FILE), forecast.last(run)
            if why := forecast.outside(told, step, c.steps, loss):
                draw(training, run)
                return why
            run.log(forecast.in_words(told, step, c.steps, loss))
        rows = [(r["step"], r["held_out_loss"]) for r in run.metrics() if "held_out_loss" in r]
        return failing(rows, c.guard.patience)

    if why := training.lead(look):
        training.save(run)
        raise UserError(
            f"{why}: stopped and saved after step {training.step}; "
            f"{run.command} --guard.patience 0 goes on all the same"
        )


def in_words(held_out: dict[str, float]) -> str:
    bits = held_out.get("bits_per_byte")
    if bits is None:
        return f"{held_out['held_out_loss']:.3f} nats per token asked"
    return f"{bits:.3f} bits per byte"


EXAMPLES = {  # what generate.py can be asked after a run
    "causal": "--prompt 'Return the'",
    "chat": "--chat",
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
    of_world = training.config.data.source == "world"
    texts = list(training.sample(12, 200) if of_world else training.sample())
    for number, text in enumerate(texts[:3], 1):
        run.log(f"\n--- sample {number} ---\n{text.strip()}")
    if of_world:
        run.log("\n" + judged(texts))
    example = EXAMPLES[training.config.objective]
    run.log(
        f"\npicture: {training.lead(lambda: str(draw(training, run)))}\n"
        f"more:    {shlex.join(['python', 'generate.py', '--run', run.name])} "
        + (example.replace("Return the", "Once there were") if of_world else example)
    )


def script() -> None:
    said = value_of("--plan.timeout", sys.argv[1:])
    # what is no such number, is refused where all flags are read
    world = join(int(said) if re.fullmatch("[1-9][0-9]{0,6}", said) else Plan.timeout)
    with one_voice(world):
        begin_or_go_on(sys.argv[1:], world)


def begin_or_go_on(arguments: list[str], world: Group) -> None:
    """Do what the arguments say, together with all other processes if there are any."""

    def opened(name: str) -> Run:
        return shared(world, lambda: Run.resume(name))

    config, run, changed = parse(after_restart(arguments), opened)
    pick_device(config.device)  # before long work
    if config.seeds == 1:
        return train(config, run, changed, world)
    seeds = range(config.seed, config.seed + config.seeds)
    each = [replace(config, name=f"{config.name}-seed{n}", seed=n, seeds=1) for n in seeds]
    for one in each:
        check_free(one.name)
    for one in each:
        train(one, None, [], world)


def train(config: Train, run: Run | None, changed: list[str], world: Group) -> None:
    """Begin a run, or go on with one, until its last step or until somebody stops it."""
    check_size(config.plan, world)
    if run is None and config.name:
        lead(world, lambda: check_free(config.name))
    config, tokenizer = with_base(config, run)
    special = objective_for(config.objective, config.model.arch).special
    text = partial(
        prepare, config.data, config.tokenizer, tokenizer, special=special,
        most=config.model.context,
    )  # fmt: skip
    lead(world, lambda: text() and None)  # the first process makes the tokens, the others find them
    corpus = text()
    config = complete(config, corpus.tokenizer.vocab_size)
    if config.dry_run:
        training = dry_run.begun(config, corpus)
        peak = matmul_peak(training.device, training.dtype)
        print(
            introduction(training, peak, "none is begun")
            + dry_run.in_words(dry_run.forecast(config, corpus), config)
        )
        return
    # A run that has saved all its weights needs its base no more.
    saved = run is not None and run.checkpoints() and config.adapter.kind == "none"
    # before the folder: what cannot be leaves nothing
    training = begin(replace(config, base="") if saved else config, corpus)
    training.config = config
    told = training.lead(lambda: told_of(training, run))
    if run is None:
        run = shared(world, lambda: Run.create(config.name, config))
    else:
        training.load(run)
        with run.writing(run.folder / "config.json"):
            run.keep(config)
    training.lead(lambda: keep_tokenizer(corpus, run))
    if told:
        training.lead(lambda: forecast.write(told, run.folder / forecast.FILE))
    peak = matmul_peak(training.device, training.dtype)
    run.log(introduction(training, peak, str(run.folder), changed))
    start = time.perf_counter()
    if not loop(training, run, peak):
        run.log(f"stopped and saved after step {training.step}; go on with\n  {run.command}")
        sys.exit(130)
    finish(training, run, time.perf_counter() - start)


def told_of(training: Training, run: Run | None) -> forecast.Forecast | None:
    """What was forecast of this run, which keeps it. UserError if that was another one."""
    c = training.config
    if not c.forecast:
        return None
    if c.objective != "causal":
        raise UserError("--forecast compares bits per byte, which only --objective causal has")
    path, N = Path(c.forecast), sum(parameters(c.model).values())
    if run is not None and not path.is_file():
        path = run.folder / forecast.FILE
    told = forecast.read(path)
    D = training.ramp.seen(c.steps) * training.width
    forecast.check(told, N, D, training.texts()["held_out"], str(path))
    return told


def keep_tokenizer(corpus: Corpus, run: Run) -> None:
    """A resumed run may lack it, if it was killed."""
    path = run.folder / corpus.tokenizer.file_name
    with run.writing(path):
        corpus.tokenizer.save(path)
        if knows_roles(corpus.tokenizer):
            keep_template(run.folder)


if __name__ == "__main__":
    main(script)
