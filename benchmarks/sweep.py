"""Every schedule of every kernel, compiled in parallel and timed alone: python -m benchmarks.sweep.

The defaults in attncc/backends/triton/configs.py come from this.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attncc.backends.triton.configs import KERNELS, Config, candidates, padded
from attncc.backends.triton.configs import Shape as Limits
from attncc.bench import rows
from attncc.bench.machine import describe
from attncc.bench.pool import outcomes, workers_here
from attncc.inputs import Lengths
from attncc.tuning.trials import AGREE, close, median, milliseconds

PATTERNS = {
    "full": rows.FULL,
    "causal": rows.CAUSAL_ROW,
    "softcap": rows.SOFTCAP,
    "alibi": rows.ALIBI,
    "bias": rows.RELATIVE,
    "window": rows.WINDOW,
    "sinks": rows.SINKS,
    "documents": rows.DOCUMENTS,
    "prefix": rows.PREFIX,
    "dilated": rows.DILATED,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

GPU = torch.device("cuda")

SECOND = 12
"""How many of the quickest schedules are timed again, with care."""


@dataclass(frozen=True)
class Place:
    """What one ranking of schedules is for."""

    pattern: str
    dim: int
    dtype: str

    @property
    def shape(self) -> Lengths:
        """About the same work for every head dim."""
        length = 8192 if self.dtype != "fp32" else 4096
        return rows.square(max(1, 256 // padded(self.dim)), 16, 16, length, self.dim)


@dataclass(frozen=True)
class Job:
    place: Place
    kernel: str
    config: Config


@dataclass(frozen=True)
class Timing:
    job: Job
    ms: float
    tflops: float
    right: bool

    def __str__(self) -> str:
        return f"{self.job.config} {self.tflops:.0f}{'' if self.right else ' WRONG'}"


def main() -> None:
    asked = _options()
    begun = time.monotonic()
    best: dict[tuple[int, str, str], list[Config]] = {}
    kept: list[Timing] = []
    for pattern in asked.patterns:
        places = [Place(pattern, dim, dtype) for dtype in asked.dtypes for dim in asked.dims]
        jobs = [job for place in places for job in _jobs(place, asked.kernels, best)]
        compiled = list(_compiled(jobs, asked.workers))
        took = time.monotonic() - begun
        print(f"{pattern}: {len(compiled)} of {len(jobs)} compiled after {took:.0f} s", flush=True)
        for place in places:
            mine = [job for job in compiled if job.place == place]
            for timings in _rankings(place, mine, asked.rep):
                kept += timings
                first = timings[0].job
                if asked.follow:
                    chosen = [t.job.config for t in timings if t.right][: asked.follow]
                    best.setdefault((place.dim, place.dtype, first.kernel), chosen)
        if time.monotonic() - begun > asked.time_budget:
            print(f"stopped: the time budget of {asked.time_budget:.0f} s is spent")
            break
    if asked.out:
        asked.out.write_text(json.dumps(_record(kept), indent=1) + "\n")
    print(f"{time.monotonic() - begun:.0f} s")


def _jobs(
    place: Place, kernels: list[str], best: dict[tuple[int, str, str], list[Config]]
) -> Iterator[Job]:
    itemsize = DTYPES[place.dtype].itemsize
    limits = Limits(padded(place.dim), padded(place.dim), itemsize)
    for kernel in kernels:
        known = best.get((place.dim, place.dtype, kernel))
        for config in known or candidates(kernel, limits):
            yield Job(place, kernel, config)


# -- compiling


def _compiled(jobs: list[Job], workers: int) -> Iterator[Job]:
    for outcome in outcomes(_compile, jobs, min(workers, len(jobs)), seconds=60):
        if not outcome.error:
            yield jobs[outcome.task]


def _compile(job: Job) -> None:
    _problem(job.place).launch(job.kernel, job.config).compile()


@lru_cache(maxsize=2)
def _problem(place: Place) -> Any:
    from benchmarks.problem import Problem

    return Problem(PATTERNS[place.pattern], place.shape, DTYPES[place.dtype])


# -- timing


def _rankings(place: Place, jobs: list[Job], rep: int) -> Iterator[list[Timing]]:
    """For each kernel its schedules, quickest first, and a line that says so."""
    for kernel in KERNELS:
        mine = [job for job in jobs if job.kernel == kernel]
        rough = {job: ms for job in mine if (ms := _glance(job)) is not None}
        chosen = sorted(rough, key=rough.__getitem__)[:SECOND]
        times: dict[Job, list[float]] = {job: [] for job in chosen}
        for _ in range(2):
            for job in chosen:
                times[job].append(_measured(job, rep))
        timings = sorted((_timing(job, min(ms)) for job, ms in times.items()), key=lambda t: t.ms)
        if timings:
            default = _problem(place).default(kernel)
            head = f"{place.pattern} D{place.dim} {place.dtype} {kernel}, TFLOP/s"
            print(f"{head} (default {default}): {'  '.join(map(str, timings[:8]))}", flush=True)
            yield timings


def _glance(job: Job) -> float | None:
    """Milliseconds of one of three runs, or None where the schedule does not fit the GPU."""
    try:
        one = _problem(job.place).launch(job.kernel, job.config)
        one.start()
    except Exception as error:
        if "out of resource" not in str(error):
            print(f"{job.place} {job.kernel} {job.config}: {str(error)[:200]}")
        return None
    return milliseconds(one, GPU)


def _measured(job: Job, rep: int) -> float:
    return median(_problem(job.place).launch(job.kernel, job.config), GPU, rep)


def _timing(job: Job, ms: float) -> Timing:
    return Timing(job, ms, _problem(job.place).flops(job.kernel) / ms / 1e9, _is_right(job))


def _is_right(job: Job) -> bool:
    """Whether results are those of the default schedule, which the numerics run checks."""
    problem = _problem(job.place)
    expected = problem.launch(job.kernel, problem.default(job.kernel)).computed()
    found = problem.launch(job.kernel, job.config).computed()
    allowed = AGREE[DTYPES[job.place.dtype]]
    return all(close(found[name], expected[name], allowed) for name in expected)


def _record(kept: list[Timing]) -> dict[str, Any]:
    timings = [
        {
            "place": astuple(t.job.place),
            "kernel": t.job.kernel,
            "config": astuple(t.job.config),
            "ms": t.ms,
            "tflops": t.tflops,
            "right": t.right,
        }
        for t in kept
    ]
    return {"machine": describe(GPU), "timings": timings}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep")
    parser.add_argument("--patterns", nargs="+", default=["causal"], choices=PATTERNS)
    parser.add_argument("--dims", nargs="+", type=int, default=[128])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument(
        "--follow",
        type=int,
        default=0,
        help="after the first pattern, time only its so many best schedules",
    )
    parser.add_argument("--rep", type=int, default=25, help="milliseconds a measurement")
    parser.add_argument("--workers", type=int, default=workers_here())
    parser.add_argument("--time-budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--out", type=Path, help="file for all timings, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
