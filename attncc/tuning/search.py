"""The best schedule of each kernel of a call, found by timing it alone on the call's own inputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import log2

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from attncc import tuned
from attncc.backends.gluon import configs as gluon_configs
from attncc.backends.gluon import launch as gluon_launch
from attncc.backends.triton import configs, launch, schedules
from attncc.backends.triton.configs import Config, smaller
from attncc.errors import ArgumentError, AttnccError, UnsupportedError, suggest
from attncc.settings import Debug, tell
from attncc.tiles import BoundPlan
from attncc.tuning.bench import KERNELS
from attncc.tuning.trials import Failed, Worker, job

FINALISTS = 8
"""How many of the quickest schedules are timed again, with care, and the default with them."""

ROUNDS = 2
"""The finalists take turns, for a GPU's clock drifts."""

COMPILING = 0.6
"""The share of a kernel's time that may go into compiling."""

COLD = 120.0
"""Seconds that a trial may take which has to compile first."""

WARM = 15.0
"""Those of any other; a kernel that takes longer hangs, or is not worth waiting for."""

INTERPRETED = 2
"""Candidates in Triton's interpreter, whose times mean nothing."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The schedule that won for one kernel, beside the default in the same run.

    timed: how many schedules ran. failed: why others did not, compilers' errors, crashes and hangs.
    wrong: what was wrong with the results of those that were quicker than the winner.
    """

    kernel: str
    config: Config
    ms: float
    default: Config
    default_ms: float
    timed: int = 0
    failed: Mapping[Config, str] = field(default_factory=dict)
    wrong: Mapping[Config, str] = field(default_factory=dict)

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
            f"# {choice.kernel}={config} was quicker, but {problem}"
            for choice in self.choices
            for config, problem in choice.wrong.items()
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
    kernels: Sequence[str],
    time_budget: float = 120.0,
) -> Tuned:
    """Times schedules of `kernels` for about `time_budget` seconds and keeps the winners.

    Each trial is made in another process. Compilations that have begun are waited for, so the
    budget may be overrun by one of them. Raises ArgumentError for a kernel there is none of,
    UnsupportedError where nothing, or the default schedule, can be tried.
    """
    _check(kernels, time_budget)
    if 0 in (*q.shape, *k.shape):
        return Tuned(())
    choices: list[Choice] = []
    not_kept = ""
    with Worker(job(bound, q, k, v)) as worker, _progress() as progress:
        worker.start()
        end = time.monotonic() + time_budget
        for at, kernel in enumerate(kernels):
            share = max(end - time.monotonic(), 0.0) / (len(kernels) - at)
            search = _Search(Space(kernel, bound, q, v), worker, share, progress)
            choices.append(search.best())
            not_kept = _keep(search.space, choices[-1]) or not_kept
    return Tuned(tuple(choices), not_kept)


def _check(kernels: Iterable[str], time_budget: float) -> None:
    for kernel in kernels:
        if kernel not in KERNELS:
            hint = suggest(kernel, KERNELS) or f"there is {', '.join(KERNELS)}"
            raise ArgumentError(f"there is no kernel {kernel!r} to tune", hint=hint)
    if not time_budget > 0:
        raise ArgumentError(f"time_budget is {time_budget}", hint="it takes seconds, such as 120")


@dataclass(frozen=True)
class Space:
    """The schedules that one kernel of a call may have."""

    kernel: str
    bound: BoundPlan
    q: Tensor
    v: Tensor

    @property
    def default(self) -> Config:
        plan = self.bound.plan
        if self.kernel in gluon_configs.KERNELS:
            shape = gluon_launch.shape_of(self.kernel, self.q, self.v)
            return gluon_configs.usual(self.kernel, shape, plan, self.bound.binding.kv_len)
        return configs.default(self.kernel, launch.shape_of(self.q, self.v), launch.traits(plan))

    def candidates(self) -> list[Config]:
        """Those nearest to the default first, without it."""
        if self.kernel in gluon_configs.KERNELS:
            shape = gluon_launch.shape_of(self.kernel, self.q, self.v)
            heads = self.bound.binding.batch * self.bound.binding.heads
            found = gluon_configs.candidates(self.kernel, shape, self.bound.plan, heads)
        else:
            found = configs.candidates(self.kernel, launch.shape_of(self.q, self.v))
        usual = self.default
        others = [config for config in found if config != usual]
        return sorted(others, key=lambda config: distance(config, usual))

    def key(self) -> tuned.Key:
        return schedules.key(self.kernel, self.bound.plan, self.bound.binding, self.q, self.v)


def distance(config: Config, other: Config) -> float:
    """How many halvings and doublings apart, stages by ones, any other number of heads one."""
    pairs = (
        (config.block_m, other.block_m),
        (config.block_n, other.block_n),
        (config.num_warps, other.num_warps),
    )
    steps = sum(abs(log2(mine / theirs)) for mine, theirs in pairs)
    return steps + abs(config.num_stages - other.num_stages) + (config.heads != other.heads)


def _keep(space: Space, choice: Choice) -> str:
    """Stores a winner; returns why not, if it cannot."""
    try:
        tuned.store(schedules.record(space.key(), choice.config, choice.ms))
    except (OSError, AttnccError) as error:
        return str(error)
    finally:
        schedules.database.cache_clear()
    return ""


class _Search:
    """One kernel's schedules, compiled, then timed."""

    def __init__(self, space: Space, worker: Worker, seconds: float, progress: Progress) -> None:
        self.space, self.kernel, self.worker = space, space.kernel, worker
        self.begun, self.seconds, self.progress = time.monotonic(), seconds, progress
        self.failed: dict[Config, str] = {}
        self.task = progress.add_task(self.kernel, total=None)

    def best(self) -> Choice:
        """The quickest schedule whose results are right."""
        standard, usual_ms = self._default()
        rough = self._glanced(self._compiled(standard))
        finalists = sorted(rough, key=rough.__getitem__)[:FINALISTS]
        times = self._measured([standard, *finalists])
        times.setdefault(standard, usual_ms)
        self.progress.update(self.task, description=self.kernel)
        wrong: dict[Config, str] = {}
        for config in sorted(times, key=times.__getitem__):
            problem = self._problem(config, standard)
            if not problem:
                found = config, times[config], standard, times[standard], len(rough) + 1
                return Choice(self.kernel, *found, self.failed, wrong)
            wrong[config] = problem
        raise UnsupportedError(
            f"no schedule of {self.kernel} gives the program's numbers: with {standard}, "
            f"{wrong[standard]}",
            hint="that is a defect of attncc, Triton or ptxas; nothing was kept",
        )

    def _default(self) -> tuple[Config, float]:
        """The default schedule, or the next smaller one that the GPU takes, and milliseconds."""
        config = self.space.default
        while True:
            try:
                return config, self.worker.ask("glance", self.kernel, config, seconds=COLD)
            except Failed as error:
                less = smaller(config) if self.kernel in configs.KERNELS else None
                if less is None or not str(error).startswith("OutOfResources"):
                    raise UnsupportedError(
                        f"{self.kernel}={config}, the default, cannot be timed: {error}",
                        hint="ATTNCC_DEBUG=1 shows what the process of its trial prints",
                    ) from None
                config = less

    def _compiled(self, standard: Config) -> dict[Config, float]:
        """How many seconds a trial of each candidate may take; compiled ones first."""
        found = self.space.candidates()
        found = [config for config in found if config != standard]
        if self.space.q.device.type != "cuda":
            return dict.fromkeys(found[:INTERPRETED], COLD)
        self._show("compiling", len(found))
        done: dict[Config, float] = {}
        try:
            seconds = self._left(COMPILING)
            answers = self.worker.answers("compile", self.kernel, found, seconds, grace=COLD)
            for at, problem in answers:
                self.progress.advance(self.task)
                if problem:
                    self._note(found[at], problem)
                else:
                    done[found[at]] = WARM
        except Failed as error:  # one of them broke the compiler: each for itself, then
            tell(Debug.CHOICES, f"{self.kernel}, compiling: {error}")
            tried = {*done, *self.failed}
            return done | {config: COLD for config in found if config not in tried}
        return done

    def _glanced(self, patience: Mapping[Config, float]) -> dict[Config, float]:
        """Milliseconds of a few runs; a schedule that fails is left out."""
        self._show("timing", len(patience))
        rough: dict[Config, float] = {}
        for config, seconds in patience.items():
            if self._left() <= 0:
                break
            ms = self._timed("glance", config, seconds)
            if ms is not None:
                rough[config] = ms
        return rough

    def _measured(self, finalists: Sequence[Config]) -> dict[Config, float]:
        self._show("timing again", ROUNDS * len(finalists))
        times: dict[Config, float] = {}
        for _ in range(ROUNDS):
            for config in finalists:
                ms = None if config in self.failed else self._timed("measure", config, WARM)
                if ms is not None:
                    times[config] = min(ms, times.get(config, ms))
        return {config: ms for config, ms in times.items() if config not in self.failed}

    def _timed(self, how: str, config: Config, seconds: float) -> float | None:
        """Milliseconds of one run; None where the trial failed, which is noted."""
        self.progress.advance(self.task)
        try:
            ms: float = self.worker.ask(how, self.kernel, config, seconds=seconds)
        except Failed as error:
            self._note(config, str(error))
            return None
        return ms

    def _note(self, config: Config, problem: str) -> None:
        self.failed[config] = problem
        tell(Debug.CHOICES, f"{self.kernel}={config}: {problem}")

    def _problem(self, config: Config, standard: Config) -> str:
        """What is wrong with a schedule's results, or with the trial that looks at them."""
        try:
            found: str = self.worker.ask("check", self.kernel, config, standard, seconds=COLD)
        except Failed as error:
            return str(error)
        return found

    def _left(self, share: float = 1.0) -> float:
        return max(self.begun + share * self.seconds - time.monotonic(), 0.0)

    def _show(self, doing: str, total: int) -> None:
        described = f"{self.kernel}: {doing}"
        self.progress.update(self.task, description=described, completed=0, total=total)


def _progress() -> AbstractContextManager[Progress]:
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
