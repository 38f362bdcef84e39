"""One block of work: the scores of some heads' queries against the keys their strip visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from attncc.backends.cpu import distance, workers
from attncc.backends.cpu.schedule import Interval, Run, Strip
from attncc.backends.cpu.tables import Tables
from attncc.ir.evaluate import Env, evaluate, evaluate_unchecked
from attncc.ir.expr import Axis, Expr, Load, axes, walk
from attncc.ir.program import Normalize
from attncc.tiles import BoundPlan

T = TypeVar("T")

BUDGET = 4 << 20
"""Bytes of scores computed at once, where one strip of one head is less.

Causal, 8 heads, 2048 tokens, 2 cores with 1 MiB of L2 each: 54 ms; 67 ms with 1 MiB, since Python
is then a larger part.
"""


class Buffers:
    """Scratch memory kept from block to block, since fresh pages cost more than arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, size: int) -> Tensor:
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = self.like.new_empty(size)
        return self.kept[name][:size]


Dropped = tuple[tuple[slice, Tensor], ...]


@dataclass(frozen=True)
class Problem:
    """A call's inputs in the layout that strips are cut from; N = batch * kv_heads, G = group.

    q [N, G, Q, D], k [N, KV, D], v [N, KV, Dv], contiguous, in the dtype computed in.
    """

    bound: BoundPlan
    tensors: Mapping[str, Tensor]
    tables: Tables
    q: Tensor
    k: Tensor
    v: Tensor
    by_distance: dict[Expr, Tensor] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(
        bound: BoundPlan,
        tensors: Mapping[str, Tensor],
        tables: Tables,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Problem:
        dtype = torch.promote_types(q.dtype, torch.float32)
        binding = bound.binding
        rows = binding.batch * binding.kv_heads
        group = binding.heads // binding.kv_heads
        return Problem(
            bound,
            tensors,
            tables,
            q.to(dtype).reshape(rows, group, *q.shape[2:]).contiguous(),
            k.to(dtype).reshape(rows, *k.shape[2:]).contiguous(),
            v.to(dtype).reshape(rows, *v.shape[2:]).contiguous(),
        )

    @cached_property
    def scale(self) -> float:
        """What q . k is multiplied by."""
        scale = self.bound.plan.program.scale
        if scale is None:
            return float(self.q.shape[-1] ** -0.5)
        number = self.number(scale)
        assert number is not None, "a scale is of scalars"
        return number

    def number(self, expr: Expr) -> float | None:
        """The value of what only scalars are part of, in double precision; None for others."""
        if axes(expr) or any(isinstance(node, Load) for node in walk(expr)):
            return None
        return float(evaluate(expr, Env({}, self.bound.binding.scalars, dtype=torch.float64)))

    @property
    def softmax(self) -> bool:
        return self.bound.plan.program.normalize is Normalize.SOFTMAX

    def env(self, rows: Interval, members: Interval) -> Env:
        """b, h and kv_head of some heads, to broadcast against [rows, members, queries, keys]."""
        binding = self.bound.binding
        group = self.q.shape[1]
        row = torch.arange(*rows).view(-1, 1, 1, 1)
        kv_head = row % binding.kv_heads
        positions = {
            "b": row // binding.kv_heads,
            "h": kv_head * group + torch.arange(*members).view(1, -1, 1, 1),
            "kv_head": kv_head,
        }
        return Env(positions, binding.scalars, self.tensors, dtype=self.q.dtype)

    def distances(self, expr: Expr) -> Tensor:
        """`distance.values` of all heads, kept."""
        if expr not in self.by_distance:
            rows, group = self.q.shape[:2]
            binding = self.bound.binding
            env = self.env((0, rows), (0, group))
            found = distance.values(expr, env, binding.q_len, binding.kv_len)
            self.by_distance[expr] = found.to(self.q.dtype)
        return self.by_distance[expr]

    def blocks(self, rows: Interval | None = None, fused: bool = False) -> Iterator[Block]:
        """All blocks of a range of rows, by default of all; scores fit the budget if they can.

        fused: nothing of a block's size is kept, so that they need not fit.
        """
        first, last = (0, len(self.q)) if rows is None else rows
        for group in self.tables.groups:
            own = max(first, group.rows[0]), min(last, group.rows[1])
            for strip in group.strips:
                if strip.runs and own[0] < own[1]:
                    whole = Block(self, strip, own, group.members)
                    for block in whole.cut(math.ceil((own[1] - own[0]) / workers.threads())):
                        yield from (block,) if fused else block.fitting()


@dataclass(frozen=True)
class Block:
    """Some heads' queries of one strip; R = rows * members * queries, W = keys of all runs."""

    problem: Problem
    strip: Strip
    rows: Interval
    members: Interval

    def cut(self, rows: int) -> Iterator[Block]:
        """Blocks of at most so many rows."""
        for start in range(*self.rows, rows):
            yield replace(self, rows=(start, min(start + rows, self.rows[1])))

    def fitting(self) -> Iterator[Block]:
        """Blocks whose scores fit the budget, of one row at least."""
        row = self.size // (self.rows[1] - self.rows[0]) * self.problem.q.element_size()
        return self.cut(max(1, BUDGET // row))

    def queries(self, x: Tensor) -> Tensor:
        """This block's part of a [N, G, Q, ...] tensor, a view."""
        strip = self.strip
        return x[slice(*self.rows), slice(*self.members), strip.start : strip.stop]

    def flat(self, x: Tensor) -> Tensor:
        """[rows, members, queries, C] as [rows, members * queries, C]."""
        return x.flatten(1, 2)

    def keys(self, x: Tensor, run: Run) -> Tensor:
        """One run's part of a [N, KV, C] tensor, a view."""
        return x[slice(*self.rows), run.start : run.stop]

    def runs(self) -> Iterator[tuple[Run, slice]]:
        """Each run with its columns."""
        start = 0
        for run in self.strip.runs:
            yield run, slice(start, start + len(run))
            start += len(run)

    @property
    def size(self) -> int:
        """Pairs computed."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        rows, members = self.rows[1] - self.rows[0], self.members[1] - self.members[0]
        return rows, members, self.height, self.strip.width

    @property
    def height(self) -> int:
        """Queries of the strip."""
        return self.strip.stop - self.strip.start

    @cached_property
    def heads_env(self) -> Env:
        """b, h and kv_head."""
        return self.problem.env(self.rows, self.members)

    def env(self, keys: Tensor, score: Tensor | None = None) -> Env:
        """Positions of this block's queries and the keys given, [rows, members, queries, keys]."""
        env = self.heads_env
        queries = torch.arange(self.strip.start, self.strip.stop)[:, None]
        positions = {**env.positions, "q_idx": queries, "kv_idx": keys}
        return replace(env, positions=positions, score=score)

    @cached_property
    def kv_idx(self) -> Tensor:
        """The keys of all runs, [W]."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self.strip.runs])

    def distances(self, values: Tensor, queries: Interval, keys: Interval) -> Tensor:
        """Of `Problem.distances`, what these heads read at some pairs, a view."""
        own = values[slice(*self.rows)] if len(values) > 1 else values
        own = own[:, slice(*self.members)] if own.shape[1] > 1 else own
        return distance.segment(own, self.problem.bound.binding.q_len, queries, keys)

    def products(self, left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
        """left [rows, R, C] . right [N, KV, C] over all runs, as [rows, members, queries, W]."""
        result = buffer[: self.size].view(left.shape[0], -1, self.strip.width)
        for run, columns in self.runs():
            torch.bmm(left, self.keys(right, run).transpose(1, 2), out=result[..., columns])
        return result.view(self.shape)

    @cached_property
    def dropped(self) -> Dropped:
        """Columns that need the mask, and where it drops pairs."""
        return self.shared("dropped", self._dropped)

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What other blocks of the same strip and heads have made; of any heads, if they may."""
        problem = self.problem
        varies = axes(problem.bound.plan.mask)
        rows: Interval = (0, 0)
        if varies & Axis.H:
            rows = self.rows
        elif varies & Axis.B:  # rows of one batch are alike
            first, last = (row // problem.bound.binding.kv_heads for row in self._ends)
            rows = (first, first) if first == last else self.rows
        members = self.members if varies & Axis.H else (0, 0)
        key = name, self.strip.start, rows, members, problem.q.dtype
        return problem.tables.mask(key, make)

    @property
    def _ends(self) -> Interval:
        """The first row and the last."""
        return self.rows[0], self.rows[1] - 1

    def keep(self, start: int, stop: int) -> Tensor:
        """The mask at some keys, [rows | 1, members | 1, queries | 1, keys | 1]."""
        mask = self.problem.bound.plan.mask
        keep = evaluate_unchecked(mask, self.env(torch.arange(start, stop)))
        keep = keep[(None,) * (4 - keep.dim())]
        return keep if axes(mask) & (Axis.B | Axis.H) != Axis.B else self._one_batch(keep)

    def _one_batch(self, keep: Tensor) -> Tensor:
        """One row for all where rows differ by their head alone."""
        binding = self.problem.bound.binding
        first, last = (row // binding.kv_heads for row in self._ends)
        return keep[:1] if first == last else keep

    def _dropped(self) -> Dropped:
        return tuple(
            (slice(start - run.start + columns.start, stop - run.start + columns.start), dropped)
            for run, columns in self.runs()
            for start, stop in run.masked
            for dropped in [~self.keep(start, stop)]
        )

    def drop(self, x: Tensor, value: float) -> Tensor:
        """Writes a value over the pairs that the mask drops."""
        for columns, dropped in self.dropped:
            x[..., columns].masked_fill_(dropped, value)
        return x

    def value(self, expr: Expr, raw: Tensor) -> Tensor:
        """An expression at every pair of the block, expanded but not copied."""
        return evaluate_unchecked(expr, self.env(self.kv_idx, raw)).expand(self.shape)
