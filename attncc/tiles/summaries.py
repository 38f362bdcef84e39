"""What the tile test reads of one token axis: each expression's ends on every tile."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attncc.ir.evaluate import evaluate_unchecked
from attncc.ir.expr import Expr
from attncc.ir.ops import Kind
from attncc.ir.plan import Summary
from attncc.passes.intervals import RELATIVE, TINY
from attncc.passes.precision import same_in_any_dtype
from attncc.tiles.grid import TileGrid


def summaries(grid: TileGrid, wanted: Iterable[Summary]) -> dict[str, Tensor]:
    """The minimum and the maximum of every summary, by tensor name."""
    found: dict[str, Tensor] = {}
    for summary in wanted:
        found[summary.low.name], found[summary.high.name] = _summarised(grid, summary)
    return found


def _summarised(grid: TileGrid, summary: Summary) -> tuple[Tensor, Tensor]:
    axis = summary.axis
    tiles, block = grid.tiles(axis), grid.block(axis)
    # A ragged last tile repeats its last position.
    positions = grid.arange(tiles * block).clamp(max=grid.length(axis) - 1)
    env = grid.env({**grid.sequences_and_heads(3), f"{grid.name(axis)}_idx": positions})
    value = evaluate_unchecked(summary.expr, env)
    outer = tuple(
        size if dim != 1 else 1 for size, dim in zip(grid.outer, summary.low.dims[:2], strict=True)
    )
    values = value.expand(*outer, tiles * block).reshape(*outer, tiles, block)
    match summary.low.kind:
        case Kind.BOOL:
            return values.all(3), values.any(3)
        case Kind.INT:
            return _ends(values)
        case Kind.FLOAT:
            return _float_ends(grid, summary.expr, values)


def _float_ends(grid: TileGrid, expr: Expr, values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _ends(values)
    exact = same_in_any_dtype(expr) and not any(
        tensor.dtype == torch.float64 for tensor in grid.binding.tensors.values()
    )
    if not exact:
        low = low - (low.abs() * RELATIVE + TINY)
        high = high + (high.abs() * RELATIVE + TINY)
    unknown = values.isnan().any(3)
    return low.masked_fill(unknown, -torch.inf), high.masked_fill(unknown, torch.inf)


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    if values.numel() == 0:
        return values.new_zeros(values.shape[:3]), values.new_zeros(values.shape[:3])
    return values.amin(3), values.amax(3)
