"""A BoundPlan: a Plan for the lengths and arguments of one call, at one size of tiles."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from attncc.binding import Binding
from attncc.ir.expr import Axis
from attncc.ir.plan import Blocks, Plan
from attncc.searches import Found
from attncc.tiles import classes, counts, pairs, segments
from attncc.tiles.counts import Counts, Density
from attncc.tiles.grid import TileGrid
from attncc.tiles.segments import SegmentTable


@dataclass(frozen=True)
class BoundPlan:
    """Cheap to make; everything is worked out when first asked for, and kept.

    tile: rows and keys of a tile, (BLOCK_M, BLOCK_N).
    """

    plan: Plan
    binding: Binding
    tile: tuple[int, int]
    searched: Found | None = field(default=None, kw_only=True, compare=False, repr=False)
    """What plans over other tiles share."""

    @property
    def q_tiles(self) -> int:
        return self._grid.tiles(Axis.Q)

    @property
    def kv_tiles(self) -> int:
        return self._grid.tiles(Axis.KV)

    def retiled(self, tile: tuple[int, int]) -> BoundPlan:
        """The same call over other tiles; one object for equal tiles."""
        if tile == self.tile:
            return self
        if tile not in self._others:
            self._others[tile] = BoundPlan(self.plan, self.binding, tile, searched=self._searched)
        return self._others[tile]

    @cached_property
    def _others(self) -> dict[tuple[int, int], BoundPlan]:
        return {}

    @cached_property
    def kept(self) -> dict[Hashable, object]:
        """What backends make of it once and keep, each under keys of its own."""
        return {}

    @cached_property
    def _searched(self) -> Found:
        return self.searched or Found(self.plan, self.binding)

    @property
    def found(self) -> Mapping[str, Tensor]:
        """What the plan's searches find, by name; on the binding's device, no host sync."""
        return self._searched.tensors

    @cached_property
    def _grid(self) -> TileGrid:
        return TileGrid(self.binding, self.tile, self.plan.mask)

    def classify(self) -> Tensor:
        """int8 [B|1, H|1, q_tiles, kv_tiles]: EMPTY, PARTIAL or FULL, on the binding's device."""
        return self._classes

    @cached_property
    def _classes(self) -> Tensor:
        return classes.classify(self.plan, self._grid, self._key_table)

    def key_segments(self) -> SegmentTable | None:
        """The evaluated key ranges of every query tile, on the CPU; None where there are none."""
        return None if self._key_table is None else self._key_table.cpu()

    @cached_property
    def _key_table(self) -> SegmentTable | None:
        ranges = self.plan.key_ranges
        if ranges is None:
            return None
        return segments.evaluated(self._grid, ranges, Axis.Q, self.found).merged()

    @cached_property
    def query_order(self) -> Tensor:
        """int32 [B|1, H|1, q_tiles]: query tiles by their key ranges, longest first."""
        ranges = self.plan.key_ranges
        assert ranges is not None
        return segments.by_work(self._grid, ranges, self.found)

    @cached_property
    def counts(self) -> Counts:
        """Tiles of each class, summed over batch and heads; O(tiles of one axis) for ranges."""
        if self.plan.blocks is Blocks.RANGES and self._key_table is not None:
            return counts.by_ranges(self._grid, self._key_table)
        return counts.by_classes(self._grid, self.classify())

    def exact_counts(self) -> Counts:
        """Tier 3: the counts after evaluating every pair of the partial tiles; O(pairs)."""
        return counts.by_classes(self._grid, self._refined)

    def exact_classes(self) -> Tensor:
        """Tier 3: `classify` after the same."""
        return self._refined

    @cached_property
    def _refined(self) -> Tensor:
        return pairs.refined(self._grid, self.classify())

    @cached_property
    def density(self) -> Density:
        """Exact from ranges that say all, or where there are few pairs; else bounds from counts."""
        grid, ranges = self._grid, self.plan.key_ranges
        if grid.pairs == 0:
            return Density(0.0, 0.0)
        if ranges is not None and ranges.complete:
            kept = segments.kept_pairs(grid, ranges, self.found)
        elif grid.pairs <= pairs.AFFORDABLE:
            kept = pairs.kept(grid, self.classify())
        else:
            return counts.density(self.counts)
        return Density(kept / grid.pairs, kept / grid.pairs)
