"""Processes that work together, started once: they are given functions and say what each returns.

Idea: to try many plans, keep the processes and change the plan. They are joined by gloo, with one
thread each, and fork from a server that has already imported what they need: eight of them are
there in three seconds on two cores, where eight that import for themselves take over twenty.

Run: python -m pytest tests/test_parallel.py
"""

import gc
import multiprocessing as mp
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
from torch import Tensor

PRELOADED = ["torch._dynamo", "parallel"]  # an optimizer imports the first at its first step


def by_value(x: Tensor) -> tuple[Callable, tuple]:
    """How a pipe sends a tensor: shared memory would want a file each, or a server in time."""
    raw = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return rebuilt, (raw, x.dtype, x.shape)


def rebuilt(raw: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


for kind in (Tensor, torch.nn.Parameter):
    ForkingPickler.register(kind, by_value)


def serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """Answer one call after the other, for as long as the process lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through again
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        forget()
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)


def forget() -> None:
    """Give up all groups of earlier calls, which every rank has left.

    gloo has two threads for each, one of which wakes a hundred times a second: hundreds of groups
    on eight ranks leave no processor time for anything else.
    """
    for group in [*dist.distributed_c10d._world.pg_map]:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # threads end with the last name of their group, and models refer to themselves


class Ranks:
    """`run(f, …)` calls f(…) on every rank; it must be a function of a module."""

    def __init__(self, size: int):
        self.size, self.pipes, self.processes = size, [], []

    def start(self) -> None:
        context, store = mp.get_context("forkserver"), tempfile.mktemp()
        context.set_forkserver_preload(PRELOADED)
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            arguments = rank, self.size, store, theirs
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: object, timeout: float = 180) -> list:
        """What each rank returns; RuntimeError with its traceback if one fails."""
        if not self.pipes:
            self.start()
        try:
            return self.answers(function, arguments, timeout)
        except BaseException:  # whoever waits for the one that failed waits for ever
            self.close()
            raise

    def answers(self, function: Callable, arguments: tuple, timeout: float) -> list:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found: dict[int, object] = {}
        while len(found) < len(self.pipes):  # whoever fails leaves others waiting for it
            ready = wait([p for r, p in enumerate(self.pipes) if r not in found], timeout)
            if not ready:
                late = sorted(set(range(self.size)) - set(found))
                raise RuntimeError(f"no answer from ranks {late} in {timeout} seconds")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                good, found[rank] = pipe.recv()
                if not good:
                    raise RuntimeError(f"rank {rank}:\n{found[rank]}")
        return [found[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []
