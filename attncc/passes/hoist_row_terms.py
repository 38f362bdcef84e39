"""Find score terms that are constant over a row, which cancel in the softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, Expr, Load, Score, apply, axes, walk
from attncc.ir.ops import Kind
from attncc.ir.plan import Note, Plan
from attncc.ir.program import Normalize


@dataclass(frozen=True)
class Term:
    """One summand of a score: expr, subtracted where `minus`."""

    expr: Expr
    minus: bool


def hoist_row_terms(plan: Plan) -> Plan:
    """Sets row_terms_cancel; refuses other normalizations, sinks, terms over both tokens.

    Kernels take one row of a tile for all of them, so that its term must neither be infinite nor so
    large that the others' scores vanish beside it, as masks by -inf or -1e9 are.
    """
    program = plan.program
    if program.normalize is not Normalize.SOFTMAX or program.sink is not None:
        return plan
    split = split_score(plan.score)
    if split is None or not split[0] or not all(_is_tame(term.expr) for term in split[0]):
        return plan
    note = Note("hoist_row_terms", "score terms that are constant over a row cancel in the softmax")
    return replace(plan, row_terms_cancel=True, notes=(*plan.notes, note))


TAME = {
    *(ops.ADD, ops.SUB, ops.MUL, ops.NEG, ops.ABS, ops.MIN, ops.MAX),
    *(ops.FLOORDIV, ops.MOD, ops.INT, ops.FLOAT),
}


def _is_tame(expr: Expr) -> bool:
    """Whether a row term is about as large as positions are, whatever the tensors hold."""
    for node in walk(expr):
        if not axes(node) & Axis.Q:
            continue
        if isinstance(node, Apply) and node.op not in TAME:
            return False
        if isinstance(node, Load) and node.tensor.kind is not Kind.INT:
            return False
    return True


def split_score(score: Expr) -> tuple[tuple[Term, ...], tuple[Term, ...]] | None:
    """(row terms, key terms) where the score is Score() plus them; None where it is not."""
    rows: list[Term] = []
    keys: list[Term] = []
    plain = 0
    for term in _terms(score, minus=False):
        reads = axes(term.expr)
        if isinstance(term.expr, Score) and not term.minus:
            plain += 1
        elif any(isinstance(node, Score) for node in walk(term.expr)):
            return None
        elif not reads & Axis.KV:
            rows.append(term)
        elif not reads & Axis.Q:
            keys.append(term)
        else:
            return None
    return (tuple(rows), tuple(keys)) if plain == 1 else None


def _terms(expr: Expr, minus: bool) -> Iterator[Term]:
    """Summands, with factors that read neither token axis multiplied in."""
    match expr:
        case Apply(ops.ADD, (x, y)):
            yield from _terms(x, minus)
            yield from _terms(y, minus)
        case Apply(ops.SUB, (x, y)):
            yield from _terms(x, minus)
            yield from _terms(y, not minus)
        case Apply(ops.NEG, (x,)):
            yield from _terms(x, not minus)
        case Apply(ops.MUL, (x, y)) if _is_factor(x):
            yield from (Term(apply(ops.MUL, x, t.expr), t.minus) for t in _terms(y, minus))
        case Apply(ops.MUL, (x, y)) if _is_factor(y):
            yield from (Term(apply(ops.MUL, t.expr, y), t.minus) for t in _terms(x, minus))
        case _:
            yield Term(expr, minus)


def _is_factor(expr: Expr) -> bool:
    return not axes(expr) & (Axis.Q | Axis.KV)
