"""An interval over a tile, and how the bounds of two are combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attncc.ir import ops
from attncc.ir.expr import FALSE, TRUE, Apply, Const, Expr
from attncc.ir.ops import Op

if TYPE_CHECKING:
    from attncc.passes.intervals import Bounder


@dataclass(frozen=True, slots=True)
class Interval:
    """lo <= value <= hi on the whole tile, None where nothing is known.

    Of a bool, lo is `must` (true at every pair) and hi is `may` (true at some pair, or unknown).
    A float bound that is nan at run time bounds nothing: rules of comparisons are written so.
    On tiles where `when` does not hold, nothing is known; of a bool it is part of both bounds.
    """

    lo: Expr | None
    hi: Expr | None
    when: Expr = TRUE

    @property
    def exact(self) -> bool:
        """The value is one number on the tile, known as an expression."""
        return self.lo is not None and self.lo is self.hi


WHOLE = Interval(None, None)
UNSURE = Interval(FALSE, TRUE)

NAN = Const(float("nan"))
INFINITY = Const(float("inf"))
ZERO = Const(0)
ONE = Const(1)

Rule = Callable[["Bounder", Apply, list[Interval]], Interval]
"""(where results are made, node, bounds of its arguments) to the bounds of the node."""


def point(expr: Expr) -> Interval:
    return Interval(expr, expr)


def both(on: Bounder, op: Op, x: Expr | None, y: Expr | None) -> Expr | None:
    return None if x is None or y is None else on.make(op, x, y)


def each(on: Bounder, op: Op, args: list[Interval]) -> Interval:
    """An operator that is nondecreasing in both arguments."""
    x, y = args
    return Interval(both(on, op, x.lo, y.lo), both(on, op, x.hi, y.hi))


def falling(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """-x, ~x."""
    (x,) = args
    low = None if x.hi is None else on.make(node.op, x.hi)
    high = None if x.lo is None else on.make(node.op, x.lo)
    return Interval(low, high)


def rising(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """Functions of one argument that never fall."""
    (x,) = args
    low = None if x.lo is None else on.make(node.op, x.lo)
    high = None if x.hi is None else on.make(node.op, x.hi)
    return Interval(low, high)


def at_corners(on: Bounder, op: Op, x: Interval, y: Interval) -> Interval:
    """An operator that is monotone in each argument while the other stands still."""
    if x.lo is None or x.hi is None or y.lo is None or y.hi is None:
        return WHOLE
    xs = (x.lo,) if x.exact else (x.lo, x.hi)
    ys = (y.lo,) if y.exact else (y.lo, y.hi)
    ends = [on.make(op, one, two) for one in xs for two in ys]
    return Interval(on.lowest(*ends), on.highest(*ends))


def choose(on: Bounder, condition: Expr, x: Interval, y: Interval) -> Interval:
    """x where the condition holds at run time, else y; one that is not known bounds nothing."""
    if condition == TRUE:
        return x
    if condition == FALSE:
        return y
    low = None if x.lo is None or y.lo is None else on.make(ops.WHERE, condition, x.lo, y.lo)
    high = None if x.hi is None or y.hi is None else on.make(ops.WHERE, condition, x.hi, y.hi)
    return Interval(low, high)
