"""What a warpgroup reads ahead of a tile's scores: captured values of queries alone, or of keys.

Memory is read before the products that it would otherwise be waited for after: what depends on the
query once a query tile, what depends on the key while q is multiplied with that tile of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from attncc.backends.triton.sections import Params, Spec
from attncc.ir.expr import (
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
from attncc.ir.rewrite import postorder


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

    @property
    def params(self) -> Params:
        plain = Spec(self.lowering, self.half, self.ptx, self.descriptors, self.wide)
        return (*plain.params, *(ScalarParam(v.name, kind(v.expr)) for v in self.values))


def hoisted(spec: Spec) -> AheadSpec:
    """The spec with what can be read ahead taken out of its mask and score."""
    lowering = spec.lowering
    cancel = lowering.plan.row_terms_cancel and not lowering.plain
    parts: dict[Expr, Value] = {}
    for expr, masks in ((lowering.score, False), (lowering.mask, True)):
        if expr is None:
            continue
        for part in _parts(expr):
            varies = axes(part)
            # A score whose row terms cancel is also asked for single pairs, far from the tile.
            if part in parts or (cancel and not masks and varies & (Axis.Q | Axis.KV)):
                continue
            side = "row" if varies & Axis.Q else "column" if varies & Axis.KV else "head"
            parts[part] = Value(f"{side}_{len(parts)}", part, masks)
    given = {f.name: getattr(spec, f.name) for f in fields(Spec)}
    mask = None if lowering.mask is None else _replaced(lowering.mask, parts)
    score = _replaced(lowering.score, parts)
    given["lowering"] = replace(lowering, mask=mask, score=score)
    return AheadSpec(**given, values=tuple(parts.values()))


def _parts(expr: Expr) -> Iterator[Expr]:
    """The largest parts that read tensors at one side's positions at most."""
    if _is_part(expr):
        yield expr
        return
    for child in children(expr):
        yield from _parts(child)


def _is_part(expr: Expr) -> bool:
    pair = Axis.Q | Axis.KV
    if not isinstance(expr, Apply | Load) or axes(expr) & pair == pair:
        return False
    nodes = list(walk(expr))
    return any(isinstance(n, Load) for n in nodes) and not any(isinstance(n, Score) for n in nodes)


def _replaced(expr: Expr, by: dict[Expr, Value]) -> Expr:
    done: dict[int, Expr] = {}
    for node in postorder(expr):
        if node in by:
            done[id(node)] = Scalar(ScalarParam(by[node].name, kind(node)))
        else:
            done[id(node)] = rebuild(node, tuple(done[id(child)] for child in children(node)))
    return done[id(expr)]
