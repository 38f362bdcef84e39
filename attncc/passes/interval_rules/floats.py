"""Rules of functions of floats, and of what makes ints and floats of other kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr, Index, Load, Scalar, Score, kind
from attncc.ir.ops import Kind
from attncc.passes.interval_rules.interval import (
    NAN,
    WHOLE,
    ZERO,
    Interval,
    Rule,
    choose,
    point,
    rising,
)
from attncc.passes.interval_rules.logic import must_and_may

if TYPE_CHECKING:
    from attncc.passes.intervals import Bounder


def of_nonnegative(rule: Rule) -> Rule:
    """Functions that are nan below 0: bounds nothing where the argument may be negative."""

    def guarded(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
        (x,) = args
        if x.lo is None:
            return WHOLE
        return choose(on, on.make(ops.GE, x.lo, ZERO), rule(on, node, args), point(NAN))

    return guarded


def wave(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """sin and cos of anything finite."""
    return Interval(Const(-1.0), Const(1.0)) if finite(node.args[0]) else WHOLE


def to_int(on: Bounder, node: Apply, args: list[Interval]) -> Interval:
    """int(x), floor(x): of a float only where it must be finite, since int(nan) is anything."""
    (x,) = args
    source = node.args[0]
    if kind(source) is Kind.BOOL:
        must, may = must_and_may(x)
        return Interval(on.make(node.op, must), on.make(node.op, may))
    if kind(source) is Kind.FLOAT and not finite(source):
        return WHOLE
    return rising(on, node, args)


def finite(expr: Expr) -> bool:
    """Proved that a float is neither nan nor inf, for arguments of any reasonable size."""
    match expr:
        case Const() | Index():
            return True
        case Scalar(param):
            return param.kind is not Kind.FLOAT
        case Load(tensor):
            return tensor.kind is not Kind.FLOAT
        case Apply(op, args) if op in _FINITE:
            return all(map(finite, args))
        case Apply(ops.DIV | ops.FLOORDIV | ops.MOD, (x, Const(value))):
            return value != 0 and finite(x)
        case Score() | Apply():
            return kind(expr) is not Kind.FLOAT
        case _:
            assert_never(expr)


_FINITE = frozenset((ops.ADD, ops.SUB, ops.MUL, ops.NEG, ops.ABS, ops.MIN, ops.MAX, ops.FLOAT))
