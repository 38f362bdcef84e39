"""One problem and its contestants: who takes part, who is right, how fast each is, at what cost."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from attncc.bench import exact
from attncc.bench.contestants import TUNED, Contestant, LeftOut, Maker
from attncc.bench.problem import Problem

CALLS = 30
"""Calls whose launches a GPU's queue holds, so that the host never waits for it."""

PLANS = 7
"""Plans made anew, of which the median counts."""

Times = dict[str, dict[str, list[float]]]
"""Milliseconds of each round, by contestant and direction."""


@dataclass
class Contest:
    """Who computes a problem and is right, what each costs, and why others do not take part."""

    problem: Problem
    contestants: dict[str, Contestant] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """A contestant that fails is out, and nobody else."""
        try:
            yield
        except LeftOut as why:
            self.left_out[name] = str(why)
        except Exception as error:
            self.contestants.pop(name, None)
            self.failed[name] = told(error)


def contest(problem: Problem, makers: Mapping[str, Maker], tiny: Problem | None = None) -> Contest:
    """Each makes itself, compiles, and is held to float64; whoever is wrong is out.

    tiny: the same in little, for the host's time of a call; with it, planning is timed too.
    """
    found = Contest(problem)
    truth = exact.parts(problem, torch.is_grad_enabled())
    for name, make in makers.items():
        with found.guarded(name):
            contestant = make(problem)
            compiled(contestant)
            if wrong := exact.problems(contestant, truth):
                found.wrong[name] = "; ".join(wrong)
                continue
            found.contestants[name] = contestant
            found.costs[name] = memory(contestant, problem.device)
            if tiny is not None:
                found.costs[name] |= planning(contestant, problem.device)
            if tiny is not None and name != TUNED:  # which would tune that too
                found.costs[name] |= host(make(tiny), problem.device)
    return found


def told(error: Exception) -> str:
    """On one line, which may be cut."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compiled(contestant: Contestant) -> None:
    """The first calls, forward and backward."""
    out = contestant.forward()
    if out.requires_grad:
        contestant.backward(out)


# -- costs


def memory(contestant: Contestant, device: torch.device) -> dict[str, float]:
    """Peak of forward and backward beyond inputs and plan; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compiled(contestant)
    synchronize(device)
    return {"peak_MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


def planning(contestant: Contestant, device: torch.device) -> dict[str, float]:
    """What a plan for new captured tensors takes, until the device is done with it."""
    if contestant.plan is None:
        return {}
    calls = contestant.plan, contestant.plan_less or (lambda: None)
    with torch.no_grad():
        seconds = [[_seconds(call, device) for call in calls] for _ in range(PLANS + 1)][1:]
    whole, less = (median(times) for times in zip(*seconds, strict=True))
    return {"plan_ms": max(0.0, 1e3 * (whole - less))}


def host(contestant: Contestant, device: torch.device) -> dict[str, float]:
    """Microseconds that Python and launches take of a call too small to matter otherwise."""
    compiled(contestant)
    found = {"forward_host_us": _queued(contestant.forward, device)}
    out = contestant.forward()
    if out.requires_grad:
        found["backward_host_us"] = _queued(lambda: contestant.backward(out), device)
    return found


def _queued(call: Callable[[], object], device: torch.device) -> float:
    call()
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter() - begun
    synchronize(device)
    return 1e6 * spent / CALLS


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- time


def timed(found: Contest, rounds: int, rep: int) -> Times:
    """Contestants take turns in every round, forward and backward alike."""
    times: Times = {}
    for _ in range(rounds):
        for name, contestant in list(found.contestants.items()):
            with found.guarded(name):
                for direction, call in _calls(contestant).items():
                    ms = milliseconds(call, rep, found.problem.device)
                    times.setdefault(name, {}).setdefault(direction, []).append(ms)
    return {name: of for name, of in times.items() if name in found.contestants}


def _calls(contestant: Contestant) -> dict[str, Callable[[], object]]:
    out = contestant.forward()
    if not out.requires_grad:
        return {"forward": contestant.forward}
    return {"forward": contestant.forward, "backward": partial(contestant.backward, out)}


def milliseconds(call: Callable[[], object], rep: int, device: torch.device) -> float:
    """The median over `rep` milliseconds of calls: a GPU's by its own clock, its L2 flushed."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=rep // 3, rep=rep, return_mode="median"))
    times: list[float] = []
    while sum(times) < rep / 1e3:
        times.append(_seconds(call, device))
    return 1e3 * median(times)


def result(found: Contest, times: Times) -> dict[str, Any]:
    """What is kept of a problem; TFLOP/s count kept pairs, five products a backward."""
    flops = found.problem.flops
    factors = {"forward": 1.0, "backward": 2.5}
    results: dict[str, dict[str, Any]] = {}
    for name, directions in times.items():
        results[name] = dict(found.costs[name])
        for direction, rounds in directions.items():
            ms = median(rounds)
            results[name][direction] = {
                "ms": ms,
                "tflops": factors[direction] * flops / ms / 1e9,
                "rounds_ms": [round(one, 5) for one in rounds],
            }
    return {
        "shape": str(found.problem.lengths),
        "dtype": str(found.problem.dtype).removeprefix("torch."),
        "density": found.problem.density,
        "results": results,
        "left_out": found.left_out,
        "failed": found.failed,
        "wrong": found.wrong,
    }


def freed() -> None:
    """Gives back what a contest held, its compiled graphs too."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
