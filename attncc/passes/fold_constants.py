"""Fold operators over constants, with Python's meaning: `//` and `%` floor, ints have no limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr
from attncc.ir.ops import Kind, Op
from attncc.ir.plan import Plan
from attncc.ir.rewrite import Rewriter, Rules

Value = bool | int | float

MAX_INT = 2**62
"""Larger results stay unfolded, since evaluation is in int64."""


def fold_constants(plan: Plan) -> Plan:
    """Every operator whose arguments are all constants becomes its value."""
    fold = Rewriter(RULES)
    return replace(plan, mask=fold(plan.mask), score=fold(plan.score))


def fold(node: Apply) -> Expr | None:
    """op(c1, c2, ...) => its value; division by zero and what overflows stay as they are."""
    values: list[Value] = []
    for arg in node.args:
        if not isinstance(arg, Const):
            return None
        values.append(arg.value)
    if node.kind is Kind.FLOAT and node.op is not ops.WHERE:
        values = [float(value) for value in values]
    try:
        result = TABLE[node.op](*values)
    except (ZeroDivisionError, OverflowError, ValueError):
        return None
    return _const(result, node)


def _const(value: Value, node: Apply) -> Expr | None:
    match node.kind:
        case Kind.BOOL:
            return Const(bool(value), node.span)
        case Kind.INT:
            whole = int(value)
            return Const(whole, node.span) if abs(whole) <= MAX_INT else None
        case Kind.FLOAT:
            number = float(value)
            return Const(number, node.span) if math.isfinite(number) else None


def _shift_left(x: int, n: int) -> int:
    if not 0 <= n <= 62:
        raise OverflowError
    return x << n


def _shift_right(x: int, n: int) -> int:
    return x >> min(max(n, 0), 63)


def _minimum(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else min(x, y)


def _maximum(x: float, y: float) -> float:
    return math.nan if math.isnan(x) or math.isnan(y) else max(x, y)


TABLE: dict[Op, Callable[..., Value]] = {
    ops.ADD: lambda x, y: x + y,
    ops.SUB: lambda x, y: x - y,
    ops.MUL: lambda x, y: x * y,
    ops.DIV: lambda x, y: x / y,
    ops.FLOORDIV: lambda x, y: x // y,
    ops.MOD: lambda x, y: x % y,
    ops.LT: lambda x, y: x < y,
    ops.LE: lambda x, y: x <= y,
    ops.GT: lambda x, y: x > y,
    ops.GE: lambda x, y: x >= y,
    ops.EQ: lambda x, y: x == y,
    ops.NE: lambda x, y: x != y,
    ops.AND: lambda x, y: x and y,
    ops.OR: lambda x, y: x or y,
    ops.BITAND: lambda x, y: x & y,
    ops.BITOR: lambda x, y: x | y,
    ops.BITXOR: lambda x, y: x ^ y,
    ops.SHL: _shift_left,
    ops.SHR: _shift_right,
    ops.NEG: lambda x: -x,
    ops.INVERT: lambda x: ~x,
    ops.NOT: lambda x: not x,
    ops.MIN: _minimum,
    ops.MAX: _maximum,
    ops.ABS: abs,
    ops.WHERE: lambda c, x, y: x if c else y,
    ops.EXP: math.exp,
    ops.EXP2: lambda x: 2.0**x,
    ops.LOG: math.log,
    ops.LOG2: math.log2,
    ops.SQRT: math.sqrt,
    ops.RSQRT: lambda x: 1.0 / math.sqrt(x),
    ops.TANH: math.tanh,
    ops.SIGMOID: lambda x: 1.0 / (1.0 + math.exp(-x)),
    ops.SOFTPLUS: lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))),
    ops.SIN: math.sin,
    ops.COS: math.cos,
    ops.FLOOR: math.floor,
    ops.BIT_LENGTH: lambda x: abs(x).bit_length(),
    ops.INT: int,
    ops.FLOAT: float,
}

RULES: Rules = dict.fromkeys(TABLE, (fold,))
