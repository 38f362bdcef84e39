"""Prove captured tensors' reads in range from what positions and sizes are."""

from __future__ import annotations

from dataclasses import replace

from attncc.ir import ops
from attncc.ir.expr import SIZES, Const, Dim, Expr, Load, Scalar, apply
from attncc.ir.plan import Note, Plan
from attncc.ir.rewrite import postorder
from attncc.passes.facts import Facts

BY_NAME = {size.name: size for size in SIZES}

IN_A_PAIR = Facts(frozenset(map(Scalar, SIZES)))
"""Where anything is read there is a pair, so no size is 0."""


def prove_loads(plan: Plan) -> Plan:
    """Fills proved_loads; indices from tensors, and dims of free names, are checked when bound.

    What ranges read at the ends of tiles is not: kernels clamp it where it is not proved.
    """
    exprs = [plan.mask, plan.score]
    if plan.program.sink is not None:
        exprs.append(plan.program.sink)
    loads = {node for expr in exprs for node in postorder(expr) if isinstance(node, Load)}
    proved = frozenset(load for load in loads | _in_ranges(plan) if in_range(load))
    open_names = sorted({load.tensor.name for load in loads - proved})
    if open_names:
        text = f"reads of {', '.join(open_names)} are checked when bound"
        plan = replace(plan, notes=(*plan.notes, Note("prove_loads", text)))
    return replace(plan, proved_loads=proved)


def _in_ranges(plan: Plan) -> set[Load]:
    """What the ends of ranges read, at the ends of tiles."""
    found = [ranges for ranges in (plan.key_ranges, plan.query_ranges) if ranges is not None]
    ends = [end for r in found for s in (*r.visit, *r.unmasked) for end in (s.lo, s.hi)]
    return {node for end in ends for node in postorder(end) if isinstance(node, Load)}


def in_range(load: Load) -> bool:
    """Every index is proved to be within its dim, at every position within the lengths."""
    return all(_within(at, dim) for at, dim in zip(load.at, load.tensor.dims, strict=True))


def _within(at: Expr, dim: Dim) -> bool:
    if isinstance(dim, str) and dim not in BY_NAME:
        return False
    size: Expr = Const(dim) if isinstance(dim, int) else Scalar(BY_NAME[dim])
    return IN_A_PAIR.at_most(apply(ops.ADD, at, Const(1)), size) and IN_A_PAIR.nonnegative(at)
