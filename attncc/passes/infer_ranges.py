"""Tier 1: closed-form key ranges per query tile, and query ranges per key tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import FALSE, TRUE, Axis, Const, Expr, Index, Load, Scalar, apply, axes
from attncc.ir.plan import Note, Plan, Ranges
from attncc.ir.rewrite import Rewriter
from attncc.passes.choose_blocks import enough
from attncc.passes.disjuncts import AtMostZero, Conjunct, Literal, Normalizer
from attncc.passes.facts import FACTS, Facts
from attncc.passes.interval_rules.interval import Interval
from attncc.passes.intervals import Bounder
from attncc.passes.isolate import Limit, isolate
from attncc.passes.linear import Linear
from attncc.passes.monotone import direction
from attncc.passes.searches import Searches
from attncc.passes.segments import ZERO, Merger, Piece
from attncc.passes.simplify import RULES

MOST = 2
"""Segments a kernel loops over; more become one hull."""
LONGEST = 24
"""Literals of a conjunction that are looked at; the rest is left out."""


def infer_ranges(plan: Plan) -> Plan:
    """Isolates kv_idx (transposed: q_idx) in each literal of the mask's disjunctive form.

    What it cannot isolate is ignored by `visit`, empties that disjunct's `unmasked`, and is listed
    in `left_out`: positions inside remainders, bits, tensors or several atoms; float comparisons;
    limits that read a tensor per position, or that are not monotone along the tile. Tensors
    declared sorted are searched, and monotone; but only where ranges then say enough, since lists
    look at the tensors anyway.
    """
    if any(isinstance(node, Load) and node.tensor.sorted for node in ir.walk(plan.mask)):
        searched = _inferred(plan, Facts(ordered=True))
        ranges = (searched.key_ranges, searched.query_ranges)
        if all(found is not None and enough(found) for found in ranges):
            return searched
    return _inferred(plan, FACTS)


def _inferred(plan: Plan, facts: Facts) -> Plan:
    simplify = Rewriter(RULES)
    searches = Searches(simplify, frozenset(param.name for param in plan.program.params))
    sides = ((ir.KV_IDX, ir.Q_IDX, ir.KV_LEN), (ir.Q_IDX, ir.KV_IDX, ir.Q_LEN))
    (keys, key_notes), (queries, query_notes) = (
        _Finder(simplify, *side, searches, facts).ranges(plan.mask) for side in sides
    )
    return replace(
        plan,
        key_ranges=keys,
        query_ranges=queries,
        searches=searches.read_by((keys, queries)),
        notes=tuple(dict.fromkeys((*plan.notes, *key_notes, *query_notes))),
    )


@dataclass(frozen=True)
class _Found:
    """What a literal says: pieces to intersect, and whether that is all it says."""

    visit: Piece
    unmasked: Piece
    tight: bool


NOTHING = Piece(guard=FALSE)
IGNORED = _Found(Piece(), NOTHING, tight=False)


class _Finder:
    """Ranges of one position, over tiles of the other."""

    def __init__(
        self,
        simplify: Rewriter,
        position: Index,
        other: Index,
        size: ir.ScalarParam,
        searches: Searches,
        facts: Facts,
    ):
        self.simplify = simplify
        self.searches = searches
        self.facts = facts
        self.position = position
        self.other = other
        self.length = Scalar(size)
        self.bounders: dict[frozenset[Scalar], Bounder] = {}

    def ranges(self, mask: Expr) -> tuple[Ranges, tuple[Note, ...]]:
        conjuncts = Normalizer(self.position.axes)(mask)
        visit: list[Piece] = []
        unmasked: list[Piece] = []
        left_out: dict[Expr, None] = {}
        for conjunct in conjuncts:
            outer, inner, loose = self._conjunct(conjunct)
            visit.append(outer)
            unmasked.append(inner)
            left_out |= dict.fromkeys(loose)
        merger = Merger(self.simplify, self.length, replace(self.facts, own=self.searches.own()))
        some = merger.union(visit, MOST)
        every = merger.union(unmasked, MOST)
        notes: tuple[Note, ...] = ()
        if some is None or every is None:
            text = f"more than {MOST} segments of {self.position.name}: one hull around them"
            notes = (Note("infer_ranges", text),)
            left_out[mask] = None
        if some is None:
            some = (merger.hull(visit),)
        return Ranges(some, every or (), not left_out, tuple(left_out)), notes

    def _conjunct(self, conjunct: Conjunct) -> tuple[Piece, Piece, list[Expr]]:
        visit, unmasked = Piece(), Piece()
        loose: list[Expr] = []
        for number, literal in enumerate(conjunct):
            found = self._literal(literal) if number < LONGEST else IGNORED
            visit = self._both(visit, found.visit)
            unmasked = self._both(unmasked, found.unmasked)
            if not found.tight:
                loose.append(literal.source if isinstance(literal, AtMostZero) else literal)
        return visit, unmasked, loose

    def _both(self, one: Piece, two: Piece) -> Piece:
        guard = self.simplify.make(ops.AND, one.guard, two.guard)
        return Piece((*one.lows, *two.lows), (*one.highs, *two.highs), guard)

    def _literal(self, literal: Literal) -> _Found:
        if not isinstance(literal, AtMostZero):
            return self._guard(literal)
        if not any(axes(atom) & self.position.axes for atom in literal.form.terms):
            return self._guard(apply(ops.LE, literal.form.expr(), ZERO))
        limit = isolate(literal.form, self.position, self._search)
        return IGNORED if limit is None else self._limit(limit)

    def _search(
        self, load: Load, upper: bool, bound: Linear, positive: frozenset[Scalar]
    ) -> Linear | None:
        facts = self.facts.knowing(positive)
        return self.searches.limit(load, upper, bound, self.position, facts)

    def _guard(self, literal: Expr) -> _Found:
        """A bool that does not read the position: all positions or none."""
        if axes(literal) & self.position.axes:
            return IGNORED
        bounds = self._bounder(frozenset())(self.simplify(literal))
        assert bounds.lo is not None and bounds.hi is not None, "bools have both"
        tight = bounds.lo is bounds.hi or self._is_threshold(self.simplify(literal))
        return _Found(Piece(guard=bounds.hi), Piece(guard=bounds.lo), tight)

    def _is_threshold(self, literal: Expr) -> bool:
        """A comparison that both bounds decide exactly, since each side is monotone."""
        if not isinstance(literal, ir.Apply) or literal.op not in _COMPARISONS:
            return False
        sides = [direction(side, self.other.axes, self.facts) for side in literal.args]
        return None not in sides and 0 in sides

    def _limit(self, limit: Limit) -> _Found:
        bound = self.simplify(limit.bound.expr())
        limit = self._with_divisors(limit, bound)
        ends = self._bounder(limit.positive)(bound)
        tight = self._monotone(bound, limit.positive)
        outer, inner = (ends.hi, ends.lo) if limit.upper else (ends.lo, ends.hi)
        visit = self._piece(limit, outer, missing=Piece())
        return _Found(visit, self._piece(limit, inner, missing=NOTHING), tight)

    def _with_divisors(self, limit: Limit, bound: Expr) -> Limit:
        """Takes scalars that divide a position to be > 0, where that makes the bound monotone."""
        if self._monotone(bound, limit.positive):
            return limit
        positive = limit.positive | frozenset(
            node.args[1]
            for node in ir.walk(bound)
            if isinstance(node, ir.Apply)
            and node.op is ops.FLOORDIV
            and isinstance(node.args[1], Scalar)
        )
        return replace(limit, positive=positive) if self._monotone(bound, positive) else limit

    def _monotone(self, bound: Expr, positive: frozenset[Scalar]) -> bool:
        return direction(bound, self.other.axes, self.facts.knowing(positive)) is not None

    def _piece(self, limit: Limit, end: Expr | None, missing: Piece) -> Piece:
        if end is None:
            return missing
        guard = self._all_positive(limit.positive)
        if limit.upper:
            past = self.simplify.make(ops.ADD, end, Const(1))
            none = self.length if missing == Piece() else ZERO
            return Piece(highs=(self.simplify.make(ops.WHERE, guard, past, none),))
        none = ZERO if missing == Piece() else self.length
        return Piece(lows=(self.simplify.make(ops.WHERE, guard, end, none),))

    def _all_positive(self, scalars: frozenset[Scalar]) -> Expr:
        ordered = sorted(scalars, key=lambda scalar: scalar.param.name)
        result: Expr = TRUE
        for scalar in ordered:
            result = self.simplify.make(ops.AND, result, apply(ops.GT, scalar, ZERO))
        return result

    def _bounder(self, positive: frozenset[Scalar]) -> Bounder:
        if positive not in self.bounders:
            leaf = _hide(self.position.axes)
            self.bounders[positive] = Bounder(self.simplify, leaf, self.facts.knowing(positive))
        return self.bounders[positive]


_COMPARISONS = (ops.LT, ops.LE, ops.GT, ops.GE)


def _hide(axis: Axis) -> Callable[[Expr], Interval | None]:
    """No bound may read the position that is looked for."""

    def leaf(expr: Expr) -> Interval | None:
        assert not axes(expr) & axis, "isolated, so the position is on the other side"
        return None

    return leaf
