"""Cases of the numerics run: a sample in which every value of every axis comes up."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attncc.frontend import read
from attncc.ir.expr import VALUE, results
from attncc.ir.program import Program

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"

LAYOUTS = ("contiguous", "rows_first", "padded", "unaligned", "strided")
HEADS = ((1, 1), (4, 4), (4, 2), (8, 1), (6, 2), (3, 3))
LENGTHS = (
    *((1, 1), (17, 17), (127, 127), (128, 128), (129, 129), (1000, 1000), (1025, 1025)),
    *((1, 1000), (17, 1025), (129, 1000), (128, 129), (1000, 127), (1025, 128), (127, 1)),
    *((0, 17), (17, 0)),
)
GPU = {
    "dtype": ("bfloat16", "float16", "float32"),
    "head_dim": (16, 40, 64, 80, 96, 128, 192, 256),
    "value_dim": (0, 0, 0, 16, 64, 72, 128, 256),  # 0: as head_dim
    "lengths": LENGTHS,
    "heads": HEADS,
    "batch": (1, 2, 3),
    "layout": LAYOUTS,
    "descriptors": (True, False, True),
    "deterministic": (True, False),
    "captured": ("float32", "float32", "own"),
}
CPU = GPU | {
    "dtype": ("float32", "bfloat16", "float64"),
    "lengths": ((1, 1), (17, 17), (129, 129), (1, 130), (129, 200), (130, 40), (0, 17), (17, 0)),
    "head_dim": (16, 40, 64),
    "heads": ((1, 1), (4, 2), (3, 1)),
}
INTERPRETED = CPU | {
    "dtype": ("float32",),
    "head_dim": (16, 40),
    "value_dim": (0, 16, 24),
    "lengths": ((1, 1), (17, 17), (33, 33), (1, 40), (17, 40), (40, 17), (0, 17), (17, 0)),
    "batch": (1, 2),
}


@dataclass(frozen=True)
class Case:
    """One call: program, shapes, layout of q, k and v in memory, and how it is run."""

    number: int
    program: str
    dtype: str
    head_dim: int
    value_dim: int
    q_len: int
    kv_len: int
    batch: int
    heads: int
    kv_heads: int
    layout: str
    descriptors: bool
    deterministic: bool
    captured: str

    def __str__(self) -> str:
        n = self
        options = ("descriptors" * n.descriptors, "deterministic" * n.deterministic)
        return (
            f"{n.program} {n.dtype} B{n.batch} H{n.heads}/{n.kv_heads} Q{n.q_len} KV{n.kv_len} "
            f"D{n.head_dim}/{n.value_dim} {n.layout} {' '.join(filter(None, options))}".strip()
        )

    def record(self) -> dict[str, Any]:
        return asdict(self)


@cache
def programs() -> dict[str, Program]:
    """Every example, and the programs beside this file, by name."""
    files = [*sorted(EXAMPLES.glob("*.attn")), HERE / "programs.attn"]
    return {program.name: program for file in files for program in read(file)}


def sample(count: int, seed: int, axes: dict[str, Sequence[Any]]) -> list[Case]:
    """`count` cases; far apart in memory too where the axes are a GPU's."""
    rng = random.Random(seed)
    decks = {name: _dealt(values, rng) for name, values in axes.items()}
    names = _dealt(sorted(programs()), rng)
    cases = [_case(i, next(names), {a: next(d) for a, d in decks.items()}) for i in range(count)]
    if axes is GPU:
        cases += [_far(count + i, dtype) for i, dtype in enumerate(("bfloat16", "float16"))]
    return cases


def _dealt(values: Sequence[Any], rng: random.Random) -> Iterator[Any]:
    """Values from a shuffled deck, shuffled again whenever it is used up."""
    while True:
        yield from rng.sample(values, len(values))


def _case(number: int, name: str, at: dict[str, Any]) -> Case:
    q_len, kv_len = at.pop("lengths")
    heads, kv_heads = at.pop("heads")
    program = programs()[name]
    dims = {dim for tensor in program.tensors for dim in tensor.dims}
    if q_len > kv_len and "kv_len" in dims and "q_len" not in dims:
        q_len, kv_len = kv_len, q_len  # it reads a table of keys at q_idx
    if q_len > kv_len and name == "row_gain":
        q_len, kv_len = kv_len, q_len
    if VALUE in results(program.output):
        kv_len = q_len
    at["value_dim"] = at["value_dim"] or at["head_dim"]
    lengths = {"q_len": q_len, "kv_len": kv_len, "heads": heads, "kv_heads": kv_heads}
    return Case(number, name, **lengths, **at)


def _far(number: int, dtype: str) -> Case:
    """Batches more than 2^31 elements apart."""
    at = {"dtype": dtype, "head_dim": 64, "value_dim": 64, "lengths": (129, 129), "heads": (2, 1)}
    how = {"batch": 2, "layout": "far", "descriptors": dtype == "bfloat16", "captured": "float32"}
    return _case(number, "causal", {**at, **how, "deterministic": False})
