"""Runs the kernels that list tiles: no host synchronisation, and once a BoundPlan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attncc.backends.triton import kernels
from attncc.backends.triton.arguments import Values, captured
from attncc.backends.triton.classify import KEYS, QUERIES, Side, bounded
from attncc.backends.triton.kernels import Kernel
from attncc.backends.triton.terms import Test, tile_test
from attncc.backends.triton.versions import OPTIONS
from attncc.binding import Binding
from attncc.ir.expr import Axis, axes
from attncc.ir.ops import Kind
from attncc.ir.plan import Plan
from attncc.plans import CallPlan
from attncc.tiles import BoundPlan
from attncc.tiles.host import visited

CHUNK = 128
"""Tiles tested at once, by one warp, and skipped at once where their common test says so."""
WIDTH = 1024
"""Positions read at once for a chunk's summary."""
SUMMARY_WARPS = 4
LIST_WARPS = 1
"""One warp scans without a barrier, and many rows fit on a multiprocessor."""


@dataclass(frozen=True)
class Lists:
    """Tiles that each row of tiles visits; [B|1, H|1]: 1 where nothing varies with b (or h).

    index: int16 (int32 above 32767 tiles), flat: a row's full tiles from its start on, its partial
           ones behind them, both ascending.
    start: int64 [B|1, H|1, rows].
    full_count, partial_count: int32 [B|1, H|1, rows].
    order: int32 [B|1, H|1, rows], query tiles with the most key tiles first; None of key tiles.
    """

    index: Tensor
    start: Tensor
    full_count: Tensor
    partial_count: Tensor
    order: Tensor | None


@dataclass(frozen=True)
class Summaries:
    """What the tile test reads of one axis: [terms, B|1, H|1, tiles + chunks]."""

    ints: Tensor
    floats: Tensor


def key_lists(bound: BoundPlan) -> Lists:
    """Per query tile, its key tiles; a ragged last key tile counts as partial."""
    return _kept(bound).lists(QUERIES, KEYS)


def query_lists(bound: BoundPlan) -> Lists:
    """Per key tile, its query tiles."""
    return _kept(bound).lists(KEYS, QUERIES)


def _kept(bound: BoundPlan) -> ListMaker:
    """One maker for all calls that keep the same pairs."""
    home = bound.origin if isinstance(bound, CallPlan) else bound
    made = home.kept.get("triton lists")
    if not isinstance(made, ListMaker):
        made = home.kept["triton lists"] = ListMaker(home)
    return made


class ListMaker:
    """The lists of one BoundPlan; layers that share it share them."""

    def __init__(self, bound: BoundPlan, chunk: int = CHUNK, width: int = WIDTH) -> None:
        self.bound = bound
        self.test = test_of(bound.plan)
        self.chunk = chunk
        self.width = width
        self.made: dict[str, Lists] = {}
        self.summaries: dict[str, Summaries] | None = None

    def lists(self, rows: Side, columns: Side) -> Lists:
        if rows.at not in self.made:
            self.made[rows.at] = self._lists(rows, columns)
        return self.made[rows.at]

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        binding = self.bound.binding
        doubles = any(x.dtype == torch.float64 for x in binding.tensors.values())
        return kernels.lists(self.bound.plan, doubles)

    def _tiles(self, side: Side) -> int:
        return self.bound.q_tiles if side is QUERIES else self.bound.kv_tiles

    def _lists(self, rows: Side, columns: Side) -> Lists:
        binding = self.bound.binding
        varies = axes(self.bound.plan.mask)
        outer = _outer(binding, varies)
        shape = (*outer, self._tiles(rows))
        size = room(self.bound, rows, columns)
        dtype = torch.int16 if self._tiles(columns) <= 32767 else torch.int32
        index = torch.empty(math.prod(outer) * size, dtype=dtype, device=binding.device)
        start = torch.empty(shape, dtype=torch.int64, device=binding.device)
        counts = torch.empty((2, *shape), dtype=torch.int32, device=binding.device)
        full_count, partial_count = counts
        if index.numel() == 0:
            counts.zero_()
            start.zero_()
        else:
            values = self._common() | {
                "index_ptr": index,
                "start_ptr": start,
                "full_count_ptr": full_count,
                "partial_count_ptr": partial_count,
                "list_size": size,
            }
            self._start(f"{columns.one}_lists", (shape[2], *outer), values, LIST_WARPS)
        order = None
        if rows is QUERIES:
            order = (full_count + partial_count).argsort(dim=-1, descending=True, stable=True)
            order = order.to(torch.int32)
        return Lists(index, start, full_count, partial_count, order)

    def _start(self, name: str, grid: tuple[int, ...], values: Values, warps: int) -> None:
        kernel = self.kernels[name]
        arguments = {name: values[name] for name in kernel.arguments}
        kernel.function[grid](**arguments, num_warps=warps, **OPTIONS)

    def _common(self) -> Values:
        """What every kernel may name; makes the summaries where they are not made yet."""
        if self.summaries is None:
            self.summaries = self._empty_summaries()
            if self.test.terms:
                self._summarize()
        return self._arguments(self.summaries)

    def _arguments(self, summaries: Mapping[str, Summaries]) -> Values:
        binding = self.bound.binding
        values = captured(self.bound)
        values |= {
            "GROUP": binding.heads // binding.kv_heads,
            "BLOCK_M": self.bound.tile[0],
            "BLOCK_N": self.bound.tile[1],
            "CHUNK": self.chunk,
            "WIDTH": self.width,
        }
        for side in (QUERIES, KEYS):
            found = summaries[side.at]
            _, batch, heads, entries = found.ints.shape
            values |= {
                f"{side.at}_tiles": self._tiles(side),
                f"{side.at}_entries": entries,
                f"{side.at}_int_ptr": found.ints,
                f"{side.at}_float_ptr": found.floats,
                f"{side.at}_stride_b": heads * entries if batch > 1 else 0,
                f"{side.at}_stride_h": entries if heads > 1 else 0,
                f"{side.at}_stride_term": batch * heads * entries,
            }
        return values

    def _summarize(self) -> None:
        assert self.summaries is not None
        varies = self.test.varies(Axis.Q) | self.test.varies(Axis.KV)
        read = [side for side in (QUERIES, KEYS) if self.test.of(side.axis)]
        entries = sum(self.summaries[side.at].ints.shape[3] for side in read)
        grid = (entries, *_outer(self.bound.binding, varies))
        self._start("summarize", grid, self._arguments(self.summaries), SUMMARY_WARPS)

    def _empty_summaries(self) -> dict[str, Summaries]:
        return {side.at: self._empty(side) for side in (QUERIES, KEYS)}

    def _empty(self, side: Side) -> Summaries:
        terms = self.test.of(side.axis)
        tiles = self._tiles(side)
        entries = tiles + -(-tiles // self.chunk)
        shape = (*_outer(self.bound.binding, self.test.varies(side.axis)), entries)
        floats = sum(term.kind is Kind.FLOAT for term in terms)
        device = self.bound.binding.device
        return Summaries(
            torch.empty((len(terms) - floats, *shape), dtype=torch.int64, device=device),
            torch.empty((floats, *shape), dtype=torch.float32, device=device),
        )


def _outer(binding: Binding, varies: Axis) -> tuple[int, int]:
    batch = binding.batch if varies & Axis.B else 1
    return batch, binding.heads if varies & Axis.H else 1


@lru_cache(maxsize=256)
def test_of(plan: Plan) -> Test:
    """The tile test of a plan."""
    return tile_test(plan)


# -- how much room an index needs


def room(bound: BoundPlan, rows: Side, columns: Side) -> int:
    """Elements of the index for one (b, h): what all rows may visit, as far as the host knows."""
    test = test_of(bound.plan)
    segment = test.keys if columns is KEYS else test.queries
    if not bounded(segment):
        return bound.q_tiles * bound.kv_tiles
    found = visited((segment,), rows.axis, bound.binding, bound.tile)
    return int(found.sum(-1).max()) if found.numel() else 0
