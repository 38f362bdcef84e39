"""The CPU backend beside compiled FlexAttention and SDPA, interleaved: python -m benchmarks.cpu"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attncc

EXAMPLES = Path(__file__).parent.parent / "examples"
RESULTS = Path(__file__).parent / "results" / "cpu.json"

Mod = Callable[..., Tensor]
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One program of examples/ and the same as FlexAttention's functions."""

    program: str
    arguments: dict[str, object] = field(default_factory=dict)
    mask_mod: Mod | None = None
    score_mod: Mod | None = None


def cases(heads: int, length: int) -> list[Case]:
    """Every mask and score below exists on both sides."""
    doc = documents(length)
    bias = torch.randn(heads, length)
    slope = torch.exp2(-8.0 * (torch.arange(heads) + 1) / heads)

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q >= kv

    def window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (q - kv < 256)

    def streaming(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & ((q - kv < 256) | (kv < 4))

    def prefix(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) | (kv < 512)

    def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (q - kv < 1024) & (doc[b, q] == doc[b, kv])

    def share(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((doc[b, q] != 0) & (doc[b, kv] == 0)) | ((q >= kv) & (doc[b, q] == doc[b, kv]))

    def blocks(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (doc[b, q] == doc[b, kv]) & (kv < (q // 256 + 1) * 256)

    def dilated(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (q - kv < 1024) & ((q - kv) % 4 == 0)

    def near_or_global(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return ((q - kv).abs() <= 64) | (q < 128) | (kv < 128)

    def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + slope[h] * (kv - q)

    def softcap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return 50.0 * torch.tanh(score / 50.0)

    def relative(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + bias[h, (q - kv).clamp(min=0)]

    return [
        Case("full"),
        Case("causal", mask_mod=causal),
        Case("sliding_window", {"window": 256}, window),
        Case("streaming", {"window": 256}, streaming),
        Case("prefix_lm", {"prefix": 512}, prefix),
        Case("packed", {"doc": doc}, packed),
        Case("share_question", {"doc": doc}, share),
        Case("block_causal_documents", {"doc": doc, "block": 256}, blocks),
        Case("dilated_window", {"window": 256, "step": 4}, dilated),
        Case("global_window", {"window": 64}, near_or_global),
        Case("alibi", {}, causal, alibi),
        Case("softcap", {}, causal, softcap),
        Case("relative_bias", {"bias": bias}, causal, relative),
    ]


def documents(length: int) -> Tensor:
    """[1, length] document numbers; lengths of 6 documents, uneven and no multiple of a tile."""
    parts = torch.tensor([0.11, 0.27, 0.05, 0.31, 0.19, 0.07]) * length
    ends = parts.round().long().cumsum(0)[:-1]
    return torch.searchsorted(ends, torch.arange(length), right=True)[None]


def calls(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """What is timed, each compiled and checked against the first."""
    program = attncc.compile(EXAMPLES / f"{case.program}.attn")
    plan = program.plan(q, k, v, **case.arguments)
    blocks = None
    if case.mask_mod is not None:
        blocks = create_block_mask(case.mask_mod, 1, 1, q.shape[2], k.shape[2], device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention)
    found: dict[str, Call] = {
        "attncc": lambda: program(q, k, v, plan=plan),
        "attncc, plan included": lambda: program(q, k, v, **case.arguments),
        "flex": lambda: compiled(q, k, v, score_mod=case.score_mod, block_mask=blocks),
    }
    if case.program in ("full", "causal"):
        causal = case.program == "causal"
        found["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal
        )
    first, *others = (call() for call in found.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)
    return found


def measure(found: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, one call of each in turn, so that a busy machine hits all alike.

    work: of all threads together, which a busy machine changes less.
    """
    times: dict[str, list[float]] = {name: [] for name in found}
    works: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, call in found.items():
            time.sleep(0.03)  # until torch's threads have stopped spinning after the last call
            start, spent = time.perf_counter(), time.process_time()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
            works[name].append(1e3 * (time.process_time() - spent))
    return {
        name: {
            "median": round(statistics.median(times[name]), 2),
            "least": round(min(times[name]), 2),
            "work": round(min(works[name]), 2),
        }
        for name in found
    }


def machine() -> dict[str, object]:
    """Where a result was taken."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def row(name: str, result: dict[str, dict[str, float]]) -> list[str]:
    """Least times and work, and how many times faster than FlexAttention."""
    cells = [_cell(result[who]) if who in result else "" for who in WHO]
    ratio = result["flex"]["least"] / result["attncc"]["least"]
    return [name, *cells, f"{ratio:.2f}"]


def _cell(times: dict[str, float]) -> str:
    return f"{times['least']:.1f} ({times['work']:.0f})"


WHO = ("attncc", "attncc, plan included", "flex", "sdpa")


@click.command()
@click.option("--only", multiple=True, help="Programs to measure; all by default.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--length", default=2048, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
def main(only: tuple[str, ...], rounds: int, heads: int, length: int, head_dim: int) -> None:
    """Forward times on this machine, written to benchmarks/results/cpu.json."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, head_dim) for _ in range(3))
    shape = {"heads": heads, "length": length, "head_dim": head_dim, "dtype": "float32"}
    results: dict[str, dict[str, dict[str, float]]] = {}
    with torch.no_grad():
        for case in cases(heads, length):
            if not only or case.program in only:
                results[case.program] = measure(calls(case, q, k, v), rounds)
                print(*row(case.program, results[case.program]), flush=True)
    table = Table(
        "program", *WHO, "flex / attncc", title="forward, ms: least (work of all threads)"
    )
    for name, result in results.items():
        table.add_row(*row(name, result))
    Console().print(table)
    if not only:
        report = {"machine": machine(), "shape": shape, "milliseconds": results}
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
