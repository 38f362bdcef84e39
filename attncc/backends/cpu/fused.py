"""Softmax blocks whose score is q . k plus something: torch's fused kernel does each piece.

`_scaled_dot_product_flash_attention_for_cpu` is what scaled_dot_product_attention runs on a CPU. It
takes an additive mask and returns an lse, so pieces of a strip can be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attncc.backends.cpu import distance
from attncc.backends.cpu.block import Block, Buffers, Problem
from attncc.backends.cpu.pieces import Piece, pieces
from attncc.backends.cpu.scores import reads_score
from attncc.ir import ops
from attncc.ir.derivative import ZERO
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Apply, Expr, Score, apply
from attncc.ir.plan import Plan

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Fused:
    """How blocks of one call go through the kernel.

    rest:      what the score adds to q . k * scale, 0.0 where nothing.
    distances: `distance.values` of it, where it has them.
    masked:    whether those are -inf where the mask drops pairs, so that no other mask is needed.
    by_key:    whether they are those of one query plus something of each query's own, so that the
               kernel need add only what each key has.
    """

    rest: Expr
    distances: Tensor | None = None
    masked: bool = False
    by_key: bool = False

    @staticmethod
    def of(problem: Problem) -> Fused | None:
        """None where the kernel cannot: it wants a sum, a softmax and equal head dims."""
        plan = problem.bound.plan
        rest = added(plan)
        same = problem.q.shape[-1] == problem.v.shape[-1]
        if rest is None or not problem.softmax or not same:
            return None
        if rest == ZERO:
            return Fused(rest)
        if not distance.by_distance(rest):
            return Fused(rest)
        distances = problem.distances(rest)
        by_key = plan.row_terms_cancel and bool(distances.isfinite().all())
        masked = distance.by_distance(plan.mask)
        if masked:
            distances = distances.masked_fill(problem.distances(plan.mask) == 0, -math.inf)
        return Fused(rest, distances, masked, by_key)

    @property
    def biased(self) -> bool:
        """Whether anything is added, as one number a pair."""
        return self.rest != ZERO

    def attend(self, block: Block, buffers: Buffers) -> tuple[Tensor, Tensor] | None:
        """out [rows, members, queries, Dv] and lse [rows, members, queries], but for a sink.

        None where out is not finite: what the kernel adds to a score, -inf too, leaves it nan if
        it was, so a key that is not finite reaches rows that drop it.
        """
        merged: tuple[Tensor, Tensor] | None = None
        for piece in pieces(block):
            part = self._attend(block, piece, buffers)
            merged = part if merged is None else _merge(*merged, *part)
        assert merged is not None, "blocks have runs"
        return merged if bool(merged[0].sum().isfinite()) else None

    def _attend(self, block: Block, piece: Piece, buffers: Buffers) -> tuple[Tensor, Tensor]:
        if self.by_key and piece.mask is None:
            return self._by_key(block, piece)
        if self.biased:
            bias, dropped = self._bias(block, piece, buffers)
            empty = _empty(block, piece, bias) if dropped else None
            return _emptied(*_flash(block, piece, bias), empty)
        if piece.causal:
            return _flash(block, piece, None, causal=True)
        return _emptied(*_flash(block, piece, piece.mask), piece.empty)

    def _by_key(self, block: Block, piece: Piece) -> tuple[Tensor, Tensor]:
        """With the first query's terms for all queries; what others differ by, their lse gains."""
        assert self.distances is not None
        start, stop = block.strip.start, block.strip.stop
        keys = piece.start, piece.start + piece.width
        bias = block.distances(self.distances, (start, start + 1), keys)
        # At the nearest key, where terms that grow with the distance are rounded least.
        near = keys[0] if start < keys[0] else keys[1] - 1
        own = block.distances(self.distances, (start, stop), (near, near + 1)).flip(-1)
        out, lse = _flash(block, piece, bias[:, :, None, None])
        return out, lse.add_(own - own[..., :1])

    def _bias(self, block: Block, piece: Piece, buffers: Buffers) -> tuple[Tensor, bool]:
        """What is added to a piece's scores, -inf at dropped pairs, and whether there may be any.

        Shaped like a piece's mask.
        """
        if self.distances is None:
            bias = evaluate_unchecked(self.rest, _env(block, piece))
            bias, dropped = bias[(None,) * (5 - bias.dim())], True
        else:
            start, height = block.strip.start, block.height // piece.parts
            queries = start, start + height  # of the first part; others are as far from their keys
            found = block.distances(
                self.distances, queries, (piece.start, piece.start + piece.width)
            )
            bias = distance.spread(found, height, buffers)[:, :, None]
            dropped = bool((found == -math.inf).any())
        if self.masked or piece.mask is None:
            return bias, dropped
        return torch.where(piece.mask == 0, bias, piece.mask), True


@lru_cache(maxsize=256)
def added(plan: Plan) -> Expr | None:
    """What the score adds to q . k * scale, 0.0 where nothing; None where it is no such sum."""
    return _rest(plan.score)


def _rest(score: Expr) -> Expr | None:
    match score:
        case Score():
            return ZERO
        case Apply(ops.ADD, (x, y)) if not reads_score(y):
            return _plus(_rest(x), y)
        case Apply(ops.ADD, (x, y)) if not reads_score(x):
            return _plus(_rest(y), x)
        case Apply(ops.SUB, (x, y)) if not reads_score(y):
            return _plus(_rest(x), apply(ops.NEG, y))
        case _:
            return None


def _plus(rest: Expr | None, more: Expr) -> Expr | None:
    if rest is None:
        return None
    return apply(ops.FLOAT, more) if rest == ZERO else apply(ops.ADD, rest, more)


def _env(block: Block, piece: Piece) -> Env:
    """Positions of a piece's pairs, [rows, members, parts, height, width]."""
    height = block.height // piece.parts
    part = torch.arange(0, block.height, height)[:, None, None]
    env = block.heads_env
    positions = {name: at[:, :, None] for name, at in env.positions.items()}
    positions["q_idx"] = block.strip.start + part + torch.arange(height)[:, None]
    positions["kv_idx"] = piece.start + part + torch.arange(piece.width)
    return replace(env, positions=positions)


def _flash(
    block: Block, piece: Piece, mask: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel over a piece; to it parts are heads, so query heads then take a call each."""
    problem, parts = block.problem, piece.parts
    height = block.height // parts
    q = block.queries(problem.q)
    q = q.view(*q.shape[:2], parts, height, q.shape[3])
    stop = piece.start + (parts - 1) * height + piece.width
    k, v = (
        x[slice(*block.rows), piece.start : stop].unfold(1, piece.width, height).transpose(2, 3)
        for x in (problem.k, problem.v)
    )
    if parts == 1:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        own = None if mask is None else mask[:, :, 0]
        out, lse = flash(q[:, :, 0], k, v, attn_mask=own, is_causal=causal, scale=problem.scale)
        return out, lse
    found = []
    for member in range(q.shape[1]):
        own = None if mask is None else mask[:, min(member, mask.shape[1] - 1)]
        found.append(flash(q[:, member], k, v, attn_mask=own, scale=problem.scale))
    out, lse = (torch.stack(x, 1).flatten(2, 3) for x in zip(*found, strict=True))
    return out, lse


def _empty(block: Block, piece: Piece, bias: Tensor) -> Tensor:
    """Rows that keep no key of a piece, [rows | 1, members | 1, queries]."""
    empty = bias.amax(-1) == -math.inf
    return empty.expand(-1, -1, piece.parts, block.height // piece.parts).flatten(2, 3)


def _emptied(out: Tensor, lse: Tensor, empty: Tensor | None) -> tuple[Tensor, Tensor]:
    if empty is not None:
        out.masked_fill_(empty[..., None], 0)
        lse.masked_fill_(empty, -math.inf)
    return out, lse


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(more_lse - lse).nan_to_num_(0)  # nan: neither kept a key
    return torch.lerp(out, more, share[..., None]), torch.logaddexp(lse, more_lse)
