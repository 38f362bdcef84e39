"""The backward in strips: weights again from lse, then every gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from attncc.backends.cpu import workers
from attncc.backends.cpu.block import Block, Buffers, Problem
from attncc.backends.cpu.forward import sink_of, unnormalized
from attncc.backends.cpu.scores import exp_, modified, raw_scores, reads_score
from attncc.ir.derivative import ONE, ZERO, derivative
from attncc.ir.evaluate import Env, evaluate_unchecked
from attncc.ir.expr import Expr, Load, Score, walk
from attncc.ir.program import Normalize

PRIVATE = 1 << 28
"""Elements that all workers' own sums may take: 1 GiB of float32."""


@dataclass
class Gradients:
    """Sums so far: q [N, G, Q, D], k and v as in Problem, captured tensors by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    captured: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What the forward left and what came back: out, dout [N, G, Q, Dv]; lse, dlse [N, G, Q]."""

    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None


def backward(problem: Problem, saved: Saved, wanted: frozenset[str]) -> Gradients:
    """Gradients of out and lse with respect to q, k, v and the captured tensors wanted."""
    delta = (saved.out * saved.dout).sum(-1)
    if saved.dlse is not None:
        delta = (delta - saved.dlse).masked_fill_(saved.lse == -math.inf, 0)
    shares = _shares(problem, wanted)
    parts = _parts(problem, wanted, shares)
    tasks = [
        partial(_work, _Worker(problem, saved, delta, part), share)
        for part, share in zip(parts, shares, strict=True)
    ]
    workers.run(tasks)
    return _sum(parts)


def _work(worker: _Worker, blocks: Sequence[Block]) -> None:
    for block in blocks:
        worker.add(block)


# -- sharing out the work


def _shares(problem: Problem, wanted: frozenset[str]) -> list[list[Block]]:
    """Each worker's blocks: of rows of its own, or where rows are few every so-many-th of all.

    The same blocks whatever thread is faster, so that sums come out the same each time.
    """
    rows, count = len(problem.q), workers.threads()
    everything = list(problem.blocks())
    if sum(block.size for block in everything) < workers.SMALL:
        return [everything]
    copied = sum(problem.tensors[name].numel() for name in wanted)
    count = min(count, max(1, PRIVATE // max(copied, 1)))
    if rows < count:
        copied += problem.k.numel() + problem.v.numel()
        count = min(count, max(rows, PRIVATE // copied))
    if rows < count:
        return [everything[at::count] for at in range(count)]
    edges = [rows * at // count for at in range(count + 1)]
    return [list(problem.blocks(ends)) for ends in pairwise(edges)]


def _parts(problem: Problem, wanted: frozenset[str], shares: list[list[Block]]) -> list[Gradients]:
    """Where each worker adds: the same sums where workers have rows of their own."""
    own_rows = len(shares) <= len(problem.q)
    q, k, v = (torch.zeros_like(x) for x in (problem.q, problem.k, problem.v))
    parts = []
    for at in range(len(shares)):
        if at and not own_rows:
            k, v = torch.zeros_like(k), torch.zeros_like(v)
        captured = {name: q.new_zeros(problem.tensors[name].shape) for name in wanted}
        parts.append(Gradients(q, k, v, captured))
    return parts


def _sum(parts: list[Gradients]) -> Gradients:
    total, *others = parts
    for part in others:
        for into, more in ((total.k, part.k), (total.v, part.v)):
            if into is not more:
                into += more
        for name, grad in part.captured.items():
            total.captured[name] += grad
    return total


class _Worker:
    """Adds one block after the other to the gradients."""

    def __init__(self, problem: Problem, saved: Saved, delta: Tensor, grads: Gradients) -> None:
        self.problem = problem
        self.saved = saved
        self.delta = delta
        self.grads = grads
        self.buffers = Buffers(problem.q)
        plan = problem.bound.plan
        self.slope = derivative(plan.score, Score())
        self.factors = _factors(plan.score, grads)
        self.reads_raw = any(map(reads_score, (self.slope, *self.factors.values())))
        self.sink_factors = _factors(plan.program.sink, grads)

    def add(self, block: Block) -> None:
        raw = raw_scores(block, self.buffers)
        scores = modified(block, raw, self.buffers, keep=self.reads_raw)
        weights = self._weights(block, scores)
        dscore = self._dscore(block, weights)
        self._add_captured(block, dscore, raw)
        if self.sink_factors:
            self._add_sink(block)
        self._add_qk(block, self._times(block, dscore, self.slope, raw))

    def _weights(self, block: Block, scores: Tensor) -> Tensor:
        """Normalized weights; overwrites the scores."""
        if not self.problem.softmax:
            return unnormalized(block, scores)
        block.drop(scores, -math.inf)
        lse = block.queries(self.saved.lse)[..., None]
        return exp_(scores.sub_(lse.masked_fill(lse == -math.inf, 0)))

    def _dscore(self, block: Block, weights: Tensor) -> Tensor:
        """Gradient of the score, 0 at dropped pairs; adds v's on the way."""
        dout = block.flat(block.queries(self.saved.dout))
        flat = block.flat(weights)
        for run, columns in block.runs():
            _add_product(block.keys(self.grads.v, run), flat[..., columns], dout)
        dweights = block.products(dout, self.problem.v, self.buffers("dweights", block.size))
        match self.problem.bound.plan.program.normalize:
            case Normalize.SOFTMAX:
                return dweights.sub_(block.queries(self.delta)[..., None]).mul_(weights)
            case Normalize.SIGMOID:
                return dweights.mul_(weights).mul_(1 - weights)
            case Normalize.NONE:
                return block.drop(dweights, 0)

    def _times(self, block: Block, dscore: Tensor, factor: Expr, raw: Tensor) -> Tensor:
        """dscore * factor, 0 at dropped pairs whatever the factor is there."""
        if factor == ONE:
            return dscore
        return block.drop(dscore * block.value(factor, raw), 0)

    def _add_qk(self, block: Block, dot: Tensor) -> None:
        """Adds gradients of q and k, given that of q . k * scale."""
        problem, flat = self.problem, block.flat(dot)
        scaled = block.flat(block.queries(problem.q) * problem.scale)
        dq = torch.zeros_like(scaled)
        for run, columns in block.runs():
            dq.baddbmm_(flat[..., columns], block.keys(problem.k, run))
            _add_product(block.keys(self.grads.k, run), flat[..., columns], scaled)
        into = block.queries(self.grads.q)
        into.copy_(dq.view(into.shape).mul_(problem.scale))

    def _add_captured(self, block: Block, dscore: Tensor, raw: Tensor) -> None:
        for load, factor in self.factors.items():
            env = block.env(block.kv_idx, raw)
            self._scatter(load, env, self._times(block, dscore, factor, raw))

    def _add_sink(self, block: Block) -> None:
        """The sink's weight is exp(sink - lse), and its value is 0."""
        sink = sink_of(block)
        assert sink is not None
        lse = block.queries(self.saved.lse)[..., None]
        weight = torch.exp(sink - lse).masked_fill_(lse == -math.inf, 0)
        dsink = -weight * block.queries(self.delta)[..., None]
        env = block.env(torch.zeros(1, dtype=torch.int64))
        for load, factor in self.sink_factors.items():
            self._scatter(load, env, dsink * evaluate_unchecked(factor, env))

    def _scatter(self, load: Load, env: Env, values: Tensor) -> None:
        """Adds each value to the element that the load reads there."""
        into = self.grads.captured[load.tensor.name]
        if into.numel() == 0:
            return
        linear = torch.zeros((1, 1, 1, 1), dtype=torch.int64)
        for index, size, stride in zip(load.at, into.shape, into.stride(), strict=True):
            linear = linear + evaluate_unchecked(index, env).clamp(0, size - 1) * stride
        same = [dim for dim in range(4) if linear.shape[dim] < values.shape[dim]]
        if same:  # the index does not vary along them, so sum first
            values = values.sum(same, keepdim=True)
        into.view(-1).scatter_add_(0, linear.flatten(), values.flatten())


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left^T . right, batched."""
    into.baddbmm_(left.transpose(1, 2), right)


def _factors(expr: Expr | None, grads: Gradients) -> dict[Load, Expr]:
    """For each read of a tensor whose gradient is wanted, the slope of the expression in it."""
    loads = [] if expr is None else [node for node in walk(expr) if isinstance(node, Load)]
    wanted = dict.fromkeys(load for load in loads if load.tensor.name in grads.captured)
    slopes = {load: derivative(expr, load) for load in wanted if expr is not None}
    return {load: slope for load, slope in slopes.items() if slope != ZERO}
