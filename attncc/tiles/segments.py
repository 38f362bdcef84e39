"""Key and query ranges of a Plan, evaluated at every tile of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Axis, Expr
from attncc.ir.plan import Ranges, Segment
from attncc.tiles.grid import TileGrid


@dataclass(frozen=True)
class SegmentTable:
    """Evaluated Ranges: int64 [B|1, H|1, tiles, segments], in positions; empty where hi <= lo."""

    visit_lo: Tensor
    visit_hi: Tensor
    unmasked_lo: Tensor
    unmasked_hi: Tensor

    def cpu(self) -> SegmentTable:
        return SegmentTable(
            self.visit_lo.cpu(), self.visit_hi.cpu(), self.unmasked_lo.cpu(), self.unmasked_hi.cpu()
        )

    def merged(self) -> SegmentTable:
        """The same, with unmasked segments that touch joined: a tile lies in one or in none."""
        lo, hi = _merged(self.unmasked_lo, self.unmasked_hi)
        return SegmentTable(self.visit_lo, self.visit_hi, lo, hi)


Found = Mapping[str, Tensor]
"""What searches found, by name."""


def evaluated(grid: TileGrid, ranges: Ranges, axis: Axis, found: Found) -> SegmentTable:
    """The ranges of every tile along an axis: of keys along Q, of queries along KV."""
    return _evaluated(grid, ranges, grid.ends(axis), found)


def by_work(grid: TileGrid, ranges: Ranges, found: Found) -> Tensor:
    """int32 [B|1, H|1, tiles]: the query tiles, those that visit most key tiles first."""
    env = grid.env({**grid.sequences_and_heads(3), **grid.ends(Axis.Q)}, found)
    lo, hi = _stack(ranges.visit, env, (*grid.outer, grid.tiles(Axis.Q)))
    block = grid.block(Axis.KV)
    visited = ((hi + (block - 1)) // block - lo // block).clamp(min=0).sum(-1)
    return visited.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def kept_pairs(grid: TileGrid, ranges: Ranges, found: Found) -> int:
    """Pairs in the key ranges of single rows, which are complete."""
    rows = grid.arange(grid.binding.q_len)
    table = _evaluated(grid, ranges, {"q_lo": rows, "q_last": rows, "q_idx": rows}, found)
    return union_size(table.unmasked_lo, torch.maximum(table.unmasked_hi, table.unmasked_lo))


def _evaluated(
    grid: TileGrid, ranges: Ranges, ends: Mapping[str, Tensor], found: Found
) -> SegmentTable:
    env = grid.env({**grid.sequences_and_heads(3), **ends}, found)
    count = next(iter(ends.values())).numel()
    parts = (ranges.visit, ranges.unmasked)
    values = [_stack(segments, env, (*grid.outer, count)) for segments in parts]
    return SegmentTable(*values[0], *values[1])


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


def _merged(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
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


def union_size(lo: Tensor, hi: Tensor) -> int:
    """How many integers the unions [lo, hi) along the last axis hold, over all rows."""
    lo, order = lo.sort(-1)
    hi = hi.gather(-1, order)
    reached = torch.zeros_like(lo[..., 0]) if lo.shape[-1] else lo.sum(-1)
    total = torch.zeros_like(reached)
    for i in range(lo.shape[-1]):
        total += (hi[..., i] - torch.maximum(lo[..., i], reached)).clamp(min=0)
        reached = torch.maximum(reached, hi[..., i])
    return int(total.sum())
