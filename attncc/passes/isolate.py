"""Solve a linear form <= 0 for one position, over the integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attncc.ir import ops
from attncc.ir.expr import SIZES, Apply, Const, Expr, Index, Load, Scalar, apply, axes
from attncc.passes.linear import Linear, linear

Positive = frozenset[Scalar]
Find = Callable[[Load, bool, Linear, Positive], Linear | None]
"""(load, upper, bound, positive): what load <= bound, or >= bound, says of the load's last index,
wherever all of `positive` are > 0; None for nothing."""


@dataclass(frozen=True)
class Limit:
    """position <= bound (`upper`) or position >= bound, wherever all of `positive` are > 0."""

    upper: bool
    bound: Linear
    positive: Positive = frozenset()


def isolate(form: Linear, position: Index, find: Find | None = None) -> Limit | None:
    """The limit that form <= 0 puts on the position.

    Goes through sums, constant factors, // and * by constants > 0, sizes and scalar parameters,
    and through reads that `find` finds. Refuses forms where the position occurs in several atoms or
    inside anything else.
    """
    return _Solver(position, find).limit(form, frozenset())


@dataclass(frozen=True)
class _Solver:
    position: Index
    find: Find | None

    def limit(self, form: Linear, positive: Positive) -> Limit | None:
        """form <= 0"""
        inside = [atom for atom in form.terms if axes(atom) & self.position.axes]
        if len(inside) != 1:
            return None
        atom = inside[0]
        factor = form.terms[atom]
        rest = form.without(atom)
        if factor > 0:
            return self._solved(atom, True, _floor(rest.scaled(-1), factor), positive)
        ceiling = _floor(rest.plus(Linear(const=-factor - 1)), -factor)
        return self._solved(atom, False, ceiling, positive)

    def _solved(self, atom: Expr, upper: bool, bound: Linear, positive: Positive) -> Limit | None:
        """atom <= bound or atom >= bound."""
        match atom:
            case Index():
                return Limit(upper, bound, positive) if atom == self.position else None
            case Apply(ops.FLOORDIV, (x, d)):
                # x // d <= n is x <= n * d + d - 1; x // d >= n is x >= n * d
                size, needs = _divisor(d)
                if size is None:
                    return None
                edge = _product(bound, size)
                if upper:
                    edge = edge.plus(size).plus(Linear(const=1), -1)
                return self._nested(x, upper, edge, positive | needs)
            case Apply(ops.MUL, (x, d)):
                # x * d <= n is x <= n // d; x * d >= n is x >= (n + d - 1) // d
                x, d = (x, d) if axes(x) & self.position.axes else (d, x)
                size, needs = _divisor(d)
                if size is None:
                    return None
                if not upper:
                    bound = bound.plus(size).plus(Linear(const=1), -1)
                quotient = linear(apply(ops.FLOORDIV, bound.expr(), d))
                return self._nested(x, upper, quotient, positive | needs)
            case Load() if self.find is not None:
                found = self.find(atom, upper, bound, positive)
                if found is None:
                    return None
                return self._nested(atom.at[-1], upper, found, positive)
            case _:
                return None

    def _nested(self, x: Expr, upper: bool, bound: Linear, positive: Positive) -> Limit | None:
        """x <= bound or x >= bound."""
        return self.limit(linear(x).plus(bound, -1).scaled(1 if upper else -1), positive)


def _floor(form: Linear, by: int) -> Linear:
    if by == 1:
        return form
    return linear(apply(ops.FLOORDIV, form.expr(), Const(by)))


def _divisor(d: Expr) -> tuple[Linear | None, frozenset[Scalar]]:
    """(d, the scalars that must be positive), or None where its sign cannot be told."""
    match d:
        case Const(value):
            return (linear(d) if value > 0 else None), frozenset()
        case Scalar(param):
            # Sizes are positive wherever there is a pair.
            return linear(d), frozenset() if param in SIZES else frozenset((d,))
        case _:
            return None, frozenset()


def _product(form: Linear, size: Linear) -> Linear:
    if not size.terms:
        return form.scaled(size.const)
    return linear(apply(ops.MUL, form.expr(), size.expr()))
