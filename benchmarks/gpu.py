"""attncc beside FlexAttention, cuDNN and FlashAttention 2 on one GPU: python -m benchmarks.gpu.

Forward and backward, bf16; every contestant of a row takes its turn in every round, and attncc's
outputs and gradients are compared with float64 on a slice and with FlexAttention's in full.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # rows compile in parallel instead

import torch

from benchmarks import contest, table
from benchmarks.machine import describe
from benchmarks.pool import outcomes, workers_here
from benchmarks.rows import ROWS, Row

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    asked = _options()
    begun = time.monotonic()
    device = torch.device("cpu" if asked.rehearse else "cuda")
    rows = [row for row in ROWS if _is_asked(row, asked.rows)]
    if asked.rehearse:
        rows = [row.shrunk(2560) for row in rows]
    elif not asked.no_warm_up:
        _warm_up(rows, asked.workers)
        print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)
    results: dict[str, Any] = {
        "machine": describe(device),
        "date": asked.date,
        "rounds": asked.rounds,
        "rows": [],
    }
    for row in rows:
        if time.monotonic() - begun > asked.time_budget:
            print(f"stopped: the time budget of {asked.time_budget:.0f} s is spent")
            break
        results["rows"].append(_measured(row, device, asked))
        print(table.line(results["rows"][-1]), flush=True)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table.markdown(results)}\n{time.monotonic() - begun:.0f} s; wrote {asked.out}")
    return 1 if any(row["problems"] for row in results["rows"]) else 0


def _measured(row: Row, device: torch.device, asked: argparse.Namespace) -> dict[str, Any]:
    found = contest.contest(row, device, asked.tune)
    problems = contest.gate(found)
    times = contest.timed(found, asked.rounds, asked.rep)
    result = {**contest.result(found, times), "problems": problems}
    del found
    contest.freed()
    return result


def _warm_up(rows: list[Row], workers: int) -> None:
    """Fills the compilers' caches on disk, many rows at a time."""
    numbers = [ROWS.index(row) for row in rows]  # rows hold functions, which do not travel
    for outcome in outcomes(_compiled, numbers, min(workers, len(rows)), seconds=120):
        if outcome.error:
            print(f"{rows[outcome.task].name}: {outcome.error}", flush=True)


def _compiled(number: int) -> None:
    contest.contest(ROWS[number], torch.device("cuda"))
    contest.freed()


def _is_asked(row: Row, wanted: list[str]) -> bool:
    return not wanted or any(word == row.group or word in row.name for word in wanted)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument(
        "--rows", nargs="*", default=[], help="groups (main d64 wide longca) or words"
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds a measurement")
    parser.add_argument(
        "--time-budget", type=float, default=1e9, help="seconds; later rows are left"
    )
    parser.add_argument("--tune", action="store_true", help="tune attncc's schedules first")
    parser.add_argument("--workers", type=int, default=workers_here())
    parser.add_argument("--no-warm-up", action="store_true", help="compile row by row")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny rows on the CPU, no table of use"
    )
    parser.add_argument("--date", default="undated", help="kept with the results")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    asked = parser.parse_args()
    if asked.quick:
        asked.rounds, asked.rep = 1, 15
    return asked


if __name__ == "__main__":
    raise SystemExit(main())
