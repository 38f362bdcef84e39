"""Integer expressions as sums of constant multiples of atoms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, Const, Expr, apply, axes, kind
from attncc.ir.ops import Kind

TOKENS = Axis.Q | Axis.KV


@dataclass(frozen=True)
class Linear:
    """const + the sum of coefficient * atom; no coefficient is 0, no atom is itself a sum."""

    terms: Mapping[Expr, int] = field(default_factory=dict)
    const: int = 0

    def plus(self, other: Linear, times: int = 1) -> Linear:
        terms = dict(self.terms)
        for atom, factor in other.terms.items():
            terms[atom] = terms.get(atom, 0) + times * factor
        kept = {atom: factor for atom, factor in terms.items() if factor != 0}
        return Linear(kept, self.const + times * other.const)

    def scaled(self, factor: int) -> Linear:
        return Linear().plus(self, factor)

    def without(self, atom: Expr) -> Linear:
        return Linear({a: f for a, f in self.terms.items() if a != atom}, self.const)

    def split(self) -> tuple[Linear, Linear]:
        """(left, right), both with positive factors only, so that self == left - right."""
        left = Linear({a: f for a, f in self.terms.items() if f > 0}, max(self.const, 0))
        right = Linear({a: -f for a, f in self.terms.items() if f < 0}, max(-self.const, 0))
        return left, right

    def positions_first(self) -> Linear:
        ordered = sorted(self.terms.items(), key=lambda term: not axes(term[0]) & TOKENS)
        return Linear(dict(ordered), self.const)

    def expr(self) -> Expr:
        """As a human would write it: what is added, then what is subtracted, the constant last."""
        plus, minus = (side.positions_first() for side in self.split())
        result: Expr | None = None
        for atom, factor in plus.terms.items():
            term = _times(atom, factor)
            result = term if result is None else apply(ops.ADD, result, term)
        rest = self.const
        if result is None and minus.terms and rest <= 0:
            atom, factor = next(iter(minus.terms.items()))
            result = apply(ops.NEG, _times(atom, factor))
            minus = minus.without(atom)
        elif result is None:
            result, rest = Const(rest), 0
        for atom, factor in minus.terms.items():
            result = apply(ops.SUB, result, _times(atom, factor))
        return _offset(result, rest)


def _times(atom: Expr, factor: int) -> Expr:
    if factor == 1:
        return atom
    if isinstance(atom, Apply):
        return apply(ops.MUL, atom, Const(factor))
    return apply(ops.MUL, Const(factor), atom)


def _offset(expr: Expr, by: int) -> Expr:
    if by == 0:
        return expr
    return apply(ops.ADD if by > 0 else ops.SUB, expr, Const(abs(by)))


def linear(expr: Expr) -> Linear:
    """The linear form of an int expression; what is not a sum or constant multiple is an atom."""
    match expr:
        case Const(value):
            return Linear(const=int(value))
        case Apply(ops.ADD, (left, right)):
            return linear(left).plus(linear(right))
        case Apply(ops.SUB, (left, right)):
            return linear(left).plus(linear(right), -1)
        case Apply(ops.NEG, (inner,)):
            return linear(inner).scaled(-1)
        case Apply(ops.MUL, (Const(value), other)) | Apply(ops.MUL, (other, Const(value))):
            return linear(other).scaled(int(value))
        case _:
            return Linear({expr: 1})


def weight(expr: Expr) -> int:
    """How many nodes an int expression's sum takes, atoms counting one."""
    match expr:
        case Apply(ops.ADD | ops.SUB, (left, right)):
            return 1 + weight(left) + weight(right)
        case Apply(ops.NEG, (inner,)):
            return 1 + weight(inner)
        case Apply(ops.MUL, (Const(), other)) | Apply(ops.MUL, (other, Const())):
            return 2 + weight(other)
        case _:
            return 1


def difference(left: Expr, right: Expr) -> Linear | None:
    """left - right where both are ints."""
    if kind(left) is not Kind.INT or kind(right) is not Kind.INT:
        return None
    return linear(left).plus(linear(right), -1)
