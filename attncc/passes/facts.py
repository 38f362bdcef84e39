"""Proofs that an int expression is never negative, from what positions and sizes are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import Apply, Const, Expr, Index, Load, Scalar, TensorParam, kind
from attncc.ir.ops import Kind
from attncc.passes.linear import Linear, linear

DEPTH = 6
"""Substitutions tried in a row; the longest useful chain seen is q_lo <= q_last <= q_len - 1."""


def _below(size: ir.ScalarParam) -> Linear:
    return Linear({Scalar(size): 1}, -1)


UPPER: dict[Expr, tuple[Linear, ...]] = {
    ir.B: (_below(ir.BATCH),),
    ir.H: (_below(ir.HEADS),),
    ir.KV_HEAD: (_below(ir.KV_HEADS), linear(ir.H)),
    ir.Q_IDX: (_below(ir.Q_LEN),),
    ir.KV_IDX: (_below(ir.KV_LEN),),
    ir.Q_LO: (linear(ir.Q_LAST),),
    ir.KV_LO: (linear(ir.KV_LAST),),
    ir.Q_LAST: (_below(ir.Q_LEN),),
    ir.KV_LAST: (_below(ir.KV_LEN),),
}
"""What a position is at most."""

LOWER: dict[Expr, tuple[Linear, ...]] = {
    ir.Q_LAST: (linear(ir.Q_LO),),
    ir.KV_LAST: (linear(ir.KV_LO),),
}
"""What a position is at least, besides 0."""


@dataclass(frozen=True)
class Facts:
    """What holds at every position.

    positive: scalars taken to be > 0.
    ordered:  elements of tensors declared sorted are taken to be known by their order.
    own:      (what a search makes, whether the position past) that seek each position's own
              element, so that first <= position < past.
    """

    positive: frozenset[Scalar] = frozenset()
    ordered: bool = False
    own: frozenset[tuple[TensorParam, bool]] = frozenset()

    def knowing(self, positive: frozenset[Scalar]) -> Facts:
        """The same with more scalars taken to be > 0."""
        return replace(self, positive=self.positive | positive)

    def rises(self, load: Load) -> bool:
        """An int read that does not fall where its last index rises; others must stand still."""
        return self.ordered and load.tensor.sorted and load.tensor.kind is Kind.INT

    def nonnegative(self, expr: Expr) -> bool:
        """Proved that expr >= 0 at every valid position; False says nothing."""
        return kind(expr) is Kind.INT and self.holds(linear(expr))

    def at_most(self, small: Expr, large: Expr) -> bool:
        """Proved that small <= large; False says nothing."""
        if kind(small) is not Kind.INT or kind(large) is not Kind.INT:
            return False
        return self.holds(linear(large).plus(linear(small), -1))

    def is_positive(self, expr: Expr) -> bool:
        """Proved that expr > 0, or that it is a size, which is > 0 wherever there is a pair."""
        if isinstance(expr, Scalar):
            return expr.param in ir.SIZES or expr in self.positive
        return self.holds(linear(expr).plus(Linear(const=1), -1))

    def holds(self, form: Linear, depth: int = DEPTH) -> bool:
        """Proved that a linear form is >= 0."""
        if not form.terms:
            return form.const >= 0
        return depth > 0 and _holds(self, tuple(form.terms.items()), form.const, depth)

    def limits(
        self, atom: Expr, upper: bool, depth: int
    ) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
        """(each of these bounds the atom, the atom is one of these); both empty if unknown."""
        match atom:
            case Index():
                return (UPPER if upper else LOWER).get(atom, ()), ()
            case Apply(ops.MIN, (x, y)):
                both = linear(x), linear(y)
                return (both, ()) if upper else ((), both)
            case Apply(ops.MAX, (x, y)):
                both = linear(x), linear(y)
                return ((), both) if upper else (both, ())
            case Apply(ops.WHERE, (_, x, y)):
                return (), (linear(x), linear(y))
            case Apply(ops.MOD, (x, d)) if upper and self.is_positive(d):
                below = linear(d).plus(Linear(const=1), -1)
                return ((below, linear(x)) if self._nonnegative(x, depth) else (below,)), ()
            case Apply(ops.FLOORDIV, (x, d)) if upper and self.is_positive(d):
                return ((linear(x),) if self._nonnegative(x, depth) else ()), ()
            case Apply(ops.ABS, (x,)):
                both = linear(x), linear(x).scaled(-1)
                return ((), both) if upper else (both, ())
            case Apply(ops.INT, (x,)) if upper and kind(x) is Kind.BOOL:
                return (Linear(const=1),), ()
            case Load(tensor, (*_, at)) if (tensor, not upper) in self.own:
                return (linear(at) if upper else linear(at).plus(Linear(const=1)),), ()
            case _:
                return (), ()

    def _nonnegative(self, expr: Expr, depth: int) -> bool:
        return depth > 0 and self.holds(linear(expr), depth - 1)

    def atom(self, atom: Expr, depth: int) -> bool:
        """Proved that an atom is >= 0."""
        match atom:
            case Index():
                return True
            case Scalar(param):
                return param in ir.SIZES or atom in self.positive
            case Const(value):
                return value >= 0
            case Apply(ops.MOD, (_, d)):
                return self.is_positive(d)
            case Apply(ops.ABS | ops.BIT_LENGTH, _):
                return True
            case Apply(ops.INT, (x,)):
                return kind(x) is Kind.BOOL
            case Apply(ops.FLOORDIV, (x, d)):
                return self.is_positive(d) and self._nonnegative(x, depth)
            case Apply(ops.SHR, (x, _)):
                return self._nonnegative(x, depth)
            case Apply(ops.MUL | ops.MIN, (x, y)):
                return self._nonnegative(x, depth) and self._nonnegative(y, depth)
            case Apply(ops.MAX | ops.BITAND, (x, y)):
                return self._nonnegative(x, depth) or self._nonnegative(y, depth)
            case Apply(ops.WHERE, (c, x, y)):
                knowing = self.knowing(positive_where(c))
                return knowing._nonnegative(x, depth) and self._nonnegative(y, depth)
            case _:
                return False


def positive_where(condition: Expr) -> frozenset[Scalar]:
    """The scalars that a condition holds to be > 0."""
    match condition:
        case Apply(ops.GT, (Scalar() as scalar, Const(value))) if value >= 0:
            return frozenset((scalar,))
        case _:
            return frozenset()


FACTS = Facts()


@lru_cache(maxsize=2**14)
def _holds(facts: Facts, terms: tuple[tuple[Expr, int], ...], const: int, depth: int) -> bool:
    """Whether const + terms >= 0. Kept, since simplifying asks the same of every parent."""
    form = Linear(dict(terms), const)
    at_least = const + sum(factor for atom, factor in terms if atom in facts.positive)
    open_terms = [(a, f) for a, f in terms if f < 0 or not facts.atom(a, depth - 1)]
    if not open_terms:
        return at_least >= 0
    for atom, factor in open_terms:
        any_of, all_of = facts.limits(atom, upper=factor < 0, depth=depth - 1)
        if any_of or all_of:  # every open term must go, so which goes first hardly matters
            rest = form.without(atom)
            swap = (facts.holds(rest.plus(by, factor), depth - 1) for by in any_of or all_of)
            return any(swap) if any_of else all(swap)
    return False
