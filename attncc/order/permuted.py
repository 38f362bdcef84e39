"""Tokens in any order, by copies: N-D tiles of a grid, or an order that a caller gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attncc.ir import expr as ir
from attncc.ir.expr import Expr, Load, TensorParam
from attncc.ir.ops import Kind
from attncc.ir.program import Program
from attncc.order.residues import Ready, Result, Start
from attncc.order.rewrite import fresh, over


@lru_cache(maxsize=64)
def permuted(
    program: Program, mask: Expr, by_sequence: bool = False
) -> tuple[Program, tuple[str, str]]:
    """The program over tokens in another order, and the tensors that say where each was before.

    by_sequence: each sequence of the batch has an order of its own.
    """
    names = fresh(program, "q_before", "kv_before")
    sizes = "q_len", "kv_len"
    batch, b = (("batch",), (ir.B,)) if by_sequence else ((), ())
    pairs = zip(names, sizes, strict=True)
    before = [TensorParam(name, Kind.INT, (*batch, size)) for name, size in pairs]
    values: dict[Expr, Expr] = {
        index: Load(tensor, (*b, index))
        for index, tensor in zip((ir.Q_IDX, ir.KV_IDX), before, strict=True)
    }
    return over(program, values, tuple(before), mask), (names[0], names[1])


def ready(
    start: Start,
    program: Program,
    mask: Expr,
    arguments: Mapping[str, object],
    orders: tuple[Tensor, Tensor],
    ordered: bool,
) -> Ready:
    """Runs the program itself.

    orders: of queries and of keys, int64 [N] or [B, N], the positions in their new order.
    ordered: q, k and v have that order already, and so will out and lse.
    """
    of_q, of_kv = orders
    found, names = permuted(program, mask, of_q.dim() == 2)
    given = {**arguments, **dict(zip(names, orders, strict=True))}
    started: list[Ready] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Result:
        if not started:
            started.append(start(found, q, k, v, given))
        return started[0](q, k, v)

    if ordered:
        return run
    q_back = inverse(of_q)
    kv_back = q_back if of_kv is of_q else inverse(of_kv)

    def copied(q: Tensor, k: Tensor, v: Tensor) -> Result:
        out, lse = run(
            permute(q, of_q, q_back), permute(k, of_kv, kv_back), permute(v, of_kv, kv_back)
        )
        lse = None if lse is None else permute(lse[..., None], q_back, of_q)[..., 0]
        return permute(out, q_back, of_q), lse

    return copied


def permute(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """[B, H, N, D] with its tokens in that order, as a copy; `back` is the inverse."""
    found: Tensor = _Permute.apply(x, order, back)  # type: ignore[no-untyped-call]
    return found


class _Permute(torch.autograd.Function):
    """A copy, whose gradient is a copy too, where an index's would be a sum by atomic adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        if order.dim() == 1:
            return x.index_select(2, order)
        sequences = torch.arange(len(order), device=x.device)[:, None]
        return x[sequences, :, order].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return permute(grad, back, order), None, None


def inverse(order: Tensor) -> Tensor:
    """Where each position went."""
    places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


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
