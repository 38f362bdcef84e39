"""Numeric intervals of int expressions over all positions of one call, in Python's own ints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import assert_never

import torch

from attncc.binding import Binding
from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr, Index, Load, Scalar, Score, kind, walk
from attncc.ir.ops import Kind, Op
from attncc.ir.plan import Plan

Span = tuple[int, int]
"""(least, greatest), both inclusive; mathematical ints, so ends may leave int64."""

BOOL = (0, 1)
UNKNOWN = (-(2**63), 2**63 - 1)
FAR = 2**62
"""Ends beyond it come from UNKNOWN."""

LENGTHS = {
    "b": "batch",
    "h": "heads",
    "kv_head": "kv_heads",
    "q_idx": "q_len",
    "q_lo": "q_len",
    "q_last": "q_len",
    "q_tile": "q_len",
    "kv_idx": "kv_len",
    "kv_lo": "kv_len",
    "kv_last": "kv_len",
    "kv_tile": "kv_len",
}
"""Each position lies in 0 .. its length - 1."""


class Intervals:
    """Intervals of int and bool expressions (bools count 0 and 1), for one binding.

    Elements of captured tensors are known by their dtype where it is short, and floats are not
    known at all: reading them would wait for the device.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.memo: dict[Expr, Span] = {}

    def __call__(self, expr: Expr) -> Span:
        """The interval; sound whatever the captured tensors hold."""
        if expr not in self.memo:
            self.memo[expr] = self._of(expr)
        return self.memo[expr]

    def _of(self, expr: Expr) -> Span:
        if kind(expr) is Kind.FLOAT:
            return UNKNOWN
        match expr:
            case Const(value):
                return int(value), int(value)
            case Index(name):
                return 0, max(int(self.binding.scalars[LENGTHS[name]]) - 1, 0)
            case Scalar(param):
                number = int(self.binding.scalars[param.name])
                return number, number
            case Load():
                return self._load(expr)
            case Apply():
                return self._apply(expr)
            case Score():
                raise AssertionError("a score is a float")
            case _:
                assert_never(expr)

    def _load(self, load: Load) -> Span:
        if load.tensor.kind is Kind.BOOL:
            return BOOL
        tensor = self.binding.tensors.get(load.tensor.name)  # a plan's summaries are not bound
        if tensor is None or tensor.dtype.itemsize > 2:
            return UNKNOWN
        return torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max

    def _apply(self, expr: Apply) -> Span:
        if expr.kind is Kind.BOOL:
            return BOOL
        if expr.op is ops.WHERE:
            return _hull((*self(expr.args[1]), *self(expr.args[2])))
        return RULES[expr.op](*map(self, expr.args))


def _hull(values: tuple[int, ...]) -> Span:
    return min(values), max(values)


def _corners(function: Callable[[int, int], int]) -> Callable[[Span, Span], Span]:
    """The rule of a function that is monotone in each operand."""
    return lambda x, y: _hull(tuple(function(a, b) for a in x for b in y))


def _floordiv(x: Span, y: Span) -> Span:
    # Split at 0; x // 0 is never used, and 0 stands for it.
    parts = [(max(y[0], 1), y[1]), (y[0], min(y[1], -1))]
    found = [_corners(int.__floordiv__)(x, part) for part in parts if part[0] <= part[1]]
    if y[0] <= 0 <= y[1]:
        found.append((0, 0))
    return _hull(tuple(end for part in found for end in part))


def _mod(x: Span, y: Span) -> Span:
    if y[0] > 0 and x[0] >= 0:
        return x if x[1] < y[0] else (0, min(x[1], y[1] - 1))
    return min(y[0] + 1, 0), max(y[1] - 1, 0)


def _abs(x: Span) -> Span:
    low = 0 if x[0] <= 0 <= x[1] else min(abs(x[0]), abs(x[1]))
    return low, max(abs(x[0]), abs(x[1]))


def _bitand(x: Span, y: Span) -> Span:
    masks = [span[1] for span in (x, y) if span[0] >= 0]
    return (0, min(masks)) if masks else _whole_bits(x, y)


def _whole_bits(x: Span, y: Span) -> Span:
    """All values with as many bits as the operands."""
    bits = max((end if end >= 0 else ~end).bit_length() for end in (*x, *y))
    return (0 if min(x[0], y[0]) >= 0 else -(1 << bits)), (1 << bits) - 1


def _shift(function: Callable[[int, int], int]) -> Callable[[Span, Span], Span]:
    """Shift counts are clamped to 0..63, as everywhere."""
    return lambda x, n: _corners(function)(x, (_count(n[0]), _count(n[1])))


def _count(n: int) -> int:
    return min(max(n, 0), 63)


def _same(x: Span) -> Span:
    return x


RULES: dict[Op, Callable[..., Span]] = {
    ops.ADD: lambda x, y: (x[0] + y[0], x[1] + y[1]),
    ops.SUB: lambda x, y: (x[0] - y[1], x[1] - y[0]),
    ops.MUL: _corners(int.__mul__),
    ops.FLOORDIV: _floordiv,
    ops.MOD: _mod,
    ops.NEG: lambda x: (-x[1], -x[0]),
    ops.INVERT: lambda x: (~x[1], ~x[0]),
    ops.BITAND: _bitand,
    ops.BITOR: _whole_bits,
    ops.BITXOR: _whole_bits,
    ops.SHL: _shift(int.__lshift__),
    ops.SHR: _shift(int.__rshift__),
    ops.MIN: lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    ops.MAX: lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    ops.ABS: _abs,
    ops.BIT_LENGTH: lambda x: (0, max(abs(x[0]), abs(x[1])).bit_length()),
    ops.FLOOR: _same,
    ops.INT: _same,
}
"""Total over the operators that can give an int, but for where."""

INT32 = range(-(2**31) + 4096, 2**31 - 4096)
"""With room for rounding up to a tile."""


def index_bits(plan: Plan, binding: Binding) -> int:
    """32 where no int that a kernel of the plan computes can leave int32 on this call, else 64.

    Values read from int32 and int64 tensors are unknown; of unknowns, only products and left
    shifts are feared.
    """
    intervals = Intervals(binding)
    ints = {n for e in _printed(plan) for n in walk(e) if kind(n) is Kind.INT}
    return 32 if all(_fits(node, intervals) for node in ints) else 64


def _printed(plan: Plan) -> Iterator[Expr]:
    """Every expression that a kernel may hold."""
    program = plan.program
    yield from (plan.mask, plan.score, plan.tiles.must, plan.tiles.may)
    yield from (expr for expr in (program.sink, program.scale) if expr is not None)
    for ranges in (plan.key_ranges, plan.query_ranges):
        for segment in (*ranges.visit, *ranges.unmasked) if ranges else ():
            yield from (segment.lo, segment.hi)


def _fits(node: Expr, intervals: Intervals) -> bool:
    low, high = intervals(node)
    if low < -FAR or high > FAR:
        return not (isinstance(node, Apply) and node.op in (ops.MUL, ops.SHL))
    return low in INT32 and high in INT32
