"""The rows of a benchmark, one after another, and what is known of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from attncc.bench import cases, contest
from attncc.bench.cases import Case, Options
from attncc.bench.contestants import TUNED
from attncc.bench.first_call import OWN, Job, empty_caches, first_calls
from attncc.bench.machine import describe
from attncc.bench.pool import outcomes
from attncc.bench.table import DIRECTIONS, TITLES, digits

Result = dict[str, Any]

PATIENCE = 240
"""Seconds that compiling one row ahead may take."""


def measured(
    rows: Sequence[Case],
    options: Options,
    tell: Callable[[str], None],
    keep: Callable[[Result], None],
    workers: int = 0,
) -> Result:
    """All rows that the time budget has room for; `keep` has what is known after each.

    workers: processes that compile rows first, where there are several.
    """
    begun = time.monotonic()
    if workers and len(rows) > 1:
        for failure in compile_ahead(rows, options, workers):
            tell(failure)
        tell(f"compiled in {time.monotonic() - begun:.0f} s")
    results: Result = {
        "machine": describe(torch.device(options.device)),
        "date": options.date,
        "rounds": options.rounds,
        "rep_ms": options.rep,
        "rows": [],
    }
    for row in rows:
        if time.monotonic() - begun > options.time_budget:
            tell(f"stopped: the time budget of {options.time_budget:.0f} s is spent")
            break
        try:
            results["rows"].append(_row(row, options))
        except Exception as error:  # a kernel broke the GPU's context, which no later row survives
            results["stopped"] = f"stopped at {row.title}, {row.shape}: {contest.told(error)}"
            tell(results["stopped"])
            break
        tell(line(results["rows"][-1]))
        keep(results)
    return results


def _row(row: Case, options: Options) -> Result:
    device, seconds = torch.device(options.device), options.tuned
    with options.conditions(), empty_caches(OWN) if seconds is not None else nullcontext():
        problem = row.problem(device, options.dtype)
        tiny = row.shaped(cases.tiny(row.shape)).problem(device, options.dtype)
        found = contest.contest(problem, options.makers(), tiny if options.costs else None)
        times = contest.timed(found, options.rounds, options.rep)
        result = {"row": row.title, "group": row.group, **contest.result(found, times)}
        del problem, tiny, found
        contest.freed()
    _add_first_calls(row, options, result)
    return result


def _add_first_calls(row: Case, options: Options, result: Result) -> None:
    kinds = [False] * options.costs + [True] * options.cold
    names = [name for name in result["results"] if name != TUNED]
    jobs = [Job(row, name, options, cold) for cold in kinds for name in names]
    for outcome in first_calls(jobs):
        job = jobs[outcome.task]
        if outcome.error:
            result["failed"][job.name] = f"its first call: {outcome.error}"
        else:
            result["results"][job.name]["cold_s" if job.cold else "warm_s"] = outcome.value


def compile_ahead(rows: Sequence[Case], options: Options, workers: int) -> Iterator[str]:
    """Fills the compilers' caches on disk, many rows at a time; yields what went wrong."""
    jobs = [(row, options) for row in rows]
    for outcome in outcomes(_compiled, jobs, min(workers, len(jobs)), PATIENCE):
        if outcome.error:
            yield f"{rows[outcome.task].title}: {outcome.error}"


def _compiled(job: tuple[Case, Options]) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # rows are in parallel instead
    row, options = job
    shapes = [row.shape, cases.tiny(row.shape)] if options.costs else [row.shape]
    with options.conditions():
        for shape in shapes:
            problem = row.shaped(shape).problem(torch.device(options.device), options.dtype)
            for make in replace(options, tuned=None).makers().values():
                with suppress(Exception):  # the run itself tells
                    contestant = make(problem)
                    contest.compiled(contestant)
                    if options.costs and contestant.plan is not None:
                        contestant.plan()
            contest.freed()


def line(row: Result) -> str:
    """One row in plain text, with attncc's speed over FlexAttention's."""
    text = f"{row['row']:36} {row['shape']:22}"
    results = row["results"]
    for name, found in results.items():
        speeds = (digits(found[d]["tflops"]) for d in DIRECTIONS if d in found)
        text += f" {TITLES[name]} {' / '.join(speeds)}"
    if "attncc" in results and "flex" in results:
        ratios = (
            f"{results['flex'][d]['ms'] / results['attncc'][d]['ms']:.2f}x"
            for d in DIRECTIONS
            if d in results["flex"] and d in results["attncc"]
        )
        text += f"  = {' / '.join(ratios)}"
    for word in ("failed", "wrong"):
        text += "".join(f"\n    {TITLES[name]} {word}: {why}" for name, why in row[word].items())
    return text


def is_sound(results: Result) -> bool:
    """Whether attncc ran on every row and was right."""
    good = ("attncc" in row["results"] and TUNED not in row["wrong"] for row in results["rows"])
    return "stopped" not in results and all(good)
