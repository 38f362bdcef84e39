"""Rules of bools: must and may of `and`, `or`, `not`, comparisons and `where`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attncc.ir import ops
from attncc.ir.expr import FALSE, TRUE, Apply, Expr, kind
from attncc.ir.ops import Kind, Op
from attncc.passes.interval_rules.interval import Interval, Rule, choose, each

if TYPE_CHECKING:
    from attncc.passes.intervals import Bounder


def all_of(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return each(on, ops.AND, args)


def any_of(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return each(on, ops.OR, args)


def negated(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    must, may = must_and_may(args[0])
    return Interval(on.make(ops.NOT, may), on.make(ops.NOT, must))


def must_and_may(interval: Interval) -> tuple[Expr, Expr]:
    assert interval.lo is not None and interval.hi is not None, "bools have both"
    return interval.lo, interval.hi


def same(on: Bounder, x: Interval, y: Interval) -> Interval:
    """x == y over bools."""
    (x_must, x_may), (y_must, y_may) = must_and_may(x), must_and_may(y)
    x_never, y_never = on.make(ops.NOT, x_may), on.make(ops.NOT, y_may)
    must = on.make(ops.OR, on.make(ops.AND, x_must, y_must), on.make(ops.AND, x_never, y_never))
    differ = on.make(ops.OR, on.make(ops.AND, x_must, y_never), on.make(ops.AND, x_never, y_must))
    return Interval(must, on.make(ops.NOT, differ))


# -- comparisons: `may` is said as "not surely false", so that nan bounds leave it true


def less(op: Op, opposite: Op) -> Rule:
    """x < y: surely where x.hi < y.lo, never where x.lo >= y.hi."""

    def rule(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
        x, y = args
        must: Expr = FALSE
        if x.hi is not None and y.lo is not None:
            must = on.make(op, x.hi, y.lo)
        may: Expr = TRUE
        if x.lo is not None and y.hi is not None:
            may = on.make(ops.NOT, on.make(opposite, x.lo, y.hi))
        return Interval(must, may)

    return rule


def greater(rule: Rule) -> Rule:
    return lambda on, node, args: rule(on, node, args[::-1])


def equal(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    x, y = args
    if kind(node.args[0]) is Kind.BOOL:
        return same(on, x, y)
    must: Expr = FALSE
    if x.lo is not None and x.hi is not None and y.lo is not None and y.hi is not None:
        must = on.make(ops.AND, on.make(ops.EQ, x.lo, y.hi), on.make(ops.EQ, x.hi, y.lo))
    may: Expr = TRUE
    for small, large in ((x.lo, y.hi), (y.lo, x.hi)):
        if small is not None and large is not None:
            apart = on.make(ops.GT, small, large)
            may = on.make(ops.AND, may, on.make(ops.NOT, apart))
    return Interval(must, may)


def not_equal(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    return negated(on, node, [equal(on, node, args)])


# -- where, of any kind


def where(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    condition, x, y = args
    must, may = must_and_may(condition)
    if node.kind is Kind.BOOL:
        return _where_bool(on, must, may, x, y)
    if condition.exact:
        return choose(on, must, x, y)
    either = Interval(on.lowest(x.lo, y.lo), on.highest(x.hi, y.hi))
    return choose(on, must, x, choose(on, may, either, y))


def _where_bool(on: Bounder, must: Expr, may: Expr, x: Interval, y: Interval) -> Interval:
    (x_must, x_may), (y_must, y_may) = must_and_may(x), must_and_may(y)
    never = on.make(ops.NOT, may)
    surely = on.make(ops.OR, on.make(ops.AND, must, x_must), on.make(ops.AND, never, y_must))
    surely = on.make(ops.OR, surely, on.make(ops.AND, x_must, y_must))
    perhaps = on.make(
        ops.OR,
        on.make(ops.AND, may, x_may),
        on.make(ops.AND, on.make(ops.NOT, must), y_may),
    )
    return Interval(surely, perhaps)
