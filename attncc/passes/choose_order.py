"""Choose which row tiles start first, so that heavy ones do not finish last."""

from __future__ import annotations

from dataclasses import replace

from attncc.ir.expr import Axis
from attncc.ir.plan import Blocks, Order, Plan, Ranges, Segment
from attncc.passes.monotone import direction


def choose_order(plan: Plan) -> Plan:
    """REVERSED where spans grow with the tile's number, BY_WORK where data says, else NATURAL.

    Key tiles that data decides stay as they are: neighbors read and add to the same queries, which
    are then in the L2 (causal documents on an H100, 64 heads of 32768: 16.2 instead of 27.4 ms).
    """
    if plan.blocks is Blocks.LISTS or plan.searches:
        return replace(plan, query_order=Order.BY_WORK)
    query_order = _order(plan.key_ranges, Axis.Q)
    return replace(plan, query_order=query_order, key_order=_order(plan.query_ranges, Axis.KV))


def _order(ranges: Ranges | None, axis: Axis) -> Order:
    """Ranges per tile of one axis; spans that shrink have their heavy tiles first already."""
    if ranges is None or not ranges.visit:
        return Order.NATURAL
    growth = [_growth(segment, axis) for segment in ranges.visit]
    grows = all(g is not None and g >= 0 for g in growth) and 1 in growth
    return Order.REVERSED if grows else Order.NATURAL


def _growth(segment: Segment, axis: Axis) -> int | None:
    """1 where only the end moves, up; 0 where nothing moves; None for the rest."""
    if direction(segment.lo, axis) != 0:
        return None
    return direction(segment.hi, axis)
