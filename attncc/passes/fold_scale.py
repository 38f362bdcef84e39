"""Scores in the units a kernel computes: of the raw q . k, in log2, with constants folded."""

from __future__ import annotations

import math

from attncc.ir import ops
from attncc.ir.expr import (
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    Scalar,
    ScalarParam,
    Score,
    axes,
    kind,
    walk,
)
from attncc.ir.ops import Kind

SCALE = ScalarParam("scale", Kind.FLOAT)
"""The factor that makes a score of q . k; the caller computes it."""

ONE = Const(1.0)
LOG2E = Const(math.log2(math.e))


def in_raw_units(expr: Expr) -> Expr:
    """The same value, where Score() now stands for the raw q . k."""
    return _Fold().times(expr, ONE)


def in_log2_units(score: Expr) -> Expr:
    """score * log2(e), where Score() now stands for the raw q . k."""
    return _Fold().times(score, LOG2E)


def products(expr: Expr) -> int:
    """Multiplications that an element of a tile pays."""
    return sum(isinstance(n, Apply) and n.op is ops.MUL and not uniform(n) for n in walk(expr))


def uniform(expr: Expr) -> bool:
    """Whether one value serves a whole tile: nothing varies with q_idx, kv_idx or the score."""
    return not axes(expr) & (Axis.Q | Axis.KV)


class _Fold:
    """Rewrites one expression; what it shares stays shared, else slopes of long max would grow."""

    def __init__(self) -> None:
        self.memo: dict[tuple[int, Expr], Expr] = {}

    def times(self, expr: Expr, factor: Expr) -> Expr:
        """expr * factor, with the uniform factor moved to where it is cheapest."""
        key = id(expr), factor
        if key not in self.memo:
            self.memo[key] = self._times(expr, factor)
        return self.memo[key]

    def _times(self, expr: Expr, factor: Expr) -> Expr:
        if uniform(expr) or kind(expr) is not Kind.FLOAT or isinstance(expr, Load):
            return _product(expr, factor)
        if isinstance(expr, Score):
            return Apply(ops.MUL, (expr, _product(Scalar(SCALE), factor)))
        assert isinstance(expr, Apply), expr
        op, args = expr.op, expr.args
        if op is ops.ADD or op is ops.SUB:
            return Apply(op, (self.times(args[0], factor), self.times(args[1], factor)))
        if op is ops.NEG:
            return Apply(op, (self.times(args[0], factor),))
        if op is ops.WHERE:
            condition = self._rescaled(args[0])
            return Apply(op, (condition, self.times(args[1], factor), self.times(args[2], factor)))
        if op is ops.MUL:
            return self._times_product(args[0], args[1], factor)
        if op is ops.DIV and uniform(args[1]):
            return self.times(args[0], _product(factor, _inverse(args[1])))
        return _product(self._rescaled(expr), factor)

    def _times_product(self, left: Expr, right: Expr, factor: Expr) -> Expr:
        if uniform(left):
            return self.times(right, _product(left, factor))
        if uniform(right):
            return self.times(left, _product(right, factor))
        if _count_axes(left) <= _count_axes(right):
            return Apply(ops.MUL, (self.times(left, factor), self.times(right, ONE)))
        return Apply(ops.MUL, (self.times(left, ONE), self.times(right, factor)))

    def _rescaled(self, expr: Expr) -> Expr:
        """The same operator over arguments in raw units."""
        match expr:
            case Apply(op, args):
                return Apply(op, tuple(self.times(arg, ONE) for arg in args), expr.span)
            case _:
                return expr


def _count_axes(expr: Expr) -> int:
    has_score = any(isinstance(node, Score) for node in walk(expr))
    return bin(axes(expr).value).count("1") + 8 * has_score


def _inverse(expr: Expr) -> Expr:
    if isinstance(expr, Const) and expr.value != 0:
        return Const(1.0 / expr.value)
    return Apply(ops.DIV, (ONE, expr))


def _product(left: Expr, right: Expr) -> Expr:
    """left * right, constants gathered on the right."""
    if left == ONE:
        return right
    if right == ONE:
        return left
    match left, right:
        case Const(a), Const(b):
            return Const(float(a) * float(b))
        case _, _ if uniform(left) and not uniform(right):
            return _product(right, left)
        case Const(), _ if uniform(right):
            return _product(right, left)
        case Apply(op, (inner, other)), _ if (
            op is ops.MUL and uniform(right) and _gathers(inner, other)
        ):
            return Apply(ops.MUL, (inner, _product(other, right)))
    return Apply(ops.MUL, (left, right))


def _gathers(inner: Expr, other: Expr) -> bool:
    """Whether a new uniform factor should join `other`, so that an element pays one product."""
    return isinstance(other, Const) or (uniform(other) and not uniform(inner))
