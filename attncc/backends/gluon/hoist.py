"""What a warpgroup finds out ahead of a tile's scores: values of its queries alone, or its keys.

Memory is read before the products that it would otherwise be waited for after: what depends on the
query once a query tile, what depends on the key while q is multiplied with that tile of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from attncc.backends.triton.lower import Lowering, between, row_ends
from attncc.backends.triton.sections import Params, Spec
from attncc.ir import ops
from attncc.ir.expr import (
    KV_IDX,
    Q_IDX,
    Q_LAST,
    Q_LO,
    Apply,
    Axis,
    Expr,
    Load,
    Scalar,
    ScalarParam,
    Score,
    axes,
    children,
    kind,
    rebuild,
    walk,
)
from attncc.ir.plan import Plan
from attncc.ir.rewrite import postorder

DIVISIONS = ops.FLOORDIV, ops.MOD
"""What is worth computing once for a row or a column of pairs, as reading memory is."""


@dataclass(frozen=True, slots=True)
class Value:
    """A part of the mask or the score that is read ahead, and the name that stands for it."""

    name: str
    expr: Expr
    masks: bool
    """Only the mask needs it, so only partial tiles."""

    @property
    def suffix(self) -> str:
        """How one number a query, or one a key, stands beside a tile of pairs."""
        varies = axes(self.expr)
        return "[:, None]" if varies & Axis.Q else "[None, :]" if varies & Axis.KV else ""

    @property
    def of_keys(self) -> bool:
        return bool(axes(self.expr) & Axis.KV)


@dataclass(frozen=True, slots=True)
class AheadSpec(Spec):
    """A Spec whose mods are given values by name."""

    values: tuple[Value, ...] = ()
    bounded: bool = False
    """The mask keeps no position that has no key."""

    @property
    def params(self) -> Params:
        plain = Spec(self.lowering, self.half, self.ptx, self.descriptors, self.wide)
        return (*plain.params, *(ScalarParam(v.name, kind(v.expr)) for v in self.values))


def hoisted(spec: Spec) -> AheadSpec:
    """The spec with what can be read ahead taken out of its mask and score."""
    lowering, bounded = _by_rows(spec.lowering)
    cancel = lowering.plan.row_terms_cancel and not lowering.plain
    parts: dict[Expr, Value] = {}
    for expr, masks in ((lowering.score, False), (lowering.mask, True)):
        if expr is None:
            continue
        for part in parts_of(expr):
            varies = axes(part)
            # A score whose row terms cancel is also asked for single pairs, far from the tile.
            if part in parts or (cancel and not masks and varies & (Axis.Q | Axis.KV)):
                continue
            parts[part] = Value(named(part, len(parts), lowering.plan), part, masks)
    given = {f.name: getattr(spec, f.name) for f in fields(Spec)}
    mask = None if lowering.mask is None else replaced(lowering.mask, parts)
    score = replaced(lowering.score, parts)
    given["lowering"] = replace(lowering, mask=mask, score=score)
    return AheadSpec(**given, values=tuple(parts.values()), bounded=bounded)


def named(part: Expr, number: int, plan: Plan) -> str:
    """A name for a part that is none of the plan's parameters."""
    varies = axes(part)
    side = "row" if varies & Axis.Q else "column" if varies & Axis.KV else "head"
    taken = {param.name for param in plan.params}
    digits = str(number)
    while f"{side}_{digits}" in taken:
        digits = f"0{digits}"
    return f"{side}_{digits}"


def _by_rows(lowering: Lowering) -> tuple[Lowering, bool]:
    """With a mask that compares keys with ends found once a row, where the plan has such.

    A mask of pairs takes more instructions in each of them, beside a product that takes few.
    """
    plan = lowering.plan
    ends = row_ends(plan, plan.key_ranges, {Q_LO: Q_IDX, Q_LAST: Q_IDX})
    if lowering.mask is None or ends is None:
        return lowering, False
    bounded = bool(ends) and all(_ends_in_time(between(KV_IDX, (end,))) for end in ends)
    return replace(lowering, mask=between(KV_IDX, ends)), bounded


def _ends_in_time(mask: Expr) -> bool:
    """Whether it compares the key with kv_len, which simplification may have found true of any."""
    match mask:
        case Apply(ops.AND, args):
            return any(map(_ends_in_time, args))
        case Apply(ops.LT, (position, end)):
            return position == KV_IDX and _is_short(end)
        case _:
            return False


def _is_short(expr: Expr) -> bool:
    """Whether it is the number of keys at most."""
    match expr:
        case Scalar(param):
            return param.name == "kv_len"
        case Apply(ops.MIN, args):
            return any(map(_is_short, args))
        case _:
            return False


def parts_of(expr: Expr) -> Iterator[Expr]:
    """The largest parts of one side's positions at most that read tensors, or divide."""
    if _is_part(expr):
        yield expr
        return
    for child in children(expr):
        yield from parts_of(child)


def _is_part(expr: Expr) -> bool:
    pair = Axis.Q | Axis.KV
    if not isinstance(expr, Apply | Load) or axes(expr) & pair == pair:
        return False
    nodes = list(walk(expr))
    worth = any(isinstance(n, Load) or getattr(n, "op", None) in DIVISIONS for n in nodes)
    return worth and not any(isinstance(n, Score) for n in nodes)


def replaced(expr: Expr, by: dict[Expr, Value]) -> Expr:
    done: dict[int, Expr] = {}
    for node in postorder(expr):
        if node in by:
            done[id(node)] = Scalar(ScalarParam(by[node].name, kind(node)))
        else:
            done[id(node)] = rebuild(node, tuple(done[id(child)] for child in children(node)))
    return done[id(expr)]
