"""Symbolic intervals: bounds of an expression over a tile, as expressions over the tile's ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import assert_never

from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import TRUE, Apply, Axis, Const, Expr, Index, Load, Scalar, Score, kind
from attncc.ir.ops import Kind, Op
from attncc.ir.rewrite import Rewriter
from attncc.passes.facts import FACTS, Facts
from attncc.passes.interval_rules import RULES
from attncc.passes.interval_rules.interval import UNSURE, WHOLE, Interval, point
from attncc.passes.precision import same_in_any_dtype

RELATIVE = 1e-5
"""Widens float results: float32 kernels (ex2.approx: 2**-22) and float64 analysis then agree."""
TINY = 1e-30
"""Widens floats around 0, where the relative margin is nothing."""

MAX_DEPTH = 90
"""Bounds nested deeper are given up, since evaluating and printing them recurses."""

MAX_MOVING = 2
"""Indices of a read that may have two values on a tile; each doubles the elements looked at."""

TOKENS = Axis.Q | Axis.KV

TILE_ENDS: dict[Expr, Interval] = {
    ir.Q_IDX: Interval(ir.Q_LO, ir.Q_LAST),
    ir.KV_IDX: Interval(ir.KV_LO, ir.KV_LAST),
}

Leaf = Callable[[Expr], Interval | None]
"""Bounds that the caller knows better than the table, or None."""


class Bounder:
    """Bounds of expressions over a tile; results are simplified and share nodes.

    leaf: asked first at every node, parents before children.
    """

    def __init__(self, simplify: Rewriter, leaf: Leaf | None = None, facts: Facts = FACTS) -> None:
        self.simplify = simplify
        self.leaf = leaf
        self.facts = facts
        self.done: dict[int, tuple[Expr, Interval]] = {}
        self.depths: dict[int, int] = {}

    def __call__(self, expr: Expr) -> Interval:
        """The interval of a well-kinded expression; total, at worst `WHOLE` or `UNSURE`."""
        stack = [expr]
        while stack:
            node = stack[-1]
            waiting = [] if self._leaf(node) else self._waiting(node)
            if waiting:
                stack.extend(waiting)
            else:
                self._finish(stack.pop())
        return self.done[id(expr)][1]

    def _leaf(self, node: Expr) -> bool:
        """Whether the node is done, asking the caller first."""
        if id(node) not in self.done and self.leaf is not None:
            known = self.leaf(node)
            if known is not None:
                self.done[id(node)] = (node, known)
        return id(node) in self.done

    def _waiting(self, node: Expr) -> list[Expr]:
        bounded = isinstance(node, Apply) or self._ordered(node) or _paired(node)
        inner = ir.children(node) if bounded else ()
        return [child for child in inner if id(child) not in self.done]

    def _ordered(self, node: Expr) -> bool:
        """A read of a sorted tensor at a row that stands still on the tile."""
        if not isinstance(node, Load) or not self.facts.rises(node):
            return False
        return not any(ir.axes(index) & TOKENS for index in node.at[:-1])

    def _finish(self, node: Expr) -> None:
        if id(node) not in self.done:
            result = self._node(node)
            known = self.unknown(node) if self._too_deep(result) else result
            self.done[id(node)] = (node, known)

    def make(self, op: Op, *args: Expr) -> Expr:
        return self.simplify.make(op, *args)

    def unknown(self, expr: Expr) -> Interval:
        return UNSURE if kind(expr) is Kind.BOOL else WHOLE

    def _too_deep(self, result: Interval) -> bool:
        ends = result.lo, result.hi, result.when
        return any(end is not None and self._depth(end) > MAX_DEPTH for end in ends)

    def _depth(self, expr: Expr) -> int:
        if id(expr) not in self.depths:
            inner = [self._depth(child) for child in ir.children(expr)]
            self.depths[id(expr)] = 1 + max(inner, default=0)
        return self.depths[id(expr)]

    def _node(self, expr: Expr) -> Interval:
        match expr:
            case Const() | Scalar():
                return self._widened(expr, point(expr))
            case Index():
                return TILE_ENDS.get(expr, point(expr))
            case Score():
                return WHOLE
            case Load():
                return self._load(expr) if expr.axes & TOKENS else point(expr)
            case Apply():
                return self._apply(expr)
            case _:
                assert_never(expr)

    def _load(self, load: Load) -> Interval:
        if not self._ordered(load):
            return self._pair(load) if _paired(load) else self.unknown(load)
        *row, last = load.at
        at = self.done[id(last)][1]
        low = None if at.lo is None else self.simplify(Load(load.tensor, (*row, at.lo)))
        if at.exact:
            return Interval(low, low)
        high = None if at.hi is None else self.simplify(Load(load.tensor, (*row, at.hi)))
        return Interval(low, high)

    def _pair(self, load: Load) -> Interval:
        """Of the elements at the ends of its indices, on tiles where those are all that is read."""
        at = [self.done[id(index)][1] for index in load.at]
        if any(index.lo is None or index.hi is None for index in at):
            return self.unknown(load)
        moving = sum(not index.exact for index in at)
        few = moving <= MAX_MOVING  # else all stand still, or nothing is known
        ends: list[tuple[Expr, ...]] = []
        near: list[Expr] = []
        for index in at:
            assert index.lo is not None and index.hi is not None
            ends.append((index.lo, index.hi) if few and not index.exact else (index.lo,))
            steps = self.make(ops.SUB, index.hi, index.lo)
            near += [index.when, self.make(ops.LE, steps, Const(int(few)))]
        read = [self.simplify(Load(load.tensor, corner)) for corner in product(*ends)]
        fold = (ops.AND, ops.OR) if kind(load) is Kind.BOOL else (ops.MIN, ops.MAX)
        low, high = (self._combined(op, read) for op in fold)
        if kind(load) is Kind.FLOAT:  # it may be a float64, which kernels round
            low, high = self._moved(ops.SUB, low), self._moved(ops.ADD, high)
        return self._where(load, Interval(low, high), near)

    def _apply(self, expr: Apply) -> Interval:
        args = [self.done[id(arg)][1] for arg in expr.args]
        if all(arg.exact for arg in args) and same_in_any_dtype(expr, own=True):
            result = point(self.make(expr.op, *(arg.lo for arg in args if arg.lo is not None)))
        else:
            result = self._widened(expr, RULES[expr.op](self, expr, args))
        return self._where(expr, result, [arg.when for arg in args])

    def _where(self, expr: Expr, known: Interval, conditions: Iterable[Expr]) -> Interval:
        """What is known only on tiles where all conditions hold."""
        when: Expr = TRUE
        for condition in conditions:
            when = self.make(ops.AND, when, condition)
        if when == TRUE or known.lo is None or known.hi is None or kind(expr) is not Kind.BOOL:
            return Interval(known.lo, known.hi, when)
        must = self.make(ops.AND, when, known.lo)
        return Interval(must, self.make(ops.OR, self.make(ops.NOT, when), known.hi))

    def _widened(self, expr: Expr, interval: Interval) -> Interval:
        if kind(expr) is not Kind.FLOAT or same_in_any_dtype(expr, own=True):
            return interval
        return Interval(self._moved(ops.SUB, interval.lo), self._moved(ops.ADD, interval.hi))

    def _moved(self, op: Op, end: Expr | None) -> Expr | None:
        if end is None:
            return None
        margin = self.make(ops.MUL, self.make(ops.ABS, end), Const(RELATIVE))
        return self.make(op, end, self.make(ops.ADD, margin, Const(TINY)))

    def lowest(self, *ends: Expr | None) -> Expr | None:
        return self._combined(ops.MIN, ends)

    def highest(self, *ends: Expr | None) -> Expr | None:
        return self._combined(ops.MAX, ends)

    def _combined(self, op: Op, ends: Iterable[Expr | None]) -> Expr | None:
        result: Expr | None = None
        for end in ends:
            if end is None:
                return None
            result = end if result is None else self.make(op, result, end)
        return result


def _paired(node: Expr) -> bool:
    """A read at both positions."""
    return isinstance(node, Load) and node.axes & TOKENS == TOKENS
