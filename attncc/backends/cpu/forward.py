"""The forward in strips: one softmax over all keys that a strip of queries visits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncc.backends.cpu import workers
from attncc.backends.cpu.block import Block, Buffers, Problem
from attncc.backends.cpu.fused import Fused
from attncc.backends.cpu.scores import exp_, scores
from attncc.ir.evaluate import evaluate_unchecked
from attncc.ir.program import Normalize


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """out [N, G, Q, Dv] and lse [N, G, Q], which is -inf where the program is no softmax."""
    q, v = problem.q, problem.v
    out = _cleared(problem, q.new_empty(*q.shape[:3], v.shape[-1]))
    lse = q.new_full(q.shape[:3], -math.inf)
    fuse = Fused.of(problem)
    todo = sorted(
        problem.blocks(fused=fuse is not None and not fuse.biased), key=lambda block: block.size
    )

    def work() -> None:
        buffers = Buffers(q)
        while True:
            try:
                block = todo.pop()  # heaviest first
            except IndexError:
                return
            _attend(block, buffers, fuse, out, lse)

    small = sum(block.size for block in todo) < workers.SMALL
    workers.run([work] * (1 if small else min(workers.threads(), len(todo))))
    return out, lse


def _cleared(problem: Problem, out: Tensor) -> Tensor:
    """0 where no block comes; only there, since all threads of torch would wake to fill it."""
    if not problem.tables.groups:
        return out.zero_()
    for group in problem.tables.groups:
        for strip in group.strips:
            if not strip.runs:
                part = out[slice(*group.rows), slice(*group.members), strip.start : strip.stop]
                part.zero_()
    return out


def _attend(block: Block, buffers: Buffers, fuse: Fused | None, out: Tensor, lse: Tensor) -> None:
    """Fills a block's part of out and lse."""
    found = None if fuse is None else fuse.attend(block, buffers)
    if found is not None:
        _fill(block, *found, out, lse)
        return
    for part in block.fitting():
        values = scores(part, buffers)
        if part.problem.softmax:
            total, sums = _exponentials(part.drop(values, -math.inf))
            _fill(part, _mix(part, values).div_(total[..., None]), sums, out, lse)
        else:
            part.queries(out).copy_(_mix(part, unnormalized(part, values)))


def _fill(block: Block, mixed: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """Puts a block's softmax into its place, once the sink has had its share."""
    sink = sink_of(block)
    if sink is not None:
        alone, sums = (
            sums,
            torch.logaddexp(sums, sink[..., 0]).masked_fill_(sums == -math.inf, -math.inf),
        )
        mixed.mul_(torch.exp(alone - sums).nan_to_num_(0)[..., None])
    block.queries(out).copy_(mixed)
    block.queries(lse).copy_(sums)


def unnormalized(block: Block, scores: Tensor) -> Tensor:
    """Weights where there is no softmax, 0 at dropped pairs; overwrites the scores."""
    if block.problem.bound.plan.program.normalize is Normalize.SIGMOID:
        scores.sigmoid_()
    return block.drop(scores, 0)


def sink_of(block: Block) -> Tensor | None:
    """The sink of the block's heads, four axes to broadcast against [rows, members, queries, 1]."""
    sink = block.problem.bound.plan.program.sink
    if sink is None:
        return None
    value = evaluate_unchecked(sink, block.env(torch.zeros(1, dtype=torch.int64)))
    return value[(None,) * (4 - value.dim())]


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Turns scores into weights but for the rows' sums, which it returns with each row's lse."""
    top = scores.amax(-1)
    exp_(scores.sub_(top.masked_fill(top == -math.inf, 0)[..., None]))
    total = scores.sum(-1)
    lse = top + total.log()
    return total.masked_fill_(total == 0, 1), lse  # 0: no key was kept


def _mix(block: Block, weights: Tensor) -> Tensor:
    """weights . v over all runs, [rows, members, queries, Dv]."""
    flat = block.flat(weights)
    mixed: Tensor | None = None
    for run, columns in block.runs():
        values = block.keys(block.problem.v, run)
        if mixed is None:
            mixed = torch.bmm(flat[..., columns], values)
        else:
            mixed.baddbmm_(flat[..., columns], values)
    assert mixed is not None, "blocks have runs"
    return mixed.view(*block.shape[:3], mixed.shape[-1])
