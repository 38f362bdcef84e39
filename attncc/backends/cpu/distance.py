"""What depends on a pair by the distance q_idx - kv_idx alone: a number a distance, not a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attncc.backends.cpu.schedule import Interval
from attncc.ir import ops
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import KV_IDX, Q_IDX, Apply, Axis, Expr, Load, axes, children, kind
from attncc.ir.ops import Kind
from attncc.passes.linear import Linear, linear

COMPARISONS = frozenset({ops.LT, ops.LE, ops.GT, ops.GE, ops.EQ, ops.NE})
SUMS = frozenset({ops.ADD, ops.SUB, ops.NEG, ops.MUL})


def by_distance(expr: Expr) -> bool:
    """Whether the value stays the same where both positions move by one number.

    Integer sums and their comparisons are understood; a float of a position is not.
    """
    if not axes(expr) & (Axis.Q | Axis.KV):
        return True
    match expr:
        case Apply(op, (left, right)) if op in COMPARISONS and _ints(left, right):
            return _moves_nowhere(linear(left).plus(linear(right), -1))
        case Apply(op) if op in SUMS and _ints(expr):
            return _moves_nowhere(linear(expr))
        case Apply() | Load():
            return all(map(by_distance, children(expr)))
        case _:
            return False


def _ints(*exprs: Expr) -> bool:
    return all(kind(expr) is Kind.INT for expr in exprs)


def _moves_nowhere(sum_: Linear) -> bool:
    if sum_.terms.get(Q_IDX, 0) + sum_.terms.get(KV_IDX, 0) != 0:
        return False
    return all(_within(atom) for atom in sum_.terms if atom not in (Q_IDX, KV_IDX))


def _within(atom: Expr) -> bool:
    """For an atom, of which `linear` knows nothing more."""
    if not axes(atom) & (Axis.Q | Axis.KV):
        return True
    parts = children(atom)
    return bool(parts) and all(map(by_distance, parts))


def values(expr: Expr, env: Env, q_len: int, kv_len: int) -> Tensor:
    """The value at each distance from q_len - 1 down to 1 - kv_len, along the last axis.

    Before that axis those of `env`'s heads, [batch * kv_heads | 1, group | 1].
    """
    distances = torch.arange(q_len - 1, -kv_len, -1)
    positions = {**env.positions, "q_idx": distances, "kv_idx": torch.zeros(1, dtype=torch.int64)}
    found = evaluate_unchecked(expr, replace(env, positions=positions))
    found = found[(None,) * (4 - found.dim())].squeeze(2)
    return found.expand(*found.shape[:2], len(distances))


def segment(values: Tensor, q_len: int, queries: Interval, keys: Interval) -> Tensor:
    """Those of the distances between some queries and some keys."""
    length = queries[1] - queries[0] + keys[1] - keys[0] - 1
    return values.narrow(-1, q_len - queries[1] + keys[0], length)


def spread(segment: Tensor, queries: int, buffer: Callable[[str, int], Tensor]) -> Tensor:
    """A segment's values at each pair, [..., queries, keys]: a view of copies in a buffer.

    A row of pairs is the row above it moved by one, so rows of equal copies, read with a stride
    one short of their length, are the pairs; each row is then contiguous, as kernels want.
    """
    heads, length = segment.shape[:2], segment.shape[2]
    copies = buffer("distances", heads.numel() * queries * length).view(*heads, queries, length)
    copies.copy_(segment[..., None, :].expand_as(copies))
    shape = *heads, queries, length - queries + 1
    strides = *copies.stride()[:2], length - 1, 1
    return copies.as_strided(shape, strides, copies.storage_offset() + queries - 1)
