"""Tokens in any order, by copies: N-D tiles of a grid, or an order that a caller gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attncc.ir import expr as ir
from attncc.ir.expr import Expr, Load, TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Program
from attncc.order.residues import Call
from attncc.order.rewrite import fresh, over


@lru_cache(maxsize=64)
def permuted(program: Program, mask: Expr) -> tuple[Program, tuple[str, str]]:
    """The program over tokens in another order, and the tensors that say where each was before."""
    names = fresh(program, "q_before", "kv_before")
    sizes = "q_len", "kv_len"
    pairs = zip(names, sizes, strict=True)
    before = [TensorParam(name, Kind.INT, (size,)) for name, size in pairs]
    values: dict[Expr, Expr] = {
        index: Load(tensor, (index,))
        for index, tensor in zip((ir.Q_IDX, ir.KV_IDX), before, strict=True)
    }
    return over(program, values, tuple(before), mask), (names[0], names[1])


def run(
    call: Call,
    program: Program,
    mask: Expr,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arguments: Mapping[str, object],
    orders: tuple[Tensor, Tensor],
    ordered: bool,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Hq, Q, Dv] and lse [B, Hq, Q], as of the program itself.

    orders: of queries and of keys, int64 [N], the positions in their new order.
    ordered: q, k and v have that order already, and so will out and lse.
    """
    found, names = permuted(program, mask)
    given = {**arguments, **dict(zip(names, orders, strict=True))}
    if ordered:
        return call(found, q, k, v, given)
    of_q, of_kv = orders
    out, lse = call(
        found, q.index_select(2, of_q), k.index_select(2, of_kv), v.index_select(2, of_kv), given
    )
    back = inverse(of_q)
    return out.index_select(2, back), None if lse is None else lse.index_select(2, back)


def inverse(order: Tensor) -> Tensor:
    """Where each position went."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


@lru_cache(maxsize=64)
def grid_order(
    sizes: tuple[int, ...], tile: tuple[int, ...], tokens: int, device: torch.device
) -> Tensor:
    """int64 [tokens]: the tokens of a row-major grid, tile by tile, row-major in each.

    Tokens past the grid's end lie further along its slowest axis, as in `ir/grid.py`.
    """
    rest = max(1, math.prod(sizes[1:]))
    sizes = (max(1, math.ceil(tokens / rest)), *sizes[1:])
    at = torch.arange(tokens, device=device)
    outer, inner = torch.zeros_like(at), torch.zeros_like(at)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    for size, step, stride in zip(sizes, tile, strides, strict=True):
        coordinate = at // max(1, stride) % max(1, size)
        outer = outer * math.ceil(size / step) + coordinate // step
        inner = inner * step + coordinate % step
    return (outer * math.prod(tile) + inner).argsort()
