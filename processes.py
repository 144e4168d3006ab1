"""Many texts, several processes: Python alone does one thing at a time, a machine one on each core.

Idea: what is done to each text alone can be done anywhere. Texts are sent in groups of some
megabytes, so that sending costs little, and results come back in the order of the texts. Only a few
groups are in memory at once: the texts may be an endless stream.

Run: python -m pytest tests/test_tokenizer.py
"""

import ctypes
import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import current_process, get_context
from typing import TypeVar

GROUP = 1 << 22  # characters, about, that go to a process at once
PR_SET_PDEATHSIG = 1  # from linux/prctl.h

Item = TypeVar("Item")
Result = TypeVar("Result")


def groups_of(
    items: Iterable[Item], size: int, weigh: Callable[[Item], int] = len
) -> Iterator[list[Item]]:
    """Neighbours together until they weigh `size`."""
    group, held = [], 0
    for item in items:
        group.append(item)
        held += weigh(item)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group


def in_processes(
    work: Callable[[list[Item]], Result],
    items: Iterable[Item],
    processes: int = 0,
    weigh: Callable[[Item], int] = len,
) -> Iterator[Result]:
    """work(a group of items) of all groups in order, in several processes (0: one for each core).

    Items are texts, or else `weigh` says how many characters one has. A single group is not worth
    a process. Only Linux has more than one: elsewhere a process cannot be copied as it stands, or
    not safely.
    """
    groups = groups_of(items, GROUP, weigh)
    ahead = [*islice(groups, 2)]
    cores = processes or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if cores == 1 or len(ahead) < 2 or current_process().daemon:
        yield from map(work, chain(ahead, groups))
        return
    fork = get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=begin_work, initargs=(work,)) as pool:
        waiting: deque[Future] = deque()
        for group in chain(ahead, groups):
            waiting.append(pool.submit(do_work, group))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def begin_work(work: Callable[[list], Result]) -> None:
    """In a new process: what `do_work` is to do, which need not be sent with each group."""
    global the_work
    the_work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and if it is killed, so is this one
    gc.freeze()  # what was there before is no garbage: it is not looked through, nor then copied


def do_work(group: list) -> Result:
    return the_work(group)
