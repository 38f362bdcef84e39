"""Published masks whose tile counts are known from dense evaluation: 4096 tokens, tile 128."""

import pytest
import torch

from attncc.binding import bind_lengths
from attncc.frontend import parse
from attncc.passes import analyze
from attncc.tiles import BoundPlan, Counts

N = 4096
LENGTHS = (1000, 300, 900, 700, 196, 1000)
DOC = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))[None]
DOCS = "doc: int[batch, kv_len] sorted"
SAME = "doc[b, q_idx] == doc[b, kv_idx]"
CAUSAL = "q_idx >= kv_idx"

# Tokens in 8 x 16 tiles of a 64 x 64 grid: tile number, then row and column within the tile.
TILED = """
    let qt = q_idx // 128
    let kt = kv_idx // 128
    let qy = qt // 4 * 8 + q_idx % 128 // 16
    let qx = qt % 4 * 16 + q_idx % 16
    let ky = kt // 4 * 8 + kv_idx % 128 // 16
    let kx = kt % 4 * 16 + kv_idx % 16
"""
ROWS = """
    let qy = q_idx // 64
    let qx = q_idx % 64
    let ky = kv_idx // 64
    let kx = kv_idx % 64
"""


def neighborhood(wy: int, wx: int, sy: int = 1, sx: int = 1) -> str:
    """NATTEN's rule on both axes of a 64 x 64 grid, for coordinates qy, qx, ky, kx."""
    lines = []
    for axis, width, stride in (("y", wy, sy), ("x", wx, sx)):
        left, right = width // 2, width // 2 + width % 2 - 1
        leader = f"min(q{axis} // {stride} * {stride} + {stride // 2}, 63)"
        lines.append(f"    let c{axis} = {leader}")
        lines.append(
            f"    let s{axis} = max(c{axis} - {left}, 0) + "
            f"where(c{axis} + {right} >= 64, {64 - right - 1} - c{axis}, 0)"
        )
    inside = " and ".join(
        f"k{axis} >= s{axis} and k{axis} < s{axis} + {width}"
        for axis, width in (("y", wy), ("x", wx))
    )
    return "\n".join(lines) + f"\n    mask = {inside}"


LONGNET = " or ".join(
    f"q_idx // {w} == kv_idx // {w} and q_idx % {r} == 0 and kv_idx % {r} == 0"
    for w, r in ((512, 1), (1024, 2), (2048, 4), (4096, 8))
)

# Cells of 2 x 8 x 8 tokens in an 8 x 16 x 32 grid, one after another: 4 x 2 x 4 cells.
GRAT = """
    let qc = q_idx // 128
    let kc = kv_idx // 128
    mask = qc // 8 == kc // 8 or qc // 4 % 2 == kc // 4 % 2 or qc % 4 == kc % 4
"""

# 16 frames of 256 tokens; 2 ** bit_length(256) = 512.
RADIAL = """
    let dist = abs(q_idx // 256 - kv_idx // 256)
    let length = 512 // (1 << bit_length(dist))
    let reach = where(dist <= 1, 256, max(128, length // 2))
    let near = abs(q_idx % 256 - kv_idx % 256) <= reach
    mask = kv_idx < 256 or near and (length >= 128 or dist % (128 // max(length, 1)) == 0)
"""


def power(block: int) -> str:
    return (
        f"let d = q_idx // {block} - kv_idx // {block}\n"
        f"    let power_of_two = d > 0 and (d & (d - 1)) == 0\n"
        f"    mask = {CAUSAL} and (d < 5 or kv_idx < {block} or power_of_two)"
    )


ROWS_OF_TABLE = {
    "full": ("mask = true", 1024, 0),
    "causal": (f"mask = {CAUSAL}", 496, 32),
    "window": (f"mask = {CAUSAL} and q_idx - kv_idx < 1024", 196, 56),
    "window, LongCA": (f"mask = {CAUSAL} and q_idx - kv_idx <= 1024", 196, 56),
    "sinks": (f"mask = {CAUSAL} and (q_idx - kv_idx < 1024 or kv_idx < 4)", 196, 79),
    "prefix": (f"mask = kv_idx < 1024 or {CAUSAL}", 532, 24),
    "prefix, LongCA": (f"mask = kv_idx <= 1024 or {CAUSAL}", 532, 32),
    "documents": (f"mask = {SAME}", 155, 93),
    "causal documents": (f"mask = {SAME} and {CAUSAL}", 64, 76),
    "share question": (
        f"mask = doc[b, q_idx] != 0 and doc[b, kv_idx] == 0 or {SAME} and {CAUSAL}",
        241,
        88,
    ),
    "causal blockwise": (
        f"mask = doc[b, q_idx] == 5 and doc[b, kv_idx] != 5 or {SAME} and {CAUSAL}",
        240,
        90,
    ),
    "BlockRank": (
        f"mask = {CAUSAL} and ({SAME} or doc[b, kv_idx] == 0 or doc[b, q_idx] == 5)",
        368,
        87,
    ),
    "global window": (
        "mask = abs(q_idx - kv_idx) <= 256 or q_idx < 512 or kv_idx < 512",
        322,
        52,
    ),
    "block causal": ("mask = kv_idx < (q_idx // 512 + 1) * 512", 576, 0),
    "S2": (
        f"mask = {CAUSAL} and (q_idx // 128 - kv_idx // 128 < 4 or (kv_idx // 128 + h) % 8 == 0)",
        154,
        32,
    ),
    "PowerAttention": (power(128), 183, 32),
    "PowerAttention, blocks of 256": (power(256), None, None),
    "PowerAttention, tokens": (
        f"let d = q_idx - kv_idx\n    mask = {CAUSAL} and (d & (d - 1)) == 0",
        0,
        161,
    ),
    "LongNet": (f"mask = {CAUSAL} and ({LONGNET})", 48, 480),
    "LongLoRA": (f"mask = {CAUSAL} and (q_idx + 512) // 1024 == (kv_idx + 512) // 1024", 96, 32),
    "neighborhood": (ROWS + neighborhood(13, 13), 0, 224),
    "neighborhood, tiled": (TILED + neighborhood(13, 13), 0, 220),
    "strided neighborhood": (TILED + neighborhood(24, 48, 8, 16), 288, 0),
    "wide neighborhood": (TILED + neighborhood(24, 48), 140, 336),
    "GRAT": (GRAT, 736, 0),
    "Radial": (RADIAL, 472, 232),
}


LOOSE = {"PowerAttention, tokens": 367}
"""Tiles called partial that are empty: bits of the distance are bounded, not enumerated."""


def bound(body: str) -> BoundPlan:
    (program,) = parse(f"attention t({DOCS}):\n    {body.strip()}\n")
    binding = bind_lengths(program, q_len=N, kv_len=N, arguments={"doc": DOC})
    return BoundPlan(analyze(program), binding, (128, 128))


@pytest.mark.parametrize("name", ROWS_OF_TABLE)
def test_counts_are_the_dense_ones(name: str) -> None:
    body, full, partial = ROWS_OF_TABLE[name]
    plan = bound(body)
    exact = plan.exact_counts()
    if full is not None:
        assert exact == Counts(full, partial, 1024 - full - partial)
    if name not in LOOSE:
        assert plan.counts == exact


def test_what_is_lost_is_said() -> None:
    for name, lost in LOOSE.items():
        plan = bound(ROWS_OF_TABLE[name][0])
        assert plan.counts.partial - plan.exact_counts().partial == lost
        assert any(note.by == "infer_tiles" for note in plan.plan.notes)
