"""Tier 2: the tile test, which tells full, partial and empty tiles from per-tile summaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import (
    TRUE,
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    TensorParam,
    apply,
    axes,
    conjunction,
    disjunction,
    kind,
)
from attncc.ir.ops import Kind
from attncc.ir.plan import Note, Plan, Summary, TileTest
from attncc.ir.rewrite import Rewriter, postorder
from attncc.passes.interval_rules.arithmetic import bounded
from attncc.passes.interval_rules.interval import NAN, Interval
from attncc.passes.intervals import Bounder
from attncc.passes.linear import Linear, difference
from attncc.passes.monotone import direction
from attncc.passes.precision import same_in_any_dtype
from attncc.passes.simplify import NEGATED, RULES, chain, flatten

TOKENS = Axis.Q | Axis.KV
ZERO = Const(0)
SPLITS = 4
"""Case splits tried per `or`; each costs two summaries a tensor."""
OPERANDS = 8
"""Longer unions are not split: it would take their length squared."""
BIG = Const(2**30)
"""Stands in for positions left out of a minimum; any value would be sound."""


def infer_tiles(plan: Plan) -> Plan:
    """Bounds of the mask over a tile, each one-token-axis part by its exact minimum and maximum.

    Loose where a part reads both token axes and is not monotone in either: remainders, products and
    bits of both positions, and tensors at more than two places in a row on a tile.
    """
    simplify = Rewriter(RULES)
    finder = _Finder(simplify, frozenset(param.name for param in plan.program.params))
    test = finder.bounds(finder.regrouped(plan.mask))
    assert test.lo is not None and test.hi is not None, "the mask is a bool"
    used = _tensors(test.lo) | _tensors(test.hi)
    summaries = tuple(s for s in finder.summaries.values() if {s.low, s.high} & used)
    notes = tuple(Note("infer_tiles", text) for text in dict.fromkeys(_losses(plan.mask)))
    tiles = TileTest(summaries, must=test.lo, may=test.hi)
    return replace(plan, tiles=tiles, notes=plan.notes + notes)


def _tensors(expr: Expr) -> set[TensorParam]:
    return {node.tensor for node in postorder(expr) if isinstance(node, Load)}


def _losses(mask: Expr) -> Iterable[str]:
    """Why tiles may be called partial that are not."""
    for node in postorder(mask):
        if axes(node) & TOKENS != TOKENS:
            continue
        match node:
            case Load(tensor):
                yield (
                    f"{tensor.name!r} is read at both positions: it is known on tiles where each "
                    "index takes at most two values in a row"
                )
            case Apply(ops.MOD | ops.BITAND | ops.BITOR | ops.BITXOR, _):
                symbol = node.op.symbol
                yield f"'{symbol}' of both positions is exact only where it is constant on a tile"
            case _:
                pass


@dataclass
class _Finder:
    simplify: Rewriter
    taken: frozenset[str] = frozenset()
    """Names of the program's own, which no summary may have."""
    numbers: Iterator[int] = field(default_factory=count)
    summaries: dict[tuple[Expr, Axis], Summary] = field(default_factory=dict)
    bounders: dict[Expr, Bounder] = field(default_factory=dict)

    # -- shaping the mask

    def regrouped(self, expr: Expr) -> Expr:
        """Operands of `and` and `or` gathered by token axis, ints moved to their axis' side.

        Order, and with it what guards a read, is lost: summaries read without checks.
        """
        done: dict[int, Expr] = {}
        for node in postorder(expr):
            parts = tuple(done[id(child)] for child in ir.children(node))
            done[id(node)] = self._regrouped(ir.rebuild(node, parts))
        return done[id(expr)]

    def _regrouped(self, node: Expr) -> Expr:
        match node:
            case Apply(ops.NOT, (Apply(ops.AND | ops.OR as op, _) as inner,)):
                parts = tuple(self.simplify(apply(ops.NOT, part)) for part in flatten(op, inner))
                both = disjunction(parts) if op is ops.AND else conjunction(parts)
                return self._regrouped(both)
            case Apply(ops.AND | ops.OR, _):
                return _by_axis(node)
            case Apply(op, (x, y)) if op in NEGATED:
                form = difference(x, y)
                return node if form is None else self._sides(node, form)
            case _:
                return node

    def _sides(self, node: Apply, form: Linear) -> Expr:
        """x OP y with q's terms on the left and kv's on the right, where no term reads both."""
        if any(axes(atom) & TOKENS == TOKENS for atom in form.terms):
            return node
        right = {atom: -f for atom, f in form.terms.items() if axes(atom) & Axis.KV}
        left = {atom: f for atom, f in form.terms.items() if not axes(atom) & Axis.KV}
        if not left or not right:
            return node
        q_side = self.simplify(Linear(left, form.const).expr())
        return Apply(node.op, (q_side, self.simplify(Linear(right).expr())), node.span)

    # -- bounding it

    def bounds(self, expr: Expr, given: Expr = TRUE) -> Interval:
        """(must, may), over the positions of the tile where `given`, a one-axis bool, holds."""
        if isinstance(expr, Apply) and expr.op in (ops.AND, ops.OR) and given == TRUE:
            return self._chain(expr)
        return self._bounder(given)(expr)

    def _chain(self, expr: Apply) -> Interval:
        parts = list(flatten(expr.op, expr))
        found = [self.bounds(part) for part in parts]
        must = self._fold(expr.op, [part.lo for part in found])
        may = self._fold(expr.op, [part.hi for part in found])
        if expr.op is ops.OR and len(parts) <= OPERANDS:
            must = self._fold(ops.OR, [must, *self._covered(parts)])
        return Interval(must, may)

    def _fold(self, op: ops.Op, parts: list[Expr | None]) -> Expr:
        result: Expr | None = None
        for part in parts:
            assert part is not None, "bools have both bounds"
            result = part if result is None else self.simplify.make(op, result, part)
        assert result is not None, "a chain has operands"
        return result

    def _covered(self, parts: list[Expr]) -> list[Expr]:
        """(p and x) or y is full where x is, and y is wherever p, of one token axis, fails."""
        found: list[Expr] = []
        for i, part in enumerate(parts):
            others = [other for j, other in enumerate(parts) if j != i]
            conjuncts = list(flatten(ops.AND, part))
            for p in conjuncts:
                if len(found) < SPLITS and self._splits(p, others):
                    rest = [self.bounds(c).lo for c in conjuncts if c is not p]
                    fails = self.simplify(apply(ops.NOT, p))
                    held = self.bounds(disjunction(tuple(others)), given=fails).lo
                    found.append(self._fold(ops.AND, [*rest, held]))
        return found

    def _splits(self, p: Expr, others: list[Expr]) -> bool:
        axis = axes(p) & TOKENS
        if axis not in (Axis.Q, Axis.KV) or not same_in_any_dtype(p):
            return False
        return any(
            _summarised(node) and axes(node) & TOKENS == axis
            for other in others
            for node in postorder(other)
        )

    def _bounder(self, given: Expr) -> Bounder:
        if given not in self.bounders:
            self.bounders[given] = Bounder(self.simplify, lambda expr: self._leaf(expr, given))
        return self.bounders[given]

    def _leaf(self, expr: Expr, given: Expr) -> Interval | None:
        if not _summarised(expr):
            return None
        axis = axes(expr) & TOKENS
        if given == TRUE or axes(given) & TOKENS != axis:
            summary = self._summary(expr, axis)
            return self._known(Interval(_read(summary.low, axis), _read(summary.high, axis)), given)
        return self._known(self._among(expr, axis, given), given)

    def _known(self, read: Interval, given: Expr) -> Interval:
        """A float summary that is -inf to inf stands for nan too, which bounds nothing."""
        low, high = read.lo, read.hi
        if low is None or high is None or kind(low) is not Kind.FLOAT:
            return read
        known = bounded(self._bounder(given), low, high)
        make = self.simplify.make
        return Interval(make(ops.WHERE, known, low, NAN), make(ops.WHERE, known, high, NAN))

    def _among(self, expr: Expr, axis: Axis, given: Expr) -> Interval:
        """Bounds over the positions where `given` holds, by pushing the others out of the way."""
        fails = self.simplify(apply(ops.NOT, given))
        low: Expr
        high: Expr
        if kind(expr) is Kind.BOOL:
            low, high = apply(ops.OR, fails, expr), apply(ops.AND, given, expr)
        else:
            big = BIG if kind(expr) is Kind.INT else Const(1e30)
            low = apply(ops.WHERE, given, expr, big)
            high = apply(ops.WHERE, given, expr, apply(ops.NEG, big))
        low, high = self.simplify(low), self.simplify(high)
        below, above = self._summary(low, axis), self._summary(high, axis)
        return Interval(_read(below.low, axis), _read(above.high, axis))

    def _summary(self, expr: Expr, axis: Axis) -> Summary:
        if (expr, axis) not in self.summaries:
            prefix = "q" if axis is Axis.Q else "kv"
            names = ((f"{prefix}_low_{n}", f"{prefix}_high_{n}") for n in self.numbers)
            ends = next(pair for pair in names if self.taken.isdisjoint(pair))
            dims = (
                "batch" if axes(expr) & Axis.B else 1,
                "heads" if axes(expr) & Axis.H else 1,
                f"{prefix}_tiles",
            )
            low, high = (TensorParam(name, kind(expr), dims) for name in ends)
            self.summaries[expr, axis] = Summary(expr, axis, low, high)
        return self.summaries[expr, axis]


def _read(tensor: TensorParam, axis: Axis) -> Expr:
    batch, heads, _ = tensor.dims
    tile = ir.Q_TILE if axis is Axis.Q else ir.KV_TILE
    return Load(tensor, (ZERO if batch == 1 else ir.B, ZERO if heads == 1 else ir.H, tile))


def _summarised(expr: Expr) -> bool:
    """Whether an expression reads one token axis in a way that the interval table may lose."""
    axis = axes(expr) & TOKENS
    if axis not in (Axis.Q, Axis.KV) or not isinstance(expr, Apply | Load):
        return False
    if kind(expr) is not Kind.FLOAT and not same_in_any_dtype(expr):
        return False
    return not _monotone(expr, axis)


def _monotone(expr: Expr, axis: Axis) -> bool:
    if isinstance(expr, Apply) and expr.op in (ops.LT, ops.LE, ops.GT, ops.GE, ops.EQ, ops.NE):
        form = difference(*expr.args)
        return form is not None and direction(form.expr(), axis) is not None
    return kind(expr) is Kind.INT and direction(expr, axis) is not None


def _by_axis(node: Apply) -> Expr:
    """The operands in order: of no token axis, of q, of kv, of both; those of one axis together."""
    groups: dict[Axis, list[Expr]] = {Axis.NONE: [], Axis.Q: [], Axis.KV: [], TOKENS: []}
    for part in flatten(node.op, node):
        groups[axes(part) & TOKENS].append(part)
    join = conjunction if node.op is ops.AND else disjunction
    parts: list[Expr] = []
    for axis, group in groups.items():
        together = axis in (Axis.Q, Axis.KV) and any(map(_summarised, group))
        parts.extend([join(tuple(group))] if together and group else group)
    return chain(node.op, parts)
