"""Worker threads that each run torch single-threaded, so that no operation waits for all threads.

A parallel torch operation ends with a barrier; with ten of them a block of scores, a machine that
also does something else spends its time there: 1300 ms instead of 190 ms for causal attention
(8 heads, 2048 tokens) on 2 busy cores, and no difference on idle ones. What the main thread does
besides should stay small as well: torch's own threads spin for a while after each operation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier

import torch

SMALL = 1 << 17
"""Pairs, or elements, that are through before other threads have woken up."""

Task = Callable[[], None]


def threads() -> int:
    """How many tasks run at once: torch's own setting."""
    return torch.get_num_threads()


def run(tasks: Sequence[Task]) -> None:
    """Runs all tasks, in order where there is one thread; a task's exception is raised here."""
    if len(tasks) == 1 or threads() == 1:
        for task in tasks:
            task()
        return
    inference = torch.is_inference_mode_enabled()
    pool = _pool(os.getpid(), threads())
    futures = [pool.submit(_plainly, task, inference) for task in tasks]
    wait(futures)
    for future in futures:
        future.result()


def _plainly(task: Task, inference: bool) -> None:
    """Gradient and inference modes belong to a thread."""
    with torch.inference_mode(inference), torch.no_grad():
        task()


@cache
def _pool(pid: int, count: int) -> ThreadPoolExecutor:
    """One pool a process, since threads do not survive a fork, and a thread count."""
    barrier = Barrier(count)

    def start(_: int) -> None:
        torch.get_num_threads()  # the first call in a thread sets it to the process' number
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="attncc")
    list(pool.map(start, range(count)))
    torch.set_num_threads(count)  # for threads to come, which a worker's call has changed too
    return pool
