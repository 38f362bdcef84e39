"""Whether an expression only rises, or only falls, along one token axis: its ends bound it."""

from __future__ import annotations

from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, Const, Expr, Index, Load, Scalar, axes, kind
from attncc.ir.ops import Kind
from attncc.passes.facts import FACTS, Facts, positive_where

MAX_DEPTH = 60
"""Deeper expressions are not looked at."""


def direction(expr: Expr, axis: Axis, facts: Facts = FACTS, depth: int = MAX_DEPTH) -> int | None:
    """1 nondecreasing, -1 nonincreasing, 0 constant along the axis, None unknown.

    Only ints; remainders, bits, floats, and tensors read at the axis whose order is not known, are
    unknown.
    """
    if not axes(expr) & axis:
        return 0
    if depth == 0 or kind(expr) is not Kind.INT:
        return None
    match expr:
        case Index():
            return 1
        case Apply(ops.ADD | ops.MIN | ops.MAX, (x, y)):
            return _together(
                direction(x, axis, facts, depth - 1), direction(y, axis, facts, depth - 1)
            )
        case Apply(ops.SUB, (x, y)):
            falling = _times(-1, direction(y, axis, facts, depth - 1))
            return _together(direction(x, axis, facts, depth - 1), falling)
        case Apply(ops.NEG, (x,)):
            return _times(-1, direction(x, axis, facts, depth - 1))
        case Apply(ops.MUL, (x, y)):
            if not axes(x) & axis:
                x, y = y, x
            return _times(_sign(y, facts), direction(x, axis, facts, depth - 1))
        case Apply(ops.FLOORDIV, (x, y)):
            return _times(_sign(y, facts), direction(x, axis, facts, depth - 1))
        case Apply(ops.WHERE, (c, x, y)) if not axes(c) & axis:
            knowing = facts.knowing(positive_where(c))
            rises = direction(x, axis, knowing, depth - 1)
            return _together(rises, direction(y, axis, facts, depth - 1))
        case Load(_, (*outer, last)) if facts.rises(expr):
            moving = any(axes(index) & axis for index in outer)
            return None if moving else direction(last, axis, facts, depth - 1)
        case _:
            return None


def _together(x: int | None, y: int | None) -> int | None:
    """The direction of what rises with both."""
    if x is None or y is None or x * y < 0:
        return None
    return x or y


def _times(sign: int | None, of: int | None) -> int | None:
    return None if sign is None or of is None else sign * of


def _sign(expr: Expr, facts: Facts) -> int | None:
    """Of a factor or divisor: 1 positive or zero, -1 negative, None unknown or on a token axis."""
    if axes(expr) & (Axis.Q | Axis.KV):
        return None
    match expr:
        case Const(value):
            return 1 if value >= 0 else -1
        case Scalar():
            return 1 if facts.is_positive(expr) else None
        case _:
            return 1 if facts.nonnegative(expr) else None
