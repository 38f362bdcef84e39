"""Disjunctive form of a mask, its integer comparisons as linear forms <= 0, with a limit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, Expr, apply, axes, kind
from attncc.ir.ops import Kind
from attncc.passes.linear import Linear, difference, linear
from attncc.passes.simplify import NEGATED, flatten

LIMIT = 8
"""Disjuncts; a part that would make more stays one opaque literal."""
MAX_DEPTH = 40
"""Parts nested deeper stay opaque too."""


@dataclass(frozen=True)
class AtMostZero:
    """The literal form <= 0."""

    form: Linear
    source: Expr


Literal = AtMostZero | Expr
Conjunct = tuple[Literal, ...]
Disjuncts = list[Conjunct]

ALWAYS: Disjuncts = [()]


class Normalizer:
    """Splits on what reads `axis`; parts that do not stay whole, to be bounded over the tile."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.done: dict[tuple[int, bool], Disjuncts] = {}

    def __call__(self, expr: Expr) -> Disjuncts:
        """A disjunction of conjunctions of literals, equal to the bool expression."""
        return self._split(expr, True, MAX_DEPTH)

    def _split(self, expr: Expr, holds: bool, depth: int) -> Disjuncts:
        key = (id(expr), holds)
        if key not in self.done:
            found = None if depth == 0 else self._parts(expr, holds, depth - 1)
            short = found is not None and len(found) <= LIMIT
            self.done[key] = found if short and found is not None else [(_literal(expr, holds),)]
        return self.done[key]

    def _parts(self, expr: Expr, holds: bool, depth: int) -> Disjuncts | None:
        match expr:
            case _ if not axes(expr) & self.axis:
                return None
            case Apply(ops.NOT, (inner,)):
                return self._split(inner, not holds, depth)
            case Apply(ops.AND | ops.OR, _):
                parts = list(flatten(expr.op, expr))
                if (expr.op is ops.AND) == holds:
                    return self._every(parts, holds, depth)
                return _any([self._split(part, holds, depth) for part in parts])
            case Apply(ops.WHERE, (c, x, y)):
                return self._either(c, x, y, holds, depth)
            case Apply(ops.EQ | ops.NE, (x, y)) if kind(x) is Kind.BOOL:
                equal = (expr.op is ops.EQ) == holds
                yes, no = self._split(y, equal, depth), self._split(y, not equal, depth)
                return self._cases(x, yes, no, depth)
            case Apply(op, (x, y)) if op in NEGATED:
                form = difference(x, y)
                return None if form is None else self._comparison(expr, form, holds, depth)
            case _:
                return None

    def _every(self, parts: list[Expr], holds: bool, depth: int) -> Disjuncts:
        """All of the parts; one that would make too many disjuncts stays whole."""
        result = ALWAYS
        for part in parts:
            cases = self._split(part, holds, depth)
            if len(result) * len(cases) > LIMIT:
                cases = [(_literal(part, holds),)]
            result = _all([result, cases])
        return result

    def _either(self, c: Expr, x: Expr, y: Expr, holds: bool, depth: int) -> Disjuncts:
        return self._cases(c, self._split(x, holds, depth), self._split(y, holds, depth), depth)

    def _cases(self, c: Expr, yes: Disjuncts, no: Disjuncts, depth: int) -> Disjuncts:
        """(c and yes) or (not c and no)."""
        left = _all([self._split(c, True, depth), yes])
        return _any([left, _all([self._split(c, False, depth), no])])

    def _comparison(self, expr: Apply, form: Linear, holds: bool, depth: int) -> Disjuncts:
        """x OP y, for form = x - y."""
        one = Linear(const=1)
        below = AtMostZero(form.plus(one), expr)  # x < y
        at_most = AtMostZero(form, expr)
        above = AtMostZero(form.scaled(-1).plus(one), expr)
        at_least = AtMostZero(form.scaled(-1), expr)
        literals: dict[object, list[list[AtMostZero]]] = {
            ops.LT: [[below]],
            ops.LE: [[at_most]],
            ops.GT: [[above]],
            ops.GE: [[at_least]],
            ops.EQ: [[at_most, at_least]],
            ops.NE: [[below], [above]],
        }
        op = expr.op if holds else NEGATED[expr.op]
        return _any([_all([self._opened(x, depth) for x in one_of]) for one_of in literals[op]])

    def _opened(self, literal: AtMostZero, depth: int) -> Disjuncts:
        """abs, min, max and where of what reads the axis, as cases of linear forms."""
        for atom, factor in literal.form.terms.items():
            if depth > 0 and isinstance(atom, Apply) and axes(atom) & self.axis:
                cases = self._cases_of(literal, atom, factor, depth - 1)
                if cases is not None and len(cases) <= LIMIT:
                    return cases
        return [(literal,)]

    def _cases_of(
        self, literal: AtMostZero, atom: Apply, factor: int, depth: int
    ) -> Disjuncts | None:
        rest = literal.form.without(atom)

        def with_atom(inner: Linear) -> Disjuncts:
            return self._opened(AtMostZero(rest.plus(inner, factor), literal.source), depth)

        match atom:
            case Apply(ops.ABS, (x,)):
                both = [with_atom(linear(x)), with_atom(linear(x).scaled(-1))]
                return _all(both) if factor > 0 else _any(both)
            case Apply(ops.MIN | ops.MAX, (x, y)):
                both = [with_atom(linear(x)), with_atom(linear(y))]
                return _all(both) if (atom.op is ops.MAX) == (factor > 0) else _any(both)
            case Apply(ops.WHERE, (c, x, y)):
                return self._cases(c, with_atom(linear(x)), with_atom(linear(y)), depth)
            case _:
                return None


def _literal(expr: Expr, holds: bool) -> Expr:
    return expr if holds else apply(ops.NOT, expr)


def _any(parts: list[Disjuncts]) -> Disjuncts:
    return [conjunct for part in parts for conjunct in part]


def _all(parts: list[Disjuncts]) -> Disjuncts:
    """Every combination; longer than LIMIT, and then of no use, where there are too many."""
    result = ALWAYS
    for part in parts:
        result = [left + right for left, right in product(result, part)]
        if len(result) > LIMIT:
            return result
    return result
