"""Processes that work together, started once: a test gives them a function and gets what each says.

They are joined by gloo, with one thread each, and stay for as many plans as one likes: to start
eight of them takes longer than to train under twenty plans.
"""

import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`run(f, …)` calls f(…) on every rank; it must be a function of a module."""

    def __init__(self, size: int):
        context, store = mp.get_context("spawn"), tempfile.mktemp()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: object, timeout: float = 300) -> list:
        """What each rank returns; AssertionError with its traceback if one fails."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found: dict[int, object] = {}
        while len(found) < len(self.pipes):  # whoever fails leaves others waiting for it
            ready = wait([p for r, p in enumerate(self.pipes) if r not in found], timeout)
            assert ready, f"no answer from ranks {set(range(len(self.pipes))) - set(found)}"
            for pipe in ready:
                good, found[self.pipes.index(pipe)] = pipe.recv()
                assert good, f"rank {self.pipes.index(pipe)}:\n{found[self.pipes.index(pipe)]}"
        return [found[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()
