"""Tokens by residue: where the mask keeps pairs a multiple of a step apart, classes are dense.

Token i = t * step + r is token t of class r. A class is a strided view of q, k and v, so nothing is
copied: classes of one sequence are a batch, or sequences are the batch of one class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from attncc.binding import Binding
from attncc.ir import expr as ir
from attncc.ir import ops
from attncc.ir.expr import Apply, Axis, Const, Expr, Scalar, apply, axes, conjunction
from attncc.ir.program import Program
from attncc.order.rewrite import fresh, over, scalar
from attncc.passes import analyze
from attncc.passes.linear import linear
from attncc.passes.simplify import flatten
from attncc.tiles import BoundPlan, Counts

LARGEST = 64
"""Steps above it leave classes of too few tokens, or are no dilation."""

SHORTEST = 128
"""Tokens of a class: a tile's."""

Call = Callable[[Program, Tensor, Tensor, Tensor, dict[str, object]], tuple[Tensor, Tensor | None]]
"""Runs a program on q, k, v and its arguments."""


@dataclass(frozen=True)
class Residues:
    """A step, an expression of scalars, and the rest of a mask that keeps multiples of it."""

    program: Program
    step: Expr
    rest: Expr

    def divides(self, step: int, q_len: int, kv_len: int) -> bool:
        """Whether tokens can be ordered by such a step."""
        return 1 < step <= LARGEST and min(q_len, kv_len) >= step

    def run(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        arguments: Mapping[str, object],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """out [B, Hq, Q, Dv] and lse [B, Hq, Q], as of the program itself."""
        lengths = q.shape[2], k.shape[2]
        q, k, v = (_whole(x, step) for x in (q, k, v))
        one_sequence = q.shape[0] <= step
        made = _ordered(self, step, one_sequence, any(n % step for n in lengths))
        sizes = dict(zip(made.names, (*lengths, q.shape[0]), strict=False))
        tensors = [_classes(x, step) for x in (q, k, v)]
        if one_sequence:
            tensors = [x.permute(0, 3, 1, 2, 4) for x in tensors]
        unbound = (x.unbind(0 if one_sequence else 3) for x in tensors)
        outs, lses = [], []
        for at, (own_q, own_k, own_v) in enumerate(zip(*unbound, strict=True)):
            given = {**arguments, **sizes, made.which: at}
            out, lse = call(made.program, own_q, own_k, own_v, given)
            outs.append(out)
            lses.append(lse)
        # [step, H, Q / step, Dv] of each sequence, or [B, H, Q / step, Dv] of each class
        if one_sequence:
            outs = [x.permute(1, 2, 0, 3).flatten(1, 2) for x in outs]
            out = _stacked(outs)
        else:
            out = torch.stack(outs, 3).flatten(2, 3)
        out = out[:, :, : lengths[0]]
        if lses[0] is None:
            return out, None
        found = [x for x in lses if x is not None]
        if one_sequence:
            lse = _stacked([x.permute(1, 2, 0).flatten(1, 2) for x in found])
        else:
            lse = torch.stack(found, 3).flatten(2, 3)
        return out, lse[:, :, : lengths[0]]

    def counts(self, step: int, binding: Binding, tile: tuple[int, int]) -> Counts:
        """Tiles of all classes of all sequences."""
        lengths = binding.q_len, binding.kv_len
        made = _ordered(self, step, False, any(n % step for n in lengths))
        plan, total = analyze(made.program), Counts(0, 0, 0)
        q_len, kv_len = (math.ceil(n / step) for n in lengths)
        for residue in range(step):
            own = {**binding.scalars, "q_len": q_len, "kv_len": kv_len, made.which: residue}
            own |= dict(zip(made.names, lengths, strict=False))
            one = replace(binding, q_len=q_len, kv_len=kv_len, scalars=own)
            found = BoundPlan(plan, one, tile).counts
            total = Counts(
                total.full + found.full, total.partial + found.partial, total.empty + found.empty
            )
        return total

    def ordered(self, step: int, one_sequence: bool, ragged: bool) -> Program:
        """The program of a class, or of a sequence's classes."""
        return _ordered(self, step, one_sequence, ragged).program


@dataclass(frozen=True)
class _Ordered:
    program: Program
    names: tuple[str, ...]
    """The parameters that are q_len, kv_len and perhaps batch as they were."""
    which: str
    """The parameter that is the sequence, or the class."""


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _classes(x: Tensor, step: int) -> Tensor:
    """[B, H, N / step, step, D], a view."""
    batch, heads, tokens, columns = x.shape
    return x.view(batch, heads, tokens // step, step, columns)


def _whole(x: Tensor, step: int) -> Tensor:
    """[B, H, N, D] with zeros up to a multiple of `step` tokens."""
    missing = -x.shape[2] % step
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


@lru_cache(maxsize=64)
def _ordered(found: Residues, step: int, one_sequence: bool, ragged: bool) -> _Ordered:
    program = found.program
    names = ("q_tokens", "kv_tokens", "sequences", "sequence" if one_sequence else "residue")
    *sizes, which = map(scalar, fresh(program, *names))
    if not one_sequence:
        sizes = sizes[:2]
    residue: Expr = ir.B if one_sequence else Scalar(which)

    def place(index: Expr) -> Expr:
        return apply(ops.ADD, apply(ops.MUL, index, Const(step)), residue)

    q_idx, kv_idx = place(ir.Q_IDX), place(ir.KV_IDX)
    values: dict[Expr, Expr] = {ir.Q_IDX: q_idx, ir.KV_IDX: kv_idx}
    for size, param in zip((ir.Q_LEN, ir.KV_LEN, ir.BATCH), sizes, strict=False):
        values[Scalar(size)] = Scalar(param)
    if one_sequence:
        values[ir.B] = Scalar(which)
    ordered = over(program, values, (*sizes, which), found.rest)
    if ragged:
        ends = zip((q_idx, kv_idx), sizes, strict=False)
        inside = [apply(ops.LT, index, Scalar(end)) for index, end in ends]
        mask = conjunction((*inside, ordered.mask))
        ordered = replace(ordered, mask=mask)
    return _Ordered(ordered, tuple(param.name for param in sizes), which.name)


def find(program: Program, mask: Expr) -> Residues | None:
    """The step of a simplified mask whose every pair is a multiple of it apart, if it has one.

    None for a program with an output clause, which may read the mean of all values.
    """
    if program.output is not None:
        return None
    parts = list(flatten(ops.AND, mask))
    for part in parts:
        step = _step(part)
        if step is not None:
            rest = conjunction(tuple(other for other in parts if other is not part))
            return Residues(program, step, rest)
    return None


def _step(part: Expr) -> Expr | None:
    """d of `(q_idx - kv_idx) % d == 0` or `q_idx % d == kv_idx % d`."""
    match part:
        case Apply(ops.EQ, (Apply(ops.MOD, (x, d)), Const(0))):
            between = linear(x)
        case Apply(ops.EQ, (Apply(ops.MOD, (x, d)), Apply(ops.MOD, (y, other)))) if d == other:
            between = linear(x).plus(linear(y), -1)
        case _:
            return None
    factors = between.terms.get(ir.Q_IDX), between.terms.get(ir.KV_IDX)
    alone = len(between.terms) == 2 and between.const == 0
    fixed = axes(d) == Axis.NONE and not any(isinstance(n, ir.Load) for n in ir.walk(d))
    return d if alone and fixed and factors in ((1, -1), (-1, 1)) else None
