"""What a warpgroup of the backward finds out ahead: values of its keys once, of queries a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from attncc.backends.gluon.hoist import AheadSpec, Value, named, parts_of, replaced
from attncc.backends.triton.lower import Lowering, between, row_ends
from attncc.backends.triton.sections import Spec
from attncc.ir.expr import (
    KV_IDX,
    KV_LAST,
    KV_LO,
    Q_IDX,
    Apply,
    Axis,
    Expr,
    axes,
    children,
    kind,
)
from attncc.ir.ops import Kind
from attncc.ir.plan import Plan


def beside(value: Value) -> str:
    """How one number a key, or one a query, stands beside a tile of [keys, queries]."""
    varies = axes(value.expr)
    return "[None, :]" if varies & Axis.Q else "[:, None]" if varies & Axis.KV else ""


def hoisted_keys(spec: Spec) -> AheadSpec:
    """The spec with what can be read ahead taken out of its key mask, score and derivatives."""
    lowering = _by_keys(spec.lowering)
    plan = lowering.plan
    found: dict[Expr, Value] = {}
    # A score whose row terms cancel is also asked for single pairs, far from the tile.
    cancel = plan.row_terms_cancel and not lowering.plain
    score = _taken(lowering.score, found, plan, heads_only=cancel)
    slope = None if lowering.slope is None else _taken(lowering.slope, found, plan)
    gradients = tuple(
        replace(gradient, factor=_taken(gradient.factor, found, plan))
        for gradient in lowering.gradients
    )
    mask = lowering.key_mask
    mask = None if mask is None else _taken(mask, found, plan, masks=True)
    given = {f.name: getattr(spec, f.name) for f in fields(Spec)}
    given["lowering"] = replace(
        lowering, mask=mask, key_mask=mask, score=score, slope=slope, gradients=gradients
    )
    return AheadSpec(**given, values=tuple(found.values()))


def _by_keys(lowering: Lowering) -> Lowering:
    """With a mask that compares queries with ends found once a key, where the plan has such."""
    plan = lowering.plan
    ends = row_ends(plan, plan.query_ranges, {KV_LO: KV_IDX, KV_LAST: KV_IDX})
    if lowering.key_mask is None or ends is None:
        return lowering
    return replace(lowering, key_mask=between(Q_IDX, ends))


def _taken(
    expr: Expr,
    found: dict[Expr, Value],
    plan: Plan,
    *,
    masks: bool = False,
    heads_only: bool = False,
) -> Expr:
    """The expression with its parts replaced by values, which join those found."""
    mine = list(_allowed(_numbers(expr), heads_only))
    for part in mine:
        if part not in found:
            found[part] = Value(named(part, len(found), plan), part, masks)
    return replaced(expr, {part: found[part] for part in mine})


def _numbers(expr: Expr) -> Iterable[Expr]:
    """What to read ahead: of a condition its numbers, which other conditions may need too."""
    for part in parts_of(expr):
        if isinstance(part, Apply) and kind(part) is Kind.BOOL:
            for child in children(part):
                yield from _numbers(child)
        else:
            yield part


def _allowed(parts: Iterable[Expr], heads_only: bool) -> Iterable[Expr]:
    token = Axis.Q | Axis.KV
    return (part for part in parts if not (heads_only and axes(part) & token))
