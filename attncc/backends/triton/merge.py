"""Merging branches on a GPU: every output is read once, forward and backward."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# of kernels, which have no types
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096
"""Elements of an output that a program holds."""


def merge(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """out [B, H, Q, Dv] of the outputs' dtype and lse [B, H, Q] float32; differentiable once."""
    out, lse = _Merge.apply(len(outs), *outs, *lses)
    return out, lse


class _Merge(torch.autograd.Function):
    """Recomputes weights from lse in the backward."""

    @staticmethod
    def forward(ctx: Any, count: int, *given: Tensor) -> tuple[Tensor, Tensor]:
        first = given[0]
        out = torch.empty_like(first if first.stride(-1) == 1 else first.contiguous())
        outs = tuple(_like(out, x) for x in given[:count])
        lses = tuple(x.to(torch.float32).contiguous() for x in given[count:])
        lse = torch.empty_like(lses[0])
        _launch(_forward, out, outs, lses, out, lse)
        ctx.save_for_backward(out, lse, *outs, *lses)
        ctx.dtypes = [x.dtype for x in given]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *given = ctx.saved_tensors
        count = len(given) // 2
        outs, lses = tuple(given[:count]), tuple(given[count:])
        douts = tuple(torch.empty_like(x) for x in outs)
        dlses = tuple(torch.empty_like(x) for x in lses)
        dout, dlse = _like(out, dout), dlse.contiguous()
        _launch(_backward, out, outs, lses, out, lse, dout, dlse, douts, dlses)
        grads = zip((*douts, *dlses), ctx.dtypes, strict=True)
        return None, *(grad.to(dtype) for grad, dtype in grads)


def _like(layout: Tensor, x: Tensor) -> Tensor:
    """The tensor with the strides of another."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout).copy_(x)


def _launch(kernel: Any, layout: Tensor, *tensors: Tensor | tuple[Tensor, ...]) -> None:
    """One row a row of the layout, whose strides all outputs have; lse lies row by row."""
    batch, heads, queries, columns = layout.shape
    rows = batch * heads * queries
    width = triton.next_power_of_2(max(columns, 1))
    block = max(1, BLOCK // width)
    if rows == 0:
        return
    sizes = {"COLUMNS": columns, "BLOCK": block, "WIDTH": width}
    with torch.cuda.device_of(layout):
        kernel[triton.cdiv(rows, block),](
            *tensors, rows, heads, queries, *layout.stride()[:3], **sizes
        )


@triton.jit
def _places(rows, heads, queries, s_b, s_h, s_q, COLUMNS, BLOCK, WIDTH):
    """The program's rows, which of them there are, their elements, and which of those there are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    head = row // queries
    start = head // heads * s_b + head % heads * s_h + row % queries * s_q
    inside = row < rows
    return row, inside, start[:, None] + column, inside[:, None] & (column < COLUMNS)


@triton.jit
def _forward(
    outs,
    lses,
    out,
    lse,
    rows,
    heads,
    queries,
    s_b,
    s_h,
    s_q,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, inside, at, there = _places(rows, heads, queries, s_b, s_h, s_q, COLUMNS, BLOCK, WIDTH)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in tl.static_range(len(lses)):
        top = tl.maximum(top, tl.load(lses[i] + row, inside, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    for i in tl.static_range(len(lses)):
        power = tl.exp(tl.load(lses[i] + row, inside, other=float("-inf")) - shift)
        total += power
        held = there & (power != 0)[:, None]
        mixed += power[:, None] * tl.load(outs[i] + at, held, other=0.0).to(tl.float32)
    mixed /= tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + at, mixed.to(out.dtype.element_ty), there)
    tl.store(lse + row, shift + tl.log(total), inside)


@triton.jit
def _backward(
    outs,
    lses,
    out,
    lse,
    dout,
    dlse,
    douts,
    dlses,
    rows,
    heads,
    queries,
    s_b,
    s_h,
    s_q,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, inside, at, there = _places(rows, heads, queries, s_b, s_h, s_q, COLUMNS, BLOCK, WIDTH)
    own = tl.load(lse + row, inside, other=0.0)
    shift = tl.where(own == float("-inf"), 0.0, own)
    slope = tl.load(dout + at, there, other=0.0).to(tl.float32)
    mixed = tl.load(out + at, there, other=0.0).to(tl.float32)
    rest = tl.load(dlse + row, inside, other=0.0) - tl.sum(mixed * slope, 1)
    for i in tl.static_range(len(lses)):
        weight = tl.exp(tl.load(lses[i] + row, inside, other=float("-inf")) - shift)
        held = there & (weight != 0)[:, None]
        value = tl.load(outs[i] + at, held, other=0.0).to(tl.float32)
        grad = tl.where(weight == 0, 0.0, weight * (tl.sum(value * slope, 1) + rest))
        tl.store(dlses[i] + row, grad, inside)
        grads = (weight[:, None] * slope).to(douts[i].dtype.element_ty)
        tl.store(douts[i] + at, grads, there)
