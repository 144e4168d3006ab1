"""Training by many processes: the same run, the same folder, whatever the plan.

Idea: all ranks live through the same run together. Each reads the same text, takes part in each
update with its own part of the model (parallel.py), and decides nothing by itself: what depends on
files, clocks or signals is found out by the first rank and told to all. Only the first rank writes.

A checkpoint is that of the plain model, put together from all ranks, and so it can be taken up
under any plan, or by one process.

    torchrun --nproc-per-node 8 train.py --plan.data 2 --plan.pipeline 2 --plan.tensor 2

torchrun with --max-restarts starts all ranks again when one has died; they go on from the newest
checkpoint of the run's --name.

Run: python -m pytest tests/test_parallel_training.py

Papers: Shoeybi et al. 2019 (arXiv 1909.08053); Narayanan et al. 2021 (arXiv 2104.04473).
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import optim
from adapters import adapt, frozen_mark
from data import Corpus
from mesh import Group, Mesh, Plan, end_the_stopped, first_to_say, lost
from model import Transformer
from objectives import Batch
from optim import learnt
from parallel import Part, check, evaluate, update
from quantized import quantized
from recompute import recompute
from run import RUNS, Run, Tensors, UserError, value_of
from split import Place
from step import Update, device_memory, pick_device
from training import Train, Training, least_bytes
from writer import first_model
from zero import build, held

# --- one voice ------------------------------------------------------------------------------------


class Listener(Run):
    """The run as all ranks but the first see it: they read and never write."""

    def keep(self, config: object) -> None: ...

    def log(self, text: str = "") -> None: ...

    def measure(self, **values) -> None: ...

    def forget_after(self, step: int) -> None: ...


def lead(world: Group, function: Callable[[], Any]) -> Any:
    """What the function says on the first rank, on all; if it raises a UserError there, so do all.

    What it says must be what JSON can say.
    """
    said = {}
    if world.index == 0:
        try:
            said = {"value": function()}
        except UserError as error:
            said = {"error": str(error)}
    said = json.loads(world.tell(json.dumps(said)))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def agree(world: Group, function: Callable[[], Any]) -> Any:
    """What the function says here; if it raises a UserError on any rank, all raise that one."""
    value, why = None, ""
    try:
        value = function()
    except UserError as error:
        why = str(error)
    failed = torch.zeros(world.size)
    failed[world.index] = bool(why)
    failed = world.sum_(failed.to(world.device))
    if not failed.any():
        return value
    raise UserError(world.tell(why, int(failed.nonzero()[0])))


def same_settings(world: Group, config: Train, marks: dict[str, str]) -> None:
    """UserError on all ranks if one has other settings or another text than the first."""

    def compare() -> None:
        first = json.loads(world.tell(json.dumps([asdict(config), marks])))
        own = json.loads(json.dumps([asdict(config), marks]))
        if first != own:
            theirs, mine = ({**flat(s), **marks} for s, marks in (first, own))
            unlike = [f"{k} {mine[k]!r}, not {x!r}" for k, x in theirs.items() if mine[k] != x]
            raise UserError(
                f"rank {world.index} has other settings or files than the first: "
                f"{', '.join(unlike)}; start all with the same"
            )

    agree(world, compare)


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Settings by their full names."""
    found = {}
    for name, value in values.items():
        deeper = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return found


# --- the state of a run ---------------------------------------------------------------------------


class ParallelTraining(Training):
    """The state of a run of which this process holds a part."""

    def __init__(self, config: Train, corpus: Corpus, mesh: Mesh):
        self.mesh = mesh
        self.first = mesh.world.index == 0
        if config.watch_every or config.dry_run:
            raise UserError("--watch-every and --dry-run are for one process: leave --plan out")
        if config.plan.exact:
            torch.use_deterministic_algorithms(True)
        agree(mesh.world, lambda: check_fits(config, pick_device(config.device)))
        agree(mesh.world, lambda: super(ParallelTraining, self).__init__(config, corpus))
        same_settings(mesh.world, config, self.texts())

    def make(self) -> None:
        c = self.config
        self.model = Part(c.model, c.plan, self.mesh, c.adapter)
        if c.base:
            first = first_model(c.model, c.base, c.adapter, c.seed)
            if quantized(first):
                raise UserError(
                    f"the base {c.base} is quantized, and tuning beside it is for one process: "
                    "leave --plan out, or take the base that it was made of"
                )
            self.base, weights = frozen_mark(first), dict(first.named_parameters())
            for p in self.model.parameters():
                p.data.copy_(p.place.of(weights[p.place.name]))
        else:
            self.base = ""
            self.model.initialize(c.seed)
        self.model.to(self.device)
        recompute(self.model, c.recompute)
        self.optimizer = build(self.model, c.optim, self.dtype, c.plan)

    def lead(self, function: Callable[[], Any]) -> Any:
        return lead(self.mesh.world, function)

    def agreed(self, wish: bool) -> bool:
        wishes = torch.tensor([float(wish)], device=self.mesh.world.device)
        return bool(self.mesh.world.max_(wishes))

    def update(self) -> Update:
        c = self.config
        made = update(
            self.model, self.batches, self.optimizer, self.lr, c.optim, c.plan, self.dtype,
            self.scale,
        )  # fmt: skip
        if c.guard.ranks and self.step % c.guard.ranks == 0:
            check_copies(self.model)
        return made

    def evaluate(self, batches: Iterator[Batch]) -> tuple[float, int]:
        return evaluate(self.model, batches, self.config.plan, self.dtype)

    # --- as the plain model has it

    def skeleton(self) -> tuple[Transformer, Tensors]:
        """The plain model and its optimizer's tensors, without memory."""
        with torch.device("meta"):
            model = Transformer(self.config.model, seed=None)
            adapt(model, self.config.adapter)
            optimizer = optim.build(model.named_parameters(), self.config.optim)
        return model, optimizer.tensors()

    def weights_and_state(self) -> tuple[Tensors, Tensors]:
        model, state = self.skeleton()
        weights = self.whole(learnt(model).items(), "weight/")
        steps = {n: torch.tensor(g["t"]) for g in self.optimizer.param_groups[:1] for n in state
                 if n.startswith("t/")}  # fmt: skip
        return weights, steps | self.whole((n, x) for n, x in state.items() if n not in steps)

    def whole(self, wanted: Iterable[tuple[str, Tensor]], prefix: str = "") -> Tensors:
        """Tensors of these names and shapes from what all ranks hold; empty but on the first rank.

        Each byte comes from one rank, and all others say 0.
        """
        own: dict[str, list[tuple[Place, Tensor]]] = {}
        for kind, place, x in held(self.model, self.optimizer):
            if place.here:
                own.setdefault(f"{kind}/{place.name}", []).append((place, x))
        found = {}
        for name, like in wanted:
            x = torch.zeros(like.shape, dtype=like.dtype, device=self.device)
            for place, part in own.get(prefix + name, []):
                place.write(x, part.detach())
            self.mesh.world.sum_(x.view(torch.uint8))
            if self.mesh.world.index == 0:
                found[name] = x.cpu()
        return found

    def whole_model(self) -> Transformer | None:
        """On the first rank only."""
        weights = self.whole(self.skeleton()[0].named_parameters(), "weight/")
        if not weights:
            return None
        model = Transformer(self.config.model, seed=None)
        adapt(model, self.config.adapter)
        model.load_state_dict(weights)
        return model.to(self.device)

    @torch.no_grad()
    def fill(self, folder: Path) -> Tensors:
        model, state = self.skeleton()
        weights = learnt(model)
        more = self.more()
        agree(self.mesh.world, lambda: same_shapes(folder / "model.safetensors", weights, "model"))
        path = folder / "train_state.safetensors"
        agree(self.mesh.world, lambda: same_shapes(path, state | more, "optimizer"))
        with safe_open(folder / "model.safetensors", "pt") as a, safe_open(path, "pt") as b:
            for kind, place, x in held(self.model, self.optimizer):
                file, name = (a, place.name) if kind == "weight" else (b, f"{kind}/{place.name}")
                if kind != "weight" or name in weights:
                    x.copy_(place.read(file.get_tensor(name)))
            for group in self.optimizer.param_groups:
                group["t"] = int(b.get_tensor("t/0"))
            return {n: b.get_tensor(n) for n in more}

    def sample(self, count: int = 3, tokens: int = 100) -> Iterator[str]:
        model = self.whole_model()
        if self.first:
            yield from self.sample_of(model, count, tokens)


def same_shapes(path: Path, wanted: Tensors, what: str) -> None:
    """UserError unless a file has these tensors."""
    with safe_open(path, "pt") as file:
        found = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    if found != {n: tuple(x.shape) for n, x in wanted.items()}:
        raise UserError(f"{path.parent} was made by another {what}: start a new run")


# --- guards ---------------------------------------------------------------------------------------


def check_copies(part: Part) -> None:
    """UserError on all ranks if two that should hold the same weights hold different bits."""
    mesh = part.mesh
    weights = list(part.parameters())
    whole = part.shards is None or part.shards.stage < 3  # else no other copy has the same numbers
    if not whole:
        weights = [part.shards.of[p] for p in weights]
    params = {f"{p.place.name}/{p.place.lo}": p for p in weights}
    kinds = [
        (mesh.data, params if whole else {}),
        (mesh.tensor, {n: p for n, p in params.items() if p.place.hi < 0}),
    ]
    if part.config.tied and (mesh.first or mesh.last):
        rows = part.words if mesh.first else part.heads
        kinds.append((mesh.ends, {f"{p.place.name}/{p.place.lo}": p for p in rows}))
    found = [text for group, some in kinds for text in differing(group, some)]

    def check() -> None:
        if found:
            raise UserError(found[0])

    agree(mesh.world, check)


def differing(group: Group, params: dict[str, Tensor]) -> list[str]:
    """In words each weight whose bits are not the same on all ranks of a group."""
    if group.size == 1 or not params:
        return []
    own = torch.tensor([bits(p) for p in params.values()], device=group.device)
    unlike = (group.gather(own[None]) != own).any(0).tolist()
    return [
        f"ranks {group.ranks} no longer have the same {name.split('/')[0]}"
        for name, differs in zip(params, unlike, strict=True)
        if differs
    ]


def bits(x: Tensor) -> int:
    """A hash of all bits of a tensor."""
    raw = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=7).digest(), "big")


# --- the processes --------------------------------------------------------------------------------


@contextmanager
def one_voice(world: Group) -> Iterator[None]:
    """Inside, only the first rank prints, and a sentence that several have to say comes once."""
    with ExitStack() as stack:
        if world.index > 0:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        try:
            yield
        except UserError as error:
            if not first_to_say(str(error)):
                sys.exit(2)
            raise
        except RuntimeError as error:
            if not lost(error):
                raise
            end_the_stopped()
            said = (
                "a process has died or does not answer, and so all end; torchrun's --max-restarts"
            )
            if not first_to_say(said):
                sys.exit(1)
            why = str(error).splitlines()[0]
            raise UserError(
                f"{said} 3 would begin again from the last checkpoint ({why})"
            ) from None


def begin(config: Train, corpus: Corpus) -> Training:
    """The state before the first step, of one process or of this one's part."""
    plan = config.plan
    if plan.size == 1 and not plan.exact:
        return Training(config, corpus)
    return ParallelTraining(config, corpus, Mesh(plan.data, plan.pipeline, plan.tensor, plan.exact))


def check_size(plan: Plan, world: Group) -> None:
    """UserError unless there are as many processes as the plan is for."""
    if plan.size != world.size:
        many = f"torchrun --nproc-per-node {plan.size}" if plan.size > 1 else "python"
        raise UserError(
            f"the plan is for {plan.data} × {plan.pipeline} × {plan.tensor} = {plan.size} "
            f"processes, and there are {world.size}: start it with {many} train.py, or give "
            "another --plan"
        )


def check_fits(config: Train, device: torch.device) -> None:
    """UserError, with the nearest plan that would fit, if a process would need too much memory."""
    plan, there = config.plan, device_memory(device)
    if device.type == "cpu":  # which all processes of a machine share
        there /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def fits(plan: Plan) -> bool:
        try:
            check(config.model, plan, config.adapter)
            return least_bytes(replace(config, plan=plan)) <= there
        except UserError:
            return False

    def far(other: Plan) -> tuple[int, float]:
        pairs = [
            (getattr(plan, n), getattr(other, n)) for n in ("data", "pipeline", "tensor", "zero")
        ]
        return sum(a != b for a, b in pairs), sum(abs(a - b) for a, b in pairs)

    if least_bytes(config) <= there:
        return
    near = min(filter(fits, others(plan)), key=far, default=None)
    instead = "none for as many processes does: choose smaller sizes, or more of them"
    if near:
        instead = (
            f"the nearest that fits is --plan.data {near.data} --plan.pipeline {near.pipeline} "
            f"--plan.tensor {near.tensor} --plan.zero {near.zero}"
        )
    raise UserError(
        f"under this plan a process needs at least {least_bytes(config) / 1e9:,.1f} GB, and has "
        f"{there / 1e9:,.1f}: {instead}"
    )


def others(plan: Plan) -> Iterator[Plan]:
    """All plans for as many processes."""
    sides = [n for n in range(1, plan.size + 1) if plan.size % n == 0]
    for data, pipeline, zero in product(sides, sides, range(4)):
        if plan.size % (data * pipeline) == 0:
            tensor = plan.size // (data * pipeline)
            with suppress(UserError):
                yield replace(
                    plan, data=data, pipeline=pipeline, tensor=tensor, zero=zero, layers=()
                )


def shared(world: Group, make: Callable[[], Run]) -> Run:
    """A run that the first rank makes or opens to write, and the others to read."""
    made: list[Run] = []

    def folder() -> str:
        made.append(make())
        return str(made[0].folder)

    path = lead(world, folder)
    return made[0] if made else Listener(Path(path))


def after_restart(arguments: list[str]) -> list[str]:
    """The arguments, with --resume if torchrun has started all again and there is a run by now."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and "RANK" in os.environ:
        name = value_of("--name", arguments)
        if not name:
            raise UserError("with --max-restarts a run needs a --name, by which it is found again")
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if again and (RUNS / name / "config.json").is_file() and "--resume" not in arguments:
            return [*arguments, "--resume"]
    return arguments
