"""Numerics over programs, dtypes, head dims, lengths and layouts: python -m benchmarks.numerics.

Every case is compared with the dense interpreter in float64: forward, lse and all gradients. Memory
that no kernel writes, and memory beyond the inputs, is NaN.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from attncc.bench.pool import outcomes, workers_here
from benchmarks import cases


def main() -> int:
    asked = _options()
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from benchmarks.check import Setting, check

    axes = cases.GPU if asked.device == "cuda" else cases.CPU
    backend = asked.backend or ("cpu" if asked.device == "cpu" else "triton")
    if asked.interpret:
        axes, backend = cases.INTERPRETED, "triton"
    chosen = cases.sample(asked.cases, asked.seed, axes)
    if asked.only:
        chosen = [c for c in chosen if asked.only in str(c) or asked.only == f"#{c.number}"]
    setting = Setting(backend, asked.device, asked.interpret, asked.seed)
    begun, results = time.monotonic(), []
    tasks = [(case, setting) for case in chosen]
    for outcome in outcomes(check, tasks, min(asked.workers, len(tasks)), asked.timeout):
        case = chosen[outcome.task]
        result = outcome.value or {"case": case.record(), "problems": [outcome.error]}
        results.append({"name": f"#{case.number} {case}", **result})
        _told(len(results), len(tasks), results[-1], begun)
        if time.monotonic() - begun > asked.time_budget:
            print(f"stopped: the time budget of {asked.time_budget:.0f} s is spent")
            break
    results.sort(key=lambda result: result["case"]["number"])
    if asked.out:
        Path(asked.out).write_text(json.dumps(results, indent=1) + "\n")
    _report(results, time.monotonic() - begun)
    return 1 if any(result["problems"] for result in results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", choices=("triton", "cpu"), help="default: by device")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter, tiny cases")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="cases whose line holds this text, or #number")
    parser.add_argument("--workers", type=int, default=workers_here())
    parser.add_argument("--timeout", type=float, default=120, help="seconds a case")
    parser.add_argument("--time-budget", type=float, default=1e9, help="seconds in all")
    parser.add_argument("--out", help="file for all errors, as JSON")
    asked = parser.parse_args()
    if asked.interpret:
        asked.device = "cpu"
    return asked


def _told(done: int, total: int, result: dict[str, Any], begun: float) -> None:
    if result["problems"]:
        print(f"FAIL {result['name']}: {'; '.join(result['problems'][:3])[:400]}", flush=True)
    if done % 20 == 0:
        print(f"{done} of {total} after {time.monotonic() - begun:.0f} s", flush=True)


def _report(results: list[dict[str, Any]], seconds: float) -> None:
    """The worst ratios by dtype and result, then what failed, by program and by first words."""
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for result in results:
        for name, e in result.get("errors", {}).items():
            kind = name if name in ("out", "lse", "dq", "dk", "dv") else "captured"
            key = result["case"]["dtype"], kind
            ratio, norm = worst.get(key, (0.0, 0.0))
            worst[key] = max(ratio, e["error"] / e.get("bound", 1)), max(norm, e.get("norm", 0.0))
    print("\nworst error over what is allowed, and worst relative error by norms")
    for (dtype, kind), (ratio, norm) in sorted(worst.items()):
        print(f"  {dtype:9} {kind:9} {ratio:8.3f} {norm:12.2e}")
    failed = [result for result in results if result["problems"]]
    by_program = Counter(result["case"]["program"] for result in failed)
    for name, count in by_program.most_common():
        print(f"  failed {count:3} of {name}")
    print(f"{len(results) - len(failed)} of {len(results)} cases pass, in {seconds:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
