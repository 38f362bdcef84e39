"""Results of benchmarks.gpu as a table: python -m benchmarks.table FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PEERS = {"attncc": "attncc", "flex": "FlexAttention", "cudnn": "cuDNN", "flash": "FA2"}


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
    peers = [p for p in PEERS if any(p in row["results"] for row in rows)]
    lines = [
        f"| {shape} | kept | {' | '.join(PEERS[p] for p in peers)} |",
        f"|---|---|{'---|' * len(peers)}",
    ]
    for row in rows:
        cells = " | ".join(_cell(row, peer) for peer in peers)
        wrong = " (wrong)" if row["problems"] else ""
        lines.append(f"| {row['row']}{wrong} | {row['density']:.1%} | {cells} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], peer: str) -> str:
    if peer not in row["results"]:
        return "-"
    return " / ".join(_number(row, peer, kind) for kind in row["results"][peer])


def _number(row: dict[str, Any], peer: str, kind: str) -> str:
    speeds = {name: of[kind]["tflops"] for name, of in row["results"].items() if kind in of}
    text = f"{speeds[peer]:.0f}" if speeds[peer] >= 10 else f"{speeds[peer]:.1f}"
    return f"**{text}**" if speeds[peer] == max(speeds.values()) else text


def line(row: dict[str, Any]) -> str:
    """One row in plain text, with attncc's speed over FlexAttention's."""
    text = f"{row['row']:36} {row['shape']:22}"
    for peer in PEERS:
        if peer in row["results"]:
            speeds = (of["tflops"] for of in row["results"][peer].values())
            text += f" {peer} {' / '.join(f'{speed:.1f}' for speed in speeds)}"
    results = row["results"]
    if "attncc" in results and "flex" in results:
        ratios = (
            results["flex"][kind]["ms"] / results["attncc"][kind]["ms"] for kind in results["flex"]
        )
        text += f"  = {' / '.join(f'{ratio:.2f}x' for ratio in ratios)}"
    failed = "".join(f"\n    {name} failed: {why[:300]}" for name, why in row["failed"].items())
    return text + failed + "".join(f"\n    WRONG: {problem}" for problem in row["problems"])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
