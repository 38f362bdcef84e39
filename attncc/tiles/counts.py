"""How many tiles are full, partial and empty, and the share of pairs that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.ir.expr import Axis
from attncc.tiles.grid import TileGrid
from attncc.tiles.segments import SegmentTable, union_size


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


def by_classes(grid: TileGrid, classes: Tensor) -> Counts:
    number = torch.bincount(classes.flatten().to(torch.int64), minlength=3) * grid.copies
    empty, partial, full = number.tolist()
    return Counts(full, partial, empty)


def by_ranges(grid: TileGrid, table: SegmentTable) -> Counts:
    """The same without a table of tiles, for key ranges that say all."""
    block, tiles = grid.block(Axis.KV), grid.tiles(Axis.KV)
    first = table.visit_lo // block
    past = torch.where(table.visit_hi > table.visit_lo, -(-table.visit_hi // block), first)
    visited = union_size(first, past)
    first = -(-table.unmasked_lo // block)
    past = torch.where(table.unmasked_hi >= grid.binding.kv_len, tiles, table.unmasked_hi // block)
    nonempty = table.unmasked_hi > table.unmasked_lo
    full = union_size(first, torch.where(nonempty, past, first))
    copies = grid.copies
    total = grid.binding.batch * grid.binding.heads * grid.tiles(Axis.Q) * tiles
    return Counts(full * copies, (visited - full) * copies, total - visited * copies)


def density(counts: Counts) -> Density:
    """All that the counts say."""
    return Density(counts.full / counts.total, 1 - counts.empty / counts.total)
