"""The passes: `analyze` runs them in the order of PASSES and returns the Plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from enum import Enum

from attncc.ir.expr import Apply, Const, Index, Load, Scalar, Score
from attncc.ir.plan import Note, Plan, Ranges, Search, Segment, TileTest
from attncc.ir.program import Program
from attncc.ir.show import show
from attncc.passes.choose_blocks import choose_blocks
from attncc.passes.choose_order import choose_order
from attncc.passes.fold_constants import fold_constants
from attncc.passes.hoist_row_terms import hoist_row_terms
from attncc.passes.infer_ranges import infer_ranges
from attncc.passes.infer_tiles import infer_tiles
from attncc.passes.prove_loads import prove_loads
from attncc.passes.simplify import simplify

Pass = Callable[[Plan], Plan]

PASSES: tuple[Pass, ...] = (
    fold_constants,  # first, so that no rule sees constants apart
    simplify,  # a position that occurs once is bounded tightly
    infer_ranges,  # tier 1
    infer_tiles,  # tier 2
    choose_blocks,  # needs both tiers
    choose_order,  # needs blocks
    hoist_row_terms,
    prove_loads,
)


def analyze(program: Program, debug: Callable[[str], None] | None = None) -> Plan:
    """The Plan of a program, for any lengths and arguments.

    debug: called with one line for each field that a pass changed.
    """
    plan = Plan(program, mask=program.mask, score=program.score)
    for run in PASSES:
        before, plan = plan, run(plan)
        if debug is not None:
            for line in _changes(run.__name__, before, plan):
                debug(line)
    return plan


def _changes(name: str, before: Plan, after: Plan) -> list[str]:
    return [
        f"{name}: {field.name} = {_shown(getattr(after, field.name))}"
        for field in fields(Plan)
        if getattr(before, field.name) != getattr(after, field.name)
    ]


def _shown(value: object) -> str:
    match value:
        case Const() | Index() | Scalar() | Score() | Load() | Apply():
            return show(value)
        case Ranges(visit, unmasked, complete):
            end = "" if complete else ", incomplete"
            return f"visit {_union(visit)}, unmasked {_union(unmasked)}{end}"
        case TileTest(summaries, must, may):
            of = ", ".join(f"{s.low.name[:-2]} {show(s.expr)}" for s in summaries)
            return f"must {show(must)}, may {show(may)}" + (f", summaries {of}" if of else "")
        case Search(tensor, of, wanted, past):
            return f"{tensor.name}: {show(of)} {'>' if past else '>='} {show(wanted)}"
        case tuple() | frozenset():
            return "; ".join(_shown(part) for part in value)
        case Note(by, text):
            return f"{by}: {text}"
        case Enum():
            return str(value.value)
        case _:
            return str(value)


def _union(segments: tuple[Segment, ...]) -> str:
    return " + ".join(f"[{show(s.lo)}, {show(s.hi)})" for s in segments) or "nothing"
