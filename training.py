"""What a training run is made of: its settings, and its state between two steps.

Idea: everything that decides a run's future is here: weights, the optimizer's tensors, the place in
the text, the last losses, what is passed over. A checkpoint holds it all, and so a run that was
killed ends in the same bits as one that was not; a run that spiked goes back to one (guard.py).

Run: python -m pytest tests/test_train.py
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from adapters import frozen_mark
from data import Corpus, DataConfig, TokenizerConfig, prepare
from dropout import drawn_from
from generate import Sampling, generate
from guard import AGAIN, LEAST, GuardConfig, Made, Skip, spike
from kernels.cross_entropy import IGNORE
from lora import Adapter, plain
from mesh import Plan
from model import ModelConfig, Transformer
from objectives import OBJECTIVES, ROLES, Batch, Rows, objective_for, vocabulary_for
from optim import OptimConfig, Ramp, build, learning_rate, learnt
from packing import Mixture, whole
from prefix import check_room
from recompute import KINDS, recompute
from run import (
    Run,
    Tensors,
    UserError,
    damage,
    generator,
    load_tensors,
    read_json,
    read_sealed,
    remove,
    settings,
    step_of,
    write_sealed,
)  # fmt: skip
from scaling import exact_flops, parameters
from step import (
    LossScale,
    NotFinite,
    Update,
    check_memory,
    evaluate,
    first_bad,
    pick_device,
    to,
    update,
    write_replay,
)  # fmt: skip
from vocabulary import Tokenizer
from writer import first_model, load_weights

WORLD_STEPS = 800  # enough for the stories of world.py, in less than three minutes


@dataclass(frozen=True)
class Train:
    """Train a language model."""

    name: str = ""  # the run's folder under runs/; empty: the next free run-001, run-002, …
    base: str = ""  # begin with weights and tokenizer of this run, or of a Hugging Face folder
    resume: bool = False  # go on with the run of this name (empty: the newest), with its settings
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    adapter: Adapter = Adapter()
    optim: OptimConfig = OptimConfig()
    # what to predict: the next token, masked ones, hidden spans, …
    objective: Literal[tuple(OBJECTIVES)] = "causal"
    steps: int = 1600  # updates; 800 for --data.source world
    batch: int = 8  # rows of model.context tokens that go through the model at once
    accumulate: int = 1  # such batches in one update
    ramp_from: int = 0  # rows of the first update, from where they grow; 0: all from the start
    ramp_tokens: int = 0  # tokens over which they grow to batch × accumulate
    # computed again in the backward pass instead of kept: less memory, more time
    recompute: Literal[tuple(KINDS)] = "none"
    plan: Plan = Plan()
    guard: GuardConfig = GuardConfig()
    forecast: str = ""  # file of scaling.py forecast, which the run is held to while it goes
    evaluate_every: int = 200  # updates between measurements on the held-out documents
    save_every: int = 500  # updates between checkpoints
    dry_run: bool = False  # say what the run would take, after a few updates, and begin none
    watch_every: int = 0  # updates between looks at each block's scales; 0: never
    seed: int = 0  # of weights, order and samples
    seeds: int = 1  # runs, <name>-seed0, -seed1, …, that differ in nothing but their seed
    device: str = "auto"  # auto, cpu, cuda or mps
    # of the arithmetic; the weights stay float32
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "evaluate_every", "save_every", "seeds"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, at most {MOST:,}")
        objective_for(self.objective, self.model.arch)
        if (self.objective == "chat") != (self.data.form == "chat"):
            raise UserError("--objective chat and --data.form chat belong together: give both")
        if self.adapter.kind != "none" and not self.base:
            raise UserError("--adapter.kind needs a --base, beside whose weights it stands")
        if self.adapter.dropout and self.recompute != "none" and self.plan.pipeline > 1:
            raise UserError(
                "--adapter.dropout, --recompute and --plan.pipeline do not go together: what was "
                "dropped would be drawn again for another micro-batch; leave one of them out"
            )
        if self.adapter.kind == "prompt" and self.recompute != "none":
            raise UserError(
                "--adapter.kind prompt and --recompute do not go together: leave one out"
            )
        if not 0 <= self.watch_every <= MOST:
            raise UserError(f"--watch-every {self.watch_every} must be from 0 to {MOST:,}")
        if (warm := round(self.optim.warmup * self.steps)) == self.steps:
            raise UserError(
                f"--steps {self.steps} are all of the warm-up of {warm} steps: give more of "
                "them, or a smaller --optim.warmup"
            )
        if not 0 <= self.ramp_from <= self.batch * self.accumulate:
            raise UserError(
                f"--ramp-from {self.ramp_from} must be from 0 to the rows of an update, "
                f"{self.batch * self.accumulate}"
            )
        if bool(self.ramp_from) != bool(self.ramp_tokens) or self.ramp_tokens < 0:
            raise UserError("--ramp-from and --ramp-tokens make a ramp together: give both or none")


MOST = 10**9  # of whatever is counted here
# What may differ when a run is resumed; of the text it is proved that it is still the same.
MAY_CHANGE = {
    "name", "resume", "seeds", "dry_run", "steps", "evaluate_every", "save_every", "watch_every",
    "device", "recompute", "data.path", "forecast", "guard.patience", "guard.ranks",
    *(f"plan.{field.name}" for field in fields(Plan)),
}  # fmt: skip


def stored(run: Run) -> Train:
    """The settings that a run was made with."""
    return settings(Train, run.config(), str(run.folder / "config.json"))


def corpus_of(how: Train, tokenizer: Tokenizer) -> Corpus:
    """The text that a run was trained on, as tokens; UserError if it is gone."""
    special = objective_for(how.objective, how.model.arch).special
    words = tokenizer if how.base else None
    return prepare(how.data, how.tokenizer, words, special=special, most=how.model.context)


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


def least_bytes(config: Train) -> int:
    """That a process must hold at least: weights, gradients, optimizer, and some of what backward
    needs, which is twice the stream for each block.

    ZeRO 1 divides 8 bytes of a weight's 16 among the copies, ZeRO 2 4 more, ZeRO 3 all. Beside
    adapters weights are frozen, and have 4.
    """
    c, plan = config.model, config.plan
    divided, total = (0, 8, 12, 16)[plan.zero], 16
    if config.adapter.kind != "none":
        divided, total = (0, 0, 0, 4)[plan.zero], 4
    each = total - divided + divided / plan.data
    stream = 2 * 4 * config.batch * c.context * c.dim * c.layers / plan.data
    return int((each * sum(parameters(c).values()) / plan.tensor + stream) / plan.pipeline)


class Training:
    """The state of a run between two steps, which a checkpoint keeps and a resumed run takes up."""

    def __init__(self, config: Train, corpus: Corpus):
        self.config, self.corpus = config, corpus
        self.device, self.dtype = pick_device(config.device), getattr(torch, config.dtype)
        check_memory(least_bytes(config), self.device)
        words, context, arch = corpus.tokenizer, config.model.context, config.model.arch
        self.objective = objective_for(config.objective, arch)
        self.vocabulary = vocabulary_for(
            self.objective, words.special, words.known_ids, words.end_of_text
        )
        self.width = self.objective.text_width(context, arch)
        check_room(config.model, config.adapter, self.objective.widths(self.width, arch))
        self.plain = self.width == context and arch != "encdec"  # text goes in as it stands
        full = config.accumulate * config.batch
        self.ramp = Ramp(full, config.ramp_from or full, config.ramp_tokens // self.width)
        if self.ramp.rows(config.steps - 1) < full:
            raise UserError(
                f"--ramp-tokens {config.ramp_tokens:,} are more than these {config.steps:,} steps "
                f"read, so that no update ever has its {full} rows"
            )
        self.rows = Mixture(
            corpus.train, self.width, words.end_of_text, config.seed, corpus.parts,
            config.data.packing,
        )  # fmt: skip
        self.start = self.rows.place
        self.begin()

    def begin(self) -> None:
        """The state before the first step."""
        self.make()
        self.scale = LossScale() if self.dtype == torch.float16 else None
        self.rows.seek(self.start)
        self.step = self.row = 0  # updates done; rows of the text read or passed over
        self.past: list[Made] = []  # loss and norm of the last updates
        self.starts: list[int] = []  # the rows that these began with
        self.skips: list[Skip] = []

    def make(self) -> None:
        """Model and optimizer."""
        c = self.config
        self.model = first_model(c.model, c.base, c.adapter, c.seed).to(self.device)
        self.base = frozen_mark(self.model)
        recompute(self.model, c.recompute)
        self.optimizer = build(self.model.named_parameters(), c.optim, self.dtype)

    first = True  # of several processes, does this one write?

    def lead(self, function: Callable[[], Any]) -> Any:
        """What it says; of many processes (parallel_training.py) the first asks and tells all."""
        return function()

    def agreed(self, wish: bool) -> bool:
        """Does any process wish it?"""
        return wish

    @property
    def tokens(self) -> int:
        """Of text, in all updates until now."""
        return self.ramp.seen(self.step) * self.width

    @property
    def flops(self) -> int:
        """Of one row, forward and backward."""
        S, T = self.objective.widths(self.width, self.config.model.arch)
        return exact_flops(self.config.model, T, source=S)

    def batch(self, rows: Rows, name: str, number: int) -> Batch:
        """What is asked of these rows, drawn from the stream of randomness of a name and number."""
        draws = generator(self.config.seed, name, number)
        batch = self.objective(rows, draws, self.vocabulary, self.config.model.arch)
        return to(batch, self.device)

    def advance(self) -> Update:
        """One update, of the next rows that are not passed over."""
        c, count = self.config, self.ramp.rows(self.step)
        while skip := next((s for s in self.skips if s.first == self.row), None):
            self.rows.take(skip.end - skip.first)
            self.row = skip.end
        self.starts = [*self.starts, self.row][-c.guard.skip :]
        self.batches = []
        for done in range(0, count, c.batch):
            size = min(c.batch, count - done)
            batch = self.batch(self.rows.take(size), "objective", self.row)
            batch.draws = drawn_from(c.seed, self.step, self.row, size).to(self.device)
            self.batches.append(batch)
            self.row += size
        self.lr = learning_rate(c.optim, self.step, c.steps)
        self.step += 1
        return self.update()

    def update(self) -> Update:
        """Move the weights by what the batches say."""
        optim = self.config.optim
        return update(
            self.model, self.batches, self.optimizer, self.lr, optim, self.dtype, self.scale
        )

    def jumped(self, made: Update) -> str:
        """In words what an update has jumped in, or an empty string; and remember the update."""
        now = made.loss, made.norm
        if not made.moved:
            return ""
        if not (why := spike(self.config.guard, self.past, now)):
            self.past = [*self.past, now][-max(1, self.config.guard.window) :]
        return why

    def go_back(self, why: str, run: Run) -> None:
        """To a checkpoint that has read no row of the last few updates, which are passed over.

        If all that are kept have read some of them, to the oldest.
        The list of what is passed over is written first: whoever goes on with the run from there
        knows it, and which checkpoints have seen too much.
        """
        step = self.step
        skip = Skip(*self.lead(lambda: self.pass_over(why, run)))
        self.load(run)
        run.log(
            f"step {step:6,}   {why}: back to step {skip.back_to:,}, without rows {skip.first:,} "
            f"to {skip.end - 1:,}"
        )

    def pass_over(self, why: str, run: Run) -> Skip:
        """Add the rows of a jump to the list of the run."""
        step, every = self.step, self.config.save_every
        rows = {0: 0} if step <= 2 * every else {}  # read before a step that one can go back to
        for path in run.checkpoints():
            if step_of(path) % every == 0 and damage(path) is None:
                rows[step_of(path)] = read_json(path / "train_state.json").get("row", math.inf)
        if not rows:
            raise UserError(
                f"step {step}: {why}; there is no whole checkpoint to go back to: start again"
            )
        earlier = [n for n, row in rows.items() if row <= self.starts[0]]
        back_to = max(earlier, default=min(rows))
        again = [s for s in self.skips if s.back_to >= back_to]
        if len(again) >= AGAIN:
            raise UserError(
                f"step {step}: {why}; this is no accident, as it is the spike number "
                f"{len(again) + 1} behind step {back_to}: lower --optim.lr from "
                f"{self.config.optim.lr} and start again"
            )
        skip = Skip(max(self.starts[0], rows[back_to]), self.row, step, back_to, why)
        keep_skips(run, [*self.skips, skip])
        return skip

    def reported(self, error: NotFinite, run: Run) -> str:
        """What to say of an update that is no number, with a file that shows it again.

        NotFinite, with advice, if the run has too little behind it to go back.
        """
        path = run.folder / f"replay-{self.step:06d}.safetensors"
        model = self.whole_model()

        def write() -> None:
            with run.writing(path):
                write_replay(path, plain(model), self.batches, self.dtype)

        self.lead(write)
        why = (
            f"{error}, in rows {self.starts[-1]:,} to {self.row - 1:,} of the text; "
            f"python step.py {path} shows it again"
        )
        if not self.config.guard.window or len(self.past) < LEAST:
            raise NotFinite(f"step {self.step}: {why}; {self.diverged}")
        return why

    def check(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise UserError(f"the {what} is {value} at step {self.step}: {self.diverged}")

    @property
    def diverged(self) -> str:
        lr = self.config.optim.lr
        return f"the run has diverged; lower --optim.lr from {lr} and start again"

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
        nats, tokens = self.evaluate(batches)
        self.check("loss on the held-out documents", nats)
        found = {"held_out_loss": nats / max(1, tokens)}
        if self.config.objective == "causal":
            size = self.corpus.meta["held"]["bytes"]
            found["bits_per_byte"] = nats / math.log(2) / size
        return found

    def evaluate(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """(nats, tokens) of batches."""
        return evaluate(self.model, batches, self.dtype)

    def texts(self) -> dict[str, str]:
        """What the tokens are known by, those trained on and those held out."""
        meta = self.corpus.meta
        mark = f"{self.corpus.tokenizer.fingerprint}-{meta['train']['hash']}"
        return {"text": mark, "held_out": meta["held"]["hash"]}

    def whole_model(self) -> Transformer:
        """The plain model; of many processes, the first one's has the weights."""
        return self.model

    def weights_and_state(self) -> tuple[Tensors, Tensors]:
        """By the plain model's names; of many processes, on the first one."""
        return learnt(self.model), self.optimizer.tensors()

    def more(self) -> Tensors:
        """Beside weights and optimizer, what a checkpoint must hold in numbers."""
        past = torch.full((max(1, self.config.guard.window), 2), math.inf, dtype=torch.float64)
        if self.past:
            past[: len(self.past)] = torch.tensor(self.past, dtype=torch.float64)
        scale = self.scale.tensors() if self.scale else {}
        return {**scale, "past": past}

    def save(self, run: Run) -> None:
        weights, state = self.weights_and_state()
        self.lead(lambda: self.write(run, weights, state))

    def write(self, run: Run, weights: Tensors, state: Tensors) -> None:
        if bad := first_bad([*weights.items(), *state.items()]):
            raise NotFinite(f"{bad} is not finite at step {self.step}: {self.diverged}")
        info = {
            "place": self.rows.place, "row": self.row, "starts": self.starts,
            "skips": self.skips, **self.texts(), "base": self.base,
            "settings": lasting(self.config),
        }  # fmt: skip
        run.save(self.step, weights, state | self.more(), info, self.config.save_every)

    def load(self, run: Run) -> None:
        """Take up the newest whole checkpoint; a run stopped before its first one starts anew."""
        folder, skips = self.lead(lambda: self.newest(run))
        if folder:
            self.take_up(Path(folder), run)
        elif skips:
            self.begin()
        self.skips = [Skip(*skip) for skip in skips]
        run.forget_after(self.step)

    def newest(self, run: Run) -> tuple[str, list[Skip]]:
        """The checkpoint to go on from, if there is one, and what is to be passed over."""
        skips = kept_skips(run)
        for path in run.checkpoints() if skips else []:
            if damage(path) is None:
                known = read_json(path / "train_state.json").get("skips", [])
                if any(step_of(path) > s.back_to and [*s] not in known for s in skips):
                    remove(path)  # it has read what is to be passed over
        if run.checkpoints():
            return str(run.newest()), skips
        if skips and skips[-1].back_to == 0:
            return "", skips
        if len(run.metrics()) > stored(run).save_every:  # the last may have come before its save
            raise UserError(
                f"the checkpoints of {run.folder} are gone, though it has some steps behind it: "
                "put them back, or start a new run"
            )
        run.log(f"{run.folder} was stopped before its first checkpoint: it starts anew")
        return "", skips

    def take_up(self, folder: Path, run: Run) -> None:
        info = read_json(folder / "train_state.json")
        if info.get("base", self.base) != self.base:
            raise UserError(
                f"{self.config.base} is no longer the base that {run.folder} was trained beside: "
                "put that back"
            )
        step, place = info.get("step"), info.get("place")
        row, starts = info.get("row"), info.get("starts")
        counts = [step, row, *(starts if isinstance(starts, list) else [None])]
        if any(type(n) is not int or n < 0 for n in counts) or not self.rows.knows(place):
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
        state = self.fill(folder)
        if self.scale:
            self.scale.load_tensors(state)
        self.past = [(loss, norm) for loss, norm in state["past"].tolist() if loss < math.inf]
        self.step, self.row, self.starts = step, row, starts
        self.rows.seek(place)

    def fill(self, folder: Path) -> Tensors:
        """Weights and optimizer from a checkpoint; the other numbers of it."""
        load_weights(self.model, folder / "model.safetensors")
        state = load_tensors(folder / "train_state.safetensors")
        own = self.optimizer.tensors() | self.more()
        if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in own.items()}:
            raise UserError(f"{folder} was made by another optimizer: start a new run")
        self.optimizer.load_tensors(state)
        return state

    def sample(self, count: int = 3, tokens: int = 100) -> Iterator[str]:
        """Texts; or, of what is held out, what is asked and what the model says to it."""
        yield from self.sample_of(self.whole_model(), count, tokens)

    def sample_of(self, model: Transformer, count: int, tokens: int) -> Iterator[str]:
        tokenizer, seed = self.corpus.tokenizer, self.config.seed
        end, tokens = tokenizer.end_of_text, min(tokens, self.config.model.context)
        if self.config.objective == "chat":
            yield from self.replies(model, count, tokens)
            return
        if self.config.objective == "causal":
            steps = list(generate(model, [[end]] * count, tokens, Sampling(), {end}, seed))
            for column in zip(*steps, strict=True):
                yield tokenizer.decode([t for t in column if t is not None and t != end])
            return
        batch = self.batch(next(self.held(count)), "held out", 0)
        for number in range(min(count, len(batch.inputs))):
            row = batch.each(lambda x, n=number: x[n : n + 1])
            asked, said = self.answer(model, row, tokens)
            yield f"{tokenizer.decode(asked)}\n→ {tokenizer.decode(said)}"

    def replies(self, model: Transformer, count: int, tokens: int) -> Iterator[str]:
        """Of held-out conversations the beginning, and what the model says then."""
        tokenizer, special = self.corpus.tokenizer, self.corpus.tokenizer.special
        for number in range(min(count, len(self.corpus.held))):
            ids = self.corpus.held.document(number).tolist()
            if special[ROLES[2]] not in ids[: self.width]:
                continue
            asked = ids[: ids.index(special[ROLES[2]]) + 1]
            steps = generate(
                model, [asked], tokens, Sampling(greedy=True), {special[ROLES[3]]}, self.config.seed
            )
            said = [t for (t,) in steps if t is not None and t != special[ROLES[3]]]
            yield f"{tokenizer.decode(asked[2:-2])}\n→ {tokenizer.decode(said)}"

    @torch.no_grad()
    def answer(self, model: Transformer, row: Batch, tokens: int) -> tuple[list[int], list[int]]:
        """What the first piece of a row (1 T) asks, and the model's likeliest answer."""
        arch, end = self.config.model.arch, self.corpus.tokenizer.end_of_text
        last = int((row.hi if row.source is None else row.source_hi)[0, 0])
        asked = (row.inputs if row.source is None else row.source)[0, : last + 1]
        if arch == "encoder":
            asked, targets = asked[:tokens], row.targets[0, : last + 1][:tokens]
            hidden = model(asked[None], dtype=self.dtype)[0]
            said = model.logits(hidden[targets != IGNORE]).argmax(-1)
            return asked.tolist(), said.tolist()
        asked = asked.tolist()
        prompt, sources = ([end], [asked]) if arch == "encdec" else (asked, None)
        how = Sampling(greedy=True)
        steps = generate(model, [prompt], tokens, how, {end}, 0, (), sources, True)
        return asked, [token for (token,) in steps if token not in (None, end)]


def kept_skips(run: Run) -> list[Skip]:
    """What the run passes over, as its folder has it."""
    path = run.folder / "skips.json"
    if not path.exists():
        return []
    try:
        found = [Skip(*values) for values in read_sealed(path)["skips"]]
    except (LookupError, TypeError):
        raise UserError(f"{path} does not hold what is passed over") from None
    return found


def keep_skips(run: Run, skips: list[Skip]) -> None:
    with run.writing(path := run.folder / "skips.json"):
        write_sealed(path, {"skips": [[*skip] for skip in skips]})
