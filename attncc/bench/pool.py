"""Tasks over worker processes that may hang or die: every task has a deadline and a result."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its value, or the error that took its place."""

    task: int
    value: Any = None
    error: str = ""
    seconds: float = 0.0


def workers_here() -> int:
    """Two cores are left to the driver and to the process that waits."""
    return max(1, (os.cpu_count() or 1) - 2)


def outcomes(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    seconds: float,
    fresh: bool = False,
) -> Iterator[Outcome]:
    """function(task) for every task, in the order in which they end.

    A worker that outlasts `seconds` on a task, dies, or breaks its GPU context is replaced; with
    `fresh`, every worker is after its task.
    """
    waiting = list(range(len(tasks)))[::-1]
    running: dict[Connection, _Worker] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                worker = _Worker(function)
                running[worker.pipe] = worker
                worker.start(waiting.pop(), tasks)
            for pipe in wait(list(running), timeout=1.0):
                worker = running[pipe]  # type: ignore[index]
                outcome, alive = worker.finish()
                yield outcome
                if alive and waiting and not fresh:
                    worker.start(waiting.pop(), tasks)
                else:
                    running.pop(worker.pipe).stop()
            for worker in [w for w in running.values() if w.seconds > seconds]:
                yield Outcome(worker.task, error=f"no end after {seconds:.0f} s")
                running.pop(worker.pipe).stop()
    finally:
        for worker in running.values():
            worker.stop()


class _Worker:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task = -1
        self.begun = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def start(self, task: int, tasks: Sequence[Any]) -> None:
        self.task, self.begun = task, time.monotonic()
        self.pipe.send(tasks[task])

    def finish(self) -> tuple[Outcome, bool]:
        """The task's outcome, and whether the worker can take another."""
        try:
            value, error, alive = self.pipe.recv()
        except EOFError:
            self.process.join(5)
            value, error, alive = None, f"the process died, exit {self.process.exitcode}", False
        return Outcome(self.task, value, error, self.seconds), alive

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(5)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    alive = True
    while alive:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            value, error = function(task), ""
        except Exception as caught:
            value, error = None, _told(caught)
            alive = _gpu_answers()
        pipe.send((value, error, alive))


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return f"{type(error).__name__} at {place}: {str(error).strip()[:600]}"


def _gpu_answers() -> bool:
    """False after an illegal access, which no later call of the process survives."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
