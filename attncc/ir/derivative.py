"""Derivatives of expressions, as expressions: one rule an operator, so that all backends agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr, Index, Load, Scalar, Score, apply, kind
from attncc.ir.ops import Kind, Op

Rule = Callable[..., Expr]
"""(node, slope of each argument) to the slope of the node."""

ZERO = Const(0.0)
ONE = Const(1.0)
HALF = Const(0.5)


def derivative(expr: Expr, wrt: Score | Load) -> Expr:
    """d(expr) / d(wrt), a float expression with zeros and ones folded away.

    Every Load equal to `wrt` counts as `wrt`; others are constants, and so is whatever is an int
    or a bool. Forward mode, so that a branch `where` does not take adds nothing, not 0 * NaN.
    At a tie `min` and `max` have the mean of both slopes, and abs has slope 0 at 0, as in torch.
    """
    return _Walk(wrt).of(expr)


class _Walk:
    def __init__(self, wrt: Score | Load) -> None:
        self.wrt = wrt
        self.memo: dict[int, Expr] = {}

    def of(self, expr: Expr) -> Expr:
        if id(expr) not in self.memo:
            self.memo[id(expr)] = self._of(expr)
        return self.memo[id(expr)]

    def _of(self, expr: Expr) -> Expr:
        match expr:
            case Const() | Index() | Scalar():
                return ZERO
            case Score() | Load():
                return ONE if expr == self.wrt else ZERO
            case Apply():
                if expr.kind is not Kind.FLOAT:
                    return ZERO
                slopes = tuple(map(self.of, expr.args))
                return ZERO if slopes == (ZERO,) * len(slopes) else RULES[expr.op](expr, *slopes)
            case _:
                assert_never(expr)


# -- expressions with 0 and 1 folded


def _float(x: Expr) -> Expr:
    if isinstance(x, Const):
        return Const(float(x.value))
    return x if kind(x) is Kind.FLOAT else apply(ops.FLOAT, x)


def _add(x: Expr, y: Expr) -> Expr:
    if x == ZERO:
        return y
    return x if y == ZERO else apply(ops.ADD, x, y)


def _neg(x: Expr) -> Expr:
    match x:
        case Const(value):
            return ZERO if value == 0 else Const(-float(value))
        case Apply(ops.NEG, (inner,)):
            return inner
        case _:
            return apply(ops.NEG, x)


def _sub(x: Expr, y: Expr) -> Expr:
    if y == ZERO:
        return x
    return _neg(y) if x == ZERO else apply(ops.SUB, x, y)


def _mul(x: Expr, y: Expr) -> Expr:
    """x * y; d * (n / d) is n, and constants come first and are multiplied out."""
    x, y = _float(x), _float(y)
    if isinstance(y, Const):
        x, y = y, x
    match x, y:
        case Const(a), Const(b):
            return Const(a * b)
        case Const(0.0), _:
            return ZERO
        case Const(1.0), _:
            return y
        case Const(-1.0), _:
            return _neg(y)
        case Const(a), Apply(ops.MUL, (Const(b), rest)):
            return _mul(Const(a * b), rest)
        case Apply(ops.DIV, (n, d)), _:
            return n if y == _float(d) else _div(_mul(n, y), d)
        case _, Apply(ops.DIV, (n, d)):
            return n if x == _float(d) else _div(_mul(x, n), d)
        case _:
            return apply(ops.MUL, x, y)


def _div(x: Expr, y: Expr) -> Expr:
    if isinstance(y, Const) and y.value != 0:
        return _mul(Const(1 / y.value), x)
    return x if x == ZERO else apply(ops.DIV, x, y)


def _where(condition: Expr, x: Expr, y: Expr) -> Expr:
    return x if x == y else apply(ops.WHERE, condition, x, y)


def _times(factor: Callable[[Apply], Expr]) -> Rule:
    """A rule of one argument: its slope times d(node) / d(argument)."""
    return lambda node, dx: _mul(dx, factor(node))


# -- rules


def _product(node: Apply, dx: Expr, dy: Expr) -> Expr:
    x, y = node.args
    return _add(_mul(dx, y), _mul(x, dy))


def _quotient(node: Apply, dx: Expr, dy: Expr) -> Expr:
    return _div(_sub(dx, _mul(node, dy)), node.args[1])


def _remainder(node: Apply, dx: Expr, dy: Expr) -> Expr:
    """x % y is x - y * (x // y), whose last factor is a step."""
    return _sub(dx, _mul(dy, apply(ops.FLOORDIV, *node.args)))


def _choice(loses: Op) -> Rule:
    """A rule of two arguments: the slope of the one that does not lose, at a tie their mean.

    A slope is named once where the other one is 0, so that long chains stay short.
    """

    def rule(node: Apply, dx: Expr, dy: Expr) -> Expr:
        if dx == dy:
            return dx
        x, y = node.args
        if dx == ZERO:
            x, y, dx, dy = y, x, dy, dx
        tie, lost = apply(ops.EQ, x, y), apply(loses, x, y)
        if dy == ZERO:
            return apply(ops.WHERE, lost, ZERO, _halved_where(tie, dx))
        mean = _mul(HALF, _add(dx, dy))
        return apply(ops.WHERE, tie, mean, apply(ops.WHERE, lost, dy, dx))

    return rule


def _halved_where(condition: Expr, x: Expr) -> Expr:
    if isinstance(x, Const):
        return apply(ops.WHERE, condition, _mul(HALF, x), x)
    return _mul(x, apply(ops.WHERE, condition, HALF, ONE))


def _abs(node: Apply, dx: Expr) -> Expr:
    (x,) = node.args
    below = apply(ops.LT, x, ZERO)
    return apply(ops.WHERE, below, _neg(dx), _where(apply(ops.GT, x, ZERO), dx, ZERO))


def _sin(node: Apply) -> Expr:
    return apply(ops.COS, *node.args)


def _cos(node: Apply) -> Expr:
    return _neg(apply(ops.SIN, *node.args))


def _flat(node: Apply, *slopes: Expr) -> Expr:
    return ZERO


RULES: dict[Op, Rule] = {
    ops.ADD: lambda node, dx, dy: _add(dx, dy),
    ops.SUB: lambda node, dx, dy: _sub(dx, dy),
    ops.MUL: _product,
    ops.DIV: _quotient,
    ops.FLOORDIV: _flat,
    ops.MOD: _remainder,
    ops.NEG: lambda node, dx: _neg(dx),
    ops.MIN: _choice(ops.GT),
    ops.MAX: _choice(ops.LT),
    ops.ABS: _abs,
    ops.WHERE: lambda node, dc, dx, dy: _where(node.args[0], dx, dy),
    ops.EXP: _times(lambda node: node),
    ops.EXP2: _times(lambda node: _mul(Const(math.log(2)), node)),
    ops.LOG: lambda node, dx: _div(dx, node.args[0]),
    ops.LOG2: lambda node, dx: _div(_mul(Const(1 / math.log(2)), dx), node.args[0]),
    ops.SQRT: lambda node, dx: _div(_mul(HALF, dx), node),
    ops.RSQRT: _times(lambda node: _mul(Const(-0.5), _mul(node, _mul(node, node)))),
    ops.TANH: _times(lambda node: apply(ops.SUB, ONE, apply(ops.MUL, node, node))),
    ops.SIGMOID: _times(lambda node: apply(ops.MUL, node, apply(ops.SUB, ONE, node))),
    ops.SOFTPLUS: _times(lambda node: apply(ops.SIGMOID, *node.args)),
    ops.SIN: _times(_sin),
    ops.COS: _times(_cos),
    ops.FLOAT: lambda node, dx: dx,
}
"""Total over the operators that can give a float; ints and bools have no slope."""
