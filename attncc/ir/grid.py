"""Coordinates of a token on an N-D grid, row-major with the slowest axis first."""

from __future__ import annotations

from attncc.ir import ops
from attncc.ir.expr import Expr, apply
from attncc.ir.program import GridAxis


def coordinate(grid: tuple[GridAxis, ...], name: str, index: Expr) -> Expr:
    """index // (sizes of the faster axes) % size; the slowest axis takes no modulo.

    So tokens past the grid's end lie at larger coordinates of the slowest axis.
    """
    at = next(i for i, axis in enumerate(grid) if axis.name == name)
    result = index
    stride: Expr | None = None
    for axis in grid[at + 1 :]:
        stride = axis.size if stride is None else apply(ops.MUL, stride, axis.size)
    if stride is not None:
        result = apply(ops.FLOORDIV, result, stride)
    return apply(ops.MOD, result, grid[at].size) if at > 0 else result
