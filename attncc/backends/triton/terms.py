"""What the kernels that list tiles compute: expressions over a tile's ends and its summaries."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import (
    FALSE,
    TRUE,
    Axis,
    Const,
    Expr,
    Load,
    Scalar,
    ScalarParam,
    apply,
    axes,
    conjunction,
    disjunction,
    rebuild,
    walk,
)
from attncc.ir.ops import Kind
from attncc.ir.plan import Plan, Ranges, Segment, Summary
from attncc.ir.rewrite import Rewriter, postorder
from attncc.passes.simplify import RULES


@dataclass(frozen=True, slots=True)
class Term:
    """One end of a Summary, which the tile test reads by `name`."""

    name: str
    summary: Summary
    low: bool

    @property
    def expr(self) -> Expr:
        return self.summary.expr

    @property
    def kind(self) -> Kind:
        return self.summary.low.kind


@dataclass(frozen=True, slots=True)
class Test:
    """full: every pair of a tile is kept; some: perhaps one is. Both over Q_LO, Q_LAST, KV_LO,
    KV_LAST and a Scalar named as each term.

    keys, queries: the positions that a tile of the other axis can visit, one segment around all.
    """

    full: Expr
    some: Expr
    terms: tuple[Term, ...]
    keys: Segment
    queries: Segment

    def of(self, axis: Axis) -> tuple[Term, ...]:
        """The terms of one token axis."""
        return tuple(term for term in self.terms if term.summary.axis is axis)

    def varies(self, axis: Axis) -> Axis:
        """What the terms of one token axis vary with."""
        found = Axis.NONE
        for summary in dict.fromkeys(term.summary for term in self.of(axis)):
            found |= axes(summary.expr)
        return found


def tile_test(plan: Plan) -> Test:
    """Both tiers as one test; the same verdicts as BoundPlan.classify."""
    simplify = Rewriter(RULES)
    terms = {load: term for s in plan.tiles.summaries for load, term in _ends(s)}
    full, some = _by_ranges(plan.key_ranges)
    full = simplify(apply(ops.OR, full, plan.tiles.must))
    some = simplify(apply(ops.AND, some, plan.tiles.may))
    read = [node for expr in (full, some) for node in walk(expr) if isinstance(node, Load)]
    tensors = {load.tensor.name for load in read}
    used = dict.fromkeys(term for name, term in terms.items() if name in tensors)
    return Test(
        _with_terms(full, terms),
        _with_terms(some, terms),
        tuple(used),
        keys=_hull(plan.key_ranges, ir.KV_LEN, simplify),
        queries=_hull(plan.query_ranges, ir.Q_LEN, simplify),
    )


def _ends(summary: Summary) -> tuple[tuple[str, Term], ...]:
    low, high = summary.low.name, summary.high.name
    return (low, Term(low, summary, True)), (high, Term(high, summary, False))


def _with_terms(expr: Expr, terms: dict[str, Term]) -> Expr:
    """Reads of summaries as scalars, which the kernels load before."""
    done: dict[int, Expr] = {}
    for node in postorder(expr):
        if isinstance(node, Load) and node.tensor.name in terms:
            done[id(node)] = Scalar(ScalarParam(node.tensor.name, node.tensor.kind))
        else:
            done[id(node)] = rebuild(node, tuple(done[id(c)] for c in ir.children(node)))
    return done[id(expr)]


def _by_ranges(ranges: Ranges | None) -> tuple[Expr, Expr]:
    """(surely full, perhaps not empty) by the key ranges alone."""
    if ranges is None:
        return FALSE, TRUE
    some = disjunction(tuple(_meets(segment) for segment in ranges.visit))
    parts = list(ranges.unmasked)
    if len(parts) == 2:
        parts.append(_joined(*parts))
    return disjunction(tuple(_holds(part) for part in parts)), some


def _meets(segment: Segment) -> Expr:
    lo, hi = segment.lo, segment.hi
    return conjunction(
        (
            apply(ops.LE, lo, ir.KV_LAST),
            apply(ops.GT, hi, ir.KV_LO),
            *(() if lo == Const(0) else (apply(ops.LT, lo, hi),)),
        )
    )


def _holds(segment: Segment) -> Expr:
    inside = apply(ops.LE, segment.lo, ir.KV_LO), apply(ops.GT, segment.hi, ir.KV_LAST)
    return conjunction(inside)


def _joined(one: Segment, two: Segment) -> Segment:
    """Both as one where they touch, else nothing; a tile may lie across their seam."""
    last_lo, first_hi = apply(ops.MAX, one.lo, two.lo), apply(ops.MIN, one.hi, two.hi)
    touch = apply(ops.LE, last_lo, first_hi)
    hi = apply(ops.WHERE, touch, apply(ops.MAX, one.hi, two.hi), Const(0))
    return Segment(apply(ops.MIN, one.lo, two.lo), hi)


def _hull(ranges: Ranges | None, length: ScalarParam, simplify: Rewriter) -> Segment:
    """One segment around all that is visited; empty ones may lie anywhere, so they drop out."""
    size = Scalar(length)
    if ranges is None:
        return Segment(Const(0), size)
    if len(ranges.visit) == 1:
        return ranges.visit[0]
    lo: Expr = size
    hi: Expr = Const(0)
    for segment in ranges.visit:
        there = apply(ops.LT, segment.lo, segment.hi)
        lo = apply(ops.MIN, lo, apply(ops.WHERE, there, segment.lo, size))
        hi = apply(ops.MAX, hi, apply(ops.WHERE, there, segment.hi, Const(0)))
    return Segment(simplify(lo), simplify(hi))
