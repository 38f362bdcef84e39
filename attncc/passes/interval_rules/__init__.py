"""Bounds of each operator over a tile, from the bounds of its arguments."""

from __future__ import annotations

from attncc.ir import ops
from attncc.ir.ops import Op
from attncc.passes.interval_rules import arithmetic, bits, floats, interval, logic
from attncc.passes.interval_rules.interval import Rule

RULES: dict[Op, Rule] = {
    ops.ADD: arithmetic.add,
    ops.SUB: arithmetic.sub,
    ops.MUL: arithmetic.mul,
    ops.DIV: arithmetic.div,
    ops.FLOORDIV: arithmetic.floordiv,
    ops.MOD: arithmetic.mod,
    ops.LT: logic.less(ops.LT, ops.GE),
    ops.LE: logic.less(ops.LE, ops.GT),
    ops.GT: logic.greater(logic.less(ops.LT, ops.GE)),
    ops.GE: logic.greater(logic.less(ops.LE, ops.GT)),
    ops.EQ: logic.equal,
    ops.NE: logic.not_equal,
    ops.AND: logic.all_of,
    ops.OR: logic.any_of,
    ops.BITAND: bits.bitwise,
    ops.BITOR: bits.bitwise,
    ops.BITXOR: bits.bitwise,
    ops.SHL: bits.shl,
    ops.SHR: bits.shr,
    ops.NEG: interval.falling,
    ops.INVERT: interval.falling,
    ops.NOT: logic.negated,
    ops.MIN: arithmetic.smaller,
    ops.MAX: arithmetic.larger,
    ops.ABS: arithmetic.absolute,
    ops.WHERE: logic.where,
    ops.EXP: interval.rising,
    ops.EXP2: interval.rising,
    ops.LOG: floats.of_nonnegative(interval.rising),
    ops.LOG2: floats.of_nonnegative(interval.rising),
    ops.SQRT: floats.of_nonnegative(interval.rising),
    ops.RSQRT: floats.of_nonnegative(interval.falling),
    ops.TANH: interval.rising,
    ops.SIGMOID: interval.rising,
    ops.SOFTPLUS: interval.rising,
    ops.SIN: floats.wave,
    ops.COS: floats.wave,
    ops.FLOOR: floats.to_int,
    ops.BIT_LENGTH: bits.bit_length,
    ops.INT: floats.to_int,
    ops.FLOAT: floats.to_int,
}
"""Total over the operators: a test holds it to OPS."""
