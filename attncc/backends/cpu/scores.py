"""What a program does to q . k * scale, in the memory of the raw scores where that can be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attncc.backends.cpu import distance
from attncc.backends.cpu.block import Block, Buffers, Problem
from attncc.backends.cpu.schedule import Run
from attncc.ir import ops
from attncc.ir.evaluate import RULES, evaluate_unchecked
from attncc.ir.expr import Apply, Axis, Expr, Score, axes, walk
from attncc.ir.ops import Op

IN_PLACE = frozenset(
    {
        *(ops.ADD, ops.SUB, ops.MUL, ops.DIV, ops.MIN, ops.MAX, ops.NEG, ops.ABS, ops.TANH),
        *(ops.EXP, ops.EXP2, ops.LOG, ops.LOG2, ops.SQRT, ops.RSQRT, ops.SIGMOID),
    }
)
"""Operators whose rule takes `out`, or has a faster one below."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on a score, which stands for the argument that is None."""

    op: Op
    args: tuple[Expr | None, ...]


@lru_cache(maxsize=256)
def steps(score: Expr) -> tuple[Step, ...] | None:
    """What is done to Score(), first to last; None where a value that reads it is read twice."""
    match score:
        case Score():
            return ()
        case Apply(op, args) if op in IN_PLACE:
            inner = [arg for arg in args if reads_score(arg)]
            before = steps(inner[0]) if len(inner) == 1 else None
            if before is None:
                return None
            step = Step(op, tuple(None if arg is inner[0] else arg for arg in args))
            return *before, step
        case _:
            return None


def reads_score(expr: Expr) -> bool:
    """Whether q . k is part of it."""
    return any(isinstance(node, Score) for node in walk(expr))


def raw_scores(block: Block, buffers: Buffers, times: float = 1.0) -> Tensor:
    """q . k * scale, times a number."""
    problem = block.problem
    scaled = block.flat(block.queries(problem.q) * (problem.scale * times))
    return block.products(scaled, problem.k, buffers("scores", block.size))


def scores(block: Block, buffers: Buffers) -> Tensor:
    """The program's scores, writable; what they are first multiplied by, the queries are."""
    todo = steps(block.problem.bound.plan.score)
    if todo is None:
        return modified(block, raw_scores(block, buffers), buffers)
    times = 1.0
    while todo:
        factor = _factor(block.problem, todo[0])
        if factor is None:
            break
        times, todo = times * factor, todo[1:]
    return _take_all(todo, block, raw_scores(block, buffers, times), buffers)


def modified(block: Block, raw: Tensor, buffers: Buffers, keep: bool = False) -> Tensor:
    """The same, given q . k * scale.

    keep: raw is read again later; else it may be overwritten, or be the result.
    """
    score = block.problem.bound.plan.score
    todo = steps(score)
    if todo is None:
        result = block.value(score, raw).contiguous()
        return result.clone() if result.data_ptr() == raw.data_ptr() else result
    if keep and todo:
        raw = buffers("modified", block.size).view(block.shape).copy_(raw)
    return _take_all(todo, block, raw, buffers)


def _factor(problem: Problem, step: Step) -> float | None:
    """The number that a step multiplies by; None where it does something else.

    Also where the number is so far from 1 that queries times it might be out of range.
    """
    match step:
        case Step(ops.MUL, (None, by)) | Step(ops.MUL, (by, None)) | Step(ops.DIV, (None, by)):
            number = None if by is None else problem.number(by)
        case _:
            number = None
    if number is None or not 2.0**-30 < abs(number) < 2.0**30:
        return None
    return number if step.op is ops.MUL else 1 / number


def _take_all(todo: tuple[Step, ...], block: Block, scores: Tensor, buffers: Buffers) -> Tensor:
    for run, columns in block.runs() if todo else ():
        for step in todo:
            _take(step, block, run, scores[..., columns], buffers)
    return scores


def _take(step: Step, block: Block, run: Run, x: Tensor, buffers: Buffers) -> None:
    """Overwrites x, the scores of a run's keys, with the step's result."""
    if step.op is ops.TANH:
        tanh_(x, buffers)
        return
    args = (x if arg is None else _aside(arg, block, run, buffers) for arg in step.args)
    RULES[step.op](*args, out=x)


def _aside(expr: Expr, block: Block, run: Run, buffers: Buffers) -> Tensor:
    """The value of what reads no score at a run's pairs, to broadcast against them."""
    varies = axes(expr)
    if Axis.Q in varies and Axis.KV in varies and distance.by_distance(expr):
        values = block.problem.distances(expr)
        queries = block.strip.start, block.strip.stop
        found = block.distances(values, queries, (run.start, run.stop))
        return distance.spread(found, block.height, buffers)
    env = block.env(torch.arange(run.start, run.stop))
    return evaluate_unchecked(expr, env).to(env.dtype)


TANH = -0.33333141, 0.13325822, -0.05304221, 0.01723548
"""tanh(x) / x - 1 in powers of x^2, 2e-8 off where |x| <= SHORT: least squares over that."""

SHORT = 0.5
"""A cap is for outliers, so most scores are well below it."""


CHUNK = 1 << 17
"""Elements that go through all of tanh at once, for its scratch memory to stay in a cache."""


def tanh_(x: Tensor, buffers: Buffers) -> Tensor:
    """In place, within 4 units in the last place; torch's takes 2.5 ns an element (AVX-512)."""
    for part in torch.split(x.view(-1, x.shape[-1]), max(1, CHUNK // x.shape[-1])):
        low, high = torch.aminmax(part)
        if x.dtype is torch.float32 and max(-float(low), float(high)) <= SHORT:
            scratch = (buffers(name, part.numel()).view(part.shape) for name in ("square", "sum"))
            _short_tanh(part, *scratch)
        else:
            _long_tanh(part)
    return x


def _long_tanh(x: Tensor) -> None:
    """1.8 ns: 1 / (1 + 2 / y) where y = exp(2 x) - 1; beyond 20 it is 1 in any dtype."""
    x.clamp_(-20, 20).mul_(2).expm1_().reciprocal_().mul_(2).add_(1).reciprocal_()


def _short_tanh(x: Tensor, square: Tensor, total: Tensor) -> None:
    """0.9 ns, where all are SHORT."""
    first, second, third, fourth = (x.new_tensor(number) for number in TANH)
    torch.mul(x, x, out=square)
    torch.mul(square, fourth, out=total).add_(third)
    torch.addcmul(second, total, square, out=total)
    torch.addcmul(first, total, square, out=total).mul_(square)
    x.addcmul_(x, total)


def exp_(x: Tensor) -> Tensor:
    """exp in place by exp2, which takes a third of the time; for arguments <= 0, or near it.

    The error of the product, |x| units in the last place, is then one of a small weight.
    """
    return x.mul_(math.log2(math.e)).exp2_()
