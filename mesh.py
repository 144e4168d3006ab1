"""Many processes as one array, and what they say to each other, counted.

Idea: N ranks stand in a box with three sides, data × pipeline × tensor, tensor fastest, so that
those who talk most sit on one machine. A rank's neighbours along a side are a group. All that is
ever sent goes through a `Group`, which counts the bytes; a group of one sends nothing.

    sum_       all-reduce          every member ends with the sum
    scatter    reduce-scatter      every member ends with its part of the sum
    gather     all-gather          every member ends with all parts
    send, receive                  from member to member

Sums of floating-point numbers depend on their order. An exact mesh adds in the order of a binary
tree over all members, whatever their number is: then one process that adds the same numbers in the
same tree gets the same bits.

Run: python -m pytest tests/test_parallel.py

Papers: Shoeybi et al. 2019 (arXiv 1909.08053); Narayanan et al. 2021 (arXiv 2104.04473); Thakur et
al. 2005 on the costs of collectives.
"""

import os
import platform
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from run import UserError

# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Who holds what: data × pipeline × tensor processes."""

    data: int = 1  # copies of the model, each with its share of the batch
    pipeline: int = 1  # stages into which the blocks are divided
    tensor: int = 1  # processes among which each layer is divided
    zero: int = 0  # 1 divides the optimizer's state among copies, 2 gradients too, 3 also weights
    rows: int = 0  # of a micro-batch; 0: a batch, divided by data and pipeline
    layers: tuple[int, ...] = ()  # blocks of each stage; empty: as many each as can be
    schedule: Literal["1f1b", "gpipe"] = "1f1b"  # of the pipeline
    bucket: float = 25  # MB of gradients that are sent during the backward pass; 0: all behind it
    sequence: bool = False  # what lies between divided layers is divided by tokens
    exact: bool = False  # the same bits under every plan
    file: str = ""  # take what `python parallel.py plan` has written there
    timeout: int = 1800  # seconds that processes wait for one another before they give up

    def __post_init__(self):
        for name in ("data", "pipeline", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"--plan.{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.zero <= 3:
            raise UserError(f"--plan.zero {self.zero} must be 0, 1, 2 or 3")
        if self.rows < 0:
            raise UserError(f"--plan.rows {self.rows} must be at least 1, or 0 for those that fit")
        if not 0 <= self.bucket < inf:
            raise UserError(f"--plan.bucket {self.bucket} must be at least 0 MB")
        if not 1 <= self.timeout <= 10**6:
            raise UserError(f"--plan.timeout {self.timeout} must be from 1 second to a million")
        if self.zero > 1 and self.pipeline > 1:
            raise UserError(
                f"--plan.zero {self.zero} moves gradients or weights with each micro-batch: with "
                f"--plan.pipeline {self.pipeline} choose 0 or 1"
            )
        if min(self.layers, default=0) < 0:
            raise UserError(f"--plan.layers: a stage cannot have {min(self.layers)} blocks")
        if self.layers and len(self.layers) != self.pipeline:
            raise UserError(
                f"--plan.layers must name the blocks of each of {self.pipeline} stages, not "
                f"{len(self.layers)}"
            )
        if self.sequence and self.exact:
            raise UserError("--plan.sequence adds in another order: it is not part of --plan.exact")
        if self.exact and self.zero > 1:
            raise UserError(f"--plan.zero {self.zero} is not part of --plan.exact: choose 0 or 1")
        if self.exact and (self.data & self.data - 1 or self.tensor & self.tensor - 1):
            raise UserError("--plan.exact adds by halves: data and tensor must be powers of 2")

    @property
    def size(self) -> int:
        return self.data * self.pipeline * self.tensor

    def layers_of(self, count: int) -> list[int]:
        """The blocks of each stage, of so many in all."""
        if self.layers:
            return list(self.layers)
        cuts = [count * s // self.pipeline for s in range(self.pipeline + 1)]
        return [hi - lo for lo, hi in pairwise(cuts)]


# --- groups ---------------------------------------------------------------------------------------


def tree(parts: Sequence[Tensor], add: Callable = torch.add) -> Tensor:
    """The sum by halves: ((0 + 1) + (2 + 3)) + …, a power of two at a time from the left."""
    if len(parts) == 1:
        return parts[0]
    half = 1 << (len(parts) - 1).bit_length() - 1
    return add(tree(parts[:half], add), tree(parts[half:], add))


patience: timedelta | None = None  # that a member of a group waits for the others


class Group:
    """Ranks that compute together. Every process makes every group, in the same order."""

    def __init__(self, ranks: Sequence[int], name: str, traffic: Counter, exact: bool = False):
        self.ranks, self.size, self.name = list(ranks), len(ranks), name
        self.traffic, self.exact = traffic, exact
        self.handle = dist.new_group(self.ranks, patience) if self.size > 1 else None
        me = rank()
        self.index = self.ranks.index(me) if me in self.ranks else -1
        nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        self.device = torch.device("cuda" if nccl else "cpu")  # of what it can send

    def count(self, kind: str, size: float) -> None:
        self.traffic[self.name, kind] += size

    def sum_(self, x: Tensor) -> Tensor:
        """x, in place, summed over all members; each sends 2(N−1)/N of its bytes."""
        if self.exact and x.is_floating_point():
            return x.copy_(tree(self.gather(x[None]).unbind())).add_(0.0)  # −0 becomes 0
        if self.size > 1:
            self.count("sum", 2 * x.nbytes * (self.size - 1) / self.size)
            dist.all_reduce(x, group=self.handle)
        return x

    def start_sum(self, x: Tensor) -> Callable[[], object]:
        """As `sum_`, but begun only; the result is there when what is returned was called."""
        if self.size == 1 or self.exact:
            self.sum_(x)
            return lambda: None
        self.count("sum", 2 * x.nbytes * (self.size - 1) / self.size)
        return dist.all_reduce(x, group=self.handle, async_op=True).wait

    def max_(self, x: Tensor) -> Tensor:
        if self.size > 1:
            self.count("max", 2 * x.nbytes * (self.size - 1) / self.size)
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.handle)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All members' x of one shape, one behind the other; each sends (N−1) times its own."""
        if self.size == 1:
            return x
        self.count("gather", x.nbytes * (self.size - 1))
        whole = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        dist.all_gather(list(whole.chunk(self.size)), x.contiguous(), group=self.handle)
        return whole

    def scatter(self, x: Tensor) -> Tensor:
        """Of the sum of all x this member's part of the rows; each sends (N−1)/N of x."""
        if self.size == 1:
            return x
        self.count("scatter", x.nbytes * (self.size - 1) / self.size)
        part = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        dist.reduce_scatter(part, list(x.contiguous().chunk(self.size)), group=self.handle)
        return part

    def tell(self, text: str, source: int = 0) -> str:
        """What member `source` says, to all."""
        if self.size == 1:
            return text
        letters = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([len(letters)], device=self.device)
        dist.broadcast(length, self.ranks[source], group=self.handle)
        if self.index != source:
            letters = letters.new_empty(int(length))
        dist.broadcast(letters, self.ranks[source], group=self.handle)
        return bytes(letters.tolist()).decode()

    def send(self, x: Tensor, to: int) -> Callable[[], object]:
        """Begin to send to member `to`; call what is returned before x may change."""
        self.count("send", x.nbytes)
        return dist.isend(x, self.ranks[to], group=self.handle).wait

    def receive(self, like: Tensor, source: int) -> Tensor:
        dist.recv(like, self.ranks[source], group=self.handle)
        return like


class Mesh:
    """Where this process stands among data × pipeline × tensor ranks, and its groups.

    tensor, pipeline, data   those that differ from it in this coordinate alone
    up, down                 the pipeline again, twice: activations and gradients each have their
                             own channel, so that neither ever waits for the other
    model                    all that hold a part of the same model
    ends                     the first and the last of the pipeline
    world                    all
    """

    def __init__(self, data: int = 1, pipeline: int = 1, tensor: int = 1, exact: bool = False):
        self.shape = data, pipeline, tensor
        self.traffic: Counter = Counter()
        grid = torch.arange(data * pipeline * tensor).view(self.shape)
        me = dist.get_rank() if dist.is_initialized() else 0
        self.inside = me < grid.numel()  # others only help to make the groups
        self.at = tuple(int(i) for i in (grid == me).nonzero()[0]) if self.inside else (0, 0, 0)

        self.groups: list[Group] = []

        def groups(name: str, lines: Tensor, tree: bool = exact) -> Group:
            made = [Group(line, name, self.traffic, tree) for line in lines.tolist()]
            self.groups += made
            return next((g for g in made if g.index >= 0), made[0])

        pipelines = grid.transpose(1, 2).flatten(0, 1)
        self.tensor = groups("tensor", grid.flatten(0, 1))
        self.pipeline = groups("pipeline", pipelines)
        self.up = groups("up", pipelines)
        self.down = groups("down", pipelines)
        self.data = groups("data", grid.movedim(0, 2).flatten(0, 1))
        self.model = groups("model", grid.flatten(1), False)
        lines = pipelines[:, [0, -1]] if pipeline > 1 else pipelines
        self.ends = groups("ends", lines)
        self.world = groups("world", grid.flatten()[None], False)

    def close(self) -> None:
        """Give up the groups: each costs a process threads and connections."""
        for group in self.groups:
            if group.handle is not None and group.index >= 0:
                dist.destroy_process_group(group.handle)

    @property
    def first(self) -> bool:
        """Does this process hold the embedding?"""
        return self.pipeline.index == 0

    @property
    def last(self) -> bool:
        return self.pipeline.index == self.pipeline.size - 1


def join(timeout: float = 1800) -> Group:
    """Meet the other processes that torchrun started, if it did; all of them."""
    if "RANK" in os.environ and not dist.is_initialized():
        start(timeout)
    size = dist.get_world_size() if dist.is_initialized() else 1
    return Group(range(size), "world", Counter())


def start(timeout: float) -> None:
    """Join by NCCL where there are GPUs, else by gloo.

    torchrun's own store outlives a restart, with the addresses of the dead in it: each start has
    names of its own there. On several machines, whose counts of restarts may differ, a new store
    for each start does the same: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun.
    """
    on = torch.cuda.is_available()
    if on:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    global patience  # new groups don't take it from the first one
    where, patience = {}, timedelta(seconds=timeout)
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if kept and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=patience)
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        where = {"store": dist.PrefixStore(f"start {count}", store)} | {
            "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])
        }  # fmt: skip
    dist.init_process_group("nccl" if on else "gloo", timeout=patience, **where)
    common_store().set(f"process {rank()}", f"{platform.node()} {os.getpid()}")


def common_store() -> dist.Store:
    """Where all processes can leave words for each other."""
    return dist.distributed_c10d._get_default_store()


def lost(error: BaseException) -> bool:
    """Does the error say that another process has died or does not answer?"""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def end_the_stopped() -> None:
    """Kill processes of this machine that were stopped: torchrun's SIGTERM does not reach them."""
    with suppress(OSError, RuntimeError, dist.DistError):
        for number in range(dist.get_world_size()):
            where, pid = common_store().get(f"process {number}").decode().split()
            if where == platform.node():
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if state == "T":
                    os.kill(int(pid), signal.SIGKILL)


def first_to_say(text: str) -> bool:
    """Whether no process of this start has said it before; so what all find out is printed once."""
    if not dist.is_initialized():
        return True
    try:
        return common_store().add(f"said {text}", 1) == 1
    except (RuntimeError, dist.DistError):  # the first rank is gone, and has said it
        return rank() == 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
