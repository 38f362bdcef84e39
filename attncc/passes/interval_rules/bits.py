"""Rules of operators on the bits of ints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr
from attncc.ir.ops import Op
from attncc.passes.interval_rules.arithmetic import magnitude
from attncc.passes.interval_rules.interval import (
    ONE,
    WHOLE,
    ZERO,
    Interval,
    at_corners,
    choose,
    point,
    rising,
)

if TYPE_CHECKING:
    from attncc.passes.intervals import Bounder


def bitwise(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """Exact where both arguments are one number; else by size, tighter where none is negative."""
    x, y = args
    if x.lo is None or x.hi is None or y.lo is None or y.hi is None:
        return WHOLE
    single = on.make(ops.AND, on.make(ops.EQ, x.lo, x.hi), on.make(ops.EQ, y.lo, y.hi))
    exact = on.make(node.op, x.lo, y.lo)
    natural = on.make(ops.AND, on.make(ops.GE, x.lo, ZERO), on.make(ops.GE, y.lo, ZERO))
    loose = choose(
        on, natural, _natural_bits(on, node.op, x.lo, x.hi, y.lo, y.hi), _any_bits(on, x, y)
    )
    return choose(on, single, point(exact), loose)


def _natural_bits(on: Bounder, op: Op, x_lo: Expr, x_hi: Expr, y_lo: Expr, y_hi: Expr) -> Interval:
    """x & y <= both, both <= x | y <= x + y, x ^ y <= x + y."""
    if op is ops.BITAND:
        return Interval(ZERO, on.make(ops.MIN, x_hi, y_hi))
    low = on.make(ops.MAX, x_lo, y_lo) if op is ops.BITOR else ZERO
    return Interval(low, on.make(ops.ADD, x_hi, y_hi))


def _any_bits(on: Bounder, x: Interval, y: Interval) -> Interval:
    """No result needs more bits than the longer argument."""
    largest = on.highest(magnitude(on, x).hi, magnitude(on, y).hi)
    assert largest is not None, "both are known here"
    high = on.make(ops.MUL, largest, Const(2))
    return Interval(on.make(ops.SUB, on.make(ops.NEG, high), ONE), high)


MAX_SHIFT = Const(31)
MAX_SHIFTED = Const(2**31)


def shl(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """x << n by corners, while those cannot leave int64; nothing is known beyond."""
    x, n = args
    corners = at_corners(on, ops.SHL, x, n)
    size = magnitude(on, x).hi
    if corners.lo is None or n.hi is None or size is None:
        return WHOLE
    fits = on.make(ops.AND, on.make(ops.LE, n.hi, MAX_SHIFT), on.make(ops.LE, size, MAX_SHIFTED))
    return choose(on, fits, corners, Interval(Const(-(2**62)), Const(2**62)))


def shr(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return at_corners(on, ops.SHR, *args)


def bit_length(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return rising(on, node, [magnitude(on, args[0])])
