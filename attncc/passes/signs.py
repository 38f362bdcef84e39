"""What is provably nonnegative or positive from an expression's form alone."""

from __future__ import annotations

from attncc.ir import ops
from attncc.ir.expr import SIZES, Apply, Const, Expr, Index, Scalar

_KEEPS_NONNEGATIVE = (ops.ADD, ops.MUL, ops.FLOORDIV, ops.MIN, ops.SHR, ops.BITOR, ops.BITXOR)


def nonnegative(expr: Expr) -> bool:
    """Whether the value is >= 0 wherever it is defined; False where the form does not say."""
    match expr:
        case Const(value):
            return value >= 0
        case Index():
            return True
        case Scalar(param):
            return param in SIZES
        case Apply(op, args):
            if op in _KEEPS_NONNEGATIVE:
                return all(map(nonnegative, args))
            if op is ops.MOD:
                return positive(args[1])
            if op is ops.MAX or op is ops.BITAND:
                return any(map(nonnegative, args))
            return op in (ops.ABS, ops.BIT_LENGTH, ops.SQRT, ops.EXP, ops.EXP2, ops.SIGMOID)
        case _:
            return False


def positive(expr: Expr) -> bool:
    """Whether the value is > 0. A size counts: no pair exists where one is 0."""
    match expr:
        case Const(value):
            return value > 0
        case Scalar(param):
            return param in SIZES
        case Apply(op, args) if op is ops.ADD:
            left, right = args
            return all(map(nonnegative, args)) and (positive(left) or positive(right))
        case Apply(op, args) if op in (ops.MUL, ops.MIN):
            return all(map(positive, args))
        case Apply(op, args) if op is ops.MAX:
            return any(map(positive, args))
        case _:
            return False
