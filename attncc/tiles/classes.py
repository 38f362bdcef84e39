"""Which tiles are full, partial or empty, by the ranges and the tile test of a Plan."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attncc.ir.evaluate import evaluate_unchecked
from attncc.ir.expr import Axis
from attncc.ir.plan import Blocks, Plan
from attncc.tiles.grid import TileGrid
from attncc.tiles.segments import SegmentTable
from attncc.tiles.summaries import summaries

EMPTY, PARTIAL, FULL = 0, 1, 2

CHUNK = 2**20
"""Cells of the grid evaluated at once; 8 MiB for each live int64 value."""


def classify(plan: Plan, grid: TileGrid, table: SegmentTable | None) -> Tensor:
    """int8 [B|1, H|1, q_tiles, kv_tiles]; table: the key ranges, where there are any."""
    shape = (*grid.outer, grid.tiles(Axis.Q), grid.tiles(Axis.KV))
    result = torch.empty(shape, dtype=torch.int8, device=grid.binding.device)
    listed = plan.blocks is Blocks.LISTS
    ends = summaries(grid, plan.tiles.summaries) if listed else {}
    rows = max(1, CHUNK // max(1, shape[0] * shape[1] * shape[3]))
    for start in range(0, shape[2], rows):
        part = slice(start, min(start + rows, shape[2]))
        full, some = _by_ranges(grid, table, part)
        if listed:
            env = grid.over(part, ends)
            full = full | evaluate_unchecked(plan.tiles.must, env)
            some = some & evaluate_unchecked(plan.tiles.may, env)
        result[:, :, part] = of_verdicts(full & some, some)
    return result


def of_verdicts(full: Tensor, some: Tensor) -> Tensor:
    """int8 classes: whether each tile keeps every pair, and whether it keeps any."""
    return torch.where(full, FULL, torch.where(some, PARTIAL, EMPTY)).to(torch.int8)


def _by_ranges(grid: TileGrid, table: SegmentTable | None, rows: slice) -> tuple[Tensor, Tensor]:
    """(surely full, perhaps not empty) by the key ranges alone."""
    full = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=grid.binding.device)
    if table is None:
        return full, ~full
    ends = grid.ends(Axis.KV)
    low, last = (ends[name].view(1, 1, 1, -1) for name in ("kv_lo", "kv_last"))
    some = full
    for lo, hi in _columns(table.visit_lo, table.visit_hi, rows):
        some = some | ((lo <= last) & (hi > low) & (lo < hi))
    for lo, hi in _columns(table.unmasked_lo, table.unmasked_hi, rows):
        full = full | ((lo <= low) & (hi > last))
    return full, some


def _columns(lo: Tensor, hi: Tensor, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """(lo, hi) of each segment as [B|1, H|1, rows, 1]."""
    for i in range(lo.shape[-1]):
        yield lo[:, :, rows, i, None], hi[:, :, rows, i, None]
