"""Choose where kernels get their tiles from: closed-form ranges or lists."""

from __future__ import annotations

from dataclasses import replace

from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, Const, Expr, Index, axes, kind
from attncc.ir.ops import Kind
from attncc.ir.plan import Blocks, Note, Plan, Ranges
from attncc.passes.linear import linear

SMALLEST_TILE = 64
"""Rows and keys of the smallest tile whose kernels are worth scheduling."""


def choose_blocks(plan: Plan) -> Plan:
    """RANGES where they say all, or all that a tile of 64 x 64 can tell; else LISTS."""
    ranges = (plan.key_ranges, plan.query_ranges)
    if all(r is not None and enough(r) for r in ranges):
        return replace(plan, blocks=Blocks.RANGES)
    note = Note("choose_blocks", "closed-form ranges leave tiles undecided: block lists")
    return replace(plan, blocks=Blocks.LISTS, notes=(*plan.notes, note))


def enough(ranges: Ranges) -> bool:
    """Whether no list would say more of tiles of 64 x 64."""
    if ranges.complete:
        return True
    return bool(ranges.left_out) and all(map(_fine_grained, ranges.left_out))


def _fine_grained(literal: Expr) -> bool:
    """x % d == r with a position of factor 1 in x and 1 < d <= 64: of as many neighbours some pair
    holds it and some does not, whatever the other terms of x."""
    match literal:
        case Apply(ops.EQ, (Apply(ops.MOD, (x, Const(d))), Const(r))) if kind(x) is Kind.INT:
            steps = [abs(f) for atom, f in linear(x).terms.items() if isinstance(atom, Index)]
            inner = [atom for atom in linear(x).terms if not isinstance(atom, Index)]
            apart = any(axes(atom) & (Axis.Q | Axis.KV) for atom in inner)
            return 1 < d <= SMALLEST_TILE and 0 <= r < d and 1 in steps and not apart
        case _:
            return False
