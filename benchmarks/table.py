"""Results of `attncc bench` or benchmarks.cpu as tables: python -m benchmarks.table FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from attncc.bench.table import DIRECTIONS, TITLES

CPU_PEERS = {"attncc": "attncc", "flex": "FlexAttention, compiled", "sdpa": "SDPA"}


def rendered(path: Path) -> str:
    """The tables of one results file."""
    results = json.loads(path.read_text())
    return cpu_markdown(results) if "milliseconds" in results else markdown(results)


def markdown(results: dict[str, Any]) -> str:
    """One table for each shape, TFLOP/s forward / backward, the best of a row in bold."""
    machine = results["machine"]
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "triton", "cuda") if n in machine)
    parts = [
        f"{machine['device']}, {versions}; bf16, TFLOP/s over kept pairs, forward / backward, "
        f"median of {results['rounds']} interleaved rounds, {results['date']}."
    ]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        parts.append(_table(shape, [row for row in results["rows"] if row["shape"] == shape]))
    return "\n\n".join(parts) + "\n"


def _table(shape: str, rows: list[dict[str, Any]]) -> str:
    peers = [p for p in TITLES if any(p in row["results"] for row in rows)]
    lines = [
        f"| {shape} | kept | {' | '.join(TITLES[p] for p in peers)} |",
        f"|---|---|{'---|' * len(peers)}",
    ]
    for row in rows:
        cells = " | ".join(_cell(row, peer) for peer in peers)
        lines.append(f"| {row['row']} | {row['density']:.1%} | {cells} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], peer: str) -> str:
    found = row["results"].get(peer, {})
    return " / ".join(_number(row, peer, kind) for kind in DIRECTIONS if kind in found) or "-"


def _number(row: dict[str, Any], peer: str, kind: str) -> str:
    speeds = {name: of[kind]["tflops"] for name, of in row["results"].items() if kind in of}
    text = f"{speeds[peer]:.0f}" if speeds[peer] >= 10 else f"{speeds[peer]:.1f}"
    return f"**{text}**" if speeds[peer] == max(speeds.values()) else text


def cpu_markdown(results: dict[str, Any]) -> str:
    """Milliseconds of the forward, the best of a row in bold."""
    machine, shape = results["machine"], results["shape"]
    title = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; forward, "
        f"{shape['dtype']}, H{shape['heads']} N{shape['length']} D{shape['head_dim']}; least "
        "milliseconds of interleaved rounds."
    )
    lines = [f"| | {' | '.join(CPU_PEERS.values())} |", f"|---|{'---|' * len(CPU_PEERS)}"]
    for name, found in results["milliseconds"].items():
        best = min(found[peer]["least"] for peer in CPU_PEERS if peer in found)
        cells = " | ".join(_milliseconds(found, peer, best) for peer in CPU_PEERS)
        lines.append(f"| {name.replace('_', ' ')} | {cells} |")
    return "\n\n".join([title, "\n".join(lines)]) + "\n"


def _milliseconds(found: dict[str, Any], peer: str, best: float) -> str:
    if peer not in found:
        return "-"
    least = found[peer]["least"]
    return f"**{least:.1f}**" if least == best else f"{least:.1f}"


if __name__ == "__main__":
    print(rendered(Path(sys.argv[1])), end="")
