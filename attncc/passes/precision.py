"""Which values are the same whatever float dtype they are computed in."""

from __future__ import annotations

import struct

from attncc.ir import ops
from attncc.ir.expr import SIZES, Apply, Const, Expr, Load, Scalar, Score, kind
from attncc.ir.ops import Kind
from attncc.ir.rewrite import postorder

_EXACT = frozenset((ops.NEG, ops.ABS, ops.MIN, ops.MAX, ops.WHERE))
"""Operators that give one of their arguments, or its negative."""


def same_in_any_dtype(expr: Expr, own: bool = False) -> bool:
    """No float in it is rounded; `own` asks about the last operator alone.

    Positions count as exact floats, as they are below 2**24; captured tensors are taken to be
    stored as float32 or shorter (a float64 one is widened when bound).
    """
    return _keeps(expr) if own else all(map(_keeps, postorder(expr)))


def _keeps(expr: Expr) -> bool:
    match expr:
        case Const(value) if isinstance(value, float):
            return value != value or _is_float32(value)
        case Scalar(param):
            return param.kind is not Kind.FLOAT
        case Score():
            return False
        case Apply(ops.FLOAT, (inner,)):
            return not _large(inner)
        case Apply(op, args):
            mixed = any(kind(arg) is Kind.FLOAT for arg in args)
            if mixed and any(kind(arg) is Kind.INT and _large(arg) for arg in args):
                return False
            return expr.kind is not Kind.FLOAT or op in _EXACT
        case _:
            return True


def _large(expr: Expr) -> bool:
    """An int that float32 may not hold: it reads a tensor or a scalar argument."""
    return any(
        isinstance(node, Load) or (isinstance(node, Scalar) and node.param not in SIZES)
        for node in postorder(expr)
    )


def _is_float32(value: float) -> bool:
    try:
        return bool(struct.unpack("f", struct.pack("f", value))[0] == value)
    except OverflowError:
        return False
