"""Reads of a captured tensor at blocks of both positions: kinds of tiles, patterns of segments."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from attncc.ir import ops
from attncc.ir.expr import (
    Apply,
    Axis,
    Const,
    Expr,
    Load,
    apply,
    axes,
    children,
    conjunction,
    disjunction,
    kind,
    rebuild,
    walk,
)
from attncc.ir.ops import Kind
from attncc.passes.interval_rules.interval import UNSURE, Interval

if TYPE_CHECKING:
    from attncc.passes.intervals import Bounder

TOKENS = Axis.Q | Axis.KV

COMPARED = (ops.LT, ops.LE, ops.GT, ops.GE, ops.EQ, ops.NE)

PAIR = 2
"""Indices of which a tile may have two values each, neighbors; of more it must have one."""


def indices(expr: Expr) -> tuple[Expr, ...]:
    """What a bool that reads a tensor at both positions depends on, each of one token axis.

    `kind[h, q_idx // 64, kv_idx // 64] == 2` depends on its two quotients. Empty where the
    expression is no such read, or depends on positions themselves, which no tile has two of.
    """
    compared = isinstance(expr, Apply) and expr.op in COMPARED
    if not compared and not (isinstance(expr, Load) and kind(expr) is Kind.BOOL):
        return ()
    if not any(isinstance(n, Load) and axes(n) & TOKENS == TOKENS for n in walk(expr)):
        return ()
    found = tuple(dict.fromkeys(_parts(expr)))
    return found if all(map(_stands, found)) else ()


def _parts(expr: Expr) -> Iterator[Expr]:
    """The largest parts of one token axis."""
    read = axes(expr) & TOKENS
    if read == TOKENS:
        for child in children(expr):
            yield from _parts(child)
    elif read:
        yield expr


def _stands(part: Expr) -> bool:
    """Whether an int may have the same value at many positions in a row."""
    nodes = walk(part)
    still = any(isinstance(n, Load) or getattr(n, "op", None) in STILL for n in nodes)
    return kind(part) is Kind.INT and still


STILL = (ops.FLOORDIV, ops.SHR)


def by_blocks(on: Bounder, expr: Expr, found: list[tuple[Expr, Interval]]) -> Interval:
    """(must, may) of a bool, by the values it has where a tile spans few values of each index."""
    choices: list[tuple[Expr, ...]] = []
    few: list[Expr] = []
    most = 1 if len(found) <= PAIR else 0
    for _, value in found:
        if value.lo is None or value.hi is None:
            return UNSURE
        if value.exact:
            choices.append((value.lo,))
            continue
        apart = apply(ops.SUB, value.hi, value.lo)
        few.append(on.simplify(apply(ops.LE, apart, Const(most))))
        choices.append((value.lo, value.hi) if most else (value.lo,))
    parts = [part for part, _ in found]
    values = [
        on.simplify(_put(expr, dict(zip(parts, chosen, strict=True))))
        for chosen in product(*choices)
    ]
    near = conjunction(tuple(few))
    must = apply(ops.AND, near, conjunction(tuple(values)))
    may = apply(ops.OR, apply(ops.NOT, near), disjunction(tuple(values)))
    return Interval(on.simplify(must), on.simplify(may))


def _put(expr: Expr, values: dict[Expr, Expr]) -> Expr:
    if expr in values:
        return values[expr]
    return rebuild(expr, tuple(_put(child, values) for child in children(expr)))
