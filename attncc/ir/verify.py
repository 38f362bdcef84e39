"""What must hold of a Plan after each pass; tests run it between passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attncc.ir import expr as ir
from attncc.ir.expr import Apply, Axis, Const, Expr, Index, Load, Scalar, Score, axes, kind
from attncc.ir.ops import Kind
from attncc.ir.plan import Blocks, Order, Plan, Ranges, Summary
from attncc.ir.rewrite import postorder

OUTER = frozenset((ir.B, ir.H, ir.KV_HEAD))
Q_TILE = OUTER | {ir.Q_LO, ir.Q_LAST}
KV_TILE = OUTER | {ir.KV_LO, ir.KV_LAST}
GRID = Q_TILE | KV_TILE | {ir.Q_TILE, ir.KV_TILE}
PAIR = frozenset(ir.POSITIONS)


def verify(plan: Plan, after: str) -> None:
    """Asserts what holds after the pass of that name, and after any."""
    _any_pass(plan)
    check = AFTER.get(after)
    if check is not None:
        check(plan)


def _any_pass(plan: Plan) -> None:
    _check(plan, (plan.mask,), Kind.BOOL, PAIR)
    assert not any(isinstance(node, Score) for node in postorder(plan.mask)), (
        "a mask reads no score"
    )
    _check(plan, (plan.score,), Kind.FLOAT, PAIR)
    for ranges, ends in ((plan.key_ranges, Q_TILE), (plan.query_ranges, KV_TILE)):
        if ranges is not None:
            _ranges(plan, ranges, ends)
    _searches(plan)
    _tiles(plan)


def _check(
    plan: Plan,
    exprs: Iterable[Expr],
    of: Kind,
    positions: frozenset[Index],
    tensors: Iterable[ir.TensorParam] = (),
) -> None:
    """One kind, known names, and these positions only."""
    scalars = {*plan.program.scalars, *ir.SIZES}
    known = {*plan.program.tensors, *tensors}
    for expr in exprs:
        assert kind(expr) is of, f"{expr} is not {of.value}"
        for node in postorder(expr):
            match node:
                case Index():
                    assert node in positions, f"{node.name} has no place here"
                case Scalar(param):
                    assert param in scalars, f"{param.name} is no parameter"
                case Load(tensor, at):
                    assert tensor in known, f"{tensor.name} is no parameter"
                    assert len(at) == len(tensor.dims), f"{tensor.name} has {len(tensor.dims)} dims"
                    assert all(kind(index) is Kind.INT for index in at), "indices are ints"
                case _:
                    pass


def _ranges(plan: Plan, ranges: Ranges, ends: frozenset[Index]) -> None:
    assert ranges.complete == (not ranges.left_out), "what is left out is listed"
    segments = (*ranges.visit, *ranges.unmasked)
    found = [search.tensor for search in plan.searches]
    _check(plan, (end for s in segments for end in (s.lo, s.hi)), Kind.INT, ends, found)


def _searches(plan: Plan) -> None:
    names = [search.tensor.name for search in plan.searches]
    taken = {param.name for param in plan.program.params}
    assert len({*names, *taken}) == len(names) + len(taken), "names are distinct"
    for number, search in enumerate(plan.searches):
        assert search.of.tensor.sorted, "what is searched is in order"
        before = [other.tensor for other in plan.searches[:number]]
        _check(plan, (search.of, search.value), Kind.INT, PAIR, before)
        (sought,) = (token for token in (ir.Q_IDX, ir.KV_IDX) if token == search.of.at[-1])
        assert not axes(search.value) & sought.axes, "nothing is sought for itself"


def _tiles(plan: Plan) -> None:
    summaries = plan.tiles.summaries
    tensors = [tensor for s in summaries for tensor in (s.low, s.high)]
    assert len({tensor.name for tensor in tensors}) == len(tensors), "names are distinct"
    for summary in summaries:
        _summary(plan, summary)
    _check(plan, (plan.tiles.must, plan.tiles.may), Kind.BOOL, GRID, tensors)


def _summary(plan: Plan, summary: Summary) -> None:
    token = {Axis.Q: ir.Q_IDX, Axis.KV: ir.KV_IDX}[summary.axis]
    _check(plan, (summary.expr,), kind(summary.expr), OUTER | {token})
    assert summary.low.kind is summary.high.kind is kind(summary.expr)
    assert summary.low.dims == summary.high.dims and len(summary.low.dims) == 3


def _folded(plan: Plan) -> None:
    """Only what has no value, as a division by zero, is left over constants."""
    from attncc.passes.fold_constants import fold

    for expr in (plan.mask, plan.score):
        for node in postorder(expr):
            constants = isinstance(node, Apply) and all(isinstance(a, Const) for a in node.args)
            assert not constants or (isinstance(node, Apply) and fold(node) is None)


def _blocks(plan: Plan) -> None:
    if plan.blocks is Blocks.RANGES:
        assert plan.key_ranges is not None and plan.query_ranges is not None


def _order(plan: Plan) -> None:
    by_work = plan.query_order is Order.BY_WORK
    known = plan.blocks is Blocks.LISTS or bool(plan.searches)
    assert by_work == known, "work is counted where data decides it"


def _loads(plan: Plan) -> None:
    assert all(isinstance(load, Load) for load in plan.proved_loads)


AFTER: dict[str, Callable[[Plan], None]] = {
    "fold_constants": _folded,
    "simplify": _folded,
    "choose_blocks": _blocks,
    "choose_order": _order,  # after choose_blocks: lists count their work
    "prove_loads": _loads,
}
