"""What the kernels of one Plan compute: every expression they print, in the units they use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from attncc.ir import ops
from attncc.ir.derivative import derivative
from attncc.ir.expr import (
    KV_IDX,
    KV_LAST,
    KV_LO,
    Q_IDX,
    Q_LAST,
    Q_LO,
    TRUE,
    Apply,
    Axis,
    Const,
    Expr,
    Index,
    Load,
    Scalar,
    ScalarParam,
    Score,
    TensorParam,
    axes,
    children,
    disjunction,
    rebuild,
    walk,
)
from attncc.ir.plan import Blocks, Plan, Ranges
from attncc.ir.program import Normalize
from attncc.ir.rewrite import Rewriter, postorder, signed_terms
from attncc.passes.fold_scale import ONE, SCALE, in_log2_units, in_raw_units, products
from attncc.passes.simplify import RULES


class Reduction(Enum):
    """How a kernel hands out the gradient of a captured tensor."""

    ROW = "row"
    """Summed over keys, one number a query; the index varies with b, h and q_idx at most."""
    COLUMN = "column"
    """Summed over queries, one number a key and query head."""
    PAIR = "pair"
    """Added to the element itself, pair by pair."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """d(loss)/d(load) = ds * factor, where ds is the gradient of the score."""

    load: Load
    factor: Expr
    reduction: Reduction

    @property
    def by_distance(self) -> bool:
        """Whether pairs of one distance, q_idx - kv_idx, read one element of a head."""
        return self.reduction is Reduction.PAIR and all(map(_by_distance, self.load.at))


@dataclass(frozen=True, slots=True)
class Lowering:
    """Expressions over Score() as the raw q . k, and all that kernel arguments follow from."""

    plan: Plan
    mask: Expr | None
    """None where every pair is kept. For kernels of query tiles: may read more of a query."""
    key_mask: Expr | None
    """The same for kernels of key tiles: may read more of a key."""
    score: Expr
    """The score itself, or times log2(e) where that costs no product a pair."""
    in_log2: bool
    slope: Expr | None
    """d(score)/d(scaled q . k); None where it is 1."""
    gradients: tuple[Gradient, ...]
    sink: Expr | None

    @property
    def normalize(self) -> Normalize:
        return self.plan.program.normalize

    @property
    def softmax(self) -> bool:
        return self.normalize is Normalize.SOFTMAX

    @property
    def plain(self) -> bool:
        """The score is q . k times a scale known to be positive, which may follow the maximum."""
        return self.softmax and self.plan.score == Score() and self.plan.program.scale is None


def lower(plan: Plan) -> Lowering:
    """The kernels' view of a plan."""
    program = plan.program
    raw, log2 = in_raw_units(plan.score), in_log2_units(plan.score)
    # Late: the exponentials, which are of base 2, multiply beside their subtraction.
    late = program.normalize is not Normalize.SOFTMAX or products(raw) < products(log2)
    slope = in_raw_units(derivative(plan.score, Score()))
    return Lowering(
        plan=plan,
        mask=_mask(plan, plan.key_ranges, KV_IDX, {Q_LO: Q_IDX, Q_LAST: Q_IDX}),
        key_mask=_mask(plan, plan.query_ranges, Q_IDX, {KV_LO: KV_IDX, KV_LAST: KV_IDX}),
        score=raw if late else log2,
        in_log2=not late,
        slope=None if slope == ONE else slope,
        gradients=tuple(_gradients(plan.score)),
        sink=program.sink,
    )


def _mask(
    plan: Plan, ranges: Ranges | None, position: Index, ends: Mapping[Expr, Index]
) -> Expr | None:
    """The mask, or the ranges of a row alone where they are searched for.

    Complete ranges of one row hold what it keeps, no more. Their ends are read once a row, and what
    the mask reads of the other side once a tile, in which a kernel would wait for it.
    """
    if plan.mask == TRUE:
        return None
    found = row_ends(plan, ranges, ends) if plan.searches else None
    return plan.mask if found is None else between(position, found)


Ends = tuple[tuple[Expr, Expr], ...]
"""(lo, hi) of segments that one row keeps."""


def row_ends(plan: Plan, ranges: Ranges | None, ends: Mapping[Expr, Index]) -> Ends | None:
    """The ranges of single rows where they say all that the mask says, in 32 bits if it does."""
    if plan.blocks is not Blocks.RANGES or ranges is None or not ranges.complete:
        return None
    found = {search.tensor for search in plan.searches}
    if any(_scaled(end, found) for s in ranges.visit for end in (s.lo, s.hi)):
        return None  # what is FAR leaves 32 bits
    simplify = Rewriter(RULES)
    replaced = ([simplify(_replaced(end, ends)) for end in (s.lo, s.hi)] for s in ranges.visit)
    return tuple((lo, hi) for lo, hi in replaced)


def between(position: Index, found: Ends) -> Expr:
    """Whether a position lies in one of the segments."""
    make = Rewriter(RULES).make
    parts = (
        make(ops.AND, make(ops.GE, position, lo), make(ops.LT, position, hi)) for lo, hi in found
    )
    return disjunction(tuple(parts))


def _scaled(expr: Expr, found: set[TensorParam]) -> bool:
    """Whether what is found is more than added to, compared and chosen from."""

    def reads(node: Expr) -> bool:
        return any(isinstance(inner, Load) and inner.tensor in found for inner in walk(node))

    for node in walk(expr):
        match node:
            case Apply(ops.ADD | ops.SUB, (x, y)):
                if reads(x) and reads(y):
                    return True
            case Apply(ops.MIN | ops.MAX | ops.WHERE, _):
                pass
            case Apply():
                if reads(node):
                    return True
            case _:
                pass
    return False


def _replaced(expr: Expr, by: Mapping[Expr, Index]) -> Expr:
    done: dict[int, Expr] = {}
    for node in postorder(expr):
        parts = tuple(done[id(child)] for child in children(node))
        done[id(node)] = by.get(node) or rebuild(node, parts)
    return done[id(expr)]


def _gradients(score: Expr) -> Iterable[Gradient]:
    loads = dict.fromkeys(n for n in walk(score) if isinstance(n, Load) and n.tensor.grad)
    for load in loads:
        factor = in_raw_units(derivative(score, load))
        if factor != Const(0.0):
            yield Gradient(load, factor, _reduction(load))


def _by_distance(index: Expr) -> bool:
    """Whether positions enter an index as q_idx - kv_idx alone."""
    terms = list(signed_terms(index))
    for pair in ((("+", Q_IDX), ("-", KV_IDX)), (("-", Q_IDX), ("+", KV_IDX))):
        if all(term in terms for term in pair):
            for term in pair:
                terms.remove(term)
    if len(terms) > 1 or not terms or terms[0] != ("+", index):
        return all(_by_distance(term) for _, term in terms)
    if isinstance(index, Index):
        return not index.axes & (Axis.Q | Axis.KV)
    return all(map(_by_distance, children(index)))


def _reduction(load: Load) -> Reduction:
    match bool(load.axes & Axis.Q), bool(load.axes & Axis.KV):
        case _, False:
            return Reduction.ROW
        case False, True:
            return Reduction.COLUMN
        case _:
            return Reduction.PAIR


@dataclass(frozen=True, slots=True)
class Uses:
    """The names a function of some expressions must be given, each in a fixed order."""

    scalars: tuple[ScalarParam, ...]
    tensors: tuple[TensorParam, ...]
    kv_head: bool
    axes: Axis
    """Which positions captured tensors are read at."""


def uses(exprs: Iterable[Expr | None], order: Iterable[ScalarParam | TensorParam]) -> Uses:
    """What these expressions read, tensors and scalars in the order of `order`."""
    nodes = [node for expr in exprs if expr is not None for node in walk(expr)]
    scalars = {n.param for n in nodes if isinstance(n, Scalar) and n.param is not SCALE}
    tensors = {n.tensor for n in nodes if isinstance(n, Load)}
    loaded = Axis.NONE
    for node in nodes:
        if isinstance(node, Load):
            loaded |= axes(node)
    order = tuple(order)
    return Uses(
        scalars=tuple(p for p in order if isinstance(p, ScalarParam) and p in scalars),
        tensors=tuple(p for p in order if isinstance(p, TensorParam) and p in tensors),
        kv_head=any(isinstance(n, Index) and n.name == "kv_head" for n in nodes),
        axes=loaded,
    )
