"""A BoundPlan: a Plan for the lengths and arguments of one call, as counts and lists of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attncc.binding import Binding
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Axis, Expr, axes
from attncc.ir.ops import Kind
from attncc.ir.plan import Blocks, Plan, Ranges, Segment, Summary
from attncc.passes.intervals import RELATIVE, TINY
from attncc.passes.precision import same_in_any_dtype

EMPTY, PARTIAL, FULL = 0, 1, 2

CHUNK = 2**20
"""Cells of the grid evaluated at once; 8 MiB for each live int64 value."""
AFFORDABLE = 2**25
"""Pairs that `density` evaluates one by one where it must; about a second on 2 cores."""


@dataclass(frozen=True)
class Counts:
    """Tiles summed over batch and heads."""

    full: int
    partial: int
    empty: int

    @property
    def total(self) -> int:
        return self.full + self.partial + self.empty


@dataclass(frozen=True)
class Density:
    """Kept pairs over all pairs: between low and high, which are equal where it is exact."""

    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    def __float__(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class TileLists:
    """Which tiles each row of tiles visits; [B|1, H|1]: 1 where nothing varies with b (or h).

    index: [B|1, H|1, rows, capacity] int16 (int32 above 32767 tiles): full tiles ascending from
    the front of a row, partial ones ascending at the back.
    full_count, partial_count: [B|1, H|1, rows] int32.
    """

    index: Tensor
    full_count: Tensor
    partial_count: Tensor


@dataclass(frozen=True)
class SegmentTable:
    """Evaluated Ranges: int64 [B|1, H|1, tiles, segments], in positions; empty where hi <= lo."""

    visit_lo: Tensor
    visit_hi: Tensor
    unmasked_lo: Tensor
    unmasked_hi: Tensor


@dataclass(frozen=True)
class BoundPlan:
    """Cheap to make; everything is worked out when first asked for, and kept.

    tile: rows and keys of a tile, (BLOCK_M, BLOCK_N).
    """

    plan: Plan
    binding: Binding
    tile: tuple[int, int]

    @property
    def q_tiles(self) -> int:
        return -(-self.binding.q_len // self.tile[0])

    @property
    def kv_tiles(self) -> int:
        return -(-self.binding.kv_len // self.tile[1])

    def retiled(self, tile: tuple[int, int]) -> BoundPlan:
        """The same call over other tiles; one object for equal tiles."""
        if tile == self.tile:
            return self
        if tile not in self._others:
            self._others[tile] = BoundPlan(self.plan, self.binding, tile)
        return self._others[tile]

    @cached_property
    def _others(self) -> dict[tuple[int, int], BoundPlan]:
        return {}

    @cached_property
    def kept(self) -> dict[str, object]:
        """What backends make of it once and keep, each under a name of its own."""
        return {}

    # -- classification

    def classify(self) -> Tensor:
        """int8 [B|1, H|1, q_tiles, kv_tiles]: EMPTY, PARTIAL or FULL, on the binding's device."""
        return self._classes

    @cached_property
    def _classes(self) -> Tensor:
        shape = (*self._grid_shape, self.q_tiles, self.kv_tiles)
        result = torch.empty(shape, dtype=torch.int8, device=self.binding.device)
        rows = max(1, CHUNK // max(1, shape[0] * shape[1] * shape[3]))
        for start in range(0, self.q_tiles, rows):
            part = slice(start, min(start + rows, self.q_tiles))
            result[:, :, part] = self._classified(part)
        return result

    def _classified(self, rows: slice) -> Tensor:
        full, some = self._by_ranges(rows)
        if self.plan.blocks is Blocks.LISTS:
            env = self._grid_env(rows)
            full = full | evaluate_unchecked(self.plan.tiles.must, env)
            some = some & evaluate_unchecked(self.plan.tiles.may, env)
        return torch.where(full & some, FULL, torch.where(some, PARTIAL, EMPTY)).to(torch.int8)

    def _by_ranges(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(surely full, perhaps not empty) by the key ranges alone."""
        ends = self._tile_ends(Axis.KV)
        low, last = (ends[name].view(1, 1, 1, -1) for name in ("kv_lo", "kv_last"))
        full = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.binding.device)
        if self.plan.key_ranges is None:
            return full, ~full
        table = self._key_table
        some = full
        for lo, hi in _columns(table.visit_lo, table.visit_hi, rows):
            some = some | ((lo <= last) & (hi > low) & (lo < hi))
        for lo, hi in _columns(table.unmasked_lo, table.unmasked_hi, rows):
            full = full | ((lo <= low) & (hi > last))
        return full, some

    @cached_property
    def _grid_shape(self) -> tuple[int, int]:
        varies = axes(self.plan.mask)
        return (
            self.binding.batch if varies & Axis.B else 1,
            self.binding.heads if varies & Axis.H else 1,
        )

    # -- lists

    def key_lists(self) -> TileLists:
        """Per query tile, its key tiles; a ragged last key tile counts as partial."""
        return self._key_lists

    def query_lists(self) -> TileLists:
        """Per key tile, its query tiles."""
        return self._query_lists

    @cached_property
    def _key_lists(self) -> TileLists:
        classes = self.classify()
        if self.binding.kv_len % self.tile[1]:
            classes = classes.clone()
            classes[..., -1].clamp_(max=PARTIAL)
        return _lists(classes)

    @cached_property
    def _query_lists(self) -> TileLists:
        return _lists(self.classify().transpose(2, 3))

    def work_order(self, lists: TileLists) -> Tensor:
        """int32 [B|1, H|1, rows]: rows of tiles by how many they visit, most first; stable."""
        work = lists.full_count + lists.partial_count
        return work.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    # -- ranges

    def key_segments(self) -> SegmentTable | None:
        """The evaluated key ranges of every query tile, on the CPU; None where there are none."""
        if self.plan.key_ranges is None:
            return None
        return _on_cpu(self._key_table)

    def query_segments(self) -> SegmentTable | None:
        """The evaluated query ranges of every key tile, on the CPU; None where there are none."""
        if self.plan.query_ranges is None:
            return None
        return _on_cpu(self._table(self.plan.query_ranges, Axis.KV))

    @cached_property
    def _key_table(self) -> SegmentTable:
        assert self.plan.key_ranges is not None
        table = self._table(self.plan.key_ranges, Axis.Q)
        lo, hi = _merged(table.unmasked_lo, table.unmasked_hi)
        return SegmentTable(table.visit_lo, table.visit_hi, lo, hi)

    def _table(self, ranges: Ranges, axis: Axis) -> SegmentTable:
        return self._evaluated(ranges, self._tile_ends(axis))

    def _evaluated(self, ranges: Ranges, ends: Mapping[str, Tensor]) -> SegmentTable:
        env = self._env({**self._outer(3), **ends})
        count = next(iter(ends.values())).numel()
        parts = (ranges.visit, ranges.unmasked)
        values = [_stack(segments, env, (*self._grid_shape, count)) for segments in parts]
        return SegmentTable(*values[0], *values[1])

    # -- counts

    @cached_property
    def counts(self) -> Counts:
        """Tiles of each class, summed over batch and heads; O(tiles of one axis) for ranges."""
        if self.plan.blocks is Blocks.RANGES:
            return self._counts_by_ranges()
        return self._counted(self.classify())

    def _counts_by_ranges(self) -> Counts:
        table = self._key_table
        block, tiles = self.tile[1], self.kv_tiles
        first = table.visit_lo // block
        past = torch.where(table.visit_hi > table.visit_lo, -(-table.visit_hi // block), first)
        visited = _union_size(first, past)
        first = -(-table.unmasked_lo // block)
        past = torch.where(
            table.unmasked_hi >= self.binding.kv_len, tiles, table.unmasked_hi // block
        )
        nonempty = table.unmasked_hi > table.unmasked_lo
        full = _union_size(first, torch.where(nonempty, past, first))
        copies = self._copies
        total = self.binding.batch * self.binding.heads * self.q_tiles * tiles
        return Counts(full * copies, (visited - full) * copies, total - visited * copies)

    def _counted(self, classes: Tensor) -> Counts:
        number = torch.bincount(classes.flatten().to(torch.int64), minlength=3) * self._copies
        empty, partial, full = number.tolist()
        return Counts(full, partial, empty)

    @property
    def _copies(self) -> int:
        """How many (b, h) share one row of the grid."""
        batch, heads = self._grid_shape
        return (self.binding.batch // max(batch, 1)) * (self.binding.heads // max(heads, 1))

    def exact_counts(self) -> Counts:
        """Tier 3: the counts after evaluating every pair of the partial tiles; O(pairs)."""
        return self._counted(self._refined)

    @cached_property
    def _refined(self) -> Tensor:
        result = self.classify().clone()
        for at, keep, valid in self._partial_tiles():
            some, every = keep.any((1, 2)), (keep | ~valid).all((1, 2))
            exact = torch.where(every, FULL, torch.where(some, PARTIAL, EMPTY))
            result[at] = exact.to(torch.int8)
        return result

    def _partial_tiles(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
        """(b, h, query tile, key tile) of some partial tiles [n], which of their pairs
        [n, BLOCK_M, BLOCK_N] are kept, and which lie within the lengths."""
        block_m, block_n = self.tile
        where = (self.classify() == PARTIAL).nonzero()
        rows = torch.arange(block_m, device=where.device).view(1, -1, 1)
        keys = torch.arange(block_n, device=where.device).view(1, 1, -1)
        for part in torch.split(where, max(1, CHUNK // (4 * block_m * block_n))):
            b, h, q_tile, kv_tile = part.unbind(1)
            q_idx = q_tile.view(-1, 1, 1) * block_m + rows
            kv_idx = kv_tile.view(-1, 1, 1) * block_n + keys
            valid = (q_idx < self.binding.q_len) & (kv_idx < self.binding.kv_len)
            positions = {
                **self._heads(b.view(-1, 1, 1), h.view(-1, 1, 1)),
                "q_idx": q_idx.clamp(max=self.binding.q_len - 1),
                "kv_idx": kv_idx.clamp(max=self.binding.kv_len - 1),
            }
            keep = evaluate_unchecked(self.plan.mask, self._env(positions)) & valid
            yield (b, h, q_tile, kv_tile), keep, valid

    @cached_property
    def density(self) -> Density:
        """Exact from ranges that say all, or where there are few pairs; else bounds from counts."""
        binding = self.binding
        pairs = self._grid_shape[0] * self._grid_shape[1] * binding.q_len * binding.kv_len
        if pairs == 0:
            return Density(0.0, 0.0)
        if self.plan.key_ranges is not None and self.plan.key_ranges.complete:
            kept = self._kept_by_ranges(self.plan.key_ranges)
            return Density(kept / pairs, kept / pairs)
        if pairs <= AFFORDABLE:
            kept = self._kept_by_tiles()
            return Density(kept / pairs, kept / pairs)
        counts = self.counts
        return Density(counts.full / counts.total, 1 - counts.empty / counts.total)

    def _kept_by_tiles(self) -> int:
        """Pairs in full tiles, and those kept in partial ones."""
        rows, keys = (self._lengths_of_tiles(axis) for axis in (Axis.Q, Axis.KV))
        full = (self.classify() == FULL) * rows[:, None] * keys
        return int(full.sum()) + sum(int(keep.sum()) for _, keep, _ in self._partial_tiles())

    def _lengths_of_tiles(self, axis: Axis) -> Tensor:
        name = self._along(axis)[0]
        ends = self._tile_ends(axis)
        return ends[f"{name}_last"] - ends[f"{name}_lo"] + 1

    def _kept_by_ranges(self, ranges: Ranges) -> int:
        """Pairs in the ranges of single rows."""
        rows = self._arange(self.binding.q_len)
        table = self._evaluated(ranges, {"q_lo": rows, "q_last": rows, "q_idx": rows})
        return _union_size(table.unmasked_lo, torch.maximum(table.unmasked_hi, table.unmasked_lo))

    # -- environments

    def _env(
        self, positions: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None
    ) -> Env:
        return Env(
            positions,
            self.binding.scalars,
            {**self.binding.tensors, **(more or {})},
            dtype=torch.float64,
            device=self.binding.device,
        )

    def _arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.binding.device)

    def _outer(self, rank: int) -> dict[str, Tensor]:
        """b along the first of `rank` axes, h and kv_head along the second."""
        batch, heads = self._grid_shape
        ones = [1] * (rank - 2)
        return self._heads(
            self._arange(batch).view(-1, 1, *ones), self._arange(heads).view(1, -1, *ones)
        )

    def _heads(self, b: Tensor, h: Tensor) -> dict[str, Tensor]:
        group = max(1, self.binding.heads // max(1, self.binding.kv_heads))
        return {"b": b, "h": h, "kv_head": h // group}

    def _tile_ends(self, axis: Axis) -> dict[str, Tensor]:
        """First and last position, and number, of each tile along an axis."""
        name, tiles, block, length = self._along(axis)
        number = self._arange(tiles)
        low = number * block
        last = (low + block).clamp(max=length) - 1
        return {f"{name}_lo": low, f"{name}_last": last, f"{name}_tile": number}

    def _along(self, axis: Axis) -> tuple[str, int, int, int]:
        if axis is Axis.Q:
            return "q", self.q_tiles, self.tile[0], self.binding.q_len
        return "kv", self.kv_tiles, self.tile[1], self.binding.kv_len

    def _grid_env(self, rows: slice) -> Env:
        positions = self._outer(4)
        for axis, shape in ((Axis.Q, (1, 1, -1, 1)), (Axis.KV, (1, 1, 1, -1))):
            for name, value in self._tile_ends(axis).items():
                part = value[rows] if axis is Axis.Q else value
                positions[name] = part.view(shape)
        return self._env(positions, self._summaries)

    # -- summaries

    @cached_property
    def _summaries(self) -> dict[str, Tensor]:
        """Every summary of the tile test: its minimum and its maximum, by tensor name."""
        found: dict[str, Tensor] = {}
        for summary in self.plan.tiles.summaries:
            low, high = self._summarised(summary)
            found[summary.low.name] = low
            found[summary.high.name] = high
        return found

    def _summarised(self, summary: Summary) -> tuple[Tensor, Tensor]:
        name, tiles, block, length = self._along(summary.axis)
        # A ragged last tile repeats its last position.
        positions = self._arange(tiles * block).clamp(max=length - 1)
        env = self._env({**self._outer(3), f"{name}_idx": positions})
        value = evaluate_unchecked(summary.expr, env)
        shape = tuple(
            size if dim != 1 else 1
            for size, dim in zip(self._grid_shape, summary.low.dims[:2], strict=True)
        )
        grid = value.expand(*shape, tiles * block).reshape(*shape, tiles, block)
        match summary.low.kind:
            case Kind.BOOL:
                return grid.all(3), grid.any(3)
            case Kind.INT:
                return _ends(grid)
            case Kind.FLOAT:
                return self._float_ends(summary.expr, grid)

    def _float_ends(self, expr: Expr, grid: Tensor) -> tuple[Tensor, Tensor]:
        low, high = _ends(grid)
        exact = same_in_any_dtype(expr) and not any(
            tensor.dtype == torch.float64 for tensor in self.binding.tensors.values()
        )
        if not exact:
            low = low - (low.abs() * RELATIVE + TINY)
            high = high + (high.abs() * RELATIVE + TINY)
        unknown = grid.isnan().any(3)
        return low.masked_fill(unknown, -torch.inf), high.masked_fill(unknown, torch.inf)


def _ends(grid: Tensor) -> tuple[Tensor, Tensor]:
    if grid.numel() == 0:
        return grid.new_zeros(grid.shape[:3]), grid.new_zeros(grid.shape[:3])
    return grid.amin(3), grid.amax(3)


def _stack(
    segments: tuple[Segment, ...], env: Env, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(lo, hi) of all segments along a new last axis."""

    def values(end: Callable[[Segment], Expr]) -> Tensor:
        found = [evaluate_unchecked(end(s), env).expand(shape) for s in segments]
        if not found:
            return torch.zeros((*shape, 0), dtype=torch.int64, device=env.device)
        return torch.stack(found, -1)

    return values(lambda segment: segment.lo), values(lambda segment: segment.hi)


def _columns(lo: Tensor, hi: Tensor, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """(lo, hi) of each segment as [B|1, H|1, rows, 1]."""
    for i in range(lo.shape[-1]):
        yield lo[:, :, rows, i, None], hi[:, :, rows, i, None]


def _on_cpu(table: SegmentTable) -> SegmentTable:
    return SegmentTable(
        table.visit_lo.cpu(), table.visit_hi.cpu(), table.unmasked_lo.cpu(), table.unmasked_hi.cpu()
    )


def _merged(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """The same unions with touching segments joined, so that a tile lies in one or in none."""
    nonempty = hi > lo
    lo, order = torch.where(nonempty, lo, 0).sort(dim=-1, stable=True)
    hi = torch.where(nonempty, hi, 0).gather(-1, order)
    los, his = list(lo.unbind(-1)), list(hi.unbind(-1))
    for i in range(1, len(los)):
        joins = (los[i] <= his[i - 1]) & (his[i - 1] > los[i - 1]) & (his[i] > los[i])
        los[i] = torch.where(joins, los[i - 1], los[i])
        his[i] = torch.where(joins, torch.maximum(his[i - 1], his[i]), his[i])
        his[i - 1] = torch.where(joins, los[i - 1], his[i - 1])
    if not los:
        return lo, hi
    return torch.stack(los, -1), torch.stack(his, -1)


def _union_size(lo: Tensor, hi: Tensor) -> int:
    """How many integers the unions [lo, hi) along the last axis hold, over all rows."""
    lo, order = lo.sort(-1)
    hi = hi.gather(-1, order)
    reached = torch.zeros_like(lo[..., 0]) if lo.shape[-1] else lo.sum(-1)
    total = torch.zeros_like(reached)
    for i in range(lo.shape[-1]):
        total += (hi[..., i] - torch.maximum(lo[..., i], reached)).clamp(min=0)
        reached = torch.maximum(reached, hi[..., i])
    return int(total.sum())


def _lists(classes: Tensor) -> TileLists:
    """Full tiles first and partial ones last: one sort of keys that order each row so."""
    capacity = classes.shape[-1]
    classes = classes.contiguous()  # kernels step through rows of the results
    number = torch.arange(capacity, dtype=torch.int32, device=classes.device)
    group = torch.where(classes == FULL, 0, torch.where(classes == EMPTY, 1, 2)).to(torch.int32)
    index = (group * capacity + number).sort(-1).values % max(capacity, 1)
    dtype = torch.int16 if capacity <= 32767 else torch.int32
    return TileLists(
        index.to(dtype),
        (classes == FULL).sum(-1, dtype=torch.int32),
        (classes == PARTIAL).sum(-1, dtype=torch.int32),
    )
