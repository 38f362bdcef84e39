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
"""Steps above it are taken where asked for only: their classes are calls of few tokens."""

SHORTEST = 128
"""Tokens of a class: a tile's."""

Result = tuple[Tensor, Tensor | None]
"""out [B, Hq, Q, Dv], and lse [B, Hq, Q] where the program has one."""

Ready = Callable[[Tensor, Tensor, Tensor], Result]
"""Runs a program on q, k and v."""

Start = Callable[[Program, Tensor, Tensor, Tensor, dict[str, object]], Ready]
"""Makes a program ready for calls on tensors such as q, k and v, with its arguments."""


@dataclass(frozen=True)
class Residues:
    """(q_idx - kv_idx) % step == apart, both of scalars, and the rest of the mask."""

    program: Program
    step: Expr
    apart: Expr
    sign: int
    """-1 where the mask says (kv_idx - q_idx) % step == apart."""
    rest: Expr

    def divides(self, step: int, q_len: int, kv_len: int) -> bool:
        """Whether tokens can be ordered by such a step."""
        return 1 < step <= min(q_len, kv_len)

    def ready(self, start: Start, step: int, shift: int, arguments: Mapping[str, object]) -> Ready:
        """Runs the program itself, class by class or sequence by sequence."""
        started: dict[int, Ready] = {}

        def run(q: Tensor, k: Tensor, v: Tensor) -> Result:
            lengths = q.shape[2], k.shape[2]
            q, k, v = (_whole(x, step) for x in (q, k, v))
            one_sequence = q.shape[0] <= step
            tensors = [_classes(x, step) for x in (q, k, v)]
            if shift:  # class r of queries meets class r - shift of keys
                tensors[1:] = [x.roll(shift, 3) for x in tensors[1:]]
            if one_sequence:
                tensors = [x.permute(0, 3, 1, 2, 4) for x in tensors]
            unbound = (x.unbind(0 if one_sequence else 3) for x in tensors)
            outs, lses = [], []
            for at, (own_q, own_k, own_v) in enumerate(zip(*unbound, strict=True)):
                if at not in started:
                    ragged = any(n % step for n in lengths)
                    made = _ordered(self, step, shift, one_sequence, ragged)
                    sizes = dict(zip(made.names, (*lengths, q.shape[0]), strict=False))
                    given = {**arguments, **sizes, made.which: at}
                    started[at] = start(made.program, own_q, own_k, own_v, given)
                out, lse = started[at](own_q, own_k, own_v)
                outs.append(out)
                lses.append(lse)
            out = _joined(outs, one_sequence)[:, :, : lengths[0]]
            found = [x for x in lses if x is not None]
            if not found:
                return out, None
            return out, _joined(found, one_sequence)[:, :, : lengths[0]]

        return run

    def counts(self, step: int, shift: int, binding: Binding, tile: tuple[int, int]) -> Counts:
        """Tiles of all classes of all sequences."""
        lengths = binding.q_len, binding.kv_len
        made = _ordered(self, step, shift, False, any(n % step for n in lengths))
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

    def ordered(self, step: int, shift: int, one_sequence: bool, ragged: bool) -> Program:
        """The program of a class, or of a sequence's classes."""
        return _ordered(self, step, shift, one_sequence, ragged).program


@dataclass(frozen=True)
class _Ordered:
    program: Program
    names: tuple[str, ...]
    """The parameters that are q_len, kv_len and perhaps batch as they were."""
    which: str
    """The parameter that is the sequence, or the class."""


def _joined(parts: list[Tensor], one_sequence: bool) -> Tensor:
    """[B, H, N, ...], of results by sequence [step, H, N / step, ...] or class [B, H, ...]."""
    if not one_sequence:
        return torch.stack(parts, 3).flatten(2, 3)
    parts = [x.movedim(0, 2).flatten(1, 2) for x in parts]
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
def _ordered(found: Residues, step: int, shift: int, one_sequence: bool, ragged: bool) -> _Ordered:
    program = found.program
    names = ("q_tokens", "kv_tokens", "sequences", "sequence" if one_sequence else "residue")
    *sizes, which = map(scalar, fresh(program, *names))
    if not one_sequence:
        sizes = sizes[:2]
    residue: Expr = ir.B if one_sequence else Scalar(which)

    def place(index: Expr, residue: Expr) -> Expr:
        return apply(ops.ADD, apply(ops.MUL, index, Const(step)), residue)

    met = residue
    if shift:
        met = apply(ops.MOD, apply(ops.ADD, residue, Const(step - shift)), Const(step))
    q_idx, kv_idx = place(ir.Q_IDX, residue), place(ir.KV_IDX, met)
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


def find(program: Program, mask: Expr, wanted: Expr | None = None) -> Residues | None:
    """The first step of a simplified mask whose every pair is so far apart, or the one wanted.

    None for a program with an output clause, which may read the mean of all values.
    """
    if program.output is not None:
        return None
    parts = list(flatten(ops.AND, mask))
    for part in parts:
        found = _step(part)
        if found is not None and wanted in (None, found[0]):
            rest = conjunction(tuple(other for other in parts if other is not part))
            return Residues(program, *found, rest)
    return None


def multiple(step: Expr) -> Expr:
    """(q_idx - kv_idx) % step == 0."""
    between = apply(ops.SUB, ir.Q_IDX, ir.KV_IDX)
    return apply(ops.EQ, apply(ops.MOD, between, step), Const(0))


def _step(part: Expr) -> tuple[Expr, Expr, int] | None:
    """(d, r, 1) of `(q_idx - kv_idx) % d == r`, (d, 0, 1) of `q_idx % d == kv_idx % d`."""
    match part:
        case Apply(ops.EQ, (Apply(ops.MOD, (x, d)), Apply(ops.MOD, (y, other)))) if d == other:
            between, r = linear(x).plus(linear(y), -1), Const(0)
        case Apply(ops.EQ, (Apply(ops.MOD, (x, d)), r)) | Apply(
            ops.EQ, (r, Apply(ops.MOD, (x, d)))
        ):
            between = linear(x)
        case _:
            return None
    factors = between.terms.get(ir.Q_IDX), between.terms.get(ir.KV_IDX)
    alone = len(between.terms) == 2 and between.const == 0
    if not (alone and _fixed(d) and _fixed(r) and factors in ((1, -1), (-1, 1))):
        return None
    return d, r, 1 if factors == (1, -1) else -1


def _fixed(expr: Expr) -> bool:
    return axes(expr) == Axis.NONE and not any(isinstance(n, ir.Load) for n in ir.walk(expr))
