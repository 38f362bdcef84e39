"""Rules of sums, products, quotients, remainders and limits, of ints and floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attncc.ir import ops
from attncc.ir.expr import FALSE, Apply, Const, Expr, kind
from attncc.ir.ops import Kind, Op
from attncc.passes.interval_rules.interval import (
    INFINITY,
    NAN,
    ONE,
    WHOLE,
    ZERO,
    Interval,
    at_corners,
    both,
    choose,
    each,
    point,
)

if TYPE_CHECKING:
    from attncc.passes.intervals import Bounder


def add(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return each(on, ops.ADD, args)


def sub(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    return Interval(both(on, ops.SUB, x.lo, y.hi), both(on, ops.SUB, x.hi, y.lo))


def mul(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    if node.args[0] == node.args[1]:
        return _square(on, node, x)
    for one, two, factor in ((x, y, y.lo), (y, x, x.lo)):
        if two.exact and factor is not None and _never_negative(on, factor):
            return Interval(both(on, ops.MUL, one.lo, factor), both(on, ops.MUL, one.hi, factor))
    if x.lo and y.lo and _never_negative(on, x.lo) and _never_negative(on, y.lo):
        return each(on, ops.MUL, args)
    return at_corners(on, ops.MUL, x, y)


def _never_negative(on: Bounder, expr: Expr) -> bool:
    if isinstance(expr, Const):
        return bool(expr.value >= 0)
    return on.facts.nonnegative(expr)


def _square(on: Bounder, node: Apply, x: Interval) -> Interval:
    inside = absolute(on, node, [x])
    return each(on, ops.MUL, [inside, inside])


def absolute(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    (x,) = args
    if node.kind is Kind.FLOAT and (x.lo is None or x.hi is None):
        return WHOLE  # it may be nan, which is not even at least 0
    return magnitude(on, x)


def magnitude(on: Bounder, x: Interval) -> Interval:
    """abs(x): at least 0, x.lo and -x.hi; at most the larger of -x.lo and x.hi."""
    low: Expr = Const(0.0) if x.lo is not None and kind(x.lo) is Kind.FLOAT else ZERO
    below = None if x.hi is None else on.make(ops.NEG, x.hi)
    above = None if x.lo is None else on.make(ops.NEG, x.lo)
    for end in (x.lo, below):
        if end is not None:
            low = on.make(ops.MAX, low, end)
    return Interval(low, on.highest(above, x.hi))


def nonzero(on: Bounder, x: Interval) -> Expr:
    """That x has no zero on the tile."""
    above = FALSE if x.lo is None else on.make(ops.GT, x.lo, ZERO)
    below = FALSE if x.hi is None else on.make(ops.LT, x.hi, ZERO)
    return on.make(ops.OR, above, below)


def div(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    safe = nonzero(on, y)
    return choose(on, safe, at_corners(on, ops.DIV, x, y), point(NAN))


def floordiv(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    if node.kind is Kind.FLOAT:
        return _float_floordiv(on, x, y)
    if y.exact and y.lo is not None and on.facts.is_positive(y.lo):
        return Interval(both(on, ops.FLOORDIV, x.lo, y.lo), both(on, ops.FLOORDIV, x.hi, y.lo))
    corners = at_corners(on, ops.FLOORDIV, x, y)
    if y.exact:
        return corners
    largest = magnitude(on, x).hi
    if largest is None:
        return WHOLE
    return choose(on, nonzero(on, y), corners, Interval(on.make(ops.NEG, largest), largest))


def _float_floordiv(on: Bounder, x: Interval, y: Interval) -> Interval:
    """One is given on each side, since x // y jumps where the last bit of x / y decides."""
    corners = at_corners(on, ops.FLOORDIV, x, y)
    if corners.lo is None or corners.hi is None:
        return WHOLE
    wider = Interval(on.make(ops.SUB, corners.lo, ONE), on.make(ops.ADD, corners.hi, ONE))
    safe = on.make(ops.AND, bounded(on, corners.lo, corners.hi), nonzero(on, y))
    return choose(on, safe, wider, point(NAN))


def mod(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """x % y is in [0, y) or (y, 0]; it is x - y * q while the quotient q stands still."""
    x, y = args
    if y.lo is None or y.hi is None:
        return WHOLE
    if node.kind is Kind.FLOAT:
        return _float_mod(on, x, y)
    positive = y.exact and on.facts.is_positive(y.lo)
    low = ZERO if positive else on.make(ops.MIN, on.make(ops.ADD, y.lo, ONE), ZERO)
    top = on.make(ops.SUB, y.hi, ONE)
    loose = Interval(low, top if positive else on.make(ops.MAX, top, ZERO))
    if x.lo is None or x.hi is None:
        return loose
    quotients = [on.make(ops.FLOORDIV, end, y.lo) for end in (x.lo, x.hi)]
    steady = on.make(ops.EQ, *quotients)
    if not y.exact:
        steady = on.make(ops.AND, on.make(ops.EQ, y.lo, y.hi), steady)
    inside = Interval(on.make(ops.MOD, x.lo, y.lo), on.make(ops.MOD, x.hi, y.lo))
    return choose(on, steady, inside, loose)


def _float_mod(on: Bounder, x: Interval, y: Interval) -> Interval:
    """Rounding may reach y itself; of inf, of nan and by 0 it is nan."""
    if x.lo is None or x.hi is None or y.lo is None or y.hi is None:
        return WHOLE
    zero = Const(0.0)
    inside = Interval(on.make(ops.MIN, y.lo, zero), on.make(ops.MAX, y.hi, zero))
    safe = on.make(ops.AND, bounded(on, x.lo, x.hi), nonzero(on, y))
    return choose(on, safe, inside, point(NAN))


def bounded(on: Bounder, low: Expr, high: Expr) -> Expr:
    """That two float bounds are finite; false where one is nan."""
    return on.make(ops.LT, on.make(ops.SUB, high, low), INFINITY)


def smaller(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    return Interval(both(on, ops.MIN, x.lo, y.lo), _either(on, ops.MIN, node, x.hi, y.hi))


def larger(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    return Interval(_either(on, ops.MAX, node, x.lo, y.lo), both(on, ops.MAX, x.hi, y.hi))


def _either(on: Bounder, op: Op, node: Apply, x: Expr | None, y: Expr | None) -> Expr | None:
    """The limit that is known; of floats both must be, since the other may be nan."""
    if x is None or y is None:
        return (y if x is None else x) if node.kind is Kind.INT else None
    return on.make(op, x, y)
