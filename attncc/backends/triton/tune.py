"""The best schedule of each kernel of a call, found by timing it alone on the call's own inputs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from attncc import tuned
from attncc.backends.triton import schedules
from attncc.backends.triton.configs import KERNELS, Config, candidates, default, smaller
from attncc.backends.triton.recording import Bench, Launch
from attncc.errors import ArgumentError, AttnccError, UnsupportedError, suggest
from attncc.tiles import BoundPlan

FINALISTS = 8
"""How many of the quickest schedules are timed again, with care, and the default with them."""

ROUNDS = 2
"""The finalists take turns, for a GPU's clock drifts."""

REP_MS = 40
"""Milliseconds of one careful measurement."""

COMPILING = 0.7
"""The share of a kernel's time that may go into compiling."""

INTERPRETED = 2
"""Candidates in Triton's interpreter, whose times mean nothing."""

AGREE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Relative difference by norms, from the default schedule's results, that a right one may have."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The schedule that won for one kernel, beside the default in the same run.

    timed, failed: how many schedules ran, and how many could not be compiled or started.
    wrong: those quicker than the winner whose results were not the default's.
    """

    kernel: str
    config: Config
    ms: float
    default: Config
    default_ms: float
    timed: int = 0
    failed: int = 0
    wrong: tuple[Config, ...] = ()

    def __str__(self) -> str:
        """A line to paste; `Config.parse` reads what follows the equals sign."""
        times = f"{self.ms * 1e3:.1f} us (default {self.default_ms * 1e3:.1f} us)"
        return f"{self.kernel}={self.config}  {times}"


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `attn.tune` found; printed, one line a kernel."""

    choices: tuple[Choice, ...]
    not_kept: str = ""
    """Why later processes will not know."""

    def __str__(self) -> str:
        lines = [str(choice) for choice in self.choices]
        lines += [
            f"# {choice.kernel}={config} was quicker, but its results were not the default's"
            for choice in self.choices
            for config in choice.wrong
        ]
        lines += [f"# not kept for later: {self.not_kept}"] if self.not_kept else []
        return "\n".join(lines) or "nothing to tune: no queries or no keys"

    @property
    def configs(self) -> dict[str, Config]:
        """The winners by kernel, as `launch.Run` takes them."""
        return {choice.kernel: choice.config for choice in self.choices}


def tune(
    bound: BoundPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernels: Sequence[str] = KERNELS,
    time_budget: float = 120.0,
) -> Tuned:
    """Times schedules of `kernels` for about `time_budget` seconds and keeps the winners.

    Compilations that have begun are waited for, so the budget may be overrun by one of them.
    Raises ArgumentError for a kernel there is none of.
    """
    _check(kernels, time_budget)
    end = time.monotonic() + time_budget
    choices: list[Choice] = []
    not_kept = ""
    on_gpu = q.device.type == "cuda"
    with torch.no_grad(), torch.cuda.device(q.device) if on_gpu else nullcontext():
        bench = Bench(bound, q, k, v)
        with _progress() as progress:
            for at, kernel in enumerate(kernels):
                share = max(end - time.monotonic(), 0.0) / (len(kernels) - at)
                found = _Search(bench, kernel, share, progress).best()
                if found is not None:
                    choices.append(found)
                    not_kept = _keep(bench, found) or not_kept  # now, for a later one may crash
    return Tuned(tuple(choices), not_kept)


def _check(kernels: Iterable[str], time_budget: float) -> None:
    for kernel in kernels:
        if kernel not in KERNELS:
            hint = suggest(kernel, KERNELS) or f"there is {', '.join(KERNELS)}"
            raise ArgumentError(f"there is no kernel {kernel!r} to tune", hint=hint)
    if not time_budget > 0:
        raise ArgumentError(f"time_budget is {time_budget}", hint="it takes seconds, such as 120")


def _keep(bench: Bench, choice: Choice) -> str:
    """Stores a winner; returns why not, if it cannot."""
    plan, binding = bench.bound.plan, bench.bound.binding
    key = schedules.key(choice.kernel, plan, binding, bench.q, bench.v)
    try:
        tuned.store(schedules.record(key, choice.config, choice.ms))
    except (OSError, AttnccError) as error:
        return str(error)
    finally:
        schedules.database.cache_clear()
    return ""


class _Search:
    """One kernel's schedules, compiled, then timed."""

    def __init__(self, bench: Bench, kernel: str, seconds: float, progress: Progress) -> None:
        self.bench, self.kernel, self.progress = bench, kernel, progress
        self.begun, self.seconds = time.monotonic(), seconds
        self.failed = 0
        self.task = progress.add_task(kernel, total=None)

    def best(self) -> Choice | None:
        """The quickest schedule whose results are those of the default; None without work."""
        standard, usual = self._default()
        if usual is None:
            return None
        launches = self._compiled(standard)
        rough = self._glanced(launches)
        finalists = sorted(rough, key=rough.__getitem__)[:FINALISTS]
        launches[standard] = usual
        times = self._measured({c: launches[c] for c in dict.fromkeys((standard, *finalists))})
        self.progress.update(self.task, description=self.kernel)
        expected = usual.computed()
        wrong: list[Config] = []
        for config in sorted(times, key=times.__getitem__):
            if config == standard or right(launches[config], expected, self.bench.q.dtype):
                ms, usual_ms = times[config], times[standard]
                ran = len(rough) + 1
                found = config, ms, standard, usual_ms, ran, self.failed, tuple(wrong)
                return Choice(self.kernel, *found)
            wrong.append(config)
        raise AssertionError("the default is among those timed")

    def _default(self) -> tuple[Config, Launch | None]:
        """The default schedule, or the next smaller one that the GPU takes."""
        from triton.runtime.errors import OutOfResources

        config: Config | None = default(self.kernel, self.bench.shape, self.bench.traits)
        while config is not None:
            launch = self.bench.launch(self.kernel, config)
            try:
                if launch is not None:
                    launch.start()
                return config, launch
            except OutOfResources:
                config = smaller(config)
        raise UnsupportedError(f"no schedule of {self.kernel} fits this GPU")

    def _compiled(self, standard: Config) -> dict[Config, Launch]:
        """The candidates that compile in time, those nearest to the default first."""
        found = [c for c in candidates(self.kernel, self.bench.shape) if c != standard]
        found.sort(key=lambda config: distance(config, standard))
        if self.bench.q.device.type != "cuda":
            return self._recorded(found[:INTERPRETED])
        launches = self._recorded(found)
        self._show("compiling", len(launches))
        done: dict[Config, Launch] = {}
        for config, compiled in _finished(launches, self._left(COMPILING), self.bench.q.device):
            self.progress.advance(self.task)
            if self._survives(compiled.result):
                done[config] = launches[config]
        return done

    def _recorded(self, configs: Iterable[Config]) -> dict[Config, Launch]:
        launches: dict[Config, Launch] = {}
        for config in configs:

            def record(config: Config = config) -> None:
                launch = self.bench.launch(self.kernel, config)
                if launch is not None:
                    launches[config] = launch

            self._survives(record)
        return launches

    def _glanced(self, launches: dict[Config, Launch]) -> dict[Config, float]:
        """Milliseconds of the mean of three runs; a schedule that does not start is left out."""
        self._show("timing", len(launches))
        rough: dict[Config, float] = {}
        for config, launch in launches.items():
            if self._left() <= 0 and rough:
                break
            if self._survives(launch.start):
                rough[config] = milliseconds(launch, self.bench.q.device)
            self.progress.advance(self.task)
        return rough

    def _measured(self, launches: dict[Config, Launch]) -> dict[Config, float]:
        self._show("timing again", ROUNDS * len(launches))
        times = dict.fromkeys(launches, float("inf"))
        for _ in range(ROUNDS):
            for config, launch in launches.items():
                times[config] = min(times[config], median(launch, self.bench.q.device))
                self.progress.advance(self.task)
        return times

    def _survives(self, attempt: Callable[[], object]) -> bool:
        """Whether one schedule can be compiled and started; errors of any other kind go on."""
        try:
            attempt()
        except Exception:  # a compiler's own errors are of many classes
            self.failed += 1
            if self.bench.q.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the GPU's context is lost
            return False
        return True

    def _left(self, share: float = 1.0) -> float:
        return max(self.begun + share * self.seconds - time.monotonic(), 0.0)

    def _show(self, doing: str, total: int) -> None:
        described = f"{self.kernel}: {doing}"
        self.progress.update(self.task, description=described, completed=0, total=total)


def distance(config: Config, other: Config) -> float:
    """How many halvings and doublings apart, stages by ones."""
    pairs = (
        (config.block_m, other.block_m),
        (config.block_n, other.block_n),
        (config.num_warps, other.num_warps),
    )
    steps = sum(abs(log2(mine / theirs)) for mine, theirs in pairs)
    return steps + abs(config.num_stages - other.num_stages)


def right(launch: Launch, expected: dict[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether results are the default schedule's, up to rounding; NaN and inf in equal places."""
    found = launch.computed()
    return all(_close(found[name], expected[name], AGREE[dtype]) for name in expected)


def _close(found: Tensor, expected: Tensor, allowed: float) -> bool:
    same = (found == expected) | (found.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, found.float() - expected.float())
    size = torch.where(expected.isfinite(), expected.float(), 0.0)
    return bool(gap.norm() <= allowed * size.norm())


def milliseconds(launch: Launch, device: torch.device, runs: int = 3) -> float:
    """Those of one run, by the mean of a few: a glance."""
    if device.type != "cuda":
        return _clocked(launch)
    event: Any = torch.cuda.Event
    events = [event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(runs):
        launch.start()
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / runs


def median(launch: Launch, device: torch.device, rep: int = REP_MS) -> float:
    """Milliseconds of the median of the runs that take `rep` milliseconds."""
    from triton.testing import do_bench

    if device.type != "cuda":
        return _clocked(launch)
    return float(do_bench(launch.start, warmup=rep // 4, rep=rep, return_mode="median"))


def _clocked(launch: Launch) -> float:
    begun = time.perf_counter()
    launch.start()
    return 1e3 * (time.perf_counter() - begun)


def _finished(
    launches: Mapping[Config, Launch], seconds: float, device: torch.device
) -> Iterator[tuple[Config, Future[None]]]:
    """Compilations in the order in which they end; none is begun after `seconds`."""
    pool = ThreadPoolExecutor(_workers(), initializer=_on(device))
    futures = {pool.submit(launch.compile): config for config, launch in launches.items()}
    given: set[Future[None]] = set()
    try:
        for future in as_completed(futures, timeout=seconds):
            given.add(future)
            yield futures[future], future
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # nothing compiles while others are timed
    yield from ((futures[f], f) for f in futures if f not in given and not f.cancelled())


def _workers() -> int:
    """Two cores are left to the rest; the interpreter's lock is free while LLVM and ptxas run."""
    return max(1, (os.cpu_count() or 1) - 2)


def _on(device: torch.device) -> Callable[[], None]:
    """For each thread: the current device is the thread's own."""
    return lambda: torch.cuda.set_device(device) if device.type == "cuda" else None


def _progress() -> AbstractContextManager[Progress]:
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
