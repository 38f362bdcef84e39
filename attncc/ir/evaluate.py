"""Expressions over torch tensors: the pointwise meaning that all else is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch import Tensor

from attncc.errors import BoundsError
from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr, Index, Load, Scalar, Score
from attncc.ir.ops import Kind, Op


@dataclass(frozen=True)
class Env:
    """What an expression may read; all tensors broadcast against each other and share a device.

    positions: index name to an int64 tensor.
    scalars:   scalar parameter or size name to a Python number.
    tensors:   captured tensor name to its tensor.
    score:     q . k * scale, or None where no score is in scope.
    dtype:     the dtype floats are computed in.
    results:   what an output clause reads, by name, floats of `dtype`.
    """

    positions: Mapping[str, Tensor]
    scalars: Mapping[str, bool | int | float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    score: Tensor | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    results: Mapping[str, Tensor] = field(default_factory=dict)

    def number(self, value: bool | int | float) -> Tensor:
        """A 0-d tensor of the value's kind, filled on the device: a copy would wait for it."""
        if isinstance(value, bool):
            return torch.full((), value, dtype=torch.bool, device=self.device)
        dtype = torch.int64 if isinstance(value, int) else self.dtype
        return torch.full((), value, dtype=dtype, device=self.device)


def evaluate(expr: Expr, env: Env, guard: Tensor | None = None) -> Tensor:
    """The value at every point that `env.positions` span, broadcast as far as it varies.

    guard: bool tensor, True where the value will be used; reads and integer divisions are checked
    there only, and short-circuit operators narrow it. Bools are torch.bool, ints int64, floats
    `env.dtype`. Raises BoundsError where a tensor is read out of range, or an integer divided by
    zero, at a point that the guard holds.
    """
    return _Walk(env, checked=True).value(expr, guard)


def evaluate_unchecked(expr: Expr, env: Env) -> Tensor:
    """`evaluate` for analyses: out-of-range reads are clamped and x // 0 is 0, unchecked."""
    return _Walk(env, checked=False).value(expr, None)


class _Walk:
    """One evaluation; values of shared nodes are kept as long as the guard is the same."""

    def __init__(self, env: Env, checked: bool) -> None:
        self.env = env
        self.checked = checked
        self.memo: dict[tuple[int, int], Tensor] = {}

    def value(self, expr: Expr, guard: Tensor | None) -> Tensor:
        key = (id(expr), id(guard))
        if key not in self.memo:
            self.memo[key] = self._value(expr, guard)
        return self.memo[key]

    def _value(self, expr: Expr, guard: Tensor | None) -> Tensor:
        env = self.env
        match expr:
            case Const(value):
                return env.number(value)
            case Index(name):
                return env.positions[name]
            case Scalar(param) if param.name in env.results:
                return env.results[param.name]
            case Scalar(param):
                value = env.scalars[param.name]
                return env.number(float(value) if param.kind is Kind.FLOAT else value)
            case Score():
                assert env.score is not None, "no score in scope"
                return env.score
            case Load():
                return self._load(expr, guard)
            case Apply():
                return self._apply(expr, guard)
            case _:
                assert_never(expr)

    def _load(self, load: Load, guard: Tensor | None) -> Tensor:
        source = self.env.tensors[load.tensor.name]
        at = tuple(self.value(part, guard) for part in load.at)
        inside = []
        for axis, (index, size) in enumerate(zip(at, source.shape, strict=True)):
            if self.checked:
                self._check_read(load, axis, index, size, guard)
            inside.append(index.clamp(0, max(size - 1, 0)))
        if 0 in source.shape:  # nothing to read: only reached where the guard holds nowhere
            nowhere = sum((index * 0 for index in at), torch.zeros((), device=source.device))
            return self._cast(nowhere, load.tensor.kind)
        return self._cast(source[tuple(inside)], load.tensor.kind)

    def _cast(self, value: Tensor, kind: Kind) -> Tensor:
        match kind:
            case Kind.BOOL:
                return value.to(torch.bool)
            case Kind.INT:
                return value.to(torch.int64)
            case Kind.FLOAT:
                return value.to(self.env.dtype)
            case _:
                assert_never(kind)

    def _check_read(
        self, load: Load, axis: int, index: Tensor, size: int, guard: Tensor | None
    ) -> None:
        bad = (index < 0) | (index >= size)
        if guard is not None:
            bad = bad & guard
        if bool(bad.any()):
            seen = index.expand(bad.shape)[bad]
            raise BoundsError(
                f"{load.tensor.name!r} is read at {int(seen.min())}..{int(seen.max())} along its "
                f"axis {axis}, which has {size} elements",
                hint="mask those pairs out, clamp the index with min and max, or pass more of it",
                span=load.span,
            )

    def _apply(self, expr: Apply, guard: Tensor | None) -> Tensor:
        op, args = expr.op, expr.args
        if op is ops.AND or op is ops.OR:
            left = self.value(args[0], guard)
            reached = left if op is ops.AND else ~left
            right = self.value(args[1], self._narrow(guard, reached))
            return left & right if op is ops.AND else left | right
        if op is ops.WHERE:
            condition = self.value(args[0], guard)
            left = self.value(args[1], self._narrow(guard, condition))
            right = self.value(args[2], self._narrow(guard, ~condition))
            left, right = self._promote(expr, (left, right))
            return torch.where(condition, left, right)
        values = tuple(self.value(arg, guard) for arg in args)
        if op in (ops.FLOORDIV, ops.MOD) and expr.kind is Kind.INT:
            return self._divide(expr, values, guard)
        return RULES[op](*self._promote(expr, values))

    def _narrow(self, guard: Tensor | None, condition: Tensor) -> Tensor | None:
        if not self.checked:
            return None
        narrowed = condition if guard is None else guard & condition
        self.memo[id(narrowed), -1] = narrowed  # keeps it alive, so that its id stays its own
        return narrowed

    def _promote(self, expr: Apply, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Ints become floats where the operator mixes them, or makes a float of an int."""
        if expr.kind is Kind.FLOAT or any(v.is_floating_point() for v in values):
            return tuple(v.to(self.env.dtype) for v in values)
        return values

    def _divide(self, expr: Apply, values: tuple[Tensor, ...], guard: Tensor | None) -> Tensor:
        dividend, divisor = values
        zero = divisor == 0
        reached = zero if guard is None else zero & guard
        if self.checked and bool(reached.any()):
            raise BoundsError(
                f"an integer is divided by zero by '{expr.op.symbol}'",
                hint="guard it: where(d != 0, x // d, 0), or mask those pairs out first",
                span=expr.span,
            )
        result = RULES[expr.op](dividend, torch.where(zero, 1, divisor))
        return torch.where(zero, 0, result)


def _bit_length(x: Tensor) -> Tensor:
    # frexp of a float64 is exact up to 2**53; beyond, the high half decides.
    high = x.abs() >> 32
    whole = torch.where(high > 0, high, x.abs())
    length = torch.frexp(whole.to(torch.float64)).exponent.to(torch.int64)
    return torch.where(high > 0, length + 32, length)


def _shift(direction: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, n: direction(x, n.clamp(0, 63))


def _to_int(x: Tensor) -> Tensor:
    return x.trunc().to(torch.int64) if x.is_floating_point() else x.to(torch.int64)


RULES: dict[Op, Callable[..., Tensor]] = {
    ops.ADD: torch.add,
    ops.SUB: torch.sub,
    ops.MUL: torch.mul,
    ops.DIV: torch.true_divide,
    ops.FLOORDIV: lambda x, y: torch.div(x, y, rounding_mode="floor"),  # which has a slope, 0
    ops.MOD: torch.remainder,
    ops.LT: torch.lt,
    ops.LE: torch.le,
    ops.GT: torch.gt,
    ops.GE: torch.ge,
    ops.EQ: torch.eq,
    ops.NE: torch.ne,
    ops.BITAND: torch.bitwise_and,
    ops.BITOR: torch.bitwise_or,
    ops.BITXOR: torch.bitwise_xor,
    ops.SHL: _shift(torch.bitwise_left_shift),
    ops.SHR: _shift(torch.bitwise_right_shift),
    ops.NEG: torch.neg,
    ops.INVERT: torch.bitwise_not,
    ops.NOT: torch.logical_not,
    ops.MIN: torch.minimum,
    ops.MAX: torch.maximum,
    ops.ABS: torch.abs,
    ops.EXP: torch.exp,
    ops.EXP2: torch.exp2,
    ops.LOG: torch.log,
    ops.LOG2: torch.log2,
    ops.SQRT: torch.sqrt,
    ops.RSQRT: torch.rsqrt,
    ops.TANH: torch.tanh,
    ops.SIGMOID: torch.sigmoid,
    ops.SOFTPLUS: torch.nn.functional.softplus,
    ops.SIN: torch.sin,
    ops.COS: torch.cos,
    ops.FLOOR: lambda x: _to_int(torch.floor(x)) if x.is_floating_point() else x,
    ops.BIT_LENGTH: _bit_length,
    ops.INT: _to_int,
    ops.FLOAT: lambda x: x,  # _promote has made it a float
}
"""AND, OR and WHERE are the walker's, since they guard what they read."""
