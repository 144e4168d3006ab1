"""A model over many processes: the plain model's numbers, computed by all of them together.

Idea: a batch can be cut (data), a model can be cut between its blocks (pipeline) and inside them
(tensor). Each rank builds its own part of the plain model, and an update is the plain update: the
gradient of the mean loss over all tokens, one clip by one norm, one step of the optimizer. What any
plan computes is what one process computes; `tests/test_parallel.py` holds every plan to it.

    plan     data × pipeline × tensor ranks (mesh.py)
    Part     this rank's part: its blocks, and of these its heads and hidden units (split.py)
    update   micro-batches through the pipeline (schedule.py), gradients summed over data

Every rank knows the whole batch and takes its micro-batches from it, so that the number of tokens
by which all divide is known without a word.

Run: python parallel.py                  holds some plans to what one process computes, in a minute
     python parallel.py certificate      holds all plans of 1, 2, 4 and 8 processes to it
     python parallel.py plan --model.preset bloom-176b --devices 384    the fastest plan

Papers: Shoeybi et al. 2019 (arXiv 1909.08053); Narayanan et al. 2021 (arXiv 2104.04473);
Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054); Li et al. 2020, DDP (arXiv 2006.15704).

Letters: B batch · T tokens · C model width · V vocabulary · M micro-batches.
"""

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import gcd
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn import Parameter

from adapters import adapt, in_block
from certificate import Certificate, certify
from data_parallel import Buckets
from dropout import Drop
from kernels.cross_entropy import IGNORE, cross_entropy
from kernels.mask import Mask
from lora import NONE, TABLES, Adapter, adapted
from mesh import Group, Mesh, Plan, tree
from model import ModelConfig, Transformer, drawn, preset_in
from objectives import Batch
from optim import OptimConfig, Optimizer, learnt
from plan import Automatic, automatic
from positions import NoPosition
from run import UserError, main
from schedule import SCHEDULES
from split import Cut, Place, share, split_block, split_cross_entropy, split_embedding
from step import LossScale, Update, move, shrink, source_of
from zero import Shards, build, holders

VIRTUAL = 8  # parts of every layer in exact mode, at most: a power of two

# --- a part of a model ----------------------------------------------------------------------------


class Part(Transformer):
    """This rank's share of a plain model: some of its blocks, and some heads and units of these.

    `run` takes a micro-batch and, behind the first stage, what the stage before has made of it; it
    gives what the next stage needs, or in the last one the loss.
    """

    def __init__(self, config: ModelConfig, plan: Plan, mesh: Mesh, adapter: Adapter = NONE):
        super().__init__(config, seed=None)
        check(config, plan, adapter)
        adapt(self, adapter)
        if adapted(self).keys() & set(TABLES):
            raise UserError("adapters on embedding or head are for one process, not for a --plan")
        self.mesh, self.exact = mesh, plan.exact
        self.in_flight = 0  # the most micro-batches that were kept at once for their backward pass
        parts = virtual(config) if plan.exact else plan.tensor
        self.cut = Cut(mesh.tensor, parts, plan.sequence)
        self.numbers = {name: i for i, (name, _) in enumerate(self.named_parameters())}
        for name, p in self.named_parameters():
            p.place = Place(name, tuple(p.shape), here=mesh.tensor.index == 0)
        if parts > 1:
            self.split()
        self.keep_own(plan)
        self.shards: Shards | None = None  # of ZeRO, once there is an optimizer

    @property
    def device(self) -> torch.device:
        """An empty stage has no weights: then that of the machine."""
        return next((p.device for p in self.parameters()), self.mesh.world.device)

    def split(self) -> None:
        """Cut every layer, and embedding and head, into parts."""
        for stack in (self, self.encoder):
            if stack is None:
                continue
            for block in stack.layers:
                split_block(block, self.cut)
            position, own = stack.position, self.cut.own
            if self.config.position == "t5":
                position.table = share(position.table, 1, self.cut, own[0], own[-1])
            if self.config.position == "alibi":
                heads = len(position.slopes)
                lo, hi = self.cut.bounds(heads, own[0])[0], self.cut.bounds(heads, own[-1])[1]
                position.slopes = position.slopes[lo:hi].clone()

    def keep_own(self, plan: Plan) -> None:
        """Drop what other stages hold."""
        mesh, config = self.mesh, self.config
        lo = sum(plan.layers_of(config.layers)[: mesh.pipeline.index])
        self.layers = nn.ModuleList(
            list(self.layers)[lo : lo + plan.layers_of(config.layers)[mesh.pipeline.index]]
        )
        rows = {name: p for name in ("embedding", "head") if (p := getattr(self, name)) is not None}
        for name in rows:
            setattr(self, name, None)
        self.words = nn.ParameterList()  # of the vocabulary, what goes in
        self.heads = nn.ParameterList()  # and what comes out
        if mesh.first:
            self.words.extend(self.vocabulary(rows["embedding"]))
        else:
            self.segment = self.embed_norm = None
            if config.position == "learned":
                self.position = NoPosition()
            if config.position == "t5":
                table = self.position.table
                table.place = table.place._replace(here=False)
        if not mesh.last:
            self.norm = None
            return
        if not config.tied:
            self.heads.extend(self.vocabulary(rows["head"]))
        elif mesh.first and not self.exact:
            self.heads = self.words
        else:  # a copy: the gradients of both are added before anything looks at them
            self.heads.extend(self.vocabulary(rows["embedding"]))
            for p in self.heads:
                p.place = p.place._replace(here=False)

    def vocabulary(self, p: Parameter) -> list[Parameter]:
        if self.cut.parts == 1:
            new = Parameter(p.detach().clone(), p.requires_grad)
            new.place = p.place
            return [new]
        return [share(p, 0, self.cut, i) for i in self.cut.own]

    # --- weights

    def named(self) -> list[tuple[str, Parameter]]:
        """Its parameters by the plain model's names; parts have a number behind theirs."""
        found, copies = [], {id(p) for p in self.heads} - {id(p) for p in self.words}
        for p in self.parameters():
            name = p.place.name
            name += f"#{p.place.part}" if p.place.hi >= 0 else ""
            found.append((name + "#tied" * (id(p) in copies and self.config.tied), p))
        return found

    def in_order(self) -> list[Parameter]:
        """Those that are trained, as the forward pass first needs them; backward in reverse.

        A decoder makes keys of what the encoder says before its own first block.
        """
        behind = list(self.encoder.layers.parameters()) if self.encoder is not None else []
        inside = list(self.layers.named_parameters())
        for first in (True, False):
            behind += [p for name, p in inside if (".cross." in name) == first]
        behind += [] if self.norm is None else self.norm.parameters()
        behind += [] if self.heads is self.words else self.heads
        later = set(behind)
        found = [p for p in self.parameters() if p not in later] + behind
        return [p for p in found if p.requires_grad]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """The plain model's own first weights."""
        for p in self.parameters():
            if len(p.place.shape) > 1:
                p.copy_(p.place.of(drawn(p.place.name, p.place.shape, self.config, seed)))

    def shared(self) -> Iterable[tuple[list[Parameter], Group]]:
        """Weights of which several ranks hold a copy, each with a part of the gradient; the group.

        Not those of data parallelism, which shares all. Of an adapter one matrix is cut with the
        weight beside it, and the other one used whole by every part.
        """
        if self.config.position == "t5":
            yield [self.position.table], self.mesh.pipeline
        whole = [p for p in self.in_order() if p.place.hi < 0]
        if self.cut.sequence:
            yield [p for p in whole if not p.place.name.endswith("relative.table")], self.cut.group
        elif self.cut.parts > 1:
            yield [p for p in whole if in_block(p.place.name)], self.cut.group

    # --- the forward pass

    def run(self, batch: Batch, x: Tensor | None, dtype: torch.dtype) -> Tensor:
        """A micro-batch through this stage; x (B T C) comes from the stage before."""
        memory, crossed = source_of(self, batch, dtype)
        mask = Mask(batch.lo, batch.hi)
        positions = torch.arange(batch.inputs.shape[1], device=batch.inputs.device)[None]
        if self.mesh.first:
            x = self.enter(self.embed(batch.inputs, None, dtype), positions)
        x, _ = self.blocks(x, positions, mask, None, memory, crossed, batch.draws)
        if not self.mesh.last:
            return x
        return self.loss(self.leave(x), batch.targets)

    def embed(self, ids: Tensor, segments: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.cut.parts == 1:
            x = F.embedding(ids, self.words[0])
        else:
            x = split_embedding(ids, list(self.words), self.cut)
        if self.segment is not None:
            segments = torch.zeros_like(ids) if segments is None else segments
            x = x + self.segment[self.own_tokens(segments, 1)]
        return x.to(dtype)

    def enter(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().enter(x, self.own_tokens(positions, 1))

    def drop(self, draws: Tensor | None, at: Tensor) -> Drop | None:
        return super().drop(draws, self.own_tokens(at, 0))

    def own_tokens(self, x: Tensor, dim: int) -> Tensor:
        """Those of the stream between f and g, where it is cut."""
        if not self.cut.sequence:
            return x
        return x.chunk(self.cut.group.size, dim)[self.cut.group.index]

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Σ −log p(target) of hidden (B T C), or of this rank's tokens of it."""
        if self.cut.parts == 1:
            return cross_entropy(hidden.flatten(0, 1), self.heads[0], targets.flatten())
        return split_cross_entropy(hidden, list(self.heads), targets, self.cut)


def virtual(config: ModelConfig) -> int:
    """The parts of exact mode: a power of two that divides the key-value heads."""
    return gcd(VIRTUAL, config.kv_heads_or_heads)


def check(config: ModelConfig, plan: Plan, adapter: Adapter = NONE) -> None:
    """UserError for a plan under which this model cannot run."""
    if plan.exact and adapter.kind != "none":
        raise UserError("--plan.exact is for all weights, not for adapters: leave one of them out")
    if adapter.kind == "prompt" and (plan.pipeline > 1 or plan.sequence or plan.zero == 3):
        raise UserError(
            "--adapter.kind prompt does not go with --plan.pipeline, --plan.sequence or --plan.zero"
            " 3: its rows pass through all blocks before a text does"
        )
    heads, tensor = config.kv_heads_or_heads, plan.tensor
    if heads % tensor:
        near = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"--plan.tensor {tensor} does not divide the {heads} key-value heads of the model: "
            f"choose one of {', '.join(map(str, near))}"
        )
    if plan.exact and virtual(config) % tensor:
        raise UserError(
            f"--plan.exact cuts {heads} heads into {virtual(config)} parts at most, not {tensor}"
        )
    if config.vocab_size < max(tensor, VIRTUAL):
        raise UserError(f"{config.vocab_size} tokens are too few to be divided")
    if config.arch == "encdec" and plan.pipeline > 1:
        raise UserError(
            "an encoder-decoder is no line of blocks, so --plan.pipeline must be 1 for it: use "
            "data and tensor"
        )
    if plan.layers and sum(plan.layers) != config.layers:
        raise UserError(
            f"--plan.layers {plan.layers} are {sum(plan.layers)} blocks, and the model has "
            f"{config.layers}"
        )
    if config.arch == "encdec" and plan.sequence:
        raise UserError("--plan.sequence is for decoders and encoders, not for both in one")
    if plan.sequence and config.context % tensor:
        raise UserError(f"--plan.sequence: {tensor} does not divide --model.context")
    if plan.exact and config.position == "t5" and plan.pipeline > 1:
        raise UserError("--plan.exact with --model.position t5 needs --plan.pipeline 1")


# --- an update ------------------------------------------------------------------------------------


def micro_batches(batches: list[Batch], plan: Plan) -> list[Batch]:
    """The same rows in batches of `plan.rows`; those of a rank of data are neighbours.

    By default so many that each stage of each copy has one; in exact mode eight at least, whatever
    the plan, since a product's last bits depend on its shape.
    """
    total = sum(len(b.targets) for b in batches)
    rows = plan.rows
    if not rows and plan.exact:
        rows = max(1, total // VIRTUAL)
    elif not rows:
        rows = max(1, len(batches[0].targets) // (plan.data * plan.pipeline))
    return [b.each(lambda x, i=i: x[i : i + rows]) for b in batches
            for i in range(0, len(b.targets), rows)]  # fmt: skip


def own_share(count: int, plan: Plan, index: int) -> range:
    """The micro-batches of a rank of data: neighbours, in exact mode a branch of the tree."""
    if plan.exact:
        leaves = max(plan.data, 1 << max(0, count - 1).bit_length())
        each = leaves // plan.data
        return range(min(count, each * index), min(count, each * (index + 1)))
    return range(count * index // plan.data, count * (index + 1) // plan.data)


class Gradients:
    """Sums of gradients over micro-batches, in exact mode by halves as `tree` has it."""

    def __init__(self, params: list[Parameter], exact: bool):
        self.params, self.exact = params, exact
        self.stack: list[tuple[int, list[Tensor]]] = []  # (micro-batches, their sum)

    def done(self) -> None:
        """Behind the backward pass of a micro-batch."""
        if not self.exact:
            return  # autograd has added them up
        size, now = 1, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        while self.stack and self.stack[-1][0] == size:
            now = added(self.stack.pop()[1], now)
            size *= 2
        self.stack.append((size, now))

    def finish(self) -> None:
        """Leave the sum in p.grad: zeros where nothing asked for a gradient."""
        if self.exact and self.stack:
            now = self.stack.pop()[1]
            while self.stack:
                now = added(self.stack.pop()[1], now)
            for p, g in zip(self.params, now, strict=True):
                p.grad = g
        for p in self.params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)


def added(some: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(some, more)) if some else []


def through_pipeline(
    part: Part, batches: list[Batch], plan: Plan, dtype: torch.dtype, scale: float,
    gradients: Gradients, buckets: Buckets,
) -> list[float]:  # fmt: skip
    """Forward and backward pass of all micro-batches; the losses, in the last stage."""
    mesh, stage = part.mesh, part.mesh.pipeline.index
    steps = SCHEDULES[plan.schedule](plan.pipeline, len(batches))[stage]
    kept: dict[int, tuple[Tensor | None, Tensor]] = {}
    losses, sent = [], []  # what is sent must stay as it is until it has come
    for step in steps:
        batch = batches[step.micro]
        if not step.back:
            x = None if mesh.first else received(part, batch, plan, dtype).requires_grad_()
            y = part.run(batch, x, dtype)
            if mesh.last:
                losses.append(y.item())
            else:
                out = y.detach().contiguous()
                sent.append((out, mesh.up.send(out, stage + 1)))
            kept[step.micro] = x, y
            part.in_flight = max(part.in_flight, len(kept))
            continue
        x, y = kept.pop(step.micro)
        if step == steps[-1] and not plan.exact and plan.zero < 2:
            buckets.open()
        if mesh.last and y.requires_grad:
            (y * scale).backward()
        elif not mesh.last:
            dy = torch.empty_like(y, memory_format=torch.contiguous_format)
            dy = mesh.down.receive(dy, stage + 1)
            if y.requires_grad:  # a first stage may have nothing that is trained
                y.backward(dy)
        if not mesh.first:
            dx = x.grad.contiguous()
            sent.append((dx, mesh.down.send(dx, stage - 1)))
        gradients.done()
        if part.shards:
            part.shards.end()
    for _, wait in sent:
        wait()
    return losses


def received(part: Part, batch: Batch, plan: Plan, dtype: torch.dtype) -> Tensor:
    """What the stage before has made of a micro-batch."""
    B, T = batch.inputs.shape
    T //= part.mesh.tensor.size if plan.sequence else 1
    x = torch.empty(B, T, part.config.dim, dtype=dtype, device=batch.inputs.device)
    return part.mesh.up.receive(x, part.mesh.pipeline.index - 1)


@torch.no_grad()
def evaluate(
    part: Part, batches: Iterable[Batch], plan: Plan, dtype: torch.dtype
) -> tuple[float, int]:
    """As step.evaluate: (Σ −log p in nats, tokens); in turn each copy of the model takes a batch.

    All copies compute as often as the first: a ZeRO that gathers weights needs them all.
    """
    mesh, batches = part.mesh, list(batches)
    nats, sent = torch.zeros(max(1, len(batches)), dtype=torch.float64), []
    with opened(part):
        for first in range(0, len(batches), plan.data):
            number = first + mesh.data.index
            batch = batches[min(number, len(batches) - 1)]
            x = None if mesh.first else received(part, batch, plan, dtype)
            y = part.run(batch, x, dtype)
            if not mesh.last:
                sent.append((y := y.contiguous(), mesh.up.send(y, mesh.pipeline.index + 1)))
            elif mesh.tensor.index == 0 and number < len(batches):
                nats[number] = y.item()
        for _, wait in sent:
            wait()
    nats = mesh.world.sum_(nats.to(mesh.world.device))
    return tree(nats.unbind()).item(), sum(int((b.targets != IGNORE).sum()) for b in batches)


def update(
    part: Part, batches: list[Batch], optimizer: Optimizer, lr: float, config: OptimConfig,
    plan: Plan, dtype: torch.dtype, scale: LossScale | None = None,
) -> Update:  # fmt: skip
    """One step of all ranks together; as step.update, NotFinite before any weight has moved."""
    for p in (*part.parameters(), *holders(part)):
        p.grad = None
    tokens = sum(int((b.targets != IGNORE).sum()) for b in batches)
    factor = scale.scale if scale else 1.0
    loss = accumulate(part, batches, plan, dtype, factor / max(1, tokens)) / max(1, tokens)
    norm = clip(part, config, factor)
    said = f"the loss is {loss} and the norm of its gradient {norm}"
    if part.shards:
        part.shards.before_step()
    moved = move(optimizer, lr, loss, norm, scale, lambda: said)
    if part.shards:
        part.shards.after_step()
    return Update(loss, tokens, norm, moved)


def accumulate(
    part: Part, batches: list[Batch], plan: Plan, dtype: torch.dtype, scale: float
) -> float:
    """Leave `scale` times the gradient of Σ −log p over all batches in each weight; that sum."""
    mesh, micros = part.mesh, micro_batches(batches, plan)
    own = own_share(len(micros), plan, mesh.data.index)
    some = [micros[i] for i in own]
    if plan.zero > 1:  # whoever gathers and scatters must do so as often as the others
        most = max(len(own_share(len(micros), plan, i)) for i in range(plan.data))
        some += [nothing_asked(micros[0])] * (most - len(own))
    params = list(learnt(part).values())
    gradients = Gradients(params, plan.exact)
    buckets = Buckets(part.in_order(), mesh.data, plan.bucket * 10**6)
    with opened(part):
        losses = through_pipeline(part, some, plan, dtype, scale, gradients, buckets)[: len(own)]
    if plan.zero < 2:
        gradients.finish()
        buckets.finish()
        add_tied(part)
    holder = dict(zip(params, holders(part), strict=True))
    for copies, group in part.shared():
        for p in copies:
            if p.requires_grad:
                group.sum_(holder[p].grad)
    each = torch.zeros(len(micros), dtype=torch.float64)
    if mesh.last and mesh.tensor.index == 0:
        each[own.start : own.stop] = torch.tensor(losses, dtype=torch.float64)
    each = mesh.world.sum_(each.to(micros[0].inputs.device))
    return tree(each.unbind()).item()


def nothing_asked(batch: Batch) -> Batch:
    """The same, of which no token counts."""
    return replace(batch, targets=torch.full_like(batch.targets, IGNORE))


def opened(part: Part) -> AbstractContextManager:
    return part.shards.open() if part.shards else nullcontext()


def add_tied(part: Part) -> None:
    """Embedding and head, where they are copies of one weight: each gets the sum of gradients."""
    mesh = part.mesh
    if not part.config.tied or part.heads is part.words:
        return
    if not all(p.requires_grad for p in (*part.words, *part.heads)):
        return
    if mesh.pipeline.size == 1:
        for p, q in zip(part.words, part.heads, strict=True):
            p.grad.add_(q.grad).add_(0.0)
            q.grad.copy_(p.grad)
    else:
        for p in (*part.words, *part.heads):
            mesh.ends.sum_(p.grad)


@torch.no_grad()
def clip(part: Part, config: OptimConfig, scale: float) -> float:
    """As step.clip; each number of the plain model counts once, whoever has copies of it.

    Squares are added in float64, in an order that does not depend on the plan.
    """
    params, group = holders(part), part.mesh.model
    if part.shards and part.shards.stage > 1:  # each number's gradient is on one rank of data
        group = part.mesh.world
    squares = torch.zeros(len(part.numbers), part.cut.parts, dtype=torch.float64)
    for p in params:
        if p.place.here:
            several = p.place.several
            each = p.grad.chunk(several, p.place.dim) if several > 1 else [p.grad]
            for i, g in enumerate(each, p.place.part):
                squares[part.numbers[p.place.name], i] += g.double().square().sum()
    norm = group.sum_(squares.to(part.device)).sum().sqrt().item() / scale
    if params:
        shrink([p.grad for p in params], norm, config.clip, config.clip_by, scale)
    return norm


# --- the script -----------------------------------------------------------------------------------


def trained(
    config: ModelConfig, plan: Plan, mesh: Mesh, batches: list[list[Batch]], optim: OptimConfig,
    dtype: torch.dtype,
) -> tuple[Part, Optimizer, list[Update]]:  # fmt: skip
    """This rank's part of a new model, after an update with each of the batches."""
    part = Part(config, plan, mesh)
    part.initialize(0)
    part.to(dtype)
    optimizer = build(part, optim, dtype, plan)
    made = [update(part, b, optimizer, optim.lr, optim, plan, dtype) for b in batches]
    return part, optimizer, made


def script() -> None:
    arguments = sys.argv[1:] or ["certificate", "--quick"]
    default = Automatic(model=preset_in(arguments, Automatic.model))
    kinds = (
        Annotated[Automatic, tyro.conf.subcommand("plan", default=default)]
        | Annotated[Certificate, tyro.conf.subcommand("certificate", default=Certificate())]
    )
    config = tyro.cli(kinds, args=arguments, description=__doc__)
    automatic(config) if isinstance(config, Automatic) else certify(config, trained)


if __name__ == "__main__":
    main(script)
