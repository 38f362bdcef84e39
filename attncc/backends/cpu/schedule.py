"""Which keys each strip of queries reads, and which of them need the mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from attncc.ir.expr import TRUE
from attncc.ir.plan import Blocks
from attncc.tiles import EMPTY, FULL, BoundPlan, SegmentTable

GAP = 64
"""Unvisited keys fewer than this are computed and masked: a matmul more costs as much."""

NARROW = 128, 64
WIDE = 256, 64
"""Queries of a strip, and keys of a tile where tiles are classified.

Causal, 8 heads, 2048 tokens, one core: 83 ms narrow, 77 ms wide; a window of 256: 34 and 41 ms.
"""
MANY = 1000
"""Keys that make a strip wide, on average; between those two examples."""

ALIGNED = 16
"""What numbers of keys are rounded to: matmul takes 12 % longer over 383 keys than over 384."""

Interval = tuple[int, int]
"""start <= key < stop"""


@dataclass(frozen=True, slots=True)
class Run:
    """Keys start <= kv_idx < stop that are multiplied at once, and the parts to be masked."""

    start: int
    stop: int
    masked: tuple[Interval, ...]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Strip:
    """Queries start <= q_idx < stop and the keys they visit."""

    start: int
    stop: int
    runs: tuple[Run, ...]

    @property
    def width(self) -> int:
        """Keys of all runs."""
        return sum(map(len, self.runs))


@dataclass(frozen=True, slots=True)
class Group:
    """Heads that share their strips.

    rows:    a range of (batch, key head) pairs, numbered b * kv_heads + kv_head.
    members: a range of the query heads of each key head.
    """

    rows: Interval
    members: Interval
    strips: tuple[Strip, ...]


def retiled(bound: BoundPlan) -> BoundPlan:
    """The same plan over strips of the height that suits it."""
    narrow = bound.retiled(NARROW)
    table = narrow.key_segments()
    if table is None:
        return narrow
    visited = (table.visit_hi - table.visit_lo).clamp(min=0).sum()
    strips = table.visit_lo[..., 0].numel() if table.visit_lo.shape[-1] else 1
    return bound.retiled(WIDE) if int(visited) > MANY * strips else narrow


def schedule(bound: BoundPlan) -> tuple[Group, ...]:
    """All strips of a bound plan, `bound.tile[0]` queries tall."""
    binding = bound.binding
    if 0 in (binding.batch, binding.heads, binding.q_len, binding.kv_len):
        return ()
    table = _by_lists(bound) if bound.plan.blocks is Blocks.LISTS else _by_ranges(bound)
    group = binding.heads // binding.kv_heads
    found = []
    for b, h, rows in table:
        strips = tuple(_strip(bound, number, *keys) for number, keys in enumerate(rows))
        whole = (b, b + 1) if b is not None else (0, binding.batch)
        if h is None:
            pairs = whole[0] * binding.kv_heads, whole[1] * binding.kv_heads
            found.append(Group(pairs, (0, group), strips))
            continue
        for one in range(*whole):
            at = one * binding.kv_heads + h // group
            found.append(Group((at, at + 1), (h % group, h % group + 1), strips))
    return tuple(found)


Keys = tuple[list[Interval], list[Interval]]
"""Visited and unmasked keys of one strip, in any order."""

Head = tuple[int | None, int | None, list[Keys]]
"""Batch and head, None for all of them, and the keys of each of its strips."""


def _by_ranges(bound: BoundPlan) -> Iterator[Head]:
    table = bound.key_segments()
    assert table is not None, "ranges were promised"
    count = table.visit_lo.shape[2]
    for b, h in _heads(bound, table.visit_lo):
        at = b or 0, h or 0
        yield b, h, [_segments(table, (*at, number)) for number in range(count)]


def _segments(table: SegmentTable, at: tuple[int, int, int]) -> Keys:
    return (
        _intervals(table.visit_lo[at], table.visit_hi[at]),
        _intervals(table.unmasked_lo[at], table.unmasked_hi[at]),
    )


def _intervals(lo: Tensor, hi: Tensor) -> list[Interval]:
    return [pair for pair in zip(lo.tolist(), hi.tolist(), strict=True) if pair[0] < pair[1]]


def _by_lists(bound: BoundPlan) -> Iterator[Head]:
    classes = bound.classify()
    block, kv_len = bound.tile[1], bound.binding.kv_len
    for b, h in _heads(bound, classes):
        rows = classes[b or 0, h or 0].tolist()
        yield b, h, [_classified(row, block, kv_len) for row in rows]


def _classified(row: list[int], block: int, kv_len: int) -> Keys:
    keys: Keys = ([], [])
    start = 0
    for kind, tiles in groupby(row):
        stop = start + sum(1 for _ in tiles)
        interval = start * block, min(stop * block, kv_len)
        if kind != EMPTY:
            keys[0].append(interval)
        if kind == FULL:
            keys[1].append(interval)
        start = stop
    return keys


def _heads(bound: BoundPlan, table: Tensor) -> Iterator[tuple[int | None, int | None]]:
    """(b, h) of each table row; None where one row is for all."""
    batch, heads = table.shape[:2]
    for b in range(batch):
        for h in range(heads):
            all_b = batch == 1 < bound.binding.batch
            all_h = heads == 1 < bound.binding.heads
            yield (None if all_b else b), (None if all_h else h)


def _strip(bound: BoundPlan, number: int, visit: list[Interval], unmasked: list[Interval]) -> Strip:
    start = number * bound.tile[0]
    stop = min(start + bound.tile[0], bound.binding.q_len)
    kv_len = bound.binding.kv_len
    visit = union([(_below(lo), min(aligned(hi), kv_len)) for lo, hi in visit], GAP)
    clear = union(list(_within(unmasked, kv_len)), 0)
    if bound.plan.mask == TRUE:
        clear = visit
    runs = (Run(lo, hi, tuple(_without(lo, hi, clear))) for lo, hi in visit)
    return Strip(start, stop, tuple(runs))


def _within(unmasked: list[Interval], kv_len: int) -> Iterator[Interval]:
    """What is left of intervals whose ends are aligned inwards."""
    for lo, hi in unmasked:
        inner = aligned(lo), hi if hi == kv_len else _below(hi)
        if inner[0] < inner[1]:
            yield inner


def aligned(keys: int) -> int:
    """Rounded up."""
    return -(-keys // ALIGNED) * ALIGNED


def _below(keys: int) -> int:
    return keys // ALIGNED * ALIGNED


def union(intervals: Sequence[Interval], gap: int) -> list[Interval]:
    """The same keys, sorted, with those that touch or lie fewer than `gap` apart joined."""
    joined: list[Interval] = []
    for lo, hi in sorted(intervals):
        if joined and lo <= joined[-1][1] + max(gap - 1, 0):
            joined[-1] = joined[-1][0], max(joined[-1][1], hi)
        else:
            joined.append((lo, hi))
    return joined


def _without(lo: int, hi: int, clear: list[Interval]) -> Iterator[Interval]:
    """The parts of lo..hi outside sorted intervals."""
    for start, stop in clear:
        if stop <= lo or start >= hi:
            continue
        if lo < start:
            yield lo, start
        lo = stop
    if lo < hi:
        yield lo, hi
