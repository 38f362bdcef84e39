"""Searches: comparisons with a sorted tensor as limits on the position that it is read at."""

from __future__ import annotations

from collections.abc import Iterable

from attncc.ir import expr as ir
from attncc.ir.expr import Axis, Expr, Index, Load, TensorParam, axes
from attncc.ir.ops import Kind
from attncc.ir.plan import READ_AT, Ranges, Search
from attncc.ir.rewrite import Rewriter
from attncc.passes.facts import Facts
from attncc.passes.linear import Linear
from attncc.passes.monotone import direction

TOKENS = Axis.Q | Axis.KV


class Searches:
    """The searches of a plan; equal ones are one."""

    def __init__(self, simplify: Rewriter, taken: frozenset[str]) -> None:
        """taken: names of the program's own, which no search may have."""
        self.simplify = simplify
        self.taken = taken
        self.found: dict[tuple[Load, Expr, bool], Search] = {}

    def limit(
        self, load: Load, upper: bool, value: Linear, position: Index, facts: Facts
    ) -> Linear | None:
        """What load <= value (`upper`) or load >= value says of the load's last index.

        That it is at most (at least) this; None where nothing of the kind is known. The value does
        not read the position.
        """
        if not load.at or not facts.rises(load):
            return None
        row = load.at[:-1]
        if any(axes(index) & TOKENS for index in row):
            return None
        wanted = self.simplify(value.expr())
        along = axes(wanted) & TOKENS
        if along and direction(wanted, along, facts) not in (0, 1):
            return None  # ends of a tile would not bound what is found
        search = self._search(Load(load.tensor, (*row, position)), wanted, upper, position)
        return Linear({_read(search): 1}, -1 if upper else 0)

    def own(self) -> frozenset[tuple[TensorParam, bool]]:
        """(what it makes, past) of those that seek the element at each position itself."""
        return frozenset(
            (search.tensor, search.past)
            for search in self.found.values()
            if isinstance(search.value, Load)
            and search.value.tensor == search.of.tensor
            and search.value.at[:-1] == search.of.at[:-1]
            and search.value.at[-1] in (ir.Q_IDX, ir.KV_IDX)
        )

    def read_by(self, ranges: Iterable[Ranges]) -> tuple[Search, ...]:
        """Those that some range reads, or another of them, in the order they were found."""
        ends = [end for r in ranges for s in (*r.visit, *r.unmasked) for end in (s.lo, s.hi)]
        read = _tensors(ends)
        kept: list[Search] = []
        for search in reversed(self.found.values()):  # one reads only those found before it
            if search.tensor in read:
                kept.append(search)
                read |= _tensors([search.value])
        return tuple(reversed(kept))

    def _search(self, of: Load, value: Expr, past: bool, position: Index) -> Search:
        if (of, value, past) not in self.found:
            tensor = self._tensor(of, value, past, position)
            self.found[of, value, past] = Search(tensor, of, value, past)
        return self.found[of, value, past]

    def _tensor(self, of: Load, value: Expr, past: bool, position: Index) -> TensorParam:
        varies = axes(value)
        for index in of.at[:-1]:
            varies |= axes(index)
        sizes = ((Axis.B, "batch"), (Axis.H, "heads"), (Axis.Q, "q_len"), (Axis.KV, "kv_len"))
        dims = tuple(size for axis, size in sizes if varies & axis)
        side = "key" if position == ir.KV_IDX else "query"
        name = self._name(f"{'past' if past else 'first'}_{side}")
        return TensorParam(name, Kind.INT, dims, sorted=bool(varies & TOKENS))

    def _name(self, stem: str) -> str:
        names = self.taken.union(search.tensor.name for search in self.found.values())
        number = 0
        while f"{stem}_{number}" in names:
            number += 1
        return f"{stem}_{number}"


def _tensors(exprs: Iterable[Expr]) -> set[TensorParam]:
    return {node.tensor for expr in exprs for node in ir.walk(expr) if isinstance(node, Load)}


def _read(search: Search) -> Load:
    return Load(search.tensor, tuple(READ_AT[str(dim)] for dim in search.tensor.dims))
