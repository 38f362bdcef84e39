"""Unions of segments, kept as lists of limits so that merging them leaves short bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attncc.ir import ops
from attncc.ir.expr import FALSE, TRUE, Const, Expr
from attncc.ir.plan import Segment
from attncc.ir.rewrite import Rewriter
from attncc.passes.facts import FACTS, Facts

ZERO = Const(0)


@dataclass(frozen=True)
class Piece:
    """max(0, *lows) <= i < min(*highs, length), where the guard holds; else empty."""

    lows: tuple[Expr, ...] = ()
    highs: tuple[Expr, ...] = ()
    guard: Expr = TRUE


class Merger:
    """Merges the pieces of one union over positions [0, length)."""

    def __init__(self, simplify: Rewriter, length: Expr, facts: Facts = FACTS) -> None:
        self.make = simplify.make
        self.length = length
        self.facts = facts

    def union(self, pieces: Sequence[Piece], most: int) -> tuple[Segment, ...] | None:
        """At most that many segments covering exactly the pieces, or None."""
        merged = self._merged([self._tidy(p) for p in pieces if p.guard != FALSE])
        if len(merged) > most:
            return None
        segments = (self._segment(piece) for piece in merged)
        kept = [s for s in segments if not self.facts.at_most(s.hi, s.lo)]
        return tuple(sorted(kept, key=lambda segment: segment.lo != ZERO))

    def hull(self, pieces: Sequence[Piece]) -> Segment:
        """One segment around all pieces."""
        segments = [self._segment(self._tidy(p)) for p in pieces if p.guard != FALSE]
        if not segments:
            return Segment(ZERO, ZERO)
        lo, hi = segments[0].lo, segments[0].hi
        for other in segments[1:]:
            lo = self.make(ops.MIN, lo, other.lo)
            hi = self.make(ops.MAX, hi, other.hi)
        # An empty segment may lie beyond the end.
        return Segment(lo, self.make(ops.MIN, hi, self.length))

    def _segment(self, piece: Piece) -> Segment:
        lo = self._lo(piece)
        hi = self._min((*piece.highs, self.length))
        if piece.guard != TRUE:
            hi = self.make(ops.WHERE, piece.guard, hi, lo)
        return Segment(lo, hi)

    def _lo(self, piece: Piece) -> Expr:
        result: Expr = ZERO
        for low in piece.lows:
            result = self.make(ops.MAX, result, low)
        return result

    def _min(self, parts: Sequence[Expr]) -> Expr:
        result = parts[0]
        for part in parts[1:]:
            result = self.make(ops.MIN, result, part)
        return result

    def _tidy(self, piece: Piece) -> Piece:
        """Without the limits that others make needless."""
        lows = _needed(piece.lows, lambda one, two: self.facts.at_most(two, one))
        highs = _needed(piece.highs, self.facts.at_most)
        lows = tuple(low for low in lows if not self.facts.at_most(low, ZERO))
        highs = tuple(high for high in highs if not self.facts.at_most(self.length, high))
        return Piece(lows, highs, piece.guard)

    def _merged(self, pieces: list[Piece]) -> list[Piece]:
        for i, one in enumerate(pieces):
            for j, two in enumerate(pieces):
                both = self._pair(one, two) if i != j else None
                if both is not None:
                    rest = [p for k, p in enumerate(pieces) if k not in (i, j)]
                    at = min(i, j)
                    return self._merged([*rest[:at], both, *rest[at:]])
        return pieces

    def _pair(self, one: Piece, two: Piece) -> Piece | None:
        """One piece for both: contained, with the same start, or with the same end."""
        if self._contains(one, two):
            return one
        if self._contains(two, one):
            return two
        if set(one.lows) == set(two.lows):
            return self._same_start(one, two)
        if set(one.highs) == set(two.highs) and TRUE in (one.guard, two.guard):
            return self._same_end(one, two)
        return self._touching(one, two) if one.guard == two.guard == TRUE else None

    def _contains(self, one: Piece, two: Piece) -> bool:
        if one.guard != TRUE and one.guard != two.guard:
            return False
        starts = set(one.lows) <= set(two.lows) or self.facts.at_most(self._lo(one), self._lo(two))
        return starts and set(one.highs) <= set(two.highs)

    def _same_start(self, one: Piece, two: Piece) -> Piece:
        if one.guard == two.guard:
            common = tuple(high for high in one.highs if high in two.highs)
            ends = [
                self._min([high for high in piece.highs if high not in common])
                for piece in (one, two)
            ]
            return Piece(one.lows, (self.make(ops.MAX, *ends), *common), one.guard)
        if one.guard == TRUE or (two.guard != TRUE and len(one.highs) > len(two.highs)):
            one, two = two, one
        hi = self._guarded_hi(one, two)
        return Piece(one.lows, (hi,))

    def _same_end(self, one: Piece, two: Piece) -> Piece:
        if one.guard != TRUE:
            one, two = two, one
        both = self.make(ops.MIN, self._lo(one), self._lo(two))
        return Piece((self.make(ops.WHERE, two.guard, both, self._lo(one)),), one.highs)

    def _guarded_hi(self, one: Piece, two: Piece) -> Expr:
        """The end of the union of two pieces with one start, one of them guarded."""
        one_hi = self._min((*one.highs, self.length))
        other = self._segment(two).hi
        wider = set(one.highs) <= set(two.highs) and two.guard == TRUE
        both = one_hi if wider else self.make(ops.MAX, one_hi, other)
        return self.make(ops.WHERE, one.guard, both, other)

    def _touching(self, one: Piece, two: Piece) -> Piece | None:
        """[a, b) and [c, d) with c <= b, a <= c proved: [a, max(b, d)) where one is not empty."""
        first, second = self._segment(one), self._segment(two)
        meets = self.facts.at_most(second.lo, first.hi) and self.facts.at_most(first.lo, second.lo)
        return Piece(one.lows, (self.make(ops.MAX, first.hi, second.hi),)) if meets else None


def _needed(parts: tuple[Expr, ...], implies: Callable[[Expr, Expr], bool]) -> tuple[Expr, ...]:
    """The parts without repeats and without those that another part implies."""
    kept: list[Expr] = []
    for part in parts:
        if any(implies(other, part) for other in kept):
            continue
        kept = [other for other in kept if not implies(part, other)]
        kept.append(part)
    return tuple(kept)
