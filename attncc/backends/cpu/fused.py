"""Softmax blocks whose score is q . k plus something: torch's fused kernel does each piece.

`_scaled_dot_product_flash_attention_for_cpu` is what scaled_dot_product_attention runs on a CPU. It
takes an additive mask and returns an lse, so pieces of a strip can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from attncc.backends.cpu import workers
from attncc.backends.cpu.block import Block, Piece, Problem
from attncc.ir import ops
from attncc.ir.derivative import ZERO
from attncc.ir.evaluate import evaluate_unchecked
from attncc.ir.expr import Apply, Expr, Score, apply, walk
from attncc.ir.plan import Plan

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def can(problem: Problem) -> bool:
    """Whether `attend` is for this problem: its kernel wants equal head dims and finite inputs."""
    same = problem.q.shape[-1] == problem.v.shape[-1]
    plain = problem.softmax and added(problem.bound.plan) is not None
    return same and plain and _finite((problem.q, problem.k, problem.v))


def _finite(tensors: tuple[Tensor, ...]) -> bool:
    """No for sums that overflow too, which costs time alone."""
    found: list[bool] = []

    def look(x: Tensor) -> None:
        found.append(bool(x.sum().isfinite()))

    tasks = [partial(look, x) for x in tensors]
    if sum(x.numel() for x in tensors) < workers.SMALL:
        for task in tasks:
            task()
    else:
        workers.run(tasks)
    return all(found)


@lru_cache(maxsize=256)
def added(plan: Plan) -> Expr | None:
    """What the score adds to q . k * scale, 0.0 where nothing; None where it is no such sum."""
    return _rest(plan.score)


def _rest(score: Expr) -> Expr | None:
    match score:
        case Score():
            return ZERO
        case Apply(ops.ADD, (x, y)) if not _reads_score(y):
            return _plus(_rest(x), y)
        case Apply(ops.ADD, (x, y)) if not _reads_score(x):
            return _plus(_rest(y), x)
        case Apply(ops.SUB, (x, y)) if not _reads_score(y):
            return _plus(_rest(x), apply(ops.NEG, y))
        case _:
            return None


def _plus(rest: Expr | None, more: Expr) -> Expr | None:
    if rest is None:
        return None
    return apply(ops.FLOAT, more) if rest == ZERO else apply(ops.ADD, rest, more)


def _reads_score(expr: Expr) -> bool:
    return any(isinstance(node, Score) for node in walk(expr))


def attend(block: Block) -> tuple[Tensor, Tensor]:
    """out [rows, members, queries, Dv] and lse [rows, members, queries], as if without a sink."""
    merged: tuple[Tensor, Tensor] | None = None
    for part in _parts(block):
        merged = part if merged is None else _merge(*merged, *part)
    assert merged is not None, "blocks have runs"
    return merged


def _parts(block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    problem = block.problem
    rest = added(problem.bound.plan)
    assert rest is not None
    q = block.queries(problem.q)
    for piece in block.pieces:
        k, v = (
            x[slice(*block.rows), None, piece.start : piece.stop].expand(-1, q.shape[1], -1, -1)
            for x in (problem.k, problem.v)
        )
        mask, empty = (piece.mask, piece.empty) if rest == ZERO else _bias(block, piece, rest)
        out, lse = flash(q, k, v, attn_mask=mask, scale=problem.scale)
        if empty is not None:
            out.masked_fill_(empty[..., None], 0)
            lse.masked_fill_(empty, -math.inf)
        yield out, lse


def _bias(block: Block, piece: Piece, rest: Expr) -> tuple[Tensor, Tensor]:
    """What is added to the scores of a piece, -inf at dropped pairs; and the rows it empties."""
    keys = torch.arange(piece.start, piece.stop)
    bias = evaluate_unchecked(rest, block.env(keys))
    bias = bias.expand(torch.broadcast_shapes(bias.shape, (1, 1, *block.shape[2:3], len(keys))))  # type: ignore[no-untyped-call]
    bias = (
        bias.contiguous() if piece.mask is None else torch.where(piece.mask == 0, bias, piece.mask)
    )
    return bias, bias.amax(-1) == -math.inf


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(more_lse - lse).nan_to_num_(0)  # nan: neither kept a key
    return torch.lerp(out, more, share[..., None]), torch.logaddexp(lse, more_lse)
