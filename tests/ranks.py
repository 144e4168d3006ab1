"""Processes that work together, started once: a test gives them a function and gets what each says.

They are joined by gloo, with one thread each, and stay for as many plans as one likes: to start
eight of them takes longer than to train under twenty plans.
"""

import pickle
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
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))  # as bytes: shared memory would want open files
    dist.destroy_process_group()


class Ranks:
    """`run(f, …)` calls f(…) on every rank; it must be a function of a module."""

    def __init__(self, size: int):
        self.size, self.pipes, self.processes = size, [], []

    def start(self) -> None:
        size = self.size
        context, store = mp.get_context("spawn"), tempfile.mktemp()
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: object, timeout: float = 60) -> list:
        """What each rank returns; AssertionError with its traceback if one fails."""
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
            assert ready, f"no answer from ranks {set(range(len(self.pipes))) - set(found)}"
            for pipe in ready:
                good, found[self.pipes.index(pipe)] = pickle.loads(pipe.recv_bytes())
                assert good, f"rank {self.pipes.index(pipe)}:\n{found[self.pipes.index(pipe)]}"
        return [found[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []
