"""Data parallelism: every rank has the model and a share of the batch, and gradients are summed.

Idea: a gradient is a sum over tokens, so each rank adds up those of its own tokens, and then all
add up each other's. That traffic hides behind work that is still to be done: a bucket of gradients
begins to travel as soon as the backward pass has filled it, from the last layers to the first.

Only the backward pass of the last micro-batch fills buckets; those before it send nothing. Buckets
of no size are the obvious version: behind the backward pass, each gradient is summed by itself.

Run: python -m pytest tests/test_parallel.py

Papers: Li et al. 2020, PyTorch Distributed (arXiv 2006.15704, section 3.2).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from mesh import Group


def in_buckets(params: list[Parameter], most: float) -> list[list[Parameter]]:
    """Neighbours of about `most` bytes together, the last first: backward comes to them so."""
    found, size = [], 0
    for p in reversed(params):
        if not found or size + p.nbytes > most:
            found.append([])
            size = 0
        found[-1].append(p)
        size += p.nbytes
    return found


class Bucket:
    """Some gradients that travel together."""

    def __init__(self, params: list[Parameter]):
        self.params, self.ready = params, 0

    def fill(self, group: Group) -> Callable[[], None]:
        """Begin the sum of these gradients over the group; what is returned takes it up."""
        grads = [p.grad for p in self.params]
        flat = torch.cat([g.flatten() for g in grads])
        wait = group.start_sum(flat)

        def take() -> None:
            wait()
            for g, some in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(some.view_as(g))

        return take


class Buckets:
    """Gradients of one update on their way.

    A bucket leaves when it and all before it are full, so that on every rank the same travels at
    the same time, even where some weight gets no gradient: `finish` sends what is left.
    """

    def __init__(self, params: list[Parameter], group: Group, size: float):
        """`size` in bytes; 0 sends each gradient by itself, and none before `finish`."""
        self.group, self.params, self.waiting = group, params, []
        self.early = group.size > 1 and size > 0
        self.buckets = [Bucket(some) for some in in_buckets(params, size)]
        self.of = {p: bucket for bucket in self.buckets for p in bucket.params}
        self.hooks = []

    def open(self) -> None:
        """The backward pass that comes now is the last one."""
        if self.early:
            self.hooks = [p.register_post_accumulate_grad_hook(self.ready) for p in self.params]

    def ready(self, p: Tensor) -> None:
        self.of[p].ready += 1
        self.send()

    def send(self) -> None:
        """Those that are full, in order."""
        while len(self.waiting) < len(self.buckets):
            bucket = self.buckets[len(self.waiting)]
            if bucket.ready < len(bucket.params):
                return
            self.waiting.append(bucket.fill(self.group))

    def finish(self) -> None:
        """Send the rest, and wait for all."""
        for hook in self.hooks:
            hook.remove()
        if self.group.size == 1:
            return
        for bucket in self.buckets:
            bucket.ready = len(bucket.params)
        self.send()
        for take in self.waiting:
            take()
